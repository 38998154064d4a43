"""`graf capture --walkaround` with cameras that are known: what is made of them; tests/capture finds them."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("cv2")

from graf.app import capture_walkaround
from graf.app.capture_command import main
from graf.app.command_line import main as graf
from graf.capture.cameras import Lens, PosedPhotographs
from graf.capture.walkaround import Walkaround
from graf.config import load_config
from graf.data.shapes import CLASS_NAMES
from graf.data.synthetic import render_views
from graf.geometry.cameras import Intrinsics, height_from_elevation, pose_from_angles

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
