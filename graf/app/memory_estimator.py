"""Predicts the memory of a configuration's step by rehearsing it on tensors without data.

The real networks, optimisers and trainer run one real step on fake tensors, which have shapes and no data
(torch's FakeTensorMode), while a LiveTensorMeter counts the bytes that they would hold. Nothing is allocated, so
neither photographs nor a GPU are needed. Small control tensors (labels, poses, an image's random numbers) are real,
since code branches on them. Of many equal chunks of rays the first and last two are run and the others accounted for
with what these have needed; of many equal parts of a batch, two are run. memory_planner.py chooses what fits a budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from graf.app import builders
from graf.app.builders import DatasetInfo
from graf.app.fake_tensors import FakeTensorMode, Rehearsal
from graf.config import Config
from graf.data.datasets import DEFAULT_V_LIST
from graf.data.shapes import CLASS_NAMES
from graf.evaluation.consistency import ConsistencyTask, measure_ring
from graf.evaluation.extractor import OFFLINE_DIMENSIONS, OfflineFeatures
from graf.evaluation.grids import colour_showcase
from graf.evaluation.renderer import Renderer, Renders
from graf.evaluation.rings import Ring
from graf.evaluation.scoring import RENDER_BATCH
from graf.geometry.cameras import ring
from graf.geometry.rays import Patches
from graf.geometry.views import PoseRanges, PoseSampler
from graf.geometry.volume_rendering import Render
from graf.geometry.warping import SurfaceView
from graf.models.generator import Generator
from graf.runtime.activation_checkpointing import ChunkFunction
from graf.runtime.amp import Precision
from graf.runtime.live_tensors import LiveTensorMeter, count_bytes, tensors_of
from graf.runtime.memory_profiler import MemoryProfiler
from graf.runtime.memory_settings import MemorySettings
from graf.training.inputs import FakeInputs, InputSampler, StepInputs
from graf.training.objective import Statistics
from graf.training.players import Player
from graf.training.trainer import Accumulate, Result, SharedRender, Trainer

#: length of Inception's pooled features
INCEPTION_DIMENSIONS = 2048


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


@dataclass(frozen=True)
class Plan:
    """The predicted peaks of one step and of what happens between steps, bytes of live tensors, by phase."""

    settings: MemorySettings
    phases: dict[str, PhasePeak]

    @property
    def peak(self) -> int:
        """Bytes of live tensors at the worst moment."""
        return max(phase.peak for phase in self.phases.values())


@dataclass
class _FakeNoise:
    """Draws inputs whose ray noise is fake however few rays a chunk has: real numbers among fake ones count twice."""

    inputs: InputSampler
    fake_mode: FakeTensorMode

    def draw(self, *arguments: Any) -> StepInputs:
        step = self.inputs.draw(*arguments)
        fakes_d = None if step.fakes_d is None else self._replace_noise(step.fakes_d)
        return replace(step, fakes_g=self._replace_noise(step.fakes_g), fakes_d=fakes_d)

    def _replace_noise(self, fakes: FakeInputs) -> FakeInputs:
        return replace(fakes, noise=fakes.noise.map(self.fake_mode.from_tensor))


# ---------------------------------------------------------------------------------------------------- equal chunks


@dataclass
class _Measured:
    """What a computed chunk needed: bytes above where it began, and bytes that it left behind, its outputs included."""

    peak: int = 0
    kept: int = 0


@dataclass
class _FewChunks:
    """Runs the chunks of one rendering, forwards and, where they are recomputed, once more in the backward pass.

    The first and last two are computed; the others are accounted for with what these have needed.
    """

    meter: LiveTensorMeter
    generator: Generator
    num_chunks: int
    begun: int = 0
    started_at: int | None = None
    outer_peak: int = 0
    sizes: list[torch.Size] = field(default_factory=list)
    last: list[_Measured] = field(default_factory=lambda: [_Measured(), _Measured()])

    def __call__(
        self, function: ChunkFunction, number: int, shared: tuple[Tensor, ...], parameters: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        keeps_graph = torch.is_grad_enabled() and self.generator.strategy == "dense"
        measured = self._begin(number)
        if measured is None:
            outputs = function(number, shared)
            self.sizes = [output.shape for output in outputs]
            return outputs
        self.meter.expect(measured.peak)
        kept = measured.kept if keeps_graph else 0
        uncomputed: tuple[Tensor, ...] = _UncomputedChunk.apply(self.sizes, kept, *shared, *parameters)
        return uncomputed

    def _begin(self, number: int) -> _Measured | None:
        """Call where chunk `number` begins; returns what it will have needed, or None if it has to be computed."""
        direction = 0 if self.begun < self.num_chunks else 1
        if self.started_at is not None:  # here the previous chunk ends
            grown = self.meter.current - self.started_at
            self.last[direction] = _Measured(self.meter.peak - self.started_at, grown)
            self.meter.peak = max(self.meter.peak, self.outer_peak)
            self.started_at = None
        self.begun += 1
        if self.begun in (self.num_chunks, 2 * self.num_chunks):
            return None  # the last one: what follows is no longer its own
        if 2 <= number < self.num_chunks - 2:
            return self.last[direction]
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


# ---------------------------------------------------------------------------------------------------- prediction


class PhaseRecorder(MemoryProfiler):
    """Takes the place of the trainer's profiler: what lived at the peak of each phase."""

    def __init__(self, meter: LiveTensorMeter, trainer: Trainer) -> None:
        super().__init__(torch.device("cpu"))
        self._live = self.meter = meter
        self.trainer = trainer
        self.phases: dict[str, PhasePeak] = {}
        self.outside = 0
        self.unrendered = 0
        self._renders: Tensor | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record what happens inside as phase `name`."""
        if not self._peaks:
            self.outside = max(self.outside, self.meter.peak)
        if name == "g" and self.unrendered:  # rgb, depth and opacity of images that are not rehearsed
            ccsr = self.trainer.config.ccsr
            views = 2 if ccsr.enabled and ccsr.agreement else 1
            self._renders = torch.empty(self.unrendered, 5 * views, self.trainer.config.ray_sampler.N_samples)
        with super().phase(name):
            yield
        if name == "sr" or self.trainer.sr is None:
            self._renders = None

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

    That one meets the gradients of a part before it. Strategies differ where gradients flow through rendering: in the
    rendering that D and G share, and in G's phase; an update needs the same with all settings.
    """

    profiler: PhaseRecorder  # type: ignore[assignment]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        #: bytes above where it began, of a phase that is described and of those within it
        self._known: dict[tuple[Any, ...], dict[str, int]] = {}

    def rehearse(self, meter: LiveTensorMeter, memory: MemorySettings, labels: Tensor) -> dict[str, PhasePeak]:
        """The peaks of a step in which everything happens, which is iteration 0, on imagined photographs."""
        size, side = len(labels), self.config.photo_size
        self.progress.iteration = 0
        self.use(memory)
        self.profiler = recorder = PhaseRecorder(meter, self)
        recorder.unrendered = size - memory.micro_batch_size if self._has_equal_parts else 0
        meter.reset_peak()
        self.step(torch.zeros(size, 3, side, side), labels)
        recorder.record("update", max(recorder.outside, meter.peak))
        drop_gradients(self.players)
        return recorder.phases

    @property
    def _has_equal_parts(self) -> bool:
        return 2 * self.memory.micro_batch_size <= self.config.training.batch_size

    def _in_phase(self, name: str, inputs: StepInputs, shared: SharedRender, accumulate: Accumulate[Result]) -> Result:
        recorder, started = self.profiler, self.profiler.meter.current
        players = [player for player in self.players if player.suffix == name]
        key = self._describe_phase(name, shared)
        if key in self._known:
            leave_gradients(players)
            for phase, above in self._known[key].items():
                recorder.record(phase, started + above)
            return {}  # type: ignore[return-value]  # the statistics of D or of super-resolution

        def accumulate_one_part(inputs: StepInputs, parts: list[slice], shared: SharedRender) -> Result:
            if not self._has_equal_parts:
                return accumulate(inputs, parts, shared)
            leave_gradients(players)
            return accumulate(inputs, parts[:1], shared)

        before = set(recorder.phases)
        result = super()._in_phase(name, inputs, shared, accumulate_one_part)
        if key is not None:
            self._known[key] = {
                phase: found.peak - started for phase, found in recorder.phases.items() if phase not in before
            }
        return result

    def _describe_phase(self, name: str, shared: SharedRender) -> tuple[Any, ...] | None:
        """What the needs of a phase depend on; None where that is all settings."""
        size, chunk = self.memory.micro_batch_size, self.memory.chunk
        if name == "d":
            return name, size, chunk if shared.render is None else None
        return (name, size) if name == "sr" else None

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
    for player in players:
        player.optimizer.zero_grad(set_to_none=True)


