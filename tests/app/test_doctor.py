"""The doctor's report and drawings, through its command line."""

import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

from graf.app.doctor import draw_cameras, main, outline_sphere
from graf.geometry.cameras import Intrinsics, pose_from_angles, project_points

PICTURES = {"contact_sheet.png", "cameras.png", "overlay.png"}


@pytest.fixture
def photographs(restored_process, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for angle in range(0, 360, 45):
        Image.new("RGB", (20, 16), (angle // 2, 50, 50)).save(folder / f"cup__{angle}.png")
    (folder / "cup__7.png").write_text("broken")
    (tmp_path / "config.yaml").write_text(
        f"data: {{type: turntable, datadir: {folder}, imsize: 32, v_list: [0.3], heldout_every: 4}}"
    )
    return tmp_path


def run(folder, *overrides):
    return main(["--config", str(folder / "config.yaml"), "--out", str(folder / "out"), *overrides])


def assert_reported(report, *parts):
    for part in parts:
        assert part in report


def test_report_counts_and_names_problems(photographs, capsys):
    assert run(photographs) == 0
    assert_reported(
        capsys.readouterr().out,
        "8 photographs, 1 classes",
        "class 0 cup: 8 photographs, 8 angles",
        "(elevation 24 degrees): 8 photographs",
        "315-359: 1",
        "20x16 (8)",
        "held out: 2 of 8 angles, 1 for test, 1 for validation",
        "problem: 1 unreadable photographs: cup__7.png",
    )
    assert {path.name for path in (photographs / "out").iterdir()} == PICTURES


def test_report_counts_instances_and_given_splits(photographs, capsys):
    rows = [f"cup__{angle}.png,cup,0,{angle},{angle % 2 or ''},{'test' * (angle < 90)}" for angle in range(0, 360, 45)]
    (photographs / "photos" / "labels.csv").write_text("\n".join(["file,class,height,angle,instance,split", *rows]))
    assert run(photographs) == 0
    assert_reported(
        capsys.readouterr().out,
        "class 0 cup: 8 photographs, 8 angles, known instances: 1 (in 4 photographs)",
        "held out: 2 of 6 angles, 1 for test, 1 for validation",
        "split by labels.csv: 2 for test",
    )


@pytest.mark.parametrize(("radius", "is_problem"), [(3.5, False), (3.0, True)])
def test_the_radius_of_a_walk_is_compared_with_its_mean_distance(
    restored_process, tmp_path, capsys, radius, is_problem
):
    frames = []
    for number, distance in enumerate((3.2, 3.5, 3.8)):
        pose = pose_from_angles(torch.tensor(number / 3), torch.tensor(0.3), distance)
        frames.append({"file_path": f"{number}.png", "transform_matrix": pose.tolist()})
        Image.new("RGB", (32, 32), (90, 50, 50)).save(tmp_path / f"{number}.png")
    (tmp_path / "transforms.json").write_text(json.dumps({"camera_angle_x": 0.6, "frames": frames}))
    (tmp_path / "config.yaml").write_text(
        f"data: {{type: transforms, datadir: {tmp_path}, imsize: 32, radius: {radius}, near: 2, far: 5}}"
    )
    assert run(tmp_path) == 0
    assert ("is not the true poses' 3.50 (mean), which is used instead" in capsys.readouterr().out) == is_problem


def test_photographs_without_poses_show_the_sampled_ranges(photographs, capsys):
    assert run(photographs, "data.type=image_folder", "data.vmin=0.2", "data.heldout_every=0") == 0
    assert "poses unknown: sampled with u in 0.0..1.0, v in 0.2" in capsys.readouterr().out
    assert {path.name for path in (photographs / "out").iterdir()} == PICTURES


@pytest.mark.parametrize("override", ["data.datadir=/nowhere", "data.imsizes=3"])
def test_errors_are_one_line_and_an_exit_code(photographs, capsys, override):
    assert run(photographs, override) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "data." in error


def test_what_is_held_out_of_photographs_without_angles_is_said(photographs, capsys):
    assert run(photographs, "data.type=image_folder", "data.vmin=0.2", "data.heldout_every=2") == 0
    assert "held out: 5 of 9 photographs, 3 for test, 2 for validation" in capsys.readouterr().out


@pytest.mark.parametrize("out", ["config.yaml", "x" * 300])
def test_pictures_that_cannot_be_written_are_one_line(photographs, capsys, out):
    assert run(photographs, "--out", str(photographs / out)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {photographs / out}: cannot be written (")


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_a_name_that_is_not_utf8_is_reported_in_utf8(photographs, capsys):
    try:
        (photographs / "photos" / os.fsdecode(b"caf\xe9.png")).write_text("broken")
    except OSError:  # macOS
        pytest.skip("this file system has UTF-8 names only")
    assert run(photographs) == 0
    assert_reported(capsys.readouterr().out, r"1 photographs without a label: caf\udce9.png")


def test_sphere_outline_is_tangent_to_the_lines_of_sight():
    pose = pose_from_angles(torch.tensor(0.1), torch.tensor(0.3), 3.0)
    points = outline_sphere(pose)
    torch.testing.assert_close(points.norm(dim=1), torch.ones(len(points)))
    sight = points - pose[:3, 3]
    torch.testing.assert_close((sight * points).sum(1), torch.zeros(len(points)), atol=1e-5, rtol=0)
    intrinsics = Intrinsics.from_fov(100, 40.0)
    pixels, _ = project_points(points, pose, intrinsics)
    radius = intrinsics.focal * math.tan(math.asin(1 / 3.0))
    torch.testing.assert_close((pixels - 50).norm(dim=1), torch.full((len(points),), radius), atol=1e-3, rtol=0)


def test_axes_are_drawn_where_they_project(photographs):
    run(photographs, "data.angle_direction=cw")
    overlay = np.asarray(Image.open(photographs / "out" / "overlay.png")).astype(int)
    tile = overlay[:320, 320:640]  # the third angle of eight, 90 degrees clockwise: the camera stands on -y
    red = (tile[..., 0] > 200) & (tile[..., 1] < 80)
    assert red[:, 170:].any()  # from there +x points to the right
    assert not red[:, :150].any()


def test_known_cameras_are_told_and_drawn_as_training_takes_them(photographs, capsys):
    def see(**framing: float) -> tuple[float, float]:
        """Middle and width, in pixels, of the sphere on a photograph from the side."""
        series = {name: [framing.get(name, 0.0)] + 6 * [0.0] for name in ("log_scale", "right", "down")}
        known = {"fov": framing.get("fov", 30.0), "elevations": [40.0], "framing": {"cup": series}}
        keys = ("data.radius=6", "data.near=5", "data.far=7")  # the whole sphere is to be seen
        assert run(photographs, *keys, f"data.refined_cameras={json.dumps(known)}") == 0
        overlay = np.asarray(Image.open(photographs / "out" / "overlay.png")).astype(int)
        columns = np.nonzero((abs(overlay[:320, :320] - 130).max(-1) == 0).any(0))[0]
        return (columns[0] + columns[-1]) / 2, columns[-1] - columns[0]

    middle, width = see()
    assert abs(middle - 160) <= 1
    assert_reported(capsys.readouterr().out, "(elevation 40 degrees): 8 photographs", "field of view 30.0 degrees")
    assert see(right=0.1) == pytest.approx((middle + 16, width), abs=1)
    assert see(log_scale=math.log(0.8)) == pytest.approx((middle, 0.8 * width), abs=2)
    capsys.readouterr()
    zoom = math.tan(math.radians(15)) / math.tan(math.radians(18))
    assert see(fov=36.0) == pytest.approx((middle, zoom * width), abs=2)
    assert_reported(capsys.readouterr().out, "field of view 36.0 degrees")


def test_camera_plot_puts_a_camera_on_x_to_the_right_of_the_middle():
    pose = pose_from_angles(torch.tensor([0.0]), torch.tensor([0.5]), 3.0)
    picture = np.asarray(draw_cameras(pose)).astype(int)
    orange = (abs(picture - (240, 140, 20)).sum(-1) == 0) & (np.arange(picture.shape[1]) < 420)
    rows, columns = np.nonzero(orange)
    assert abs(columns.mean() - (210 + 0.45 * 420)) < 1.5
    assert abs(rows.mean() - (14 + 210)) < 1.5
