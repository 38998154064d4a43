"""Capturing an object that rests while the camera moves: from the frames to transforms.json and capture.yaml."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graf.app.capture_configuration import next_steps, write_posed_configuration
from graf.base.files import replace_file
from graf.capture.errors import CaptureError
from graf.capture.frames import DEFAULT_FRAMES, Frame, Picture, select_frames
from graf.capture.markers import centre_on_sheet, poses_from_markers
from graf.capture.masks import draw_masks, masks_of
from graf.capture.photo_set import work_in
from graf.capture.photographs import Photographs
from graf.capture.posed import (
    PosedPhotographs,
    aim_at_object,
    centre_on_object,
    check_new,
    training_overrides,
    write_transforms,
)
from graf.capture.sources import open_source
from graf.capture.visual_hull import recut_masks, tighten_masks
from graf.capture.walkaround import WalkaroundSettings, reconstruct
from graf.data.labels import CAPTURE_FILE, CAPTURE_FOLDER, LABELS_FILE


@dataclass(frozen=True)
class WalkOptions:
    """What `graf capture` was asked for: of a walk-around (pycolmap), or with `markers` of a printed sheet."""

    source: Path
    out: Path
    mask: str
    frames: int | None
    size: int
    fov: float | None
    markers: bool
    features: str


def capture_walk(options: WalkOptions) -> list[str]:
    """Write a set with true poses into `options.out`; returns lines for the person. Raises UserError."""
    with work_in(options.out):
        return _capture(options)


def _capture(options: WalkOptions) -> list[str]:
    _check_new(options.out)
    source = open_source(options.source)
    is_folder = isinstance(source, Photographs)
    frames = select_frames(source, options.frames, None if is_folder else DEFAULT_FRAMES)
    masks = None if options.mask == "none" else masks_of(frames, options.mask)
    posed, lines = _find_cameras(options, frames, masks, is_folder)
    posed, replaced = tighten_masks(posed)
    if replaced:
        lines.append(f"note: {replaced} masks were wrong and were replaced by the outline that the others tell")
    aimed = aim_at_object(posed, options.size)
    if options.mask == "auto" and all(frame.alpha is None for frame in frames):
        aimed = recut_masks(aimed)
    if aimed.masks is not None:
        pictures = [Frame(image, 0.0, name) for image, name in zip(aimed.images, aimed.names, strict=True)]
        sheet = options.out / CAPTURE_FOLDER / "masks.png"
        with replace_file(sheet) as stream:
            draw_masks(pictures, aimed.masks, aimed.names).save(stream, format="PNG")
        lines.append(f"wrote {sheet}: the object should be bright in it and everything else dark red")
    config_file = options.out / CAPTURE_FILE
    write_posed_configuration(
        config_file,
        training_overrides(aimed),
        masked=masks is not None,
        side=aimed.lens.width,
        count=len(aimed),
    )
    try:
        transforms = write_transforms(options.out, aimed)
    except BaseException:
        config_file.unlink()
        raise
    lines.append(f"wrote {transforms}: {len(aimed)} pictures of {aimed.lens.width} pixels")
    return lines + next_steps(config_file)


def _check_new(folder: Path) -> None:
    """Raises CaptureError where a folder holds a set already, before any work is done for it."""
    check_new(folder)
    if (folder / LABELS_FILE).exists():
        raise CaptureError(
            f"--out {folder} has photographs of a turntable ({LABELS_FILE}); other poses need a folder of their own"
        )
    if (folder / CAPTURE_FILE).exists():
        raise CaptureError(
            f"{folder / CAPTURE_FILE} exists already, without photographs; remove it, or give another --out"
        )


def _find_cameras(
    options: WalkOptions, frames: Sequence[Frame], masks: Sequence[Picture] | None, is_folder: bool
) -> tuple[PosedPhotographs, list[str]]:
    """The frames whose cameras were found, in the object's world, and what is said of them."""
    images, names = [frame.image for frame in frames], [frame.source for frame in frames]
    fov = None if options.fov is None else _across_width(images[0], options.fov)
    if options.markers:
        marked = poses_from_markers(images, masks, names, fov)
        return centre_on_sheet(marked), marked.report()
    settings = WalkaroundSettings(features=options.features, ordered=not is_folder, fov=fov)
    found = reconstruct(images, masks, names, settings)
    return centre_on_object(found.photographs), found.report()


def _across_width(image: np.ndarray, fov: float) -> float:
    """Degrees across the width of a picture that shows `fov` degrees across its longer side."""
    share = image.shape[1] / max(image.shape[:2])
    return math.degrees(2 * math.atan(share * math.tan(math.radians(fov) / 2)))
