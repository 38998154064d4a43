"""`graf capture` through its command line: what it writes, what it adds to, and what it leaves alone when it fails."""

import csv
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("cv2")
imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")

from graf.app import capture_turntable  # noqa: E402
from graf.app.capture_command import main  # noqa: E402
from graf.app.command_line import main as graf  # noqa: E402
from graf.config import load_config  # noqa: E402
from graf.data.shapes import CLASS_NAMES  # noqa: E402
from graf.data.synthetic import render_views  # noqa: E402
from graf.geometry.cameras import Intrinsics, height_from_elevation, pose_from_angles  # noqa: E402

PER_TURN, SIZE, FOV, RADIUS, ELEVATION, START = 36, 160, 30.0, 4.0, 22.0, 50.0
KNOWN = ("--fov", "30", "--elevation", "22")


def write_video(path, frames, rate=20):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{SIZE}x{SIZE}", "-r", str(rate), "-i", "-", "-c:v", "libx264", "-crf", "12"]
    subprocess.run([*command, "-pix_fmt", "yuv420p", str(path)], input=frames.tobytes(), check=True)


def film(toy, elevation=ELEVATION):
    """A turn of a toy before a grey wall, the camera's azimuth growing from 50 degrees on."""
    u = torch.remainder(START / 360 + torch.arange(PER_TURN) / PER_TURN, 1.0)
    poses = pose_from_angles(u, torch.full_like(u, height_from_elevation(elevation)), RADIUS)
    rgb, _, mask = render_views(CLASS_NAMES.index(toy), poses, Intrinsics.from_fov(SIZE, FOV), supersampling=1)
    images = (rgb + 1) / 2 - (1 - mask) * 0.2
    return (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    again = np.arange(round(1.2 * PER_TURN)) % PER_TURN
    for toy in ("mug", "house"):
        write_video(folder / f"{toy}.mp4", film(toy)[again])
    write_video(folder / "backwards.mp4", film("mug")[again][::-1])
    write_video(folder / "high.mp4", film("mug", 50.0)[again])
    return folder


@pytest.fixture
def photos(restored_process, tmp_path):
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def captured(videos, tmp_path_factory):
    """What capturing the mug wrote, once for all tests that add to it; its paths are relative."""
    folder = tmp_path_factory.mktemp("captured")
    program = "import sys; from graf.app.capture_command import main; sys.exit(main(sys.argv[1:]))"
    arguments = [str(videos / "mug.mp4"), *KNOWN, "--frames", "12", "--class", "mug"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=folder, env=environment, check=True)
    return folder / "photos"


@pytest.fixture
def mug(photos, captured):
    """A set that has the mug."""
    shutil.copytree(captured, photos)
    return photos


def capture(video, *arguments):
    return main([str(video), *KNOWN, "--frames", "12", *arguments])


def labels(folder):
    with open(folder / "labels.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_video_becomes_a_set_that_the_doctor_passes_and_whose_cameras_are_true(videos, photos, capsys):
    assert capture(videos / "mug.mp4", "--class", "mug") == 0
    printed = capsys.readouterr().out
    assert "graf doctor --config photos/capture.yaml" in printed
    assert "graf train --config photos/capture.yaml --use_amp" in printed
    rows = labels(photos)
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


@pytest.mark.parametrize("video", ["mug", "backwards"])
def test_pictures_stand_at_the_angles_of_their_labels(videos, photos, video):
    """Each picture is the toy's true view at its label's azimuth, from where the first one was taken."""
    assert capture(videos / f"{video}.mp4", "--class", "mug") == 0
    first = START if video == "mug" else START + 360 * (round(1.2 * PER_TURN) - 1) / PER_TURN
    for row in labels(photos)[::3]:
        found = _object(np.asarray(Image.open(photos / row["file"])).astype(float))
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


def test_a_second_object_leaves_the_first_ones_files_as_they_are(videos, mug):
    before = contents(mug)
    assert capture(videos / "house.mp4", "--class", "house") == 0
    after = contents(mug)
    changed = {str(path) for path in before if before[path] != after[path]}
    assert changed == {"labels.csv"}
    assert [row["class"] for row in labels(mug)] == ["mug"] * 12 + ["house"] * 12


def test_another_height_of_an_object_keeps_its_scale(videos, mug, capsys):
    assert main([str(videos / "high.mp4"), "--fov", "30", "--elevation", "50", "--frames", "12", "--class", "mug"]) == 0
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


def test_what_is_there_is_replaced_only_when_asked(videos, mug, capsys):
    before = contents(mug)
    assert capture(videos / "backwards.mp4", "--class", "mug") == 1
    assert "12 photographs of mug are there already" in capsys.readouterr().err
    assert contents(mug) == before
    assert capture(videos / "backwards.mp4", "--class", "mug", "--replace") == 0
    rows = labels(mug)
    assert len(rows) == 12
    assert sorted(path.name for path in mug.iterdir() if path.is_dir()) == ["capture_check", "mug-2"]
    assert all((mug / row["file"]).is_file() for row in rows)


@pytest.mark.parametrize("failing", ["draw_masks", "cut", "compose_set_configuration"])
def test_a_failed_run_leaves_the_set_whole(videos, mug, monkeypatch, failing):
    before = contents(mug)

    def fail(*arguments, **options):
        raise KeyboardInterrupt if failing == "cut" else OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(capture_turntable, failing, fail)
        assert capture(videos / "house.mp4", "--class", "house") != 0
    after = contents(mug)
    assert {path: after[path] for path in before} == before
    assert all("capture_check" in str(path) for path in after.keys() - before.keys())
    assert not list(mug.glob(".capture_*"))
    assert capture(videos / "house.mp4", "--class", "house") == 0
    assert len(labels(mug)) == 24


def test_instances_are_named_or_none_is(videos, photos, capsys):
    assert capture(videos / "mug.mp4", "--class", "mug", "--instance", "green") == 0
    assert capture(videos / "house.mp4", "--class", "house") == 1
    assert "--instance is missing" in capsys.readouterr().err
    assert capture(videos / "house.mp4", "--class", "house", "--instance", "red") == 0
    assert load_config("photos/capture.yaml").nerf.planes == "synthesis"
    assert {(row["class"], row["instance"]) for row in labels(photos)} == {("mug", "green"), ("house", "red")}


def test_an_edited_configuration_keeps_its_edits(videos, mug):
    file = mug / "capture.yaml"
    file.write_text(file.read_text().replace("expname: 'photos'", "expname: mine  # my own"))
    assert main([str(videos / "high.mp4"), "--fov", "30", "--elevation", "50", "--frames", "12", "--class", "mug"]) == 0
    text = file.read_text()
    assert "expname: mine  # my own" in text
    assert len(load_config(str(file)).data.v_list) == 2


def test_photographs_with_masks_of_their_own_and_without_any(videos, photos, tmp_path, capsys):
    folder, masks = tmp_path / "shots", tmp_path / "masks"
    folder.mkdir()
    masks.mkdir()
    for number, frame in enumerate(film("house")[::2]):
        Image.fromarray(frame).save(folder / f"p{number}.jpg", quality=95)
        Image.fromarray(np.where(np.abs(frame.astype(int) - 204).max(-1) > 8, np.uint8(255), np.uint8(0))).save(
            masks / f"p{number}.png"
        )
    options = ["--fov", "30", "--elevation", "22", "--direction", "cw"]
    assert main([str(folder), *options, "--class", "own", "--mask", str(masks)]) == 0
    assert len(labels(photos)) == 18
    angles = [int(row["angle"]) for row in labels(photos)]
    np.testing.assert_allclose(angles, np.arange(18) * 20, atol=6)
    assert main([str(folder), *options, "--class", "bare", "--mask", "none", "--out", "bare", "--turns", "1"]) == 0
    assert load_config("bare/capture.yaml").nerf.background == "learned"
    with Image.open(tmp_path / "bare" / labels(tmp_path / "bare")[0]["file"]) as image:
        assert image.mode == "RGB"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{mug}", "--frames", "4"], "--frames 4: expected 8 to 3600"),
        (["{mug}", "--frames", "200"], "--frames 200: there are"),
        (["{mug}", "--class", "a/b"], "--class: class 'a/b'"),
        (["{mug}", "--class", "mug", "--walkaround"], "--out mug"),
        (["{mug}", "--mask", "nowhere"], "--mask nowhere: no such folder"),
        (["nowhere.mp4"], "nowhere.mp4: no such file"),
        (["--marker-sheet", "sheet.txt"], "sheet.pdf"),
    ],
)
def test_errors_are_one_line(videos, photos, capsys, arguments, words):
    assert main([argument.format(mug=videos / "mug.mp4") for argument in arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error
    assert not (photos / "labels.csv").exists()


def test_a_marker_sheet_is_written(photos, tmp_path, capsys):
    assert main(["--marker-sheet", "a4.pdf"]) == 0
    assert (tmp_path / "a4.pdf").read_bytes().startswith(b"%PDF")
    assert "print it at 100%" in capsys.readouterr().out
