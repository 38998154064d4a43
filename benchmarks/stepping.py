"""What takes training steps for a benchmark, the program or the plain published loop, and the clock beside it."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.published_loop import PlainLoop
from graf.app import builders
from graf.app.hooks import LogHook
from graf.app.memory_estimator import imagine_dataset
from graf.config import Config
from graf.geometry.views import PoseSampler
from graf.runtime.amp import choose_precision
from graf.runtime.device import wait_for
from graf.runtime.host_allocator import free_as_usual
from graf.runtime.live_tensors import LiveTensorMeter
from graf.runtime.logs import RunLog
from graf.runtime.memory import MIB, CacheRelease, prepare_allocator, read_memory, reset_peak
from graf.training.trainer import CAMERAS_EVERY, Hook, Trainer


class Subject(Protocol):
    """Something that takes steps; period: after how many of them every kind of step has been taken.

    `prepare` is called where another one has taken steps in between.
    """

    batch: int
    period: int
    device: torch.device
    lines: float  # of the log in a step, of those that `run` writes if asked to

    def prepare(self) -> None: ...

    def run(self, steps: int, after_step: Callable[[], None], log: bool = False) -> None: ...

    def measure_peak(self, run: Callable[[], None]) -> float: ...


class Program:
    """A configuration's training, as `graf train` runs it, but for the wait after every step that timing takes."""

    def __init__(self, config: Config, device: torch.device, has_photographs: bool, stack: ExitStack) -> None:
        self.device, self.batch, self.period = device, config.training.batch_size, count_period(config)
        self.lines = 1 / config.training.print_every
        precision = choose_precision(config.training.use_amp, config.training.amp_dtype, device)
        self._batches: Iterator[tuple[Any, ...]]
        if has_photographs:
            photographs = builders.open_photographs(config)
            info = builders.describe_dataset(config, photographs)
            sampler = builders.build_pose_sampler(config, photographs, builders.build_cameras(config, info))
            self._batches = stack.enter_context(builders.open_batches(config, photographs, 0, device))
        else:
            info = imagine_dataset(config)
            labels = torch.tensor([(number % len(info.class_names), 0, 0, -1) for number in range(self.batch)])
            sampler = PoseSampler(labels, builders.build_cameras(config, info))
            self._batches = repeat((draw_noise(config), labels))
        every_step = config.training.model_copy(update={"print_every": 1})  # for who asks for lines at all
        config = config.model_copy(update={"training": every_step})
        self.trainer = builders.build_trainer(config, info, sampler, precision, device)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log = stack.enter_context(RunLog(folder, total=1, start=0, progress=False))
        self._log = LogHook(log, CacheRelease(config.training.empty_cache, device, self.trainer.timer))

    def prepare(self) -> None:
        """Memory is managed as by `graf train`."""
        prepare_allocator()

    def run(self, steps: int, after_step: Callable[[], None], log: bool = False) -> None:
        """Train for some steps, and call `after_step` after each of them; log: write a line of the log before that."""
        left = steps

        def count(trainer: Trainer, statistics: dict[str, Tensor]) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                trainer.stop_reason = "measured"
            after_step()

        self.trainer.stop_reason = None
        hooks: list[Hook] = [self._log, count] if log else [count]
        self.trainer.run(self._batches, hooks)

    def measure_peak(self, run: Callable[[], None]) -> float:
        """MiB at the peak of what `run` does."""
        with self.trainer.profiler.watch(*self.trainer.owners):
            run()
        worst = self.trainer.profiler.worst
        return math.nan if worst is None else worst[1]


class PublishedProgram:
    """The plain published loop."""

    period, lines = 1, 0.0

    def __init__(self, config: Config, device: torch.device) -> None:
        self.device, self.batch = device, config.training.batch_size
        self._loop = PlainLoop(config, device=device)

    def prepare(self) -> None:
        """Memory is managed as by a program that asks for nothing else."""
        free_as_usual()

    def run(self, steps: int, after_step: Callable[[], None], log: bool = False) -> None:
        """Train for some steps, and call `after_step` after each of them; it keeps no log."""
        for _ in range(steps):
            self._loop.step()
            after_step()

    def measure_peak(self, run: Callable[[], None]) -> float:
        """MiB at the peak of what `run` does."""
        if self.device.type == "cuda":
            reset_peak(self.device)
            run()
            return read_memory(self.device)["peak"]
        loop = self._loop
        with LiveTensorMeter() as meter:
            meter.track(loop.field, loop.average, loop.discriminator, loop.optimizer_g, loop.optimizer_d)
            run()
        return meter.peak / MIB


def count_period(config: Config) -> int:
    """Steps after which those with R1, super-resolution and moving cameras have met in every way."""
    training = config.training
    every = [training.reg_every if training.reg_type != "none" else 1, config.ccsr.every if config.ccsr.enabled else 1]
    return math.lcm(*every, CAMERAS_EVERY if config.data.refine_cameras else 1)


def draw_noise(config: Config) -> Tensor:
    """A batch of noise (B, 3, H, W)."""
    size, generator = config.photo_size, torch.Generator().manual_seed(0)
    return torch.rand(config.training.batch_size, 3, size, size, generator=generator) * 2 - 1


@dataclass
class Clock:
    """Wall and CPU seconds of steps, each read when the device has done its work."""

    device: torch.device
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    _last: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        """The next step begins now."""
        wait_for(self.device)
        self._last = time.perf_counter(), time.process_time()

    def __call__(self) -> None:
        """A step has ended, and the next one begins."""
        before = self._last
        self.start()
        self.seconds.append(self._last[0] - before[0])
        self.cpu_seconds.append(self._last[1] - before[1])


def mean_step(seconds: Sequence[float], period: int) -> float:
    """The mean over the kinds of steps of the median of each: of whole periods one behind the other."""
    return statistics.mean(statistics.median(seconds[kind::period]) for kind in range(period))


def do_nothing() -> None:
    """After steps whose time is not taken."""
