"""Rays and patches: one continuous grid for both, crops, the bounding sphere, scale annealing."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from graf.geometry.cameras import Intrinsics, pose_from_angles, project_points
from graf.geometry.rays import (
    Patches,
    RayCaster,
    annealed_min_scale,
    count_chunks,
    count_rays_at_once,
    crop_images,
    cut_chunks,
    patch_grid,
    pixel_grid,
    place_patches,
    place_pixel_patches,
    subdivide_patches,
)

INTRINSICS = Intrinsics.from_fov(16, 30.0)


def poses_of(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return pose_from_angles(torch.rand(count, dtype=dtype), 0.1 + 0.8 * torch.rand(count, dtype=dtype), 3.5)


@pytest.mark.parametrize(("images", "rays", "most"), [(1, 7, 3), (3, 7, 7), (4, 7, 15), (2, 7, 100), (3, 7, 1)])
def test_chunks_have_every_ray_once_in_order_and_never_too_many(images, rays, most):
    chunks = cut_chunks(images, rays, most)
    found = [
        (image, ray)
        for chunk in chunks
        for image in range(images)[chunk.images]
        for ray in range(chunk.start, chunk.stop)
    ]
    assert found == [(image, ray) for image in range(images) for ray in range(rays)]
    assert sum(chunk.size for chunk in chunks) == images * rays
    assert all(1 <= chunk.size <= most for chunk in chunks)
    assert len(chunks) == count_chunks(images, rays, most)
    assert max(chunk.size for chunk in chunks) == chunks[0].size == count_rays_at_once(images, rays, most)


@pytest.mark.parametrize("size", [8, 16, 24])
def test_the_whole_image_as_a_patch_is_every_pixel(size):
    assert_close(patch_grid(Patches.whole(2), size), pixel_grid(2, size, size))


def test_pixel_grid_runs_edge_to_edge_x_right_y_down():
    grid = pixel_grid(1, 2, 4)[0]
    assert grid[0, 0].tolist() == [-0.75, -0.5]
    assert grid[0, 3].tolist() == [0.75, -0.5]
    assert grid[1, 0].tolist() == [-0.75, 0.5]


@pytest.mark.parametrize(("side", "tolerance"), [(16, 0), (24, 1e-5)])
def test_cropping_the_whole_image_changes_nothing(side, tolerance):
    images = torch.rand(3, 3, side, side) * 2 - 1
    assert_close(crop_images(images, Patches.whole(3), side), images, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("width", "size"), [(32, 16), (64, 16), (32, 32)])
def test_a_patch_at_a_whole_pixel_offset_is_exactly_a_crop(width, size):
    images = torch.rand(6, 3, width, width)
    offsets = torch.randint(0, width - size + 1, (6, 2))
    offsets[0], offsets[1] = 0, width - size
    scale = torch.full((6,), size / width)
    patches = Patches(scale, (2 * offsets + size) / width - 1)
    cropped = crop_images(images, patches, size)
    for i, (x, y) in enumerate(offsets.tolist()):
        assert torch.equal(cropped[i], images[i, :, y : y + size, x : x + size])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("width", "size"), [(64, 16), (48, 16), (32, 32)])
def test_patches_on_pixels_are_the_photographs_own_pixels(width, size, interpolation):
    images = torch.rand(200, 3, width, width)
    patches = place_pixel_patches(torch.rand(200, 3), 0.0, 1.0, size, width)
    cropped = crop_images(images, patches, size, interpolation)
    found = set()
    for image, crop, scale, centre in zip(images, cropped, patches.scale, patches.centre, strict=True):
        step = round(float(scale) * width / size)
        x, y = (round(float((c - scale + 1) * width - 1 + step) / 2) for c in centre)
        assert 0 <= min(x, y) <= max(x, y) + (size - 1) * step <= width - 1
        assert_close(crop, image[:, y::step, x::step][:, :size, :size], atol=2e-5, rtol=0)
        found.add((step, x))
    steps = range(1, width // size + 1)
    wanted = {(step, x) for step in steps for x in range(width - (size - 1) * step)}
    assert {step for step, _ in found} == set(steps)
    assert found <= wanted
    assert len(found) > 0.4 * len(wanted)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.25, 0.25, {0.25}), (0.3, 0.9, {0.5, 0.75}), (0.9, 0.95, {0.75}), (0.1, 0.2, {0.25})],
)
def test_patches_on_pixels_take_the_scales_that_pixels_have(low, high, expected):
    assert set(place_pixel_patches(torch.rand(50, 3), low, high, 16, 64).scale.tolist()) == expected


def test_bicubic_patches_keep_the_edges_that_bilinear_ones_blur():
    """Against the truth: the same scene, averaged over pixels that lie a fraction of a pixel away."""
    torch.manual_seed(0)
    fine = (torch.nn.functional.interpolate(torch.rand(8, 1, 20, 20), size=320, mode="bilinear") > 0.5).float()
    photographs = functional.avg_pool2d(fine, 5)
    truth = functional.avg_pool2d(fine[:, :, 82:242, 82:242], 5)  # 16.4 pixels from the edge
    patch = Patches(torch.full((8,), 0.5), torch.full((8, 2), (2 * 16.4 + 32) / 64 - 1))
    energies = {}
    for mode in ("bilinear", "bicubic"):
        crop = crop_images(photographs, patch, 32, mode)
        energies[mode] = float(crop.diff(dim=3).square().sum() / truth.diff(dim=3).square().sum())
    assert energies["bilinear"] < 0.75
    assert 0.85 < energies["bicubic"] < 1.1


@pytest.mark.parametrize("factor", [2, 3])
def test_a_finer_patch_covers_the_same_square(factor):
    patches = place_patches(torch.rand(5, 3), 0.25, 1.0)
    coarse, fine = patch_grid(patches, 16), patch_grid(patches, 16 * factor)
    pooled = functional.avg_pool2d(fine.permute(0, 3, 1, 2), factor).permute(0, 2, 3, 1)
    assert_close(pooled, coarse, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "factor"), [(8, 2), (4, 3), (8, 1)])
def test_a_crop_out_of_a_finer_patch_is_the_patch_that_it_says(size, factor):
    patches = place_patches(torch.rand(6, 3), 0.25, 1.0)
    corner = torch.randint(0, (factor - 1) * size + 1, (6, 2))
    found = patch_grid(subdivide_patches(patches, size, factor, corner), size)
    fine = patch_grid(patches, factor * size)
    for i, (x, y) in enumerate(corner.tolist()):
        assert_close(found[i], fine[i, y : y + size, x : x + size], atol=1e-6, rtol=0)


@pytest.mark.parametrize("factor", [2, 4])
def test_crops_of_a_rendered_patch_show_what_they_say(factor):
    """A function of the image plane, rendered finely and cropped, equals the function on the crop's own grid."""
    size, patches = 8, place_patches(torch.rand(6, 3), 0.3, 0.9)
    corner = torch.randint(0, (factor - 1) * size + 1, (6, 2))
    corner[0], corner[1] = 0, (factor - 1) * size

    def render(of, side):
        x, y = patch_grid(of, side).unbind(-1)
        return torch.stack([torch.sin(7 * x) * y, torch.cos(5 * x - 9 * y)], 1)

    fine = render(patches, factor * size)
    crops = subdivide_patches(patches, size, factor, corner)
    found = torch.stack([fine[i, :, y : y + size, x : x + size] for i, (x, y) in enumerate(corner.tolist())])
    assert_close(found, render(crops, size), atol=1e-5, rtol=0)


