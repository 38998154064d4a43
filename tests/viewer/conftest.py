"""A small generator with random weights, in which every choice of a viewer shows; and one of a ball."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from graf.base.tensors import TensorBatch
from graf.evaluation.renderer import Renderer
from graf.geometry.cameras import Intrinsics
from graf.geometry.rays import RayCaster
from graf.geometry.views import Cameras
from graf.geometry.volume_rendering import RaySampling
from graf.models.ccsr import CCSR, BoxProjection, ConvTrunk, ViewLatents
from graf.models.density import DensityLaw
from graf.models.field import RadianceField
from graf.models.generator import Generator
from graf.models.mlp_field import MLPField, MLPShape
from graf.runtime.amp import Precision

SIZE = 16


def make_renderer(field: RadianceField, **others: object) -> Renderer:
    sampling = RaySampling(8)
    generator = Generator(field, sampling, num_instances=4)
    caster = RayCaster(Intrinsics.from_fov(SIZE, 30.0), 2.5, 4.5, 1.0)
    cameras = Cameras(3.5, (0.2, 0.4))
    precision, device = Precision("cpu", None), torch.device("cpu")
    classes = ("car", "mug", "duck")
    renderer = Renderer(generator, caster, precision, device, SIZE, cameras, classes, **others)  # type: ignore[arg-type]
    generator.eval().requires_grad_(False)
    return renderer


@pytest.fixture
def renderer() -> Renderer:
    """Three classes, four known objects, super-resolution x2."""
    return make_random_renderer()


@pytest.fixture(scope="module")
def lasting_renderer() -> Renderer:
    """The same, for tests that leave it as it is."""
    return make_random_renderer()


def make_random_renderer() -> Renderer:
    torch.manual_seed(5)
    shape = MLPShape(
        depth=2, width=16, multires=3, multires_views=1, base_frequency=math.pi, use_viewdirs=True, dim_shape=3,
        dim_appearance=2, num_classes=3, dim_class=32, density=DensityLaw("relu", 20, 0, 0, 0.6, None),
    )  # fmt: skip
    ccsr = CCSR(ConvTrunk(2, 4, 1), ViewLatents(4, 3, SIZE), BoxProjection(2))
    return make_renderer(MLPField(shape), ccsr=ccsr.eval().requires_grad_(False))


class Ball(RadianceField):
    """A hard red ball; its code is nothing."""

    dim_shape, dim_appearance = 3, 2

    def __init__(self, centre: Tensor, radius: float) -> None:
        super().__init__()
        self.centre, self.radius = centre, radius

    def prepare(self, z: Tensor, class_idx: Tensor) -> "Ball.Codes":
        return self.Codes()

    def forward(self, points: Tensor, directions: Tensor, codes: object, noise: Tensor | None = None):
        red = torch.tensor([1.0, -1.0, -1.0]).expand_as(points)
        return red, self.density(points, codes)

    def density(self, points: Tensor, codes: object) -> Tensor:
        return 1000.0 * ((points - self.centre).norm(dim=-1) < self.radius).float()

    @dataclass(frozen=True)
    class Codes(TensorBatch):
        """Nothing, for any number of images."""


@pytest.fixture
def ball() -> Callable[[tuple[float, float, float], float], Renderer]:
    """(centre, radius) -> a renderer of a ball."""
    return lambda centre, radius: make_renderer(Ball(torch.tensor(centre), radius))
