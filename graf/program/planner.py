"""Predicts the memory of a configuration and chooses the fastest settings that fit a budget.

The real networks, optimisers and trainer run one real step on fake tensors, which have shapes and no data
(torch's FakeTensorMode), while a LiveTensorMeter counts the bytes that they would hold. Nothing is allocated, so
neither photographs nor a GPU are needed. Small control tensors (labels, poses, an image's random numbers) are real,
since code branches on them. Of many equal chunks of rays the first and last two are run and the others accounted for
with what these have needed; of many equal parts of a batch, two are run.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import inception_v3

from graf.config import Config, ConfigError, parse_bytes
from graf.data.datasets import DEFAULT_V_LIST
from graf.data.shapes import CLASS_NAMES
from graf.data.views import PoseRanges, ViewPool
from graf.evaluation.extractor import OFFLINE, OFFLINE_DIMENSIONS, OfflineFeatures
from graf.evaluation.sampler import Sampler
from graf.geometry.rays import Rays
from graf.geometry.volume_rendering import RayColours, RayNoise, RaySampling
from graf.models.field import FieldCodes
from graf.models.generator import SMALLEST_CHUNK, Generator
from graf.program import assembly
from graf.program.assembly import Scene
from graf.runtime.amp import Precision
from graf.runtime.device import pick_device
from graf.runtime.live_tensors import LiveTensorMeter, count_bytes, tensors_of
from graf.runtime.logs import logger
from graf.runtime.memory import read_free_memory
from graf.runtime.phases import PhaseMeter
from graf.runtime.recompute import STRATEGIES
from graf.training.trainer import Trainer

GIB = 2**30
MIB = 2**20

#: added to the prediction: share of live tensors lost to the allocator's rounding and fragments, and MiB for context
#: and library workspaces. On the CPU the budget is one of live tensors, so nothing is added.
MARGINS = {"cpu": (0.0, 0.0), "cuda": (0.10, 600.0), "mps": (0.10, 400.0)}
#: share of the free memory that memory_budget=auto leaves to others
FREE_SHARE = 0.9
#: tensors up to this many elements are real
CONTROL_ELEMENTS = 4096
#: candidates whose estimate exceeds the budget by less than this factor are predicted
ESTIMATE_TOLERANCE = 1.03
#: what a chunk costs besides its rays, in rays: launches, page faults, partial matrix products
CHUNK_OVERHEAD_RAYS = 16
#: and what each part of a batch costs, in rays
PART_OVERHEAD_RAYS = 64

#: phases between steps
BETWEEN = ("sample", "score")
NAMES = {
    "render": "render (shared by D and G)",
    "d": "discriminator",
    "r1": "of it, gradient penalty (R1)",
    "g": "generator",
    "sr": "super-resolution (CCSR)",
    "ema": "EMA",
    "update": "optimiser steps",
    "sample": "sampling, eval",
    "score": "FID/KID",
}


class BudgetError(ConfigError):
    """No setting fits the budget, or the budget is not readable; the message says what is needed."""


@dataclass(frozen=True)
class Settings:
    """What a budget may change: images on the device at once, which activations are kept, rays rendered at once."""

    micro_batch_size: int
    strategy: str
    chunk: int

    def __str__(self) -> str:
        return f"micro_batch_size={self.micro_batch_size} memory_strategy={self.strategy} chunk={self.chunk}"


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

    settings: Settings
    phases: dict[str, PhasePeak]

    @property
    def peak(self) -> int:
        """Bytes of live tensors at the worst moment."""
        return max(phase.peak for phase in self.phases.values())

    def needed(self, device_type: str) -> int:
        """The peak with the device's margin."""
        return _with_margin(self.peak, device_type)


# ---------------------------------------------------------------------------------------------------- fake tensors


