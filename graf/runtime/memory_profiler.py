"""What named phases of a program need of memory: the peak of each and what is in use at its end, MiB (2^20 bytes)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from graf.runtime.live_tensors import LiveTensorMeter
from graf.runtime.memory import MIB, read_memory, reset_peak


class MemoryProfiler:
    """Measures phases, which may be nested: what an inner one needs counts towards the outer one too.

    readings: phase -> quantity -> MiB. CUDA: `peak` and `allocated` (tensors), `peak_reserved` and `reserved` (what the
    allocator holds); MPS, which keeps no peak: `current` and `driver`; CPU: `live_peak` (tensors, in watched steps
    alone) and `rss` (of the process).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.readings: dict[str, dict[str, float]] = {}
        self._live: LiveTensorMeter | None = None
        self._memory: dict[str, float] = {}  # at the last reading
        self._peaks: list[float] = []  # so far, bytes, of the phases that are open, the outermost first
        self._inner: dict[str, float] = {}  # of the inner phases that have ended within the outermost one

    @contextmanager
    def watch(self, *owners: nn.Module | torch.optim.Optimizer | Tensor) -> Iterator[None]:
        """On the CPU follow every tensor inside, besides those of `owners`, which existed before.

        It looks at every operation, which costs time, so a training does it only for the steps that it reports.
        """
        if self.device.type != "cpu" or self._live is not None:
            yield
            return
        with LiveTensorMeter() as self._live:
            try:
                self._live.track(*owners)
                yield
            finally:
                self._live = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside as phase `name`; the largest counts where it happens often in an outer one."""
        if self._peaks:
            self._peaks[-1] = max(self._peaks[-1], self._read_peak())
        else:
            self._inner.clear()
        self._peaks.append(0.0)
        self._restart_peak()
        try:
            yield
        finally:
            peak = max(self._peaks.pop(), self._read_peak())
            if self._peaks:
                self._peaks[-1] = max(self._peaks[-1], peak)
                peak = self._inner[name] = max(self._inner.get(name, 0.0), peak)
            self.record(name, peak)
            self._restart_peak()

    def record(self, name: str, peak: float) -> None:
        """Take down the readings of phase `name`, which ends here and whose peak was so many bytes."""
        reading, memory = self.readings.setdefault(name, {}), self._memory
        if self.device.type == "cuda":
            reading |= memory | {"peak": peak / MIB}
        elif self.device.type == "mps":
            reading |= memory
        else:
            if self._live is not None:
                reading["live_peak"] = peak / MIB
            reading |= {key: value for key, value in memory.items() if key == "rss"}

    def forget(self, name: str) -> None:
        """Drop the readings of a phase that will not happen any more."""
        self.readings.pop(name, None)

    @property
    def worst(self) -> tuple[str, float] | None:
        """The phase with the largest peak and that peak, MiB; None where no peak is known."""
        peaks = [
            (name, reading[quantity])
            for name, reading in self.readings.items()
            for quantity in reading.keys() & {"peak", "live_peak"}
        ]
        return max(peaks, key=lambda phase: phase[1], default=None)

    def scalars(self) -> dict[str, float]:
        """All readings under the names of the log: memory_<phase>_<quantity>."""
        return {
            f"memory_{phase}_{quantity}": value
            for phase, reading in self.readings.items()
            for quantity, value in reading.items()
        }

    def _read_peak(self) -> float:
        """Bytes, since the last restart; CUDA's counts come all at once, so the others are kept for :meth:`record`."""
        self._memory = read_memory(self.device)
        return self._memory.get("peak", 0.0) * MIB if self._live is None else self._live.peak

    def _restart_peak(self) -> None:
        if self._live is not None:
            self._live.reset_peak()
        elif self.device.type == "cuda":
            reset_peak(self.device)