def test_crops_have_a_share_of_the_scale_and_stay_inside_their_patch():
    patches, factor, size = place_patches(torch.rand(200, 3), 0.3, 0.9), 4, 8
    corner = torch.randint(0, (factor - 1) * size + 1, (200, 2))
    crops = subdivide_patches(patches, size, factor, corner)
    assert_close(crops.scale, patches.scale / factor)
    reach = (crops.centre - patches.centre).abs() + crops.scale[:, None]
    assert bool((reach <= patches.scale[:, None] + 1e-6).all())


@pytest.mark.parametrize(("low", "high"), [(0.25, 1.0), (0.9, 0.9), (1.0, 1.0)])
def test_patches_have_scales_in_range_and_stay_inside_the_image(low, high):
    uniforms = torch.rand(2000, 3)
    uniforms[:8] = torch.tensor([[i & 1, i >> 1 & 1, i >> 2 & 1] for i in range(8)]) * (1 - 2**-24)
    patches = place_patches(uniforms, low, high)
    assert bool(((patches.scale >= low) & (patches.scale <= high)).all())
    assert bool((patches.centre.abs() + patches.scale[:, None] <= 1 + 1e-6).all())
    assert bool((patch_grid(patches, 16).abs() < 1).all())


def test_patches_reach_every_border_of_the_image():
    patches = place_patches(torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 1]]), 0.5, 1.0)
    assert patches.centre.tolist() == [[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5]]


