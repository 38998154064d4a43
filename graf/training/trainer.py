"""The training loop: one step runs one way, from a batch of photographs to hooks that log, sample, score and save.

batch -> real patches; z, view -> rays -> fake patches -> D loss (+ gradient penalty) -> D step -> G loss -> G step ->
detached render -> CCSR loss -> CCSR step -> EMA -> hooks. Schedules are pure functions of the iteration; nothing
derived is written back. objective.py says what the players minimise, players.py how gradients are applied.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graf.config import Config
from graf.geometry.rays import RayCaster, annealed_min_scale
from graf.geometry.views import PoseSampler
from graf.models.ccsr import CCSR
from graf.models.discriminator import PatchDiscriminator
from graf.models.generator import Generator
from graf.runtime.amp import Precision
from graf.runtime.checkpoint import Stateful
from graf.runtime.memory import retry_smaller
from graf.runtime.memory_profiler import MemoryProfiler
from graf.runtime.randomness import Draws
from graf.training.augment import Augmentation
from graf.training.ema import ModelAverage, UpdateCounts
from graf.training.inputs import FakeInputs, InputSampler, RealInputs, StepSettings
from graf.training.losses import MCE_Loss
from graf.training.objective import GANObjective, LossSettings, RenderedPatches, SuperResolutionRules, Terms
from graf.training.optim import LearningRateSchedule, build_optimizer
from graf.training.perceptual import load_perceptual_distance
from graf.training.players import Player


@dataclass
class Progress:
    """How far a run has come: completed iterations, seconds spent training, and the best scores so far."""

    iteration: int = 0
    seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "seconds": self.seconds, "best": dict(self.best)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration, self.seconds = int(state["iteration"]), float(state["seconds"])
        self.best = dict(state["best"])


@dataclass(frozen=True)
class MicroBatch:
    """A part of the batch: photographs, labels, and the samples' numbers in the batch, on which their draws depend."""

    images: Tensor
    labels: Tensor
    indices: range

    def __len__(self) -> int:
        return len(self.indices)

    def split(self, size: int) -> list[MicroBatch]:
        """Parts of at most `size` samples."""
        bounds = [(start, min(start + size, len(self))) for start in range(0, len(self), size)]
        return [MicroBatch(self.images[a:b], self.labels[a:b], self.indices[a:b]) for a, b in bounds]


Result = TypeVar("Result")
#: what helps when memory is too small for one image in chunks of the fewest rays
ADVICE = (
    "lower ray_sampler.N_samples (rays per patch), nerf.N_samples (samples per ray), nerf.netwidth or "
    "discriminator.ndf; `--plan` shows what needs how much"
)
SR_ADVICE = (
    "lower ccsr.features, ccsr.blocks or ray_sampler.N_samples (rays per patch); `--plan` shows what needs how much"
)
#: called after every step with the trainer and the latest statistics (scalars, still on the device)
Hook = Callable[["Trainer", Terms], None]


