"""The losses of one micro-batch: what discriminator, generator and super-resolution minimise, term by term.

Every function returns named terms that are sums over the images of the micro-batch divided by the size of the whole
batch, so that terms and gradients of micro-batches add up to those of the batch. Nothing here steps an optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from graf.geometry.rays import Patches, RayCaster, crop_images, subdivide_patches
from graf.geometry.views import Views
from graf.geometry.warping import SurfaceView, warp_between
from graf.models.ccsr import CCSR, upsample
from graf.models.discriminator import PatchCondition, PatchDiscriminator
from graf.models.generator import Generator, rays_to_image
from graf.runtime.amp import Precision, Scaler, float32_region
from graf.training import losses
from graf.training.augment import Augmentation, augment_patches
from graf.training.inputs import FakeInputs, RealInputs, describe_patches
from graf.training.perceptual import PerceptualDistance

Terms = dict[str, Tensor]
#: patches (B, 3, K, K) and what the discriminator is told of them
Patched = tuple[Tensor, PatchCondition]


@dataclass(frozen=True)
class SuperResolutionRules:
    """Which terms CCSR is trained with besides consistency; neighbouring views lie agreement_degrees apart."""

    adversarial: bool = True
    agreement: bool = False
    agreement_degrees: float = 15.0
    supervision: bool = False


@dataclass(frozen=True)
class LossSettings:
    """Which losses there are; num_views: azimuth bins of the class loss."""

    gan_type: str = "standard"
    reg_type: str = "real"
    num_views: int = 8
    augmentation: Augmentation = field(default_factory=Augmentation)
    super_resolution: SuperResolutionRules = field(default_factory=SuperResolutionRules)


@dataclass(frozen=True)
class RenderedPatches:
    """Patches as rendered: rgb (B, 3, K, K), z-depth and opacity (B, 1, K, K)."""

    rgb: Tensor
    depth: Tensor
    opacity: Tensor

    def detach(self) -> RenderedPatches:
        """The same patches without a graph."""
        return RenderedPatches(self.rgb.detach(), self.depth.detach(), self.opacity.detach())

    def part(self, indices: range) -> RenderedPatches:
        """The patches of some samples."""
        chosen = slice(indices.start, indices.stop)
        return RenderedPatches(self.rgb[chosen], self.depth[chosen], self.opacity[chosen])

    @classmethod
    def join(cls, parts: Sequence[RenderedPatches]) -> RenderedPatches:
        """All patches of several parts, in order."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("rgb", "depth", "opacity")))


