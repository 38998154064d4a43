"""The SIREN field against pi-GAN's network as written down, its initial state, and its output laws."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from graf.models.density import DensityLaw
from graf.models.encoding import positional_encoding
from graf.models.siren_field import SirenField, SirenShape

SHAPE = SirenShape(
    depth=3, width=16, multires_views=2, base_frequency=math.pi, use_viewdirs=True, dim_shape=5, dim_appearance=4,
    num_classes=3, dim_class=6, density=DensityLaw("softplus", 5.0, -0.5, 2.0, 0.6, 0.9),
)  # fmt: skip


def draw_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(4)
    points = 2 * torch.rand(2, 3, 4, 3, dtype=dtype) - 1
    directions = functional.normalize(torch.randn(2, 3, 3, dtype=dtype), dim=-1)
    return points, directions, torch.randn(2, 9, dtype=dtype), torch.tensor([2, 0])


def pi_gan(field: SirenField, points, directions, z, class_idx, noise) -> tuple[Tensor, Tensor]:
    """Section 3.2 of the paper, every layer at every point: h <- sin(gamma (W h + b) + beta)."""
    shape = field.shape
    embedding = field.class_embedding(class_idx)
    mapped = field.mapping(torch.cat([z[:, : shape.dim_shape], embedding], 1))
    frequencies, phases = (part.view(len(z), shape.depth, -1) for part in mapped.chunk(2, dim=1))
    hidden = points
    for index, weight in enumerate([field.first, *field.trunk]):
        linear = functional.linear(hidden, weight, field.bias[index])
        gamma, beta = (15 * frequencies[:, index] + 30), phases[:, index]
        hidden = torch.sin(gamma[:, None, None] * linear + beta[:, None, None])
    inputs = field.view(hidden) + field.view_codes(torch.cat([z[:, shape.dim_shape :], embedding], 1))[:, None, None]
    if shape.use_viewdirs:
        inputs = inputs + field.view_directions(positional_encoding(directions, 2, math.pi))[:, :, None]
    raw = field.raw_density(hidden)[..., 0]
    return torch.tanh(field.rgb(torch.relu(inputs))), shape.density(raw, points, noise)


@pytest.mark.parametrize("use_viewdirs", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_folded_field_is_pi_gans_network_in_values_and_all_gradients(depth, use_viewdirs):
    torch.manual_seed(3)
    field = SirenField(replace(SHAPE, depth=depth, use_viewdirs=use_viewdirs)).double()
    points, directions, z, class_idx = draw_inputs()
    z.requires_grad_()
    noise = torch.randn(2, 3, 4, dtype=torch.float64)
    used = {name: parameter for name, parameter in field.named_parameters() if parameter.numel()}  # depth 1: no trunk
    names, leaves = ["z", *used], [z, *used.values()]
    found = []
    for rgb, density in (
        field(points, directions, field.prepare(z, class_idx), noise),
        pi_gan(field, points, directions, z, class_idx, noise),
    ):
        weights = torch.arange(1.0, rgb.numel() + 1, dtype=torch.float64).sin().view(rgb.shape)
        gradients = torch.autograd.grad((rgb * weights).sum() + (density * weights[..., 0]).sum(), leaves)
        found.append((rgb, density, *gradients))
    for name, folded, plain in zip(["rgb", "density", *names], *found, strict=True):
        assert plain.abs().max() > 0, name
        assert_close(folded, plain, atol=1e-9, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert found[0][0].dtype == torch.float64


def test_arguments_of_the_sines_start_with_the_spread_that_siren_asks_for():
    torch.manual_seed(0)
    field = SirenField(replace(SHAPE, depth=4, width=256))
    _, _, z, class_idx = draw_inputs(torch.float32)
    codes = field.prepare(z, class_idx).detach()
    hidden = torch.sin(torch.rand(2, 500, 3) @ codes.first.mT + codes.phases[:, 0])
    for layer in range(3):
        arguments = hidden @ codes.trunk[:, layer].mT + codes.phases[:, layer + 1]
        hidden = torch.sin(arguments)
        # SIREN: a standard deviation of 1, at frequency 30 and weights within sqrt(6 / fan-in) / 30; pi-GAN divides by
        # 25, and its biases within 1 / 16 come times 30 too
        assert 1.0 < float(arguments.std()) < 2.0


def test_the_appearance_code_and_the_direction_never_change_density():
    field = SirenField(SHAPE)
    points, directions, z, class_idx = draw_inputs(torch.float32)
    other = z.clone()
    other[:, SHAPE.dim_shape :] += 1
    codes = field.prepare(z, class_idx)
    rgb, density = field(points, directions, codes)
    for way, code in ((-directions, z), (directions, other)):
        other_rgb, other_density = field(points, way, field.prepare(code, class_idx))
        assert torch.equal(density, other_density)
        assert not torch.allclose(rgb, other_rgb)


def test_the_shape_code_and_the_class_change_density():
    field = SirenField(SHAPE)
    points, directions, z, class_idx = draw_inputs(torch.float32)
    density = field(points, directions, field.prepare(z, class_idx))[1]
    for code, classes in ((z + 1, class_idx), (z, class_idx.flip(0))):
        assert not torch.allclose(field(points, directions, field.prepare(code, classes))[1], density)


def test_the_density_alone_is_that_beside_the_colours():
    field = SirenField(SHAPE).double()
    points, directions, z, class_idx = draw_inputs()
    codes = field.prepare(z, class_idx)
    assert torch.equal(field.density(points, codes), field(points, directions, codes)[1])


def test_autocast_keeps_the_first_angles_and_the_outputs_in_float32():
    field = SirenField(replace(SHAPE, depth=4, width=64))
    points, directions, z, class_idx = draw_inputs(torch.float32)
    exact = field(points, directions, field.prepare(z, class_idx))
    seen: list[Tensor] = []
    original = torch.sin
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(torch, "sin", lambda x: seen.append(x) or original(x))
        codes = field.prepare(z, class_idx)
        rgb, density = field(points, directions, codes)
    angles = [x for x in seen if x.shape[-1] == 64]
    assert [x.dtype for x in angles] == [torch.float32] + [torch.bfloat16] * 3
    assert all(tensor.dtype == torch.float32 for tensor in (*codes.tensors(), rgb, density))
    assert_close(rgb, exact[0], atol=0.03, rtol=0)
    assert_close(density, exact[1], atol=0.1, rtol=0.05)


def test_codes_of_a_part_of_the_batch_are_a_part_of_the_codes():
    field = SirenField(SHAPE).double()
    points, directions, z, class_idx = draw_inputs()
    codes = field.prepare(z, class_idx)
    whole, part = field(points, directions, codes), field(points[1:], directions[1:], codes[1:])
    assert_close(part[0], whole[0][1:])
    assert_close(part[1], whole[1][1:])
