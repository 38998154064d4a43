"""Where the time of training steps goes, by phase and by class of operator, as torch's profiler sees it.

Regions (graf.runtime.regions) name the phases; operator_classes.py says what an operator is. Seconds are an operator's
own, without those of operators that it calls, so that they add up to the step. The profiler takes time itself, about a
microsecond for each operator, most of which appears between operators: trust shares more than seconds.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from graf.base.files import replace_file
from graf.runtime import operator_classes as classes
from graf.runtime.regions import DATA, LOGGING, PREFIX, RANDOM_NUMBERS

#: the phase of what happens in a step outside of named ones
REST = "rest"
#: regions whose inside counts towards one class, whatever operators it calls; "ema" is a phase of the trainer
_REGION_CLASSES = {
    RANDOM_NUMBERS: classes.RANDOM,
    DATA: classes.DATA,
    LOGGING: classes.LOGGING,
    "ema": classes.AVERAGE,
}
#: what torch itself names: an iteration of the profiler, and what an optimiser does
_STEP, _OPTIMISER = "ProfilerStep", "Optimizer."
#: calls by which the host waits for a GPU, and by which it starts kernels there
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "hipStreamSynchronize")
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "hipLaunchKernel", "hipExtLaunchKernel", "cudaGraphLaunch")


@dataclass
class Operator:
    """An operator's class, its own seconds and its calls, in one step."""

    kind: str
    seconds: float = 0.0
    calls: float = 0.0


