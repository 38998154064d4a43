"""`graf capture` through its command line: what it writes, what it adds to, and what it leaves alone when it fails."""

import csv
import math
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("cv2")
imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")

from graf.app import capture_command, capture_turntable  # noqa: E402
from graf.app.capture_command import main  # noqa: E402
from graf.app.command_line import main as graf  # noqa: E402
from graf.app.runs import run_name  # noqa: E402
from graf.capture import photo_set  # noqa: E402
from graf.config import Config, load_config  # noqa: E402
from graf.data.shapes import CLASS_NAMES  # noqa: E402
from graf.data.synthetic import render_views  # noqa: E402
from graf.geometry.cameras import Intrinsics, height_from_elevation, pose_from_angles  # noqa: E402
from graf.runtime.run_lock import RunLock  # noqa: E402

PER_TURN, SIZE, FOV, RADIUS, ELEVATION, START = 36, 128, 30.0, 4.0, 22.0, 50.0
KNOWN = ("--fov", "30", "--elevation", "22")
HIGH = ("--fov", "30", "--elevation", "50")


def film(toy, elevation=ELEVATION):
    """A turn of a toy before a grey wall, uint8 (N, H, W, 4), the camera's azimuth growing from 50 degrees on."""
    u = torch.remainder(START / 360 + torch.arange(PER_TURN) / PER_TURN, 1.0)
    poses = pose_from_angles(u, torch.full_like(u, height_from_elevation(elevation)), RADIUS)
    rgb, _, mask = render_views(CLASS_NAMES.index(toy), poses, Intrinsics.from_fov(SIZE, FOV), supersampling=1)
    images = torch.cat([(rgb + 1) / 2 - (1 - mask) * 0.2, mask], dim=1)
    return (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


@dataclass(frozen=True)
class Sources:
    """A video of the mug, of a turn and a fifth, and folders of photographs that have their masks as transparency."""

    video: Path
    mug: Path
    mug_backwards: Path
    mug_from_above: Path
    house: Path


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    mug, again = film("mug"), np.arange(round(1.2 * PER_TURN)) % PER_TURN
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{SIZE}x{SIZE}", "-r", "20", "-i", "-", "-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p"]
    pixels = np.ascontiguousarray(mug[again][..., :3]).tobytes()
    subprocess.run([*command, str(folder / "mug.mp4")], input=pixels, check=True)
    turns = {"mug": mug, "mug_backwards": mug[again][::-1], "mug_from_above": film("mug", 50.0), "house": film("house")}
    for name, images in turns.items():
        (folder / name).mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f"{number}.png", compress_level=1)
    return Sources(folder / "mug.mp4", *(folder / name for name in turns))


@pytest.fixture
def photos(restored_process, tmp_path):
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def captured(sources, tmp_path_factory):
    """What capturing the video wrote, and said, once for all tests; paths in it are relative."""
    folder = tmp_path_factory.mktemp("captured")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = [str(sources.video), *KNOWN, "--frames", "12", "--class", "mug"]
        said = capture_command.capture(capture_command.build_parser().parse_args(arguments))
    return folder / "photos", said


@pytest.fixture
def mug(photos, captured):
    """A set that has the mug."""
    shutil.copytree(captured[0], photos)
    return photos


def capture(source, *arguments):
    return main([str(source), *KNOWN, "--frames", "12", *arguments])


