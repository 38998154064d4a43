"""FID and KID of a generator: training and eval.py score in this one way, so equal weights give equal numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from graf.evaluation.extractor import Extractor
from graf.evaluation.fidelity import (
    Features,
    FidelityProtocol,
    ImagesAsUint8,
    Plain,
    RenderedImages,
    Scores,
    extract_features,
    score_images,
)
from graf.evaluation.metrics import psnr, ssim
from graf.evaluation.renderer import Renderer
from graf.geometry.views import PoseSampler, Views
from graf.models.ccsr import upsample
from graf.runtime.distributed import Processes
from graf.runtime.logs import progress_bar
from graf.runtime.memory import retry_smaller

#: images that are rendered for one call of the extractor's loader
RENDER_BATCH = 8


@dataclass(frozen=True)
class ValidationTask:
    """PSNR and SSIM of renders with the instance's code, or else z = 0, against photographs of the validation split.

    images: (N, 3, H, W) in [-1, 1] at the render's resolution; views: the N that they were taken from.
    """

    renderer: Renderer
    images: torch.Tensor
    views: Views

    def measure(self) -> dict[str, float]:
        """The means over the photographs, by name."""
        z = self.renderer.instance_codes(self.views.labels[:, 3])
        rgb = self.renderer.render_views(z, self.views).rgb
        scores = {"psnr": psnr(rgb, self.images), "ssim": ssim(rgb, self.images)}
        return {f"{name}_validation": float(values.mean()) for name, values in scores.items()}


@dataclass
class ScoringTask:
    """Everything about a score but the output that is scored.

    Codes and views of the generated images come from protocol.seed; features of the real images are cached under
    cache_root. Where memory runs out, protocol.batch_size, images per pass of the extractor, is halved from then on.
    Several processes render and look at a share of the images each; the first one compares, and all have its scores.
    """

    renderer: Renderer
    pose_sampler: PoseSampler
    extractor: Extractor
    protocol: FidelityProtocol
    num_images: int
    cache_root: Path
    processes: Processes = field(default_factory=Processes)

    def score(
        self, output: str, photographs: Dataset[Any], fingerprint: str, provenance: Mapping[str, Plain] | None = None
    ) -> Scores:
        """FID and KID of `output` against the photographs; names other than the render's begin with the output's.

        output: "render", its super-resolution "sr", or "bicubic", its upsampling by the same factor. photographs: the
        real images at that resolution; fingerprint: identifies them in the cache; provenance: what else is known of the
        generator.
        """
        more: dict[str, Plain] = {"output": output, "poses": self.pose_sampler.describe()}
        more |= {"truncation": self.renderer.truncation, **(provenance or {})}
        scores = retry_smaller(
            lambda: self._score(output, photographs, fingerprint, more),
            self._halve_batch,
            self.renderer.device,
            "lower data.imsize, or score less often (training.fid_every)",
        )
        if output == "render":
            return scores
        return Scores({f"{output}_{name}": value for name, value in scores.values.items()}, scores.provenance)

    def _score(
        self, output: str, photographs: Dataset[Any], fingerprint: str, provenance: Mapping[str, Plain]
    ) -> Scores:
        with progress_bar(total=self.num_images, desc=f"FID/KID of {output}", unit="image") as bar:

            def render(indices: list[int]) -> torch.Tensor:
                bar.update(len(indices))
                return self._render(output, range(indices[0], indices[-1] + 1))

            fakes = RenderedImages(render, self.num_images, RENDER_BATCH)
            features = None
            if self.processes.size > 1:
                features = self._share_features(fakes)

            def compare() -> Scores:
                return score_images(
                    ImagesAsUint8(photographs, self.renderer.before_image),
                    fakes,
                    self.extractor,
                    self.protocol,
                    self.renderer.device,
                    real_cache_name=fingerprint,
                    cache_root=self.cache_root,
                    provenance=provenance,
                    fake_features=features,
                )

            return self.processes.by_first(compare)

    def _share_features(self, fakes: RenderedImages) -> Features:
        """The features of all images, by the layers that they come from, in the first process; {} in the others."""
        blocks = self.processes.share(-(-self.num_images // RENDER_BATCH))  # whole ones: rounding depends on them
        numbers = range(blocks.start * RENDER_BATCH, min(blocks.stop * RENDER_BATCH, self.num_images))
        extractor, device = self.extractor, self.renderer.device
        own = self.processes.together(
            lambda: extract_features(Subset(fakes, numbers), extractor, self.protocol, device) if numbers else {}
        )
        shares = [share for share in self.processes.gather(own) if share]
        return {layer: torch.cat([share[layer] for share in shares]) for layer in (shares[0] if shares else {})}

    def _halve_batch(self) -> str | None:
        size = self.protocol.batch_size
        if size <= 1:
            return None
        self.protocol = replace(self.protocol, batch_size=size // 2)
        return f"evaluation.batch_size {size} -> {size // 2}"

    def _render(self, output: str, indices: range) -> torch.Tensor:
        renders = self.renderer.render_random(
            self.pose_sampler, self.protocol.seed, indices, super_resolve=output == "sr"
        )
        if output == "render":
            return renders.rgb
        if output == "bicubic":
            assert self.renderer.ccsr is not None
            return upsample(renders.rgb, self.renderer.ccsr.scale)
        assert renders.sr is not None
        return renders.sr
