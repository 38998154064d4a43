"""Differentiable augmentation of D's inputs (Zhao et al., NeurIPS 2020): the same on real and fake patches.

It keeps a discriminator from learning a small photo collection by heart. All random numbers are passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: random numbers per image that `augment_patches` takes
NUM_UNIFORMS = 7


@dataclass(frozen=True)
class Augmentation:
    """colour: strength in [0, 1]; translation: largest shift, cutout: side of the blank square, as shares of it."""

    colour: float = 0.0
    translation: float = 0.0
    cutout: float = 0.0


def augment_patches(patches: Tensor, augmentation: Augmentation, uniforms: Tensor) -> Tensor:
    """Augment (B, 3, K, K) patches with random numbers `uniforms` (B, NUM_UNIFORMS) in [0, 1)."""
    size = patches.shape[-1]
    if augmentation.colour:
        patches = jitter_colour(patches, augmentation.colour * (2 * uniforms[:, :3] - 1))
    if augmentation.translation:
        shift = torch.round((2 * uniforms[:, 3:5] - 1) * augmentation.translation * size).long()
        patches = translate(patches, shift)
    if augmentation.cutout:
        side = round(augmentation.cutout * size)
        corner = torch.floor(uniforms[:, 5:7] * (size + 1)).long() - side // 2
        pixels = torch.arange(size, device=patches.device)
        inside = (pixels >= corner[..., None]) & (pixels < corner[..., None] + side)  # (B, 2, K)
        patches = patches * ~(inside[:, 1, :, None] & inside[:, 0, None, :])[:, None]
    return patches


def jitter_colour(patches: Tensor, amounts: Tensor) -> Tensor:
    """Add a_0 / 2 to brightness, scale saturation by 1 + a_1 and contrast by 1 + a_2 / 2; a = amounts (B, 3)."""
    brightness, saturation, contrast = (amounts[:, i, None, None, None] for i in range(3))
    patches = patches + brightness / 2
    grey = patches.mean(1, keepdim=True)
    patches = grey + (patches - grey) * (1 + saturation)
    middle = patches.mean((1, 2, 3), keepdim=True)
    return middle + (patches - middle) * (1 + contrast / 2)


def translate(patches: Tensor, shift: Tensor) -> Tensor:
    """Move each patch by whole pixels, shift (B, 2) = (x, y); uncovered pixels repeat the edge."""
    batch, channels, height, width = patches.shape
    columns = (torch.arange(width, device=patches.device) - shift[:, 0, None]).clamp(0, width - 1)
    rows = (torch.arange(height, device=patches.device) - shift[:, 1, None]).clamp(0, height - 1)
    moved = patches.gather(2, rows[:, None, :, None].expand(batch, channels, height, width))
    return moved.gather(3, columns[:, None, None, :].expand(batch, channels, height, width))
