"""`graf train --lr_range_test`: which learning rates suit a configuration, found by short trials that leave no run.

It writes a plot and a table beside the run folders, and prints the key to set for each player.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from graf.app import builders, resuming
from graf.app.builders import DatasetInfo
from graf.app.loading import read_dataset_info, read_meta
from graf.app.memory_planner import choose_for_budget
from graf.app.runs import RunFolder, named_checkpoint, read_first
from graf.app.tuned_run import refuse_tuned
from graf.base.files import write_atomically
from graf.config import Config, ConfigError
from graf.data.datasets import PhotoDataset
from graf.evaluation.curves import Panel, draw_panels
from graf.evaluation.pictures import save_png
from graf.geometry.views import PoseSampler
from graf.runtime.amp import Precision, choose_precision
from graf.runtime.checkpoint import CheckpointError, restore
from graf.runtime.device import configure_backends, describe_device, pick_device
from graf.runtime.distributed import Launch
from graf.runtime.logs import logger, setup_console
from graf.runtime.memory import prepare_allocator
from graf.runtime.memory_settings import MemorySettings
from graf.training.lr_range import RangeTest, RateRange, measure_range
from graf.training.optim import batch_factor
from graf.training.players import RATE_KEYS, Player
from graf.training.trainer import Trainer

#: players by suffix, in the order in which they are told
PLAYERS = {"g": "generator", "d": "discriminator", "sr": "super-resolution"}


@dataclass(frozen=True)
class TrialStart:
    """Builds the trainer that every trial starts with: fresh networks, or those of the first readable checkpoint."""

    config: Config
    checkpoints: Sequence[Path]
    photographs: PhotoDataset
    info: DatasetInfo
    pose_sampler: PoseSampler
    precision: Precision
    device: torch.device
    trust: bool
    memory: MemorySettings | None = None

    def __call__(self) -> tuple[Trainer, Iterator[tuple[Any, ...]]]:
        """A trainer and its batches."""
        trainer = builders.build_trainer(
            self.config,
            self.info,
            self.pose_sampler,
            self.precision,
            self.device,
            pretrained=not self.checkpoints,
            trust=self.trust,
        )
        if self.checkpoints:
            file, checkpoint = read_first(self.checkpoints)
            restore(checkpoint, trainer.state, file)
            resuming.forget_sizes(self.config, trainer)
        if self.memory is not None:
            trainer.use(self.memory)
        iteration, pin_memory = trainer.progress.iteration, self.device.type == "cuda"
        return trainer, iter(builders.build_loader(self.config, self.photographs, iteration, pin_memory))

    def training_super_resolution(self) -> TrialStart:
        """The same start, from which every step trains super-resolution."""
        ccsr = self.config.ccsr.model_copy(update={"start_iteration": 0, "every": 1})
        return replace(self, config=self.config.model_copy(update={"ccsr": ccsr}))


def find_rates(config: Config, iterations: int, resume: str, accept_new_data: bool, trust: bool) -> None:
    """Try growing learning rates on each player in turn, so many iterations each, and say what came of it.

    resume: "none" starts with fresh networks, "auto" with the newest checkpoint of outdir/expname, anything else is the
    path of a checkpoint. The others are as for :func:`graf.app.training_run.train`.
    """
    if Launch.read(os.environ).size > 1:
        raise ConfigError("--lr_range_test: its trials are short and run in one process; start it without torchrun")
    setup_console()
    prepare_allocator()
    start = open_start(config, find_checkpoints(config, resume, trust), accept_new_data, trust)
    trainer, _ = start()
    tests = []
    for player in sorted(trainer.players, key=lambda player: list(PLAYERS).index(player.suffix)):
        own = start.training_super_resolution() if player.suffix == "sr" else start
        tests.append(measure_range(own, player.suffix, RateRange(iterations=iterations)))
        logger.info("%s", describe(tests[-1], player, trainer))
    plot, table = (config.run_folder.with_name(f"{config.expname}_lr_range{suffix}") for suffix in (".png", ".csv"))
    plot.parent.mkdir(parents=True, exist_ok=True)
    save_png(plot, draw_panels([_make_panel(test) for test in tests]))
    write_atomically(table, _write_table(tests))
    logger.info("plot: %s, table: %s", plot, table)


def find_checkpoints(config: Config, resume: str, trust: bool) -> list[Path]:
    """The checkpoints that `resume` means, of which the first readable one is taken; empty for fresh networks."""
    if resume == "none":
        return []
    if resume != "auto":
        return [named_checkpoint(resume, trust)]
    found = RunFolder(config.run_folder).newest_first()
    if not found:
        raise CheckpointError(f"--resume auto: {config.run_folder} has no checkpoint; leave it out for fresh networks")
    return found


def open_start(config: Config, checkpoints: list[Path], accept_new_data: bool, trust: bool) -> TrialStart:
    """Find device and photographs; raises what training with them would."""
    builders.check_field(config)
    training = config.training.model_copy(update={"nworkers": 0})  # workers would outlive a trial that ends early
    config = config.model_copy(update={"training": training})
    device = pick_device(training.device)
    configure_backends(device, training.deterministic)
    precision = choose_precision(training.use_amp, training.amp_dtype, device)
    logger.info("device: %s, %s", describe_device(device), precision.describe())
    photographs = builders.open_photographs(config)
    builders.check_batch_size(config, len(photographs))
    info = builders.describe_dataset(config, photographs)
    if checkpoints:
        file, checkpoint = read_first(checkpoints)
        meta = read_meta(checkpoint, file)
        refuse_tuned(meta, file)
        read_dataset_info(meta, file)
        resuming.check_photographs(photographs, info, meta, config, file, accept_new_data)
        logger.info("every trial starts from %s", file)
        checkpoints = [file]
    pose_sampler = builders.build_pose_sampler(config, photographs, builders.build_cameras(config, info))
    start = TrialStart(config, checkpoints, photographs, info, pose_sampler, precision, device, trust)
    if training.memory_budget is not None:
        trainer, _ = start()
        start = replace(start, memory=choose_for_budget(config, trainer, info, offline_features=False))
    return start


def describe(test: RangeTest, player: Player, trainer: Trainer) -> str:
    """What a test says of a player's rate, as the key to set; trainer: where it has started."""
    key = RATE_KEYS[test.suffix]
    if test.suggestion is None or test.useful is None:
        return (
            f"{PLAYERS[test.suffix]}: no rate has lowered {test.loss} below where it is without learning; keep {key}, "
            "or try more iterations"
        )
    # What is set is multiplied by the batch's factor and, where a run goes on, by what its schedule has come to.
    training, iteration = trainer.config.training, trainer.progress.iteration
    factor = batch_factor(training.scale_lr, training.batch_size, training.lr_batch_size)
    factor *= (player.schedule(iteration) or 1.0) if iteration else 1.0
    lowest, highest = (rate / factor for rate in test.useful)
    end = f"it diverged at {test.rates[-1] / factor:.2g}" if test.has_diverged else "no rate was too high for it"
    return (
        f"{PLAYERS[test.suffix]}: {key}={test.suggestion / factor:.2g}; rates from {lowest:.2g} to {highest:.2g} have "
        f"lowered {test.loss} by half of the most or more; {end}"
    )


