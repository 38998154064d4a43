"""Volume rendering against closed forms and against loops in pure Python."""

import math

import pytest
import torch
from torch.testing import assert_close

from graf.geometry.cameras import Intrinsics, pose_from_angles
from graf.geometry.rays import RayCaster, Rays, pixel_grid
from graf.geometry.volume_rendering import (
    RayNoise,
    RaySampling,
    Render,
    composite_along_rays,
    compositing_weights,
    importance_distances,
    interval_lengths,
    points_along,
    render_rays,
    stratified_distances,
)

DOUBLE = torch.float64


def straight_rays(batch: int = 1, count: int = 1, near: float = 2.0, far: float = 5.0, cosine: float = 1.0) -> Rays:
    """Rays along +x from the origin."""
    shape = (batch, count, 1)
    directions = torch.tensor([1.0, 0.0, 0.0], dtype=DOUBLE).expand(batch, count, 3)
    full = [torch.full(shape, value, dtype=DOUBLE) for value in (near, far, cosine)]
    return Rays(torch.zeros(batch, count, 3, dtype=DOUBLE), directions, *full)


def tilted_rays(batch: int = 2, side: int = 3) -> Rays:
    poses = pose_from_angles(torch.rand(batch, dtype=DOUBLE), 0.2 + 0.5 * torch.rand(batch, dtype=DOUBLE), 3.5)
    return RayCaster(Intrinsics.from_fov(side, 40.0), 2.0, 5.0, 1.2).cast(poses, pixel_grid(batch, side, side))


def fog(sigma: float, colour: tuple[float, float, float] = (0.5, -0.5, 1.0)):
    def field(points, directions, noise):
        return torch.tensor(colour, dtype=points.dtype).expand_as(points), torch.full_like(points[..., 0], sigma)

    return field


def bumpy_field(points, directions, noise):
    """A smooth field that depends on place and direction, with bounded density."""
    raw = torch.sin(3 * points).sum(-1) + 0.5
    if noise is not None:
        raw = raw + noise
    rgb = torch.tanh(points * 1.5 + directions[:, :, None])
    return rgb, torch.nn.functional.softplus(2 * raw)


# ------------------------------------------------------------------------------------------------------ where to sample


def test_without_jitter_samples_sit_in_the_middle_of_equal_bins():
    rays = straight_rays()
    assert_close(stratified_distances(rays.near, rays.far, 3).flatten(), torch.tensor([2.5, 3.5, 4.5], dtype=DOUBLE))


def test_jitter_moves_each_sample_inside_its_own_bin():
    rays = straight_rays(2, 50)
    jitter = torch.rand(2, 50, 6, dtype=DOUBLE)
    found = stratified_distances(rays.near, rays.far, 6, jitter)
    assert_close(found, 2 + 0.5 * (torch.arange(6) + jitter))
    assert bool((found.diff(dim=-1) > 0).all())


def test_intervals_sum_to_far_minus_near():
    rays = tilted_rays()
    distances = stratified_distances(rays.near, rays.far, 7, torch.rand(2, 9, 7, dtype=DOUBLE))
    lengths = interval_lengths(distances, rays.near, rays.far)
    assert_close(lengths.sum(-1, keepdim=True), rays.far - rays.near)
    assert bool((lengths >= 0).all())


def test_every_interval_reaches_halfway_to_its_neighbours():
    rays = straight_rays()
    lengths = interval_lengths(torch.tensor([[[2.5, 3.0, 4.5]]], dtype=DOUBLE), rays.near, rays.far)
    assert_close(lengths.flatten(), torch.tensor([0.75, 1.0, 1.25], dtype=DOUBLE))


# -------------------------------------------------------------------------------------------------------- how it weighs


def test_weights_equal_the_loop_over_transmittance():
    density, lengths = 3 * torch.rand(2, 3, 6, dtype=DOUBLE), torch.rand(2, 3, 6, dtype=DOUBLE)
    found = compositing_weights(density, lengths)
    for b in range(2):
        for n in range(3):
            transmittance = 1.0
            for s in range(6):
                alpha = 1 - math.exp(-float(density[b, n, s] * lengths[b, n, s]))
                assert found[b, n, s].item() == pytest.approx(transmittance * alpha, abs=1e-14)
                transmittance *= 1 - alpha


def test_a_dense_sample_does_not_blur_what_lies_in_front_of_it_in_float32():
    density = torch.full((1, 1, 8), 0.33)
    density[..., 5] = 1e6
    lengths = torch.ones(1, 1, 8)
    exact = compositing_weights(density.double(), lengths.double())
    assert_close(compositing_weights(density, lengths).double(), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6, 1e30])
