"""viser's cameras and this project's: a point lands on the same pixel by either's own formulas."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from graf.geometry.cameras import pose_from_angles, project_points
from graf.viewer.drawing import Look, draw
from graf.viewer.viewpoints import Viewpoint, viser_rotation


def opencv_pixel(point: np.ndarray, wxyz: tuple[float, ...], position: np.ndarray, fov: float, size: tuple[int, int]):
    """Where a pinhole camera that looks along +z with y down sees a point: column and row."""
    w, x, y, z = wxyz
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    right, down, ahead = rotation.T @ (point - position)
    height, width = size
    focal = height / 2 / math.tan(fov / 2)
    return width / 2 + focal * right / ahead, height / 2 + focal * down / ahead


def test_a_point_lands_on_the_same_pixel_for_viser_and_for_our_projection():
    torch.manual_seed(0)
    for u, v in ((0.1, 0.3), (0.6, 0.1), (0.85, 0.7)):
        pose = pose_from_angles(torch.tensor(u), torch.tensor(v), 3.0)
        wxyz, position = viser_rotation(pose), pose[:3, 3].numpy()
        viewpoint = Viewpoint.from_viser(wxyz, position, 0.6, 1.5)
        points = torch.rand(20, 3, dtype=torch.float64) - 0.5
        pixels, depth = project_points(points, viewpoint.camera_to_world, viewpoint.intrinsics(200))
        assert (depth > 0).all()
        for point, pixel in zip(points.numpy(), pixels.tolist(), strict=True):
            assert opencv_pixel(point, wxyz, position, 0.6, (200, 300)) == pytest.approx(pixel, abs=1e-3)


def test_a_ball_is_drawn_where_viser_would_draw_it(ball):
    centre = (0.3, -0.4, 0.25)
    renderer = ball(centre, 0.12)
    pose = pose_from_angles(torch.tensor(0.2), torch.tensor(0.25), 3.5)
    fov, height, width = math.radians(35), 90, 120
    viewpoint = Viewpoint.from_viser(viser_rotation(pose), pose[:3, 3].numpy(), fov, width / height)
    picture = draw(renderer, Look("car", torch.zeros(5), num_samples=64), viewpoint, height).picture
    rows, columns = np.nonzero(picture[..., 1] < 100)  # red on white
    expected = opencv_pixel(np.array(centre), viser_rotation(pose), pose[:3, 3].numpy(), fov, (height, width))
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx(expected, abs=0.7)


def test_a_viewpoint_becomes_viser_and_back():
    pose = pose_from_angles(torch.tensor(0.7), torch.tensor(0.4), 2.5)
    again = Viewpoint.from_viser(viser_rotation(pose), pose[:3, 3].tolist(), math.radians(40), 2.0)
    assert_close(again.camera_to_world.float(), pose)
    assert again.fov == pytest.approx(40)
    assert (again.intrinsics(50).height, again.intrinsics(50).width) == (50, 100)
