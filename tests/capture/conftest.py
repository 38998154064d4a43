"""A toy on a turntable, filmed with known angles, and videos written with the ffmpeg that imageio brings."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from graf.data.shapes import CLASS_NAMES
from graf.data.synthetic import render_views
from graf.geometry.cameras import Intrinsics, height_from_elevation, pose_from_angles

FRAMES_PER_TURN, SIZE, FOV, RADIUS, ELEVATION = 40, 96, 30.0, 4.0, 22.0


@dataclass(frozen=True)
class Film:
    """Frames uint8 (N, H, W, 3), masks bool (N, H, W) and the camera's azimuth in degrees (N,), 40 frames a turn."""

    frames: np.ndarray
    masks: np.ndarray
    azimuths: np.ndarray

    def backwards(self):
        return Film(self.frames[::-1], self.masks[::-1], self.azimuths[::-1])


def make_film(toy, turns, background=None):
    """A toy before a grey wall, or before a picture (3, H, W) in [0, 1]; the azimuth grows from 50 degrees on."""
    count = round(FRAMES_PER_TURN * min(turns, 1))
    azimuths = 50 + 360 * np.arange(count) / FRAMES_PER_TURN
    u = torch.tensor(azimuths / 360 % 1, dtype=torch.float32)
    poses = pose_from_angles(u, torch.full_like(u, height_from_elevation(ELEVATION)), RADIUS)
    rgb, _, mask = render_views(CLASS_NAMES.index(toy), poses, Intrinsics.from_fov(SIZE, FOV))
    behind = torch.full((3, SIZE, SIZE), 0.8) if background is None else background
    images = ((rgb + 1) / 2 - (1 - mask) * (1 - behind)).clamp(0, 1)
    frames = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    order = np.arange(round(FRAMES_PER_TURN * turns)) % FRAMES_PER_TURN
    return Film(frames[order], mask[:, 0].numpy()[order] >= 0.5, azimuths[order] % 360)


@pytest.fixture(scope="session")
def mug_film():
    return make_film("mug", 1.3)


@pytest.fixture(scope="session")
def textured_film():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, 12, 12, generator=generator)
    return make_film("mug", 1.0, torch.nn.functional.interpolate(noise, (SIZE, SIZE), mode="bilinear")[0])


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


@pytest.fixture(scope="session")
def film_of():
    return make_film