@dataclass(frozen=True)
class GANObjective:
    """Networks and rules; `ccsr` is None without super-resolution."""

    generator: Generator
    discriminator: PatchDiscriminator
    ccsr: CCSR | None
    caster: RayCaster
    rules: LossSettings
    patch_size: int
    precision: Precision
    class_criterion: losses.MCE_Loss
    perceptual: PerceptualDistance | None = None

    # ------------------------------------------------------------------------------------------------ rendering

    def render_patches(self, fakes: FakeInputs, views: Views | None = None) -> RenderedPatches:
        """Generated patches; whether a graph is kept is the caller's choice. `views`: other views of these objects."""
        views = fakes.views if views is None else views
        rays = self.caster.cast_patches(views.poses, fakes.patches, self.patch_size)
        with self.precision.autocast():
            colours = self.generator(fakes.z, views.class_idx, rays, fakes.noise)
        rgb, depth, opacity = (
            rays_to_image(part, self.patch_size) for part in (colours.rgb, colours.depth, colours.opacity)
        )
        return RenderedPatches(rgb, depth, opacity)

    def super_resolve(self, render: Tensor, views: Views, patches: Patches) -> tuple[Tensor, Tensor]:
        """CCSR's output (B, 3, s K, s K) and the trunk's output before the projection."""
        assert self.ccsr is not None
        with self.precision.autocast():
            resolved = self.ccsr(render, views.labels[:, 2], patches)
        return resolved.image, resolved.unprojected

    # ------------------------------------------------------------------------------------------------ discriminator

    def discriminator_terms(
        self, reals: RealInputs, fakes: FakeInputs, render: Tensor, batch_size: int, super_resolve: bool = False
    ) -> Terms:
        """D's loss on real and generated patches; with `super_resolve` also on high-resolution crops."""
        real, fake = self.real_patches(reals), (render.detach(), fakes.condition)
        terms = self._decide(real, reals, fake, fakes.augment_d, batch_size)
        if super_resolve:
            with torch.no_grad():
                image, _ = self.super_resolve(render.detach(), fakes.views, fakes.patches)
            crops = self._crop_super_resolved(image, fakes)
            more = self._decide(self.real_crops(reals), reals, crops, fakes.augment_sr, batch_size)
            for name in ("loss_d", "loss_d_class"):
                if name in more:
                    terms[name] = terms[name] + more.pop(name)
            terms |= {f"{name}_sr": value for name, value in more.items()}
        return terms

    def _decide(self, real: Patched, reals: RealInputs, fake: Patched, fake_augment: Tensor, batch_size: int) -> Terms:
        law = self.rules.augmentation
        with self.precision.autocast():
            real_logits, label_logits = self.discriminator(augment_patches(real[0], law, reals.augment), real[1])
            fake_logits, _ = self.discriminator(augment_patches(fake[0], law, fake_augment), fake[1])
        real_loss = losses.discriminator_real_loss(self.rules.gan_type, real_logits)
        fake_loss = losses.discriminator_fake_loss(self.rules.gan_type, fake_logits)
        terms = {
            "loss_d": (real_loss.sum() + fake_loss.sum()) / batch_size,
            "d_real": torch.sigmoid(real_logits.detach()).sum() / batch_size,
            "d_fake": torch.sigmoid(fake_logits.detach()).sum() / batch_size,
        }
        if label_logits is not None:
            terms["loss_d_class"] = self._class_loss(label_logits, reals.views).sum() / batch_size
        return terms

    def penalty_terms(
        self, reals: RealInputs, render: Tensor, batch_size: int, scaler: Scaler, super_resolve: bool = False
    ) -> Terms:
        """The gradient penalty on D (R1 or WGAN-GP) at its augmented input; R1 also on high-resolution crops."""
        penalty = self._penalise(self.real_patches(reals), reals, render.detach(), scaler)
        if super_resolve:
            penalty = penalty + self._penalise(self.real_crops(reals), reals, render.detach(), scaler)
        return {"penalty": penalty.sum() / batch_size}

    def _penalise(self, real: Patched, reals: RealInputs, fake: Tensor, scaler: Scaler) -> Tensor:
        law = self.rules.augmentation
        # Half precision would drown the second derivatives, hence float32 outside autocast.
        with float32_region(fake.device.type):
            inputs = augment_patches(real[0], law, reals.augment)
            if self.rules.reg_type == "wgangp":
                mix = reals.mix[:, None, None, None]
                inputs = mix * inputs + (1 - mix) * augment_patches(fake, law, reals.augment)
            inputs = inputs.detach().requires_grad_(True)
            logits, _ = self.discriminator(inputs, real[1])
            penalise = losses.gradient_penalty if self.rules.reg_type == "wgangp" else losses.r1_penalty
            return penalise(logits, inputs, scaler)

    def real_patches(self, reals: RealInputs) -> Patched:
        """Patches of the photographs at the generator's resolution."""
        images = reals.images if self.ccsr is None else self.ccsr.down(reals.images)
        return crop_images(images, reals.patches, self.patch_size), reals.condition

    def real_crops(self, reals: RealInputs) -> Patched:
        """High-resolution crops of D's size out of the same patches of the photographs."""
        _, patches = self._place_crops(reals.patches, reals.crop)
        return crop_images(reals.images, patches, self.patch_size), describe_patches(reals.views, patches)

    # ------------------------------------------------------------------------------------------------ generator

    def generator_terms(self, fakes: FakeInputs, render: Tensor, batch_size: int, super_resolve: bool = False) -> Terms:
        """G's loss; D must be frozen. With supervision, also the distance of a finer render to SR."""
        patches = augment_patches(render, self.rules.augmentation, fakes.augment_g)
        with self.precision.autocast():
            logits, label_logits = self.discriminator(patches, fakes.condition)
        terms = {"loss_g": losses.generator_loss(self.rules.gan_type, logits).sum() / batch_size}
        if label_logits is not None:
            terms["loss_g_class"] = self._class_loss(label_logits, fakes.views).sum() / batch_size
        if super_resolve and self.rules.super_resolution.supervision:
            terms["loss_g_supervision"] = self._supervision(fakes, render.detach()).sum() / batch_size
        return terms

    def _supervision(self, fakes: FakeInputs, render: Tensor) -> Tensor:
        """Super-NeRF's joint optimisation: detached SR crops are targets of the field rendered at their resolution."""
        with torch.no_grad():
            image, _ = self.super_resolve(render, fakes.views, fakes.patches)
        target, condition = self._crop_super_resolved(image, fakes)
        finer = self.render_patches(replace(fakes, patches=condition.patches))
        return (finer.rgb - target).square().mean((1, 2, 3))

    # ------------------------------------------------------------------------------------------------ super-resolution

    def render_neighbours(self, fakes: FakeInputs) -> RenderedPatches:
        """The same objects and patches from the neighbouring views of the agreement term, without a graph."""
        with torch.no_grad():
            return self.render_patches(fakes, self._neighbours(fakes))

    def super_resolution_terms(
        self,
        fakes: FakeInputs,
        render: RenderedPatches,
        batch_size: int,
        neighbours: RenderedPatches | None = None,
        reals: RealInputs | None = None,
    ) -> Terms:
        """CCSR's terms on detached renders and, for the agreement, those of `neighbours`; D must be frozen.

        With `reals` also how well their photographs are restored from their own reductions. The consistency term is
        taken on the output before the projection: after the projection it is zero and teaches nothing.
        """
        assert self.ccsr is not None
        rules = self.rules.super_resolution
        image, unprojected = self.super_resolve(render.rgb, fakes.views, fakes.patches)
        with float32_region(image.device.type):
            distance = (self.ccsr.down(unprojected) - render.rgb).square().mean((1, 2, 3))
        terms = {"loss_sr_consistency": distance.sum() / batch_size}
        if rules.adversarial:
            crops, condition = self._crop_super_resolved(image, fakes)
            with self.precision.autocast():
                logits, _ = self.discriminator(
                    augment_patches(crops, self.rules.augmentation, fakes.augment_sr), condition
                )
            terms["loss_sr"] = losses.generator_loss(self.rules.gan_type, logits).sum() / batch_size
        if rules.agreement and neighbours is not None:
            terms["loss_sr_agreement"] = self._agreement(fakes, render, image, neighbours).sum() / batch_size
        if reals is not None:
            terms["loss_sr_photographs"] = self._restoration(reals).sum() / batch_size
        if self.perceptual is not None:
            terms["loss_sr_perceptual"] = self.perceptual(image, render.rgb).sum() / batch_size
        return terms

    def _restoration(self, reals: RealInputs) -> Tensor:
        """Mean |SR(down(x)) - x| per patch x of photographs at high resolution: what GAN training alone leaves open."""
        assert self.ccsr is not None
        truth = crop_images(reals.images, reals.patches, self.ccsr.scale * self.patch_size)
        image, _ = self.super_resolve(self.ccsr.down(truth), reals.views, reals.patches)
        return (image - truth).abs().mean((1, 2, 3))

    def _neighbours(self, fakes: FakeInputs) -> Views:
        return fakes.views.turn(self.rules.super_resolution.agreement_degrees * fakes.turn)

    def _agreement(
        self, fakes: FakeInputs, render: RenderedPatches, image: Tensor, neighbours: RenderedPatches
    ) -> Tensor:
        """How much more two neighbouring views disagree, by super-resolution, where both see the same surface.

        Mean per image of max(0, |A - warp(B)| - |a - warp(b)|) with A, B super-resolved and a, b upsampled renders.
        Nothing is asked for below the disagreement of the renders themselves, which only blur could reach.
        """
        views = self._neighbours(fakes)
        other_image, _ = self.super_resolve(neighbours.rgb, views, fakes.patches)
        here = self._surface(image, render, fakes.views, fakes.patches)
        there = self._surface(other_image, neighbours, views, fakes.patches)
        warped, mask = warp_between(here, there, self.caster.intrinsics)
        sr, plain = (here.image - warped).abs().chunk(2, dim=1)
        excess = ((sr - plain).clamp(min=0) * mask).sum((1, 2, 3))
        return excess / (3 * mask.sum((1, 2, 3))).clamp(min=1)

    def _surface(self, image: Tensor, render: RenderedPatches, views: Views, patches: Patches) -> SurfaceView:
        """The surface of a render, painted with its super-resolution (3 channels) and its upsampled self (3 more)."""
        assert self.ccsr is not None
        both = torch.cat([image, upsample(render.rgb, self.ccsr.scale)], dim=1)
        return SurfaceView.from_render(both, render.depth, render.opacity, views.poses, patches, self.caster)

    # ------------------------------------------------------------------------------------------------ shared parts

    def _place_crops(self, patches: Patches, uniforms: Tensor) -> tuple[Tensor, Patches]:
        """First pixels (B, 2) of crops of D's size in patches of s times that size, and where those crops lie."""
        assert self.ccsr is not None
        size, scale = self.patch_size, self.ccsr.scale
        corner = torch.floor(uniforms * (size * (scale - 1) + 1)).long()
        return corner, subdivide_patches(patches, size, scale, corner)

    def _crop_super_resolved(self, image: Tensor, fakes: FakeInputs) -> Patched:
        """Crops of D's size (B, 3, K, K) out of SR patches (B, 3, s K, s K), and what they show."""
        corner, patches = self._place_crops(fakes.patches, fakes.crop)
        inside = torch.arange(self.patch_size, device=image.device)
        rows, columns = corner[:, 1, None] + inside, corner[:, 0, None] + inside
        batch = torch.arange(len(image), device=image.device)[:, None, None, None]
        channels = torch.arange(image.shape[1], device=image.device)[None, :, None, None]
        crops = image[batch, channels, rows[:, None, :, None], columns[:, None, None, :]]
        return crops, describe_patches(fakes.views, patches)

    def _class_loss(self, logits: Tensor, views: Views) -> Tensor:
        """Cross-entropy of class and, where poses are known, height and azimuth bin: (B,)."""
        columns = [views.labels[:, 0]]
        if self.discriminator.shape.condition_pose:
            num_views = self.rules.num_views
            columns += [views.labels[:, 1], torch.remainder((views.labels[:, 2] * num_views + 180) // 360, num_views)]
        return self.class_criterion(logits, torch.stack(columns, dim=1))
