"""Is what is learned still the same? `python -m benchmarks.fixed_seed_runs record FILE`, later `compare FILE`.

Short runs of configs/smoke.yaml with fixed seeds on the CPU, one for each way that a step can go, keep every statistic
of every step and every state tensor at the end. A change that only moves code leaves all of them equal to the last
bit; one that changes the order of a sum stays within 1e-12 with `--float64`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graf.app import builders
from graf.config import load_config
from graf.runtime.amp import Precision
from graf.runtime.device import configure_backends

SMOKE = Path(__file__).resolve().parents[1] / "configs" / "smoke.yaml"
CPU = torch.device("cpu")
SUPER_RESOLUTION = (
    *("ccsr.enabled=true", "ccsr.features=8", "ccsr.blocks=1", "ccsr.agreement=0.3", "data.imsize=16"),
    "ccsr.supervise_generator=0.5",
)
#: name -> overrides of configs/smoke.yaml
RUNS: dict[str, tuple[str, ...]] = {
    "smoke": (),
    "super-resolution": SUPER_RESOLUTION,
    "micro-batches of 1, checkpoint": ("training.micro_batch_size=1", "training.memory_strategy=checkpoint"),
    "deferred, super-resolution": (
        *SUPER_RESOLUTION,
        *("training.micro_batch_size=1", "training.memory_strategy=deferred", "training.chunk=100"),
    ),
    "share_fakes": ("training.share_fakes=true",),
    "importance samples, density noise": ("nerf.N_importance=4", "nerf.raw_noise_std=1", "training.chunk=200"),
    "bfloat16": ("training.use_amp=true",),
    "class loss, augmentation, lazy R1": (
        *("discriminator.class_loss=1", "discriminator.spectral_norm=true", "training.reg_every=4"),
        "discriminator.augment={colour: 0.2, translation: 0.1, cutout: 0.2}",
    ),
    "WGAN-GP": ("training.gan_type=wgan", "training.reg_type=wgangp", "training.optimizer=adam"),
}


def train(overrides: tuple[str, ...], folder: Path, steps: int, float64: bool) -> dict[str, Any]:
    """Statistics of every step and the state after the last one, of configs/smoke.yaml with these overrides."""
    config = load_config(SMOKE, [f"data.datadir={folder}/{len(overrides)}", "training.batch_size=4", *overrides])
    photographs = builders.open_photographs(config)
    dataset_info = builders.describe_dataset(config, photographs)
    pose_sampler = builders.build_pose_sampler(config, photographs, builders.build_cameras(config, dataset_info))
    precision = Precision("cpu", torch.bfloat16 if config.training.use_amp else None)
    trainer = builders.build_trainer(config, dataset_info, pose_sampler, precision, CPU)
    if float64:
        make_float64(trainer)
    loader = builders.build_loader(config, photographs)
    statistics = []
    for images, labels in islice(loader, steps):
        terms = trainer.step(images.double() if float64 else images, labels)
        statistics.append({name: float(value) for name, value in terms.items()})
    return {"statistics": statistics, "state": flatten({k: v.state_dict() for k, v in trainer.state.items()})}


def make_float64(trainer: Any) -> None:
    """Let a trainer compute in float64, from the same random numbers."""
    for player in trainer.players:
        player.network.double()
    for average in (trainer.average, trainer.sr_average):
        if average is not None:
            average.module.double()
    trainer.inputs = Float64Inputs(trainer.inputs)


class Float64Inputs:
    """A trainer's inputs with every number in float64."""

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs

    def draw(self, *arguments: Any) -> Any:
        return self.inputs.draw(*arguments).map(lambda part: part.double() if part.is_floating_point() else part)


def flatten(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a nested state, by their place."""
    if isinstance(value, Tensor):
        return {prefix: value.detach().clone()}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found: dict[str, Tensor] = {}
    for key, item in pairs:
        found |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def largest_difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[float, float, list[str]]:
    """The largest relative difference of a statistic and of a state tensor, and what stands on one side only."""
    missing = sorted(old["state"].keys() ^ new["state"].keys())
    scalars, tensors = [0.0], [0.0]
    for before, after in zip(old["statistics"], new["statistics"], strict=True):
        missing += sorted(before.keys() ^ after.keys())
        scalars += [_relative(torch.tensor(before[k]), torch.tensor(after[k])) for k in before.keys() & after.keys()]
    for name in old["state"].keys() & new["state"].keys():
        tensors.append(_relative(old["state"][name], new["state"][name]))
    return max(scalars), max(tensors), sorted(set(missing))


def _relative(a: Tensor, b: Tensor) -> float:
    if torch.equal(a, b) or not a.numel():
        return 0.0
    return float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-30))


def main() -> int:
    """Record the runs into a file, or compare them with what a file holds; exit code 1 where they differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path, help="where the runs are kept")
    parser.add_argument("--float64", action="store_true", help="compute in float64, and allow differences of 1e-12")
    parser.add_argument("--steps", type=int, default=30, help="steps of each run (default: %(default)s)")
    options = parser.parse_args()
    configure_backends(CPU)
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: train(overrides, Path(folder), options.steps, options.float64)
            for name, overrides in RUNS.items()
            if not (options.float64 and "training.use_amp=true" in overrides)
        }
    if options.action == "record":
        torch.save(runs, options.file)
        print(f"{len(runs)} runs of {options.steps} steps: {options.file}")
        return 0
    recorded, worst = torch.load(options.file, weights_only=True), 0.0
    for name, run in runs.items():
        scalars, tensors, missing = largest_difference(recorded[name], run)
        count = len(recorded[name]["state"])
        text = f"statistics {scalars:.3g}, {count} state tensors {tensors:.3g}"
        print(f"{name:<36} largest relative difference: {text}{f'; only on one side: {missing}' if missing else ''}")
        worst = max(worst, scalars, tensors)
    return int(worst > (1e-12 if options.float64 else 0.0))


if __name__ == "__main__":
    sys.exit(main())