@dataclass
class TimeSplit:
    """Where the time of the mean of `steps` steps has gone.

    seconds: of the step, with the profiler at work. parts: (phase, class) -> seconds; on a GPU those of its kernels,
    counted where they were launched, and what it has been idle. operators: by name. waits, launches: seconds that
    the host has waited for a GPU, and kernels that it has started there.
    """

    steps: int
    seconds: float = 0.0
    parts: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    operators: dict[str, Operator] = field(default_factory=dict)
    waits: float = 0.0
    launches: float = 0.0

    def by_phase(self) -> dict[str, float]:
        """Seconds by phase, the longest first."""
        return self._sum_over(0)

    def by_class(self) -> dict[str, float]:
        """Seconds by class of operator, the longest first."""
        return self._sum_over(1)

    def longest(self, count: int, kind: str | None = None) -> list[tuple[str, Operator]]:
        """The operators with most seconds of their own, of one class or of all."""
        own = [item for item in self.operators.items() if kind in (None, item[1].kind)]
        return sorted(own, key=lambda item: -item[1].seconds)[:count]

    def describe(self, count: int = 15) -> str:
        """Phases, classes and the first operators, as lines of text."""
        total = max(self.seconds, 1e-12)
        lines = [f"a step of {1000 * self.seconds:.1f} ms, the mean of {self.steps}, with the profiler at work"]
        for title, parts in (("phase", self.by_phase()), ("class", self.by_class())):
            lines += ["", f"{title:<24}{'ms':>10}{'share':>8}"]
            lines += [f"{name:<24}{1000 * value:>10.2f}{value / total:>8.1%}" for name, value in parts.items()]
        lines += ["", f"{'operator':<40}{'ms':>10}{'share':>8}{'calls':>8}  class"]
        lines += [
            f"{name[:39]:<40}{1000 * own.seconds:>10.2f}{own.seconds / total:>8.1%}{own.calls:>8.1f}  {own.kind}"
            for name, own in self.longest(count)
        ]
        if self.launches:
            lines += ["", f"{self.launches:.0f} launches; the host waits {1000 * self.waits:.2f} ms for the device"]
        return "\n".join(lines)

    def _sum_over(self, place: int) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for key, seconds in self.parts.items():
            found[key[place]] += seconds
        return dict(sorted(found.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class _Region:
    """A stretch of the host's time: its end, its phase, and the class of everything inside, if it has one."""

    end: float
    phase: str
    kind: str | None


def split_time(events: Iterable[Any], device_type: str = "cpu", count: int | None = None) -> TimeSplit:
    """Split the steps of a profile, or the first `count` of them; on a CPU the time of the thread that takes them.

    events: torch's FunctionEvents, in any order.
    """
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU and not event.is_async]
    host.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    steps = [event for event in host if event.name.startswith(_STEP)][:count]
    split = TimeSplit(steps=len(steps))
    if not steps:
        return split
    on_gpu, thread = device_type == "cuda", steps[0].thread
    split.seconds = sum(event.time_range.end - event.time_range.start for event in steps) * 1e-6 / split.steps
    open_regions: list[_Region] = []
    for event in host:
        if event.time_range.start >= steps[-1].time_range.end:
            break
        while open_regions and open_regions[-1].end <= event.time_range.start:
            open_regions.pop()
        opened = _open_region(event, open_regions[-1] if open_regions else None) if event.thread == thread else None
        if opened is not None:
            open_regions.append(opened)
        if open_regions and (on_gpu or event.thread == thread):
            _count(split, event, open_regions[-1], opened is not None, on_gpu)
    if on_gpu:
        split.parts[REST, classes.IDLE] += max(0.0, split.seconds - sum(split.parts.values()))
    return split


def _open_region(event: Any, outer: _Region | None) -> _Region | None:
    """The region that an event begins, inside of another one; None where it begins none, or lies outside of steps."""
    end = event.time_range.end
    if event.name.startswith(_STEP):
        return _Region(end, REST, None)
    if outer is None:
        return None
    if event.name.startswith(_OPTIMISER):
        return _Region(end, outer.phase, classes.OPTIMISER)
    if event.name.startswith(PREFIX):
        name = event.name.removeprefix(PREFIX)
        kind = _REGION_CLASSES.get(name, outer.kind)
        return _Region(end, outer.phase if name == RANDOM_NUMBERS else name, kind)
    return None


def _count(split: TimeSplit, event: Any, inside: _Region, is_region: bool, on_gpu: bool) -> None:
    """Add an event's own time to the parts."""
    own = event.self_cpu_time_total
    if on_gpu:  # what kineto draws below a region are not kernels of its own
        own = 0 if is_region else sum(kernel.duration for kernel in event.kernels)
    seconds = own * 1e-6 / split.steps
    kind = inside.kind or (classes.OVERHEAD if is_region else classes.classify(event.name))
    if seconds:
        split.parts[inside.phase, kind] += seconds
    if event.name.startswith(_WAITS):
        split.waits += event.self_cpu_time_total * 1e-6 / split.steps
    if event.name.startswith(_LAUNCHES):
        split.launches += 1 / split.steps
    if not is_region:
        operator = split.operators.setdefault(event.name, Operator(classes.classify(event.name)))
        operator.seconds += seconds
        operator.calls += 1 / split.steps


class StepProfiler:
    """Records some steps of a loop that calls :meth:`step` after each of them; a context manager.

    device: whose kernels are recorded besides the host's operators. warm_up: steps that are not recorded, at least one;
    steps: those that are. Then, or at the end of the context where there were fewer, `ready` is called with this
    profiler, not where the context fails; afterwards only the split is kept.
    """

    def __init__(
        self, device: torch.device, warm_up: int, steps: int, ready: Callable[[StepProfiler], None] | None = None
    ) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else libkineto writes about itself to stderr
        self.device = device
        self.split: TimeSplit | None = None
        self._ready = ready
        self._left_out = warm_up - 1
        self._recorded = -1  # the profiler's own warm-up is one step
        kinds = torch.profiler.ProfilerActivity
        self._profiler: torch.profiler.profile | None = torch.profiler.profile(
            activities=[kinds.CPU, *([kinds.CUDA] if device.type == "cuda" else [])],
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._finish,
        )

    def step(self) -> None:
        """A step has ended."""
        if self._left_out > 0:
            self._left_out -= 1
            if self._left_out == 0:
                self._start()
        elif self._profiler is not None:
            self._recorded += 1
            self._profiler.step()
            if self.split is not None:
                self._stop()

    def write_trace(self, path: Path) -> None:
        """Write what was recorded as JSON, for ui.perfetto.dev or chrome://tracing; some 250 bytes an event.

        To be called by `ready`: the record is large, and dropped then.
        """
        assert self._profiler is not None
        with replace_file(path) as file:
            self._profiler.export_chrome_trace(file.name)

    def _start(self) -> None:
        assert self._profiler is not None
        self._profiler.start()

    def _stop(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _finish(self, profiler: Any) -> None:
        self.split = split_time(profiler.events(), self.device.type, max(self._recorded, 0))
        if self._ready is not None:
            self._ready(self)

    def __enter__(self) -> StepProfiler:
        if self._left_out == 0:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._ready = None
        if self._left_out == 0:
            self._stop()
