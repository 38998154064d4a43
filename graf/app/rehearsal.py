"""A training step that is run for its peaks of memory: on tensors without data, and of what repeats itself once.

Of many chunks of rays the first and last two are run and the others accounted for with what these have needed; of many
equal parts of a batch one is run. memory_estimator.py asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from graf.app.fake_tensors import FakeTensor
from graf.models.generator import Generator
from graf.runtime.activation_checkpointing import ChunkFunction
from graf.runtime.live_tensors import LiveTensorMeter, count_bytes, tensors_of
from graf.runtime.memory_profiler import MemoryProfiler
from graf.runtime.memory_settings import MemorySettings
from graf.training.inputs import FakeInputs, InputSampler, StepInputs
from graf.training.objective import Statistics
from graf.training.players import Player
from graf.training.trainer import Accumulate, Result, SharedRender, Trainer


@dataclass(frozen=True)
class PhasePeak:
    """Bytes at the peak of one phase. gradients: those that it leaves behind; rest: activations and what else lives."""

    peak: int
    weights: int
    gradients: int
    optimizer: int
    average: int

    @property
    def rest(self) -> int:
        return max(0, self.peak - self.weights - self.gradients - self.optimizer - self.average)


@dataclass
class FakeNoise:
    """Draws inputs whose ray noise is fake however few rays a chunk has: real numbers among fake ones count twice."""

    inputs: InputSampler

    def draw(self, *arguments: Any) -> StepInputs:
        step = self.inputs.draw(*arguments)
        fakes_d = None if step.fakes_d is None else self._replace_noise(step.fakes_d)
        return replace(step, fakes_g=self._replace_noise(step.fakes_g), fakes_d=fakes_d)

    def _replace_noise(self, fakes: FakeInputs) -> FakeInputs:
        return replace(fakes, noise=fakes.noise.map(FakeTensor.like))


# ---------------------------------------------------------------------------------------------------- equal chunks


@dataclass
class _Measured:
    """What a computed chunk needed: its rays, bytes above where it began, and those that it left, outputs too."""

    rays: int = 1
    peak: int = 0
    kept: int = 0

    def of(self, rays: int) -> _Measured:
        """What one of so many rays needs."""
        return _Measured(rays, self.peak * rays // self.rays, self.kept * rays // self.rays)


@dataclass
class FewChunks:
    """Runs the chunks of one rendering, forwards and, where they are recomputed, once more in the backward pass.

    The first and last two are computed; the others are accounted for with what these have needed for each ray. rays: of
    each chunk.
    """

    meter: LiveTensorMeter
    generator: Generator
    rays: Sequence[int]
    begun: int = 0
    started: int = 0
    started_at: int | None = None
    outer_peak: int = 0
    channels: list[int] = field(default_factory=list)
    last: list[_Measured] = field(default_factory=lambda: [_Measured(), _Measured()])

    @property
    def num_chunks(self) -> int:
        """How many there are."""
        return len(self.rays)

    def __call__(
        self, function: ChunkFunction, number: int, shared: tuple[Tensor, ...], parameters: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        keeps_graph = torch.is_grad_enabled() and self.generator.strategy == "dense"
        measured = self._begin(number)
        if measured is None:
            outputs = function(number, shared)
            self.channels = [output.shape[2] for output in outputs]
            return outputs
        self.meter.expect(measured.peak)
        kept = measured.kept if keeps_graph else 0
        sizes = [(1, self.rays[number], channels) for channels in self.channels]
        uncomputed: tuple[Tensor, ...] = _UncomputedChunk.apply(sizes, kept, *shared, *parameters)
        return uncomputed

    def _begin(self, number: int) -> _Measured | None:
        """Call where chunk `number` begins; returns what it will have needed, or None if it has to be computed."""
        direction = 0 if self.begun < self.num_chunks else 1
        if self.started_at is not None:  # here the previous chunk ends
            grown = self.meter.current - self.started_at
            self.last[direction] = _Measured(self.rays[self.started], self.meter.peak - self.started_at, grown)
            self.meter.peak = max(self.meter.peak, self.outer_peak)
            self.started_at = None
        self.begun += 1
        if self.begun in (self.num_chunks, 2 * self.num_chunks):
            return None  # the last one: what follows is no longer its own
        if 2 <= number < self.num_chunks - 2:
            return self.last[direction].of(self.rays[number])
        self.started = number
        self.started_at, self.outer_peak = self.meter.current, self.meter.peak
        self.meter.reset_peak()
        return None


class _UncomputedChunk(torch.autograd.Function):
    """Outputs and gradients of the right sizes, and `kept` bytes from the forward to the backward pass."""

    @staticmethod
    def forward(ctx: Any, sizes: Sequence[tuple[int, ...]], kept: int, *inputs: Tensor) -> Any:
        outputs = tuple(inputs[0].new_empty(size) for size in sizes)
        owned = 4 * sum(math.prod(size) for size in sizes)
        ctx.save_for_backward(*inputs, inputs[0].new_empty(max(0, kept - owned), dtype=torch.uint8))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        *inputs, _ = ctx.saved_tensors  # under checkpointing this computes the chunk again
        needed = ctx.needs_input_grad[2:]
        return None, None, *(torch.empty_like(x) if need else None for x, need in zip(inputs, needed, strict=True))


# ---------------------------------------------------------------------------------------------------- the step


class PhaseRecorder(MemoryProfiler):
    """Takes the place of the trainer's profiler: what lived at the peak of each phase."""

    def __init__(self, meter: LiveTensorMeter, trainer: Trainer) -> None:
        super().__init__(torch.device("cpu"))
        self._live = self.meter = meter
        self.trainer = trainer
        self.phases: dict[str, PhasePeak] = {}
        self.outside = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record what happens inside as phase `name`."""
        if not self._peaks:
            self.outside = max(self.outside, self.meter.peak)
        with super().phase(name):
            yield

    def record(self, name: str, peak: float) -> None:
        """Note `peak` bytes for phase `name`, and what of them is known to be there."""
        trainer = self.trainer
        networks = [player.network for player in trainer.players]
        parameters = [parameter for network in networks for parameter in network.parameters()]
        averages = [average.module for average in trainer.averages.values()]
        self.phases[name] = PhasePeak(
            peak=int(peak),
            weights=count_bytes([*parameters, *(buffer for network in networks for buffer in network.buffers())]),
            gradients=count_bytes([parameter.grad for parameter in parameters if parameter.grad is not None]),
            optimizer=count_bytes([state for player in trainer.players for state in tensors_of(player.optimizer)]),
            average=count_bytes([tensor for average in averages for tensor in tensors_of(average)]),
        )


class RehearsedTrainer(Trainer):
    """A trainer whose step is run for its peaks: of equal parts of a batch one, and nothing twice that needs the same.

    That one meets the gradients of a part before it, and the others' renders. Strategies differ where gradients flow
    through rendering: in the rendering that D and G share, and in G's phase; an update needs the same everywhere.
    """

    profiler: PhaseRecorder  # type: ignore[assignment]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        #: what a phase, and those within it, have needed: bytes above where it began
        self._known: dict[tuple[Any, ...], dict[str, int]] = {}
        self._other_renders: Tensor | None = None

    def rehearse(self, meter: LiveTensorMeter, memory: MemorySettings, labels: Tensor) -> dict[str, PhasePeak]:
        """The peaks of a step in which everything happens, which is iteration 0, on imagined photographs."""
        side = self.config.photo_size
        self.progress.iteration = 0
        self.use(memory)
        self.profiler = recorder = PhaseRecorder(meter, self)
        meter.reset_peak()
        self.step(torch.zeros(len(labels), 3, side, side), labels)
        recorder.record("update", max(recorder.outside, meter.peak))
        drop_gradients(self.players)
        return recorder.phases

    @property
    def _has_equal_parts(self) -> bool:
        return 2 * self.memory.micro_batch_size <= self.config.training.batch_size

    def _in_phase(self, name: str, inputs: StepInputs, shared: SharedRender, accumulate: Accumulate[Result]) -> Result:
        if name == "g" and self._has_equal_parts:
            self._other_renders = self._imagine_other_renders()
        key = self._describe_phase(name, shared)
        players = [player for player in self.players if player.suffix == name]
        if key in self._known:
            self._recall(self._known[key], players)
            result: Result = {}  # type: ignore[assignment]  # the statistics of D or of super-resolution
        else:
            result = self._rehearse_phase(name, inputs, shared, accumulate, players, key)
        if name == "sr" or self.sr is None:
            self._other_renders = None
        return result

    def _recall(self, known: dict[str, int], players: Sequence[Player]) -> None:
        """Take a phase for done."""
        started = self.profiler.meter.current
        leave_gradients(players)
        for name, above in known.items():
            self.profiler.record(name, started + above)

    def _rehearse_phase(
        self,
        name: str,
        inputs: StepInputs,
        shared: SharedRender,
        accumulate: Accumulate[Result],
        players: Sequence[Player],
        key: tuple[Any, ...] | None,
    ) -> Result:
        """Run a phase, on one part of the batch where there are equal ones; what it needs is known from then on."""

        def accumulate_one_part(inputs: StepInputs, parts: list[slice], shared: SharedRender) -> Result:
            if not self._has_equal_parts:
                return accumulate(inputs, parts, shared)
            leave_gradients(players)
            return accumulate(inputs, parts[:1], shared)

        phases, started = self.profiler.phases, self.profiler.meter.current
        before = set(phases)
        result = super()._in_phase(name, inputs, shared, accumulate_one_part)
        if key is not None:
            self._known[key] = {inner: phases[inner].peak - started for inner in phases.keys() - before}
        return result

    def _describe_phase(self, name: str, shared: SharedRender) -> tuple[Any, ...] | None:
        """What the needs of a phase depend on; None where that is all settings."""
        size, chunk = self.memory.micro_batch_size, self.memory.chunk
        if name == "d":
            return name, size, chunk if shared.render is None else None
        return (name, size) if name == "sr" else None

    def _imagine_other_renders(self) -> Tensor:
        """As large as colours, depth and opacity of the images that are not rehearsed, which wait for their part."""
        ccsr, training = self.config.ccsr, self.config.training
        views = 2 if ccsr.enabled and ccsr.agreement else 1
        count = training.batch_size - self.memory.micro_batch_size
        return torch.empty(count, 5 * views, self.config.ray_sampler.N_samples)

    def _apply(self, player: Player, statistics: Statistics) -> Statistics:
        recorder, key = self.profiler, ("update", player.suffix)
        if key in self._known:
            recorder.meter.expect(self._known[key]["update"])
            return statistics
        recorder.outside = max(recorder.outside, recorder.meter.peak)
        recorder.meter.reset_peak()
        started = recorder.meter.current
        statistics = super()._apply(player, statistics)
        self._known[key] = {"update": recorder.meter.peak - started}
        return statistics


def leave_gradients(players: Sequence[Player]) -> None:
    """Gradients for every parameter, as a step leaves them until the next one."""
    for player in players:
        for parameter in player.parameters:
            parameter.grad = torch.empty_like(parameter)


def drop_gradients(players: Sequence[Player]) -> None:
    """None for any parameter."""
    for player in players:
        player.optimizer.zero_grad(set_to_none=True)