class _ControlTensors(TorchDispatchMode):
    """Sends large tensors to FakeTensorMode, computes small ones; asked for its value, a fake one says yes, or 1."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()
        self.fake_mode = fake_mode

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if FakeTensor in types:
            if func is torch.ops.aten._local_scalar_dense.default:
                return True if args[0].dtype is torch.bool else 1
            if kwargs.get("generator") is not None:  # filled in place with random numbers: nothing to do
                return args[0]
            return func(*args, **kwargs)
        if _is_large(func, args):
            with self.fake_mode:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _is_large(func: Any, args: Any) -> bool:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if tensors:
        return max(tensor.numel() for tensor in tensors) > CONTROL_ELEMENTS
    shape = args[0] if args and isinstance(args[0], (list, tuple, torch.Size)) else ()
    return all(isinstance(side, int) for side in shape) and math.prod(shape) > CONTROL_ELEMENTS


class _Rehearsal:
    """The modes of one prediction: `building` makes networks, `running` runs code on them under the meter."""

    def __init__(self) -> None:
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.meter = LiveTensorMeter()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Rehearsal:
        return self  # averaged copies of a network belong to the same prediction

    @contextmanager
    def building(self) -> Iterator[None]:
        with self.fake_mode, warnings.catch_warnings():
            # copy.deepcopy asks a fake parameter for its address, is told 0, and then clones it: as it should be
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield

    @contextmanager
    def running(self) -> Iterator[LiveTensorMeter]:
        with _ControlTensors(self.fake_mode), self.meter:
            yield self.meter


# ---------------------------------------------------------------------------------------------------- equal chunks


class _FewChunks(Generator):
    """A generator that computes the first and last two chunks and accounts for the others with what these needed."""

    rehearsal: _Rehearsal
    rendering: _Rendering

    @classmethod
    def adopt(cls, generator: Generator, rehearsal: _Rehearsal) -> _FewChunks:
        """Turn a generator into one of these."""
        generator.__class__ = cls
        generator.rehearsal = rehearsal  # type: ignore[assignment]
        assert isinstance(generator, cls)
        return generator

    def forward(
        self,
        z: Tensor,
        class_idx: Tensor,
        rays: Rays,
        noise: RayNoise | None = None,
        sampling: RaySampling | None = None,
    ) -> RayColours:
        step = max(1, self.chunk // len(z))
        one = copy.copy(self)  # the chunks of one rendering, and its backward pass, belong together
        object.__setattr__(one, "rendering", _Rendering(self.rehearsal.meter, step, -(-len(rays) // step)))
        return Generator.forward(one, z, class_idx, rays, noise, sampling)

    def _render(self, codes: FieldCodes, rays: Rays, noise: RayNoise, sampling: RaySampling) -> tuple[Tensor, ...]:
        rendering = self.rendering
        number = int(rays.near.storage_offset()) // rendering.step
        keeps_graph = torch.is_grad_enabled() and self.strategy == "dense"
        measured = rendering.begin(number)
        if measured is None:
            return super()._render(codes, rays, noise, sampling)
        self.rehearsal.meter.expect(measured.peak)
        shape = rays.near.shape
        sizes = ((*shape[:2], 3), tuple(shape), tuple(shape))
        if not torch.is_grad_enabled():
            return tuple(rays.near.new_empty(size) for size in sizes)
        outputs: tuple[Tensor, ...] = _UncomputedChunk.apply(
            sizes, measured.kept if keeps_graph else 0, *codes.tensors, *self.field.parameters(), self.background
        )
        return outputs


@dataclass
class _Measured:
    """What a computed chunk needed: bytes above where it began, and bytes that it left behind, its outputs included."""

    peak: int = 0
    kept: int = 0


@dataclass
class _Rendering:
    """The chunks of one rendering, first forwards, then, with recomputation, once more in the backward pass."""

    meter: LiveTensorMeter
    step: int
    num_chunks: int
    begun: int = 0
    started_at: int | None = None
    outer_peak: int = 0
    last: list[_Measured] = field(default_factory=lambda: [_Measured(), _Measured()])

    def begin(self, number: int) -> _Measured | None:
        """Call where chunk `number` begins; returns what it will have needed, or None if it has to be computed."""
        direction = 0 if self.begun < self.num_chunks else 1
        self._end_previous(direction if self.begun != self.num_chunks else 0)
        self.begun += 1
        if self.begun in (self.num_chunks, 2 * self.num_chunks):
            return None  # the last one: what follows is no longer its own
        if 2 <= number < self.num_chunks - 2:
            return self.last[direction]
        self.started_at, self.outer_peak = self.meter.current, self.meter.peak
        self.meter.reset_peak()
        return None

    def _end_previous(self, direction: int) -> None:
        if self.started_at is None:
            return
        grown = self.meter.current - self.started_at
        self.last[direction] = _Measured(self.meter.peak - self.started_at, grown)
        self.meter.peak = max(self.meter.peak, self.outer_peak)
        self.started_at = None


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


class PhaseRecorder(PhaseMeter):
    """Takes the place of the trainer's meter: what lived at the peak of each phase."""

    def __init__(self, meter: LiveTensorMeter, trainer: Trainer) -> None:
        super().__init__(torch.device("cpu"))
        self._live = self.meter = meter
        self.trainer = trainer
        self.phases: dict[str, PhasePeak] = {}
        self.outside = 0
        self.extra_renders = 0
        self._renders: Tensor | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record what happens inside as phase `name`."""
        if not self._peaks:
            self.outside = max(self.outside, self.meter.peak)
        if name == "g" and self.extra_renders:  # rgb, depth and opacity of images that are not rehearsed
            self._renders = torch.empty(self.extra_renders, 5, self.trainer.config.ray_sampler.N_samples)
        with super().phase(name):
            yield
        if name == "sr" or self.trainer.sr is None:
            self._renders = None

    def _record(self, name: str, peak: float) -> None:
        self.record(name, int(peak))

    def record(self, name: str, peak: int) -> None:
        """Note `peak` bytes for phase `name`, and what of them is known to be there."""
        trainer = self.trainer
        networks = [player.network for player in trainer.players]
        parameters = [parameter for network in networks for parameter in network.parameters()]
        averages = [average.module for average in (trainer.average, trainer.sr_average) if average is not None]
        self.phases[name] = PhasePeak(
            peak=peak,
            weights=count_bytes([*parameters, *(buffer for network in networks for buffer in network.buffers())]),
            gradients=count_bytes([parameter.grad for parameter in parameters if parameter.grad is not None]),
            optimizer=count_bytes([state for player in trainer.players for state in tensors_of(player.optimizer)]),
            average=count_bytes([tensor for average in averages for tensor in tensors_of(average)]),
        )


def imagine_scene(config: Config) -> Scene:
    """A scene without photographs: what the configuration knows, else one class, which hardly matters to memory."""
    data = config.data
    names = data.classes or (tuple(CLASS_NAMES) if data.type == "synthetic" else ("object",))
    return Scene(tuple(names), data.v_list or DEFAULT_V_LIST, data.fov, data.type != "image_folder")


class StepPlanner:
    """Predicts the peaks of one configuration under any settings; networks are built once."""

    def __init__(self, config: Config, scene: Scene | None = None, precision: Precision | None = None) -> None:
        # Everything that ever happens in a step shall happen in the one that is rehearsed, which is iteration 0.
        ccsr = config.ccsr.model_copy(update={"start_iteration": 0, "perceptual": 0.0, "weights": None})
        self.config = config.model_copy(update={"ccsr": ccsr})
        self.scene = imagine_scene(config) if scene is None else scene
        self.rehearsal = _Rehearsal()
        self._steps: dict[Settings, dict[str, PhasePeak]] = {}
        self._between: dict[tuple[str, int], PhasePeak] = {}
        dtype = torch.bfloat16 if config.training.use_amp else None
        # float16 needs as many bytes as bfloat16, and a CPU's autocast knows only the latter
        if precision is not None:
            dtype = None if precision.dtype is None else torch.bfloat16
        self.precision = Precision("cpu", dtype)
        labels = torch.tensor([(number, 0, 0) for number in range(len(self.scene.class_names))])
        cameras, data = assembly.build_cameras(self.config, self.scene), config.data
        ranges = PoseRanges(data.umin, data.umax, data.vmin, data.vmax, *data.radius_range)
        self.pool = ViewPool(labels, cameras, ranges=None if self.scene.poses_known else ranges)
        with self.rehearsal.building():
            self.trainer = self._build_trainer()
        with self.rehearsal.running() as meter:
            for player in self.trainer.players:
                meter.track(player.network)
            meter.track(*(a.module for a in (self.trainer.average, self.trainer.sr_average) if a is not None))
            for player in self.trainer.players:  # optimisers get their states in their first step
                for parameter in player.parameters:
                    parameter.grad = torch.empty_like(parameter)
                player.optimizer.step()
                player.optimizer.zero_grad(set_to_none=True)

    def _build_trainer(self) -> Trainer:
        config, scene = self.config, self.scene
        generator = assembly.build_generator(config, len(scene.class_names))
        return Trainer(
            config,
            _FewChunks.adopt(generator, self.rehearsal),
            assembly.build_discriminator(config, scene),
            assembly.build_caster(config, scene),
            self.pool,
            self.precision,
            torch.device("cpu"),
            assembly.build_ccsr(config, pretrained=False),
        )

    def predict(self, settings: Settings, between: bool = True) -> Plan:
        """The peaks of one step with these settings; `between`: also of sampling and scoring."""
        if settings not in self._steps:
            self._steps[settings] = self._predict_step(settings)
        more = self._predict_between(settings) if between else {}
        return Plan(settings, self._steps[settings] | more)

    def _predict_step(self, settings: Settings) -> dict[str, PhasePeak]:
        trainer, training = self.trainer, self.config.training
        trainer.progress.iteration = 0
        trainer.micro_batch_size = settings.micro_batch_size
        trainer.generator.strategy, trainer.generator.chunk = settings.strategy, settings.chunk
        with self.rehearsal.running() as meter:
            recorder = PhaseRecorder(meter, trainer)
            trainer.meter = recorder  # type: ignore[assignment]
            meter.reset_peak()
            side = self.config.photo_size
            images = torch.zeros(training.batch_size, 3, side, side)
            labels = self.pool.views.labels[torch.arange(training.batch_size) % len(self.pool)]
            # The second part of a batch meets the first one's gradients; further ones only add their renders.
            count = min(training.batch_size, 2 * settings.micro_batch_size)
            recorder.extra_renders = training.batch_size - count
            trainer.step(images[:count], labels[:count])
            recorder.record("update", max(recorder.outside, meter.peak))
            for player in trainer.players:
                player.optimizer.zero_grad(set_to_none=True)
        return recorder.phases

    def _predict_between(self, settings: Settings) -> dict[str, PhasePeak]:
        """Sampling depends on the chunk alone, scoring on nothing that a budget changes."""
        tasks = {"sample": (("sample", settings.chunk), self._sample)}
        if self.config.training.fid_every:
            tasks["score"] = (("score", 0), self._score)
        self.trainer.average.module.chunk = settings.chunk  # type: ignore[assignment]
        with self.rehearsal.running() as meter:
            for name, (key, task) in tasks.items():
                if key not in self._between:
                    recorder = PhaseRecorder(meter, self.trainer)
                    with recorder.phase(name):
                        task()
                    self._between[key] = recorder.phases[name]
        return {name: self._between[key] for name, (key, _) in tasks.items()}

    def _sample(self) -> None:
        generator, ccsr = self.trainer.averaged_networks
        sampler: Sampler = assembly.build_sampler(
            self.config, self.scene, self.precision, torch.device("cpu"), generator, ccsr
        )
        sampler.render_random(self.pool, 0, range(1), sharpen=ccsr is not None)  # the others are on the host

    def _score(self) -> None:
        """One batch through the feature extractor; Inception's layout is torchvision's, which needs no weights."""
        evaluation, side = self.config.evaluation, self.config.photo_size
        images = torch.empty(evaluation.batch_size, 3, side, side, dtype=torch.uint8)
        with torch.no_grad():
            if evaluation.feature_extractor == "offline":
                OfflineFeatures(OFFLINE, (str(OFFLINE_DIMENSIONS),))(images)
                return
            with self.rehearsal.fake_mode:
                network = inception_v3(weights=None, aux_logits=False, init_weights=False).eval()
            self.rehearsal.meter.track(network)
            network(nn.functional.interpolate(images.float(), (299, 299), mode="bilinear"))


def predict_step(
    config: Config, settings: Settings | None = None, scene: Scene | None = None, precision: Precision | None = None
) -> Plan:
    """The peaks of a configuration's step, by default with its own settings. Needs no photographs and no GPU."""
    planner = StepPlanner(config, scene, precision)
    return planner.predict(configured_settings(config) if settings is None else settings)


