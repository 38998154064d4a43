"""What is drawn once before a training step, for all players: codes, views, patches and their places, random numbers.

Row i of every tensor depends on (seed, iteration, purpose, i) alone, so a step can be repeated, split over
micro-batches and resumed with equal results. Inputs are drawn on the CPU and go to the device in one copy; there the
patches of photographs are cut, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from graf.base.tensors import TensorBatch, move
from graf.data.labels import balance_instances
from graf.geometry.rays import Patches, crop_images, number_pixels, place_patches, subdivide_patches
from graf.geometry.views import NUM_UNIFORMS as NUM_VIEW_UNIFORMS
from graf.geometry.views import PoseSampler, Views
from graf.models.ccsr import CCSR, LatentMixture
from graf.models.discriminator import PatchCondition
from graf.models.generator import draw_latents
from graf.models.ray_noise import RayNoiseKeys
from graf.runtime.device import move_in_one_copy
from graf.runtime.randomness import Draws
from graf.training.augment import NUM_UNIFORMS


@dataclass(frozen=True)
class SuperResolutionInputs(TensorBatch):
    """What super-resolution needs of a batch of patches besides their pixels.

    latents: of their views; pixels (B, K, K): the numbers of the pixels that D sees of their super-resolution; crop:
    where these lie; condition: what D is told of them. Of generated patches only: augment, the augmentation's random
    numbers for them, since crops of photographs take their patches'; neighbours, the views that they have to agree
    with, and neighbour_latents.
    """

    latents: LatentMixture
    pixels: Tensor
    crop: Patches
    condition: PatchCondition
    augment: Tensor
    neighbours: Views | None = None
    neighbour_latents: LatentMixture | None = None


@dataclass(frozen=True)
class FakeInputs(TensorBatch):
    """What a batch of generated patches is made from: codes, views, places and ray noise.

    z (B, dim_z): drawn codes; instance (B,): the instance whose own code is taken instead, -1 for none; condition: what
    D is told of the patches; augment_d, augment_g: the augmentation's random numbers in D's step and in G's;
    super_resolution: None in a step that does not train it.
    """

    z: Tensor
    instance: Tensor
    views: Views
    patches: Patches
    condition: PatchCondition
    noise: RayNoiseKeys
    augment_d: Tensor
    augment_g: Tensor
    super_resolution: SuperResolutionInputs | None = None


@dataclass(frozen=True)
class RealInputs(TensorBatch):
    """Patches of photographs, their views and places, and random numbers.

    images (B, 3, K, K): at the resolution of renders; condition: what D is told of them; augment: the augmentation's;
    mix (B,): the place between real and fake of WGAN-GP; mirrored (B,): bool, photographs to mirror, None for none;
    super_resolution: as in :class:`FakeInputs`; fine (B, 3, s K, s K): the patches at its resolution, None where that
    is None.
    """

    images: Tensor
    views: Views
    patches: Patches
    condition: PatchCondition
    augment: Tensor
    mix: Tensor
    mirrored: Tensor | None = None
    super_resolution: SuperResolutionInputs | None = None
    fine: Tensor | None = None


@dataclass(frozen=True)
class StepInputs(TensorBatch):
    """The inputs of all players in one step; where D and G share their fakes, fakes_d is None.

    batch_size: images of the whole batch, of which these are all, or a process's share.
    """

    reals: RealInputs
    fakes_g: FakeInputs
    fakes_d: FakeInputs | None
    batch_size: int

    @property
    def fakes_of_d(self) -> FakeInputs:
        """The generated patches of D's step."""
        return self.fakes_g if self.fakes_d is None else self.fakes_d


@dataclass(frozen=True)
class StepSettings:
    """One iteration of the schedules: patch scales, density noise (std), whether super-resolution is trained."""

    min_scale: float
    max_scale: float
    density_noise: float
    super_resolve: bool = False


