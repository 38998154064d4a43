"""A small generator of every kind of field, without training."""

from collections.abc import Callable

import pytest
import torch

from graf.app import builders
from graf.app.builders import DatasetInfo
from graf.config import load_config
from graf.evaluation.renderer import Renderer
from graf.runtime.amp import Precision

FIELDS = {
    "mlp": ("nerf.field=mlp", "nerf.netdepth=4", "nerf.netwidth=16"),
    "siren": ("nerf.field=siren", "nerf.netdepth=3", "nerf.netwidth=16", "nerf.use_viewdirs=false"),
    "table": ("nerf.field=triplane", "nerf.planes=table", "nerf.bounding_radius=1", "nerf.plane_resolution=8"),
    "synthesis": ("nerf.field=triplane", "nerf.planes=synthesis", "nerf.bounding_radius=1", "nerf.plane_resolution=12"),
}
CLASSES = ("car", "duck", "mug")


def _make_renderer(*keys: str, v_list: tuple[float, ...] = (0.3, 0.4)) -> Renderer:
    config = load_config("smoke", ["nerf.density_scale=20", "data.imsize=16", *keys])
    info = DatasetInfo(CLASSES, v_list, 30.0, True)
    generator = builders.build_generator(config, info).eval().requires_grad_(False)
    return builders.build_renderer(config, info, Precision("cpu", None), torch.device("cpu"), generator)


@pytest.fixture(scope="session")
def make_renderer() -> Callable[..., Renderer]:
    """Configuration keys, and heights v -> a new renderer of three classes, 16 x 16 pixels."""
    return _make_renderer


@pytest.fixture(scope="session")
def make_field_renderer() -> Callable[[str], Renderer]:
    """A kind of field (mlp, siren, table, synthesis) -> a new renderer of it."""
    return lambda kind: _make_renderer(*FIELDS[kind])


@pytest.fixture(params=FIELDS)
def any_renderer(request: pytest.FixtureRequest) -> Renderer:
    """One with each kind of field."""
    return _make_renderer(*FIELDS[request.param])
