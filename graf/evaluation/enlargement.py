"""Is super-resolution worth having: its output and bicubic enlargement, both against true high-resolution images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graf.evaluation.extractor import Extractor
from graf.evaluation.fidelity import FidelityProtocol, Plain, Scores, TensorImages, score_images
from graf.evaluation.metrics import psnr, ssim
from graf.evaluation.pictures import to_uint8
from graf.geometry.views import Views

Gate = tuple[str, float, float, bool]


@dataclass(frozen=True)
class EnlargementReport:
    """Scores of "sr" and "bicubic" by output: mean psnr in dB, ssim, and FID and KID of the same images."""

    outputs: Mapping[str, Scores]
    kid_name: str

    def gates(self) -> list[Gate]:
        """Super-resolution beats bicubic enlargement in PSNR, SSIM and KID: (name, value, threshold, passed)."""
        sr, bicubic = (self.outputs[name].values for name in ("sr", "bicubic"))
        gates = [
            (f"sr {name} over bicubic", sr[name], bicubic[name], sr[name] > bicubic[name]) for name in ("psnr", "ssim")
        ]
        sr_kid, bicubic_kid = sr[self.kid_name], bicubic[self.kid_name]
        return [*gates, (f"sr {self.kid_name} below bicubic", sr_kid, bicubic_kid, sr_kid < bicubic_kid)]

    def lines(self) -> list[str]:
        """The scores for people, a line for each output."""
        rows = ((name, scores.values.items()) for name, scores in self.outputs.items())
        return [f"{name}: {', '.join(f'{key} {value:.5g}' for key, value in values)}" for name, values in rows]


@torch.no_grad()
def measure_enlargement(
    images: Tensor,
    views: Views,
    render: Callable[[Views], Mapping[str, Tensor]],
    extractor: Extractor,
    protocol: FidelityProtocol,
    device: torch.device,
    provenance: Mapping[str, Plain] | None = None,
) -> EnlargementReport:
    """Compare what `render(views)` returns, "sr" and "bicubic" (B, 3, H, W) in [-1, 1], with images (N, 3, H, W).

    One view at a time is rendered; the outputs are clipped, as they are shown.
    """
    rendered = [render(views[number : number + 1]) for number in range(len(views))]
    real, outputs = TensorImages(to_uint8(images)), {}
    for name in ("sr", "bicubic"):
        found = torch.cat([pair[name] for pair in rendered]).clamp(-1, 1)
        more = {**(provenance or {}), "scored": f"heldout {name}"}
        scores = score_images(real, TensorImages(to_uint8(found)), extractor, protocol, device, provenance=more)
        exact = {"psnr": float(psnr(found, images).mean()), "ssim": float(ssim(found, images).mean())}
        outputs[name] = replace(scores, values=exact | scores.values)
    return EnlargementReport(outputs, "kid" + extractor.suffix)