def test_weights_are_positive_and_sum_to_at_most_one(scale):
    weights = compositing_weights(scale * torch.rand(4, 50, 32), torch.rand(4, 50, 32))
    assert bool(torch.isfinite(weights).all())
    assert bool((weights >= 0).all())
    assert weights.sum(-1).max().item() <= 1 + 1e-6


def test_float32_weights_agree_with_float64():
    density, lengths = 20 * torch.rand(2, 100, 64, dtype=DOUBLE), torch.rand(2, 100, 64, dtype=DOUBLE) / 30
    found = compositing_weights(density.float(), lengths.float()).double()
    assert_close(found, compositing_weights(density, lengths), atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------- what the eye sees


@pytest.mark.parametrize("sigma", [0.0, 0.1, 1.0, 7.0])
@pytest.mark.parametrize("samples", [2, 5, 64])
def test_constant_density_has_its_closed_form_opacity_and_colour_at_any_number_of_samples(sigma, samples):
    rays = straight_rays(cosine=0.8)
    noise = RayNoise(jitter=torch.rand(1, 1, samples, dtype=DOUBLE))
    background = torch.tensor([1.0, 1.0, -1.0], dtype=DOUBLE)
    found = render_rays(fog(sigma), rays, RaySampling(samples), noise, background)
    opacity = 1 - math.exp(-3 * sigma)
    assert found.opacity.item() == pytest.approx(opacity, abs=1e-12)
    colour = opacity * torch.tensor([0.5, -0.5, 1.0], dtype=DOUBLE) + (1 - opacity) * background
    assert_close(found.rgb.flatten(), colour)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 7.0])
def test_constant_density_has_its_closed_form_depth(sigma):
    found = render_rays(fog(sigma), straight_rays(cosine=0.8), RaySampling(4000), RayNoise())
    passed = math.exp(-3 * sigma)  # E[t] of an exponential law cut off at far, where the rest of the mass sits
    expected = 2 + (1 - passed) / sigma
    assert found.depth.item() == pytest.approx(0.8 * expected, abs=1e-5)


@pytest.mark.parametrize("start", [2.0, 3.25, 4.5])
def test_one_opaque_slab_shows_its_own_colour_and_front(start):
    def slab(points, directions, noise):
        inside = (points[..., 0] >= start) & (points[..., 0] <= start + 0.5)
        rgb = torch.where(inside[..., None], 0.25, -0.75).expand_as(points).to(points)
        return rgb, 1e5 * inside.to(points)

    found = render_rays(slab, straight_rays(cosine=0.5), RaySampling(300), RayNoise(), torch.ones(3, dtype=DOUBLE))
    assert found.opacity.item() == pytest.approx(1, abs=1e-9)
    assert_close(found.rgb.flatten(), torch.full((3,), 0.25, dtype=DOUBLE))
    assert found.depth.item() == pytest.approx(0.5 * (start + 0.005), abs=1e-9)  # the first sample inside


def test_empty_space_shows_the_background_at_the_far_end():
    rays = straight_rays(batch=2, cosine=0.9)
    background = torch.tensor([[[0.1, 0.2, 0.3]], [[-0.1, -0.2, -0.3]]], dtype=DOUBLE)
    found = render_rays(fog(0.0), rays, RaySampling(4), RayNoise(), background)
    assert_close(found.rgb, background)
    assert_close(found.depth, torch.full((2, 1, 1), 4.5, dtype=DOUBLE))
    assert render_rays(fog(0.0), rays, RaySampling(4), RayNoise()).rgb.abs().max() == 0


def test_rays_without_length_are_transparent():
    found = render_rays(fog(100.0), straight_rays(near=3.0, far=3.0), RaySampling(8, 4), RayNoise())
    assert found.opacity.item() == 0
    assert found.depth.item() == 3


def loop_composite(rgb, density, distances, rays, background):
    """NeRF's equation 3, ray by ray and sample by sample."""
    batch, count, samples = density.shape
    colour, depth, opacity = torch.zeros(batch, count, 3, dtype=DOUBLE), *torch.zeros(2, batch, count, 1, dtype=DOUBLE)
    for b in range(batch):
        for n in range(count):
            near, far = rays.near[b, n].item(), rays.far[b, n].item()
            t = [near, *distances[b, n].tolist(), far]
            passed = 1.0
            for s in range(samples):
                low = near if s == 0 else (t[s] + t[s + 1]) / 2
                high = far if s == samples - 1 else (t[s + 1] + t[s + 2]) / 2
                alpha = 1 - math.exp(-density[b, n, s].item() * (high - low))
                colour[b, n] += passed * alpha * rgb[b, n, s]
                depth[b, n] += passed * alpha * t[s + 1]
                opacity[b, n] += passed * alpha
                passed *= 1 - alpha
            colour[b, n] += passed * background
            depth[b, n] = (depth[b, n] + passed * far) * rays.axis_cosine[b, n]
    return colour, depth, opacity


