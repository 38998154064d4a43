"""Photographs with known cameras: the object's sphere, what is up, exact re-aiming, and what graf's own reader sees."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from graf.capture.cameras import Lens, PosedPhotographs, find_floor, find_up, look_at_origin, move_world
from graf.capture.errors import CaptureError
from graf.capture.posed import aim_at_object, centre_on_object, training_overrides, write_transforms
from graf.capture.visual_hull import enclosing_centre, find_sphere, recut_masks, tighten_masks
from graf.data.index import index_transforms
from graf.geometry.cameras import Intrinsics, pose_from_angles, project_points

cv2 = pytest.importorskip("cv2")

SIDE, COUNT = 96, 24
CENTRE, RADIUS = np.array([0.4, -1.1, 2.0]), 0.35
LENS = Lens(SIDE, SIDE, 130.0, (SIDE / 2, SIDE / 2), radial=-0.08)


def random_rotation(seed: int) -> np.ndarray:
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def ring_of_poses(count: int = COUNT, arc: float = 360.0, distance: float = 4.0) -> np.ndarray:
    """Level cameras on an arc at three elevations that look at the origin, z up."""
    azimuths = np.radians(np.linspace(0, arc, count, endpoint=False))
    elevations = np.radians(np.array([12, 30, 50])[np.arange(count) % 3])
    directions = np.stack(
        [np.cos(azimuths) * np.cos(elevations), np.sin(azimuths) * np.cos(elevations), np.sin(elevations)], axis=1
    )
    return np.stack([look_at_origin(distance * direction) for direction in directions])


def strange_world(poses: np.ndarray, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Poses around CENTRE in units of RADIUS, in a turned world; and the turn, from z-up to it."""
    turn = random_rotation(seed)
    moved = poses.copy()
    moved[:, :3, :3] = turn @ poses[:, :3, :3]
    moved[:, :3, 3] = RADIUS * poses[:, :3, 3] @ turn.T + CENTRE
    return moved, turn


def photograph_sphere(poses: np.ndarray, lens: Lens = LENS) -> PosedPhotographs:
    """Masks and pictures of a ball of RADIUS at CENTRE: a pixel sees it where its ray passes near enough."""
    y, x = np.mgrid[: lens.height, : lens.width]
    rays = lens.ray(np.stack([x, y], axis=-1) + 0.5)
    masks = []
    for pose in poses:
        towards = (CENTRE - pose[:3, 3]) @ pose[:3, :3]
        along = rays @ towards
        masks.append(np.where(towards @ towards - along**2 < RADIUS**2, 255, 0).astype(np.uint8))
    images = [np.dstack([mask // 2 + 60] * 3) for mask in masks]
    return PosedPhotographs(images, masks, poses, lens, [f"IMG_{number}.jpg" for number in range(len(poses))])


@pytest.fixture(scope="module")
def centred() -> PosedPhotographs:
    """A ball photographed in a strange world, in its own."""
    return centre_on_object(photograph_sphere(strange_world(ring_of_poses())[0]))


def test_the_ray_of_a_pixel_projects_to_that_pixel():
    pixels = np.random.default_rng(0).uniform(0, SIDE, (50, 2))
    np.testing.assert_allclose(LENS.project(7.0 * LENS.ray(pixels)), pixels, atol=1e-6)


def test_a_lens_without_distortion_projects_as_the_rest_of_the_program_does():
    lens = Lens.from_fov(SIDE, SIDE, 40.0)
    pose = pose_from_angles(torch.tensor([0.1]), torch.tensor([0.3]), 3.0)[0].double()
    points = torch.rand(20, 3, dtype=torch.float64) - 0.5
    theirs, _ = project_points(points, pose, Intrinsics.from_fov(SIDE, 40.0))
    ours = lens.project((points.numpy() - pose[:3, 3].numpy()) @ pose[:3, :3].numpy())
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize("arc", [360.0, 90.0])
def test_up_is_found_from_level_cameras_however_little_of_the_circle_they_walk(arc):
    poses, turn = strange_world(ring_of_poses(arc=arc))
    assert find_up(poses) @ turn[:, 2] > math.cos(math.radians(0.01))


def test_up_withstands_photographs_held_askew():
    poses, turn = strange_world(ring_of_poses())
    roll = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]])
    poses[:4, :3, :3] = poses[:4, :3, :3] @ roll
    assert find_up(poses) @ turn[:, 2] > math.cos(math.radians(1))


def test_up_of_cameras_that_all_look_the_same_way_is_their_own():
    poses = np.stack([look_at_origin(np.array([4.0, 0, 1.0]))] * 5)
    np.testing.assert_allclose(find_up(poses), poses[0, :3, 1], atol=1e-9)


