"""Photographs of a folder as frames: upright, reduced, with the transparency and field of view that files tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from graf.base.extras import import_optional
from graf.capture.errors import CaptureError
from graf.capture.frames import MIN_FRAMES, Frame, fit_within
from graf.data.images import (
    DECODER_ERRORS,
    FORMATS,
    IMAGE_SUFFIXES,
    has_alpha,
    quiet_decoders,
    to_8_bit,
    turn_upright,
)
from graf.data.labels import natural_key

HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif"))


class Photographs:
    """The image files of a folder in natural order of their names. HEIC needs pillow-heif."""

    def __init__(self, path: Path) -> None:
        self.path = path
        suffixes = IMAGE_SUFFIXES | HEIF_SUFFIXES
        try:
            files = [file for file in path.iterdir() if file.suffix.lower() in suffixes and file.is_file()]
        except OSError as error:
            raise CaptureError(
                f"{path}: cannot be read ({error.strerror}); expected a folder of photographs"
            ) from error
        self.files = sorted(
            (file for file in files if not file.name.startswith(".")), key=lambda file: natural_key(file.name)
        )
        if len(self.files) < MIN_FRAMES:
            raise CaptureError(
                f"{path} holds {len(self.files)} photographs; expected at least {MIN_FRAMES} of one object "
                f"({', '.join(sorted(suffixes))})"
            )
        if any(file.suffix.lower() in HEIF_SUFFIXES for file in self.files):
            import_optional("pillow_heif", "capture").register_heif_opener()

    def __len__(self) -> int:
        return len(self.files)

    def read(self, side: int, numbers: Sequence[int] | None = None) -> Iterator[Frame]:
        """Photographs in order; see Source."""
        for number in range(len(self.files)) if numbers is None else numbers:
            yield read_photograph(self.files[number], side, float(number))


def read_photograph(file: Path, side: int, time: float = 0.0) -> Frame:
    """A photograph as a frame, upright, its longer side at most `side` pixels. Raises CaptureError."""
    formats = ("HEIF",) if file.suffix.lower() in HEIF_SUFFIXES else FORMATS
    try:
        with quiet_decoders(), Image.open(file, formats=formats) as opened:
            fov = _diagonal_fov(opened)
            opened.draft("RGB", (side, side))  # a JPEG is decoded at a fraction of its size
            upright = to_8_bit(turn_upright(opened))
            is_transparent = has_alpha(upright)
            pixels = np.asarray(upright.convert("RGBA" if is_transparent else "RGB"))
    except DECODER_ERRORS as error:
        raise CaptureError(f"{file} cannot be read ({error}); repair or remove it") from error
    alpha = fit_within(pixels[..., 3], side) if is_transparent else None
    return Frame(fit_within(np.ascontiguousarray(pixels[..., :3]), side), time, file.name, alpha, fov)


def _diagonal_fov(image: Image.Image) -> float | None:
    """Degrees across the diagonal, from the focal length on 35 mm film (whose diagonal is 43.27 mm) that EXIF tells."""
    try:
        focal = float(image.getexif().get_ifd(0x8769).get(0xA405, 0))
    except DECODER_ERRORS:  # EXIF may be damaged beside an intact image
        return None
    return float(2 * np.degrees(np.arctan(43.27 / 2 / focal))) if focal > 0 else None
