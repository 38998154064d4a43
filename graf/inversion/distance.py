"""How far renders are from a photograph: squared differences at several scales, silhouettes, and LPIPS where it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from graf.evaluation.metrics import psnr
from graf.geometry.volume_rendering import Render
from graf.inversion.photograph import Photograph
from graf.training.perceptual import PerceptualDistance

#: how often images are halved, besides the images themselves: coarse differences still tell where fine ones do not meet
HALVINGS = 2
#: AlexNet, on which LPIPS looks, has nothing left of smaller images
SMALLEST_PERCEPTUAL = 32


@dataclass(frozen=True)
class PhotoDistance:
    """The distance of renders from a photograph, one number per image.

    silhouette: weight of the squared difference between opacity and mask, where the photograph has one; perceptual:
    LPIPS (Zhang et al., CVPR 2018) and its weight, where its weights exist, of images that are large
    enough. Colours count in units of [-1, 1]: 0.004 is 30 dB.
    """

    silhouette: float = 0.5
    perceptual: PerceptualDistance | None = None
    perceptual_weight: float = 0.0

    def __call__(self, render: Render, photograph: Photograph) -> Tensor:
        """Of images (B, ...) from one photograph of their size: (B,), float32."""
        opacity = render.opacity.float()
        rgb, colours = _comparable(render.rgb, photograph)
        total = multi_scale_error(rgb, colours)
        if photograph.mask is not None:
            total = total + self.silhouette * multi_scale_error(opacity, photograph.mask)
        if self.perceptual is not None and self.perceptual_weight and rgb.shape[-1] >= SMALLEST_PERCEPTUAL:
            shown = rgb.expand(-1, 3, -1, -1), colours.expand(len(rgb), 3, -1, -1)
            total = total + self.perceptual_weight * self.perceptual(*shown)
        return total


def photo_psnr(rgb: Tensor, photograph: Photograph) -> float:
    """PSNR in dB of one render (1, 3, H, H) of a photograph of its size; of brightness where that has no colours."""
    return float(psnr(*_comparable(rgb.clamp(-1, 1), photograph)))


def _comparable(rgb: Tensor, photograph: Photograph) -> tuple[Tensor, Tensor]:
    """Colours of renders and of a photograph, or brightness alone (B, 1, H, W) where it tells no more."""
    if photograph.is_grey:
        return rgb.float().mean(1, keepdim=True), photograph.colours.mean(1, keepdim=True)
    return rgb.float(), photograph.colours


def multi_scale_error(images: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference (B,) of (B, C, H, W) from (1, C, H, W), averaged over HALVINGS + 1 sizes."""
    difference = images - target  # averaging is linear: that of the difference is the difference of averages
    errors = [difference.square().mean((1, 2, 3))]
    for _ in range(HALVINGS):
        if min(difference.shape[-2:]) < 4:
            break
        difference = functional.avg_pool2d(difference, 2)
        errors.append(difference.square().mean((1, 2, 3)))
    return torch.stack(errors).mean(0)