# ---------------------------------------------------------------------------------------------------- choice


def configured_settings(config: Config) -> Settings:
    """The settings of a configuration; what is `auto` takes what it means without a budget."""
    training = config.training
    return Settings(
        micro_batch_size=training.batch_size if training.micro_batch_size == "auto" else training.micro_batch_size,
        strategy="dense" if training.memory_strategy == "auto" else training.memory_strategy,
        chunk=training.rays_per_chunk,
    )


def relative_cost(config: Config, settings: Settings) -> float:
    """A simple model of a step's time: recomputation adds a forward pass (4/3), chunks and parts cost launches."""
    training = config.training
    rays = config.ray_sampler.N_samples
    size = min(settings.micro_batch_size, training.batch_size)
    parts = -(-training.batch_size // size)
    chunks = parts * -(-rays * size // _rays_at_once(config, settings))
    work = training.batch_size * rays + CHUNK_OVERHEAD_RAYS * chunks + PART_OVERHEAD_RAYS * parts
    passes = 3.0 if settings.strategy == "dense" else 4.0
    if not training.share_fakes or parts > 1:
        passes += 1  # D's fakes are rendered on their own
    return work * passes


def candidate_settings(config: Config) -> list[Settings]:
    """Everything that a budget may choose from, cheapest first: only what is `auto` varies."""
    training, own = config.training, configured_settings(config)
    sizes = range(training.batch_size, 0, -1) if training.micro_batch_size == "auto" else [own.micro_batch_size]
    strategies = STRATEGIES if training.memory_strategy == "auto" else (own.strategy,)
    chunks = [own.chunk]
    while training.chunk == "auto" and chunks[-1] > SMALLEST_CHUNK:  # 4096, 3072, 2048, 1536, ...
        chunks.append(chunks[-1] * 3 // 4 if chunks[-1] & (chunks[-1] - 1) == 0 else chunks[-1] * 2 // 3)
    found = [Settings(size, strategy, chunk) for strategy in strategies for size in sizes for chunk in chunks]
    return sorted(found, key=lambda settings: relative_cost(config, settings))


def choose_settings(planner: StepPlanner, budget: int, device_type: str) -> Plan:
    """The plan of the cheapest settings whose peak, with the device's margin, fits into `budget` bytes.

    Every peak grows about linearly with the micro-batch and the chunk, so three predictions per strategy tell which
    candidates are worth one of their own; only a predicted candidate is ever chosen. Raises BudgetError when nothing
    fits.
    """
    search = _Search(planner, budget, device_type)
    for settings in candidate_settings(planner.config):
        if search.estimate(settings) <= budget * ESTIMATE_TOLERANCE:
            plan = search.predict(settings)
            if plan.needed(device_type) <= budget:
                return plan
    smallest = min(search.plans.values(), key=lambda plan: plan.peak)
    worst = max(smallest.phases, key=lambda name: smallest.phases[name].peak)
    keys = {
        "score": "evaluation.batch_size or training.fid_every=0",
        "sample": "training.chunk, training.sample_objects or data.imsize",
    }.get(
        worst,
        "nerf.netwidth, nerf.N_samples or ray_sampler.N_samples; leave micro_batch_size, memory_strategy, chunk auto",
    )
    raise BudgetError(
        f"training.memory_budget: {format_bytes(budget)} is too little; the smallest settings ({smallest.settings}) "
        f"need {format_bytes(smallest.needed(device_type))}, for {NAMES[worst]}; lower {keys}; or raise the budget"
    )


class _Search:
    """Predictions made so far, and a plane through three of them for each strategy and phase."""

    def __init__(self, planner: StepPlanner, budget: int, device_type: str) -> None:
        self.planner, self.budget, self.device_type = planner, budget, device_type
        self.plans: dict[Settings, Plan] = {}
        self._planes: dict[str, dict[str, Tensor]] = {}

    def predict(self, settings: Settings) -> Plan:
        if settings not in self.plans:
            self.plans[settings] = self.planner.predict(settings)
        return self.plans[settings]

    def estimate(self, settings: Settings) -> float:
        """Bytes with margin."""
        if settings in self.plans:
            return self.plans[settings].needed(self.device_type)
        if settings.strategy not in self._planes:
            self._planes[settings.strategy] = self._fit(settings.strategy)
        where = torch.tensor(self._coordinates(settings), dtype=torch.float64)
        peak = max(float(where @ plane) for plane in self._planes[settings.strategy].values())
        return _with_margin(peak, self.device_type)

    def _fit(self, strategy: str) -> dict[str, Tensor]:
        candidates = [settings for settings in candidate_settings(self.planner.config) if settings.strategy == strategy]
        sizes = sorted({settings.micro_batch_size for settings in candidates})
        chunks = sorted({settings.chunk for settings in candidates})
        middle = sizes[(len(sizes) - 1) // 2]  # the whole batch is special with share_fakes
        corners = dict.fromkeys([(sizes[0], chunks[0]), (middle, chunks[0]), (middle, chunks[-1])])
        plans = [self.predict(Settings(size, strategy, chunk)) for size, chunk in corners]
        places = torch.tensor([self._coordinates(plan.settings) for plan in plans], dtype=torch.float64)
        inverse = torch.linalg.pinv(places)
        return {
            name: inverse @ torch.tensor([float(plan.phases[name].peak) for plan in plans], dtype=torch.float64)
            for name in plans[0].phases
        }

    def _coordinates(self, settings: Settings) -> tuple[float, float, float]:
        return 1.0, settings.micro_batch_size, _rays_at_once(self.planner.config, settings)


def _rays_at_once(config: Config, settings: Settings) -> int:
    return min(settings.chunk, config.ray_sampler.N_samples * settings.micro_batch_size)


def _with_margin(peak: float, device_type: str) -> int:
    share, fixed = MARGINS[device_type]
    return round(peak * (1 + share) + fixed * MIB)


def resolve_budget(text: str, device: torch.device) -> int:
    """Bytes of training.memory_budget; "auto": the device's free memory less a margin, BudgetError if unknown."""
    if text != "auto":
        return parse_bytes(text)
    free = read_free_memory(device)
    if free is None:
        raise BudgetError(
            f"training.memory_budget=auto: {device} does not tell what is free; name a budget, as in 8GiB"
        )
    return round(FREE_SHARE * free)


def apply_budget(config: Config, trainer: Trainer, scene: Scene, offline_features: bool) -> Plan | None:
    """Give a trainer what training.memory_budget asks for, and say so in one line; None without a budget."""
    if config.training.memory_budget is None:
        return None
    started = time.monotonic()
    device = trainer.device
    budget = resolve_budget(config.training.memory_budget, device)
    if offline_features:
        evaluation = config.evaluation.model_copy(update={"feature_extractor": "offline"})
        config = config.model_copy(update={"evaluation": evaluation})
    plan = choose_settings(StepPlanner(config, scene, trainer.game.precision), budget, device.type)
    trainer.micro_batch_size = plan.settings.micro_batch_size
    for generator in (trainer.generator, trainer.average.module):
        generator.strategy = plan.settings.strategy  # type: ignore[assignment]
        generator.chunk = plan.settings.chunk  # type: ignore[assignment]
    logger.info(
        "memory: %s, the fastest that fits training.memory_budget=%s (%s): %s predicted, %s (%.0f s)",
        plan.settings,
        config.training.memory_budget,
        format_bytes(budget),
        format_bytes(plan.peak),
        describe_margin(device.type),
        time.monotonic() - started,
    )
    return plan


# ---------------------------------------------------------------------------------------------------- text


def format_bytes(count: float) -> str:
    """MiB below 10 GiB, else GiB."""
    return f"{count / MIB:,.0f} MiB" if count < 10 * GIB else f"{count / GIB:,.1f} GiB"


def describe_margin(device_type: str) -> str:
    """What a prediction leaves out, and what is added for it."""
    share, fixed = MARGINS[device_type]
    if not share and not fixed:
        return "live tensors alone"
    return f"{share:.0%} + {fixed:.0f} MiB more for what is not seen"


def describe_plans(config: Config, device_type: str, budget: int | None) -> str:
    """What `train.py --plan` prints: the phases of the configured settings, alternatives, and what fits the budget."""
    planner, own = StepPlanner(config), configured_settings(config)
    plan = planner.predict(own)
    lines = [
        f"Predicted peak of live tensors, batch of {config.training.batch_size}, configured settings: {own}",
        "",
        _row("phase", "peak MiB", "weights", "gradients", "optimiser", "EMA", "activations, rest"),
    ]
    for name, phase in plan.phases.items():
        parts = (phase.peak, phase.weights, phase.gradients, phase.optimizer, phase.average, phase.rest)
        lines.append(_row(NAMES[name], *(f"{part / MIB:,.1f}" for part in parts)))
    lines += ["", _row("alternatives", "peak MiB", "rel. time"), *_describe_alternatives(config, planner, plan)]
    if budget is not None:
        chosen = choose_settings(planner, budget, device_type)
        lines += ["", f"fastest within {format_bytes(budget)}: {chosen.settings}, {format_bytes(chosen.peak)}"]
        lines[-1] += f" live, {format_bytes(chosen.needed(device_type))} with the margin for {device_type}"
    lines += ["", *_describe_limits(config, device_type)]
    return "\n".join(lines)


def print_plan(config: Config) -> None:
    """`python train.py --plan`; the margin is that of training.device, which need not be there."""
    request = config.training.device
    device = pick_device("auto") if request == "auto" else torch.device(request)
    text = config.training.memory_budget
    print(describe_plans(config, device.type, None if text is None else resolve_budget(text, device)))


def _describe_alternatives(config: Config, planner: StepPlanner, plan: Plan) -> list[str]:
    own, size = plan.settings, config.training.batch_size
    sizes = {size}
    while min(sizes) > 1:
        sizes.add(min(sizes) // 2)
    found = [Settings(part, strategy, own.chunk) for part in sorted(sizes, reverse=True) for strategy in STRATEGIES]
    found += [Settings(size, "checkpoint", max(SMALLEST_CHUNK, own.chunk // 4))]
    fastest = min(relative_cost(config, settings) for settings in found)
    lines = []
    for settings in found:
        phases = plan.phases if settings == own else planner.predict(settings, between=False).phases
        peak = max(phase.peak for name, phase in phases.items() if name not in BETWEEN)
        lines.append(_row(str(settings), f"{peak / MIB:,.1f}", f"{relative_cost(config, settings) / fastest:.2f}"))
    return [*lines, "(training alone; sampling, eval and FID/KID hardly change)"]


def _describe_limits(config: Config, device_type: str) -> list[str]:
    lines = [
        "Not seen: workspaces of libraries, the device's context, fragmentation, meshes, cached photographs. "
        f"Margin for {device_type}: {describe_margin(device_type)}."
    ]
    if config.training.fid_every and config.evaluation.feature_extractor != "offline":
        lines.append("FID/KID: Inception is assumed; the offline extractor, where its weights are missing, needs less.")
    if config.ccsr.enabled and config.ccsr.perceptual:
        lines.append("ccsr.perceptual: LPIPS is not counted.")
    return lines


def _row(name: str, *columns: str) -> str:
    return f"{name:<62}" + "".join(
        f"{column:>12}" if index < 5 else f"{column:>20}" for index, column in enumerate(columns)
    )
