"""Cameras: the pose convention, its inverse, labels, and projection against the rays."""

import math

import pytest
import torch
from torch.testing import assert_close

from graf.geometry.cameras import (
    Intrinsics,
    angle_label,
    angles_from_pose,
    directions_from_angles,
    elevation_from_height,
    height_from_elevation,
    label_angles,
    median_height,
    pose_from_angles,
    project_points,
    raise_cameras,
    ring,
)
from graf.geometry.rays import RayCaster, pixel_grid

RADIUS = 3.5


def random_angles(count: int, margin: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, dtype=torch.float64), margin + (1 - 2 * margin) * torch.rand(count, dtype=torch.float64)


@pytest.mark.parametrize(("v", "degrees"), [(0.0, 90.0), (0.25, 30.0), (0.5, 0.0), (1.0, -90.0)])
def test_the_height_encodes_the_elevation(v, degrees):
    assert elevation_from_height(v) == pytest.approx(degrees, abs=1e-5)
    assert height_from_elevation(degrees) == pytest.approx(v, abs=1e-12)


def test_the_elevation_is_the_angle_of_the_cameras_place_above_the_horizon():
    for v in (0.1, 0.3, 0.45, 0.9):
        x, y, z = pose_from_angles(torch.tensor(0.3), torch.tensor(v), RADIUS)[:3, 3].tolist()
        assert elevation_from_height(v) == pytest.approx(math.degrees(math.atan2(z, math.hypot(x, y))), abs=1e-4)
    assert elevation_from_height(-1e-9) == 90


def test_rotations_are_orthonormal_and_right_handed():
    u, v = torch.rand(64, dtype=torch.float64), torch.linspace(0, 1, 64, dtype=torch.float64)  # both poles included
    rotation = pose_from_angles(u, v, RADIUS)[:, :3, :3]
    assert_close(rotation.mT @ rotation, torch.eye(3, dtype=torch.float64).expand(64, 3, 3), atol=1e-12, rtol=0)
    assert_close(torch.linalg.det(rotation), torch.ones(64, dtype=torch.float64), atol=1e-12, rtol=0)


def test_cameras_sit_on_the_sphere_and_look_at_the_origin_along_minus_z():
    poses = pose_from_angles(*random_angles(64), RADIUS)
    centre, z_axis = poses[:, :3, 3], poses[:, :3, 2]
    assert_close(centre.norm(dim=1), torch.full((64,), RADIUS, dtype=torch.float64))
    assert_close(centre - RADIUS * z_axis, torch.zeros_like(centre), atol=1e-12, rtol=0)
    assert_close(poses[:, 3], torch.tensor([0.0, 0, 0, 1], dtype=torch.float64).expand(64, 4))


def test_every_camera_may_have_its_own_distance():
    (u, v), radius = random_angles(6), 3 + torch.rand(6, dtype=torch.float64)
    poses = pose_from_angles(u, v, radius)
    for i in range(6):
        assert_close(poses[i], pose_from_angles(u[i], v[i], radius[i].item()))


def test_up_points_upwards_and_right_is_level():
    poses = pose_from_angles(*random_angles(64), RADIUS)
    assert bool((poses[:, 2, 1] > 0).all())
    assert_close(poses[:, 2, 0], torch.zeros(64, dtype=torch.float64))


@pytest.mark.parametrize(
    ("u", "v", "centre"),
    [
        (0.0, 0.5, (1, 0, 0)),
        (0.25, 0.5, (0, 1, 0)),
        (0.5, 0.5, (-1, 0, 0)),
        (0.75, 0.5, (0, -1, 0)),
        (0.0, 0.0, (0, 0, 1)),
        (0.3, 1.0, (0, 0, -1)),
        (0.0, 0.25, (math.sqrt(0.75), 0, 0.5)),
    ],
)
def test_azimuth_turns_counter_clockwise_from_x_and_v_runs_from_top_to_bottom(u, v, centre):
    found = directions_from_angles(torch.tensor(u, dtype=torch.float64), torch.tensor(v, dtype=torch.float64))
    assert_close(found, torch.tensor(centre, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_camera_on_x_sees_y_on_its_right_and_z_above():
    pose = pose_from_angles(torch.tensor(0.0), torch.tensor(0.5), RADIUS)
    pixels, depth = project_points(
        torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.5]]), pose, Intrinsics.from_fov(64, 30.0)
    )
    assert pixels[0, 0] > 33
    assert pixels[0, 1].item() == pytest.approx(32, abs=1e-4)
    assert pixels[1, 1] < 31
    assert pixels[1, 0].item() == pytest.approx(32, abs=1e-4)
    assert_close(depth, torch.full((2,), RADIUS))


def test_v_uniform_is_uniform_on_the_sphere():
    v = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    heights = directions_from_angles(torch.zeros_like(v), v)[:, 2]  # Archimedes: z is then uniform in [-1, 1]
    assert_close(torch.histc(heights, 10, -1, 1), torch.full((10,), 1000.0, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(), (7,), (2, 3)])
def test_angles_from_pose_inverts_pose_from_angles(shape):
    u, v = torch.rand(shape, dtype=torch.float64), 0.01 + 0.98 * torch.rand(shape, dtype=torch.float64)
    poses = pose_from_angles(u, v, RADIUS)
    assert poses.shape == (*shape, 4, 4)
    found_u, found_v = angles_from_pose(poses)
    assert_close(found_u, u)
    assert_close(found_v, v)


