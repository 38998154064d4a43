"""A trainer of configs/smoke.yaml with any keys overridden, and batches for it, without files or hooks."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graf.app import builders
from graf.config import Config, load_config
from graf.data.datasets import PhotoDataset
from graf.data.loader import make_loader
from graf.runtime.amp import Precision
from graf.runtime.distributed import Processes
from graf.training.trainer import Trainer

SMOKE = Path(__file__).resolve().parents[2] / "configs" / "smoke.yaml"
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the synthetic photographs of these tests are kept."""
    return tmp_path_factory.mktemp("toys")


@pytest.fixture(scope="session")
def smoke_config(toy_folder: Path) -> Callable[..., Config]:
    """configs/smoke.yaml with overrides."""
    return lambda *overrides: load_config(SMOKE, [f"data.datadir={toy_folder}", *overrides])


@pytest.fixture(scope="session")
def photographs(smoke_config: Callable[..., Config]) -> PhotoDataset:
    """The photographs that configs/smoke.yaml trains on: labels and poses known."""
    return builders.open_photographs(smoke_config())


@pytest.fixture
def make_trainer(smoke_config: Callable[..., Config], photographs: PhotoDataset) -> Callable[..., Trainer]:
    """Build the trainer of the smoke configuration with overrides, as train.py does; CCSR's latents are not zero."""

    def make(
        *overrides: str,
        data: PhotoDataset = photographs,
        precision: Precision | None = None,
        processes: Processes | None = None,
    ) -> Trainer:
        config = smoke_config(*overrides)
        dataset_info = builders.describe_dataset(config, data)
        ccsr = builders.build_ccsr(config, trust=True)
        if ccsr is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                for view in ccsr.latents.views:
                    nn.init.normal_(view, std=0.1)
        return Trainer(
            config,
            builders.build_memory_settings(config, "cpu"),
            builders.build_generator(config, dataset_info),
            builders.build_discriminator(config, dataset_info),
            builders.build_caster(config, dataset_info),
            builders.build_pose_sampler(config, data, builders.build_cameras(config, dataset_info)),
            precision or Precision("cpu", None),
            CPU,
            ccsr,
            processes,
        )

    return make


@pytest.fixture
def batches(photographs: PhotoDataset) -> Callable[..., Iterator[tuple[Tensor, Tensor]]]:
    """The batches of iterations start, start + 1, ..., `count` of them."""

    def make(
        count: int, start: int = 0, size: int = 2, data: PhotoDataset = photographs
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader = make_loader(data, size, nworkers=0, drop_last=True, seed=0, start_iteration=start)
        return islice(iter(loader), count)

    return make
