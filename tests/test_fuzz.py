"""Hostile input of every kind: the only ends are success, a reported skip, or an error for people.

Never another exception, never longer than 20 seconds, never a write outside of the run's own folder.
`pytest -m long tests/test_fuzz.py` tries ten times as many cases.
"""

import io
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import graf
from graf.app import builders
from graf.app.loading import read_dataset_info
from graf.app.runs import RunFolder, read_first
from graf.base.errors import UserError
from graf.config import load_config
from graf.evaluation.fidelity import read_scores
from graf.geometry.views import PoseSampler
from graf.runtime import logs
from graf.runtime.amp import choose_precision
from graf.runtime.checkpoint import read_checkpoint, restore
from graf.runtime.logs import RunLog
from graf.runtime.sealed_archive import write_sealed

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"
SECONDS = 20
CASES = [25, pytest.param(250, marks=pytest.mark.long)]

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_watched: list[tuple[Path, list[str]]] = []  # the folder that may be written to, and what was written elsewhere
_ends = {"success": 0, "refusal": 0}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's own record of what a program does to files (PEP 578); a hook stays for the life of the process."""
    if not _watched or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.symlink"):
        return
    path = arguments[0]
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
        return
    if isinstance(path, (str, bytes, os.PathLike)):
        allowed, found = _watched[-1]
        place = Path(os.path.realpath(os.fsdecode(path)))
        if place != Path(os.devnull) and allowed != place and allowed not in place.parents:
            found.append(f"{event} {place}")


sys.addaudithook(_audit)


@contextmanager
def only_for_people(allowed: Path) -> Iterator[None]:
    """The claims of this file about what happens inside."""
    found: list[str] = []
    has_text = True
    _watched.append((allowed.resolve(), found))
    started = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        _ends["success"] += 1
    except UserError as error:
        _ends["refusal"] += 1
        has_text = bool(str(error).strip())
    finally:
        _watched.pop()
    assert has_text
    assert time.monotonic() - started < SECONDS
    assert found == []


def try_cases(
    cases: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None], ends: tuple[str, ...] = tuple(_ends)
) -> None:
    """Call `check` with so many values, among which each of these ends must occur: a claim about none says nothing."""
    _ends.update(success=0, refusal=0)
    relaxed = settings(
        max_examples=cases, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    relaxed(given(strategy)(lambda value: check(value)))()
    assert all(_ends[end] for end in ends), _ends


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(logs, "_said", set())
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def inside(tmp_path) -> Path:
    """The one folder that may be written to."""
    folder = tmp_path / "inside"
    folder.mkdir()
    return folder


TEXT = st.text(max_size=40)
PATHS = ("", " ", ".", "..", "../../x", "/etc/passwd", "a/b", "a\\b", "con", "x\n", "\x00", "\u202e", "é" * 90)
VALUES = ("9" * 5000, "nan", "-inf", "1e400", "0x10", "2024-01-01", "1:2:3", "null", "~", "[]", "{}", "[[1]]", "*a")
NASTY = st.sampled_from([*PATHS, *VALUES, "&a 1", "!!int 3"])
SAME = object()  # stands for what is there already
NUMBERS = st.one_of(st.integers(), st.floats(), st.just(float("nan")), st.just(10**400))
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT, NASTY),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(TEXT, NASTY), inner, max_size=4)),
    max_leaves=12,
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with flipped bits, cut, doubled, or with a piece of it somewhere else."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "move", "zero"]))
        if not content:
            break
        if kind == "flip":
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=20))
        elif kind == "move":
            piece = content[at : at + draw(st.integers(1, 200))]
            content[draw(st.integers(0, len(content))) :] += piece
        else:
            content[at : at + 40] = bytes(len(content[at : at + 40]))
    return bytes(content)


# ---------------------------------------------------------------- configurations


SECTIONS = {name: values for name, values in load_config(SMOKE).model_dump().items() if isinstance(values, dict)}
ODD_KEYS = ("expname", "seed", "data", "nerf", "inherit_from", "training.optimizer.x", "a.b.c", "", ".", "data.")
KEYS = st.sampled_from([*(f"{name}.{key}" for name, values in SECTIONS.items() for key in values), *ODD_KEYS])


@pytest.mark.parametrize("cases", CASES)
def test_overrides(cases, inside):
    value = st.one_of(TEXT, NASTY, PLAIN.map(lambda plain: json.dumps(plain, default=str)))
    good = st.sampled_from(
        [(f"{name}.{key}", json.dumps(now)) for name in SECTIONS for key, now in SECTIONS[name].items()]
    )

    def check(overrides):
        with only_for_people(inside):
            load_config(SMOKE, [f"{key}={text}" for key, text in overrides])

    try_cases(cases, st.lists(st.one_of(good, st.tuples(KEYS, value)), min_size=1, max_size=3), check)