def test_compositing_equals_the_loop():
    rays = tilted_rays()
    distances = stratified_distances(rays.near, rays.far, 6, torch.rand(2, 9, 6, dtype=DOUBLE))
    rgb, density = torch.rand(2, 9, 6, 3, dtype=DOUBLE) * 2 - 1, 2 * torch.rand(2, 9, 6, dtype=DOUBLE)
    background = torch.tensor([1.0, 0.0, -1.0], dtype=DOUBLE)
    found = composite_along_rays(rgb, density, distances, rays, background)
    colour, depth, opacity = loop_composite(rgb, density, distances, rays, background)
    assert_close(found.rgb, colour)
    assert_close(found.depth, depth)
    assert_close(found.opacity, opacity)


def test_importance_rendering_equals_a_merge_by_hand():
    rays, coarse, fine = tilted_rays(), 6, 5
    noise = RayNoise(
        torch.rand(2, 9, coarse, dtype=DOUBLE),
        torch.rand(2, 9, fine, dtype=DOUBLE),
        0.3 * torch.randn(2, 9, coarse + fine, dtype=DOUBLE),
    )
    background = torch.tensor([1.0, 0.0, -1.0], dtype=DOUBLE)
    found = render_rays(bumpy_field, rays, RaySampling(coarse, fine), noise, background)

    first = stratified_distances(rays.near, rays.far, coarse, noise.jitter)
    rgb, density = bumpy_field(points_along(rays, first), rays.directions, noise.density[..., :coarse])
    weights = compositing_weights(density, interval_lengths(first, rays.near, rays.far))
    second = importance_distances(first, weights, rays.near, rays.far, fine, noise.importance_jitter)
    rgb_2, density_2 = bumpy_field(points_along(rays, second), rays.directions, noise.density[..., coarse:])
    merged = [[], [], []]
    for b in range(2):
        for n in range(9):
            rows = [(first[b, n, s], rgb[b, n, s], density[b, n, s]) for s in range(coarse)]
            rows += [(second[b, n, s], rgb_2[b, n, s], density_2[b, n, s]) for s in range(fine)]
            rows.sort(key=lambda row: row[0].item())
            for column, values in zip(merged, zip(*rows, strict=True), strict=True):
                column.append(torch.stack(values))
    t, colours, densities = (torch.stack(column).unflatten(0, (2, 9)) for column in merged)
    colour, depth, opacity = loop_composite(colours, densities, t, rays, background)
    assert_close(found.rgb, colour)
    assert_close(found.depth, depth)
    assert_close(found.opacity, opacity)


def test_the_field_is_evaluated_at_the_points_of_the_rays_with_its_share_of_the_noise():
    rays, seen = tilted_rays(), []

    def spy(points, directions, noise):
        seen.append((points, directions, noise))
        return bumpy_field(points, directions, noise)

    density = torch.randn(2, 9, 7, dtype=DOUBLE)
    render_rays(spy, rays, RaySampling(4, 3), RayNoise(density=density))
    assert [points.shape for points, _, _ in seen] == [(2, 9, 4, 3), (2, 9, 3, 3)]
    offsets = seen[0][0] - rays.origins[:, :, None]
    assert_close(offsets, offsets.norm(dim=-1, keepdim=True) * rays.directions[:, :, None])
    assert torch.equal(torch.cat([noise for _, _, noise in seen], -1), density)


# -------------------------------------------------------------------------------------------------- importance sampling


def test_importance_samples_follow_a_known_piecewise_constant_density():
    rays = straight_rays(near=0.0, far=4.0)
    distances = torch.tensor([[[0.5, 1.5, 2.5, 3.5]]], dtype=DOUBLE)  # intervals [0,1] [1,2] [2,3] [3,4]
    weights = torch.tensor([[[0.1, 0.4, 0.0, 0.3]]], dtype=DOUBLE)
    jitter = torch.rand(1, 1, 40_000, dtype=DOUBLE)
    found = importance_distances(distances, weights, rays.near, rays.far, 40_000, jitter)
    shares = torch.histc(found, 8, 0, 4) / 40_000
    expected = torch.tensor([1, 1, 4, 4, 0, 0, 3, 3], dtype=DOUBLE) / 16
    assert_close(shares, expected, atol=1e-3, rtol=0)


