"""Super-resolution: latents on a ring of views, exact projections, and patches that agree with whole images."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from graf.geometry.rays import Patches, patch_grid, place_patches
from graf.models.ccsr import (
    CCSR,
    BoxProjection,
    ConvTrunk,
    KernelProjection,
    LatentMixture,
    UnitRange,
    ViewLatents,
    upsample,
)
from graf.models.rrdb import RRDBTrunk

BINOMIAL = (0.125, 0.375, 0.375, 0.125)
WIDE = (-0.02, 0.05, 0.17, 0.3, 0.3, 0.17, 0.05, -0.02)


def random_latents(num_views: int, size: int = 1, mode: str = "blend") -> ViewLatents:
    latents = ViewLatents(num_views, 3, size, mode)
    for view in latents.views:
        nn.init.normal_(view)
    return latents


def make_ccsr(trunk: nn.Module, size: int, projection: nn.Module | None = None) -> CCSR:
    return CCSR(trunk, random_latents(8, size), projection or BoxProjection(trunk.scale))


def as_matrix(linear, height: int, width: int) -> torch.Tensor:
    """The matrix of a linear map of one-channel images (B, 1, height, width), column by column."""
    basis = torch.eye(height * width, dtype=torch.float64).reshape(-1, 1, height, width)
    return linear(basis).flatten(1).t()


# ---------------------------------------------------------------- the ring


def test_an_angle_blends_its_two_neighbouring_views_and_wraps():
    weights = ViewLatents(8, 3, 4).mixing_weights(torch.tensor([0, 22, 45, 359]))
    expected = torch.zeros(4, 8)
    expected[0, 0] = 1
    expected[1, 0], expected[1, 1] = 23 / 45, 22 / 45
    expected[2, 1] = 1
    expected[3, 7], expected[3, 0] = 1 / 45, 44 / 45
    assert_close(weights, expected, atol=1e-6, rtol=0)
    assert [torch.nonzero(row).numel() for row in weights] == [1, 2, 1, 2]


@pytest.mark.parametrize(("num_views", "angle", "view"), [
    (8, 0, 0), (8, 22, 0), (8, 23, 1), (8, 45, 1), (8, 337, 7), (8, 338, 0), (8, 359, 0), (3, 59, 0), (3, 301, 0),
])  # fmt: skip
def test_nearest_takes_one_whole_view_and_wraps(num_views, angle, view):
    weights = ViewLatents(num_views, 3, 4, "nearest").mixing_weights(torch.tensor([angle]))
    assert torch.equal(weights, functional.one_hot(torch.tensor([view]), num_views).float())


@pytest.mark.parametrize("num_views", [1, 3, 7, 8, 360])
@pytest.mark.parametrize("mode", ["blend", "nearest"])
def test_weights_are_shares_of_at_most_two_neighbours_at_every_angle(num_views, mode):
    weights = ViewLatents(num_views, 3, 1, mode).mixing_weights(torch.arange(360))
    assert bool((weights >= 0).all())
    assert_close(weights.sum(1), torch.ones(360))
    assert (weights > 0).sum(1).max() == (1 if num_views in (1, 360) or mode == "nearest" else 2)


@pytest.mark.parametrize("mode", ["blend", "nearest"])
def test_a_single_view_is_shared_by_all_angles(mode):
    latents = random_latents(1, 4, mode)
    assert_close(latents(torch.tensor([0, 77, 359])), latents.views[0].expand(3, -1, -1, -1))


@pytest.mark.parametrize("angle", [-1, 360, 719])
def test_an_angle_out_of_range_is_an_error_that_names_it(angle):
    with pytest.raises(ValueError, match=rf"label angle {angle}:.*\[0, 360\)"):
        ViewLatents(8, 3, 4)(torch.tensor([10, angle]))


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match=r"mode='cubic'.*'blend' or 'nearest'"):
        ViewLatents(8, 3, 4, "cubic")


@pytest.mark.parametrize("num_views", [1, 5, 8])
@pytest.mark.parametrize("mode", ["blend", "nearest"])
def test_a_batch_is_its_samples_one_by_one(num_views, mode):
    latents = random_latents(num_views, 4, mode)
    angles = torch.tensor([0, 1, 22, 23, 45, 100, 315, 338, 359, 100])
    for angle, found in zip(angles.tolist(), latents(angles), strict=True):
        position = angle / 360 * num_views
        if mode == "nearest":
            position = math.floor(position + 0.5)
        low = math.floor(position)
        first, second = latents.views[low % num_views], latents.views[(low + 1) % num_views]
        assert_close(found, first + (position - low) * (second - first))


@pytest.mark.parametrize("mode", ["blend", "nearest"])
def test_angles_and_their_mixture_give_the_same_latents_and_the_same_output(mode):
    ccsr = make_ccsr(ConvTrunk(2, 4, 1), 8)
    ccsr.latents = random_latents(8, 8, mode)
    angles = torch.tensor([0, 20, 170, 359])
    mixture = ccsr.latents.mix(angles)
    assert torch.equal(mixture.weights, ccsr.latents.mixing_weights(angles))
    assert mixture.used == tuple(sorted({view for row in mixture.weights for view in row.nonzero().flatten().tolist()}))
    assert torch.equal(ccsr.latents(mixture), ccsr.latents(angles))
    render, patches = torch.rand(4, 3, 8, 8), place_patches(torch.rand(4, 3), 0.4, 0.9)
    found, expected = ccsr(render, mixture, patches), ccsr(render, angles, patches)
    assert torch.equal(found.image, expected.image)
    assert torch.equal(found.unprojected, expected.unprojected)


def test_a_part_of_a_mixture_is_the_mixture_of_its_angles():
    latents, angles = random_latents(8, 4), torch.tensor([0, 20, 170, 359])
    whole = latents(angles)
    assert_close(latents(latents.mix(angles)[1:3]), whole[1:3], atol=0, rtol=0)


def test_exactly_the_views_of_a_batch_have_gradients():
    latents = ViewLatents(8, 3, 4)
    latents(torch.tensor([0, 100, 350])).square().sum().add(latents(torch.tensor([0, 100])).sum()).backward()
    assert [view.grad is not None for view in latents.views] == [True, False, True, True, False, False, False, True]
    assert_close(latents.views[2].grad, torch.full((3, 4, 4), 35 / 45))  # 100 degrees lie 10 past view 2 of 45 each
    assert_close(latents.views[3].grad, torch.full((3, 4, 4), 10 / 45))


# ---------------------------------------------------------------- the projections


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_box_projection_is_exact_and_idempotent(scale, dtype, bound):
    images = 3 * torch.randn(2, 3, 8 * scale, 12 * scale, dtype=dtype)
    target = torch.randn(2, 3, 8, 12, dtype=dtype)
    project = BoxProjection(scale)
    projected = project(images, target)
    limit = bound * max(1.0, float(images.abs().max()))
    assert (functional.avg_pool2d(projected, scale) - target).abs().max() <= limit
    assert (functional.avg_pool2d(images, scale) - target).abs().max() > 1
    assert (project(projected, target) - projected).abs().max() <= limit


@pytest.mark.parametrize(("make", "height", "width"), [
    (lambda: BoxProjection(2), 6, 8), (lambda: BoxProjection(4), 8, 4), (lambda: KernelProjection(2, BINOMIAL), 6, 8),
])  # fmt: skip
def test_projection_is_the_nearest_image_that_satisfies_the_constraint(make, height, width):
    project = make()
    image = torch.randn(1, 1, height, width, dtype=torch.float64)
    target = torch.randn(1, 1, height // project.scale, width // project.scale, dtype=torch.float64)
    down = as_matrix(project.down, height, width)
    step = (project(image, target) - image).flatten()
    null_space = torch.linalg.svd(down).Vh[len(down) :]
    assert len(null_space) == height * width - len(down)
    assert (down @ null_space.t()).abs().max() < 1e-12
    assert (null_space @ step).abs().max() < 1e-12
    other = image.flatten() + step + null_space.t() @ torch.randn(len(null_space), dtype=torch.float64)
    assert_close(down @ other, target.flatten())
    assert (other - image.flatten()).norm() > step.norm()


@pytest.mark.parametrize("make", [lambda: BoxProjection(2), lambda: KernelProjection(2, BINOMIAL)])
def test_the_gradient_of_a_projection_is_the_projector_of_its_null_space(make):
    project = make()
    image = torch.randn(1, 1, 6, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(project, (image, target))
    to_image, to_target = torch.autograd.functional.jacobian(project, (image, target))
    down = as_matrix(project.down, 6, 8)
    inverse = down.t() @ torch.linalg.inv(down @ down.t())
    assert_close(to_image.reshape(48, 48), torch.eye(48, dtype=torch.float64) - inverse @ down, atol=1e-12, rtol=0)
    assert_close(to_target.reshape(48, 12), inverse, atol=1e-12, rtol=0)


def blur_and_decimate(images: torch.Tensor, taps: tuple[float, ...], scale: int) -> torch.Tensor:
    """H from its definition, pixel by pixel: blur with a repeated edge, then every s-th value, grids centred."""
    _, _, height, width = images.shape
    start = (scale - len(taps)) / 2
    assert start == int(start)
    reduced = torch.zeros(*images.shape[:2], height // scale, width // scale, dtype=images.dtype)
    for i in range(height // scale):
        for j in range(width // scale):
            for a, vertical in enumerate(taps):
                for b, horizontal in enumerate(taps):
                    y = min(max(scale * i + int(start) + a, 0), height - 1)
                    x = min(max(scale * j + int(start) + b, 0), width - 1)
                    reduced[:, :, i, j] += vertical * horizontal * images[:, :, y, x]
    return reduced


@pytest.mark.parametrize(
    ("scale", "taps"),
    [(2, BINOMIAL), (2, WIDE), (2, (0.5, 0.5)), (4, BINOMIAL), (4, WIDE), (4, (0.25,) * 4), (4, (0.5, 0.5))],
)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 12), (16, 4)])
def test_the_kernel_projection_is_the_pseudo_inverse_of_the_dense_matrix(scale, taps, height, width):
    project = KernelProjection(scale, taps)
    image = torch.randn(2, 1, height, width, dtype=torch.float64)
    target = torch.randn(2, 1, height // scale, width // scale, dtype=torch.float64)
    down = as_matrix(lambda images: blur_and_decimate(images, taps, scale), height, width)
    x, y = image.flatten(1).t(), target.flatten(1).t()
    expected = x + torch.linalg.pinv(down) @ (y - down @ x)
    assert_close(project.down(image), (down @ x).t().reshape(target.shape), atol=1e-12, rtol=0)
    projected = project(image, target)
    assert_close(projected, expected.t().reshape(image.shape), atol=1e-10, rtol=0)
    assert (project.down(projected) - target).abs().max() < 1e-11
    assert_close(project(projected, target), projected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("scale", [2, 4])
def test_a_kernel_of_equal_weights_is_the_box(scale):
    images, target = torch.randn(2, 3, 16, 24), torch.randn(2, 3, 16 // scale, 24 // scale)
    box, kernel = BoxProjection(scale), KernelProjection(scale, (1 / scale,) * scale)
    assert_close(kernel.down(images), box.down(images), atol=1e-6, rtol=0)
    assert_close(kernel(images, target), box(images, target), atol=2e-6, rtol=0)


def test_the_kernel_projection_is_exact_in_float32_up_to_the_border():
    images, target = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 32, 32)
    project = KernelProjection(2, BINOMIAL)
    projected = project(images, target)
    assert projected.dtype == torch.float32
    assert (project.down(projected) - target).abs().max() <= 1e-5


@pytest.mark.parametrize(("scale", "taps", "message"), [
    (2, (0.25, 0.5, 0.25), "3 taps with scale 2.*even number"), (2, (0.5, 0.4), "sum to 0.9"),
])  # fmt: skip
def test_kernels_that_shift_or_darken_are_refused(scale, taps, message):
    with pytest.raises(ValueError, match=message):
        KernelProjection(scale, taps)


# ---------------------------------------------------------------- trunk and whole module


@pytest.mark.parametrize("make", [lambda: ConvTrunk(2, 8, 1), lambda: ConvTrunk(4, 8, 3)])
def test_the_receptive_radius_of_the_conv_trunk_is_as_far_as_a_pixel_matters(make):
    trunk = make().double()
    size = 2 * trunk.receptive_radius + 7
    image = torch.randn(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    middle, scale = size // 2, trunk.scale
    trunk(image)[..., middle * scale : (middle + 1) * scale, middle * scale : (middle + 1) * scale].sum().backward()
    touched = image.grad[0].abs().sum(0) > 0
    reach = (torch.nonzero(touched) - middle).abs().max()
    assert reach == trunk.receptive_radius


@pytest.mark.parametrize("scale", [2, 4])
def test_an_untrained_conv_trunk_is_close_to_bicubic(scale):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    found = ConvTrunk(scale)(images)
    assert found.shape == (2, 3, 16 * scale, 16 * scale)
    difference = (found - upsample(images, scale)).abs()
    assert 0 < difference.mean() < 0.05


@pytest.mark.parametrize("scale", [2, 4])
def test_bicubic_upsampling_shifts_nothing(scale):
    """Pixel areas: the mean over each coarse pixel of an upsampled ramp is the ramp; corner points would drift."""
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    assert_close(functional.avg_pool2d(upsample(ramp, scale), scale)[..., 3:-3], ramp[..., 3:-3], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "make", [lambda: ConvTrunk(2, 8, 1), lambda: ConvTrunk(4, 8, 1), lambda: UnitRange(RRDBTrunk(2, 8, 4, 1))]
)
@pytest.mark.parametrize(("autocast", "dtype", "bound"), [
    (False, torch.float64, 1e-12), (False, torch.float32, 1e-6), (True, torch.float32, 1e-6),
])  # fmt: skip
def test_the_whole_module_agrees_exactly_with_its_render(make, autocast, dtype, bound):
    trunk = make()
    module = make_ccsr(trunk, 16).to(dtype)
    render = torch.randn(3, 3, 16, 16, dtype=dtype)
    trunk_dtypes = []
    inside = [layer for layer in trunk.modules() if isinstance(layer, nn.Conv2d)][-1]
    handle = inside.register_forward_hook(lambda layer, inputs, output: trunk_dtypes.append(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = module(render, torch.tensor([0, 100, 359]), place_patches(torch.rand(3, 3), 0.5, 1.0))
        reduced = module.down(found.image)
    handle.remove()
    assert trunk_dtypes == [torch.bfloat16 if autocast else dtype]
    assert found.image.dtype == found.unprojected.dtype == reduced.dtype == dtype
    limit = bound * max(1.0, float(found.unprojected.abs().max()), float(render.abs().max()))
    assert (functional.avg_pool2d(found.image, trunk.scale) - render).abs().max() <= limit
    assert (reduced - render).abs().max() <= limit
    assert (functional.avg_pool2d(found.unprojected, trunk.scale) - render).abs().max() > 1e-3


def test_nothing_clamps_the_output():
    trunk = ConvTrunk(2, 8, 1)
    with torch.no_grad():
        trunk.last.weight.mul_(1000)
    render = torch.full((1, 3, 16, 16), 0.9) + 0.1 * torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        found = make_ccsr(trunk, 16)(render, torch.tensor([30]), Patches.whole(1))
    assert found.image.max() > 2
    limit = 1e-6 * max(1.0, float(found.unprojected.abs().max()))
    assert (functional.avg_pool2d(found.image, 2) - render).abs().max() <= limit


class HalfTrunk(nn.Module):
    """A trunk whose output is half precision."""

    scale = 2

    def forward(self, images):
        return upsample(images, 2).bfloat16()


def test_the_projection_is_exact_behind_a_trunk_of_half_precision():
    render = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        found = make_ccsr(HalfTrunk(), 16)(render, torch.tensor([0, 200]), Patches.whole(2))
    assert found.image.dtype == found.unprojected.dtype == torch.float32
    limit = 1e-6 * max(1.0, float(found.unprojected.abs().max()))
    assert (functional.avg_pool2d(found.image, 2) - render).abs().max() <= limit


class Recorder(nn.Module):
    """A trunk that keeps what it is given."""

    scale = 2

    def forward(self, images):
        self.given = images
        return upsample(images, 2)


def test_latents_are_cropped_on_the_patchs_own_grid_and_added_in_float32():
    """A latent that is its own place in the image plane turns up as the places of the patch's pixels."""
    recorder = Recorder()
    module = make_ccsr(recorder, 32)
    x, y = patch_grid(Patches.whole(1), 32)[0].unbind(-1)
    with torch.no_grad():
        for number, view in enumerate(module.latents.views):
            view.copy_(torch.stack([x, y, torch.full_like(x, float(number))]))
    patches = place_patches(torch.rand(4, 3), 0.3, 0.9)
    patches.centre.clamp_(-0.06, 0.06)  # the outermost half pixel of the latent repeats its edge
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(torch.full((4, 3, 16, 16), 0.125), torch.tensor([0, 9, 45, 315]), patches)
    expected = patch_grid(patches, 16).permute(0, 3, 1, 2) + 0.125
    assert_close(recorder.given[:, :2], expected, atol=1e-5, rtol=0)
    views = torch.tensor([0, 0.2, 1, 7])[:, None, None] + 0.125
    assert_close(recorder.given[:, 2], views.expand(4, 16, 16), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("make", "whole", "size"), [
    (lambda: ConvTrunk(2, 8, 1), 32, 16), (lambda: ConvTrunk(4, 8, 2), 32, 16), (lambda: RRDBTrunk(2, 4, 2, 1), 64, 48),
    (lambda: UnitRange(RRDBTrunk(4, 4, 2, 1)), 64, 48),
])  # fmt: skip
def test_a_patch_super_resolves_to_the_crop_of_the_whole_image_away_from_its_border(make, whole, size):
    trunk = make().double()
    module = make_ccsr(trunk, whole).double()
    for convolution in (layer for layer in trunk.modules() if isinstance(layer, nn.Conv2d)):
        nn.init.kaiming_normal_(convolution.weight)  # far from bicubic, so that every layer matters
    images, angles = torch.randn(3, 3, whole, whole, dtype=torch.float64), torch.tensor([0, 100, 350])
    offsets = torch.tensor([[0, 0], [whole - size, 3], [5, whole - size]])
    patches = Patches(torch.full((3,), size / whole).double(), (2 * offsets.double() + size) / whole - 1)
    cropped = torch.stack([
        image[:, y : y + size, x : x + size] for image, (x, y) in zip(images, offsets.tolist(), strict=True)
    ])  # fmt: skip
    with torch.no_grad():
        of_patch = module(cropped, angles, patches).image
        of_whole = module(images, angles, Patches.whole(3)).image
    scale, radius = trunk.scale, trunk.receptive_radius
    assert 2 * radius < size
    inside = slice(scale * radius, scale * (size - radius))
    for found, full, (x, y) in zip(of_patch, of_whole, (scale * offsets).tolist(), strict=True):
        expected = full[:, y : y + scale * size, x : x + scale * size]
        assert_close(found[:, inside, inside], expected[:, inside, inside], atol=1e-9, rtol=0)
        assert (found - expected).abs().max() > 1e-3  # at the border the patch cannot know what lies outside
    steered = module(cropped, (angles + 90) % 360, patches).image
    assert (steered - of_patch)[..., inside, inside].abs().max() > 1e-3


