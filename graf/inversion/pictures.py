"""Pictures of what was found: the photograph beside renders of the found object, and that object from around."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from graf.evaluation.pictures import Picture, label_grid, opacity_to_rgb, tile_grid, to_uint8
from graf.evaluation.renderer import Renderer, Renders
from graf.inversion.photograph import Photograph
from graf.inversion.search import Hypothesis

#: pixels along the side of an image in a picture, at least
SHOWN_SIDE = 160
NUM_VIEWS = 8


def compare(rows: Sequence[tuple[str, Renderer]], photograph: Photograph, found: Hypothesis) -> Picture:
    """A row for each (caption, renderer): photograph, its mask, render from the found camera, difference, opacity.

    The difference is the mean of the absolute differences of the colours, white where nothing differs, black from a
    quarter of the range on.
    """
    shown: list[Tensor] = []
    has_mask = photograph.mask is not None
    for _, renderer in rows:
        renders = renderer.sample(z=found.z, class_name=found.class_idx, **found.camera)
        difference = (renders.rgb - photograph.colours).abs().mean(1, keepdim=True)
        images = [photograph.colours, renders.rgb, opacity_to_rgb((1 - 2 * difference).clamp(0, 1))]
        images.append(opacity_to_rgb(renders.opacity))
        if photograph.mask is not None:
            images.insert(1, opacity_to_rgb(photograph.mask))
        shown += [_enlarge(image) for image in images]
    captions = ["photograph", *(["its mask"] if has_mask else []), "render", "difference", "opacity"]
    return label_grid(tile_grid(torch.cat(shown), len(captions)), [caption for caption, _ in rows], captions)


def show_around(rows: Sequence[tuple[str, Renderer]], found: Hypothesis) -> Picture:
    """A row for each (caption, renderer): the found object from NUM_VIEWS azimuths, beginning with its own.

    Super-resolved where the run can do that.
    """
    azimuths = [(found.azimuth + 360 * number / NUM_VIEWS) % 360 for number in range(NUM_VIEWS)]
    shown = []
    for _, renderer in rows:
        renders: Renders = renderer.sample(
            z=found.z,
            class_name=found.class_idx,
            azimuth=azimuths,
            elevation=found.elevation,
            radius=found.radius,
            super_resolve=renderer.ccsr is not None,
        )
        shown.append(_enlarge(renders.rgb if renders.sr is None else renders.sr))
    columns = [f"{azimuth:.0f}" for azimuth in azimuths]
    return label_grid(tile_grid(torch.cat(shown), NUM_VIEWS), [caption for caption, _ in rows], columns)


def _enlarge(images: Tensor) -> Tensor:
    """uint8, each pixel as a square of as many as make the image SHOWN_SIDE wide."""
    factor = max(1, -(-SHOWN_SIDE // images.shape[-1]))
    return to_uint8(functional.interpolate(images, scale_factor=factor, mode="nearest"))