@dataclass(frozen=True)
class InputSampler:
    """Draws a step's inputs. uniform_z: z uniform in [-1, 1] instead of normal; hflip: mirror photographs at random.

    patch_size: K; describe: what D is told of patches of views; interpolation: how patches of photographs are read
    between pixels, as in crop_images; place: patches from uniform random numbers (B, 3) and the smallest and largest
    scale; match_views: generated patches take views and places of the photographs' patches, so that D compares like
    with like, and half of them, as far as there are known instances, an instance's code.

    ccsr: None without super-resolution; agreement_degrees: between a view and the neighbour it has to agree with, None
    where that is not asked.
    """

    pose_sampler: PoseSampler
    dim_z: int
    patch_size: int
    describe: Callable[[Views, Patches], PatchCondition]
    uniform_z: bool
    jitter: bool
    importance: bool
    hflip: bool
    share_fakes: bool
    device: torch.device
    interpolation: str = "bilinear"
    place: Callable[[Tensor, float, float], Patches] = place_patches
    match_views: bool = False
    ccsr: CCSR | None = None
    agreement_degrees: float | None = None

    def draw(
        self,
        draws: Draws,
        images: Tensor,
        labels: Tensor,
        settings: StepSettings,
        batch_size: int | None = None,
        poses: Tensor | None = None,
    ) -> StepInputs:
        """The inputs of a step on photographs (B, 3, H, W) with labels (B, 4), on the device.

        batch_size: of the whole batch, in which these have the places that `draws` names; by default these are all.
        poses: the photographs' own (B, 4, 4), where their collection has such.
        """
        batch_size = len(images) if batch_size is None else batch_size
        reals = self.draw_reals(draws, labels, settings, poses)
        matched = reals if self.match_views else None
        fakes_g = self.draw_fakes(draws, "g", settings, matched)
        fakes_d = None if self.share_fakes else self.draw_fakes(draws, "d", settings, matched)
        inputs = move_in_one_copy(StepInputs(reals, fakes_g, fakes_d, batch_size), self.device)
        return replace(inputs, reals=self.cut_photographs(inputs.reals, images))

    def draw_fakes(
        self, draws: Draws, purpose: str, settings: StepSettings, matched: RealInputs | None = None
    ) -> FakeInputs:
        """Inputs of generated patches, on the CPU; `purpose` tells the D step's from the G step's.

        matched: photographs whose views and places the patches take.
        """
        numbers = _draw_numbers(draws, purpose)
        views = self.pose_sampler.pick(numbers["view"]) if matched is None else matched.views
        is_drawn = numbers["instance"][:, 0] >= (self._instance_share if self.match_views else 0.0)
        patches = self._place(numbers, settings) if matched is None else matched.patches
        return FakeInputs(
            z=draw_latents(draws, f"{purpose}/z", self.dim_z, self.uniform_z),
            instance=torch.where(is_drawn, -1, views.labels[:, 3]),
            views=views,
            patches=patches,
            condition=self.describe(views, patches) if matched is None else matched.condition,
            noise=RayNoiseKeys(
                jitter=draws.keys(f"{purpose}/jitter") if self.jitter else None,
                importance_jitter=draws.keys(f"{purpose}/importance") if self.jitter and self.importance else None,
                density=draws.keys(f"{purpose}/density") if settings.density_noise > 0 else None,
                density_std=settings.density_noise,
            ),
            augment_d=numbers["augment_d"],
            augment_g=numbers["augment_g"],
            super_resolution=self._prepare_super_resolution(
                numbers, views, patches, settings, with_neighbours=purpose == "g"
            ),
        )

    def draw_reals(
        self, draws: Draws, labels: Tensor, settings: StepSettings, poses: Tensor | None = None
    ) -> RealInputs:
        """Inputs of real patches of photographs with labels (B, 4), still without their pixels, on the CPU."""
        numbers = _draw_numbers(draws, "real")
        views = self.pose_sampler.views_of_photographs(labels, numbers["view"], poses)
        patches = self._place(numbers, settings)
        return RealInputs(
            images=torch.empty(len(labels), 0),
            views=views,
            patches=patches,
            condition=self.describe(views, patches),
            augment=numbers["augment_d"],
            mix=numbers["mix"][:, 0],
            mirrored=numbers["mirror"][:, 0] < 0.5 if self.hflip else None,
            super_resolution=self._prepare_super_resolution(numbers, views, patches, settings, with_neighbours=False),
        )

    @torch.no_grad()
    def cut_photographs(self, reals: RealInputs, images: Tensor) -> RealInputs:
        """The same inputs with patches of photographs (B, 3, H, W), which are moved to the device."""
        images = move(images, self.device)
        if reals.mirrored is not None:
            images = torch.where(reals.mirrored[:, None, None, None], images.flip(3), images)
        fine = None
        if self.ccsr is not None:
            if reals.super_resolution is not None:
                fine = crop_images(images, reals.patches, self.ccsr.scale * self.patch_size, self.interpolation)
            images = self.ccsr.down(images)
        return replace(reals, images=crop_images(images, reals.patches, self.patch_size, self.interpolation), fine=fine)

    @cached_property
    def _instance_share(self) -> float:
        """The share of known instances that gives half of a batch instances' codes."""
        labels = self.pose_sampler.views.labels.cpu()
        shown = torch.tensor(balance_instances(labels), dtype=torch.float64)
        known = float(shown[labels[:, 3] >= 0].sum() / shown.sum())
        return min(1.0, 0.5 / known) if known else 0.0

    def _place(self, numbers: dict[str, Tensor], settings: StepSettings) -> Patches:
        return self.place(numbers["patch"], settings.min_scale, settings.max_scale)

    def _prepare_super_resolution(
        self,
        numbers: dict[str, Tensor],
        views: Views,
        patches: Patches,
        settings: StepSettings,
        with_neighbours: bool,
    ) -> SuperResolutionInputs | None:
        if self.ccsr is None or not settings.super_resolve:
            return None
        size, scale = self.patch_size, self.ccsr.scale
        corner = torch.floor(numbers["crop"] * (size * (scale - 1) + 1)).long()
        crop = subdivide_patches(patches, size, scale, corner)
        neighbours = neighbour_latents = None
        if self.agreement_degrees is not None and with_neighbours:
            side = torch.where(numbers["side"][:, 0] < 0.5, -1.0, 1.0)
            neighbours = views.turn(self.agreement_degrees * side)
            neighbour_latents = self.ccsr.latents.mix(neighbours.labels[:, 2])
        return SuperResolutionInputs(
            latents=self.ccsr.latents.mix(views.labels[:, 2]),
            pixels=number_pixels(corner, size, size * scale),
            crop=crop,
            condition=self.describe(views, crop),
            augment=numbers["augment_sr"],
            neighbours=neighbours,
            neighbour_latents=neighbour_latents,
        )


#: what the uniform numbers of a sample are used for, and how many each use takes; a new use comes last
USES = {
    "view": NUM_VIEW_UNIFORMS,
    "patch": 3,
    "augment_d": NUM_UNIFORMS,
    "augment_g": NUM_UNIFORMS,
    "augment_sr": NUM_UNIFORMS,
    "crop": 2,
    "side": 1,
    "mix": 1,
    "mirror": 1,
    "instance": 1,
}


def _draw_numbers(draws: Draws, purpose: str) -> dict[str, Tensor]:
    """The uniform numbers of every sample, drawn at once, by use: (B, how many)."""
    numbers = draws.uniform(purpose, sum(USES.values()))
    return dict(zip(USES, numbers.split(list(USES.values()), dim=1), strict=True))
