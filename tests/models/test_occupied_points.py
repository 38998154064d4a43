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


@pytest.fixture
def watch(monkeypatch):
    """Notes of later calls of a field: how many points it was asked for, how many had density, whether with a graph."""

    def watch_field(field: RadianceField) -> list[tuple[int, int, bool]]:
        evaluate, calls = field.forward_visible, []

        def note(points: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
            rgb, density = evaluate(points, *others)
            calls.append((density.numel(), int((density > 0).sum()), torch.is_grad_enabled()))
            return rgb, density

        monkeypatch.setattr(field, "forward_visible", note)
        return calls

    return watch_field


def count_points(calls: list[tuple[int, int, bool]]) -> list[int]:
    """Points of the calls with a graph."""
    return [count for count, _, has_graph in calls if has_graph]


@pytest.mark.parametrize("chunk", [5, 16, 40, 4096])
@pytest.mark.parametrize("make_field", FIELDS, ids=NAMES)
def test_what_is_left_out_changes_no_gradient(watch, make_field, chunk):
    field, inputs = make_field(), Inputs()
    expected = inputs.gradients(make_generator(field, "dense", 4096))
    calls = watch(field)
    found = inputs.gradients(make_generator(field, "deferred", chunk))
    # images that are rendered together take as many points as the fullest one of them, here all
    assert (sum(count_points(calls)) < BATCH * RAYS * SAMPLING.total) == (chunk < BATCH * RAYS)
    assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_of_each_image_as_many_points_are_computed_again_as_have_density(watch):
    inputs, field = Inputs(), MLPField(SHAPE)
    calls = watch(field)
    inputs.gradients(make_generator(field, "deferred", RAYS))
    noted, counts = [occupied for _, occupied, _ in calls[: 2 * BATCH : 2]], count_points(calls)
    further = counts[1::2]
    assert 10 < noted[0] < 72  # of 96, in 32 shares
    assert noted[1:] == [0, 96]
    assert counts[::2] == [-(-noted[0] // 3) * 3, 3, 96]
    assert further == [48, 48, 48]  # where they are depends on densities


def test_where_nothing_has_density_the_background_still_learns():
    inputs = Inputs()
    inputs.noise = replace(inputs.noise, density=torch.full_like(inputs.noise.density, -1000.0))
    generator = make_generator(MLPField(SHAPE), "deferred", 16)
    named = dict(zip(("z", "origins", *dict(generator.named_parameters())), inputs.gradients(generator), strict=True))
    assert bool((named.pop("background") != 0).all())
    assert all(bool((gradient == 0).all()) for gradient in named.values())


@pytest.mark.parametrize("strategy", ["dense", "checkpoint"])
def test_other_strategies_ask_for_all_points(watch, strategy):
    inputs, field = Inputs(), MLPField(SHAPE)
    calls = watch(field)
    inputs.gradients(make_generator(field, strategy, 16))
    assert sum(count_points(calls)) == BATCH * RAYS * SAMPLING.total * (1 if strategy == "dense" else 2)


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


@pytest.mark.parametrize(("most", "expected"), [(0, 3), (1, 3), (3, 3), (4, 6), (72, 72)])
@pytest.mark.parametrize("batch", [1, 3])
def test_numbers_are_of_all_occupied_points_and_fill_whole_shares(batch, most, expected):
    occupied = torch.zeros(batch, 12, 8, dtype=torch.bool)
    for image, count in zip(occupied, range(most, -1, -1), strict=False):
        image.view(-1)[torch.randperm(96)[:count]] = True
    numbers = number_occupied(occupied)
    assert numbers is not None
    for image, own in zip(occupied, numbers, strict=True):
        chosen = own.tolist()
        assert len(set(chosen)) == len(chosen)
        assert set(image.flatten().nonzero()[:, 0].tolist()) <= set(chosen)
    assert numbers.shape == (batch, expected)


@pytest.mark.parametrize("most", [73, 96])
def test_where_nearly_all_points_of_some_image_are_occupied_nothing_is_left_out(most):
    occupied = torch.zeros(2, 12, 8, dtype=torch.bool)
    occupied[1].view(-1)[:most] = True
    assert number_occupied(occupied) is None
