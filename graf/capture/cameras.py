"""Cameras of photographs that are known: one lens, poses, what is up.

Poses are camera-to-world (4, 4) float64, x right, y up, looking down -z, in whatever world they were found. The corner
of a picture lies at (0, 0), the middle of its first pixel at (0.5, 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

Picture = np.ndarray
Poses = np.ndarray

LARGEST_TILT = 20.0  # degrees of a floor against what cameras hold for up
FLOOR_SHARE = 0.25  # of the points have to lie on it
FLOOR_THICKNESS = 0.006  # of the points' usual distance from their middle
FLOOR_TRIALS = 400
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
        plane = plane * (1 + self.radial * _square(plane))
        return plane * self.focal + np.asarray(self.centre)

    def ray(self, pixels: np.ndarray) -> np.ndarray:
        """Unit directions (..., 3) in camera coordinates of pixels (..., 2)."""
        seen = (pixels - np.asarray(self.centre)) / self.focal
        plane = seen
        for _ in range(10):  # the inverse of the radial model has no formula; this converges for lenses of phones
            plane = seen / (1 + self.radial * _square(plane))
        direction = np.concatenate([plane * (1.0, -1.0), -np.ones_like(plane[..., :1])], axis=-1)
        return direction / np.linalg.norm(direction, axis=-1, keepdims=True)


@dataclass(frozen=True)
class PosedPhotographs:
    """Photographs uint8 (H, W, 3), their masks (uint8 (H, W), 255 on the object) or None, poses (N, 4, 4), one lens.

    names: where each comes from. floor: (4,), the plane that the object stands on as normal and offset, normal . p +
    offset being the height of a point p above it; None where it is not known.
    """

    images: Sequence[Picture]
    masks: Sequence[Picture] | None
    poses: Poses
    lens: Lens
    names: Sequence[str]
    floor: np.ndarray | None = None

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


def _square(vectors: np.ndarray) -> np.ndarray:
    """Squared lengths (..., 1) of vectors (..., n); a sum over so short an axis would take four times as long."""
    return np.einsum("...i,...i->...", vectors, vectors)[..., None]


def move_world(
    photographs: PosedPhotographs, rotation: np.ndarray, centre: np.ndarray, radius: float
) -> PosedPhotographs:
    """The same photographs in the world whose points are p' = rotation (p - centre) / radius."""
    poses, floor = photographs.poses.copy(), photographs.floor
    poses[:, :3, :3] = rotation @ photographs.poses[:, :3, :3]
    poses[:, :3, 3] = (photographs.poses[:, :3, 3] - centre) @ rotation.T / radius
    if floor is not None:
        floor = np.array([*(rotation @ floor[:3]), (floor[:3] @ centre + floor[3]) / radius])
    return replace(photographs, poses=poses, floor=floor)


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


def find_floor(points: np.ndarray, poses: Poses) -> np.ndarray | None:
    """The level plane (4,) below all cameras that holds the most of points (N, 3) in space, None where none holds many.

    By RANSAC (Fischler & Bolles, CACM 1981), with a fixed seed, and least squares over what lies on it.
    """
    if len(points) < 20:
        return None
    random, up = np.random.default_rng(0), find_up(poses)
    usual = float(np.median(np.linalg.norm(points - np.median(points, axis=0), axis=1)))
    best = np.zeros(len(points), bool)
    for _ in range(FLOOR_TRIALS):
        first, second, third = points[random.choice(len(points), 3, replace=False)]
        normal = np.cross(second - first, third - first)
        length = np.linalg.norm(normal)
        if length == 0 or abs(normal @ up) < math.cos(math.radians(LARGEST_TILT)) * length:
            continue
        on_plane = np.abs((points - first) @ normal) < FLOOR_THICKNESS * usual * length
        best = on_plane if on_plane.sum() > best.sum() else best
    if best.mean() < FLOOR_SHARE:
        return None
    middle = points[best].mean(axis=0)
    normal = np.linalg.svd(points[best] - middle, full_matrices=False)[2][2]
    normal = normal if normal @ up > 0 else -normal
    floor = np.array([*normal, -normal @ middle])
    return floor if (poses[:, :3, 3] @ normal + floor[3] > 0).all() else None


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