def test_a_fringe_of_the_table_is_cut_by_its_colour_and_a_mask_never_vanishes():
    photographs = photograph_sphere(strange_world(ring_of_poses())[0])
    random, true = np.random.default_rng(0), [mask.copy() for mask in photographs.masks]
    for image, mask in zip(photographs.images, photographs.masks, strict=True):
        table = np.array([60, 120, 80]) + random.normal(0, 12, image.shape)
        image[:] = np.where(mask[..., None] > 127, (200, 60, 50), table).clip(0, 255)
        mask[:] = cv2.dilate(mask, np.ones((7, 7)))
    photographs.images[0][:] = 90  # no colours to tell anything by
    for number, mask in enumerate(recut_masks(photographs).masks):
        expected = true[number] if number else photographs.masks[0]
        assert ((mask > 127) != (expected > 127)).sum() < 0.03 * (expected > 127).sum()


def floor_points(normal: np.ndarray, count: int = 300) -> np.ndarray:
    """Points of a table through (0, 0, -1) and of an object on it, with a few wrong ones."""
    random = np.random.default_rng(0)
    table = random.uniform(-3, 3, (count, 3))
    table -= np.outer((table - (0, 0, -1)) @ normal, normal)
    table += random.normal(0, 0.002, table.shape)
    return np.concatenate([table, random.uniform(-0.7, 0.7, (count // 2, 3)), random.uniform(-5, 5, (count // 10, 3))])


def test_the_floor_is_the_table_also_where_the_cameras_are_held_askew():
    normal = np.array([math.sin(0.1), 0, math.cos(0.1)])
    floor = find_floor(floor_points(normal), ring_of_poses())
    assert floor[:3] @ normal > math.cos(math.radians(0.2))
    assert floor[:3] @ (0, 0, -1) + floor[3] == pytest.approx(0, abs=0.01)


def test_points_without_a_table_have_no_floor():
    random = np.random.default_rng(0)
    ball = random.standard_normal((500, 3))
    assert find_floor(ball / np.linalg.norm(ball, axis=1, keepdims=True), ring_of_poses()) is None
    wall = floor_points(np.array([1.0, 0, 0]))[:300]
    assert find_floor(wall, ring_of_poses()) is None


def test_the_floor_moves_with_the_world():
    photographs = photograph_sphere(ring_of_poses()[:2])
    photographs = replace(photographs, floor=np.array([0.6, 0, 0.8, 0.3]))
    turn, shift = random_rotation(5), np.array([0.2, 0.5, -1])
    moved = move_world(photographs, turn, shift, 0.5)
    point = np.array([0.4, -0.3, 0.9])
    height = point @ photographs.floor[:3] + photographs.floor[3]
    there = turn @ (point - shift) / 0.5
    assert there @ moved.floor[:3] + moved.floor[3] == pytest.approx(height / 0.5)


def test_what_an_object_hides_below_the_floor_is_no_part_of_it():
    poses = ring_of_poses()[2::3]  # all from 50 degrees above
    turned, turn = strange_world(poses)
    photographs = photograph_sphere(turned)
    up = turn[:, 2]
    on_floor = replace(photographs, floor=np.array([*up, RADIUS - up @ CENTRE]))
    without, radius_without = find_sphere(photographs)
    with_floor, radius_with = find_sphere(on_floor)
    assert np.linalg.norm(with_floor - CENTRE) < 0.6 * np.linalg.norm(without - CENTRE) + 0.02 * RADIUS
    assert radius_with < radius_without


@pytest.mark.parametrize("wrong", [0, 1])
def test_the_sphere_of_a_ball_is_the_ball_also_where_a_mask_is_wrong(wrong):
    photographs = photograph_sphere(strange_world(ring_of_poses())[0])
    for mask in photographs.masks[:wrong]:
        mask[:] = 0
        mask[:20, :20] = 255
    centre, radius = find_sphere(photographs)
    assert np.linalg.norm(centre - CENTRE) < 0.06 * RADIUS
    assert RADIUS < radius < 1.1 * RADIUS


def test_masks_that_enclose_nothing_together_are_an_error_that_says_so():
    photographs = photograph_sphere(strange_world(ring_of_poses())[0])
    for number, mask in enumerate(photographs.masks):
        mask[:] = 0
        corner = (number % 2) * (SIDE - 12)
        mask[corner : corner + 12, corner : corner + 12] = 255
    with pytest.raises(CaptureError, match="no place in common"):
        find_sphere(photographs)


def test_masks_that_take_in_the_table_or_miss_the_object_are_put_right():
    photographs = photograph_sphere(strange_world(ring_of_poses())[0])
    true = [mask.copy() for mask in photographs.masks]
    for number, mask in enumerate(photographs.masks):
        if number % 3 == 0:  # seen from low down
            mask[SIDE // 2 :] = 255
    photographs.masks[1][:] = 0
    photographs.masks[1][:9, :9] = 255
    tight, replaced = tighten_masks(centre_on_object(photographs))
    assert replaced == 1
    for mask, expected in zip(tight.masks, true, strict=True):
        assert ((mask > 127) & (expected > 127)).sum() > 0.97 * (expected > 127).sum()
        assert (mask > 127).sum() < 1.25 * (expected > 127).sum()


def test_the_smallest_ball_around_points_is_that_of_the_sphere_they_lie_on():
    points = np.random.default_rng(1).standard_normal((4000, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    half = points[points[:, 2] > -0.1] * 2.0 + (1, 2, 3)
    assert np.linalg.norm(enclosing_centre(half) - (1, 2, 3)) < 0.06


def test_the_objects_world_has_it_in_the_unit_sphere_and_the_first_camera_in_front(centred):
    assert centred.distances.mean() == pytest.approx(4.0, rel=0.08)
    np.testing.assert_allclose(centred.poses[0, 1, 3], 0, atol=1e-9)
    np.testing.assert_allclose(centred.elevations, [12, 30, 50] * (COUNT // 3), atol=1.5)
    turned = (centred.azimuths - np.linspace(0, 360, COUNT, endpoint=False) + 180) % 360 - 180
    assert np.abs(turned).max() < 1.5


def test_a_point_is_seen_where_the_aimed_camera_says_also_through_a_distorting_lens():
    poses = ring_of_poses(6)
    tilt = np.eye(4)
    tilt[:3, :3] = [[1, 0, 0], [0, math.cos(0.06), -math.sin(0.06)], [0, math.sin(0.06), math.cos(0.06)]]
    poses = poses @ tilt
    lens = Lens(200, 160, 240.0, (104.0, 77.0), radial=-0.1)
    point = np.array([0.3, -0.2, 0.25])
    y, x = np.mgrid[: lens.height, : lens.width] + 0.5
    images = []
    for pose in poses:
        at = lens.project((point - pose[:3, 3]) @ pose[:3, :3])
        spot = 255 * np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / 8)
        images.append(np.dstack([spot.round().astype(np.uint8)] * 3))
    aimed = aim_at_object(PosedPhotographs(images, None, poses, lens, ["a"] * 6))
    side = aimed.lens.width
    y, x = np.mgrid[:side, :side] + 0.5
    for pose, image in zip(aimed.poses, aimed.images, strict=True):
        assert image.shape == (side, side, 3)
        weight = image[..., 0].astype(float)
        seen = np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()
        expected = aimed.lens.project((point - pose[:3, 3]) @ pose[:3, :3])
        assert np.linalg.norm(seen - expected) < 0.3


def test_pictures_that_are_made_smaller_are_averaged():
    poses = ring_of_poses(6)
    lens = Lens.from_fov(400, 400, 40.0)
    checks = np.where((np.add(*np.mgrid[:400, :400]) % 2 == 0)[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2)
    full = np.full((400, 400), 255, np.uint8)
    aimed = aim_at_object(PosedPhotographs([checks] * 6, [full] * 6, poses, lens, ["a"] * 6), 40)
    assert aimed.lens.width == 40
    assert aimed.images[0].shape == (40, 40, 3)
    assert np.abs(aimed.images[0].astype(int) - 127).max() < 25  # and not black and white by turns
    whole = aim_at_object(PosedPhotographs([checks] * 6, [full] * 6, poses, lens, ["a"] * 6))
    assert aimed.lens.fov == pytest.approx(whole.lens.fov)


def test_cameras_inside_the_object_are_refused():
    photographs = photograph_sphere(ring_of_poses(distance=1.05))
    with pytest.raises(CaptureError, match="almost inside"):
        aim_at_object(photographs)


def test_grafs_own_reader_finds_the_poses_the_lens_and_the_object_in_the_unit_sphere(centred, tmp_path):
    aimed = aim_at_object(centred)
    write_transforms(tmp_path, aimed)
    index = index_transforms(tmp_path, None)
    np.testing.assert_allclose(index.poses.numpy(), aimed.poses, atol=1e-6)
    assert math.degrees(index.camera_angle_x) == pytest.approx(aimed.lens.fov)
    assert index.report.problems() == []
    y, x = np.mgrid[: aimed.lens.height, : aimed.lens.width]
    rays = aimed.lens.ray(np.stack([x, y], axis=-1) + 0.5)
    for pose, mask in zip(aimed.poses, aimed.masks, strict=True):
        along = rays @ (-pose[:3, 3] @ pose[:3, :3])
        from_origin = np.sqrt(pose[:3, 3] @ pose[:3, 3] - along**2)
        assert from_origin[mask > 127].max() < 1.0  # every ray of the object meets the unit sphere
        assert from_origin[mask > 127].max() > 0.85  # which is no larger than it has to be
    overrides = training_overrides(aimed)
    assert (
        overrides["data.near"] < overrides["data.radius"] - 0.9 < overrides["data.radius"] + 0.9 < overrides["data.far"]
    )


def test_a_folder_that_has_photographs_with_poses_is_left_alone(centred, tmp_path):
    aimed = aim_at_object(centred)
    write_transforms(tmp_path, aimed)
    before = sorted((path, path.read_bytes()) for path in tmp_path.rglob("*.*"))
    with pytest.raises(CaptureError, match="exists already"):
        write_transforms(tmp_path, aimed)
    assert sorted((path, path.read_bytes()) for path in tmp_path.rglob("*.*")) == before
