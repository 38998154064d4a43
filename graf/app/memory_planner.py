"""Chooses the fastest settings that fit a memory budget, and says in words what a configuration needs.

memory_estimator.py predicts what settings need; here they are compared, with a margin for what no prediction sees.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from graf.app import builders
from graf.app.builders import DatasetInfo
from graf.app.fake_tensors import PredictionError
from graf.app.memory_estimator import Plan, StepPlanner
from graf.config import Config, ConfigError, parse_bytes
from graf.geometry.rays import count_chunks, count_rays_at_once
from graf.runtime.activation_checkpointing import STRATEGIES
from graf.runtime.amp import choose_precision
from graf.runtime.compiler_stand_in import without_compiler
from graf.runtime.device import pick_device
from graf.runtime.logs import logger, warn_once
from graf.runtime.memory import MIB, read_usable_memory
from graf.runtime.memory_settings import SMALLEST_CHUNK, MemorySettings
from graf.training.trainer import Trainer

GIB = 2**30

#: added to the prediction: share of live tensors lost to the allocator's rounding and fragments, and MiB for context
#: and library workspaces. On the CPU the budget is one of live tensors, so nothing is added.
MARGINS = {"cpu": (0.0, 0.0), "cuda": (0.10, 600.0), "mps": (0.10, 400.0)}
#: share of the usable memory that memory_budget=auto takes; the rest is left to others
USABLE_SHARE = 0.9
#: candidates whose estimate exceeds the budget by less than this factor are predicted
ESTIMATE_TOLERANCE = 1.03
#: what a chunk costs besides its rays, in rays: launches, page faults, partial matrix products
CHUNK_OVERHEAD_RAYS = 16
#: and what each part of a batch costs, in rays
PART_OVERHEAD_RAYS = 64
#: points that have density at first, where noise decides; later they are fewer
OCCUPIED_SHARE = 0.5

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


def relative_cost(config: Config, settings: MemorySettings, device_type: str) -> float:
    """A simple model of a step's time: recomputation adds a forward pass (4/3), chunks and parts cost launches.

    Where points have no density there may be less to compute again, and no backward pass.
    """
    training = config.training
    rays = config.ray_sampler.N_samples
    size = min(settings.micro_batch_size, training.batch_size)
    parts = -(-training.batch_size // size)
    chunks = parts * count_chunks(size, rays, settings.chunk)
    work = training.batch_size * rays + CHUNK_OVERHEAD_RAYS * chunks + PART_OVERHEAD_RAYS * parts
    passes = 3.0 if settings.strategy == "dense" else 4.0
    if builders.gains_from_empty_points(config, device_type):
        if settings.strategy == "deferred":
            passes = 1 + 3 * OCCUPIED_SHARE
        elif config.nerf.field == "mlp":  # the field itself leaves them out (MLPField.forward_visible)
            passes -= 2 * (1 - OCCUPIED_SHARE)
    if not training.share_fakes or parts > 1:
        passes += 1  # D's fakes are rendered on their own
    return work * passes


def candidate_settings(config: Config, device_type: str) -> list[MemorySettings]:
    """Everything that a budget may choose from, cheapest first: only what is `auto` varies."""
    training, own = config.training, builders.build_memory_settings(config, device_type)
    sizes = range(training.batch_size, 0, -1) if training.micro_batch_size == "auto" else [own.micro_batch_size]
    strategies = STRATEGIES if training.memory_strategy == "auto" else (own.strategy,)
    chunks = [own.chunk]
    while training.chunk == "auto" and chunks[-1] > SMALLEST_CHUNK:  # halves, and three quarters between them
        chunks.append(chunks[-1] * 3 // 4 if chunks[-1] & (chunks[-1] - 1) == 0 else chunks[-1] * 2 // 3)
    found = [MemorySettings(size, strategy, chunk) for strategy in strategies for size in sizes for chunk in chunks]
    return sorted(found, key=lambda settings: relative_cost(config, settings, device_type))


def choose_settings(planner: StepPlanner, budget: int) -> Plan:
    """The plan of the cheapest settings whose peak, with the device's margin, fits into `budget` bytes.

    Every peak grows about linearly with the micro-batch and the chunk, so three predictions per strategy tell which
    candidates are worth one of their own; only a predicted candidate is ever chosen. Raises BudgetError if none fits.
    """
    search, device_type = _Search(planner, budget), planner.device_type
    for settings in candidate_settings(planner.config, device_type):
        if search.estimate(settings) <= budget * ESTIMATE_TOLERANCE:
            plan = search.predict(settings)
            if with_margin(plan.peak, device_type) <= budget:
                return plan
    smallest = min(search.plans.values(), key=lambda plan: plan.peak)
    worst = max(smallest.phases, key=lambda name: smallest.phases[name].peak)
    keys = {
        "score": "evaluation.batch_size or training.fid_every=0",
        "sample": "training.chunk, training.sample_objects or data.imsize",
        "sr": "ccsr.features, ccsr.blocks or ray_sampler.N_samples",
        "r1": "discriminator.ndf or ray_sampler.N_samples",
    }.get(
        worst,
        "nerf.netwidth, nerf.N_samples, discriminator.ndf or ray_sampler.N_samples; leave micro_batch_size, "
        "memory_strategy, chunk auto",
    )
    needed = format_bytes(with_margin(smallest.peak, device_type))
    raise BudgetError(
        f"training.memory_budget: {format_bytes(budget)} is too little; the smallest settings ({smallest.settings}) "
        f"need {needed}, for {NAMES[worst]}; lower {keys}; or raise the budget"
    )


class _Search:
    """Predictions made so far, and a plane through three of them for each strategy and phase."""

    def __init__(self, planner: StepPlanner, budget: int) -> None:
        self.planner, self.budget = planner, budget
        self.plans: dict[MemorySettings, Plan] = {}
        self._planes: dict[str, dict[str, Tensor]] = {}

    def predict(self, settings: MemorySettings) -> Plan:
        if settings not in self.plans:
            self.plans[settings] = self.planner.predict(settings)
        return self.plans[settings]

    def estimate(self, settings: MemorySettings) -> float:
        """Bytes with margin."""
        if settings in self.plans:
            return with_margin(self.plans[settings].peak, self.planner.device_type)
        if settings.strategy not in self._planes:
            self._planes[settings.strategy] = self._fit(settings.strategy)
        where = torch.tensor(self._coordinates(settings), dtype=torch.float64)
        peak = max(float(where @ plane) for plane in self._planes[settings.strategy].values())
        return with_margin(peak, self.planner.device_type)

    def _fit(self, strategy: str) -> dict[str, Tensor]:
        every = candidate_settings(self.planner.config, self.planner.device_type)
        candidates = [settings for settings in every if settings.strategy == strategy]
        sizes = sorted({settings.micro_batch_size for settings in candidates})
        chunks = sorted({settings.chunk for settings in candidates})
        middle = sizes[(len(sizes) - 1) // 2]  # the whole batch is special with share_fakes
        corners = dict.fromkeys([(sizes[0], chunks[0]), (middle, chunks[0]), (middle, chunks[-1])])
        plans = [self.predict(MemorySettings(size, strategy, chunk)) for size, chunk in corners]
        places = torch.tensor([self._coordinates(plan.settings) for plan in plans], dtype=torch.float64)
        inverse = torch.linalg.pinv(places)
        return {
            name: inverse @ torch.tensor([float(plan.phases[name].peak) for plan in plans], dtype=torch.float64)
            for name in plans[0].phases
        }

    def _coordinates(self, settings: MemorySettings) -> tuple[float, float, float]:
        return 1.0, settings.micro_batch_size, _rays_at_once(self.planner.config, settings)


def _rays_at_once(config: Config, settings: MemorySettings) -> int:
    return count_rays_at_once(settings.micro_batch_size, config.ray_sampler.N_samples, settings.chunk)


def with_margin(peak: float, device_type: str) -> int:
    """Bytes of a predicted peak on a device of that type, with what the prediction does not see."""
    share, fixed = MARGINS[device_type]
    return round(peak * (1 + share) + fixed * MIB)


def resolve_budget(text: str, device: torch.device, sharers: int = 1) -> int:
    """Bytes of training.memory_budget; "auto": most of the device's usable memory, BudgetError if unknown.

    sharers: processes on this machine, which have to make do with one memory where the device is no GPU of their own.
    """
    if text != "auto":
        return parse_bytes(text)
    usable = read_usable_memory(device)
    if usable is None:
        raise BudgetError(
            f"training.memory_budget=auto: {device} does not tell what is free; name a budget, as in 8GiB"
        )
    return round(USABLE_SHARE * usable / (1 if device.type == "cuda" else sharers))


def choose_for_budget(
    config: Config, trainer: Trainer, dataset_info: DatasetInfo, offline_features: bool
) -> MemorySettings:
    """What training.memory_budget, which has to be there, asks of each process; said in one line.

    Where nothing can be predicted the sizes stay, and are made smaller when memory runs out.
    """
    text = config.training.memory_budget
    assert text is not None
    share = trainer.processes.largest_share(config.training.batch_size)
    config = config.model_copy(update={"training": config.training.model_copy(update={"batch_size": share})})
    started = time.monotonic()
    device = trainer.device
    budget = resolve_budget(text, device, trainer.processes.local_size)
    if offline_features:
        evaluation = config.evaluation.model_copy(update={"feature_extractor": "offline"})
        config = config.model_copy(update={"evaluation": evaluation})
    try:
        plan = choose_settings(StepPlanner(config, dataset_info, trainer.objective.precision, device.type), budget)
    except PredictionError as error:
        warn_once(f"training.memory_budget={text} is not kept: {error}")
        return trainer.memory
    logger.info(
        "memory: %s, the fastest that fits training.memory_budget=%s (%s): %s predicted, %s (%.0f s)",
        plan.settings,
        text,
        format_bytes(budget),
        format_bytes(plan.peak),
        describe_margin(device.type),
        time.monotonic() - started,
    )
    return plan.settings


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
    training, own = config.training, builders.build_memory_settings(config, device_type)
    precision = None  # a GPU that need not be there is taken for one that has the type asked for
    if device_type == "cpu" or (device_type == "mps" and torch.backends.mps.is_available()):
        precision = choose_precision(training.use_amp, training.amp_dtype, torch.device(device_type))
    planner = StepPlanner(config, precision=precision, device_type=device_type)
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
        chosen = choose_settings(planner, budget)
        lines += ["", f"fastest within {format_bytes(budget)}: {chosen.settings}, {format_bytes(chosen.peak)}"]
        lines[-1] += f" live, {format_bytes(with_margin(chosen.peak, device_type))} with the margin for {device_type}"
    lines += ["", *_describe_limits(config, device_type)]
    return "\n".join(lines)


def print_plan(config: Config) -> None:
    """`python train.py --plan`; the margin is that of training.device, which has to be there for a budget of `auto`."""
    request, text = config.training.device, config.training.memory_budget
    device = pick_device(request) if "auto" in (request, text) else torch.device(request)
    with without_compiler():
        print(describe_plans(config, device.type, None if text is None else resolve_budget(text, device)))


def _describe_alternatives(config: Config, planner: StepPlanner, plan: Plan) -> list[str]:
    own, size = plan.settings, config.training.batch_size
    # peaks are about linear in what lies between
    sizes = sorted({size, own.micro_batch_size, max(1, size // 2), 1}, reverse=True)
    found = [MemorySettings(part, strategy, own.chunk) for part in sizes for strategy in STRATEGIES]
    found += [MemorySettings(size, "checkpoint", max(SMALLEST_CHUNK, own.chunk // 4))]
    costs = {settings: relative_cost(config, settings, planner.device_type) for settings in found}
    lines = []
    for settings in found:
        phases = plan.phases if settings == own else planner.predict(settings, between=False).phases
        peak = max(phase.peak for name, phase in phases.items() if name not in BETWEEN)
        lines.append(_row(str(settings), f"{peak / MIB:,.1f}", f"{costs[settings] / min(costs.values()):.2f}"))
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
    widths = (12, 12, 12, 12, 12, 20)
    return f"{name:<62}" + "".join(f"{column:>{width}}" for column, width in zip(columns, widths, strict=False))