def test_importance_samples_are_evenly_spaced_quantiles_without_jitter():
    rays = straight_rays(near=0.0, far=4.0)
    distances = torch.tensor([[[0.5, 1.5, 2.5, 3.5]]], dtype=DOUBLE)
    weights = torch.tensor([[[0.0, 1.0, 0.0, 0.0]]], dtype=DOUBLE)
    found = importance_distances(distances, weights, rays.near, rays.far, 4)
    assert_close(found.flatten(), torch.tensor([1.125, 1.375, 1.625, 1.875], dtype=DOUBLE), atol=1e-4, rtol=0)
    assert torch.equal(found, importance_distances(distances, weights, rays.near, rays.far, 4))


def test_importance_samples_are_sorted_and_inside_even_on_empty_rays():
    rays = tilted_rays()
    distances = stratified_distances(rays.near, rays.far, 6)
    for weights in (torch.zeros(2, 9, 6, dtype=DOUBLE), torch.rand(2, 9, 6, dtype=DOUBLE)):
        found = importance_distances(distances, weights, rays.near, rays.far, 16, torch.rand(2, 9, 16, dtype=DOUBLE))
        assert bool((found.diff(dim=-1) >= 0).all())
        assert bool(((found >= rays.near - 1e-12) & (found <= rays.far + 1e-12)).all())


def test_an_empty_ray_is_sampled_evenly():
    rays = straight_rays()
    distances = stratified_distances(rays.near, rays.far, 6)
    found = importance_distances(distances, torch.zeros(1, 1, 6, dtype=DOUBLE), rays.near, rays.far, 6)
    assert_close(found, distances)


def test_no_gradient_flows_through_the_places_of_importance_samples():
    rays = straight_rays()
    weights = torch.rand(1, 1, 6, dtype=DOUBLE, requires_grad=True)
    found = importance_distances(stratified_distances(rays.near, rays.far, 6), weights, rays.near, rays.far, 4)
    assert not found.requires_grad


# ---------------------------------------------------------------------------------------------------------- derivatives


def test_gradients_of_colour_depth_and_opacity_pass_gradcheck():
    rays = tilted_rays(1, 2)
    distances = stratified_distances(rays.near, rays.far, 4)

    def composite(rgb, density, background):
        found = composite_along_rays(rgb, density, distances, rays, background)
        return found.rgb, found.depth, found.opacity

    rgb = torch.rand(1, 4, 4, 3, dtype=DOUBLE, requires_grad=True)
    density = (3 * torch.rand(1, 4, 4, dtype=DOUBLE)).requires_grad_(True)
    background = torch.rand(3, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(composite, (rgb, density, background))


def test_float32_rendering_agrees_with_float64():
    rays = tilted_rays()
    single = Rays(*(getattr(rays, name).float() for name in ("origins", "directions", "near", "far", "axis_cosine")))
    noise = RayNoise(torch.rand(2, 9, 32, dtype=DOUBLE))
    exact = render_rays(bumpy_field, rays, RaySampling(32), noise)
    found = render_rays(bumpy_field, single, RaySampling(32), RayNoise(noise.jitter.float()))
    assert found.rgb.dtype == torch.float32
    for name in ("rgb", "depth", "opacity"):
        assert_close(getattr(found, name).double(), getattr(exact, name), atol=2e-5, rtol=0)


def test_noise_slices_and_images_leave_missing_parts_out():
    noise = RayNoise(jitter=torch.rand(3, 9, 4), density=torch.rand(3, 9, 4))
    part = noise.of_rays(2, 5, RaySampling(4))[1:2]
    assert torch.equal(part.jitter, noise.jitter[1:2, 2:5])
    assert torch.equal(part.density, noise.density[1:2, 2:5])
    assert part.importance_jitter is None


def test_rays_become_images_row_by_row():
    values = torch.arange(2 * 9 * 3).reshape(2, 9, 3)
    render = Render(values, values[..., :1] + 100, values[..., 1:2] + 200)
    images = render.as_images()
    assert images.rgb.shape == (2, 3, 3, 3)
    assert images.depth.shape == images.opacity.shape == (2, 1, 3, 3)
    for b, c, i, j in [(0, 0, 0, 0), (1, 2, 0, 1), (0, 1, 2, 0), (1, 0, 2, 2)]:
        assert images.rgb[b, c, i, j] == values[b, 3 * i + j, c]
        assert images.depth[b, 0, i, j] == render.depth[b, 3 * i + j, 0]
        assert images.opacity[b, 0, i, j] == render.opacity[b, 3 * i + j, 0]