def _make_panel(test: RangeTest) -> Panel:
    """The gain over the rates: each step's and the smoothed one, as far down as the largest gain is high."""
    smoothed = test.range.smooth(test.gains)
    curves = {"each step": test.gains, "smoothed": smoothed}
    marks = {} if test.suggestion is None else {f"suggestion {test.suggestion:.2g}": test.suggestion}
    return Panel(
        title=f"{PLAYERS[test.suffix]}: by how much its learning has lowered {test.loss}, over its learning rate",
        curves={name: list(zip(test.rates, gains, strict=True)) for name, gains in curves.items()},
        marks=marks,
        bottom=-max(smoothed) if max(smoothed) > 0 else None,
    )


def _write_table(tests: Sequence[RangeTest]) -> str:
    """Every step of every trial as CSV."""
    rows = ["player,learning_rate,loss,value,value_at_rest,smoothed_gain"]
    for test in tests:
        columns = (test.rates, test.losses, test.at_rest, test.range.smooth(test.gains))
        rows += [
            f"{PLAYERS[test.suffix]},{rate:.6g},{test.loss},{loss:.6g},{rest:.6g},{gain:.6g}"
            for rate, loss, rest, gain in zip(*columns, strict=True)
        ]
    return "\n".join(rows) + "\n"