def imagine_dataset(config: Config) -> DatasetInfo:
    """A data set without photographs: what the configuration knows, else one class, which hardly matters to memory."""
    data = config.data
    names = data.classes or (tuple(CLASS_NAMES) if data.type == "synthetic" else ("object",))
    return DatasetInfo(tuple(names), data.v_list or DEFAULT_V_LIST, data.fov, data.type != "image_folder")


class StepPlanner:
    """Predicts the peaks of one configuration under any settings; networks are built once.

    device_type: "cpu", "cuda" or "mps". Images that wait on the host take room beside the others on the CPU alone.
    """

    def __init__(
        self,
        config: Config,
        dataset_info: DatasetInfo | None = None,
        precision: Precision | None = None,
        device_type: str = "cpu",
    ) -> None:
        self.device_type = device_type
        # Whatever may happen in some step has to happen in the one that is rehearsed, which is iteration 0.
        ccsr = config.ccsr.model_copy(update={"start_iteration": 0, "perceptual": 0.0, "weights": None})
        self.config = config.model_copy(update={"ccsr": ccsr})
        self.dataset_info = imagine_dataset(config) if dataset_info is None else dataset_info
        self.rehearsal = Rehearsal()
        self._steps: dict[MemorySettings, dict[str, PhasePeak]] = {}
        self._between: dict[tuple[str, int], PhasePeak] = {}
        is_half = config.training.use_amp if precision is None else precision.dtype is not None
        # float16 needs as many bytes as bfloat16, and a CPU's autocast knows only the latter
        self.precision = Precision("cpu", torch.bfloat16 if is_half else None)
        labels = torch.tensor([(number, 0, 0, -1) for number in range(len(self.dataset_info.class_names))])
        cameras, data = builders.build_cameras(self.config, self.dataset_info), config.data
        ranges = PoseRanges(data.umin, data.umax, data.vmin, data.vmax, *data.radius_range)
        self.pose_sampler = PoseSampler(labels, cameras, ranges=None if self.dataset_info.poses_known else ranges)
        with self.rehearsal.building():
            self.trainer = self._build_trainer()
        with self.rehearsal.running() as meter:
            meter.track(*self.trainer.owners)
            leave_gradients(self.trainer.players)
            for player in self.trainer.players:  # optimisers get their states in their first step
                player.optimizer.step()
            drop_gradients(self.trainer.players)

    def _build_trainer(self) -> RehearsedTrainer:
        trainer = builders.build_trainer(
            self.config,
            self.dataset_info,
            self.pose_sampler,
            self.precision,
            torch.device("cpu"),
            pretrained=False,
            kind=RehearsedTrainer,
        )
        assert isinstance(trainer, RehearsedTrainer)
        trainer.inputs = _FakeNoise(trainer.inputs, self.rehearsal.fake_mode)  # type: ignore[assignment]
        for generator in (trainer.generator, trainer.averaged_networks[0]):
            generator.make_runner = partial(_FewChunks, self.rehearsal.meter, generator)
        return trainer

    def predict(self, settings: MemorySettings, between: bool = True) -> Plan:
        """The peaks of one step with these settings; `between`: also of sampling and scoring."""
        rays = settings.micro_batch_size * self.config.ray_sampler.N_samples
        key = replace(settings, chunk=min(settings.chunk, rays))  # larger ones render alike
        if key not in self._steps:
            sampler, numbers = self.pose_sampler, torch.arange(self.config.training.batch_size)
            with self.rehearsal.running() as meter:
                self._steps[key] = self.trainer.rehearse(meter, key, sampler.views.labels[numbers % len(sampler)])
        more = self._predict_between(settings) if between else {}
        return Plan(settings, self._steps[key] | more)

    def _predict_between(self, settings: MemorySettings) -> dict[str, PhasePeak]:
        """Sampling depends on the chunk alone, scoring, but for its renders, on nothing that a budget changes."""
        tasks = {"sample": (("sample", settings.chunk), self._sample)}
        if self.config.training.fid_every:
            tasks["score"] = (("score", 0), self._score)
        self.trainer.use(settings)
        with self.rehearsal.running() as meter:
            leave_gradients(self.trainer.players)
            for name, (key, task) in tasks.items():
                if key not in self._between:
                    recorder = PhaseRecorder(meter, self.trainer)
                    with recorder.phase(name):
                        task()
                    self._between[key] = recorder.phases[name]
            drop_gradients(self.trainer.players)
        return {name: self._between[key] for name, (key, _) in tasks.items()}

    def _sample(self) -> None:
        """One image for a grid or a score, beside what waits meanwhile; on the CPU also a grid's row being coloured."""
        generator, ccsr = self.trainer.averaged_networks
        renderer: Renderer = builders.build_renderer(
            self.config, self.dataset_info, self.precision, torch.device("cpu"), generator, ccsr
        )
        waiting = self._reserve(max(self._waiting()))
        renderer.render_random(self.pose_sampler, 0, range(1), super_resolve=ccsr is not None)
        del waiting
        if self.device_type == "cpu":
            training = self.config.training
            done = self._reserve((training.sample_objects - 1) * self.config.data.num_views * self._bytes_drawn)
            colour_showcase(self._imagine_renders(self.config.data.num_views), 0.0, 1.0)
            del done

    def _waiting(self) -> list[int]:
        """Bytes in use while the last image of a grid, of a batch to score, of a ring of views is rendered.

        On the CPU the others of its kind wait there too; scoring keeps the extractor, and on the CPU features.
        """
        training, columns, on_host = self.config.training, self.config.data.num_views, self.device_type == "cpu"
        others = (columns - 1) * self._bytes_rendered + (training.sample_objects - 1) * columns * self._bytes_drawn
        found = [others if on_host else 0]
        if training.fid_every:
            batch = self.config.evaluation.batch_size * 3 * self.config.photo_size**2
            others = (RENDER_BATCH - 1) * self._bytes_rendered + batch + self._bytes_of_features
            found.append(self._bytes_of_extractor + (others if on_host else 0))
            if self.config.ccsr.enabled and on_host:
                found.append((ConsistencyTask.num_views - 1) * self._bytes_rendered)
        return found

    @property
    def _bytes_of_features(self) -> int:
        """Of all images; of photographs as many are assumed as images are generated."""
        evaluation = self.config.evaluation
        dimensions = OFFLINE_DIMENSIONS if evaluation.feature_extractor == "offline" else INCEPTION_DIMENSIONS
        return 2 * evaluation.num_images * dimensions * 4

    @cached_property
    def _bytes_of_extractor(self) -> int:
        return count_bytes(self._build_extractor().state_dict().values())

    def _build_extractor(self) -> nn.Module:
        """The extractor of FID and KID. Inception's layout is torchvision's, of which no weights are needed."""
        if self.config.evaluation.feature_extractor == "offline":
            return OfflineFeatures()
        from torchvision.models import inception_v3  # which takes a second to import

        with torch.device("meta"):  # nothing in it needs to be told from real tensors, as fake ones are
            return inception_v3(weights=None, aux_logits=False, init_weights=False).eval()

    @property
    def _bytes_rendered(self) -> int:
        """Of one image with depth and opacity, and of its super-resolution."""
        fine = self.config.photo_size if self.config.ccsr.enabled else 0
        return 4 * (5 * self.config.data.imsize**2 + 3 * fine**2)

    @property
    def _bytes_drawn(self) -> int:
        """Of what a grid shows of one image."""
        fine = self.config.photo_size if self.config.ccsr.enabled else 0
        return 9 * self.config.data.imsize**2 + 6 * fine**2

    def _imagine_renders(self, count: int) -> Renders:
        side, fine = self.config.data.imsize, self.config.photo_size
        sr = torch.empty(count, 3, fine, fine) if self.config.ccsr.enabled else None
        plane = (count, 1, side, side)
        return Renders(torch.empty(count, 3, side, side), torch.empty(plane), torch.empty(plane), sr)

    @staticmethod
    def _reserve(count: int) -> Tensor:
        """So many bytes that are in use for as long as the result is kept."""
        return torch.empty(count, dtype=torch.uint8)

    def _score(self) -> None:
        """One batch through the feature extractor; on the CPU also the consistency of a ring of views.

        There the features of all images and a few rendered ones wait too.
        """
        if self.device_type != "cpu":
            self._extract_features()
            return
        if self.config.ccsr.enabled:
            self._measure_ring()
        waiting = self._reserve(self._bytes_of_features + RENDER_BATCH * 3 * self.config.photo_size**2)
        self._extract_features()
        del waiting

    def _measure_ring(self) -> None:
        """Two views of a ring of super-resolved images with their truth, beside the others' images."""
        side, fine = self.config.data.imsize, self.config.photo_size
        # of a view: the render, the surface's depth, SR, the truth; made of it: bicubic and clipped SR
        bytes_of_view = self._bytes_rendered + 4 * (side**2 + 3 * fine**2 + 2 * side**2) + 4 * 2 * 3 * fine**2
        others = self._reserve((ConsistencyTask.num_views - 2) * bytes_of_view)
        renders, caster = self._imagine_renders(2), builders.build_caster(self.config, self.dataset_info)
        assert renders.sr is not None
        plane = (2, 1, side, side)
        truth = Render(torch.empty_like(renders.sr), torch.empty(plane), torch.empty(plane))
        poses = self.pose_sampler.cameras.views_at(torch.zeros(2).long(), *ring(2, 0.25)).poses
        surface = SurfaceView.from_render(renders, poses, Patches.whole(2), caster)
        ccsr = self.trainer.averaged_networks[1]
        assert ccsr is not None
        measure_ring(Ring(surface, renders.sr, truth), caster.intrinsics, down=ccsr.down)
        del others

    def _extract_features(self) -> None:
        evaluation, side = self.config.evaluation, self.config.photo_size
        extractor = self._build_extractor()
        self.rehearsal.meter.track(extractor)
        with torch.no_grad():
            if evaluation.feature_extractor == "offline":
                extractor(torch.empty(evaluation.batch_size, 3, side, side, dtype=torch.uint8))
                return
            images = torch.empty(evaluation.batch_size, 3, side, side, dtype=torch.uint8, device="meta")
            extractor(nn.functional.interpolate(images.float(), (299, 299), mode="bilinear"))