def test_scales_and_places_are_uniform():
    patches = place_patches(torch.rand(20_000, 3), 0.2, 0.6)
    assert patches.scale.mean().item() == pytest.approx(0.4, abs=0.01)
    relative = patches.centre / (1 - patches.scale)[:, None]
    assert_close(torch.histc(relative, 4, -1, 1) / 40_000, torch.full((4,), 0.25), atol=0.01, rtol=0)


def test_rays_and_image_patches_share_their_coordinates():
    """An image linear in its pixel coordinates reads the same through bilinear crops and through projected rays."""
    size, intrinsics = 32, Intrinsics.from_fov(32, 40.0)
    patches = place_patches(torch.rand(6, 3), 0.3, 0.9)
    rows, columns = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    image = torch.stack([columns, rows, 2 * columns - 3 * rows]) / size
    cropped = crop_images(image.expand(6, -1, -1, -1), patches, 16)

    poses = poses_of(6)
    rays = RayCaster(intrinsics, 2.0, 5.0).cast_patches(poses, patches, 16)
    pixels, _ = project_points(rays.origins + 3 * rays.directions, poses[:, None], intrinsics)
    x, y = pixels.reshape(6, 16, 16, 2).unbind(-1)
    inside = ((x > 0.5) & (x < size - 0.5) & (y > 0.5) & (y < size - 0.5))[:, None].expand_as(cropped)
    expected = torch.stack([x, y, 2 * x - 3 * y], 1) / size
    assert inside.float().mean() > 0.9
    assert_close(cropped[inside], expected[inside], atol=1e-4, rtol=0)


def test_whole_image_rays_are_patch_rays_of_the_whole_image_at_any_resolution():
    caster, poses = RayCaster(INTRINSICS, 2.0, 5.0, 1.0), poses_of(2)
    for resolution in (16, 32):
        whole, patch = caster.cast_images(poses, resolution), caster.cast_patches(poses, Patches.whole(2), resolution)
        assert whole.per_image == resolution**2
        assert_close(whole.directions, patch.directions)
        assert_close(whole.near, patch.near)


def test_directions_have_unit_length_and_the_axis_cosine_is_that_with_the_optical_axis():
    poses = poses_of(3, torch.float64)
    rays = RayCaster(INTRINSICS, 2.0, 5.0).cast(poses, pixel_grid(3, 16, 16))
    assert_close(rays.directions.norm(dim=-1), torch.ones(3, 256, dtype=torch.float64))
    assert_close(rays.axis_cosine[..., 0], (rays.directions * -poses[:, None, :3, 2]).sum(-1))
    assert bool((rays.near == 2).all())
    assert bool((rays.far == 5).all())


def test_near_and_far_of_the_bounding_sphere_lie_on_it():
    poses, radius = poses_of(3, torch.float64), 0.8
    rays = RayCaster(INTRINSICS, 0.1, 50.0, radius).cast(poses, pixel_grid(3, 16, 16))
    hit = (rays.far > rays.near)[..., 0]
    assert bool(hit.any())
    assert not bool(hit.all())
    for distance in (rays.near, rays.far):
        points = rays.origins + distance * rays.directions
        assert_close(points[hit].norm(dim=-1), torch.full((int(hit.sum()),), radius, dtype=torch.float64))


def test_the_central_ray_meets_the_sphere_at_distance_minus_and_plus_radius():
    rays = RayCaster(INTRINSICS, 0.1, 50.0, 0.8).cast(poses_of(2), torch.zeros(2, 1, 2))
    assert_close(rays.near.flatten(), torch.full((2,), 2.7))
    assert_close(rays.far.flatten(), torch.full((2,), 4.3))


def test_exactly_the_rays_that_miss_the_sphere_have_no_length():
    radius = 0.5
    rays = RayCaster(INTRINSICS, 0.1, 50.0, radius).cast(poses_of(3, torch.float64), pixel_grid(3, 16, 16))
    closest = torch.linalg.cross(rays.origins, rays.directions).norm(dim=-1)
    assert_close((rays.near == rays.far)[..., 0], closest >= radius)


@pytest.mark.parametrize(("near", "far"), [(3.0, 4.0), (0.1, 3.0), (4.0, 9.0), (0.1, 1.0), (6.0, 9.0)])
def test_the_bounding_sphere_only_shrinks_the_range(near, far):
    rays = RayCaster(INTRINSICS, near, far, 1.0).cast(poses_of(2, torch.float64), torch.zeros(2, 1, 2))
    start, stop = max(near, 2.5), min(far, 4.5)
    expected = max(stop - start, 0.0)
    assert_close(rays.far - rays.near, torch.full((2, 1, 1), expected, dtype=torch.float64))
    assert bool(((rays.near >= near) & (rays.far <= far)).all())
    if expected:
        assert_close(rays.near, torch.full((2, 1, 1), start, dtype=torch.float64))


