"""The tri-plane field against a plain second implementation, its output laws, and its gradients."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from graf.models.density import DensityLaw
from graf.models.encoding import positional_encoding
from graf.models.plane_lookup import PLANE_AXES, sample_planes
from graf.models.plane_sources import STORED_SHARE
from graf.models.triplane_field import TriplaneField, TriplaneShape

SHAPE = TriplaneShape(
    planes="table", plane_resolution=8, plane_channels=5, synthesis_width=4, decoder_width=12, colour_components=3,
    extent=0.9, multires_views=2, base_frequency=math.pi, use_viewdirs=True, dim_shape=4, dim_appearance=3,
    num_classes=3, density=DensityLaw("softplus", 5.0, -0.5, 2.0, 0.6, 0.9),
)  # fmt: skip


def make_field(**changes) -> TriplaneField:
    """A field in which every weight matters: what starts at zero is drawn too."""
    torch.manual_seed(3)
    field = TriplaneField(replace(SHAPE, **changes)).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.normal_(0, 0.4)
        stored = field.planes.stored if field.shape.planes == "table" else field.planes.table.stored
        stored.mul_(STORED_SHARE)
    return field


def draw_inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(4)
    points = 1.2 * (2 * torch.rand(batch, 3, 4, 3, dtype=torch.float64) - 1)
    directions = functional.normalize(torch.randn(batch, 3, 3, dtype=torch.float64), dim=-1)
    return points, directions, torch.randn(batch, 7, dtype=torch.float64), torch.tensor([2, 0][:batch])


def read_plane(plane: Tensor, x: float, y: float) -> Tensor:
    """Bilinear between the four nearest grid points of a plane (C, R, R) over [-1, 1]^2, the edge outside."""
    size = plane.shape[-1]
    column, row = ((min(max((value + 1) * size / 2 - 0.5, 0), size - 1)) for value in (x, y))
    left, top = min(int(column), size - 2), min(int(row), size - 2)
    a, b = column - left, row - top
    upper = (1 - a) * plane[:, top, left] + a * plane[:, top, left + 1]
    lower = (1 - a) * plane[:, top + 1, left] + a * plane[:, top + 1, left + 1]
    return (1 - b) * upper + b * lower


def evaluate_plainly(field: TriplaneField, point: Tensor, direction: Tensor, z: Tensor, class_idx: int):
    """Colour (3,) and density of one point, with every code applied at the point itself."""
    shape = field.shape
    place = (point / shape.extent).tolist()
    planes = field.planes(z[None, : shape.dim_shape], torch.tensor([class_idx]))[0]
    features = sum(read_plane(planes[i], place[a], place[b]) for i, (a, b) in enumerate(PLANE_AXES))
    scale, shift = field.modulation(z[: shape.dim_shape]).chunk(2)
    hidden = torch.relu(field.hidden(features * (1 + scale) + shift))
    mixture = field.appearance(z[shape.dim_shape :])
    if shape.use_viewdirs:
        mixture = mixture + field.view_directions(positional_encoding(direction, 2, math.pi))
    components = field.components(hidden).view(3, -1)
    colour = torch.tanh(components[:, 0] + components[:, 1:] @ mixture)
    return colour, shape.density(field.raw_density(hidden)[None, None], point[None, None, None])[0, 0, 0]


@pytest.mark.parametrize("planes", ["table", "synthesis"])
@pytest.mark.parametrize("use_viewdirs", [False, True])
def test_the_folded_field_equals_the_plain_one_in_values_and_gradients(use_viewdirs, planes):
    field = make_field(use_viewdirs=use_viewdirs, planes=planes)
    points, directions, z, class_idx = draw_inputs()
    found = []
    for plainly in (False, True):
        field.zero_grad()
        z = z.detach().requires_grad_()
        if plainly:
            pairs = [
                evaluate_plainly(field, points[b, n, s], directions[b, n], z[b], int(class_idx[b]))
                for b in range(2)
                for n in range(3)
                for s in range(4)
            ]
            rgb = torch.stack([colour for colour, _ in pairs]).view(2, 3, 4, 3)
            density = torch.stack([density for _, density in pairs]).view(2, 3, 4)
        else:
            rgb, density = field(points, directions, field.prepare(z, class_idx))
        weights = torch.arange(1.0, rgb.numel() + 1, dtype=torch.float64).sin().view(rgb.shape)
        ((rgb * weights).sum() + (density * weights[..., 0]).sum()).backward()
        gradients = [parameter.grad for parameter in field.parameters()]
        assert all(gradient is not None and bool((gradient != 0).any()) for gradient in gradients)
        found.append((rgb, density, z.grad, *gradients))
    assert_close(found[0], found[1], atol=1e-12, rtol=1e-12)
    assert found[0][0].dtype == torch.float64


def test_the_appearance_code_and_the_direction_never_change_density():
    field = make_field()
    points, directions, z, class_idx = draw_inputs()
    other = z.clone()
    other[:, SHAPE.dim_shape :] += 1
    (rgb, density), (other_rgb, other_density) = (
        field(points, way, field.prepare(code, class_idx)) for way, code in ((directions, z), (-directions, other))
    )
    assert torch.equal(density, other_density)
    assert not torch.allclose(rgb, other_rgb)


def test_the_shape_code_and_the_class_change_density():
    field = make_field()
    points, directions, z, class_idx = draw_inputs()
    density = field(points, directions, field.prepare(z, class_idx))[1]
    for code, classes in ((z + 1, class_idx), (z, class_idx.flip(0))):
        assert not torch.allclose(field(points, directions, field.prepare(code, classes))[1], density)


def test_the_density_alone_is_that_beside_the_colours():
    field = make_field()
    points, directions, z, class_idx = draw_inputs()
    codes = field.prepare(z, class_idx)
    assert_close(field.density(points, codes), field(points, directions, codes)[1], atol=1e-14, rtol=1e-14)


def test_a_new_field_is_the_soft_ball_of_its_density_law_for_every_code():
    field = TriplaneField(replace(SHAPE, density=DensityLaw("softplus", 10.0, -2.0, 30.0, 0.6, None)))
    points = functional.normalize(torch.randn(1, 1, 3), dim=-1)[:, :, None] * torch.tensor([0.1, 0.3, 0.85])[:, None]
    directions = torch.tensor([[[0.0, 0, 1]]])
    codes = [field.prepare(torch.randn(1, 7), torch.tensor([0])) for _ in range(2)]
    (rgb, density), (other_rgb, other_density) = (field(points, directions, code) for code in codes)
    assert density[0, 0, :2].min() > 20
    assert density[0, 0, 2] < 0.1
    assert torch.equal(rgb, other_rgb)
    assert torch.equal(density, other_density)


def test_gradients_to_places_and_planes_agree_with_finite_differences():
    torch.manual_seed(0)
    planes = torch.randn(1, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    places = (torch.rand(1, 5, 3, dtype=torch.float64) * 1.4 - 0.7).requires_grad_()
    assert torch.autograd.gradcheck(sample_planes, (planes, places))


def test_planes_are_read_in_full_precision_under_autocast():
    field = TriplaneField(SHAPE)
    points, directions, z, class_idx = (
        value.float() if value.is_floating_point() else value for value in draw_inputs()
    )
    exact = field(points, directions, field.prepare(z, class_idx))
    with torch.autocast("cpu", torch.bfloat16):
        rgb, density = field(points, directions, field.prepare(z, class_idx))
        features = sample_planes(field.planes.stored[:2], points[:, 0])
    assert rgb.dtype == density.dtype == features.dtype == torch.float32
    assert_close(rgb, exact[0], atol=0.02, rtol=0)
    assert_close(density, exact[1], atol=0.05, rtol=0)
