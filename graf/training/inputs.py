"""Everything random about one training step, drawn before it: latents, views, patch places, ray noise, augmentation.

Row i of every tensor depends on (seed, iteration, purpose, i) alone, so a step can be repeated, split over
micro-batches and resumed with equal results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graf.geometry.rays import Patches, place_patches
from graf.geometry.views import NUM_UNIFORMS as NUM_VIEW_UNIFORMS
from graf.geometry.views import PoseSampler, Views
from graf.geometry.volume_rendering import RayNoise, RaySampling
from graf.models.discriminator import PatchCondition
from graf.runtime.randomness import Draws
from graf.training.augment import NUM_UNIFORMS


@dataclass(frozen=True)
class FakeInputs:
    """What a batch of generated patches is made from: z (B, dim), views, places and ray noise.

    augment_d, augment_g, augment_sr: the augmentation's random numbers in D's step, in G's and of super-resolved crops.
    crop (B, 2) in [0, 1): where super-resolved patches are cropped to D's size; turn (B,), 1 or -1: to which side the
    neighbouring view of the agreement loss lies.
    """

    z: Tensor
    views: Views
    patches: Patches
    noise: RayNoise
    augment_d: Tensor
    augment_g: Tensor
    augment_sr: Tensor
    crop: Tensor
    turn: Tensor

    @property
    def condition(self) -> PatchCondition:
        """What the discriminator is told about these patches."""
        return describe_patches(self.views, self.patches)


@dataclass(frozen=True)
class RealInputs:
    """A batch of photographs (B, 3, H, W), their views, which patches of them to show, and random numbers.

    crop (B, 2) in [0, 1): where high-resolution crops lie in the patches; mix (B,): WGAN-GP's place between real and
    fake.
    """

    images: Tensor
    views: Views
    patches: Patches
    augment: Tensor
    crop: Tensor
    mix: Tensor

    @property
    def condition(self) -> PatchCondition:
        """What the discriminator is told about these patches."""
        return describe_patches(self.views, self.patches)


def describe_patches(views: Views, patches: Patches) -> PatchCondition:
    """What the discriminator is told about patches of views."""
    return PatchCondition(views.class_idx, views.u, views.v, patches)


@dataclass(frozen=True)
class StepSettings:
    """The schedules' values at one iteration: range of patch scales and standard deviation of the density noise."""

    min_scale: float
    max_scale: float
    density_noise: float


@dataclass(frozen=True)
class InputSampler:
    """Draws a step's inputs. uniform_z: z uniform in [-1, 1] instead of normal; hflip: mirror photographs at random."""

    pose_sampler: PoseSampler
    dim_z: int
    uniform_z: bool
    patch_size: int
    sampling: RaySampling
    jitter: bool
    hflip: bool
    device: torch.device

    def draw_fakes(self, draws: Draws, purpose: str, settings: StepSettings) -> FakeInputs:
        """Inputs of generated patches; `purpose` tells the D step's from the G step's."""
        num_rays = self.patch_size**2
        z = (
            draws.uniform(f"{purpose}/z", self.dim_z) * 2 - 1
            if self.uniform_z
            else draws.normal(f"{purpose}/z", self.dim_z)
        )
        views = self.pose_sampler.pick(draws.uniform(f"{purpose}/view", NUM_VIEW_UNIFORMS))
        places = draws.uniform(f"{purpose}/patch", 3)
        jitter = fine_jitter = density = None
        if self.jitter:
            jitter = draws.uniform(f"{purpose}/jitter", num_rays, self.sampling.coarse, device=self.device)
            if self.sampling.importance:
                shape = (num_rays, self.sampling.importance)
                fine_jitter = draws.uniform(f"{purpose}/importance", *shape, device=self.device)
        if settings.density_noise > 0:
            density = draws.normal(f"{purpose}/density", num_rays, self.sampling.total, device=self.device)
            density *= settings.density_noise
        augment_d, augment_g, augment_sr = (
            self._move(draws.uniform(f"{purpose}/augment_{player}", NUM_UNIFORMS)) for player in ("d", "g", "sr")
        )
        return FakeInputs(
            z=self._move(z),
            views=views.to(self.device),
            patches=place_patches(self._move(places), settings.min_scale, settings.max_scale),
            noise=RayNoise(jitter, fine_jitter, density),
            augment_d=augment_d,
            augment_g=augment_g,
            augment_sr=augment_sr,
            crop=self._move(draws.uniform(f"{purpose}/crop", 2)),
            turn=self._move(2.0 * draws.integers(f"{purpose}/turn", 2) - 1),
        )

    def draw_reals(self, draws: Draws, images: Tensor, labels: Tensor, settings: StepSettings) -> RealInputs:
        """Inputs of real patches from a batch of photographs and labels, which may still be on the CPU."""
        images = images.to(self.device, non_blocking=True)
        if self.hflip:
            mirrored = self._move(draws.uniform("real/hflip")) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        patches = place_patches(self._move(draws.uniform("real/patch", 3)), settings.min_scale, settings.max_scale)
        return RealInputs(
            images=images,
            views=self.pose_sampler.views_of_labels(labels, draws.uniform("real/view", NUM_VIEW_UNIFORMS)).to(
                self.device
            ),
            patches=patches,
            augment=self._move(draws.uniform("real/augment", NUM_UNIFORMS)),
            crop=self._move(draws.uniform("real/crop", 2)),
            mix=self._move(draws.uniform("real/mix")),
        )

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
