"""Where a client looks from, and the two conventions of cameras: this project's and viser's.

This project's cameras look down -z with y up (graf.geometry.cameras). viser's are OpenCV's: they look down +z with y
down, and are told as a quaternion (w, x, y, z) of the camera-to-world rotation, a position, and a vertical field of
view in radians.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graf.geometry.cameras import Intrinsics
from graf.geometry.rotations import quaternion_from_rotation, rotation_from_quaternion

Vector = Sequence[float] | np.ndarray

#: from one convention's camera axes to the other's: x stays, y and z turn round
FLIP = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)


@dataclass(frozen=True)
class Viewpoint:
    """A camera: camera_to_world (4, 4), float64; fov: vertical, degrees; aspect: width / height of its picture."""

    camera_to_world: Tensor
    fov: float
    aspect: float = 1.0

    @classmethod
    def from_viser(cls, wxyz: Vector, position: Vector, fov: float, aspect: float) -> Viewpoint:
        """The viewpoint of a viser camera; fov in radians."""
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, :3] = rotation_from_quaternion(torch.tensor([float(part) for part in wxyz], dtype=torch.float64))
        pose[:3, :3] *= FLIP
        pose[:3, 3] = torch.tensor([float(part) for part in position], dtype=torch.float64)
        return cls(pose, math.degrees(fov), aspect)

    def intrinsics(self, height: int) -> Intrinsics:
        """The camera with `height` rows of square pixels, and as many columns as its aspect asks for."""
        return Intrinsics.from_vertical_fov(height, max(1, round(height * self.aspect)), self.fov)


def viser_rotation(camera_to_world: Tensor) -> tuple[float, float, float, float]:
    """viser's (w, x, y, z) of a camera (4, 4)."""
    w, x, y, z = quaternion_from_rotation(camera_to_world[:3, :3].double() * FLIP).tolist()
    return w, x, y, z
