"""eval.py as a program: the newest run from all sides, every action, the training's own scores, and one-line errors."""

import csv
import errno
import json
import os
import pkgutil
import shutil
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from graf.app import eval_command, eval_options, eval_tasks
from graf.evaluation import renderer
from graf.evaluation.fidelity import read_scores
from graf.geometry.cameras import median_height
from graf.runtime.checkpoint import read_checkpoint, save_checkpoint
from graf.runtime.sealed_archive import write_sealed

CLASSES = ("car", "duck", "house", "mug")
KINDS = ("rgb", "depth", "opacity")
SMOKE = Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml"


@pytest.fixture
def look(run_program, smoke_run, capsys):
    """eval.py on the shared run, from an empty working directory; returns exit code, stdout and stderr."""

    def run(*arguments: object, run_folder: Path | None = smoke_run.folder) -> tuple[int, str, str]:
        where = [] if run_folder is None else ["--run", run_folder]
        code = run_program("eval.py", *where, "--device", "cpu", *arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def copied_run(smoke_run, tmp_path) -> Path:
    """A copy of the shared run without what eval.py wrote, under tmp_path/results."""
    ignored = shutil.ignore_patterns("eval", "tensorboard", "samples")
    return Path(shutil.copytree(smoke_run.folder, tmp_path / "results" / "copied", ignore=ignored))


def change_checkpoint(run: Path, section: str, **values: object) -> None:
    """Change keys of the configuration that the best checkpoint of a run was saved with."""
    file = run / "checkpoints" / "model_best.pt"
    contents = torch.load(file, weights_only=True)
    contents["meta"]["config"][section].update(values)
    with open(file, "wb") as stream:
        write_sealed(stream, contents, {})


def read_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def written_by(stdout: str) -> list[Path]:
    """The files that the last line lists; all of them exist."""
    last = stdout.strip().splitlines()[-1]
    assert last.startswith("written: ")
    paths = [Path(path) for path in last.removeprefix("written: ").split()]
    assert all(path.is_file() and path.stat().st_size > 0 for path in paths)
    return paths


def error_of(result: tuple[int, str, str]) -> str:
    code, _, stderr = result
    assert code == 1
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert stderr.splitlines()[-1] == lines[0]
    return lines[0]


def count_frames(video: Path) -> tuple[int, float]:
    """Frames and seconds of a video; skips where there is no ffmpeg."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    return imageio_ffmpeg.count_frames_and_secs(str(video))


# ---------------------------------------------------------------- pictures


def test_alone_it_writes_grids_of_every_class_and_a_turn_of_the_newest_run(run_command_line, smoke_run):
    process = run_command_line("eval.py", cwd=smoke_run.cwd)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "model_best.pt, iteration 6" in stdout
    written = [(smoke_run.cwd / path) for path in stdout.strip().splitlines()[-1].removeprefix("written: ").split()]
    assert {path.name for path in written[:-1]} == {f"grid_{name}_{kind}.png" for name in CLASSES for kind in KINDS}
    for path in written[:-1]:
        pixels = read_pixels(path)
        assert pixels.shape[0] == 34 + 2 + 18
        assert pixels.shape[1] > 8 * 34 + 2
    assert len({read_pixels(path).tobytes() for path in written[:-1]}) == 12
    assert written[-1] == smoke_run.folder / "eval" / "rotation.mp4"
    assert count_frames(written[-1]) == (72, pytest.approx(3.0, abs=0.05))


def test_every_picture_action_writes_its_files_without_the_photographs(look, tmp_path):
    actions = ["--grid", "--rotation", "--elevation", "--shape_appearance", "--interpolate"]
    details = ["--classes", "mug", "1", "--views", 3, "--heights", 0.2, 0.4, "--frames", 6, "--objects", 2, "--fps", 6]
    code, stdout, stderr = look(*actions, *details)
    assert code == 0, stderr
    written = {path.name: path for path in written_by(stdout)}
    grids = {f"grid_{name}_{kind}.png" for name in ("duck", "mug") for kind in KINDS}
    videos = {"rotation_36.87deg.mp4", "rotation_11.54deg.mp4", "elevation.mp4", "interpolation.mp4"}
    assert set(written) == grids | videos | {"shape_appearance_duck.png", "shape_appearance_mug.png"}
    assert read_pixels(written["grid_mug_rgb.png"]).shape[0] == 4 * 34 + 2 + 18  # two heights of two objects
    assert read_pixels(written["shape_appearance_mug.png"]).shape[0] == 5 * 34 + 2 + 18
    for video in videos:
        assert count_frames(written[video]) == (6, pytest.approx(1.0, abs=0.05))
    assert list(tmp_path.iterdir()) == []  # nothing was read from or written to the working directory


def test_a_class_may_be_named_or_numbered_and_the_seed_names_the_object(look):
    def grid(*arguments: object) -> np.ndarray:
        code, stdout, _ = look("--grid", "--views", 2, *arguments)
        assert code == 0
        return read_pixels(written_by(stdout)[0])

    by_name, by_number = grid("--classes", "house"), grid("--classes", "2")
    assert np.array_equal(by_name, by_number)
    assert not np.array_equal(by_name, grid("--classes", "house", "--seed", 1))
    assert np.array_equal(by_name, grid("--classes", "house", "--seed", 0))


def test_smaller_chunks_show_the_same_picture(look):
    pictures = []
    for chunk in ([], ["--chunk", 100]):
        _, stdout, _ = look("--grid", "--views", 2, "--classes", "car", *chunk)
        pictures.append(read_pixels(written_by(stdout)[0]).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_the_grid_stands_at_the_median_height_unless_told(look, smoke_run):
    heights = read_checkpoint(smoke_run.folder / "checkpoints" / "model_best.pt")["meta"]["dataset"]["v_list"]
    median = heights[median_height(heights)]
    _, stdout, _ = look("--grid", "--views", 2, "--classes", "car")
    unasked = read_pixels(written_by(stdout)[0])
    _, stdout, _ = look("--grid", "--views", 2, "--classes", "car", "--heights", median)
    assert np.array_equal(unasked, read_pixels(written_by(stdout)[0]))


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("name", ["model_best.pt", "model_00000006.pt"])
def test_the_scores_are_exactly_the_trainings_own(look, monkeypatch, smoke_run, name):
    checkpoint = smoke_run.folder / "checkpoints" / name
    iteration = read_checkpoint(checkpoint)["meta"]["iteration"]
    shutil.rmtree(smoke_run.folder / "eval", ignore_errors=True)
    monkeypatch.chdir(smoke_run.cwd)  # the config names the photographs relative to it
    code, stdout, stderr = look("--fid_kid", "--checkpoint", checkpoint)
    assert code == 0, stderr
    expected = next(row for row in read_scores(smoke_run.folder / "scores.jsonl") if row["iteration"] == iteration)
    # The training ran with one thread and this process may have more: sums of another order differ in the tenth digit.
    (found,) = read_scores(smoke_run.folder / "eval" / "scores.jsonl")
    for key in ("psnr_validation", "ssim_validation"):  # measured in training alone
        del expected[key]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key
    assert f"fid_offline {found['fid_offline']:.6g}" in stdout
    written = {path.name: path for path in written_by(stdout)}
    assert {"scores.csv", "scores.json"} <= set(written)
    content = json.loads(written["scores.json"].read_text())
    (row,) = content if isinstance(content, list) else [content]
    assert row == found
    (line,) = csv.DictReader(written["scores.csv"].read_text().splitlines())
    assert float(line["kid_offline"]) == found["kid_offline"]


def test_the_number_of_generated_images_can_be_chosen(look, monkeypatch, smoke_run):
    shutil.rmtree(smoke_run.folder / "eval", ignore_errors=True)
    monkeypatch.chdir(smoke_run.cwd)
    assert look("--fid_kid", "--num_images", 20)[0] == 0
    (row,) = read_scores(smoke_run.folder / "eval" / "scores.jsonl")
    assert row["n_fake"] == 20
    assert row["kid_subset_size"] == 20


def test_the_held_out_angles_are_measured(look, monkeypatch, smoke_run):
    monkeypatch.chdir(smoke_run.cwd)
    code, stdout, stderr = look("--heldout")
    assert code == 0, stderr
    file, picture = written_by(stdout)
    with Image.open(picture) as image:
        assert image.width > 8 * 32
    report = json.loads(file.read_text())
    assert report["never_seen"] is True
    *objects, average = report["objects"]
    assert {row["name"] for row in objects} <= set(CLASSES)
    assert sum(row["photographs"] for row in objects) == average["photographs"] == 3
    assert report["renders"]["iteration"] == 6
    for row in report["objects"]:
        assert row["name"] in stdout
        assert 0 < row["labelled"] < 40


@pytest.mark.parametrize(
    ("remembered", "never_seen", "warning"),
    [
        ({"number": 43, "identity": "others"}, False, "not those that it was on (43 photographs then, 42 now"),
        ({"exchanged": True}, False, "the run has gone on with others than it began with; only a new run can leave"),
        ({"exchanged": None}, None, ""),  # an older version began the run
        (None, None, ""),  # or wrote it
    ],
)
def test_photographs_that_training_may_have_seen_are_not_called_unseen(
    look, copied_run, monkeypatch, smoke_run, remembered, never_seen, warning
):
    monkeypatch.chdir(smoke_run.cwd)
    file = copied_run / "checkpoints" / "model_best.pt"
    contents = torch.load(file, weights_only=True)
    if remembered is None:
        del contents["meta"]["photographs"]
    else:
        contents["meta"]["photographs"].update(remembered)
    with open(file, "wb") as stream:
        write_sealed(stream, contents, {})
    code, _, stderr = look("--heldout", run_folder=copied_run)
    assert code == 0, stderr
    assert ("training may have seen photographs of the test split" in stderr) == bool(warning)
    assert warning in stderr
    assert json.loads((copied_run / "eval" / "heldout.json").read_text())["never_seen"] is never_seen


def test_another_seed_scores_other_objects(look, monkeypatch, smoke_run):
    shutil.rmtree(smoke_run.folder / "eval", ignore_errors=True)
    monkeypatch.chdir(smoke_run.cwd)
    for seed in ([], ["--seed", 0], ["--seed", 5], ["--truncation", 0.5]):
        assert look("--fid_kid", *seed)[0] == 0
    unasked, zero, five, truncated = read_scores(smoke_run.folder / "eval" / "scores.jsonl")
    assert unasked == zero
    assert (zero["seed"], five["seed"]) == (0, 5)
    assert zero["fid_offline"] != five["fid_offline"]
    assert (zero["truncation"], truncated["truncation"]) == (1, 0.5)
    assert zero["fid_offline"] != truncated["fid_offline"]


# ---------------------------------------------------------------- super-resolution


@pytest.fixture(scope="module")
def sharp_run(run_command_line, tmp_path_factory) -> Path:
    """A run that trained super-resolution for three iterations, 16 -> 32 pixels; its working directory."""
    cwd = tmp_path_factory.mktemp("sharp")
    keys = ["data.imsize=16", "ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1", "training.fid_every=0"]
    process = run_command_line(
        "train.py", "--config", str(SMOKE), "--max_iterations", "3", *keys, "training.sample_every=0", cwd=cwd
    )
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return cwd


@pytest.fixture
def look_sharp(look, sharp_run, monkeypatch):
    """eval.py on that run, from its working directory: it reads the photographs."""
    shutil.rmtree(sharp_run / "results" / "smoke" / "eval", ignore_errors=True)
    monkeypatch.chdir(sharp_run)
    return partial(look, run_folder=Path("results", "smoke"))


def test_pictures_are_super_resolved_beside_bicubic_upsampling(look_sharp):
    actions = ["--sr", "--grid", "--rotation", "--shape_appearance"]
    code, stdout, stderr = look_sharp(*actions, "--classes", "mug", "--views", 3, "--frames", 4)
    assert code == 0, stderr
    written = {path.name: path for path in written_by(stdout)}
    assert {f"grid_mug_{kind}.png" for kind in (*KINDS, "sr", "bicubic")} <= set(written)
    assert {"shape_appearance_mug.png", "shape_appearance_mug_sr.png", "shape_appearance_mug_bicubic.png"} <= set(
        written
    )
    small, sr, bicubic = (read_pixels(written[f"grid_mug_{kind}.png"]) for kind in ("rgb", "sr", "bicubic"))
    assert sr.shape == bicubic.shape
    assert sr.shape[0] - small.shape[0] == 16
    assert not np.array_equal(sr, bicubic)


def test_any_resolution_is_rendered_and_sharpened_the_same_in_strips(look_sharp, monkeypatch):
    pictures = []
    for pixels in (2**20, 4 * 64 * 8):  # the whole image at once, and 8 of its 64 rows
        monkeypatch.setattr(renderer, "STRIP_PIXELS", pixels)
        code, stdout, stderr = look_sharp("--sr", "--grid", "--classes", "car", "--views", 1, "--resolution", 64)
        assert code == 0, stderr
        written = {path.name: path for path in written_by(stdout)}
        assert read_pixels(written["grid_car_rgb.png"]).shape[0] == 66 + 2 + 18
        assert read_pixels(written["grid_car_sr.png"]).shape[0] == 130 + 2 + 18
        pictures.append(read_pixels(written["grid_car_sr.png"]).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_scores_of_a_sharpening_run_cover_render_sharp_and_bicubic_images(look_sharp):
    code, stdout, stderr = look_sharp("--fid_kid")
    assert code == 0, stderr
    rows = json.loads(Path("results", "smoke", "eval", "scores.json").read_text())
    assert [row["output"] for row in rows] == ["render", "sr", "bicubic"]
    assert [row["resolution"] for row in rows] == ["16x16", "32x32", "32x32"]
    for name in ("fid_offline", "sr_fid_offline", "bicubic_kid_offline"):
        assert f"{name} " in stdout


def test_consistency_is_measured_and_written(look_sharp):
    code, stdout, stderr = look_sharp("--consistency", "--classes", "car", "duck")
    assert code == 0, stderr
    (file,) = written_by(stdout)
    report = json.loads(file.read_text())
    assert report["objects"] == 2
    assert report["low_resolution_max"] <= 1e-6
    assert 0 < report["file_mean"] < 0.1
    assert report["psnr"] > 0 < report["psnr_bicubic"]
    assert report["seed"] == 0
    assert look_sharp("--consistency", "--classes", "car", "duck", "--seed", 5)[0] == 0
    other = json.loads(file.read_text())
    assert other["seed"] == 5
    assert other["psnr"] != report["psnr"]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(["--fid_kid"], "scores"), (["--consistency", "--classes", "car"], "consistency"), (["--heldout"], "heldout")],
)
def test_who_stops_reading_loses_no_file(look_sharp, monkeypatch, arguments, name):
    def leave(text: str) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr(eval_tasks, "print", leave, raising=False)
    look_sharp(*arguments)
    assert json.loads(Path("results", "smoke", "eval", f"{name}.json").read_text())


@pytest.mark.parametrize(
    "v_list", [(0.3,), (0.5,), (0.55,), (0.9,), (1.0,), (0.0,), (0.52, 0.55), (0.2, 0.4), (0.6, 0.9)]
)
def test_the_camera_of_the_elevation_video_goes_up_once_and_down_once_past_every_height(monkeypatch, v_list):
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(eval_tasks, "_write_path", lambda *arguments: seen.append(arguments[-1]) or [])
    renderer = SimpleNamespace(cameras=SimpleNamespace(v_list=v_list))
    options = SimpleNamespace(frames=12)
    eval_tasks.write_elevation(
        SimpleNamespace(renderer=renderer, options=options, classes=[0], codes=lambda: torch.zeros(1, 4))
    )
    steps = seen[0].diff()
    assert (steps[:6] < 0).all()  # v falls as the camera rises
    assert (steps[6:] > 0).all()
    low, high = seen[0].max(), seen[0].min()
    assert 0 <= high <= min(v_list) + 1e-6
    assert max(v_list) - 1e-6 <= low <= 1
    assert low - high >= 0.14


# ---------------------------------------------------------------- which run, which checkpoint


def test_a_checkpoint_finds_its_run_from_anywhere(look, smoke_run):
    backup = smoke_run.folder / "checkpoints" / "backup_00000004.pt"
    code, stdout, stderr = look("--checkpoint", backup, "--grid", "--views", 1, "--classes", "car", run_folder=None)
    assert code == 0, stderr
    assert "backup_00000004.pt, iteration 4" in stdout
    assert written_by(stdout)[0].parent == smoke_run.folder / "eval"


def test_a_checkpoint_is_shown_in_the_folder_of_a_run_that_has_none_yet(look, smoke_run, copied_run):
    shutil.rmtree(copied_run / "checkpoints")
    backup = smoke_run.folder / "checkpoints" / "backup_00000004.pt"
    picture = ["--grid", "--views", 1, "--classes", "car"]
    code, stdout, stderr = look("--checkpoint", backup, *picture, run_folder=copied_run)
    assert code == 0, stderr
    assert "backup_00000004.pt, iteration 4" in stdout
    assert written_by(stdout)[0].parent == copied_run / "eval"


def test_the_newest_run_is_the_one_that_saved_last_its_best_alone_counts(look, copied_run, capsys):
    older = copied_run.with_name("older")
    shutil.copytree(copied_run, older)
    for age, run in ((500, older), (100, copied_run)):
        for file in (run / "checkpoints").iterdir():
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - age))
    for name in ("model_00000006.pt", "backup_00000004.pt"):  # as if killed before its first timed checkpoint
        (copied_run / "checkpoints" / name).unlink()
    arguments = ["--grid", "--views", 1, "--classes", "car"]
    code, stdout, _ = look(*arguments, run_folder=None)
    assert code == 0
    assert str(Path("results", "copied", "checkpoints", "model_best.pt")) in stdout
    (copied_run / "checkpoints" / "model_best.pt").unlink()
    assert str(Path("results", "older")) in look(*arguments, run_folder=None)[1]


def test_without_a_best_checkpoint_the_newest_is_shown(look, copied_run):
    (copied_run / "checkpoints" / "model_best.pt").unlink()
    _, stdout, _ = look("--grid", "--views", 1, "--classes", "car", run_folder=copied_run)
    assert "model_00000006.pt, iteration 6" in stdout


# ---------------------------------------------------------------- errors


def test_no_run_says_how_to_train_one(look):
    error = error_of(look(run_folder=None))
    assert "results: no run found" in error
    assert "train.py" in error


def test_a_folder_without_a_run_is_named(look, tmp_path):
    (tmp_path / "empty").mkdir()
    error = error_of(look(run_folder=tmp_path / "empty"))
    assert "no run is there" in error
    assert "train.py" in error


def test_no_checkpoint_and_a_missing_checkpoint_are_named(look, copied_run):
    missing = copied_run / "checkpoints" / "model_00000099.pt"
    error = error_of(look("--checkpoint", missing, run_folder=None))
    assert "model_00000099.pt: no such checkpoint; try " in error
    shutil.rmtree(copied_run / "checkpoints")
    assert "no checkpoint yet" in error_of(look(run_folder=copied_run))


def test_a_checkpoint_whose_weights_do_not_fit_its_configuration_is_refused(look, copied_run):
    change_checkpoint(copied_run, "nerf", netwidth=48)
    assert "a checkpoint of another config" in error_of(look(run_folder=copied_run))


def test_a_configuration_of_another_version_is_refused_by_its_key(look, copied_run):
    change_checkpoint(copied_run, "nerf", hash_levels=16)
    error = error_of(look(run_folder=copied_run))
    assert "model_best.pt: was saved with a configuration that this version does not take (nerf.hash_levels=16" in error
    assert "use the version that wrote it" in error


def test_the_picture_of_a_checkpoint_stays_when_its_run_goes_on_with_another_configuration(
    look, copied_run, run_program, smoke_run
):
    picture = ["--grid", "--views", 2, "--classes", "car"]
    checkpoint = copied_run / "checkpoints" / "model_best.pt"

    def render(where: Path) -> np.ndarray:
        code, stdout, stderr = look("--checkpoint", checkpoint, *picture, run_folder=where)
        assert code == 0, stderr
        return read_pixels(written_by(stdout)[0])

    before = render(copied_run)
    keys = ["nerf.density_scale=4", "expname=copied", f"data.datadir={smoke_run.data}", "training.fid_every=0"]
    keys += ["training.sample_every=0", "training.monitoring=[]", "--max_iterations", "7"]
    outdir = ["--outdir", copied_run.parent]
    assert run_program("train.py", "--config", copied_run / "config.yaml", *outdir, *keys) == 0
    assert "density_scale: 4.0" in (copied_run / "config.yaml").read_text()
    assert np.array_equal(render(copied_run), before)
    newer = copied_run / "checkpoints" / "model_00000007.pt"
    assert read_checkpoint(newer)["meta"]["config"]["nerf"]["density_scale"] == 4
    assert np.array_equal(render(smoke_run.folder), before)  # nor does another run's folder matter


def test_a_checkpoint_is_enough_wherever_it_lies(look, smoke_run, tmp_path):
    alone = tmp_path / "sent by a friend.pt"
    shutil.copy(smoke_run.folder / "checkpoints" / "model_best.pt", alone)
    picture = ["--grid", "--views", 1, "--classes", "car"]
    code, stdout, stderr = look("--checkpoint", alone, "--trust", *picture, run_folder=None)
    assert code == 0, stderr
    assert "grid_car_rgb.png" in stdout
    assert (tmp_path / "eval" / "grid_car_rgb.png").is_file()


def test_photographs_without_poses_have_no_held_out_views(look, copied_run):
    file = copied_run / "checkpoints" / "model_best.pt"
    contents = torch.load(file, weights_only=True)
    contents["meta"]["dataset"]["poses_known"] = False
    with open(file, "wb") as stream:
        write_sealed(stream, contents, {})
    assert "--heldout: the views of these photographs are unknown" in error_of(look("--heldout", run_folder=copied_run))


def test_what_is_no_checkpoint_of_a_training_is_refused(look, copied_run):
    checkpoint = copied_run / "checkpoints" / "model_best.pt"
    for other in checkpoint.parent.glob("*0*.pt"):
        other.unlink()
    checkpoint.write_bytes(checkpoint.read_bytes()[:3000])
    assert "cannot be read" in error_of(look(run_folder=copied_run))
    save_checkpoint(checkpoint, {}, {"iteration": 3})
    assert "not a checkpoint of train.py" in error_of(look(run_folder=copied_run))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--classes", "boat"], "class 'boat': expected a name or an index of car, duck, house, mug; did you mean"),
        (["--classes", "4"], "class '4': expected a name or an index of car"),
        (["--views", 0], "--views=0: expected 1 to 360"),
        (["--frames", 1], "--frames=1: expected 2"),
        (["--objects", 0], "--objects=0: expected 1"),
        (["--truncation", 1.5], "--truncation=1.5: expected 0 to 1"),
        (["--heights", 0.2, 1.5], "--heights=1.5: expected 0 to 1"),
        (["--chunk", 0], "--chunk=0: expected at least 1"),
        (["--fps", 0], "--fps=0: expected 1"),
        (["--seed", -1], "--seed=-1: expected 0"),
        (["--num_images", 0], "--num_images=0: expected 2"),
        (["--elevations", 20, 91], "--elevations=91.0: expected -90 to 90"),
        (["--resolution", 4], "--resolution=4: expected 8"),
        (
            ["--resolution", 16, "--grid", "--fid_kid"],
            "--resolution=16: --fid_kid compares with photographs of 32",
        ),
        (["--resolution", 16, "--heldout"], "--resolution=16: --heldout compares with photographs of 32 x 32 pixels"),
        (["--device", "cuda:97"], "device 'cuda:97' is not available"),
        (["--classes", "car", "--fid_kid"], "--classes: expected none with --fid_kid, which measures all classes"),
        (["--classes", "car", "--heldout", "--grid"], "--classes: expected none with --heldout, which measures all"),
        (["--sr"], "this run has no super-resolution"),
        (["--rotation", "--objects", 121], "a video of 16458 x 36 pixels: H.264 takes at most 16384 along a side"),
        (["--consistency"], "this run has no super-resolution"),
    ],
)
def test_a_wrong_choice_is_one_line(look, arguments, expected):
    assert expected in error_of(look(*arguments))


def test_nothing_held_out_is_said(look, copied_run, monkeypatch, smoke_run):
    monkeypatch.chdir(smoke_run.cwd)
    change_checkpoint(copied_run, "data", heldout_every=0)
    message = error_of(look("--heldout", run_folder=copied_run))
    assert "data.heldout_every=0 holds nothing out" in message
    assert "set data.heldout_every=6, or add photographs" in message


def test_a_test_split_of_one_photograph_names_the_value_found(look, copied_run, monkeypatch, smoke_run):
    monkeypatch.chdir(smoke_run.cwd)
    change_checkpoint(copied_run, "data", heldout_every=100)
    message = error_of(look("--heldout", run_folder=copied_run))
    assert "1 of the 1 photographs of the test split show an object that the generator knows" in message
    assert "data.heldout_every=100: expected at least 2; train with a value of 2 or more that is below half" in message


def test_missing_photographs_stop_the_scores_and_say_so(look, copied_run):
    change_checkpoint(copied_run, "data", type="turntable", v_list=[0.3])
    assert "data.datadir=data does not exist" in error_of(look("--fid_kid", run_folder=copied_run))
    moved = look("--fid_kid", "--datadir", "moved", run_folder=copied_run)
    assert "data.datadir=moved does not exist" in error_of(moved)


def test_heights_and_elevations_name_the_same_cameras_and_exclude_each_other(look):
    pictures = []
    for cameras in (["--heights", 0.25], ["--elevations", 30]):
        _, stdout, _ = look("--grid", "--views", 2, "--classes", "car", *cameras)
        pictures.append(read_pixels(written_by(stdout)[0]).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    with pytest.raises(SystemExit):
        look("--heights", 0.25, "--elevations", 30)


def test_the_command_line_offers_what_can_be_done_with_the_defaults_of_the_options():
    assert all(callable(pkgutil.resolve_name(function)) for function, _ in eval_options.ACTIONS.values())

    def options(*arguments: str) -> eval_options.EvalOptions:
        given = vars(eval_command.build_parser().parse_args(arguments))
        assert given.pop("debug") is False
        return eval_options.EvalOptions(**given)

    assert options() == eval_options.EvalOptions()
    assert options("--sr", "--heldout", "--grid") == eval_options.EvalOptions(sr=True, actions=["heldout", "grid"])


def test_the_program_itself_returns_the_exit_code(run_command_line, tmp_path):
    process: subprocess.Popen[str] = run_command_line("eval.py", cwd=tmp_path)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stdout == ""
    assert stderr.startswith("error: results: no run found")
    assert stderr.count("\n") == 1


def test_several_processes_would_write_the_same_files_and_are_refused(run_program, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_program("eval.py") == 1
    assert "WORLD_SIZE=2: graf eval works in one process; start it without torchrun" in capsys.readouterr().err