class Trainer:
    """Trains a generator against a discriminator, and CCSR on its renders; what it does not own is passed in."""

    def __init__(
        self,
        config: Config,
        generator: Generator,
        discriminator: PatchDiscriminator,
        caster: RayCaster,
        pose_sampler: PoseSampler,
        precision: Precision,
        device: torch.device,
        ccsr: CCSR | None = None,
    ) -> None:
        self.config, self.device = config, device
        self.generator, self.discriminator, self.ccsr = generator, discriminator, ccsr
        training = config.training
        self.average = ModelAverage(generator, training.model_average_beta)
        self.g = self._make_player("generator", "g", generator, training.lr_g, precision)
        self.d = self._make_player("discriminator", "d", discriminator, training.lr_d, precision)
        self.sr = self.sr_average = None
        if ccsr is not None:
            self.sr_average = ModelAverage(ccsr, training.model_average_beta)
            self.sr = self._make_player("ccsr", "sr", ccsr, config.ccsr.lr, precision)
        self.objective = GANObjective(
            generator=generator,
            discriminator=discriminator,
            ccsr=ccsr,
            caster=caster,
            rules=_rules_of(config),
            patch_size=config.ray_sampler.patch_size,
            precision=precision,
            class_criterion=MCE_Loss(discriminator.shape.label_groups),
            perceptual=load_perceptual_distance(device) if ccsr is not None and config.ccsr.perceptual else None,
        )
        self.inputs = InputSampler(
            pose_sampler=pose_sampler,
            dim_z=generator.dim_z,
            uniform_z=config.z_dist.type == "uniform",
            patch_size=config.ray_sampler.patch_size,
            sampling=generator.sampling,
            jitter=config.nerf.jitter,
            hflip=config.discriminator.hflip,
            device=device,
        )
        size = training.micro_batch_size
        self.micro_batch_size = training.batch_size if size == "auto" else size
        self.profiler = MemoryProfiler(device)
        self._was_watched = False
        self._shared: RenderedPatches | None = None
        self.progress = Progress()
        self.stop_reason: str | None = None

    @property
    def state(self) -> dict[str, Stateful]:
        """Every stateful object by name: what a checkpoint holds."""
        averages = {"generator": self.average} | ({} if self.sr_average is None else {"ccsr": self.sr_average})
        state: dict[str, Stateful] = {"progress": self.progress, "averages": UpdateCounts(averages)}
        state |= {f"{name}_average": average.module for name, average in averages.items()}
        for player in self.players:
            state |= {
                player.name: player.network,
                f"optimizer_{player.suffix}": player.optimizer,
                f"scaler_{player.suffix}": player.scaler,
            }
        return state

    @property
    def averaged_networks(self) -> tuple[Generator, CCSR | None]:
        """Generator and CCSR with averaged weights: what samples and scores are made with."""
        ccsr = None if self.sr_average is None else self.sr_average.module
        return self.average.module, ccsr  # type: ignore[return-value]

    @property
    def players(self) -> list[Player]:
        """Discriminator, generator and, where there is one, CCSR."""
        return [self.d, self.g] + ([self.sr] if self.sr is not None else [])

    @property
    def owners(self) -> list[nn.Module | torch.optim.Optimizer]:
        """Everything that holds tensors from step to step."""
        averages = [average.module for average in (self.average, self.sr_average) if average is not None]
        players = self.players
        return [*(player.network for player in players), *(player.optimizer for player in players), *averages]

    @property
    def _by_suffix(self) -> dict[str, Player]:
        return {player.suffix: player for player in self.players}

    # ------------------------------------------------------------------------------------------------ the loop

    def run(self, batches: Iterator[tuple[Tensor, Tensor]], hooks: Sequence[Hook]) -> None:
        """Step until max_iterations, or until a hook or a signal sets `stop_reason`.

        Hooks get every statistic's latest value: some are not computed in every step.
        """
        latest: Terms = {}
        while self.progress.iteration < self.config.training.max_iterations and self.stop_reason is None:
            started = time.monotonic()
            images, labels = next(batches)
            latest |= self.step(images, labels)
            self.progress.seconds += time.monotonic() - started
            for hook in hooks:
                hook(self, latest)

    def step(self, images: Tensor, labels: Tensor) -> Terms:
        """One update of every player and of the averages, from photographs (B, 3, H, W) with labels (B, 3)."""
        if self._was_watched and self.progress.iteration % self.config.training.print_every:
            return self._step(images, labels)
        self._was_watched = True
        with self.profiler.watch(*self.owners):  # one step for every line of the log
            return self._step(images, labels)

    def _step(self, images: Tensor, labels: Tensor) -> Terms:
        iteration = self.progress.iteration
        batch = MicroBatch(images, labels, range(len(images)))
        for player in self.players:
            player.begin(iteration)
        self.discriminator.advance_spectral_norm()

        # With share_fakes one rendering serves both steps; in a split batch a part's graph cannot wait for the others.
        if self.config.training.share_fakes and self.micro_batch_size >= len(images):
            self._shared = self._in_phase("render", batch, self._render_shared)
        else:
            self.profiler.forget("render")
        statistics = self._in_phase("d", batch, self._accumulate_discriminator)
        statistics = self._apply(self.d, statistics)
        more, renders = self._in_phase("g", batch, self._accumulate_generator)
        statistics |= self._apply(self.g, more)
        self._shared = None
        if self.sr is not None and self._ccsr_is_due:
            more = self._in_phase("sr", batch, partial(self._accumulate_super_resolution, renders=renders))
            statistics |= self._apply(self.sr, more)
        del renders

        with self.profiler.phase("ema"):
            self.average.update(self.generator)
            if self.sr_average is not None and self.ccsr is not None and self._ccsr_is_due:
                self.sr_average.update(self.ccsr)
        self.progress.iteration = iteration + 1
        return statistics

    # ------------------------------------------------------------------------------------------------ the phases

    def _in_phase(self, name: str, batch: MicroBatch, accumulate: Callable[[list[MicroBatch]], Result]) -> Result:
        """Run one phase over the micro-batches of `batch`; when memory runs out, again with smaller ones.

        A phase only adds up gradients of its own player, so it is repeated from zeroed gradients with the same random
        numbers; updates that earlier phases of the step have made stay.
        """

        def run() -> Result:
            if name in self._by_suffix:
                self._by_suffix[name].optimizer.zero_grad(set_to_none=True)
            return accumulate(batch.split(self.micro_batch_size))

        with self.profiler.phase(name):
            advice = SR_ADVICE if name == "sr" else ADVICE
            return retry_smaller(run, lambda: self._shrink(name, len(batch)), self.device, advice)

    def _shrink(self, phase: str, batch_size: int) -> str | None:
        """Halve what is on the device at once: the micro-batch, then the rays of a chunk; None when nothing is left."""
        self._shared = None  # its graph is what takes the room; the phases render again without it
        size = min(self.micro_batch_size, batch_size)
        if size > 1:
            self.micro_batch_size = size // 2
            return f"phase {phase}: training.micro_batch_size {size} -> {self.micro_batch_size}"
        if phase == "sr":  # it renders nothing
            return None
        if self.generator.strategy == "dense":
            self.generator.strategy = "checkpoint"
            return f"phase {phase}: training.memory_strategy dense -> checkpoint"
        change = self.generator.halve_chunk()
        return None if change is None else f"phase {phase}: {change}"

    def _render_shared(self, parts: list[MicroBatch]) -> RenderedPatches | None:
        return self.objective.render_patches(self._draw_fakes(parts[0], "g")) if len(parts) == 1 else None

    def _accumulate_discriminator(self, parts: list[MicroBatch]) -> Terms:
        training, batch_size = self.config.training, sum(map(len, parts))
        penalty_is_due = training.reg_type != "none" and self.progress.iteration % training.reg_every == 0
        terms: Terms = {}
        for part in parts:
            reals = self._draw_reals(part)
            fakes = self._draw_fakes(part, "g" if training.share_fakes else "d")
            with torch.no_grad():
                shared = self._shared
                render = (self.objective.render_patches(fakes) if shared is None else shared.part(part.indices)).rgb
            losses = self.objective.discriminator_terms(reals, fakes, render, batch_size, self._ccsr_is_due)
            loss = losses["loss_d"]
            if "loss_d_class" in losses:
                loss = loss + self.config.discriminator.class_loss * losses["loss_d_class"]
            self.d.backward(loss)
            if penalty_is_due:
                with self.profiler.phase("r1"):
                    losses |= self.objective.penalty_terms(reals, render, batch_size, self.d.scaler, self._ccsr_is_due)
                    self.d.backward(training.reg_param * training.reg_every * losses["penalty"])
            _accumulate(terms, losses)
        return terms

    def _accumulate_generator(self, parts: list[MicroBatch]) -> tuple[Terms, dict[str, RenderedPatches]]:
        """The terms, and what super-resolution works on: the batch's renders, without their graph.

        "here" are the patches as D sees them; "there", where CCSR is due and uses them, the neighbouring views of the
        same generator, that is, before its update.
        """
        batch_size, terms = sum(map(len, parts)), Terms()
        renders: dict[str, list[RenderedPatches]] = {"here": []}
        with _frozen(self.discriminator):
            for part in parts:
                fakes = self._draw_fakes(part, "g")
                # The shared graph serves one backward pass over the whole batch; after a split each part renders again.
                reuse = self._shared is not None and len(parts) == 1
                render = self._shared if reuse and self._shared is not None else self.objective.render_patches(fakes)
                losses = self.objective.generator_terms(fakes, render.rgb, batch_size, self._ccsr_is_due)
                loss = losses["loss_g"]
                if "loss_g_class" in losses:
                    loss = loss + self.config.discriminator.class_loss * losses["loss_g_class"]
                if "loss_g_supervision" in losses:
                    loss = loss + self.config.ccsr.supervise_generator * losses["loss_g_supervision"]
                self.g.backward(loss)
                renders["here"].append(render.detach())
                if self._ccsr_is_due and self.config.ccsr.agreement:
                    renders.setdefault("there", []).append(self.objective.render_neighbours(fakes))
                _accumulate(terms, losses)
        return terms, {name: RenderedPatches.join(patches) for name, patches in renders.items()}

    def _accumulate_super_resolution(self, parts: list[MicroBatch], renders: dict[str, RenderedPatches]) -> Terms:
        iteration, ccsr, batch_size = self.progress.iteration, self.config.ccsr, sum(map(len, parts))
        assert self.sr is not None
        weights = {
            "loss_sr_consistency": consistency_weight(iteration, ccsr.alpha_init, ccsr.alpha_min, ccsr.alpha_decay),
            "loss_sr": ccsr.adversarial,
            "loss_sr_photographs": ccsr.photographs,
            "loss_sr_agreement": ccsr.agreement,
            "loss_sr_perceptual": ccsr.perceptual,
        }
        terms: Terms = {}
        with _frozen(self.discriminator):
            for part in parts:
                fakes = self._draw_fakes(part, "g")
                seen = {name: patches.part(part.indices) for name, patches in renders.items()}
                reals = self._draw_reals(part) if ccsr.photographs else None
                losses = self.objective.super_resolution_terms(
                    fakes, seen["here"], batch_size, seen.get("there"), reals
                )
                self.sr.backward(sum((weights[name] * value for name, value in losses.items()), torch.zeros(())))
                _accumulate(terms, losses)
        return terms

    def _apply(self, player: Player, terms: Terms) -> Terms:
        training = self.config.training
        return player.apply(terms, self.progress.iteration, training.grad_clip, training.grad_clip_at)

    # ----------------------------------------------------------------------------------------- inputs and schedules

    def settings_at(self, iteration: int) -> StepSettings:
        """Patch scales and density noise at an iteration."""
        rays, nerf = self.config.ray_sampler, self.config.nerf
        noise = nerf.raw_noise_std
        if nerf.decrease_noise:
            noise *= max(0.0, 1 - iteration / nerf.noise_iterations)
        min_scale = annealed_min_scale(iteration, rays.min_scale, rays.max_scale, rays.scale_anneal)
        return StepSettings(min_scale, rays.max_scale, noise)

    def scalars_of(self, statistics: Terms) -> dict[str, float]:
        """A step's statistics as floats (a wait for the device) together with the values of the schedules."""
        iteration = max(self.progress.iteration - 1, 0)
        settings = self.settings_at(iteration)
        scalars = {name: float(value) for name, value in statistics.items()}
        for player in self.players:
            scalars |= player.scalars(iteration)
        return scalars | {"patch_min_scale": settings.min_scale, "density_noise": settings.density_noise}

    @property
    def _ccsr_is_due(self) -> bool:
        """Whether super-resolution takes part in this step: D judges its crops, G may learn from it, it is updated."""
        ccsr, iteration = self.config.ccsr, self.progress.iteration
        return self.ccsr is not None and iteration >= ccsr.start_iteration and iteration % ccsr.every == 0

    def _draw_reals(self, part: MicroBatch) -> RealInputs:
        return self.inputs.draw_reals(
            self._draws(part), part.images, part.labels, self.settings_at(self.progress.iteration)
        )

    def _draw_fakes(self, part: MicroBatch, purpose: str) -> FakeInputs:
        return self.inputs.draw_fakes(self._draws(part), purpose, self.settings_at(self.progress.iteration))

    def _draws(self, part: MicroBatch) -> Draws:
        return Draws(self.config.seed, self.progress.iteration, part.indices)

    def _make_player(self, name: str, suffix: str, network: nn.Module, lr: float, precision: Precision) -> Player:
        training = self.config.training
        trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = build_optimizer(training.optimizer, trainable, lr, training.betas)
        schedule = LearningRateSchedule(
            training.lr_schedule,
            training.lr_anneal,
            training.lr_anneal_every,
            training.max_iterations,
            training.lr_decay_start,
            training.lr_warmup,
        )
        return Player(name, suffix, network, optimizer, precision.make_scaler(), lr, schedule, training.betas)


def consistency_weight(iteration: int, initial: float, smallest: float, decay: float) -> float:
    """alpha(it) = max(smallest, initial exp(-decay it)), the weight of CCSR's consistency term."""
    return max(smallest, initial * math.exp(-decay * iteration))


def _rules_of(config: Config) -> LossSettings:
    ccsr, training = config.ccsr, config.training
    return LossSettings(
        gan_type=training.gan_type,
        reg_type=training.reg_type,
        num_views=config.data.num_views,
        augmentation=Augmentation(**config.discriminator.augment.model_dump()),
        super_resolution=SuperResolutionRules(
            adversarial=ccsr.adversarial > 0,
            agreement=ccsr.agreement > 0,
            agreement_degrees=ccsr.agreement_degrees,
            supervision=ccsr.supervise_generator > 0,
        ),
    )


def _accumulate(terms: Terms, more: Terms) -> None:
    """Add a micro-batch's terms, without their graphs."""
    for name, value in more.items():
        terms[name] = terms.get(name, 0) + value.detach()


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module takes a gradient inside."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
