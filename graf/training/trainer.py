"""The training loop: one step runs one way, from a batch of photographs to hooks that log, sample, score and save.

batch -> real patches; z, view -> rays -> fake patches -> D loss (+ gradient penalty) -> D step -> G loss -> G step ->
detached render -> CCSR loss -> CCSR step -> EMA -> hooks. Schedules are pure functions of the iteration; nothing
derived is written back. objective.py says what the players minimise, players.py how gradients are applied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graf.base.tensors import TensorBatch
from graf.config import Config
from graf.geometry.rays import Patches, RayCaster, annealed_min_scale, place_patches, place_pixel_patches
from graf.geometry.views import PoseSampler
from graf.geometry.volume_rendering import Render
from graf.models.ccsr import CCSR
from graf.models.discriminator import PatchDiscriminator
from graf.models.generator import Generator
from graf.runtime.amp import Precision, at_least_float32, scale_of
from graf.runtime.checkpoint import Stateful
from graf.runtime.distributed import Processes
from graf.runtime.logs import info_once
from graf.runtime.memory import retry_smaller, spare_long_lived_objects
from graf.runtime.memory_profiler import MemoryProfiler
from graf.runtime.memory_settings import MemorySettings
from graf.runtime.phase_timer import make_timer
from graf.runtime.randomness import Draws
from graf.training.augment import Augmentation
from graf.training.ema import ModelAverage, UpdateCounts
from graf.training.inputs import InputSampler, StepInputs, StepSettings
from graf.training.losses import MCE_Loss
from graf.training.objective import GANObjective, LossSettings, Statistics, SuperResolutionLossSettings
from graf.training.optim import LearningRateSchedule, batch_factor, build_optimizer
from graf.training.perceptual import load_perceptual_distance
from graf.training.players import DivergenceError, Player, read_updates


@dataclass
class Progress:
    """How far a run has come: completed iterations, seconds spent training, and the best scores so far.

    logged, sampled, scored: the last iteration whose line has been written, whose grids have been drawn, whose scores
    have been computed, -1 for none; scoring_batch: images per pass of the feature extractor that memory has turned out
    to have room for, 0 where that is not known yet.
    """

    iteration: int = 0
    seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    logged: int = -1
    sampled: int = -1
    scored: int = -1
    scoring_batch: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)} | {"best": dict(self.best)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration, self.seconds = int(state["iteration"]), float(state["seconds"])
        self.best = dict(state["best"])
        for name in ("logged", "sampled", "scored"):  # older checkpoints were saved after all of it
            setattr(self, name, int(state.get(name, self.iteration)))
        self.scoring_batch = int(state.get("scoring_batch", 0))


@dataclass
class LearnedLimits:
    """What a run has learned about its machine and its losses, as a part of its state.

    The sizes that fit into memory decide how sums are rounded, and the updates skipped in a row when to give up.
    """

    trainer: Trainer

    def state_dict(self) -> dict[str, Any]:
        skipped = {player.suffix: player.skipped for player in self.trainer.players}
        chunk = self.trainer.averaged_networks[0].chunk
        return {"memory": asdict(self.trainer.memory), "render_chunk": chunk, "skipped": skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "memory" in state:
            self.trainer.use(MemorySettings(**state["memory"]))
            self.trainer.averaged_networks[0].chunk = int(state["render_chunk"])
        for player in self.trainer.players:
            player.skipped = int(state.get("skipped", {}).get(player.suffix, 0))


@dataclass
class SharedRender:
    """The rendering that serves both D and G, as long as there is room for its graph."""

    render: Render | None = None


@dataclass(frozen=True)
class SuperResolutionRenders(TensorBatch):
    """What super-resolution is trained on: the batch's patches as D sees them, and those of the neighbouring views."""

    render: Render
    neighbours: Render | None


