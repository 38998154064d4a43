"""The patch discriminator: sizes, what it is conditioned on, and a spectral norm that only moves when told to."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from graf.geometry.rays import Patches
from graf.geometry.views import Cameras, Views
from graf.models.discriminator import (
    PATCH_SIZES,
    ConvolutionWithMaps,
    DiscriminatorShape,
    PatchCondition,
    PatchDiscriminator,
    SpectralNorm,
)

SHAPE = DiscriminatorShape(size=16, ndf=8, num_classes=3)


def draw_views(batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Views, Patches]:
    patches = Patches(0.25 + 0.5 * torch.rand(batch, dtype=dtype), 0.2 * torch.rand(batch, 2, dtype=dtype))
    u, v = torch.rand(2, batch, dtype=dtype)
    return Cameras(3.0, (0.3, 0.5)).views_at(torch.arange(batch) % 3, u, v), patches


def draw_condition(batch: int = 2, dtype: torch.dtype = torch.float32) -> PatchCondition:
    return SHAPE.describe(*draw_views(batch, dtype))


@pytest.mark.parametrize("size", PATCH_SIZES)
def test_every_patch_size_gives_one_logit_per_patch(size):
    discriminator = PatchDiscriminator(replace(SHAPE, size=size, ndf=4, max_channels=16))
    logits, labels = discriminator(torch.randn(2, 3, size, size), draw_condition())
    assert logits.shape == (2,)
    assert labels is None
    assert not torch.isclose(logits[0], logits[1])


def test_the_trunk_halves_down_to_four_by_four_with_bounded_channels():
    discriminator = PatchDiscriminator(replace(SHAPE, size=128, ndf=8, max_channels=20))
    convolutions = [layer for layer in discriminator.trunk if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [8, 16, 20, 20, 20, 20]
    assert discriminator.trunk[:-3](torch.randn(1, 3, 128, 128)).shape[2:] == (4, 4)


@pytest.mark.parametrize("size", PATCH_SIZES[:3])
def test_constant_maps_count_as_input_channels_that_are_convolved(size):
    layer = ConvolutionWithMaps(5, 4, size).double()
    patches = torch.randn(3, 3, size, size, dtype=torch.double, requires_grad=True)
    maps = torch.randn(3, 5, dtype=torch.double, requires_grad=True)
    inputs = (patches, maps, layer.weight, layer.bias)
    assert set(layer.state_dict()) == {"weight", "bias"}  # as a convolution's, in checkpoints of all ages

    def differentiate(found: Tensor) -> list[Tensor]:
        """The result, its gradients, and those of the length of the first one, as R1 needs them."""
        gradients = torch.autograd.grad(found.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(gradients[0].square().sum(), inputs[:3])
        return [found, *gradients, *second]

    images = torch.cat([patches, maps[:, :, None, None].expand(-1, -1, size, size)], dim=1)
    assert_close(differentiate(layer(patches, maps)), differentiate(nn.Conv2d.forward(layer, images)))


@pytest.mark.parametrize("size", [8, 48, 512])
def test_a_wrong_patch_size_is_named(size):
    with pytest.raises(ValueError, match=f"patch size {size}"):
        PatchDiscriminator(replace(SHAPE, size=size))


def test_the_label_head_has_a_logit_per_value_of_every_group():
    discriminator = PatchDiscriminator(replace(SHAPE, label_groups=(3, 2, 8)))
    logits, labels = discriminator(torch.randn(2, 3, 16, 16), draw_condition())
    assert logits.shape == (2,)
    assert labels.shape == (2, 13)


def test_the_label_head_does_not_see_the_condition():
    discriminator = PatchDiscriminator(replace(SHAPE, label_groups=(3,)))
    patches = torch.randn(2, 3, 16, 16)
    first, second = (discriminator(patches, draw_condition()) for _ in range(2))
    assert not torch.allclose(first[0], second[0])
    assert torch.equal(first[1], second[1])


def altered(views: Views, patches: Patches, part: str) -> tuple[Views, Patches]:
    if part == "class_idx":
        return replace(views, class_idx=(views.class_idx + 1) % 3), patches
    if part in ("u", "v"):
        return replace(views, **{part: 1 - getattr(views, part)}), patches
    if part == "scale":
        return views, Patches(patches.scale / 2, patches.centre)
    shift = torch.tensor([0.1, 0.0] if part == "x" else [0.0, 0.1])
    return views, Patches(patches.scale, patches.centre + shift)


@pytest.mark.parametrize("part", ["class_idx", "u", "v", "scale", "x", "y"])
@pytest.mark.parametrize("condition_pose", [True, False])
def test_the_decision_depends_on_every_known_part_of_the_condition_and_on_no_other(part, condition_pose):
    shape = replace(SHAPE, condition_pose=condition_pose)
    discriminator, patches, shown = PatchDiscriminator(shape), torch.randn(2, 3, 16, 16), draw_views()
    logits, _ = discriminator(patches, shape.describe(*shown))
    other, _ = discriminator(patches, shape.describe(*altered(*shown, part)))
    if part in ("u", "v") and not condition_pose:
        assert torch.equal(logits, other)
    else:
        assert (logits - other).abs().min() > 1e-6


def test_azimuth_is_periodic():
    discriminator = PatchDiscriminator(SHAPE).double()
    patches, (views, places) = torch.randn(2, 3, 16, 16, dtype=torch.float64), draw_views(dtype=torch.float64)
    here, turned = (SHAPE.describe(replace(views, u=views.u + turn), places) for turn in range(2))
    assert_close(discriminator(patches, here)[0], discriminator(patches, turned)[0], atol=1e-10, rtol=0)


def test_the_decision_is_psi_plus_the_projection():
    discriminator = PatchDiscriminator(SHAPE)
    patches, (views, places) = torch.randn(2, 3, 16, 16), draw_views()
    features, condition = discriminator.trunk(patches), SHAPE.describe(views, places)
    scale, harmonics = places.scale, torch.arange(1, 7)
    azimuth, polar = 2 * torch.pi * views.u[:, None] * harmonics, torch.pi * views.v[:, None] * harmonics[:2]
    parts = [discriminator.class_embedding(views.class_idx), scale.log2()[:, None], places.centre]
    described = torch.cat([*parts, azimuth.sin(), azimuth.cos(), polar.sin(), polar.cos()], 1)
    projected = torch.einsum("bf,bf->b", discriminator.condition(described), features) / 16**0.5
    assert_close(discriminator(patches, condition)[0], discriminator.decision(features)[:, 0] + projected)


@pytest.mark.parametrize("spectral", [True, False])
def test_patches_of_a_batch_do_not_touch_each_other(spectral):
    discriminator = PatchDiscriminator(replace(SHAPE, spectral=spectral, label_groups=(3,)))
    patches, condition = torch.randn(4, 3, 16, 16), draw_condition(4)
    whole, labels = discriminator(patches, condition)
    part, part_labels = discriminator(patches[1:3], condition[1:3])
    assert_close(part, whole[1:3], atol=1e-5, rtol=1e-5)
    assert_close(part_labels, labels[1:3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("norm", "count"), [("none", 0), ("instance", 2)])
def test_instance_norm_follows_every_halving_but_the_first(norm, count):
    discriminator = PatchDiscriminator(replace(SHAPE, size=32, norm=norm))
    assert sum(isinstance(layer, nn.InstanceNorm2d) for layer in discriminator.trunk) == count


def test_logits_are_float32_under_bfloat16_autocast():
    discriminator = PatchDiscriminator(replace(SHAPE, spectral=True, label_groups=(3,)))
    patches, condition = torch.randn(2, 3, 16, 16), draw_condition()
    exact = discriminator(patches, condition)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = discriminator(patches, condition)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert_close(found[0], exact[0], atol=0.05, rtol=0.05)


# ---------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("spectral", [True, False])
def test_the_gradient_penalty_has_the_right_gradient_in_every_weight(spectral):
    """Double backward (through instance norm and spectral norm) against finite differences in float64."""
    discriminator = PatchDiscriminator(replace(SHAPE, ndf=4, spectral=spectral)).double()
    patches = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    condition = draw_condition(dtype=torch.float64)

    def penalty() -> torch.Tensor:
        (gradient,) = torch.autograd.grad(discriminator(patches, condition)[0].sum(), patches, create_graph=True)
        return gradient.square().sum()

    parameters = [parameter for parameter in discriminator.parameters() if parameter.dim() > 1]
    gradients = torch.autograd.grad(penalty(), parameters, allow_unused=True)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    directions = [torch.randn_like(parameter) for parameter in parameters]
    step = 1e-6

    def shifted(by: float) -> float:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=by)
        return penalty().item()

    difference = (shifted(step) - shifted(-2 * step)) / (2 * step)
    expected = sum((gradient * way).sum().item() for gradient, way in zip(gradients, directions, strict=True))
    assert difference == pytest.approx(expected, rel=1e-4)


# -------------------------------------------------------------------------------------------------------- spectral norm


def spectral_buffers(discriminator: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in discriminator.buffers()]


@pytest.mark.parametrize("shape", [(8, 3, 4, 4), (1, 16), (20, 7)])
def test_the_estimated_norm_converges_to_the_largest_singular_value(shape):
    weight = torch.randn(shape)
    norm = SpectralNorm(weight)
    for _ in range(300):
        norm.advance(weight)
    sigma = torch.linalg.svdvals(weight.flatten(1))[0]
    assert_close(norm(weight), weight / sigma, rtol=1e-4, atol=1e-6)


def test_every_matrix_is_normalised_but_not_the_class_embedding():
    discriminator = PatchDiscriminator(replace(SHAPE, spectral=True, label_groups=(3,)))
    for _ in range(200):
        discriminator.advance_spectral_norm()
    matrices = [module for module in discriminator.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(matrices) == 3 + 1 + 2 + 1
    for module in matrices:
        assert torch.linalg.matrix_norm(module.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.01)
    assert not parametrize.is_parametrized(discriminator.class_embedding)


@pytest.mark.parametrize("training", [True, False])
def test_forward_backward_and_recomputation_leave_the_spectral_norm_alone(training):
    discriminator = PatchDiscriminator(replace(SHAPE, spectral=True)).train(training)
    before = spectral_buffers(discriminator)
    patches, condition = torch.randn(2, 3, 16, 16), draw_condition()
    first, _ = discriminator(patches, condition)
    first.sum().backward()
    second, _ = discriminator(patches, condition)
    assert torch.equal(first, second)
    assert all(map(torch.equal, before, spectral_buffers(discriminator)))


def test_advancing_moves_every_estimate_after_the_weights_have_moved():
    discriminator = PatchDiscriminator(replace(SHAPE, spectral=True))
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = dict(discriminator.named_buffers())
    before = {name: buffer.clone() for name, buffer in before.items()}
    discriminator.advance_spectral_norm()
    moved = [name for name, buffer in discriminator.named_buffers() if not torch.equal(buffer, before[name])]
    # a matrix with one row has only one left vector
    assert set(before) - set(moved) == {"decision.parametrizations.weight.0.left"}


def test_a_graph_from_before_an_advance_can_still_be_back_propagated():
    discriminator = PatchDiscriminator(replace(SHAPE, spectral=True))
    patches, condition = torch.randn(2, 3, 16, 16), draw_condition()
    expected = torch.autograd.grad(discriminator(patches, condition)[0].sum(), list(discriminator.parameters()))
    logits, _ = discriminator(patches, condition)
    discriminator.advance_spectral_norm()
    assert_close(torch.autograd.grad(logits.sum(), list(discriminator.parameters())), expected)


def test_state_dict_round_trip_restores_logits_and_estimates():
    source, target = (PatchDiscriminator(replace(SHAPE, spectral=True)) for _ in range(2))
    source.advance_spectral_norm()
    target.load_state_dict(source.state_dict())
    patches, condition = torch.randn(2, 3, 16, 16), draw_condition()
    assert torch.equal(source(patches, condition)[0], target(patches, condition)[0])
    for discriminator in (source, target):
        discriminator.advance_spectral_norm()
    assert torch.equal(source(patches, condition)[0], target(patches, condition)[0])


def test_without_spectral_norm_advancing_does_nothing():
    discriminator = PatchDiscriminator(SHAPE)
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    discriminator.advance_spectral_norm()
    assert all(torch.equal(value, before[name]) for name, value in discriminator.state_dict().items())
