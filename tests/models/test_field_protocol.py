"""The field protocol: a short class, registered under a name, trains and renders like the fields that exist."""

import inspect
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from graf.app import builders
from graf.base.tensors import TensorBatch
from graf.config import Config, load_config
from graf.data.loader import make_loader
from graf.models.field import RadianceField
from graf.runtime.amp import Precision
from graf.training.trainer import Trainer

SMOKE = Path(__file__).resolve().parents[2] / "configs" / "smoke.yaml"
CPU, FLOAT32 = torch.device("cpu"), Precision("cpu", None)


@dataclass(frozen=True)
class BallCodes(TensorBatch):
    """The colours (B, 1, 1, 3) of balls."""

    colours: Tensor


class Ball(RadianceField):
    """A ball of one density; its one colour depends on the latent code."""

    dim_shape, dim_appearance, radius = 0, 3, 0.5

    def __init__(self) -> None:
        super().__init__()
        self.colour, self.raw_density = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(()))

    def prepare(self, z, class_idx):
        return BallCodes(torch.tanh(self.colour + 0.3 * z)[:, None, None])

    def forward(self, points, directions, codes, noise=None):
        return codes.colours.expand_as(points), self._fill(points, 0 if noise is None else noise)

    def density(self, points, codes):
        return self._fill(points, 0)

    def _fill(self, points, noise):
        return functional.softplus(self.raw_density + noise) * (points.norm(dim=-1) < self.radius)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toys")


@pytest.fixture
def read_config(folder, monkeypatch):
    """The smoke configuration with a ball as its field, registered as a new field is."""
    monkeypatch.setitem(builders.FIELDS, "ball", lambda config, num_classes: Ball())

    def read(*overrides: str) -> Config:
        # in front of instance norm a bias has no gradient but rounding, which RMSprop would take full steps along
        keys = [f"data.datadir={folder}", "nerf.field=ball", "discriminator.norm=none"]
        return load_config(SMOKE, [*keys, *overrides])

    return read


def train(config: Config, steps: int) -> tuple[Trainer, list[dict[str, float]]]:
    """A trainer as train.py makes it, after some steps, and what it logged."""
    photographs = builders.open_photographs(config)
    info = builders.describe_dataset(config, photographs)
    sampler = builders.build_pose_sampler(config, photographs, builders.build_cameras(config, info))
    trainer = builders.build_trainer(config, info, sampler, FLOAT32, CPU)
    loader = make_loader(photographs, config.training.batch_size, nworkers=0, drop_last=True, seed=0)
    return trainer, [trainer.scalars_of(trainer.step(*batch)) for batch in islice(iter(loader), steps)]


def test_a_field_takes_fewer_than_thirty_lines():
    assert len((inspect.getsource(BallCodes) + inspect.getsource(Ball)).splitlines()) < 30


@pytest.mark.parametrize("overrides", [(), ("nerf.N_importance=4", "nerf.raw_noise_std=1")], ids=["", "importance"])
def test_a_new_field_learns_the_same_with_every_memory_strategy(read_config, overrides):
    dense, expected = train(read_config(*overrides, "training.memory_strategy=dense"), 2)
    assert isinstance(dense.generator.field, Ball)
    assert dense.generator.dim_z == 3
    start = Ball().state_dict()
    for name, value in dense.generator.field.state_dict().items():
        assert bool((value != start[name]).all()), name
    for strategy in ("checkpoint", "deferred"):
        keys = (f"training.memory_strategy={strategy}", "training.chunk=100")
        trainer, found = train(read_config(*overrides, *keys), 2)
        assert trainer.generator.strategy == strategy
        for row, other in zip(found, expected, strict=True):
            losses = [name for name in other if name.startswith(("loss", "grad_norm", "penalty"))]
            assert len(losses) == 5
            assert {name: row[name] for name in losses} == pytest.approx(
                {name: other[name] for name in losses}, rel=1e-4
            )
        for ours, theirs in ((trainer.generator, dense.generator), (trainer.discriminator, dense.discriminator)):
            assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_new_field_is_rendered_and_asked_for_its_density(read_config):
    config = read_config()
    info = builders.describe_dataset(config, builders.open_photographs(config))
    generator = builders.build_generator(config, info)
    with torch.no_grad():
        generator.field.raw_density.fill_(1.5)
    renderer = builders.build_renderer(config, info, FLOAT32, CPU, generator)
    density = functional.softplus(torch.tensor(1.5))
    points = functional.normalize(torch.randn(2, 40, 3), dim=-1) * torch.linspace(0, 1, 40)[:, None]
    inside = points.norm(dim=-1) < Ball.radius
    assert_close(renderer.density(points, seed=[0, 1]), torch.where(inside, density, 0.0))

    renders = renderer.sample(seed=[0, 1], num_samples=64)
    opacity = 1 - torch.exp(-density * 2 * Ball.radius)  # along a ray through the middle
    middle = (slice(None), slice(None), 16, 16)
    assert_close(renders.opacity[middle], opacity.expand(2, 1), rtol=0, atol=2e-3)
    colours = torch.tanh(0.3 * torch.cat([renderer.codes(seed, range(1)) for seed in (0, 1)]))
    assert_close(renders.rgb[middle], opacity * colours + (1 - opacity), rtol=0, atol=4e-3)  # on white
    assert bool((renders.opacity[..., 0, 0] == 0).all())
