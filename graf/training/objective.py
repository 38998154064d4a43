"""What discriminator, generator and super-resolution minimise: which terms there are, what each weighs, their formulas.

Each loss is returned with its statistics: the terms by name. Terms are sums over the images of a micro-batch divided by
the size of the whole batch, so that losses and gradients of micro-batches add up to those of the batch. Nothing here
steps an optimiser. To add a term, add its weight to the settings and its formula to the loss of its player.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graf.base.tensors import TensorBatch
from graf.geometry.rays import Patches, RayCaster, crop_pixels
from graf.geometry.views import Views
from graf.geometry.volume_rendering import Render
from graf.geometry.warping import SurfaceView, warp_between
from graf.models.ccsr import CCSR, LatentMixture, upsample
from graf.models.discriminator import PatchCondition, PatchDiscriminator
from graf.models.generator import Generator
from graf.runtime.amp import Precision, Scaler, float32_region
from graf.training import losses
from graf.training.augment import Augmentation, augment_patches
from graf.training.inputs import FakeInputs, RealInputs, SuperResolutionInputs
from graf.training.perceptual import PerceptualDistance

Statistics = dict[str, Tensor]


def decayed_weight(iteration: int, initial: float, minimum: float, decay: float) -> float:
    """max(minimum, initial exp(-decay iteration))."""
    return max(minimum, initial * math.exp(-decay * iteration))


@dataclass(frozen=True)
class SuperResolutionLossSettings:
    """Weights of CCSR's terms, 0 leaves one out, and when it is trained; keys of the configuration's `ccsr`.

    The consistency term weighs max(alpha_min, alpha_init exp(-alpha_decay it)); supervise_generator is a term of G.
    """

    adversarial: float
    agreement: float
    agreement_degrees: float
    photographs: float
    photometric: float
    perceptual: float
    supervise_generator: float
    alpha_init: float
    alpha_min: float
    alpha_decay: float
    start_iteration: int
    every: int

    def is_due(self, iteration: int) -> bool:
        """Whether super-resolution takes part in a step: D judges its crops, G may learn from it, it is updated."""
        return iteration >= self.start_iteration and iteration % self.every == 0

    def consistency_weight(self, iteration: int) -> float:
        """The weight of the consistency term at an iteration."""
        return decayed_weight(iteration, self.alpha_init, self.alpha_min, self.alpha_decay)


@dataclass(frozen=True)
class LossSettings:
    """Which losses are taken and what they weigh.

    reg_type: "none" | "real" (R1) | "wgangp", weight reg_param, taken every reg_every steps with so many times the
    weight; class_loss: weight of the label classification; num_views: its azimuth bins. The photometric term, where
    generated patches show what photographs show, weighs max(photometric_min, photometric exp(-photometric_decay it)),
    or nothing where photometric is 0; instance_prior: weight of the squared length of instances' codes, per number;
    opacity: weight of the mean opacity of generated patches. super_resolution: None without.
    """

    gan_type: str
    reg_type: str
    reg_param: float
    reg_every: int
    class_loss: float
    num_views: int
    augmentation: Augmentation
    photometric: float = 0.0
    photometric_min: float = 0.0
    photometric_decay: float = 0.0
    instance_prior: float = 0.0
    opacity: float = 0.0
    super_resolution: SuperResolutionLossSettings | None = None

    def photometric_weight(self, iteration: int) -> float:
        """The weight of the photometric term at an iteration."""
        if not self.photometric:  # generated patches may then show something else
            return 0.0
        return decayed_weight(iteration, self.photometric, self.photometric_min, self.photometric_decay)


@dataclass(frozen=True)
class LabelledPatches(TensorBatch):
    """Patches (B, 3, K, K) as D sees them, augmented, and what they are said to show."""

    images: Tensor
    condition: PatchCondition


@dataclass(frozen=True)
class GANObjective:
    """The losses of networks under settings; `ccsr` is None without super-resolution."""

    generator: Generator
    discriminator: PatchDiscriminator
    ccsr: CCSR | None
    caster: RayCaster
    settings: LossSettings
    patch_size: int
    precision: Precision
    class_criterion: losses.MCE_Loss
    perceptual: PerceptualDistance | None = None

    def penalty_is_due(self, iteration: int) -> bool:
        """Whether D's gradient penalty is taken in a step."""
        return self.settings.reg_type != "none" and iteration % self.settings.reg_every == 0

    def super_resolution_is_due(self, iteration: int) -> bool:
        """Whether super-resolution takes part in a step."""
        settings = self.settings.super_resolution
        return settings is not None and settings.is_due(iteration)

    @property
    def agreement_degrees(self) -> float | None:
        """The angle between views that have to agree; None where that is not asked."""
        settings = self.settings.super_resolution
        return settings.agreement_degrees if settings is not None and settings.agreement > 0 else None

    # ------------------------------------------------------------------------------------------------ rendering

    def render_patches(self, fakes: FakeInputs, views: Views | None = None) -> Render:
        """Generated patches; whether a graph is kept is the caller's choice. `views`: other views of these objects."""
        views = fakes.views if views is None else views
        rays = self.caster.cast_patches(*self.generator.aim(views, fakes.patches), self.patch_size)
        with self.precision.autocast():
            z = self.generator.codes(fakes.z, fakes.instance)
            return self.generator(z, views.class_idx, rays, fakes.noise).as_images()

    def render_neighbours(self, fakes: FakeInputs) -> Render | None:
        """The same objects and patches from the views that they have to agree with, without a graph; None without."""
        if fakes.super_resolution is None or fakes.super_resolution.neighbours is None:
            return None
        with torch.no_grad():
            return self.render_patches(fakes, fakes.super_resolution.neighbours)

    def super_resolve(self, render: Tensor, latents: LatentMixture, patches: Patches) -> tuple[Tensor, Tensor]:
        """CCSR's output (B, 3, s K, s K) and the trunk's output before the projection."""
        assert self.ccsr is not None
        with self.precision.autocast():
            resolved = self.ccsr(render, latents, patches)
        return resolved.image, resolved.unprojected

    # ------------------------------------------------------------------------------------------------ discriminator

    def cut_reals(self, reals: RealInputs) -> list[LabelledPatches]:
        """Patches of photographs at the generator's resolution and, with super-resolution, high-resolution crops."""
        found = [self._label(reals.images, reals.condition, reals.augment)]
        if reals.super_resolution is not None:
            assert reals.fine is not None
            found.append(self._label_crops(reals.fine, reals.super_resolution, reals.augment))
        return found

    def cut_fakes(self, fakes: FakeInputs, render: Tensor) -> list[LabelledPatches]:
        """Generated patches for D and, with super-resolution, crops of their super-resolution; without a graph."""
        render = render.detach()
        found, inputs = [self._label(render, fakes.condition, fakes.augment_d)], fakes.super_resolution
        if inputs is not None:
            with torch.no_grad():
                image, _ = self.super_resolve(render, inputs.latents, fakes.patches)
            found.append(self._label_crops(image, inputs, inputs.augment))
        return found

    def discriminator_loss(
        self, reals: list[LabelledPatches], fakes: list[LabelledPatches], views: Views, batch_size: int
    ) -> tuple[Tensor, Statistics]:
        """D's loss on real and generated patches, with super-resolution at both resolutions; views: of the reals."""
        # one pass over all: layers of a few small patches cost more to call than to compute
        logits, label_logits = self._discriminate(LabelledPatches.cat([*reals, *fakes]))
        real_logits, fake_logits = logits.chunk(2)
        real_loss = losses.discriminator_real_loss(self.settings.gan_type, real_logits)
        fake_loss = losses.discriminator_fake_loss(self.settings.gan_type, fake_logits)
        loss = (real_loss + fake_loss).sum() / batch_size
        names = [f"{name}{suffix}" for name in ("d_real", "d_fake") for suffix in ("", "_sr")[: len(reals)]]
        shares = torch.sigmoid(logits.detach()).view(len(names), -1).sum(1) / batch_size
        statistics = {"loss_d": loss, **dict(zip(names, shares.unbind(), strict=True))}
        if label_logits is not None:
            labels = views.labels.repeat(len(reals), 1)
            statistics["loss_d_class"] = self._class_loss(label_logits[: len(labels)], labels).sum() / batch_size
            loss = loss + self.settings.class_loss * statistics["loss_d_class"]
        return loss, statistics

    def penalty_loss(
        self, patches: list[LabelledPatches], reals: RealInputs, render: Tensor, batch_size: int, scaler: Scaler
    ) -> tuple[Tensor, Statistics]:
        """The gradient penalty on D (R1 or WGAN-GP) at its augmented input, at both resolutions.

        patches: what :meth:`cut_reals` made of `reals`; render: the generated patches that WGAN-GP mixes with them.
        """
        penalties = self._penalise(LabelledPatches.cat(patches), reals, render.detach(), scaler)
        penalty, *of_crops = (penalties.view(len(patches), -1).sum(1) / batch_size).unbind()
        for other in of_crops:
            penalty = penalty + self._share_of_crops * other
        return self.settings.reg_param * self.settings.reg_every * penalty, {"penalty": penalty}

    @property
    def _share_of_crops(self) -> float:
        """The penalty's weight on super-resolved crops beside that on patches.

        The penalty meets crops in every lcm(every, reg_every)-th step and D's loss on them is taken in every
        `every`-th: lcm / every times the weight is due, of which reg_every times are taken already.
        """
        settings = self.settings.super_resolution
        return 1.0 if settings is None else 1 / math.gcd(settings.every, self.settings.reg_every)

    def _discriminate(self, patches: LabelledPatches) -> tuple[Tensor, Tensor | None]:
        with self.precision.autocast():
            logits: tuple[Tensor, Tensor | None] = self.discriminator(patches.images, patches.condition)
            return logits

    def _penalise(self, patches: LabelledPatches, reals: RealInputs, fake: Tensor, scaler: Scaler) -> Tensor:
        # Half precision would drown the second derivatives, hence float32 outside autocast.
        with float32_region(fake.device.type):
            inputs = patches.images
            if self.settings.reg_type == "wgangp":
                share = reals.mix[:, None, None, None]
                other = (1 - share) * augment_patches(fake, self.settings.augmentation, reals.augment)
                inputs = torch.cat([share * part + other for part in inputs.split(len(share))])
            inputs = inputs.detach().requires_grad_(True)
            logits, _ = self.discriminator(inputs, patches.condition)
            penalise = losses.gradient_penalty if self.settings.reg_type == "wgangp" else losses.r1_penalty
            return penalise(logits, inputs, scaler)

    # ------------------------------------------------------------------------------------------------ generator

    def generator_loss(
        self, fakes: FakeInputs, render: Render, reals: RealInputs, batch_size: int, iteration: int
    ) -> tuple[Tensor, Statistics]:
        """G's loss; D must be frozen.

        With a photometric term also the mean squared distance of generated patches to `reals`, which show the same
        views at the same places, as far as they show the same objects: where instances are known, those that have their
        codes, else all; those codes keep near the distribution of the drawn ones, N(0, 1). With an opacity term the
        mean opacity of the same ones, which is 1 in a solid object whatever its density, so that fog of the
        background's colour gives way and the object, which photographs hold, stays; with learned cameras their distance
        to the given ones; with supervision that of a finer render to super-resolution.
        """
        logits, label_logits = self._discriminate(self._label(render.rgb, fakes.condition, fakes.augment_g))
        terms = {"loss_g": (1.0, losses.generator_loss(self.settings.gan_type, logits))}
        if label_logits is not None:
            terms["loss_g_class"] = (self.settings.class_loss, self._class_loss(label_logits, fakes.views.labels))
        is_shown = self._is_shown(fakes)
        if self.generator.instances is not None:
            codes = self.generator.codes(torch.zeros_like(fakes.z), fakes.instance)
            terms["loss_g_prior"] = (self.settings.instance_prior, codes.square().mean(1))
        photometric = self.settings.photometric_weight(iteration)
        if photometric:
            terms["loss_g_photometric"] = (photometric, losses.squared_distance(render.rgb, reals.images) * is_shown)
        if self.settings.opacity:
            terms["loss_g_opacity"] = (self.settings.opacity, render.opacity.mean((1, 2, 3)) * is_shown)
        if self.generator.cameras is not None:  # a whole one for every image, so that micro-batches add up
            terms["loss_g_cameras"] = (1.0, self.generator.cameras.penalty().expand(len(render)))
        settings = self.settings.super_resolution
        if settings is not None and settings.supervise_generator and fakes.super_resolution is not None:
            distance = self._supervise(fakes, fakes.super_resolution, render.rgb.detach())
            terms["loss_g_supervision"] = (settings.supervise_generator, distance)
        return losses.add_up(terms, batch_size)

    def _supervise(self, fakes: FakeInputs, inputs: SuperResolutionInputs, render: Tensor) -> Tensor:
        """Super-NeRF's joint optimisation: detached SR crops are targets of the field rendered at their resolution."""
        with torch.no_grad():
            image, _ = self.super_resolve(render, inputs.latents, fakes.patches)
        finer = self.render_patches(replace(fakes, patches=inputs.crop))
        return losses.squared_distance(finer.rgb, crop_pixels(image, inputs.pixels))

    # ------------------------------------------------------------------------------------------------ super-resolution

    def super_resolution_loss(
        self,
        fakes: FakeInputs,
        render: Render,
        neighbours: Render | None,
        reals: RealInputs,
        batch_size: int,
        iteration: int,
    ) -> tuple[Tensor, Statistics]:
        """CCSR's loss on detached renders and those of the neighbouring views, and on photographs; D must be frozen.

        The consistency term is taken before the projection: after it, it is zero and teaches nothing. The photometric
        one compares super-resolved renders with `reals` where these show the same objects, as in G's loss: a render
        lacks other things than a reduced photograph does. Squares find the mean of what a blurred render may be.
        """
        assert self.ccsr is not None
        settings, inputs = self.settings.super_resolution, fakes.super_resolution
        assert settings is not None
        assert inputs is not None
        sources = [(render.rgb, inputs.latents, fakes.patches)]
        if settings.photographs:
            assert reals.super_resolution is not None
            assert reals.fine is not None
            sources.append((self.ccsr.down(reals.fine), reals.super_resolution.latents, reals.patches))
        if neighbours is not None:
            assert inputs.neighbour_latents is not None
            sources.append((neighbours.rgb, inputs.neighbour_latents, fakes.patches))
        images, mixtures, places = zip(*sources, strict=True)
        resolved, unprojected = self.super_resolve(  # one pass over all, as in D's loss
            torch.cat(images), LatentMixture.cat(mixtures), Patches.cat(places)
        )
        image, *others = resolved.split(len(render))
        with float32_region(image.device.type):
            distance = losses.squared_distance(self.ccsr.down(unprojected[: len(render)]), render.rgb)
        terms = {"loss_sr_consistency": (settings.consistency_weight(iteration), distance)}
        if settings.adversarial:
            logits, _ = self._discriminate(self._label_crops(image, inputs, inputs.augment))
            terms["loss_sr"] = (settings.adversarial, losses.generator_loss(self.settings.gan_type, logits))
        if neighbours is not None:
            disagreement = self._disagreement(fakes, render, image, neighbours, others[-1])
            terms["loss_sr_agreement"] = (settings.agreement, disagreement)
        if settings.photographs:  # SR(down(x)) of photographs x: what GAN training alone leaves open
            terms["loss_sr_photographs"] = (settings.photographs, (others[0] - reals.fine).abs().mean((1, 2, 3)))
        if settings.photometric:
            assert reals.fine is not None
            distance = losses.squared_distance(image, reals.fine)
            terms["loss_sr_photometric"] = (settings.photometric, distance * self._is_shown(fakes))
        if self.perceptual is not None:
            terms["loss_sr_perceptual"] = (settings.perceptual, self.perceptual(image, render.rgb))
        return losses.add_up(terms, batch_size)

    def _disagreement(
        self, fakes: FakeInputs, render: Render, image: Tensor, neighbours: Render, neighbour_image: Tensor
    ) -> Tensor:
        """How much more two neighbouring views disagree, by super-resolution, where both see the same surface.

        Mean per image of max(0, |A - warp(B)| - |a - warp(b)|) with A, B super-resolved and a, b upsampled renders.
        Below what the renders themselves disagree by nothing is asked: only blur could get there.
        """
        inputs = fakes.super_resolution
        assert inputs is not None
        assert inputs.neighbours is not None
        view = self._surface(image, render, fakes.views, fakes.patches)
        neighbour = self._surface(neighbour_image, neighbours, inputs.neighbours, fakes.patches)
        warped, mask = warp_between(view, neighbour, self.caster.intrinsics)
        resolved, upsampled = (view.image - warped).abs().chunk(2, dim=1)
        excess = ((resolved - upsampled).clamp(min=0) * mask).sum((1, 2, 3))
        return excess / (3 * mask.sum((1, 2, 3))).clamp(min=1)

    def _surface(self, image: Tensor, render: Render, views: Views, patches: Patches) -> SurfaceView:
        """The surface of a render, painted with its super-resolution (3 channels) and its upsampled self (3 more)."""
        assert self.ccsr is not None
        both = torch.cat([image, upsample(render.rgb, self.ccsr.scale)], dim=1)
        with torch.no_grad():
            poses, patches = self.generator.aim(views, patches)
        return SurfaceView.from_render(render, poses, patches, self.caster, both)

    # ------------------------------------------------------------------------------------------------ shared parts

    def _is_shown(self, fakes: FakeInputs) -> Tensor:
        """Which generated patches (B,) show the photographs' objects: known instances, all where none has a code."""
        if self.generator.instances is None:
            return torch.ones_like(fakes.instance, dtype=torch.bool)
        return fakes.instance >= 0

    def _label(self, images: Tensor, condition: PatchCondition, uniforms: Tensor) -> LabelledPatches:
        """Patches for D, augmented with random numbers `uniforms`."""
        return LabelledPatches(augment_patches(images, self.settings.augmentation, uniforms), condition)

    def _label_crops(self, images: Tensor, inputs: SuperResolutionInputs, uniforms: Tensor) -> LabelledPatches:
        """Crops of D's size (B, 3, K, K) out of patches (B, 3, s K, s K), for D."""
        return self._label(crop_pixels(images, inputs.pixels), inputs.condition, uniforms)

    def _class_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of class and, where poses are known, height and azimuth bin of labels (B, 4): (B,)."""
        columns = [labels[:, 0]]
        if self.discriminator.shape.condition_pose:
            num_views = self.settings.num_views
            columns += [labels[:, 1], torch.remainder((labels[:, 2] * num_views + 180) // 360, num_views)]
        return self.class_criterion(logits, torch.stack(columns, dim=1))
