"""The factored radiance field against the plain GRAF network with its concatenations, and its output laws."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from graf.models import mlp_field
from graf.models.density import DensityLaw
from graf.models.encoding import encoding_size, positional_encoding
from graf.models.mlp_field import MLPField, MLPShape
from graf.runtime.live_tensors import LiveTensorMeter

#: GRAF's sizes (Schwarz et al. 2020), with the density of its code
PUBLISHED = MLPShape(
    depth=8, width=256, multires=10, multires_views=4, base_frequency=math.pi, use_viewdirs=True, dim_shape=128,
    dim_appearance=128, num_classes=1, dim_class=32, density=DensityLaw("relu", 1, 0, 0, 0.6, None),
)  # fmt: skip
SMALL = replace(
    PUBLISHED,
    **{"depth": 3, "width": 16, "multires": 3, "multires_views": 2, "dim_shape": 5, "dim_appearance": 4},
    num_classes=3,
    dim_class=6,
)
SOFT = DensityLaw("softplus", 1, 0, 0, 0.6, None)


def encode_plainly(x: Tensor, octaves: int, base_frequency: float = math.pi) -> Tensor:
    parts = [x]
    for octave in range(octaves):
        angle = 2**octave * base_frequency * x
        parts += [torch.sin(angle), torch.cos(angle)]
    return torch.cat(parts, -1)


def plain_graf(field: MLPField, points, directions, z, class_idx, noise=None) -> tuple[Tensor, Tensor]:
    """GRAF's network as published: every layer sees its whole concatenated input at every point."""
    shape = field.shape
    samples = points.shape[2]
    per_point = (*points.shape[:3], -1)
    embedding = field.class_embedding(class_idx)
    shape_code = torch.cat([z[:, : shape.dim_shape], embedding], 1)[:, None, None].expand(per_point)
    appearance = torch.cat([z[:, shape.dim_shape :], embedding], 1)[:, None, None].expand(per_point)
    encoded = torch.cat([encode_plainly(points, shape.multires, shape.base_frequency), shape_code], -1)

    first = torch.cat([field.trunk_in.weight, field.trunk_in_codes.weight], 1)
    hidden = torch.relu(functional.linear(encoded, first, field.trunk_in.bias))
    for index, layer in enumerate(field.trunk, start=1):
        weight = layer.weight
        if index == shape.skip:
            weight = torch.cat([weight, field.trunk_skip.weight, field.trunk_skip_codes.weight], 1)
            hidden = torch.cat([hidden, encoded], -1)
        hidden = torch.relu(functional.linear(hidden, weight, layer.bias))
    raw = field.raw_density(hidden)[..., 0]

    inputs, weights = [field.feature_linear(hidden), appearance], [field.view.weight, field.view_codes.weight]
    if shape.use_viewdirs:
        seen_from = encode_plainly(directions, shape.multires_views, shape.base_frequency)
        inputs.append(seen_from[:, :, None].expand(-1, -1, samples, -1))
        weights.append(field.view_directions.weight)
    colour = torch.relu(functional.linear(torch.cat(inputs, -1), torch.cat(weights, 1), field.view.bias))
    raw = raw if noise is None else raw + noise
    return torch.tanh(field.rgb(colour)), torch.relu(raw)


@contextmanager
def weights_given_to(module: object, name: str) -> Iterator[list[Tensor]]:
    """Weights with which a function (input, weight, ...) of a module is called."""
    original, weights = getattr(module, name), []

    def watched(x: Tensor, weight: Tensor, *more: Tensor) -> Tensor:
        weights.append(weight)
        return original(x, weight, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, watched)
        yield weights


def draw_inputs(shape: MLPShape, dtype: torch.dtype = torch.float64, batch: int = 2):
    points = torch.rand(batch, 3, 4, 3, dtype=dtype) * 2 - 1
    directions = functional.normalize(torch.randn(batch, 3, 3, dtype=dtype), dim=-1)
    z = torch.randn(batch, shape.dim_shape + shape.dim_appearance, dtype=dtype)
    class_idx = torch.arange(batch) % shape.num_classes
    return points, directions, z, class_idx