def test_a_ray_that_leaves_the_sphere_behind_the_camera_stays_in_front_of_it():
    pose = poses_of(1)
    pose[:, :3, 1:3] *= -1  # turned about its x axis: looks away from the origin
    rays = RayCaster(INTRINSICS, 2.0, 5.0, 0.8).cast(pose, pixel_grid(1, 4, 4))
    assert bool((rays.near == 2).all())
    assert bool((rays.far == 2).all())


def test_slices_and_images_take_the_same_part_of_everything():
    rays = RayCaster(INTRINSICS, 2.0, 5.0, 0.5).cast(poses_of(3), pixel_grid(3, 4, 4))
    part, one = rays.slice(5, 9), rays[1:2]
    assert (part.per_image, len(part), len(one)) == (4, 3, 1)
    for name in ("origins", "directions", "near", "far", "axis_cosine"):
        assert torch.equal(getattr(part, name), getattr(rays, name)[:, 5:9])
        assert torch.equal(getattr(one, name), getattr(rays, name)[1:2])
    patches = place_patches(torch.rand(3, 3), 0.5, 1.0)
    assert torch.equal(patches[1:3].scale, patches.scale[1:])
    assert torch.equal(patches[1:3].centre, patches.centre[1:])


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [(0, 0.9), (10_000, 0.9), (20_000, math.exp(-0.15)), (100_000, math.exp(-0.75)), (200_000, 0.25)],
)
def test_published_annealing_at_hand_computed_iterations(iteration, expected):
    assert annealed_min_scale(iteration, 0.25, 1.0, 0.0025) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("low", "high"), [(0.25, 1.0), (0.5, 0.8), (0.7, 0.7), (1.0, 1.0)])
def test_annealed_scale_falls_and_stays_in_range(low, high):
    scales = [annealed_min_scale(iteration, low, high, 0.3) for iteration in range(0, 20_000, 50)]
    assert all(later <= earlier for earlier, later in pairwise(scales))
    assert all(low <= scale <= high for scale in scales)
    assert scales[-1] == low


@pytest.mark.parametrize("anneal", [0.0, -1.0])
def test_without_annealing_the_smallest_scale_holds_from_the_start(anneal):
    assert annealed_min_scale(0, 0.25, 1.0, anneal) == 0.25


def test_rays_within_a_box_are_sampled_where_points_of_them_lie_inside():
    """By brute force: the first and last of many points along a ray that the box holds."""
    torch.manual_seed(0)
    low, high = torch.tensor([-0.5, -0.2, -0.6]), torch.tensor([0.3, 0.4, 0.1])
    poses = pose_from_angles(torch.rand(3), torch.rand(3), 3.5)
    rays = RayCaster(Intrinsics.from_fov(12, 30.0), 2.0, 5.0).cast_images(poses, 12)
    inside = rays.within(low, high)
    distances = torch.linspace(2, 5, 6001)
    points = rays.origins[:, :, None] + distances[:, None] * rays.directions[:, :, None]
    held = ((points >= low) & (points <= high)).all(-1)
    hit = held.any(-1)
    assert 20 < hit.sum() < hit.numel() - 20
    first = distances[held.float().argmax(-1)]
    last = distances[6000 - held.flip(-1).float().argmax(-1)]
    assert_close(inside.near[..., 0][hit], first[hit], atol=1e-3, rtol=0)
    assert_close(inside.far[..., 0][hit], last[hit], atol=1e-3, rtol=0)
    length = (inside.far - inside.near)[..., 0]
    assert (length[~hit] < 2e-3).all()  # it passes a corner at most
    assert torch.equal(inside.origins, rays.origins)


def test_a_ray_in_the_plane_of_a_side_is_cut_by_the_others():
    pose = torch.eye(4)[None].clone()
    pose[0, 2, 3] = 3.0  # looks straight down the z axis
    rays = RayCaster(Intrinsics.from_fov(1, 30.0), 0.5, 6.0).cast_images(pose, 1)
    inside = rays.within(torch.tensor([0.0, -1.0, -1.0]), torch.tensor([1.0, 1.0, 1.0]))
    assert inside.near.item() == pytest.approx(2.0)
    assert inside.far.item() == pytest.approx(4.0)
