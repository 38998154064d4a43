"""The optional perceptual distance, LPIPS (Zhang et al., CVPR 2018): of super-resolution and of inversion."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graf.models.ccsr import upsample
from graf.runtime.logs import warn_once


class PerceptualDistance:
    """LPIPS between super-resolved patches and the upsampled renders that they come from: one value per image (B,)."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def __call__(self, images: Tensor, renders: Tensor) -> Tensor:
        """images: (B, 3, s h, s w); renders: (B, 3, h, w)."""
        distance: Tensor = self.network(images, upsample(renders, images.shape[-1] // renders.shape[-1]))
        return distance.flatten(1).mean(1)


def load_perceptual_distance(
    device: torch.device, option: str = "ccsr.perceptual", what: str = "training"
) -> PerceptualDistance | None:
    """LPIPS on `device`, or None with one message where the package or its weights are missing.

    option: the setting that asks for it, at 0 nothing does; what: what goes on without it.
    """
    try:
        import lpips

        return PerceptualDistance(lpips.LPIPS(net="alex", verbose=False).to(device))
    except (ImportError, OSError) as error:
        warn_once(
            f"{option}: LPIPS is not available ({error}); {what} goes on without it. Run pip install lpips, or set "
            f"{option}=0"
        )
        return None