@pytest.mark.parametrize("base_frequency", [math.pi, 1.0])
@pytest.mark.parametrize("use_viewdirs", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 8])
def test_the_factored_field_is_the_plain_network_in_outputs_and_all_gradients(depth, use_viewdirs, base_frequency):
    shape = replace(SMALL, depth=depth, use_viewdirs=use_viewdirs, base_frequency=base_frequency)
    field = MLPField(shape).double()
    points, directions, z, class_idx = draw_inputs(shape)
    z.requires_grad_(True)
    noise = torch.randn(2, 3, 4, dtype=torch.float64)
    rgb_gradient, density_gradient = torch.randn(2, 3, 4, 3).double(), torch.randn(2, 3, 4).double()
    with torch.no_grad():
        field.raw_density.bias.add_(0.5)  # so that most densities are positive and the ReLU lets gradients through

    names = ["z", *dict(field.named_parameters())]
    leaves = [z, *field.parameters()]
    outputs, gradients = [], []
    for run in (
        lambda: field(points, directions, field.prepare(z, class_idx), noise),
        lambda: plain_graf(field, points, directions, z, class_idx, noise),
    ):
        rgb, density = run()
        outputs.append((rgb, density))
        loss = (rgb * rgb_gradient).sum() + (density * density_gradient).sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    assert_close(outputs[0][0], outputs[1][0], atol=1e-10, rtol=0)
    assert_close(outputs[0][1], outputs[1][1], atol=1e-10, rtol=0)
    for name, factored, plain in zip(names, *gradients, strict=True):
        assert plain.abs().max() > 0, name
        assert_close(factored, plain, atol=1e-10, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("depth", "skip"), [(1, None), (3, None), (4, 3), (8, 5)])
def test_the_skip_is_where_graf_has_it(depth, skip):
    assert replace(PUBLISHED, depth=depth).skip == skip


def test_parameter_count_is_that_of_the_plain_published_network():
    shape = PUBLISHED
    points, views = encoding_size(10) + 128 + 32, encoding_size(4) + 128 + 32
    layers = [(points, 256), *[(256, 256)] * 6, (256 + points, 256), (256, 1), (256, 256), (256 + views, 128), (128, 3)]
    expected = sum((inside + 1) * outside for inside, outside in layers) + shape.dim_class
    assert sum(parameter.numel() for parameter in MLPField(shape).parameters()) == expected


def test_split_layers_start_within_the_bounds_of_their_whole_layer():
    shape = replace(SMALL, depth=8, width=64)
    field = MLPField(shape)
    points, codes = encoding_size(3), 11
    for fan_in, layers in (
        (points + codes, (field.trunk_in, field.trunk_in_codes)),
        (64 + points + codes, (field.trunk[4], field.trunk_skip, field.trunk_skip_codes)),
        (64 + 10 + encoding_size(2), (field.view, field.view_codes, field.view_directions)),
    ):
        for layer in layers:
            assert layer.weight.abs().max().item() == pytest.approx(fan_in**-0.5, rel=0.05)


def test_the_class_changes_density_and_colour():
    field = MLPField(replace(SMALL, density=SOFT))
    points, directions, z, _ = draw_inputs(SMALL, torch.float32, batch=1)
    outputs = [field(points, directions, field.prepare(z, torch.tensor([idx]))) for idx in (0, 1, 0)]
    for part in (0, 1):
        assert not torch.allclose(outputs[0][part], outputs[1][part])
        assert torch.equal(outputs[0][part], outputs[2][part])


def test_the_appearance_code_changes_colour_and_never_density():
    field = MLPField(SMALL)
    points, directions, z, class_idx = draw_inputs(SMALL, torch.float32)
    other = z.clone()
    other[:, SMALL.dim_shape :] += 1
    (rgb, density), (other_rgb, other_density) = (
        field(points, directions, field.prepare(code, class_idx)) for code in (z, other)
    )
    assert torch.equal(density, other_density)
    assert not torch.allclose(rgb, other_rgb)


@pytest.mark.parametrize("use_viewdirs", [True, False])
def test_the_view_direction_changes_colour_only_where_asked_and_never_density(use_viewdirs):
    field = MLPField(replace(SMALL, use_viewdirs=use_viewdirs))
    points, directions, z, class_idx = draw_inputs(SMALL, torch.float32)
    codes = field.prepare(z, class_idx)
    (rgb, density), (other_rgb, other_density) = (field(points, way, codes) for way in (directions, -directions))
    assert torch.equal(density, other_density)
    assert torch.allclose(rgb, other_rgb) is not use_viewdirs


