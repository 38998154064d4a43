"""Points without density: left out where a rendering is computed again, at no cost to any gradient."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from graf.geometry.cameras import Intrinsics, pose_from_angles
from graf.geometry.rays import RayCaster
from graf.geometry.volume_rendering import RayNoise, RaySampling
from graf.models.density import DensityLaw
from graf.models.field import RadianceField
from graf.models.generator import Generator
from graf.models.mlp_field import MLPField, MLPShape
from graf.models.occupied_points import evaluate_at, number_occupied
from graf.models.siren_field import SirenField, SirenShape
from graf.models.triplane_field import TriplaneField, TriplaneShape

RELU = DensityLaw("relu", 1.0, 0.0, 0.0, 0.6, None)
SHAPE = MLPShape(
    depth=4, width=16, multires=3, multires_views=2, base_frequency=1.0, use_viewdirs=True, dim_shape=5,
    dim_appearance=3, num_classes=2, dim_class=4, density=RELU,
)  # fmt: skip
SINES = SirenShape(
    depth=3, width=16, multires_views=2, base_frequency=1.0, use_viewdirs=True, dim_shape=5, dim_appearance=3,
    num_classes=2, dim_class=4, density=RELU,
)  # fmt: skip
PLANES = TriplaneShape(
    planes="synthesis", plane_resolution=8, plane_channels=4, synthesis_width=4, decoder_width=8, colour_components=2,
    extent=0.9, multires_views=2, base_frequency=1.0, use_viewdirs=True, dim_shape=5, dim_appearance=3, num_classes=2,
    density=RELU,
)  # fmt: skip
FIELDS = [lambda: MLPField(SHAPE), lambda: SirenField(SINES), lambda: TriplaneField(PLANES)]
NAMES = ["mlp", "siren", "triplane"]
CASTER = RayCaster(Intrinsics.from_fov(4, 30.0), 2.5, 4.5)
SAMPLING = RaySampling(6, 3)
BATCH, RAYS = 3, 16


class Inputs:
    """Rays of three images; as noise has it, half of the points of the first have density, of the second none at all,
    of the third all."""

    def __init__(self) -> None:
        poses = pose_from_angles(torch.rand(BATCH).double(), 0.2 + 0.4 * torch.rand(BATCH).double(), 3.5)
        self.rays = CASTER.cast_images(poses, 4)
        self.z, self.class_idx = torch.randn(BATCH, 8).double(), torch.tensor([0, 1, 0])
        noise = 3 * torch.randn(BATCH, RAYS, 9).double()
        noise[1] -= 100
        noise[2] += 100
        self.noise = RayNoise(torch.rand(BATCH, RAYS, 6).double(), torch.rand(BATCH, RAYS, 3).double(), noise)

    def gradients(self, generator: Generator) -> tuple[Tensor, ...]:
        """Of a loss on all that is rendered, to codes, cameras' rays and weights."""
        z, origins = self.z.clone().requires_grad_(), self.rays.origins.clone().requires_grad_()
        found = generator(z, self.class_idx, replace(self.rays, origins=origins), self.noise)
        loss = found.rgb.sin().sum() + found.depth.square().sum() + (found.opacity * found.rgb[..., :1]).sum()
        return torch.autograd.grad(loss, [z, origins, *generator.parameters()])


def make_generator(field: RadianceField, strategy: str, chunk: int) -> Generator:
    generator = Generator(field, SAMPLING, learn_background=True, chunk=chunk).double()
    generator.strategy = strategy
    return generator