def labels(folder):
    with open(folder / "labels.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def contents(folder):
    """Every file but the lock, which stays."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_video_becomes_a_set_that_the_doctor_passes_and_whose_cameras_are_true(captured, mug, capsys):
    said = "\n".join(captured[1])
    assert "graf doctor --config photos/capture.yaml" in said
    assert "graf train --config photos/capture.yaml --use_amp" in said
    rows = labels(mug)
    assert len(rows) == 12
    assert {(row["class"], row["height"], row["instance"]) for row in rows} == {("mug", "0", "")}
    angles = np.array([int(row["angle"]) for row in rows])
    np.testing.assert_allclose(angles, np.arange(12) * 30, atol=6)  # of 10 degrees from frame to frame
    assert np.abs(np.diff(np.sort(angles)) - 30).max() <= 6
    config = load_config("photos/capture.yaml").data
    # The mug itself reaches 0.9 of its unit sphere, which is what captures make of every object.
    assert config.radius == pytest.approx(RADIUS, rel=0.05)
    crop = math.tan(math.radians(config.fov / 2)) / math.tan(math.radians(FOV / 2))
    assert 0.5 < crop < 1
    assert config.v_list == (pytest.approx(height_from_elevation(ELEVATION), abs=1e-4),)
    assert graf(["doctor", "--config", "photos/capture.yaml"]) == 0
    report = capsys.readouterr().out
    assert "12 photographs, 1 classes" in report
    assert "problem: none found" in report


def test_pictures_of_a_video_stand_at_the_angles_of_their_labels(captured):
    assert_true_views(captured[0], START)


def test_pictures_of_a_turn_the_other_way_stand_at_the_angles_of_their_labels(sources, photos):
    assert capture(sources.mug_backwards, "--class", "mug") == 0
    assert_true_views(photos, START + 360 * (round(1.2 * PER_TURN) - 1) / PER_TURN)


def assert_true_views(folder, first):
    """Each picture is the toy's true view at its label's azimuth, from where the first one was taken."""
    for row in labels(folder)[::3]:
        found = _object(np.asarray(Image.open(folder / row["file"])).astype(float))
        differences = []
        for offset in (0, 30, 90, 180, 270, 330):
            differences.append(np.abs(found - _true_object(first + int(row["angle"]) + offset)).mean())
        assert np.argmin(differences) == 0


def _silhouette(file, side):
    return np.asarray(Image.open(file).resize((side, side)).getchannel("A")) > 127


def _true_object(azimuth):
    u = torch.tensor([azimuth / 360 % 1])
    poses = pose_from_angles(u, torch.full_like(u, height_from_elevation(ELEVATION)), RADIUS)
    rgb, _, mask = render_views(CLASS_NAMES.index("mug"), poses, Intrinsics.from_fov(SIZE, FOV), supersampling=1)
    return _object(torch.cat([rgb * 127.5 + 127.5, mask * 255], dim=1)[0].permute(1, 2, 0).numpy())


def _object(rgba):
    """An object of RGBA pixels before white, 40 x 40, cut to its own bounding box: framing is another test's matter."""
    y, x = np.nonzero(rgba[..., 3] > 127)
    share = rgba[..., 3:] / 255
    pixels = (rgba[..., :3] * share + 255 * (1 - share))[y.min() : y.max() + 1, x.min() : x.max() + 1]
    return np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize((40, 40))).astype(float)


def test_a_second_object_leaves_the_first_ones_files_as_they_are(sources, mug):
    before = contents(mug)
    assert capture(sources.house, "--class", "house") == 0
    after = contents(mug)
    assert {path for path in before if before[path] != after[path]} == {"labels.csv"}
    assert [row["class"] for row in labels(mug)] == ["mug"] * 12 + ["house"] * 12