@pytest.mark.parametrize("cases", CASES)
def test_configuration_files(cases, inside):
    file = inside / "a.yaml"
    lines = st.lists(st.one_of(TEXT, NASTY, st.sampled_from(SMOKE.read_text().splitlines())), max_size=20)
    mappings = st.dictionaries(KEYS, PLAIN, max_size=4).map(lambda plain: json.dumps(plain, default=str))
    texts = st.one_of(lines.map("\n".join), mappings, damaged(SMOKE.read_bytes()))

    def check(content):
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        with only_for_people(inside):
            load_config(file)

    try_cases(cases, texts, check)


#: nine lines that stand for 9^9 values
BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "\n".join(
    f"{name}: &{name} [{','.join(9 * [f'*{before}'])}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a [*a]",
        "[" * 20_000,
        "a: " * 5_000,
        "x: " + "9" * 1_000_000,
        "seed: 0x" + "f" * 20_000,
        "training: {batch_size: 0b1" + "1" * 20_000 + "}",
        "a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nc: {<<: [*b, *b]}",
        "a: 1\nb: 2\na: 3",
        "data: {imsize: 32, imsize: 64}",
        "seed: 2024-01-01",
        "? [1, 2]\n: 3",
        "<<: {seed: 3}",
        "evaluation: {seed: 4294967296}",
        "training: {memory_budget: '" + "9" * 400 + "GiB'}",
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_known_attacks_by_yaml(text, inside):
    (inside / "a.yaml").write_text(text)
    with only_for_people(inside):
        load_config(inside / "a.yaml")


# ---------------------------------------------------------------- photographs


def encode(suffix: str, size: tuple[int, int] = (20, 17)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(buffer, format=suffix)
    return buffer.getvalue()


FORMATS = {".png": "PNG", ".jpg": "JPEG", ".bmp": "BMP", ".gif": "GIF", ".ppm": "PPM", ".tif": "TIFF", ".webp": "WEBP"}


def open_folder(inside: Path, kind: str, *keys: str) -> None:
    config = load_config(SMOKE, [f"data.datadir={inside / 'photos'}", f"data.type={kind}", "data.imsize=16", *keys])
    photographs = builders.open_photographs(config)
    builders.describe_dataset(config, photographs)
    for index in range(len(photographs)):
        photographs[index]


def empty_folder(inside: Path) -> Path:
    folder = inside / "photos"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@pytest.mark.parametrize("cases", CASES)
def test_images(cases, inside):
    whole = {suffix: encode(name) for suffix, name in FORMATS.items()}
    images = st.sampled_from(sorted(whole)).flatmap(
        lambda suffix: st.tuples(st.just(suffix), st.one_of(damaged(whole[suffix]), st.binary(max_size=100)))
    )

    def check(image):
        folder = empty_folder(inside)
        (folder / "good.png").write_bytes(whole[".png"])
        (folder / f"bad{image[0]}").write_bytes(image[1])
        with only_for_people(inside):
            open_folder(inside, "image_folder", "data.heldout_every=0")

    try_cases(cases, images, check, ends=("success",))  # a bad one is skipped, and said


def test_images_of_other_formats_and_sizes_are_reported_and_never_decoded(inside, caplog):
    folder = empty_folder(inside)
    (folder / "good.png").write_bytes(encode("PNG"))
    (folder / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\nshowpage\n")
    buffer = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(buffer, format="PNG")
    (folder / "large.png").write_bytes(buffer.getvalue())
    with only_for_people(inside):
        open_folder(inside, "image_folder", "data.heldout_every=0")
    assert "2 unreadable photographs" in caplog.text
    assert "144 megapixels, more than data.max_megapixels=100" in caplog.text
    assert "postscript.png (UnidentifiedImageError" in caplog.text


def test_links_out_of_the_folder_are_reported_and_circles_end(inside, tmp_path, caplog):
    folder = empty_folder(inside)
    (tmp_path / "elsewhere.png").write_bytes(encode("PNG"))
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / "circle").symlink_to(folder)
    (folder / "again").symlink_to(folder)
    with only_for_people(inside):
        open_folder(inside, "image_folder", "data.heldout_every=0")
    assert "1 photographs outside of the folder, by links or paths: link.png" in caplog.text


@pytest.mark.parametrize("cases", CASES)
def test_file_names(cases, inside):
    image = encode("PNG")
    names = st.lists(st.one_of(TEXT, NASTY), min_size=1, max_size=4)

    def check(stems):
        folder = empty_folder(inside)
        for stem in stems:
            for name in (f"{stem}.png", f"{stem}__{stem}.png"):
                with suppress(OSError, ValueError):
                    (folder / name.replace("/", "_")).write_bytes(image)
        for kind in ("turntable", "image_folder"):
            with only_for_people(inside):
                open_folder(inside, kind, "data.v_list=[0.3]")

    try_cases(cases, names, check)


@pytest.mark.parametrize("cases", CASES)
def test_label_tables(cases, inside):
    image = encode("PNG")
    table = b"file,class,height,angle,instance,split\na.png,cup,0,10,x,train\nb.png,cup,0,50,y,test\n"
    cell = st.one_of(st.sampled_from(["a.png", "b.png", "cup", "0", "1", "359", "train"]), TEXT, NASTY)
    rows = st.lists(st.lists(cell, max_size=7).map(",".join), max_size=6).map("\n".join)
    tables = st.one_of(damaged(table), rows.map(lambda text: table + text.encode("utf-8", "surrogatepass")))

    def check(content):
        folder = empty_folder(inside)
        for name in ("a.png", "b.png"):
            (folder / name).write_bytes(image)
        (folder / "labels.csv").write_bytes(content)
        with only_for_people(inside):
            open_folder(inside, "turntable", "data.v_list=[0.3]")

    try_cases(cases, tables, check)


@pytest.mark.parametrize("cases", CASES)
def test_transforms_files(cases, inside):
    image = encode("PNG")

    def placed(distance: float) -> list[list[float]]:
        return [[1, 0, 0, 0], [0, 0, -1, distance], [0, 1, 0, 0], [0, 0, 0, 1]]

    def described(poses: list[Any]) -> dict[str, Any]:
        return {"camera_angle_x": 0.6, "frames": [{"file_path": "a", "transform_matrix": pose} for pose in poses]}

    good = described([placed(-3.5), placed(-3.5)])
    numbers = st.lists(st.lists(NUMBERS, min_size=4, max_size=4), min_size=4, max_size=4)
    entry = st.one_of(PLAIN, st.sampled_from([-3.5, 0.5, 20.0, 1e3]).map(placed), numbers)
    path = st.one_of(st.just("a"), NASTY)
    frames = st.lists(
        st.one_of(PLAIN, st.fixed_dictionaries({"file_path": path, "transform_matrix": entry})), max_size=3
    )
    lens_keys = st.sampled_from(["w", "h", "fl_x", "cx", "cy", "k4", "p1", "camera_model"])
    contents = st.one_of(
        damaged(json.dumps(good).encode()),
        st.lists(st.floats(-4, -3).map(placed), min_size=2, max_size=4).map(described),
        st.fixed_dictionaries({"camera_angle_x": st.one_of(st.just(0.6), PLAIN), "frames": frames}),
        st.dictionaries(lens_keys, PLAIN).map(good.__or__),
        PLAIN,
    )

    def check(content):
        folder = empty_folder(inside)
        (folder / "a.png").write_bytes(image)
        text = content if isinstance(content, bytes) else json.dumps(content, default=str).encode()
        (folder / "transforms.json").write_bytes(text)
        with only_for_people(inside):
            open_folder(inside, "transforms", "data.heldout_every=0")

    try_cases(cases, contents, check)


# ---------------------------------------------------------------- what runs leave


@pytest.mark.parametrize("cases", CASES)
def test_checkpoints(cases, inside, smoke_run):
    whole = (smoke_run.folder / "checkpoints" / "model_best.pt").read_bytes()
    file = inside / "model_best.pt"

    def check(content):
        file.write_bytes(content)
        with only_for_people(inside):
            graf.load(file, device="cpu", trust=True)

    try_cases(cases, damaged(whole), check, ends=("refusal",))


@pytest.mark.parametrize("cases", CASES)
def test_checkpoints_of_strangers(cases, inside, smoke_run):
    """Archives that no damage explains: entries replaced by others, written without a seal, as older ones are."""
    whole = torch.load(smoke_run.folder / "checkpoints" / "model_best.pt", weights_only=True) | {"format": 2}
    places = [("format",), ("meta",), ("objects",), *(("meta", key) for key in whole["meta"])]
    places += [("meta", part, key) for part in ("config", "dataset") for key in whole["meta"][part]]
    places += [("objects", key) for key in whole["objects"]]
    places += [("objects", "generator_average", key) for key in whole["objects"]["generator_average"]]
    tensors = st.sampled_from([torch.zeros(0), torch.zeros(3, 3), torch.tensor(float("nan")), torch.zeros(2).bool()])
    file = inside / "model_best.pt"

    def check(changes):
        contents = {"format": 2, **{name: dict(whole[name]) for name in ("meta", "objects")}}
        contents["meta"] |= {part: dict(whole["meta"][part]) for part in ("config", "dataset")}
        contents["objects"]["generator_average"] = dict(whole["objects"]["generator_average"])
        for path, value in changes:
            target = contents
            for key in path[:-1]:
                target = target[key] if isinstance(target, dict) and key in target else {}
            if isinstance(target, dict) and value is not SAME:
                target[path[-1]] = value
        torch.save(contents, file)
        with only_for_people(inside):
            graf.load(file, device="cpu", trust=True)

    values = st.one_of(st.just(SAME), PLAIN, tensors)
    try_cases(cases, st.lists(st.tuples(st.sampled_from(places), values), min_size=1, max_size=3), check)


@pytest.mark.parametrize("cases", CASES)
def test_checkpoints_of_strangers_that_training_goes_on_from(cases, inside, smoke_run):
    """Any part of the state replaced by something else, of an older format, which has no seal, too."""
    config = load_config(SMOKE)
    whole = torch.load(smoke_run.folder / "checkpoints" / "model_best.pt", weights_only=True)
    info = read_dataset_info(whole["meta"], SMOKE)
    sampler = PoseSampler(torch.zeros(1, 4, dtype=torch.long), builders.build_cameras(config, info))
    precision = choose_precision(False, "auto", torch.device("cpu"))
    trainer = builders.build_trainer(config, info, sampler, precision, torch.device("cpu"), pretrained=False)
    places = [(name,) for name in whole["objects"]]
    places += [(name, key) for name, state in whole["objects"].items() for key in state]
    tensors = st.sampled_from([torch.zeros(0), torch.zeros(3, 3), torch.tensor(float("nan")), torch.zeros(2).bool()])
    file = inside / "model_best.pt"

    def check(case):
        written, changes = case
        objects = {name: dict(state) for name, state in whole["objects"].items()}
        for path, value in changes:
            target = objects if len(path) == 1 else objects[path[0]]
            if isinstance(target, dict) and value is not SAME:
                target[path[-1]] = value
        with open(file, "wb") as stream:
            write_sealed(stream, {"format": written, "meta": whole["meta"], "objects": objects}, {})
        with only_for_people(inside):
            restore(read_checkpoint(file), trainer.state, file)

    changes = st.lists(
        st.tuples(st.sampled_from(places), st.one_of(st.just(SAME), PLAIN, tensors)), min_size=1, max_size=3
    )
    try_cases(cases, st.tuples(st.sampled_from([1, 2, 3]), changes), check)


def test_a_checkpoint_with_a_class_that_leads_outside_is_refused(inside, smoke_run):
    contents = torch.load(smoke_run.folder / "checkpoints" / "model_best.pt", weights_only=True) | {"format": 2}
    names = contents["meta"]["dataset"]["class_names"]
    contents["meta"]["dataset"]["class_names"] = ["x/../../../../ESCAPED", *names[1:]]
    torch.save(contents, inside / "a.pt")
    with pytest.raises(UserError, match="without slashes"):
        graf.load(inside / "a.pt", device="cpu", trust=True)


@pytest.mark.parametrize("cases", CASES)
def test_metrics_files_and_folders(cases, inside):
    line = json.dumps({"iteration": 3, "time": 1.5, "loss_d": 0.5})
    lines = st.lists(st.one_of(st.just(line), TEXT, NASTY, PLAIN.map(lambda plain: json.dumps(plain, default=str))))
    contents = st.one_of(damaged("\n".join(3 * [line]).encode()), lines.map("\n".join))

    def check(content):
        run = RunFolder(inside / "run")
        shutil.rmtree(run.path, ignore_errors=True)
        run.checkpoints.mkdir(parents=True)
        text = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        for file in ("metrics.jsonl", "scores.jsonl", "checkpoints/model_00000003.pt", "checkpoints/model_best.pt"):
            (run.path / file).write_bytes(text)
        with only_for_people(inside):
            with RunLog(run.path, total=9, start=3, progress=False) as log:
                log.scalars(4, {"loss_d": 1.0})
            json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
        with only_for_people(inside):
            read_scores(run.path / "scores.jsonl")
        with only_for_people(inside):
            read_first(run.newest_first())

    try_cases(cases, contents, check)
