"""FID and KID of a generator: the one way in which training and eval.py score, so that equal weights give equal numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from graf.data.views import ViewPool
from graf.evaluation.extractor import Extractor
from graf.evaluation.fidelity import FidelityProtocol, ImagesAsUint8, Plain, RenderedImages, Scores, score_images
from graf.evaluation.sampler import Sampler

RENDER_BATCH = 8


def score_generator(
    sampler: Sampler,
    pool: ViewPool,
    photographs: Dataset[Any],
    fingerprint: str,
    num_images: int,
    extractor: Extractor,
    protocol: FidelityProtocol,
    provenance: Mapping[str, Plain],
    cache_root: Path,
    progress: bool = True,
) -> Scores:
    """Score `num_images` random renders (codes and views from protocol.seed) against all `photographs`.

    fingerprint: identifies the photographs, whose features are cached under it. Images are rendered as they are scored.
    """
    with tqdm(total=num_images, desc="FID/KID", unit="image", leave=False, disable=not progress) as bar:

        def render(indices: list[int]) -> torch.Tensor:
            bar.update(len(indices))
            return sampler.render_random(pool, protocol.seed, range(indices[0], indices[-1] + 1))

        return score_images(
            ImagesAsUint8(photographs),
            RenderedImages(render, num_images, RENDER_BATCH),
            extractor,
            protocol,
            sampler.device,
            real_cache_name=fingerprint,
            cache_root=cache_root,
            provenance={"poses": pool.describe(), **provenance},
        )