def test_what_a_person_has_written_into_labels_csv_stays(sources, mug):
    rows = labels(mug)
    with open(mug / "labels.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0], "split", "remark"])
        writer.writeheader()
        writer.writerows({**row, "split": "test", "remark": "a, b"} for row in rows)
    assert capture(sources.house, "--class", "house") == 0
    after = labels(mug)
    assert {(row["split"], row["remark"]) for row in after[:12]} == {("test", "a, b")}
    assert {(row["class"], row["split"], row["remark"]) for row in after[12:]} == {("house", "", "")}


def test_another_height_of_an_object_keeps_its_scale(sources, mug, capsys):
    file = mug / "capture.yaml"
    file.write_text(file.read_text().replace("expname: 'photos'", "expname: mine  # my own"))
    assert main([str(sources.mug_from_above), *HIGH, "--frames", "12", "--class", "mug"]) == 0
    assert "expname: mine  # my own" in file.read_text()
    config = load_config("photos/capture.yaml").data
    assert config.v_list == pytest.approx([height_from_elevation(22), height_from_elevation(50)], abs=1e-4)
    widths = []
    for height in ("0", "1"):
        files = [mug / row["file"] for row in labels(mug) if row["height"] == height]
        held = np.any([_silhouette(file, 64) for file in files], axis=0).any(axis=0)
        widths.append(held.sum())
    assert abs(widths[0] - widths[1]) <= 3
    capsys.readouterr()
    assert graf(["doctor", "--config", "photos/capture.yaml"]) == 0
    assert "height 1, v = 0.117 (elevation 50 degrees): 12 photographs" in capsys.readouterr().out


def test_what_is_there_is_replaced_only_when_asked_and_files_of_a_persons_own_stay(sources, mug, capsys):
    (mug / "own").mkdir()
    own = ("own/mine.png", "mug/my_own_closeup.png", "mug/mug_left.png")
    for file in own:
        (mug / file).write_bytes((mug / labels(mug)[0]["file"]).read_bytes())
    with open(mug / "labels.csv", "a") as stream:
        stream.writelines(f"{file},mug,0,7,\n" for file in own)
    before = contents(mug)
    assert capture(sources.mug_backwards, "--class", "mug") == 1
    assert "15 photographs of mug are there already" in capsys.readouterr().err
    assert contents(mug) == before
    assert capture(sources.mug_backwards, "--class", "mug", "--replace") == 0
    rows = labels(mug)
    assert len(rows) == 12
    assert sorted(path.name for path in mug.iterdir() if path.is_dir()) == ["capture_check", "mug", "mug-2", "own"]
    assert sorted(path.name for path in (mug / "mug").iterdir()) == ["mug_left.png", "my_own_closeup.png"]
    assert (mug / "own" / "mine.png").is_file()
    assert all((mug / row["file"]).is_file() for row in rows)


@pytest.mark.parametrize("failing", ["draw_masks", "cut", "compose_set_configuration", "labels.csv"])
def test_a_failed_run_leaves_the_set_as_it_was(sources, mug, monkeypatch, failing):
    """Of another height, so that capture.yaml would have changed too."""
    before = contents(mug)
    (mug / ".mug_h1.1234.saving").mkdir()  # of one that was killed
    write = photo_set.write_atomically

    def fail(*arguments, **options):
        raise KeyboardInterrupt if failing == "cut" else OSError("no space left")

    def write_but_labels(path, content):
        (fail if path.name == failing else write)(path, content)

    with monkeypatch.context() as patch:
        if failing == "labels.csv":
            patch.setattr(photo_set, "write_atomically", write_but_labels)
        else:
            patch.setattr(capture_turntable, failing, fail)
        assert main([str(sources.mug_from_above), *HIGH, "--class", "mug"]) != 0
    assert contents(mug) == before
    assert sorted(path.name for path in mug.iterdir() if path.is_dir()) == ["capture_check", "mug"]


def test_an_interrupt_after_the_labels_are_written_takes_nothing_back(sources, mug, monkeypatch):
    write = photo_set.write_atomically

    def write_and_interrupt(path, content):
        write(path, content)
        if path.name == "labels.csv":
            raise KeyboardInterrupt

    monkeypatch.setattr(photo_set, "write_atomically", write_and_interrupt)
    assert main([str(sources.mug_from_above), *HIGH, "--class", "mug"]) == 130
    assert len(load_config("photos/capture.yaml").data.v_list) == 2
    assert all((mug / row["file"]).is_file() for row in labels(mug))


def test_instances_are_named_or_none_is(sources, photos, capsys):
    assert capture(sources.mug, "--class", " mug ", "--instance", "green") == 0
    assert capture(sources.house, "--class", "house") == 1
    assert "--instance is missing" in capsys.readouterr().err
    assert capture(sources.house, "--class", "house", "--instance", "red") == 0
    assert load_config("photos/capture.yaml").nerf.planes == "synthesis"
    assert {(row["class"], row["instance"]) for row in labels(photos)} == {("mug", "green"), ("house", "red")}


def test_photographs_with_masks_of_their_own_and_without_any(sources, photos, tmp_path):
    folder, masks = tmp_path / "shots", tmp_path / "masks"
    folder.mkdir()
    masks.mkdir()
    for number in range(0, PER_TURN, 2):
        image = Image.open(sources.house / f"{number}.png")
        image.convert("RGB").save(folder / f"p{number}.jpg", quality=95)
        image.getchannel("A").save(masks / f"p{number}.png")
    options = ["--fov", "30", "--elevation", "22", "--direction", "cw"]
    assert main([str(folder), *options, "--class", "own", "--mask", str(masks)]) == 0
    assert len(labels(photos)) == 18
    angles = [int(row["angle"]) for row in labels(photos)]
    np.testing.assert_allclose(angles, np.arange(18) * 20, atol=6)
    bare = "-its bare, 'mine'"  # a name that has to become one of a run
    assert main([str(folder), *options, "--class", "bare", "--mask", "none", f"--out={bare}", "--turns", "1"]) == 0
    config = load_config(f"{bare}/capture.yaml")
    assert (config.nerf.background, config.expname, config.data.datadir) == ("learned", "its_bare___mine_", bare)
    with Image.open(tmp_path / bare / labels(tmp_path / bare)[0]["file"]) as image:
        assert image.mode == "RGB"


def test_another_background_in_capture_yaml_does_not_keep_objects_out(sources, mug):
    file = mug / "capture.yaml"
    file.write_text(file.read_text().replace("white_bkgd: true", "white_bkgd: false"))
    assert capture(sources.house, "--class", "house") == 0
    assert "white_bkgd: false" in file.read_text()
    assert [row["class"] for row in labels(mug)] == ["mug"] * 12 + ["house"] * 12


def test_photographs_of_several_sizes_are_named(sources, photos, tmp_path, capsys):
    folder = tmp_path / "shots"
    shutil.copytree(sources.mug, folder)
    with Image.open(folder / "20.png") as image:
        image.resize((96, 96)).save(folder / "20.png")
    assert main([str(folder), *KNOWN, "--class", "mug"]) == 1
    assert "20.png is read as 96x96, 0.png as 128x128" in capsys.readouterr().err


def any_names(count):
    """Names of folders, of signs of one byte in UTF-8 to four."""
    random = np.random.default_rng(0)
    for _ in range(count):
        signs = random.integers(1, random.choice([0x80, 0x800, 0xD800, 0x20000]), random.integers(1, 60)).tolist()
        yield "".join(chr(sign) for sign in signs if chr(sign) != "/" and not 0xD800 <= sign < 0xE000)


def test_a_folder_of_any_name_gives_a_name_that_a_run_may_have():
    odd = [
        "10m²",
        "½ pint",
        "photos etc.",
        "aux",
        "con.photos",
        "x" * 200,
        "日" * 70,
        "Fu\u0308ße",
        ".hidden",
        "\udce9",
    ]
    for name in (*odd, *any_names(300)):
        found = run_name(name)
        assert Config(expname=found).expname == found


def no_configuration(folder):
    (folder / "capture.yaml").unlink()


def poses_of_its_own(folder):
    (folder / "transforms.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (None, ["--mask", "none"], "are transparent around their objects"),
        (no_configuration, [], "no capture.yaml"),
        (poses_of_its_own, [], "poses of their own"),
    ],
)
def test_what_does_not_fit_a_set_is_said_and_changes_nothing(sources, mug, capsys, change, arguments, words):
    if change is not None:
        change(mug)
    before = contents(mug)
    assert capture(sources.house, "--class", "house", *arguments) == 1
    assert words in capsys.readouterr().err
    assert contents(mug) == before