@dataclass
class LatestStatistics:
    """The latest value of every statistic: some are not computed in every step, and the next line shows them all.

    None of settings that no longer hold: a run may be stopped again before its first step.
    """

    trainer: Trainer

    def state_dict(self) -> dict[str, float]:
        kept = {} if self.trainer.latest_is_outdated else self.trainer.latest
        return {name: float(value) for name, value in kept.items()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        share = float(self.trainer.processes.is_first)  # of sums over the processes
        self.trainer.latest = {name: torch.tensor(share * value, dtype=torch.float64) for name, value in state.items()}


Result = TypeVar("Result")
#: one phase: the gradients of a step's inputs, in parts of so many rows
Accumulate = Callable[[StepInputs, list[slice], SharedRender], Result]
#: what helps when memory is too small for one image in chunks of the fewest rays
ADVICE = (
    "lower ray_sampler.N_samples (rays per patch), nerf.N_samples (samples per ray), nerf.netwidth or "
    "discriminator.ndf; `--plan` shows what needs how much"
)
SR_ADVICE = (
    "lower ccsr.features, ccsr.blocks or ray_sampler.N_samples (rays per patch); `--plan` shows what needs how much"
)
#: iterations between steps whose memory is measured, besides the first one of each kind; measuring costs a third of one
WATCH_EVERY = 500
#: iterations between steps that move learned cameras, which take a third longer: gradients then end in every ray
CAMERAS_EVERY = 4
#: updates of a player that are left unread at most, where reading them would be a wait for the device
MOST_UNREAD = 100
#: called after every step with the trainer and the latest statistics (scalars, still on the device)
Hook = Callable[["Trainer", Statistics], None]


class Trainer:
    """Trains a generator against a discriminator, and CCSR on its renders; what it does not own is passed in."""

    def __init__(
        self,
        config: Config,
        memory: MemorySettings,
        generator: Generator,
        discriminator: PatchDiscriminator,
        caster: RayCaster,
        pose_sampler: PoseSampler,
        precision: Precision,
        device: torch.device,
        ccsr: CCSR | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.config, self.device = config, device
        self.processes = processes or Processes()
        self.generator, self.discriminator, self.ccsr = generator, discriminator, ccsr
        training = config.training
        self.average = ModelAverage(generator, training.model_average_beta)
        self.g = self._make_player("generator", "g", generator, training.lr_g, training.betas, precision)
        self.d = self._make_player("discriminator", "d", discriminator, training.lr_d, training.betas, precision)
        self.sr = self.sr_average = None
        if ccsr is not None:
            self.sr_average = ModelAverage(ccsr, training.model_average_beta)
            self.sr = self._make_player("ccsr", "sr", ccsr, config.ccsr.lr, config.ccsr.betas, precision)
        self.objective = GANObjective(
            generator=generator,
            discriminator=discriminator,
            ccsr=ccsr,
            caster=caster,
            settings=_read_loss_settings(config, poses_known=pose_sampler.ranges is None),
            patch_size=config.ray_sampler.patch_size,
            precision=precision,
            class_criterion=MCE_Loss(discriminator.shape.label_groups),
            perceptual=load_perceptual_distance(device) if ccsr is not None and config.ccsr.perceptual else None,
        )
        self.inputs = InputSampler(
            pose_sampler=pose_sampler,
            dim_z=generator.dim_z,
            patch_size=config.ray_sampler.patch_size,
            describe=discriminator.shape.describe,
            uniform_z=config.z_dist.type == "uniform",
            jitter=config.nerf.jitter,
            importance=generator.sampling.importance > 0,
            hflip=config.discriminator.hflip,
            share_fakes=training.share_fakes,
            device=device,
            interpolation=config.ray_sampler.interpolation,
            place=_choose_placement(config),
            match_views=training.match_views,
            ccsr=ccsr,
            agreement_degrees=self.objective.agreement_degrees,
        )
        self.use(memory)
        self.profiler = MemoryProfiler(device)
        self.timer = make_timer(device)
        self._watched: set[tuple[bool, bool]] = set()
        self.progress = Progress()
        self.stop_reason: str | None = None
        self.in_step = False
        self.latest: Statistics = {}
        self.latest_is_outdated = False  # of other settings, whose terms the next step may lack

    def use(self, memory: MemorySettings) -> None:
        """Train, and render with the averaged weights, with these settings from now on."""
        self.memory = memory
        for generator in (self.generator, self.average.module):
            generator.use(memory)  # type: ignore[operator]

    @property
    def state(self) -> dict[str, Stateful]:
        """Every stateful object by name: what a checkpoint holds."""
        state: dict[str, Stateful] = {"progress": self.progress, "limits": LearnedLimits(self)}
        state["statistics"] = LatestStatistics(self)
        state["averages"] = UpdateCounts(self.averages)
        state |= {f"{name}_average": average.module for name, average in self.averages.items()}
        for player in self.players:
            state |= {
                player.name: player.network,
                f"optimizer_{player.suffix}": player.optimizer,
                f"scaler_{player.suffix}": player.scaler,
            }
        return state

    @property
    def averages(self) -> dict[str, ModelAverage]:
        """The averaged weights by network."""
        return {"generator": self.average} | ({} if self.sr_average is None else {"ccsr": self.sr_average})

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
        players, averages = self.players, [average.module for average in self.averages.values()]
        return [*(player.network for player in players), *(player.optimizer for player in players), *averages]

    # ------------------------------------------------------------------------------------------------ the loop

    def run(self, batches: Iterator[tuple[Any, ...]], hooks: Sequence[Hook]) -> None:
        """Step until max_iterations, or until a hook sets `stop_reason` or raises Stopped.

        Hooks get every statistic's latest value: some are not computed in every step. Where something raises, `in_step`
        tells whether the state is that of half a step, or whole and worth saving.
        """
        with spare_long_lived_objects():
            while self.progress.iteration < self.config.training.max_iterations and self.stop_reason is None:
                self._run_once(batches, hooks)

    def _run_once(self, batches: Iterator[tuple[Any, ...]], hooks: Sequence[Hook]) -> None:
        started = time.monotonic()
        with self.timer.phase("data"):
            batch = self.processes.together(lambda: next(batches))  # the arguments of a step
        self.in_step = True
        statistics = self.step(*batch)
        self.latest = statistics if self.latest_is_outdated else self.latest | statistics
        self.latest_is_outdated = False
        self._check_equality()
        self.in_step = False
        self.progress.seconds += time.monotonic() - started
        for hook in hooks:
            hook(self, self.latest)

    def step(
        self, images: Tensor, labels: Tensor, batch_size: int | None = None, poses: Tensor | None = None
    ) -> Statistics:
        """One update of every player and of the averages, from photographs (B, 3, H, W) with labels (B, 4).

        batch_size: of the whole batch, of which several processes have a share each; poses: the photographs' own
        (B, 4, 4), where their collection has such. The statistics are those of the share, in which the whole batch's
        add up; :meth:`share_statistics` does so.
        """
        iteration = self.progress.iteration
        batch_size = len(images) if batch_size is None else batch_size
        parts = self.objective.penalty_is_due(iteration), self.objective.super_resolution_is_due(iteration)
        if parts in self._watched and iteration % WATCH_EVERY:
            return self._step(images, labels, batch_size, poses)
        self._watched.add(parts)
        with self.profiler.watch(*self.owners):
            return self._step(images, labels, batch_size, poses)

    def _check_equality(self) -> None:
        """Every sync_check_every steps: all processes still hold the same networks, else the run is none."""
        every = self.config.training.sync_check_every
        if self.processes.size > 1 and every and self.progress.iteration % every == 0:
            modules = {player.name: player.network for player in self.players}
            modules |= {f"{name}_average": average.module for name, average in self.averages.items()}
            tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in _tensors_of(module)}
            self.processes.check_equal(tensors)

    def settle(self) -> None:
        """Wait for what has been computed, and raise DivergenceError where it came to nothing: see read_updates.

        On a GPU steps go on unseen, so whoever keeps, shows or scores what was learned calls this before. The wait is
        part of the time that training takes.
        """
        started = time.monotonic()
        try:
            read_updates(self.players)
        except DivergenceError:
            self.in_step = True  # a state that has diverged is not worth saving
            raise
        if not self.in_step:
            self.progress.seconds += time.monotonic() - started

    def share_statistics(self) -> None:
        """Settle, and add up the latest statistics over the processes: the first one has the sums, to be written."""
        self.settle()
        self.latest = self.processes.sum_to_first(self.latest)

    def _step(self, images: Tensor, labels: Tensor, batch_size: int, poses: Tensor | None) -> Statistics:
        iteration = self.progress.iteration
        draws = Draws(self.config.seed, iteration, self.processes.share(batch_size))
        with self.timer.phase("inputs"):
            inputs = self.inputs.draw(draws, images, labels, self.settings_at(iteration), batch_size, poses)
        for player in self.players:
            player.begin(iteration)
        self.discriminator.advance_spectral_norm()
        if self.generator.cameras is not None and self.config.data.refine_cameras:
            self.generator.cameras.requires_grad_(iteration % CAMERAS_EVERY == 0)

        # With share_fakes one rendering serves D and G; in a split batch a part's graph cannot wait for the others.
        shared = SharedRender()
        if self.config.training.share_fakes and self.memory.micro_batch_size >= self._largest_share(inputs):
            shared.render = self._in_phase("render", inputs, shared, self._render_shared)
        else:
            self.profiler.forget("render")
        statistics = self._in_phase("d", inputs, shared, self._accumulate_discriminator)
        statistics = self._apply(self.d, statistics)
        more, renders = self._in_phase("g", inputs, shared, self._accumulate_generator)
        statistics |= self._apply(self.g, more)
        shared.render = None
        if self.sr is not None and inputs.fakes_g.super_resolution is not None:
            accumulate = partial(self._accumulate_super_resolution, renders=renders)
            statistics |= self._apply(self.sr, self._in_phase("sr", inputs, shared, accumulate))
        del renders

        with self.phase("ema"):
            self.average.update(self.generator)
            if self.ccsr is not None and self.sr_average is not None and inputs.fakes_g.super_resolution is not None:
                self.sr_average.update(self.ccsr)
        self.progress.iteration = iteration + 1
        if len(self.d.unread) >= MOST_UNREAD:
            self.settle()
        return statistics

    # ------------------------------------------------------------------------------------------------ the phases

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure time and memory of what happens inside, in a step or between two."""
        with self.timer.phase(name), self.profiler.phase(name):
            yield

    def _in_phase(self, name: str, inputs: StepInputs, shared: SharedRender, accumulate: Accumulate[Result]) -> Result:
        """Run one phase over the micro-batches of a step; when memory runs out, again with smaller ones.

        A phase only adds up gradients of its own player, so it is repeated from zeroed gradients with the same random
        numbers; updates that earlier phases of the step have made stay. All processes finish a phase before one goes
        on, and repeat it together.
        """

        def run() -> Result:
            for player in self.players:
                if player.suffix == name:
                    player.optimizer.zero_grad(set_to_none=True)
            size = self.memory.micro_batch_size
            parts = [slice(start, start + size) for start in range(0, len(inputs), size)]
            return accumulate(inputs, parts, shared)

        with self.phase(name):
            advice = SR_ADVICE if name == "sr" else ADVICE
            return retry_smaller(
                lambda: self.processes.together(run),
                lambda: self._shrink(name, self._largest_share(inputs), shared),
                self.device,
                advice,
            )

    def _largest_share(self, inputs: StepInputs) -> int:
        """Images of the process that has most of the batch: all of them have to split alike."""
        return self.processes.largest_share(inputs.batch_size)

    def _shrink(self, phase: str, batch_size: int, shared: SharedRender) -> str | None:
        """Take the next smaller memory settings and say so; None when nothing is left."""
        shared.render = None  # its graph is what takes the room; the phases render again without it
        smaller = self.memory.shrink(batch_size, renders=phase != "sr")
        if smaller is None:
            return None
        change = self.memory.describe_change(smaller)
        self.use(smaller)
        return f"phase {phase}: {change}"

    def _render_shared(self, inputs: StepInputs, parts: list[slice], shared: SharedRender) -> Render | None:
        return self.objective.render_patches(inputs.fakes_g) if len(parts) == 1 else None

    def _accumulate_discriminator(self, inputs: StepInputs, parts: list[slice], shared: SharedRender) -> Statistics:
        objective, batch_size, statistics = self.objective, inputs.batch_size, Statistics()
        for rows in parts:
            reals, fakes = inputs.reals[rows], inputs.fakes_of_d[rows]
            with torch.no_grad():
                render = (objective.render_patches(fakes) if shared.render is None else shared.render[rows]).rgb
            real_patches, fake_patches = objective.cut_reals(reals), objective.cut_fakes(fakes, render)
            loss, more = objective.discriminator_loss(real_patches, fake_patches, reals.views, batch_size)
            self.d.backward(loss)
            _accumulate(statistics, more)
            del loss, more, fake_patches
            if objective.penalty_is_due(self.progress.iteration):
                with self.phase("r1"):
                    loss, more = objective.penalty_loss(real_patches, reals, render, batch_size, self.d.scaler)
                    self.d.backward(loss)
                    _accumulate(statistics, more)
                    del loss, more
        return statistics

    def _accumulate_generator(
        self, inputs: StepInputs, parts: list[slice], shared: SharedRender
    ) -> tuple[Statistics, SuperResolutionRenders]:
        """The statistics, and the batch's renders for super-resolution, without their graph, before G's update."""
        objective, batch_size, statistics = self.objective, inputs.batch_size, Statistics()
        renders: list[Render] = []
        neighbours: list[Render] = []
        with _frozen(self.d.parameters):
            for rows in parts:
                fakes, reals = inputs.fakes_g[rows], inputs.reals[rows]
                # The shared graph serves one backward pass over the whole batch; after a split each part renders again.
                reuse = shared.render if len(parts) == 1 else None
                render = objective.render_patches(fakes) if reuse is None else reuse
                loss, more = objective.generator_loss(fakes, render, reals, batch_size, self.progress.iteration)
                self.g.backward(loss)
                renders.append(render.detach())
                del loss, render, reuse
                neighbour = objective.render_neighbours(fakes)
                neighbours += [] if neighbour is None else [neighbour]
                _accumulate(statistics, more)
        return statistics, SuperResolutionRenders(Render.cat(renders), Render.cat(neighbours) if neighbours else None)

    def _accumulate_super_resolution(
        self, inputs: StepInputs, parts: list[slice], shared: SharedRender, renders: SuperResolutionRenders
    ) -> Statistics:
        assert self.sr is not None
        statistics: Statistics = {}
        with _frozen(self.d.parameters):
            for rows in parts:
                own, fakes, reals = renders[rows], inputs.fakes_g[rows], inputs.reals[rows]
                loss, more = self.objective.super_resolution_loss(
                    fakes, own.render, own.neighbours, reals, inputs.batch_size, self.progress.iteration
                )
                self.sr.backward(loss)
                _accumulate(statistics, more)
        return statistics

    def _apply(self, player: Player, statistics: Statistics) -> Statistics:
        training = self.config.training
        with self.timer.phase("update"):
            statistics = player.apply(statistics, self.progress.iteration, training.grad_clip, training.grad_clip_at)
        if not self.processes.is_first:  # all processes know the norms, and statistics are summed
            norms = [name for name in statistics if name.startswith("grad_norm_")]
            statistics |= {name: torch.zeros_like(statistics[name]) for name in norms}
        return statistics

    # ------------------------------------------------------------------------------------------------ schedules

    def settings_at(self, iteration: int) -> StepSettings:
        """Patch scales and density noise at an iteration, and whether super-resolution is trained in it."""
        rays, nerf = self.config.ray_sampler, self.config.nerf
        noise = nerf.raw_noise_std
        if nerf.decrease_noise:
            noise *= max(0.0, 1 - iteration / nerf.noise_iterations)
        min_scale = annealed_min_scale(iteration, rays.min_scale, rays.max_scale, rays.scale_anneal)
        max_scale, super_resolve = rays.max_scale, self.objective.super_resolution_is_due(iteration)
        if super_resolve and rays.snap:  # whole images have this density of pixels, on which it will be asked to work
            min_scale = max_scale = rays.patch_size / self.config.data.imsize
        return StepSettings(min_scale, max_scale, noise, super_resolve)

    def scalars_of(self, statistics: Statistics) -> dict[str, float]:
        """A step's statistics as floats, with the values of the schedules; reads the device once."""
        iteration = max(self.progress.iteration - 1, 0)
        settings = self.settings_at(iteration)
        found = statistics | {f"scale_{player.suffix}": scale_of(player.scaler, self.device) for player in self.players}
        scalars = dict.fromkeys(found, 0.0)
        for is_on_cpu in (True, False):  # float64 is kept there, which not every device has
            names = [name for name, value in found.items() if (value.device.type == "cpu") is is_on_cpu]
            values = [at_least_float32(found[name]) for name in names]
            scalars |= dict(zip(names, torch.stack(values).tolist() if values else [], strict=True))
        scalars |= {f"lr_{player.suffix}": player.lr_at(iteration) for player in self.players}
        return scalars | {"patch_min_scale": settings.min_scale, "density_noise": settings.density_noise}

    def _make_player(
        self,
        name: str,
        suffix: str,
        network: nn.Module,
        lr: float,
        betas: tuple[float, float],
        precision: Precision,
    ) -> Player:
        training = self.config.training
        lr *= batch_factor(training.scale_lr, training.batch_size, training.lr_batch_size)
        trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = build_optimizer(training.optimizer, trainable, lr, betas)
        schedule = LearningRateSchedule(
            training.lr_schedule,
            training.lr_anneal,
            training.lr_anneal_every,
            training.max_iterations,
            training.lr_decay_start,
            training.lr_warmup,
            training.lr_points or (),
            training.lr_interpolation == "log",
        )
        return Player(
            name=name,
            suffix=suffix,
            network=network,
            optimizer=optimizer,
            scaler=precision.make_scaler(),
            lr=lr,
            schedule=schedule,
            betas=betas,
            processes=self.processes,
            layer_norms=training.layer_norms,
        )


def _choose_placement(config: Config) -> Callable[[Tensor, float, float], Patches]:
    rays = config.ray_sampler
    if not rays.snap:
        return place_patches
    return partial(place_pixel_patches, size=rays.patch_size, resolution=config.data.imsize)


def _read_loss_settings(config: Config, poses_known: bool) -> LossSettings:
    ccsr, training = config.ccsr, config.training
    names = [item.name for item in fields(SuperResolutionLossSettings)]
    super_resolution = SuperResolutionLossSettings(**{name: getattr(ccsr, name) for name in names})
    if training.photometric and not poses_known:  # without which there is no ccsr.photometric either
        super_resolution = replace(super_resolution, photometric=0.0)
        info_once(f"training.photometric={training.photometric:g} is not used: the photographs' poses are unknown")
    return LossSettings(
        gan_type=training.gan_type,
        reg_type=training.reg_type,
        reg_param=training.reg_param,
        reg_every=training.reg_every,
        class_loss=config.discriminator.class_loss,
        num_views=config.data.num_views,
        photometric=training.photometric if poses_known else 0.0,
        photometric_min=training.photometric_min,
        photometric_decay=training.photometric_decay,
        instance_prior=training.instance_prior,
        opacity=training.opacity,
        augmentation=Augmentation(**config.discriminator.augment.model_dump()),
        super_resolution=super_resolution if ccsr.enabled else None,
    )


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, those that a checkpoint leaves out too."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _accumulate(statistics: Statistics, more: Statistics) -> None:
    """Add a micro-batch's terms, without their graphs."""
    for name, value in more.items():
        statistics[name] = statistics[name] + value.detach() if name in statistics else value.detach()


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """No parameter takes a gradient inside."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
