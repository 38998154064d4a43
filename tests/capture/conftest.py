"""Toys on a turntable, filmed with known angles, and videos written with the ffmpeg that imageio brings."""

import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from benchmarks.videos import Footage, Shot, film_turntable

SHOT = Shot(size=96, frames=40, turns=1.3)


@cache
def film(toy: str, textured: bool = False) -> Footage:
    """A turn and a third of a toy, 40 frames a turn, the camera's azimuth growing."""
    return film_turntable(toy, replace(SHOT, textured=textured))


@pytest.fixture(scope="session")
def film_of():
    return film


@pytest.fixture(scope="session")
def mug_film():
    return film("mug")


@pytest.fixture(scope="session")
def textured_film():
    return film("mug", textured=True)


def encode(path, frames, *options, rate=20, before=()):
    """Write frames (N, H, W, 3), uint8 or uint16, as a video; options are ffmpeg's for the output."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    kind = "rgb24" if frames.dtype == np.uint8 else "rgb48le"
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    command = [ffmpeg, "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", kind, "-s", size, "-r", str(rate), *before]
    command += ["-i", "-", *(options or ("-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p")), str(path)]
    subprocess.run(command, input=np.ascontiguousarray(frames).tobytes(), check=True)
    return Path(path)


@pytest.fixture(scope="session")
def write_video():
    return encode