def test_a_set_that_another_program_works_on_is_left_alone(sources, mug, capsys):
    with RunLock(mug):
        assert capture(sources.house, "--class", "house") == 1
    assert "error: --out photos: another program works there" in capsys.readouterr().err


def test_a_picture_of_the_set_that_is_gone_is_named(sources, mug, capsys):
    missing = labels(mug)[3]["file"]
    (mug / missing).unlink()
    assert main([str(sources.mug_from_above), *HIGH, "--class", "mug"]) == 1
    assert f"photos/{missing} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{mug}", "--mask", "none", "--fov", "150"], "--fov 150: through such a lens"),
        (["{mug}", "--features", "object"], "--features: a turntable has no use for it"),
        (["{mug}", "--walkaround", "--first-angle", "9"], "--first-angle: a walk-around has no use for it"),
        (["{mug}", "--markers", "--features", "object"], "--features: a capture by markers has no use for it"),
        (["{mug}", "--frames", "4"], "--frames 4: expected 8 to 3600"),
        (["{mug}", "--frames", "200"], "--frames 200: there are"),
        (["{mug}", "--class", "a/b"], "--class: class 'a/b'"),
        (["{mug}", "--class", "あ" * 90], "take 270 bytes in UTF-8; expected at most 200"),
        (["{mug}", "--class", "mug", "--walkaround"], "--out mug"),
        (["{mug}", "--mask", "nowhere"], "--mask nowhere: no such folder"),
        (["nowhere.mp4"], "nowhere.mp4: no such file"),
        (["--marker-sheet", "sheet.txt"], "sheet.pdf"),
    ],
)
def test_errors_are_one_line(sources, photos, capsys, arguments, words):
    assert main([argument.format(mug=sources.mug) for argument in arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error
    assert not (photos / "labels.csv").exists()


def test_a_marker_sheet_is_written(photos, tmp_path, capsys):
    assert main(["--marker-sheet", "a4.pdf"]) == 0
    assert (tmp_path / "a4.pdf").read_bytes().startswith(b"%PDF")
    assert "print it at 100%" in capsys.readouterr().out
