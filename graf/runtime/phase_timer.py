"""How long the named phases of a program take, in seconds that add up to all of its time; what they compute, and what
memory they need, is none of its business."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch

from graf.runtime.regions import region

#: under which the time between phases is kept
REST = "rest"
#: stretches of time whose ends the device may not have reached yet, above which those that it has are added up
MOST_PENDING = 4096

Mark = TypeVar("Mark")


class Clock(Protocol[Mark]):
    """Marks in the course of a program, and the seconds between two of them."""

    def mark(self) -> Mark:
        """A mark at this place of the program."""

    def is_past(self, mark: Mark) -> bool:
        """Whether the program, or its device, has come to a mark; without waiting for it."""

    def seconds(self, start: Mark, end: Mark) -> float:
        """From one past mark to a later one."""


class ProgramClock:
    """The time at which the program gets somewhere; on a CPU that is when the work is done."""

    def mark(self) -> float:
        return time.perf_counter()

    def is_past(self, mark: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


class StreamClock:
    """The time at which a CUDA device gets somewhere: events in its current stream, which nobody waits for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def is_past(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1000


class PhaseTimer(Generic[Mark]):
    """Measures phases, which may be nested: time counts towards the innermost one alone, and between them as REST.

    :func:`make_timer` chooses the clock. With that of a CUDA stream a phase takes as long as the device takes to get
    from its start to its end, whether it computes or waits for the program, and what it has not reached yet is found
    the next time that somebody asks.
    """

    def __init__(self, clock: Clock[Mark]) -> None:
        self._clock = clock
        self._open = [REST]
        self._latest: Mark | None = None
        self._pending: deque[tuple[str, Mark, Mark]] = deque()
        self._totals: dict[str, float] = {}
        self._taken: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside is phase `name`; the first phase starts the clock."""
        self._mark()
        self._open.append(name)
        try:
            with region(name):
                yield
        finally:
            self._mark()
            self._open.pop()

    def totals(self) -> dict[str, float]:
        """Seconds of every phase until now, as far as the device has come; it is not waited for."""
        self._add_up()
        return dict(self._totals)

    def take(self) -> dict[str, float]:
        """Seconds of every phase since the last call."""
        totals = self.totals()
        taken, self._taken = self._taken, totals
        return {name: seconds - taken.get(name, 0.0) for name, seconds in totals.items()}

    def _mark(self) -> None:
        """The time since the latest mark was spent in the phase that is open."""
        mark = self._clock.mark()
        if self._latest is not None:
            self._pending.append((self._open[-1], self._latest, mark))
        self._latest = mark
        if len(self._pending) > MOST_PENDING:
            self._add_up()

    def _add_up(self) -> None:
        while self._pending and self._clock.is_past(self._pending[0][2]):
            name, start, end = self._pending.popleft()
            self._totals[name] = self._totals.get(name, 0.0) + self._clock.seconds(start, end)


def make_timer(device: torch.device) -> PhaseTimer[float] | PhaseTimer[torch.cuda.Event]:
    """A timer for work on a device; MPS is timed as a CPU, so that its work counts where it is waited for."""
    return PhaseTimer(StreamClock(device)) if device.type == "cuda" else PhaseTimer(ProgramClock())
