"""`graf capture --walkaround` with cameras that are known: what is made of them; tests/capture finds them."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("cv2")

from graf.app import builders, capture_walkaround
from graf.app.capture_command import main
from graf.app.capture_configuration import write_posed_configuration
from graf.app.command_line import main as graf
from graf.capture import posed
from graf.capture.cameras import Lens, PosedPhotographs
from graf.capture.walkaround import Walkaround
from graf.config import load_config
from graf.data.shapes import CLASS_NAMES
from graf.data.synthetic import render_views
from graf.geometry.cameras import Intrinsics, height_from_elevation, pose_from_angles

ROOT = Path(__file__).resolve().parents[2]
COUNT, SIZE, FOV, RADIUS = 16, 144, 35.0, 4.0


@pytest.fixture(scope="module")
def views():
    """Photographs of a mug from two heights, and poses in a world that is twice as large."""
    u = torch.arange(COUNT) / 8 % 1
    v = torch.tensor([height_from_elevation(20 if number < 8 else 45) for number in range(COUNT)])
    poses = pose_from_angles(u, v, RADIUS)
    rgb, _, mask = render_views(CLASS_NAMES.index("mug"), poses, Intrinsics.from_fov(SIZE, FOV), supersampling=1)
    images = ((rgb + 1) / 2 - (1 - mask) * 0.2).mul(255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    poses[:, :3, 3] *= 2
    return images, poses.double().numpy()


@pytest.fixture
def shots(restored_process, tmp_path, monkeypatch, views):
    images, poses = views
    (tmp_path / "shots").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "shots" / f"{number}.png")

    def reconstruct(pictures, masks, names, settings):
        kept = list(range(COUNT - 1))
        lens = Lens.from_fov(SIZE, SIZE, FOV)
        chosen = [None if masks is None else [masks[n] for n in kept], poses[kept], lens, [names[n] for n in kept]]
        return Walkaround(PosedPhotographs([pictures[n] for n in kept], *chosen), [names[-1]], 0.3, 900, [])

    monkeypatch.setattr(capture_walkaround, "reconstruct", reconstruct)
    return tmp_path


def test_a_walk_becomes_a_set_with_true_poses_that_the_doctor_passes(shots, capsys):
    assert main(["shots", "--walkaround", "--out", "mug"]) == 0
    printed = capsys.readouterr().out
    assert "placed 15 of 16 photographs" in printed
    assert "lost: 15.png" in printed
    assert "graf train --config mug/capture.yaml" in printed
    config = load_config("mug/capture.yaml")
    assert config.data.type == "transforms"
    assert config.data.radius == pytest.approx(RADIUS / 0.9, rel=0.1)  # the mug reaches 0.9 of the toys' sphere
    assert graf(["doctor", "--config", "mug/capture.yaml"]) == 0
    report = capsys.readouterr().out
    assert "15 photographs, 1 classes" in report
    assert "class 0 mug" in report
    assert "problem: none found" in report
    with Image.open(shots / "mug" / "images" / "0000.png") as image:
        assert image.mode == "RGBA"
        held = np.asarray(image.getchannel("A")) > 127
    assert 0.2 < held.mean() < 0.8


@pytest.mark.parametrize("count", [4, 6, 7])
def test_a_set_of_few_photographs_has_some_for_training_validation_and_test(tmp_path, views, count):
    images, poses = views
    few = [str(number) for number in range(count)]
    posed.write_transforms(
        tmp_path, PosedPhotographs(images[:count], None, poses[:count], Lens.from_fov(SIZE, SIZE, FOV), few)
    )
    keys = {"data.radius": 8, "data.near": 7, "data.far": 9}
    write_posed_configuration(tmp_path / "capture.yaml", keys, masked=False, side=SIZE, count=count)
    config = load_config(tmp_path / "capture.yaml")
    numbers = [len(builders.open_photographs(config, subset)) for subset in ("train", "validation", "test")]
    assert numbers == [count - 2, 1, 1]
    builders.check_batch_size(config, numbers[0])


def test_a_walk_is_not_mixed_with_what_is_there(shots, capsys):
    assert main(["shots", "--walkaround", "--out", "mug", "--mask", "none"]) == 0
    assert load_config("mug/capture.yaml").nerf.background == "learned"
    assert main(["shots", "--walkaround", "--out", "mug"]) == 1
    assert "transforms.json exists already" in capsys.readouterr().err
    (shots / "photos").mkdir()
    (shots / "photos" / "labels.csv").write_text("file,class,height,angle\n")
    assert main(["shots", "--walkaround"]) == 1
    assert "photographs of a turntable" in capsys.readouterr().err
    assert not (shots / "photos" / "transforms.json").exists()


def test_photographs_in_a_folder_of_the_name_that_pictures_get_are_not_overwritten(shots):
    folder = (shots / "shots").rename(shots / "images")
    for file in folder.iterdir():
        file.rename(folder / f"{int(file.stem):04d}.png")  # as ffmpeg numbers frames
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert main(["images", "--walkaround", "--out", ".", "--mask", "none"]) == 0
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    frames = json.loads((shots / "transforms.json").read_text())["frames"]
    assert frames[0]["file_path"] == "images-2/0000.png"
    assert all((shots / frame["file_path"]).is_file() for frame in frames)


def test_a_walk_that_fails_leaves_nothing_and_one_that_is_there_whole(shots, monkeypatch, capsys):
    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(posed, "write_atomically", fail)  # transforms.json
        assert main(["shots", "--walkaround", "--out", "mug", "--mask", "none"]) == 1
    assert not (shots / "mug" / "capture.yaml").exists()
    (shots / "mug" / "capture.yaml").write_text("# mine")
    assert main(["shots", "--walkaround", "--out", "mug", "--mask", "none"]) == 1
    assert "mug/capture.yaml exists already" in capsys.readouterr().err
    assert (shots / "mug" / "capture.yaml").read_text() == "# mine"


SLOW_WORKER = """
import sys, time
from graf.app import command_line
from graf.capture import walkaround
run = walkaround.run_worker
slow = [sys.executable, "-c", "import time; time.sleep(60)"]
walkaround.run_worker = lambda command, *rest: run(slow, *rest)
sys.exit(command_line.main(["capture", "shots", "--walkaround", "--mask", "none"]))
"""


@pytest.mark.skipif(find_spec("pycolmap") is None, reason="needs pycolmap")
def test_a_walk_that_is_ended_leaves_no_worker_and_no_temporary_folder(tmp_path, views):
    (tmp_path / "shots").mkdir()
    (tmp_path / "temporary").mkdir()
    for place, image in enumerate(views[0]):
        Image.fromarray(image).save(tmp_path / "shots" / f"{place}.png")
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", SLOW_WORKER]
    with subprocess.Popen(program, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "temporary").glob("*/job.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)  # the worker, which has its standard error, would hold it open
    assert process.returncode == 143, said
    assert said.splitlines()[-1] == "error: interrupted; the set is as it was"
    assert list((tmp_path / "temporary").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shots", "temporary"]
