"""Photographs whose cameras are known: where the object is, the world that is centred on it, and `transforms.json`.

Poses are camera-to-world (4, 4) float64, x right, y up, looking down -z. The world of what finds them is any; what is
written has the object in the unit sphere around the origin, z up, and every camera aimed at the origin.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from graf.base.extras import import_optional
from graf.base.files import replace_file, write_atomically
from graf.capture.errors import CaptureError

Picture = np.ndarray
Poses = np.ndarray

TRANSFORMS_FILE, IMAGES_FOLDER = "transforms.json", "images"
GRID = 56  # cells along the side of the cube in which the object is carved out
AGREEING = 0.95  # of the masks a part of the object has to lie in: one or the other may be wrong
MARGIN = 1.05  # of the pictures that are written, around the unit sphere
MAX_SIDE = 1024  # of them, pixels
LEVEL_ROUNDS = 10
CENTRAL_DISC = 0.9  # of the shorter side: what is taken for the object's outline where there are no masks


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


def centre_on_object(photographs: PosedPhotographs, level: bool = True) -> PosedPhotographs:
    """The same photographs in the object's world: it fills the unit sphere, z is up, the first camera at azimuth 0.

    The object is what the masks enclose from all sides; without masks it is what all pictures show. level: find what is
    up and turn the world; else its axes are kept, z is up already.
    """
    centre, radius = find_sphere(photographs)
    if not level:
        return replace(photographs, poses=move_poses(photographs.poses, np.eye(3), centre, radius))
    up = find_up(photographs.poses)
    towards = photographs.poses[0, :3, 3] - centre
    x = towards - (towards @ up) * up
    if np.linalg.norm(x) < 1e-6 * np.linalg.norm(towards):  # it looks straight down: where its right side is
        x = np.cross(photographs.poses[0, :3, 0], up)
    x /= np.linalg.norm(x)
    rotation = np.stack([x, np.cross(up, x), up])
    return replace(photographs, poses=move_poses(photographs.poses, rotation, centre, radius))


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


def find_sphere(photographs: PosedPhotographs) -> tuple[np.ndarray, float]:
    """Centre (3,) and radius of the object: of its visual hull, the space that lies inside (nearly) all of the masks.

    A smooth object has hardly any points that are found again from elsewhere, but an outline in every picture; the hull
    encloses the object and exceeds it only where no camera looks along its surface. Laurentini, "The visual hull
    concept" (PAMI 1994). Raises CaptureError where the masks enclose nothing together.
    """
    masks = photographs.masks or [_central_disc(photographs.lens)] * len(photographs)
    centre, half = _surround(photographs, masks)
    points = _carve(photographs, masks, centre, half)
    if len(points):  # again, with finer cells
        low, high = points.min(axis=0), points.max(axis=0)
        centre, half = (low + high) / 2, 0.55 * (high - low).max() + 2 * half / GRID
        points = _carve(photographs, masks, centre, half)
    if not len(points):
        raise CaptureError(
            f"the masks of the {len(photographs)} photographs have no place in common, so that the object cannot be "
            "found; look at the masks (one wrong mask in twenty is allowed), or leave them out with --mask none"
        )
    centre = enclosing_centre(points)
    return centre, float(np.linalg.norm(points - centre, axis=1).max() + half / GRID)


def enclosing_centre(points: np.ndarray) -> np.ndarray:
    """The centre (3,) of the smallest ball around points (N, 3), to about a hundredth of its radius.

    Badoiu & Clarkson, "Smaller core-sets for balls" (SODA 2003): again and again a smaller step to the farthest point.
    """
    centre = (points.min(axis=0) + points.max(axis=0)) / 2
    for step in range(1, 100):
        farthest = points[((points - centre) ** 2).sum(axis=1).argmax()]
        centre = centre + (farthest - centre) / (step + 1)
    return centre


def _central_disc(lens: Lens) -> Picture:
    y, x = np.mgrid[: lens.height, : lens.width]
    distance = np.hypot(x + 0.5 - lens.width / 2, y + 0.5 - lens.height / 2)
    return np.where(distance < CENTRAL_DISC * min(lens.width, lens.height) / 2, 255, 0).astype(np.uint8)


def _surround(photographs: PosedPhotographs, masks: Sequence[Picture]) -> tuple[np.ndarray, float]:
    """Centre (3,) and half side of a cube around the object: where the rays through the masks' middles meet, and how
    far around it the masks reach.
    """
    used = [number for number, mask in enumerate(masks) if (mask > 127).any()]
    if len(used) < max(2, AGREEING * len(masks)):
        raise CaptureError(
            f"{len(masks) - len(used)} of {len(masks)} masks are empty; look at them, or use --mask none"
        )
    outlines = [np.argwhere(masks[number] > 127)[:, ::-1] + 0.5 for number in used]  # (x, y) of its pixels
    rotations, centres = photographs.poses[used, :3, :3], photographs.poses[used, :3, 3]
    middles = np.stack([(outline.min(axis=0) + outline.max(axis=0)) / 2 for outline in outlines])
    directions = np.einsum("nij,nj->ni", rotations, photographs.lens.ray(middles))
    # The point nearest to all rays: sum of (1 - d d^T) (p - c) is zero.
    across = np.eye(3) - directions[:, :, None] * directions[:, None]
    weights = np.ones(len(used))
    for _ in range(LEVEL_ROUNDS):
        weighted = across * weights[:, None, None]
        centre = np.linalg.lstsq(weighted.sum(axis=0), np.einsum("nij,nj->i", weighted, centres), rcond=None)[0]
        misses = np.linalg.norm(np.einsum("nij,nj->ni", across, centre - centres), axis=1)
        weights = 1 / np.maximum(misses, np.median(misses) + 1e-9)
    distances = np.linalg.norm(centres - centre, axis=1)
    extents = [
        np.linalg.norm(outline - middle, axis=1).max() for outline, middle in zip(outlines, middles, strict=True)
    ]
    radii = np.array(extents) / photographs.lens.focal * distances
    return centre, 1.5 * float(np.quantile(radii, 0.75))


def _carve(photographs: PosedPhotographs, masks: Sequence[Picture], centre: np.ndarray, half: float) -> np.ndarray:
    """Those points (M, 3) of a grid in the cube centre +- half that lie inside the masks of the pictures they fall in.

    A point that falls outside of half of the pictures is no part of the object.
    """
    axis = (2 * np.arange(GRID) + 1) / GRID - 1
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3) * half + centre
    outside, unseen = np.zeros(len(points), np.int32), np.zeros(len(points), np.int32)
    for mask, pose in zip(masks, photographs.poses, strict=True):
        with np.errstate(invalid="ignore"):
            pixels = np.floor(photographs.lens.project((points - pose[:3, 3]) @ pose[:3, :3]))
            x, y = pixels.T
            seen = (x >= 0) & (y >= 0) & (x < mask.shape[1]) & (y < mask.shape[0])
        unseen += ~seen
        inside = mask[np.where(seen, y, 0).astype(np.int64), np.where(seen, x, 0).astype(np.int64)] > 127
        outside += seen & ~inside
        kept = (outside <= (1 - AGREEING) * len(masks)) & (unseen <= len(masks) // 2)
        points, outside, unseen = points[kept], outside[kept], unseen[kept]
    return points


def aim_at_object(photographs: PosedPhotographs, side: int | None = None) -> PosedPhotographs:
    """Square pictures by pinhole cameras at the same places that look at the origin, upright, the unit sphere filling
    the picture of the nearest one.

    A camera that turns around its own centre sees the same rays, so this is exact, and takes the lens's distortion out.
    side: pixels; by default the object keeps its size in them (at most 1024).
    """
    cv2 = import_optional("cv2", "capture")
    nearest = float(np.quantile(photographs.distances, 0.02))
    if nearest <= 1.2:
        raise CaptureError(
            f"the nearest cameras stand {nearest:.2f} radii from the middle of the object, almost inside it; look at "
            "the masks, or take photographs from farther away"
        )
    tangent = MARGIN * math.tan(math.asin(1 / nearest))
    side = side or min(MAX_SIDE, 2 * max(8, round(photographs.lens.focal * tangent)))
    aimed_lens = Lens.from_fov(side, side, math.degrees(2 * math.atan(tangent)))
    poses = np.stack([look_at_origin(pose[:3, 3]) for pose in photographs.poses])
    y, x = np.mgrid[:side, :side]
    rays = aimed_lens.ray(np.stack([x, y], axis=-1) + 0.5)
    images, masks = [], []
    for number, (pose, aimed) in enumerate(zip(photographs.poses, poses, strict=True)):
        turned = rays @ (pose[:3, :3].T @ aimed[:3, :3]).T
        # Pixels beyond the picture, and behind the camera, are -1: outside.
        pixels = np.nan_to_num(photographs.lens.project(turned) - 0.5, nan=-1e4).clip(-1e4, 3e4).astype(np.float32)
        image = photographs.images[number]
        images.append(cv2.remap(image, pixels, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
        if photographs.masks is not None:
            mask = photographs.masks[number]
            masks.append(cv2.remap(mask, pixels, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT))
    return PosedPhotographs(images, masks or None, poses, aimed_lens, photographs.names)


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


def check_new(folder: Path) -> None:
    """Raises CaptureError where a folder has a transforms.json already, before any work is done for it."""
    if (folder / TRANSFORMS_FILE).exists():
        raise CaptureError(
            f"{folder / TRANSFORMS_FILE} exists already; photographs with poses are one class in one folder: "
            "give another --out, or remove it"
        )


def write_transforms(folder: Path, photographs: PosedPhotographs) -> Path:
    """Write images/NNN.png (with masks as transparency) and, when all are there, transforms.json; returns its path.

    As `data.type: transforms` and nerfstudio read it. The lens must be a pinhole. Raises CaptureError, OSError.
    """
    check_new(folder)
    lens = photographs.lens
    if lens.radial:
        raise ValueError("transforms.json holds pinhole cameras here; aim_at_object makes them")
    frames = []
    for number, (image, pose) in enumerate(zip(photographs.images, photographs.poses, strict=True)):
        file = f"{IMAGES_FOLDER}/{number:04d}.png"
        if photographs.masks is not None:
            image = np.dstack([image, photographs.masks[number]])
        with replace_file(folder / file) as stream:
            Image.fromarray(image).save(stream, format="PNG")
        frames.append({"file_path": file, "transform_matrix": pose.tolist(), "source": photographs.names[number]})
    content = {
        "camera_model": "PINHOLE",
        "camera_angle_x": math.radians(lens.fov),
        "w": lens.width,
        "h": lens.height,
        "fl_x": lens.focal,
        "fl_y": lens.focal,
        "cx": lens.centre[0],
        "cy": lens.centre[1],
        "frames": frames,
    }
    write_atomically(folder / TRANSFORMS_FILE, json.dumps(content, indent=1))
    return folder / TRANSFORMS_FILE


def training_overrides(photographs: PosedPhotographs) -> dict[str, float]:
    """The keys of a configuration that these cameras need, in the unit sphere's world: radius, near and far."""
    distances = photographs.distances
    return {
        "data.radius": round(float(distances.mean()), 2),
        "data.near": round(max(0.05, float(distances.min()) - 1), 2),
        "data.far": round(float(distances.max()) + 1, 2),
        "data.fov": round(photographs.lens.fov, 2),
    }