def count_points(field: RadianceField) -> list[int]:
    """A list to which each later call of the field with a graph adds its number of points."""
    counts: list[int] = []

    def count(field: RadianceField, arguments: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            counts.append(arguments[0][..., 0].numel())

    field.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize("chunk", [5, 16, 40, 4096])
@pytest.mark.parametrize("make_field", FIELDS, ids=NAMES)
def test_what_is_left_out_changes_no_gradient(make_field, chunk):
    field, inputs = make_field(), Inputs()
    expected = inputs.gradients(make_generator(field, "dense", 4096))
    counts = count_points(field)
    found = inputs.gradients(make_generator(field, "deferred", chunk))
    # images that are rendered together take as many points as the fullest one of them, here all
    assert (sum(counts) < BATCH * RAYS * SAMPLING.total) == (chunk < BATCH * RAYS)
    assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_of_each_image_as_many_points_are_computed_again_as_have_density():
    inputs, field = Inputs(), MLPField(SHAPE)
    generator, occupied = make_generator(field, "deferred", RAYS), []
    field.register_forward_hook(lambda field, arguments, outputs: occupied.append(int((outputs[1] > 0).sum())))
    counts = count_points(field)
    inputs.gradients(generator)
    noted, further = occupied[: 2 * BATCH : 2], counts[1::2]
    assert 10 < noted[0] < 72  # of 96, in sixteenths
    assert noted[1:] == [0, 96]
    assert counts[::2] == [-(-noted[0] // 6) * 6, 6, 96]
    assert further == [48, 48, 48]  # where they are depends on densities


def test_where_nothing_has_density_the_background_still_learns():
    inputs = Inputs()
    inputs.noise = replace(inputs.noise, density=torch.full_like(inputs.noise.density, -1000.0))
    generator = make_generator(MLPField(SHAPE), "deferred", 16)
    named = dict(zip(("z", "origins", *dict(generator.named_parameters())), inputs.gradients(generator), strict=True))
    assert bool((named.pop("background") != 0).all())
    assert all(bool((gradient == 0).all()) for gradient in named.values())


@pytest.mark.parametrize("strategy", ["dense", "checkpoint"])
def test_other_strategies_compute_all_points(strategy):
    inputs, field = Inputs(), MLPField(SHAPE)
    counts = count_points(field)
    inputs.gradients(make_generator(field, strategy, 16))
    assert sum(counts) == BATCH * RAYS * SAMPLING.total * (1 if strategy == "dense" else 2)


@pytest.mark.parametrize("make_field", FIELDS, ids=NAMES)
def test_a_field_at_some_points_is_what_it_is_at_all_of_them_and_nothing_elsewhere(make_field):
    field = make_field().double()
    points, directions = torch.randn(2, 4, 5, 3).double(), torch.randn(2, 4, 3).double()
    noise = torch.randn(2, 4, 5).double()
    codes = field.prepare(torch.randn(2, 8).double(), torch.tensor([0, 1]))
    numbers = torch.tensor([[0, 7, 13], [19, 2, 3]])
    rgb, density = evaluate_at(lambda *inputs: field(*inputs[:2], codes, inputs[2]), numbers, points, directions, noise)
    all_rgb, all_density = field(points, directions, codes, noise)
    chosen = torch.zeros(2, 20, dtype=torch.bool).scatter(1, numbers, True).view(2, 4, 5)
    assert_close(rgb, torch.where(chosen[..., None], all_rgb, 0.0), atol=1e-12, rtol=0)
    assert_close(density, torch.where(chosen, all_density, 0.0), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("most", "expected"), [(0, 3), (1, 3), (3, 3), (4, 6), (36, 36)])
@pytest.mark.parametrize("batch", [1, 3])
def test_numbers_are_of_all_occupied_points_and_fill_whole_sixteenths(batch, most, expected):
    occupied = torch.zeros(batch, 6, 8, dtype=torch.bool)
    for image, count in zip(occupied, range(most, -1, -1), strict=False):
        image.view(-1)[torch.randperm(48)[:count]] = True
    numbers = number_occupied(occupied)
    assert numbers is not None
    for image, own in zip(occupied, numbers, strict=True):
        chosen = own.tolist()
        assert len(set(chosen)) == len(chosen)
        assert set(image.flatten().nonzero()[:, 0].tolist()) <= set(chosen)
    assert numbers.shape == (batch, expected)


@pytest.mark.parametrize("most", [37, 48])
def test_where_nearly_all_points_of_some_image_are_occupied_nothing_is_left_out(most):
    occupied = torch.zeros(2, 6, 8, dtype=torch.bool)
    occupied[1].view(-1)[:most] = True
    assert number_occupied(occupied) is None
