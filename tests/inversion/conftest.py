"""A generator whose objects are known in closed form and can be told apart: coloured balls that codes resize."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from graf.base.tensors import TensorBatch
from graf.evaluation.renderer import Renderer
from graf.geometry.cameras import Intrinsics, height_from_elevation
from graf.geometry.rays import RayCaster
from graf.geometry.views import Cameras
from graf.geometry.volume_rendering import RaySampling
from graf.models.field import RadianceField
from graf.models.generator import Generator
from graf.runtime.amp import Precision

#: centres of the balls of every object, and their colours in each class
CENTRES = ((0.45, 0.0, 0.0), (-0.2, 0.35, 0.1), (-0.1, -0.35, -0.2))
COLOURS = (((0.9, -0.8, -0.8), (-0.8, 0.8, -0.8), (-0.7, -0.7, 0.9)), ((0.9, 0.9, -0.9), (-0.9, 0.5, 0.9), (0.1, 0, 0)))


@dataclass(frozen=True)
class BallCodes(TensorBatch):
    """radii (B, 3) and colours (B, 3, 3) of an object's balls."""

    radii: Tensor
    colours: Tensor


class BallField(RadianceField):
    """Three soft balls; the code's three numbers enlarge one each."""

    dim_shape, dim_appearance = 3, 0

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.tensor(CENTRES))
        self.colours = nn.Parameter(torch.tensor(COLOURS))

    def prepare(self, z: Tensor, class_idx: Tensor) -> BallCodes:
        return BallCodes(0.28 * torch.exp(0.2 * z), self.colours[class_idx])

    def forward(self, points, directions, codes, noise=None):
        shares = self._shares(points, codes)
        total = shares.sum(-1)
        rgb = (shares[..., None] * codes.colours[:, None, None]).sum(-2) / total[..., None].clamp(min=1e-6)
        return rgb, 30 * total

    def density(self, points, codes):
        return 30 * self._shares(points, codes).sum(-1)

    def _shares(self, points: Tensor, codes: BallCodes) -> Tensor:
        distance = (points[..., None, :] - self.centres).square().sum(-1)
        return torch.sigmoid((codes.radii[:, None, None].square() - distance) * 60)


@pytest.fixture
def ball_renderer() -> Renderer:
    return Renderer(
        generator=Generator(BallField(), RaySampling(24)).requires_grad_(False),
        caster=RayCaster(Intrinsics.from_fov(24, 30.0), 2.5, 4.5, 1.0),
        precision=Precision("cpu", None),
        device=torch.device("cpu"),
        resolution=24,
        cameras=Cameras(3.5, (height_from_elevation(20.0),)),
        classes=("red", "yellow"),
    )