def test_raised_cameras_stand_higher_on_the_same_sphere_and_still_look_at_the_origin():
    u, elevation, radius = torch.rand(5), torch.tensor([-30.0, 0.0, 20.0, 50.0, 70.0]), 1 + 3 * torch.rand(5)
    higher = torch.tensor([10.0, -5.0, 0.0, 3.0, 15.0])
    poses, expected = (
        pose_from_angles(u, torch.tensor([height_from_elevation(degrees) for degrees in found.tolist()]), radius)
        for found in (elevation, elevation + higher)
    )
    assert_close(raise_cameras(poses, torch.deg2rad(higher)), expected, atol=2e-6, rtol=0)


def test_recovered_azimuth_is_never_negative():
    u, _ = angles_from_pose(pose_from_angles(torch.linspace(0, 1, 721), torch.full((721,), 0.3), RADIUS))
    assert bool((u >= 0).all())
    assert bool((u <= 1).all())


def test_angle_label_rounds_to_whole_degrees_and_wraps():
    u = torch.tensor([0.0, 0.4, 0.6, 359.4, 359.6, 180.0, 360.0], dtype=torch.float64) / 360
    labels = angle_label(u)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 0, 1, 359, 0, 180, 0]


def test_angle_label_inverts_every_whole_degree_in_float32():
    assert angle_label(torch.arange(360) / 360).tolist() == list(range(360))


def test_label_angles_read_height_and_turn_both_ways():
    labels = torch.tensor([[3, 1, 0, 2], [0, 0, 90, -1], [1, 1, 359, 0]])
    u, v = label_angles(labels, [0.2, 0.4], "ccw")
    assert_close(u, torch.tensor([0.0, 0.25, 359 / 360]))
    assert_close(v, torch.tensor([0.4, 0.2, 0.4]))
    u, v = label_angles(labels, [0.2, 0.4], "cw")
    assert_close(u, torch.tensor([0.0, 0.75, 1 / 360]))
    assert_close(v, torch.tensor([0.4, 0.2, 0.4]))


def test_label_angles_of_both_senses_are_mirrored_in_the_xz_plane():
    labels = torch.cartesian_prod(*map(torch.tensor, ([0], [0], range(360), [-1])))
    ccw, cw = (pose_from_angles(*label_angles(labels, [0.3], sense), RADIUS)[:, :3, 3] for sense in ("ccw", "cw"))
    assert_close(cw, ccw * torch.tensor([1.0, -1.0, 1.0]), atol=1e-5, rtol=0)


def test_an_unknown_angle_direction_is_named():
    with pytest.raises(ValueError, match=r"angle_direction='left'.*'ccw' or 'cw'"):
        label_angles(torch.zeros(1, 4, dtype=torch.int64), [0.3], "left")


@pytest.mark.parametrize(("fov", "focal"), [(90.0, 32.0), (2 * math.degrees(math.atan(0.5)), 64.0)])
def test_focal_length_spans_the_field_of_view(fov, focal):
    assert Intrinsics.from_fov(64, fov).focal == pytest.approx(focal)


@pytest.mark.parametrize("fov", [0.0, 180.0, -30.0])
def test_an_impossible_field_of_view_is_named(fov):
    with pytest.raises(ValueError, match=f"fov={fov}"):
        Intrinsics.from_fov(64, fov)


def test_resized_intrinsics_keep_the_field_of_view():
    assert Intrinsics.from_fov(64, 40.0).resized(128, 128) == Intrinsics.from_fov(128, 40.0)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 10)])
def test_points_along_a_ray_project_back_onto_its_pixel_at_their_z_depth(height, width):
    intrinsics = Intrinsics(height, width, 12.0)
    poses = pose_from_angles(*random_angles(5), RADIUS)
    rays = RayCaster(intrinsics, 2.0, 5.0).cast(poses, pixel_grid(5, height, width))
    distance = 2 + 3 * torch.rand(5, height * width, 1, dtype=torch.float64)
    pixels, depth = project_points(rays.origins + distance * rays.directions, poses[:, None], intrinsics)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    expected = torch.stack([columns, rows], -1).reshape(1, -1, 2).double() + 0.5
    assert_close(pixels, expected.expand_as(pixels), atol=1e-5, rtol=0)
    assert_close(depth, (distance * rays.axis_cosine)[..., 0])


def test_points_behind_the_camera_have_negative_depth():
    pose = pose_from_angles(torch.tensor(0.1), torch.tensor(0.3), RADIUS)
    _, depth = project_points(2 * pose[:3, 3], pose, Intrinsics.from_fov(8, 30.0))
    assert depth.item() == pytest.approx(-RADIUS, abs=1e-5)


@pytest.mark.parametrize(("v_list", "index"), [((0.3,), 0), ((0.4, 0.1, 0.2), 2), ((0.4, 0.1, 0.3, 0.2), 3)])
def test_median_height_is_the_lower_middle_of_the_unsorted_list(v_list, index):
    assert median_height(v_list) == index


def test_a_ring_is_one_even_turn_at_one_height():
    u, v = ring(8, 0.3, start=0.9)
    assert_close(u, torch.tensor([0.9, 0.025, 0.15, 0.275, 0.4, 0.525, 0.65, 0.775]))
    assert_close(v, torch.full((8,), 0.3))
