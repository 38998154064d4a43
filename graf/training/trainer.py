"""The training loop: one step runs one way, from a batch of photographs to hooks that log, sample, score and save.

batch -> real patches; z, view -> rays -> fake patches -> D loss (+ gradient penalty) -> D step -> G loss -> G step -> EMA -> hooks.
Schedules are pure functions of the iteration; nothing derived is written back anywhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graf.config import Config
from graf.data.views import ViewPool
from graf.geometry.rays import RayCaster, annealed_min_scale, crop_images
from graf.models.discriminator import PatchDiscriminator
from graf.models.generator import Generator, rays_to_image
from graf.runtime.amp import Precision, Scaler, float32_region, optimizer_step
from graf.runtime.checkpoint import Stateful
from graf.runtime.seeding import Draws
from graf.training import losses
from graf.training.augment import Augmentation, augment_patches
from graf.training.ema import ModelAverage
from graf.training.inputs import FakeInputs, InputSampler, RealInputs, StepSettings
from graf.training.optim import (
    LearningRateSchedule,
    build_optimizer,
    clip_gradients,
    find_nonfinite_gradient,
    gradient_norm,
    set_learning_rate,
)

#: updates that a GradScaler may skip in a row before the run is given up as diverged
MAX_SKIPPED_UPDATES = 100


class DivergenceError(RuntimeError):
    """A loss or gradient is not finite; the message names the first offending tensor."""


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


@dataclass
class Player:
    """One side of the game: a network with its optimiser, learning rate and its own loss scale."""

    name: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Scaler
    lr: float
    skipped: int = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


#: called after every step with the trainer and the step's statistics (scalars, still on the device)
Hook = Callable[["Trainer", dict[str, Tensor]], None]


class Trainer:
    """Trains a generator against a discriminator; everything it does not own is passed in."""

    def __init__(
        self,
        config: Config,
        generator: Generator,
        discriminator: PatchDiscriminator,
        caster: RayCaster,
        pool: ViewPool,
        precision: Precision,
        device: torch.device,
    ) -> None:
        training = config.training
        self.config, self.precision, self.device, self.caster = config, precision, device, caster
        self.generator, self.discriminator = generator, discriminator
        self.average = ModelAverage(generator, training.model_average_beta)
        self.progress = Progress()
        self.g = self._make_player("generator", generator, training.lr_g)
        self.d = self._make_player("discriminator", discriminator, training.lr_d)
        self.schedule = LearningRateSchedule(
            training.lr_schedule,
            training.lr_anneal,
            training.lr_anneal_every,
            training.max_iterations,
            training.lr_decay_start,
            training.lr_warmup,
        )
        self.augmentation = Augmentation(**config.discriminator.augment.model_dump())
        self.class_loss = losses.MCE_Loss(discriminator.shape.label_groups)
        self.inputs = InputSampler(
            pool=pool,
            dim_z=generator.dim_z,
            uniform_z=config.z_dist.type == "uniform",
            patch_size=config.ray_sampler.patch_size,
            sampling=generator.sampling,
            jitter=config.nerf.jitter,
            hflip=config.discriminator.hflip,
            device=device,
        )
        self.stop_reason: str | None = None

    @property
    def state(self) -> dict[str, Stateful]:
        """Every stateful object by name: what a checkpoint holds."""
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "optimizer_g": self.g.optimizer,
            "optimizer_d": self.d.optimizer,
            "scaler_g": self.g.scaler,
            "scaler_d": self.d.scaler,
            "average": self.average,
            "progress": self.progress,
        }

    def run(self, batches: Iterator[tuple[Tensor, Tensor]], hooks: Sequence[Hook]) -> None:
        """Step until max_iterations, or until a hook or a signal sets `stop_reason`."""
        while self.progress.iteration < self.config.training.max_iterations and self.stop_reason is None:
            started = time.monotonic()
            images, labels = next(batches)
            statistics = self.step(images, labels)
            self.progress.seconds += time.monotonic() - started
            for hook in hooks:
                hook(self, statistics)

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One update of D, one of G and one of the average, from photographs (B, 3, H, W) with labels (B, 3)."""
        iteration = self.progress.iteration
        settings = self.settings_at(iteration)
        draws = Draws(self.config.seed, iteration, range(len(images)))
        reals = self.inputs.draw_reals(draws, images, labels, settings)
        fakes = self.inputs.draw_fakes(draws, "g", settings)
        for player in (self.g, self.d):
            set_learning_rate(player.optimizer, player.lr * self.schedule(iteration))

        # With share_fakes one rendering serves both steps; its graph is held through the D step.
        shared = self._render_patches(fakes) if self.config.training.share_fakes else None
        statistics = self._update_discriminator(reals, draws, settings, fakes, shared)
        statistics |= self._update_generator(fakes, shared)
        del shared
        self.average.update(self.generator)
        self.progress.iteration = iteration + 1
        return statistics

    def settings_at(self, iteration: int) -> StepSettings:
        """Patch scales and density noise at an iteration."""
        rays, nerf = self.config.ray_sampler, self.config.nerf
        noise = nerf.raw_noise_std
        if nerf.decrease_noise:
            noise *= max(0.0, 1 - iteration / nerf.noise_iterations)
        min_scale = annealed_min_scale(iteration, rays.min_scale, rays.max_scale, rays.scale_anneal)
        return StepSettings(min_scale, rays.max_scale, noise)

    def scalars_of(self, statistics: dict[str, Tensor]) -> dict[str, float]:
        """A step's statistics as floats (a wait for the device) together with the values of the schedules."""
        iteration = max(self.progress.iteration - 1, 0)
        settings = self.settings_at(iteration)
        return {name: float(value) for name, value in statistics.items()} | {
            "lr_g": self.g.lr * self.schedule(iteration),
            "lr_d": self.d.lr * self.schedule(iteration),
            "scale_g": self.g.scaler.get_scale(),
            "scale_d": self.d.scaler.get_scale(),
            "patch_min_scale": settings.min_scale,
            "density_noise": settings.density_noise,
        }

    # ------------------------------------------------------------------------------------------------ the two updates

    def _update_discriminator(
        self, reals: RealInputs, draws: Draws, settings: StepSettings, fakes: FakeInputs, shared: Tensor | None
    ) -> dict[str, Tensor]:
        training = self.config.training
        player, gan_type = self.d, training.gan_type
        player.optimizer.zero_grad(set_to_none=True)
        player.network.requires_grad_(True)
        self.discriminator.advance_spectral_norm()
        if shared is None:
            fakes = self.inputs.draw_fakes(draws, "d", settings)
        with torch.no_grad():
            fake_patches = self._render_patches(fakes) if shared is None else shared
            fake_patches = augment_patches(fake_patches, self.augmentation, self._augment_uniforms(draws, "d", fakes))
            real_patches = crop_images(reals.images, reals.patches, self.inputs.patch_size)
            real_patches = augment_patches(real_patches, self.augmentation, reals.augment)

        with self.precision.autocast():
            real_logits, label_logits = self.discriminator(real_patches, reals.condition)
            fake_logits, _ = self.discriminator(fake_patches, fakes.condition)
        loss = losses.discriminator_real_loss(gan_type, real_logits).mean()
        loss = loss + losses.discriminator_fake_loss(gan_type, fake_logits).mean()
        terms = {"loss_d": loss}
        if label_logits is not None:
            terms["loss_d_class"] = self.class_loss(label_logits, self._class_targets(reals.views.labels)).mean()
            loss = loss + self.config.discriminator.class_loss * terms["loss_d_class"]
        player.scaler.scale(loss).backward()

        if training.reg_type != "none" and self.progress.iteration % training.reg_every == 0:
            penalty = self._gradient_penalty(reals, real_patches, fake_patches)
            terms["penalty"] = penalty
            player.scaler.scale(training.reg_param * training.reg_every * penalty).backward()

        terms |= {"d_real": torch.sigmoid(real_logits).mean(), "d_fake": torch.sigmoid(fake_logits).mean()}
        return self._apply_gradients(player, terms, "d")

    def _update_generator(self, fakes: FakeInputs, shared: Tensor | None) -> dict[str, Tensor]:
        player = self.g
        player.optimizer.zero_grad(set_to_none=True)
        self.discriminator.requires_grad_(False)
        patches = self._render_patches(fakes) if shared is None else shared
        patches = augment_patches(patches, self.augmentation, fakes.augment)
        with self.precision.autocast():
            logits, label_logits = self.discriminator(patches, fakes.condition)
        loss = losses.generator_loss(self.config.training.gan_type, logits).mean()
        terms = {"loss_g": loss}
        if label_logits is not None:
            terms["loss_g_class"] = self.class_loss(label_logits, self._class_targets(fakes.views.labels)).mean()
            loss = loss + self.config.discriminator.class_loss * terms["loss_g_class"]
        player.scaler.scale(loss).backward()
        self.discriminator.requires_grad_(True)
        return self._apply_gradients(player, terms, "g")

    def _gradient_penalty(self, reals: RealInputs, real_patches: Tensor, fake_patches: Tensor) -> Tensor:
        """R1 or WGAN-GP at D's input after augmentation, in float32: half precision would drown its second derivatives."""
        with float32_region(self.device.type):
            if self.config.training.reg_type == "real":
                inputs, penalise = real_patches.float(), losses.r1_penalty
            else:
                mix = reals.mix[:, None, None, None]
                inputs, penalise = mix * real_patches + (1 - mix) * fake_patches.float(), losses.gradient_penalty
            inputs = inputs.detach().requires_grad_(True)
            logits, _ = self.discriminator(inputs, reals.condition)
            return penalise(logits, inputs, self.d.scaler).mean()

    # ------------------------------------------------------------------------------------------------ their parts

    def _render_patches(self, fakes: FakeInputs) -> Tensor:
        """Generated patches (B, 3, K, K); whether a graph is kept is the caller's choice."""
        size = self.inputs.patch_size
        rays = self.caster.cast_patches(fakes.views.poses, fakes.patches, size)
        with self.precision.autocast():
            colours = self.generator(fakes.z, fakes.views.class_idx, rays, fakes.noise)
        return rays_to_image(colours.rgb, size)

    def _augment_uniforms(self, draws: Draws, purpose: str, fakes: FakeInputs) -> Tensor:
        """The D step's own augmentation of the fakes: shared patches must not reach both steps under the same one."""
        if not self.config.training.share_fakes:
            return fakes.augment
        return draws.uniform(f"{purpose}/augment", fakes.augment.shape[1]).to(self.device)

    def _class_targets(self, labels: Tensor) -> Tensor:
        """Targets (B, groups) of the label head: class, and where poses are known height and azimuth bin."""
        columns = [labels[:, 0]]
        if self.discriminator.shape.condition_pose:
            num_views = self.config.data.num_views
            bins = torch.remainder((labels[:, 2] * num_views + 180) // 360, num_views)
            columns += [labels[:, 1], bins]
        return torch.stack(columns, dim=1)

    def _make_player(self, name: str, network: nn.Module, lr: float) -> Player:
        training = self.config.training
        optimizer = build_optimizer(training.optimizer, network.parameters(), lr, training.betas)
        return Player(name, network, optimizer, self.precision.make_scaler(), lr)

    def _apply_gradients(self, player: Player, terms: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
        """Unscale, check, clip, step and update the loss scale; the phase's statistics, detached."""
        training, scaler = self.config.training, player.scaler
        scaler.unscale_(player.optimizer)
        norm = gradient_norm(player.parameters)
        terms = {name: value.detach() for name, value in terms.items()} | {f"grad_norm_{suffix}": norm}
        # One wait for the device per update: a NaN that goes unnoticed costs the night.
        finite = bool(torch.isfinite(torch.stack([value.float() for value in terms.values()])).all())
        if not finite and not scaler.is_enabled():
            raise DivergenceError(self._describe_divergence(player, terms))
        if finite:
            clip_gradients(player.parameters, training.grad_clip, training.grad_clip_at)
        stepped = optimizer_step(scaler, player.optimizer)
        scaler.update()
        player.skipped = 0 if stepped else player.skipped + 1
        if player.skipped > MAX_SKIPPED_UPDATES:
            raise DivergenceError(
                f"{player.skipped} updates in a row skipped by the loss scaler: {self._describe_divergence(player, terms)}"
            )
        return terms

    def _describe_divergence(self, player: Player, terms: dict[str, Tensor]) -> str:
        where = find_nonfinite_gradient({player.name: player.network})
        bad_terms = [name for name, value in terms.items() if not math.isfinite(float(value))]
        tensor = bad_terms[0] if bad_terms and not bad_terms[0].startswith("grad_norm") else f"the gradient of {where}"
        return (
            f"iteration {self.progress.iteration}: {tensor} is not finite; the last checkpoint is untouched; "
            "resume from it with a lower learning rate (training.lr_g, training.lr_d) or training.use_amp=false"
        )
