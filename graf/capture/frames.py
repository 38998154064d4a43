"""Frames and which of them to use: a quick look at all that a source has, a choice, and the chosen ones in full.

Frames are uint8 (H, W, 3) sRGB, upright (phone rotation and EXIF orientation applied), HDR videos tone-mapped. Sources
are in video.py and photographs.py. They are read as a stream: once small, to compare, and once for the chosen frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from graf.base.extras import import_optional
from graf.capture.errors import CaptureError
from graf.runtime.logs import progress_bar

Picture = np.ndarray

FULL_SIDE = 1600  # pixels of the longer side of a chosen frame: more than a data set's images are made of
SCAN_SIDE = 480  # of a frame whose sharpness is measured: a blur that matters is seen here
GREY_SIDE = 160  # of what motion is measured on
THUMBNAIL_SIDE = 48  # of what is compared
MIN_FRAMES = 8  # of a usable source
DEFAULT_FRAMES = 72  # of a video, one in 5 degrees of a turn
NEIGHBOURHOOD = 1 / 3  # of the step between chosen frames: how far the sharpest one may lie to either side
SHARP = 0.8  # of the sharpest one's variance: as sharp, so that the one in the middle is taken
DUPLICATE = 0.1  # of the usual difference of two chosen frames: a nearer one shows the same


@dataclass(frozen=True)
class Frame:
    """A picture uint8 (H, W, 3) sRGB, when it was taken (seconds from the start; the number of a photograph) and where
    it comes from (a file's name, for a video with "#" and the number of the frame).

    alpha: uint8 (H, W), the transparency that the file itself has, or None; diagonal_fov: degrees across the diagonal
    of the photograph as its EXIF tells, or None.
    """

    image: Picture
    time: float
    source: str
    alpha: Picture | None = None
    diagonal_fov: float | None = None


class Source(Protocol):
    """Where frames come from. `path` is what the person named."""

    path: Path

    def __len__(self) -> int:
        """How many frames there are to choose from, about."""

    def read(self, side: int, numbers: Sequence[int] | None = None) -> Iterator[Frame]:
        """Frames in order, all or those of sorted `numbers`, the longer side at most `side` pixels."""


@dataclass(frozen=True)
class Scan:
    """A quick look at all n frames: `times` (n,) in seconds, `sharpness` (n,) (variance of the Laplacian), `grey` uint8
    (n, h, w) and `thumbnails` uint8 (n, h', w', 3).
    """

    times: np.ndarray
    sharpness: np.ndarray
    grey: np.ndarray
    thumbnails: np.ndarray

    def __len__(self) -> int:
        return len(self.times)


def scan(source: Source) -> Scan:
    """Look at every frame of a source once."""
    cv2 = import_optional("cv2", "capture")
    times, sharpness, grey, thumbnails = [], [], [], []
    first: Frame | None = None
    for frame in progress_bar(source.read(SCAN_SIDE), desc=f"looking at {source.path.name}", total=len(source)):
        first = first or frame
        _check_size(source, frame, first)
        scanned = cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY)
        times.append(frame.time)
        sharpness.append(cv2.Laplacian(scanned, cv2.CV_32F).var())
        grey.append(fit_within(scanned, GREY_SIDE))
        thumbnails.append(fit_within(frame.image, THUMBNAIL_SIDE))
    if len(times) < MIN_FRAMES:
        raise CaptureError(f"{source.path} has {len(times)} frames; expected at least {MIN_FRAMES}, better 36 and more")
    return Scan(np.array(times), np.array(sharpness), np.stack(grey), np.stack(thumbnails))


def read_frames(source: Source, numbers: Sequence[int]) -> list[Frame]:
    """The chosen frames in full. Raises CaptureError where they differ in size, which a quick look may not show."""
    frames = list(source.read(FULL_SIDE, numbers))
    for frame in frames:
        _check_size(source, frame, frames[0])
    return frames


def _check_size(source: Source, frame: Frame, first: Frame) -> None:
    if frame.image.shape != first.image.shape:
        raise CaptureError(
            f"{source.path}: {frame.source} is read as {_size(frame)}, {first.source} as {_size(first)}; expected "
            "frames of one camera with one zoom, all upright or all on their side"
        )


def choose_frames(seen: Scan, count: int, start: float = 0.0, length: float | None = None) -> list[int]:
    """Numbers of `count` frames, evenly spaced over `length` frames from `start`, each the sharpest of those around it.

    A frame that shows the same as the chosen one before it is left out. Without `length`, or where it reaches beyond
    the last frame by more than a step, the first and the last frame are the ends. Raises CaptureError where `count` is
    more than there is.
    """
    is_open = length is None or start + length - len(seen) > length / count
    available = len(seen) - start if length is None else min(length, len(seen) - start)
    if count > round(available):
        raise CaptureError(
            f"--frames {count}: there are {round(available)} frames to choose from; ask for fewer, or film slower"
        )
    step = (available - 1) / max(count - 1, 1) if is_open else float(length or 0) / count
    chosen: list[int] = []
    for place in start + step * np.arange(count):
        low = max(round(place - NEIGHBOURHOOD * step), chosen[-1] + 1 if chosen else int(np.ceil(start)))
        high = min(round(place + NEIGHBOURHOOD * step), len(seen) - 1)
        if low <= high:  # a turn may end a little after the video does
            numbers = np.arange(low, high + 1)
            sharp = numbers[seen.sharpness[low : high + 1] >= SHARP * seen.sharpness[low : high + 1].max()]
            chosen.append(int(sharp[np.abs(sharp - place).argmin()]))
    return drop_duplicates(seen, chosen)


def drop_duplicates(seen: Scan, numbers: Sequence[int]) -> list[int]:
    """Those of `numbers` that differ from the one kept before by more than a small part of the usual difference."""
    if len(numbers) < 2:
        return list(numbers)
    pictures = seen.thumbnails[list(numbers)].astype(np.float32)
    usual = np.median([np.abs(one - other).mean() for one, other in pairwise(pictures)])
    kept = [0]
    for place in range(1, len(numbers)):
        if np.abs(pictures[place] - pictures[kept[-1]]).mean() > DUPLICATE * usual:
            kept.append(place)
    return [numbers[place] for place in kept]


def select_frames(source: Source, count: int | None, most: int | None = None) -> list[Frame]:
    """`count` frames of a whole source (None: all, or the `most`) in full, evenly spaced, sharp, no two the same."""
    seen = scan(source)
    if count is None:
        count = min(len(seen), most or len(seen))
    return read_frames(source, choose_frames(seen, count))


def fit_within(image: Picture, side: int) -> Picture:
    """The image reduced, by averaging, until its longer side is at most `side` pixels."""
    factor = side / max(image.shape[:2])
    if factor >= 1:
        return image
    cv2 = import_optional("cv2", "capture")
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))


def _size(frame: Frame) -> str:
    return f"{frame.image.shape[1]}x{frame.image.shape[0]}"
