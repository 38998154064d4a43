"""Cameras of photographs that are known: one lens, poses, what is up.

Poses are camera-to-world (4, 4) float64, x right, y up, looking down -z, in whatever world they were found. The corner
of a picture lies at (0, 0), the middle of its first pixel at (0.5, 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Picture = np.ndarray
Poses = np.ndarray

LEVEL_ROUNDS = 10  # of least squares in which what is far off counts less


@dataclass(frozen=True)
class Lens:
    """One camera for all photographs of one size: `focal` and `centre` in pixels, the corner of the picture at (0, 0).

    radial: k of the one-parameter model, which sees at radius r (1 + k r^2) what a pinhole sees at r (focal lengths).
    """

    width: int
    height: int
    focal: float
    centre: tuple[float, float]
    radial: float = 0.0

    @classmethod
    def from_fov(cls, width: int, height: int, fov: float) -> Lens:
        """A pinhole that sees `fov` degrees across the width."""
        return cls(width, height, width / 2 / math.tan(math.radians(fov) / 2), (width / 2, height / 2))

    @property
    def fov(self) -> float:
        """Degrees across the width, along the axis and without the distortion."""
        return math.degrees(2 * math.atan(self.width / 2 / self.focal))

    def project(self, points: np.ndarray) -> np.ndarray:
        """Pixels (..., 2), x right and y down, of points (..., 3) in camera coordinates; NaN behind the camera."""
        depth = np.where(points[..., 2:] < 0, -points[..., 2:], np.nan)
        plane = points[..., :2] * (1.0, -1.0) / depth
        plane = plane * (1 + self.radial * (plane**2).sum(-1, keepdims=True))
        return plane * self.focal + np.asarray(self.centre)

    def ray(self, pixels: np.ndarray) -> np.ndarray:
        """Unit directions (..., 3) in camera coordinates of pixels (..., 2)."""
        seen = (pixels - np.asarray(self.centre)) / self.focal
        plane = seen
        for _ in range(10):  # the inverse of the radial model has no formula; this converges for lenses of phones
            plane = seen / (1 + self.radial * (plane**2).sum(-1, keepdims=True))
        direction = np.concatenate([plane * (1.0, -1.0), -np.ones_like(plane[..., :1])], axis=-1)
        return direction / np.linalg.norm(direction, axis=-1, keepdims=True)


@dataclass(frozen=True)
class PosedPhotographs:
    """Photographs uint8 (H, W, 3), their masks (uint8 (H, W), 255 on the object) or None, poses (N, 4, 4), one lens.

    names: where each comes from.
    """

    images: Sequence[Picture]
    masks: Sequence[Picture] | None
    poses: Poses
    lens: Lens
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def distances(self) -> np.ndarray:
        """Of the cameras from the origin (N,)."""
        return np.linalg.norm(self.poses[:, :3, 3], axis=1)

    @property
    def elevations(self) -> np.ndarray:
        """Of the cameras above the horizon (N,), in degrees."""
        return np.degrees(np.arcsin(self.poses[:, 2, 3] / self.distances))

    @property
    def azimuths(self) -> np.ndarray:
        """Of the cameras (N,), in degrees, counter-clockwise from +x seen from above."""
        return np.degrees(np.arctan2(self.poses[:, 1, 3], self.poses[:, 0, 3])) % 360


def move_poses(poses: Poses, rotation: np.ndarray, centre: np.ndarray, radius: float) -> Poses:
    """Poses in the world whose points are p' = rotation (p - centre) / radius."""
    moved = poses.copy()
    moved[:, :3, :3] = rotation @ poses[:, :3, :3]
    moved[:, :3, 3] = (poses[:, :3, 3] - centre) @ rotation.T / radius
    return moved


def find_up(poses: Poses) -> np.ndarray:
    """The unit vector (3,) that is up for people who hold their camera level, whichever way they go.

    The right sides of level cameras lie in a plane, whatever their elevation and however little of the circle they
    have walked; its normal is up (by the eigenvector of least variance, larger tilts counting less in turn).
    """
    mean = poses[:, :3, 1].mean(axis=0)
    right = poses[:, :3, 0]
    weights = np.ones(len(right))
    for _ in range(LEVEL_ROUNDS):
        variances, directions = np.linalg.eigh((right * weights[:, None]).T @ right / weights.sum())
        if variances[1] < 1e-3:  # all look the same way: their own up is all there is to go by
            return mean / np.linalg.norm(mean)
        weights = 1 / np.maximum(np.abs(right @ directions[:, 0]), 0.01)
    up = directions[:, 0]
    return up if up @ mean > 0 else -up


def look_at_origin(centre: np.ndarray) -> np.ndarray:
    """The pose (4, 4) of an upright camera at `centre` (3,) that looks at the origin, z up."""
    backward = centre / np.linalg.norm(centre)
    right = np.array([-backward[1], backward[0], 0.0])
    if np.linalg.norm(right) < 1e-9:
        right = np.array([0.0, 1.0, 0.0])
    right = right / np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(backward, right), backward, centre], axis=1)
    return pose
