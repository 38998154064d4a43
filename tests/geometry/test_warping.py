"""Warping agrees with scenes known in closed form (picture, depth, occlusion) and with a loop over pixels."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from graf.geometry.cameras import Intrinsics, pose_from_angles, project_points
from graf.geometry.rays import Patches, RayCaster, patch_grid, place_patches
from graf.geometry.volume_rendering import Render, composite_along_rays, compositing_weights, interval_lengths
from graf.geometry.warping import (
    SurfaceView,
    Visibility,
    background_depth,
    recover_surface_depth,
    reproject,
    warp_between,
    warp_to_view,
)

INTRINSICS = Intrinsics.from_fov(64, 30.0)
RADIUS = 3.5


def camera(degrees: float, v: float = 0.3, dtype: torch.dtype = torch.float32) -> Tensor:
    return pose_from_angles(torch.tensor([degrees / 360], dtype=dtype), torch.tensor([v], dtype=dtype), RADIUS)


def paint(points: Tensor) -> Tensor:
    """A smooth texture (..., 3) in [-1, 1] of world points (..., 3)."""
    x, y, z = points.unbind(-1)
    return torch.stack([torch.sin(4 * x + y), torch.cos(3 * y - 2 * z), torch.sin(2 * x + 3 * z)], dim=-1)


def hit_sphere(origins: Tensor, directions: Tensor, centre: Tensor, radius: float) -> Tensor:
    """Distance (..., 1) to the first meeting, infinite where there is none."""
    to_centre = origins - centre
    middle = -(to_centre * directions).sum(-1, keepdim=True)
    half_squared = radius**2 - to_centre.square().sum(-1, keepdim=True) + middle.square()
    distance = middle - half_squared.clamp(min=0).sqrt()
    return torch.where((half_squared > 0) & (distance > 1e-4), distance, torch.inf)


def hit_ground(origins: Tensor, directions: Tensor) -> Tensor:
    """Distance (..., 1) to the plane z = 0, seen from above."""
    return -origins[..., 2:] / directions[..., 2:]


BALL_CENTRE, BALL_RADIUS = torch.tensor([0.1, -0.1, 0.4]), 0.25


def meet_ball(origins: Tensor, directions: Tensor) -> Tensor:
    return hit_sphere(origins, directions, torch.zeros(3), 0.9)


def meet_ball_over_ground(origins: Tensor, directions: Tensor) -> Tensor:
    return torch.minimum(hit_ground(origins, directions), hit_sphere(origins, directions, BALL_CENTRE, BALL_RADIUS))


def look(scene, pose: Tensor, patches: Patches, size: int, depth_size: int | None = None) -> SurfaceView:
    """Picture of a scene, one ray per pixel, background white."""
    parts = []
    for pixels in (size, depth_size or size):
        rays = RayCaster(INTRINSICS, 0.0, 100.0).cast(pose, patch_grid(patches, pixels))
        distance = scene(rays.origins, rays.directions)
        hit = distance.isfinite()
        distance = distance.where(hit, torch.tensor(0.0))
        colours = torch.where(hit, paint(rays.origins + distance * rays.directions), 1.0)
        parts.append((colours, distance * rays.axis_cosine, hit.float()))

    def as_image(values: Tensor, pixels: int) -> Tensor:
        return values.mT.reshape(len(pose), -1, pixels, pixels)

    image, (_, depth, opacity) = as_image(parts[0][0], size), parts[1]
    small = depth_size or size
    return SurfaceView(image, as_image(depth, small), as_image(opacity, small), pose, patches)


def surface_points(view: SurfaceView) -> Tensor:
    """World points (N, N, 3) of the depth map of a single view."""
    rays = RayCaster(INTRINSICS, 0.0, 1.0).cast(view.poses, patch_grid(view.patches, view.depth.shape[-1]))
    points = rays.origins + view.depth.reshape(1, -1, 1) / rays.axis_cosine * rays.directions
    return points.reshape(*view.depth.shape[-2:], 3)


def is_framed(points: Tensor, view: SurfaceView, margin_pixels: float) -> Tensor:
    pixels, _ = project_points(points, view.poses[0], INTRINSICS)
    place = (2 * pixels / INTRINSICS.width - 1 - view.patches.centre[0]) / view.patches.scale[0]
    return (place.abs() < 1 - 2 * margin_pixels / view.image.shape[-1]).all(-1)


WHOLE = Patches.whole(1)
ZOOM = Patches(torch.tensor([0.5]), torch.tensor([[0.2, -0.1]]))


@pytest.mark.parametrize("degrees", [5.0, 45.0])
@pytest.mark.parametrize(("patch_a", "patch_b"), [(WHOLE, WHOLE), (ZOOM, WHOLE), (WHOLE, ZOOM)])
def test_a_warped_plane_is_the_plane_itself_wherever_it_is_in_frame(degrees, patch_a, patch_b):
    a = look(hit_ground, camera(20.0, 0.15), patch_a, 64)
    b = look(hit_ground, camera(20.0 + degrees, 0.15), patch_b, 64)
    warped, mask = warp_between(a, b, INTRINSICS)
    seen = mask[0, 0] > 0
    points = surface_points(a)
    assert bool(seen[is_framed(points, b, 1.0)].all())
    assert not bool(seen[~is_framed(points, b, 0.4)].any())
    assert seen.float().mean() > 0.1
    # bilinear: at most h^2 / 8 times the second derivative, 17 or less, along each side h of the farthest pixel
    atol = 17 * (0.045**2 + 0.09**2) / 8
    assert_close(warped[0][:, seen], a.image[0][:, seen], atol=atol, rtol=0)


@pytest.mark.parametrize(("size", "depth_size"), [(64, 64), (96, 48)])
def test_a_warped_ball_is_the_ball_itself_on_the_side_that_both_cameras_see(size, depth_size):
    a, b = (look(meet_ball, camera(degrees), WHOLE, size, depth_size) for degrees in (0.0, 45.0))
    warped, mask = warp_between(a, b, INTRINSICS)
    seen = mask[0, 0] > 0
    truth = look(meet_ball, camera(0.0), WHOLE, size)
    points = surface_points(truth)
    normals = torch.nn.functional.normalize(points, dim=-1)
    facing_a, facing_b = (
        (normals * torch.nn.functional.normalize(view.poses[0, :3, 3] - points, dim=-1)).sum(-1) for view in (a, b)
    )
    hit = truth.opacity[0, 0] > 0
    near_hit = torch.nn.functional.max_pool2d(truth.opacity, 3, 1, 1)[0, 0] > 0
    assert not bool(seen[~(near_hit if depth_size < size else hit)].any())
    assert not bool(seen[hit & (facing_b < -0.05)].any())
    assert bool(seen[hit & (facing_a > 0.35) & (facing_b > 0.35)].all())
    # colours near a silhouette mix with the background; coarse depth moves the point besides
    clear = seen & (facing_a > 0.35) & (facing_b > 0.35)
    assert clear.float().mean() > 0.1
    assert_close(warped[0][:, clear], a.image[0][:, clear], atol=0.012, rtol=0)
    assert (warped - a.image)[0][:, seen].abs().mean() < 0.01


@pytest.mark.parametrize("degrees", [30.0, 90.0, 180.0])
def test_what_hides_behind_a_ball_is_masked_and_the_rest_is_seen(degrees):
    a, b = (look(meet_ball_over_ground, camera(angle, 0.2), WHOLE, 96) for angle in (0.0, degrees))
    _, mask = warp_between(a, b, INTRINSICS)
    seen = mask[0, 0] > 0
    points = surface_points(a)
    ground = points[..., 2].abs() < 1e-3
    to_b = b.poses[0, :3, 3] - points
    towards_b = torch.nn.functional.normalize(to_b, dim=-1)
    framed = is_framed(points, b, 1.0)
    pixel = 2 * 1.5 * RADIUS * math.tan(math.radians(15)) / 96 * 2
    hidden = hit_sphere(points, towards_b, BALL_CENTRE, BALL_RADIUS - pixel).isfinite()[..., 0]
    clear = hit_sphere(points, towards_b, BALL_CENTRE, BALL_RADIUS + pixel).isinf()[..., 0]
    assert int((ground & framed & hidden).sum()) > 20
    assert not bool(seen[ground & hidden].any())
    assert bool(seen[ground & framed & clear].all())


def test_reprojection_inverts_itself_and_agrees_with_projected_points():
    pose_a, pose_b = camera(10.0, dtype=torch.float64), camera(60.0, 0.4, torch.float64)
    grid = patch_grid(ZOOM, 8).double()
    depth = 3 + torch.rand(1, 1, 8, 8, dtype=torch.float64)
    grid_b, depth_b = reproject(grid, depth, pose_a, pose_b, INTRINSICS)
    x = grid[..., 0] * depth[:, 0] * math.tan(math.radians(15))
    y = -grid[..., 1] * depth[:, 0] * math.tan(math.radians(15))
    world = torch.stack([x, y, -depth[:, 0]], -1) @ pose_a[0, :3, :3].mT + pose_a[0, :3, 3]
    pixels, expected_depth = project_points(world, pose_b[0], INTRINSICS)
    assert_close(grid_b, pixels / 32 - 1)
    assert_close(depth_b[:, 0], expected_depth)
    back, depth_back = reproject(grid_b, depth_b, pose_b, pose_a, INTRINSICS)
    assert_close(back, grid)
    assert_close(depth_back, depth)


def test_reprojection_does_not_depend_on_the_resolution_of_the_intrinsics():
    arguments = patch_grid(WHOLE, 4), 3 + torch.rand(1, 1, 4, 4), camera(10.0), camera(60.0)
    for one, other in zip(
        reproject(*arguments, INTRINSICS), reproject(*arguments, INTRINSICS.resized(256, 256)), strict=True
    ):
        assert_close(one, other)


@pytest.mark.parametrize("patches", [WHOLE, ZOOM])
@pytest.mark.parametrize(("size", "depth_size"), [(32, 32), (64, 32), (24, 8)])
def test_a_view_warped_into_itself_is_unchanged(patches, size, depth_size):
    view = look(meet_ball, camera(33.0), patches, size, depth_size)
    view = replace(view, image=torch.rand_like(view.image))
    warped, mask = warp_between(view, view, INTRINSICS, Visibility(max_step=10.0))
    opacity = torch.nn.functional.interpolate(view.opacity, size=(size, size), mode="bilinear", align_corners=False)
    assert torch.equal(mask, (opacity > 0.9).float())
    assert mask.mean() > 0.2
    assert_close(warped[mask.expand_as(warped) > 0], view.image[mask.expand_as(warped) > 0], atol=1e-4, rtol=0)


def brute_force(a: SurfaceView, b: SurfaceView, intrinsics: Intrinsics, visibility: Visibility):
    """`warp_between`, one pixel and one neighbour at a time, on Python numbers."""
    size, tangent = a.image.shape[-1], intrinsics.width / (2 * intrinsics.focal)

    def neighbours(place: list[float], pixels: int) -> list[tuple[int, int, float]]:
        x, y = (min(max((p + 1) * pixels / 2 - 0.5, 0.0), pixels - 1.0) for p in place)
        found = []
        for row, column in itertools.product(range(pixels), repeat=2):
            weight = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
            if weight > 0:
                found.append((row, column, weight))
        return found

    def surface(view: SurfaceView, i: int, place: list[float]) -> tuple[float, bool]:
        opacity = weighted = 0.0
        depths = []
        for row, column, weight in neighbours(place, view.depth.shape[-1]):
            o, d = view.opacity[i, 0, row, column].item(), view.depth[i, 0, row, column].item()
            opacity, weighted = opacity + weight * o, weighted + weight * o * d
            if o > visibility.min_opacity and weight > 1e-3:
                depths.append(d)
        edge = max(depths, default=0.0) - min(depths, default=0.0) > visibility.max_step
        return weighted / max(opacity, 1e-3), opacity > visibility.min_opacity and not edge

    def local(plane: list[float], patches: Patches, i: int) -> list[float]:
        centre = patches.centre[i].tolist()
        return [(plane[k] - centre[k]) / patches.scale[i].item() for k in range(2)]

    warped, mask = torch.zeros_like(a.image), torch.zeros_like(a.image[:, :1])
    for i, row, column in itertools.product(range(len(a.image)), range(size), range(size)):
        place_a = [(2 * column + 1) / size - 1, (2 * row + 1) / size - 1]
        plane = [a.patches.centre[i, k].item() + a.patches.scale[i].item() * place_a[k] for k in range(2)]
        depth, solid = surface(a, i, place_a)
        in_a = torch.tensor([plane[0] * tangent * depth, -plane[1] * tangent * depth, -depth, 1.0], dtype=torch.float64)
        in_b = torch.linalg.inv(b.poses[i]) @ a.poses[i] @ in_a
        depth_b = -in_b[2].item()
        if depth_b <= 0:
            continue
        place_b = local([in_b[0].item() / depth_b / tangent, -in_b[1].item() / depth_b / tangent], b.patches, i)
        for r, c, weight in neighbours(place_b, size):
            warped[i, :, row, column] += weight * b.image[i, :, r, c]
        expected, solid_b = surface(b, i, place_b)
        inside = all(abs(p) <= 1 - 1 / size + 1e-3 / size for p in place_b)
        mask[i, 0, row, column] = solid and solid_b and inside and abs(depth_b - expected) <= visibility.tolerance
    return warped, mask


def rough_views(seed: int, size: int, depth_size: int) -> tuple[SurfaceView, SurfaceView]:
    """Two views of bumpy, holey depth maps that have little to do with each other, in float64."""
    torch.manual_seed(seed)
    views = []
    for _ in range(2):
        depth = RADIUS + 0.15 * torch.randn(3, 1, depth_size, depth_size, dtype=torch.float64)
        opacity = (1.3 * torch.rand(3, 1, depth_size, depth_size, dtype=torch.float64) + 0.5).clamp(max=1)
        poses = pose_from_angles(
            0.1 * torch.rand(3, dtype=torch.float64), 0.4 + 0.1 * torch.rand(3, dtype=torch.float64), RADIUS
        )
        patches = place_patches(torch.rand(3, 3, dtype=torch.float64), 0.6, 1.0)
        views.append(SurfaceView(torch.rand(3, 2, size, size, dtype=torch.float64), depth, opacity, poses, patches))
    return views[0], views[1]


@pytest.mark.parametrize(("seed", "size", "depth_size"), [(0, 6, 6), (1, 8, 4), (2, 9, 3)])
def test_warping_equals_a_loop_over_pixels(seed, size, depth_size):
    a, b = rough_views(seed, size, depth_size)
    visibility = Visibility(tolerance=0.15, min_opacity=0.75, max_step=0.35)
    warped, mask = warp_between(a, b, INTRINSICS, visibility)
    expected, expected_mask = brute_force(a, b, INTRINSICS, visibility)
    assert torch.equal(mask, expected_mask)
    assert 0.05 < mask.mean() < 0.9
    assert_close(warped, expected)


def test_the_warp_is_differentiable_in_the_other_image_alone():
    a, b = rough_views(0, 6, 3)
    image = b.image.requires_grad_()

    def warp(pixels: Tensor) -> Tensor:
        colours, mask = warp_between(
            a, replace(b, image=pixels), INTRINSICS, Visibility(tolerance=0.3, min_opacity=0.5)
        )
        assert not mask.requires_grad
        return colours * mask

    assert torch.autograd.gradcheck(warp, (image,))
    depth = b.depth.clone().requires_grad_()
    colours, _ = warp_between(
        SurfaceView(a.image, a.depth.clone().requires_grad_(), a.opacity, a.poses, a.patches),
        SurfaceView(image.detach(), depth, b.opacity, b.poses, b.patches),
        INTRINSICS,
    )
    assert not colours.requires_grad
    grid = patch_grid(b.patches, 6).requires_grad_()
    assert not warp_to_view(replace(b, image=image.detach()), grid, grid[..., 0][:, None])[0].requires_grad


def test_points_behind_the_camera_or_nowhere_are_masked_and_finite():
    view = look(hit_ground, camera(0.0, 0.1), WHOLE, 16)
    behind = camera(0.0, 0.1).clone()
    behind[:, :3, :3] *= torch.tensor([-1.0, 1, -1])  # turned round: looks away from the ground
    away = SurfaceView(view.image, view.depth, view.opacity, behind, view.patches)
    warped, mask = warp_between(view, away, INTRINSICS, Visibility(tolerance=100.0))
    assert not bool(mask.any())
    assert bool(warped.isfinite().all())
    empty = SurfaceView(view.image, torch.zeros_like(view.depth), torch.zeros_like(view.opacity), view.poses, WHOLE)
    warped, mask = warp_between(empty, empty, INTRINSICS)  # every point lies in the camera's own centre
    assert not bool(mask.any())
    assert bool(warped.isfinite().all())


@pytest.mark.parametrize("which", ["a", "b"])
def test_both_surfaces_must_be_opaque(which):
    a = look(hit_ground, camera(0.0, 0.1), WHOLE, 16)
    thin = SurfaceView(a.image, a.depth, torch.full_like(a.opacity, 0.85), a.poses, a.patches)
    views = {"a": (thin, a), "b": (a, thin)}[which]
    assert not bool(warp_between(*views, INTRINSICS)[1].any())
    assert bool(warp_between(*views, INTRINSICS, Visibility(min_opacity=0.8))[1].all())


@pytest.mark.parametrize(("offset", "seen"), [(0.04, True), (-0.04, True), (0.06, False), (-0.06, False)])
def test_the_z_buffer_test_keeps_its_tolerance_on_both_sides(offset, seen):
    b = look(hit_ground, camera(0.0, 0.0), WHOLE, 16)  # from straight above: constant depth
    grid, depth = patch_grid(WHOLE, 16), b.depth + offset
    assert bool((warp_to_view(b, grid, depth)[1] == float(seen)).all())


def test_an_edge_between_the_neighbours_of_a_sample_masks_it():
    b = look(hit_ground, camera(0.0, 0.0), WHOLE, 16)
    depth = b.depth.clone()
    depth[..., 8:] -= 0.3
    b = SurfaceView(b.image, depth, b.opacity, b.poses, b.patches)
    grid = patch_grid(WHOLE, 64)
    between = ((grid[..., 0].abs() * 8) < 0.5)[:, None]
    along = torch.nn.functional.interpolate(depth, size=(64, 64), mode="bilinear", align_corners=False)
    mask = warp_to_view(b, grid, along)[1] > 0
    inside = (grid.abs() < 1 - 1 / 16).all(-1)[:, None]
    assert torch.equal(mask, inside & ~between)
    assert bool(warp_to_view(b, grid, along, Visibility(max_step=0.31))[1][inside].all())


def test_surface_depth_undoes_the_composition_over_the_end_of_every_ray():
    caster = RayCaster(INTRINSICS, 2.0, 5.0, bounding_radius=0.95)
    poses = torch.cat([camera(0.0), camera(70.0)]).double()
    patches = place_patches(torch.rand(2, 3, dtype=torch.float64), 0.4, 0.6)
    rays = caster.cast_patches(poses, patches, 8)
    distances = rays.near + (rays.far - rays.near) * (torch.arange(6, dtype=torch.float64) + 0.5) / 6
    density = 3 * torch.rand(2, 64, 6, dtype=torch.float64)
    colours = composite_along_rays(torch.zeros(2, 64, 6, 3, dtype=torch.float64), density, distances, rays)
    depth, opacity = (part.mT.reshape(2, 1, 8, 8) for part in (colours.depth, colours.opacity))

    weights = compositing_weights(density, interval_lengths(distances, rays.near, rays.far))
    expected = (weights * distances).sum(-1) / weights.sum(-1) * rays.axis_cosine[..., 0]
    image = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    view = SurfaceView.from_render(Render(image, depth, opacity), poses, patches, caster)
    assert_close(view.depth, expected.reshape(2, 1, 8, 8))
    assert view.opacity.min() < 0.9
    background = background_depth(caster, poses, patches, 8)
    assert_close(background.flatten(), (rays.far * rays.axis_cosine).flatten())
    assert background.std() > 0.02


def test_where_nothing_was_rendered_the_surface_is_the_background():
    depth, opacity = torch.tensor([[[[5.0, 3.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    assert recover_surface_depth(depth, opacity, torch.full_like(depth, 5.0)).flatten().tolist() == [5.0, 3.0]


def test_low_precision_images_are_warped_in_the_precision_of_the_geometry():
    a, b = (look(hit_ground, camera(degrees, 0.1), WHOLE, 16) for degrees in (0.0, 10.0))
    warped, mask = warp_between(a, replace(b, image=b.image.bfloat16()), INTRINSICS)
    expected, expected_mask = warp_between(a, replace(b, image=b.image.bfloat16().float()), INTRINSICS)
    assert torch.equal(warped, expected)
    assert torch.equal(mask, expected_mask)


@pytest.mark.parametrize("part", ["image", "depth", "poses", "patches"])
def test_parts_that_do_not_belong_together_are_named(part):
    parts = {
        "image": torch.zeros(2, 3, 8, 8),
        "depth": torch.zeros(2, 1, 4, 4),
        "opacity": torch.zeros(2, 1, 4, 4),
        "poses": torch.eye(4).expand(2, 4, 4),
        "patches": Patches.whole(2),
    }
    SurfaceView(**parts)
    wrong = {"image": parts["image"][..., :4], "depth": parts["depth"][:1], "poses": torch.eye(4), "patches": WHOLE}
    with pytest.raises(ValueError, match="image, depth, opacity, poses, patches of shapes"):
        SurfaceView(**(parts | {part: wrong[part]}))


def test_slices_of_views_are_the_views_one_by_one():
    a, b = rough_views(0, 6, 3)
    visibility = Visibility(tolerance=0.3, min_opacity=0.5)
    together = warp_between(a, b, INTRINSICS, visibility)
    single = [warp_between(a[i : i + 1], b[i : i + 1], INTRINSICS, visibility) for i in range(3)]
    for k in range(2):
        assert_close(together[k], torch.cat([pair[k] for pair in single]))