@pytest.mark.parametrize("depth", [2, 4])
def test_codes_made_of_their_own_tensors_are_the_same_codes(depth):
    shape = replace(SMALL, depth=depth)
    field = MLPField(shape)
    points, directions, z, class_idx = draw_inputs(shape, torch.float32)
    codes = field.prepare(z, class_idx)
    again = codes.with_tensors(tuple(tensor.clone() for tensor in codes.tensors()))
    assert_close(field(points, directions, again), field(points, directions, codes))


def plain_layer(
    x: Tensor,
    weight: Tensor,
    shares: Tensor,
    again: tuple[Tensor, Tensor] | None = None,
    packed: object = None,
    known: object = None,
) -> Tensor:
    return torch.relu(functional.linear(x, weight) + shares + (0 if again is None else functional.linear(*again)))


def test_codes_that_have_been_used_can_be_copied_and_inference_mode_takes_codes_of_its_own():
    field = MLPField(SMALL)
    points, directions, z, class_idx = draw_inputs(SMALL, torch.float32)
    with torch.no_grad():
        codes = field.prepare(z, class_idx)
        expected = field(points, directions, codes)
        assert_close(field(points, directions, copy.deepcopy(codes)), expected, atol=0, rtol=0)
    with torch.inference_mode():
        assert_close(field(points, directions, field.prepare(z, class_idx)), expected, atol=0, rtol=0)


def learn(steps: int, method: str = "forward", density_law: DensityLaw = SOFT) -> list[float]:
    """The losses of fitting what is seen of a small field to random colours and densities, in float64."""
    torch.manual_seed(0)
    shape = replace(SMALL, depth=4, density=density_law)
    field = MLPField(shape).double()
    points, directions, z, class_idx = draw_inputs(shape)
    colours, densities = torch.rand(points.shape).double(), torch.rand(points.shape[:3]).double()
    optimizer, losses = torch.optim.Adam(field.parameters(), lr=1e-2), []
    for _ in range(steps):
        noise = torch.randn(points.shape[:3]).double()
        rgb, density = getattr(field, method)(points, directions, field.prepare(z, class_idx), noise)
        loss = (density[..., None] * (rgb - colours)).square().mean() + (density - densities).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_fifty_steps_learn_what_layers_left_to_autograd_learn(monkeypatch):
    found = learn(50)
    monkeypatch.setattr(mlp_field, "linear_relu", plain_layer)
    expected = learn(50)
    assert min(expected[40:]) < 0.5 * expected[0]
    assert found == pytest.approx(expected, rel=1e-9)


def test_fifty_steps_learn_from_what_is_visible_what_all_points_teach():
    expected = learn(50, "forward", PUBLISHED.density)
    assert min(expected[40:]) < 0.5 * expected[0]
    assert learn(50, "forward_visible", PUBLISHED.density) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "change",
    [{}, {"use_viewdirs": False}, {"depth": 5}, {"density": SOFT}],
    ids=["three layers", "no directions", "skip", "softplus"],
)
@pytest.mark.parametrize("shift", [-100.0, -1.5, 0.0, 2.0, 100.0], ids=["none", "few", "half", "most", "all"])
def test_what_is_visible_is_as_at_all_points_and_the_rest_has_no_colour_and_teaches_nothing(change, shift):
    field = MLPField(replace(SMALL, **change)).double()
    points, directions, z, class_idx = draw_inputs(field.shape)
    points, directions, z = (inputs.clone().requires_grad_() for inputs in (points, directions, z))
    noise = torch.randn(points.shape[:3]).double() + shift
    expected_rgb, expected_density = field(points, directions, field.prepare(z, class_idx), noise)
    is_visible = expected_density.detach() > 0
    with torch.no_grad():
        seen, dense = field.forward_visible(points, directions, field.prepare(z, class_idx), noise)
    rgb, density = field.forward_visible(points, directions, field.prepare(z, class_idx), noise)
    for own_rgb, own_density in ((seen, dense), (rgb, density)):
        assert_close(own_density, expected_density.detach(), atol=1e-12, rtol=0)
        assert_close(own_rgb[is_visible], expected_rgb.detach()[is_visible], atol=1e-12, rtol=0)
        if int(is_visible.flatten(1).sum(1).max()) <= 9:  # of 12 points an image
            chosen = (own_rgb != 0).any(-1).flatten(1).sum(1)
            assert int(chosen.max()) <= max(1, int(is_visible.flatten(1).sum(1).max()))
    leaves = [points, directions, z, *field.parameters()]
    losses = [
        (density * (0.3 + rgb[..., 0] * rgb[..., 1] - rgb[..., 2])).sin().sum()
        for rgb, density in ((rgb, density), (expected_rgb, expected_density))
    ]
    found, plain = (torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True) for loss in losses)
    assert_close(found, plain, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.74, 1.0])
