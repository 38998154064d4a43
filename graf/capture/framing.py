"""Cutting all frames of an object to squares of one scale and one centre, and what camera those squares are of.

A scale of its own for each photograph would break the camera: an object that is drawn nearer in every second picture
has no shape. So the whole turn is framed at once. The unit of the world is chosen so that the object reaches REACH of
the unit sphere, whose picture the squares are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from graf.capture.errors import CaptureError
from graf.capture.frames import Frame, Picture

REACH = 0.9  # of the unit sphere that the object fills
MARGIN = 1.06  # half side of the square, in radii of the object's picture
STRAY = 0.03  # of the masks: what fewer of them hold is a mistake of theirs
SMALLEST = 48  # pixels of a square
SIDES = (1024, 512, 256, 128, 64)  # of pictures: data.imsize divides these, so that reducing them is an exact mean
PHONE_FOV = 62.0  # degrees across the longer side of a phone's video by its main camera, about


@dataclass(frozen=True)
class Camera:
    """The camera of square pictures in the object's world: its distance `radius` in units of the unit sphere, and `fov`
    in degrees across the square.
    """

    radius: float
    fov: float


@dataclass(frozen=True)
class Framing:
    """A square in frames: its `centre` (x, y) and `half` side in pixels; `width`: of the object's widest extent in all
    the frames, as a share of the square's side.
    """

    centre: tuple[float, float]
    half: float
    width: float

    def camera(self, shape: tuple[int, int], fov: float) -> Camera:
        """The camera of the squares cut from frames of a shape (H, W) of `fov` degrees across the longer side."""
        focal = max(shape) / 2 / math.tan(math.radians(fov) / 2)
        radius = REACH / math.sin(math.atan(self.half / MARGIN / focal))
        return Camera(radius, math.degrees(2 * math.atan(self.half / focal)))


def frame_masks(masks: Sequence[Picture], width: float | None = None) -> Framing:
    """One square around an object that turns: its axis in the middle, all of its outlines inside.

    The outlines of a whole turn are together as wide to the left of the axis as to the right. width: the share of the
    side that the object's is to have, where it is in the set already, seen from another height; None: the largest that
    fits. Raises CaptureError for an object of too few pixels.
    """
    held = np.zeros(masks[0].shape, np.int32)
    for mask in masks:
        held += mask >= 128
    y, x = np.nonzero(held > STRAY * len(masks))
    if not len(x):
        raise CaptureError("the masks are empty; look at them, or use --mask none")
    left, right, top, bottom = x.min(), x.max() + 1, y.min(), y.max() + 1
    centre = ((left + right) / 2, (top + bottom) / 2)
    radius = float(np.hypot(x + 0.5 - centre[0], y + 0.5 - centre[1]).max())
    half = MARGIN * radius if width is None else (right - left) / width / 2
    if 2 * half < SMALLEST:
        raise CaptureError(
            f"the object is {2 * radius:.0f} pixels large in the frames; expected at least {SMALLEST}: go nearer, or "
            "look at the masks, which may have missed most of it"
        )
    return Framing(centre, half, float((right - left) / (2 * half)))


def frame_whole(shape: tuple[int, int]) -> Framing:
    """The largest square in the middle of frames of a shape (H, W), for objects without masks."""
    height, width = shape
    return Framing((width / 2, height / 2), min(height, width) / 2, 1 / MARGIN)


def picture_side(framing: Framing, most: int) -> int:
    """Pixels of the pictures: the most that frames can fill, of a size that reduces evenly, at most `most`."""
    return next((side for side in SIDES if side <= min(most, 2 * framing.half)), SMALLEST)


def cut(frame: Frame, mask: Picture | None, framing: Framing, side: int) -> Image.Image:
    """The framed square of a frame: RGBA with the mask as transparency and white behind it, or RGB without a mask."""
    margin = math.ceil(framing.half) + 1  # the square may reach beyond the frame
    pixels = np.pad(frame.image, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    left, top = framing.centre[0] - framing.half + margin, framing.centre[1] - framing.half + margin
    box = (left, top, left + 2 * framing.half, top + 2 * framing.half)
    if mask is None:
        return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC, box=box)
    alpha = np.pad(mask, margin)[..., None]
    premultiplied = Image.fromarray(np.concatenate([pixels, alpha], axis=-1)).convert("RGBa")
    square = premultiplied.resize((side, side), Image.Resampling.BICUBIC, box=box).convert("RGBA")
    return Image.composite(
        square, Image.new("RGBA", square.size, (255, 255, 255, 0)), square.getchannel("A").point(_any)
    )


def _any(value: int) -> int:
    return 255 if value else 0
