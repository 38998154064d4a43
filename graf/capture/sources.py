"""What a person names as the source of a capture, opened: a video, or a folder of photographs."""

from __future__ import annotations

from pathlib import Path

from graf.capture.errors import CaptureError
from graf.capture.frames import MIN_FRAMES, Source
from graf.capture.photographs import HEIF_SUFFIXES, Photographs
from graf.capture.video import Video
from graf.data.images import IMAGE_SUFFIXES

ANIMATIONS = frozenset((".gif",))  # images' suffixes that ffmpeg reads as videos


def open_source(path: Path) -> Source:
    """A video or a folder of photographs. Raises CaptureError where it is neither, or empty, or broken."""
    if path.is_dir():
        return Photographs(path)
    if not path.exists():
        raise CaptureError(f"{path}: no such file or folder; expected a video, or a folder of photographs")
    if path.suffix.lower() in (IMAGE_SUFFIXES | HEIF_SUFFIXES) - ANIMATIONS:
        raise CaptureError(f"{path} is one photograph; expected a video, or a folder of at least {MIN_FRAMES}")
    return Video(path)