@pytest.mark.parametrize("rows", [1, 3, 8, 11, 12])
@pytest.mark.parametrize("make", [lambda: ConvTrunk(2, 4, 1), lambda: UnitRange(RRDBTrunk(4, 4, 2, 1))])
def test_strips_of_any_height_super_resolve_to_the_whole_image(make, rows):
    ccsr, images = make_ccsr(make(), 12).double(), torch.rand(2, 3, 12, 12, dtype=torch.float64)
    arguments = (images, torch.tensor([10, 200]), Patches.whole(2))
    whole = ccsr(*arguments)
    ccsr.rows = rows
    strips = ccsr(*arguments)
    assert_close(strips.unprojected, whole.unprojected, atol=1e-12, rtol=0)
    assert_close(strips.image, whole.image, atol=1e-12, rtol=0)


def test_halving_the_rows_ends_at_one():
    ccsr = make_ccsr(ConvTrunk(2, 4, 1), 12)
    assert [ccsr.halve_rows(12) is not None for _ in range(4)] == [True, True, True, False]
    assert ccsr.rows == 1


def test_a_trunk_for_images_from_0_to_1_is_given_those_and_returns_the_projects_range():
    trunk = RRDBTrunk(2, 8, 4, 1)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert_close(UnitRange(trunk)(images), 2 * trunk((images + 1) / 2) - 1)
    assert (UnitRange(trunk).scale, UnitRange(trunk).receptive_radius) == (2, trunk.receptive_radius)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = trunk((images + 1) / 2)
        assert half.dtype == torch.bfloat16
        assert torch.equal(UnitRange(trunk)(images), 2 * half.float() - 1)  # the range is changed in float32


def test_a_module_with_the_kernel_projection_moves_between_dtypes_like_any_other():
    module = (
        CCSR(ConvTrunk(2, 4, 1), ViewLatents(1, 3, 8), KernelProjection(2, (0.1, 0.4, 0.4, 0.1))).to("cpu").double()
    )
    render = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    image = module(render, torch.zeros(1), Patches.whole(1)).image
    assert image.dtype == torch.float64
    assert_close(module.down(image), render, atol=1e-12, rtol=0)


def test_joined_mixtures_use_the_views_of_all_parts():
    latents = ViewLatents(8, 2, 3)
    for view in latents.views:
        nn.init.normal_(view)
    angles = torch.tensor([10, 100, 200])
    joined = LatentMixture.cat([latents.mix(angles[:1]), latents.mix(angles[1:])])
    assert torch.equal(latents(joined), latents(angles))