def test_to_leave_points_out_takes_no_more_memory_than_all_of_them(share, dtype):
    field = MLPField(replace(SMALL, depth=4, width=128))
    points, directions = 2 * torch.rand(2, 32, 32, 3) - 1, functional.normalize(torch.randn(2, 32, 3), dim=-1)
    z, class_idx, peaks = torch.randn(2, 9), torch.zeros(2, dtype=torch.int64), []
    for noise in (torch.full((2, 1024), 100.0), torch.where(torch.arange(1024) < share * 1024, 100.0, -100.0)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            codes = field.prepare(z, class_idx)
            with LiveTensorMeter() as meter:
                field.forward_visible(points, directions, codes, noise.expand(2, -1).view(2, 32, 32))
        peaks.append(meter.peak)
    assert peaks[1] <= peaks[0]


def test_of_points_that_nobody_sees_nothing_is_kept():
    field = MLPField(replace(SMALL, depth=5))
    points, directions, z, class_idx = draw_inputs(field.shape, torch.float32)
    noise = torch.full(points.shape[:3], -100.0)
    noise[:, 0, :2] = 100.0
    kept: list[Tensor] = []
    codes = field.prepare(z, class_idx)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        field.forward_visible(points, directions, codes, noise)
    wide = [tensor for tensor in kept if tensor.shape[-1] >= field.shape.width and len(tensor) == 2]
    assert len(wide) >= 5  # a layer's output each, and for the next one as input
    assert {tensor.flatten(1, -2).shape[1] for tensor in wide} <= {1, 2}  # points, or one share for all of them


# -------------------------------------------------------------------------------------------------- positional encoding


@pytest.mark.parametrize("base_frequency", [math.pi, 1.0, 3.14159])
@pytest.mark.parametrize("reach", [1.0, 4.5])
@pytest.mark.parametrize("octaves", [0, 1, 4, 10])
def test_encoding_in_float32_is_that_of_direct_sines_to_1e_5(reach, octaves, base_frequency):
    x = torch.linspace(-reach, reach, 30_001)[:, None]
    found = positional_encoding(x, octaves, base_frequency)
    assert found.dtype == torch.float32
    assert found.shape[-1] == 1 + 2 * octaves
    assert_close(found.double(), encode_plainly(x.double(), octaves, base_frequency), atol=1e-5, rtol=0)


@pytest.mark.parametrize("base_frequency", [math.pi, 1.0])
def test_encoding_in_float64_is_that_of_direct_sines(base_frequency):
    x = torch.linspace(-2, 2, 1001, dtype=torch.float64).reshape(-1, 1)
    found = positional_encoding(x, 10, base_frequency)
    assert_close(found, encode_plainly(x, 10, base_frequency), atol=1e-9, rtol=0)


def test_encoding_size_counts_the_channels():
    assert positional_encoding(torch.zeros(2, 3), 7, math.pi).shape[-1] == encoding_size(7)


def test_encoding_and_outputs_stay_float32_under_bfloat16_autocast():
    x = torch.rand(100, 3)
    field = MLPField(SMALL)
    points, directions, z, class_idx = draw_inputs(SMALL, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = positional_encoding(x, 10, math.pi)
        codes = field.prepare(z, class_idx)
        rgb, density = field(points, directions, codes)
        product = field.trunk_in(positional_encoding(points, 3, math.pi))
    assert product.dtype == torch.bfloat16  # the matrix products are not
    assert encoded.dtype == codes.trunk_in.dtype == codes.view_weight.dtype == torch.float32
    assert torch.equal(encoded, positional_encoding(x, 10, math.pi))
    assert rgb.dtype == density.dtype == torch.float32
    exact = field(points, directions, field.prepare(z, class_idx))
    assert_close(rgb, exact[0], atol=0.03, rtol=0)
    assert_close(density, exact[1], atol=0.03, rtol=0)


def test_half_precision_points_are_encoded_in_float32():
    assert positional_encoding(torch.rand(4, 3).to(torch.bfloat16), 6, math.pi).dtype == torch.float32


def test_the_gradient_of_the_encoding_passes_gradcheck():
    x = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: positional_encoding(x, 7, math.pi), (x,))


# ---------------------------------------------------------------------------------------------------------- output laws


def raw_of(field: MLPField, *inputs) -> Tensor:
    """The raw density, read off softplus without bias or prior."""
    shape, field.shape = field.shape, replace(field.shape, density=SOFT)
    _, density = field(*inputs)
    field.shape = shape
    return torch.log(torch.expm1(density))


@pytest.mark.parametrize("kind", ["relu", "softplus"])
def test_noise_bias_prior_and_scale_act_on_the_raw_density_as_documented(kind):
    shape = replace(SMALL, density=DensityLaw(kind, 10.0, -0.2, 6.0, 0.7, None))
    field = MLPField(shape).double()
    points, directions, z, class_idx = draw_inputs(shape)
    codes = field.prepare(z, class_idx)
    noise = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = raw_of(field, points, directions, codes) + noise - 0.2 + 6 * (0.7 - points.norm(dim=-1))
    expected = 10 * (torch.relu(expected) if kind == "relu" else functional.softplus(expected))
    found_rgb, found = field(points, directions, codes, noise)
    assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert torch.equal(found_rgb, field(points, directions, codes)[0])  # noise never reaches the colour


def test_the_sphere_prior_starts_as_a_ball():
    shape = replace(SMALL, density=DensityLaw("softplus", 10.0, -2.0, 30.0, 0.6, None))
    field = MLPField(shape)
    directions = functional.normalize(torch.randn(1, 1, 3), dim=-1)
    points = directions[:, :, None] * torch.tensor([0.1, 0.3, 0.9, 1.2])[None, None, :, None]
    density = field(points, directions, field.prepare(torch.randn(1, 9), torch.tensor([0])))[1].flatten()
    assert density[:2].min() > 20
    assert density[2:].max() < 0.1


def test_nothing_exists_outside_the_bounding_radius():
    field = MLPField(replace(SMALL, density=replace(SOFT, bounding_radius=0.8)))
    points, directions, z, class_idx = draw_inputs(SMALL, torch.float32)
    density = field(points, directions, field.prepare(z, class_idx))[1]
    inside = points.norm(dim=-1) <= 0.8
    assert bool(inside.any())
    assert not bool(inside.all())
    assert torch.equal(density > 0, inside)


def test_the_gradient_at_the_origin_is_finite():
    field = MLPField(replace(SMALL, density=replace(SOFT, sphere_prior=6.0)))
    points = torch.zeros(1, 1, 1, 3, requires_grad=True)
    _, density = field(points, torch.tensor([[[0.0, 0, 1]]]), field.prepare(torch.randn(1, 9), torch.tensor([0])))
    density.sum().backward()
    assert bool(torch.isfinite(points.grad).all())


@pytest.mark.parametrize("kind", ["relu", "softplus"])
@pytest.mark.parametrize("depth", [2, 4])
def test_the_density_alone_is_that_beside_the_colours_and_calls_no_colour_layer(depth, kind):
    shape = replace(SMALL, depth=depth, density=DensityLaw(kind, 5.0, 0.3, 2.0, 0.6, 0.9))
    field = MLPField(shape).double()
    points, directions, z, class_idx = draw_inputs(shape)
    called: list[str] = []
    for name, layer in field.named_children():
        layer.register_forward_pre_hook(lambda module, arguments, name=name: called.append(name))
    codes = field.prepare(z, class_idx)
    rgb, expected = field(points, directions, codes)
    assert "rgb" in called
    assert rgb.shape == (2, 3, 4, 3)
    called.clear()
    with weights_given_to(functional, "linear") as products:
        density = field.density(points, codes)
    assert torch.equal(density, expected)
    assert bool((density > 0).any())
    assert not {"rgb", "view", "view_codes", "view_directions", "feature_linear"} & set(called)
    of_colour = [codes.view_weight, field.view.weight, field.view_directions.weight, field.rgb.weight]
    assert not any(weight is one for weight in products for one in of_colour)


def test_codes_of_a_part_of_the_batch_are_a_part_of_the_codes():
    field = MLPField(SMALL).double()
    points, directions, z, class_idx = draw_inputs(SMALL)[:4]
    codes = field.prepare(z, class_idx)
    whole, part = field(points, directions, codes), field(points[1:], directions[1:], codes[1:])
    assert_close(part[0], whole[0][1:])
    assert_close(part[1], whole[1][1:])
