"""Camera poses, intrinsics and trajectories.

Conventions of the whole project:

* A pose is a 4x4 camera-to-world matrix, right-handed: x right, y up, and the camera looks down -z (OpenGL, Blender,
  NeRF).
* The world is z-up with the object at the origin.
* u in [0, 1) is the azimuth: 360 u degrees, counter-clockwise from +x seen from above.
* v in [0, 1] is the height and encodes the elevation: asin(1 - 2 v) above the horizon, polar angle arccos(1 - 2 v). So
  v = 0 looks straight down, v = 0.5 from the side, and v uniform is uniform on the sphere (GRAF, Schwarz et al. 2020,
  section 3.1). People are shown the elevation in degrees.
* A label is (class_idx, height_idx, angle_idx, instance_idx), angle_idx in whole degrees, instance_idx -1 where it is
  not known which of the class's objects it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Intrinsics:
    """A pinhole camera with square pixels and the optical axis in the middle of the image; `focal` in pixels."""

    height: int
    width: int
    focal: float

    @classmethod
    def from_fov(cls, resolution: int, fov: float) -> Intrinsics:
        """Square image of `resolution` pixels with a horizontal field of view of `fov` degrees."""
        if not 0.0 < fov < 180.0:
            raise ValueError(f"fov={fov}: the field of view lies strictly between 0 and 180 degrees")
        return cls(resolution, resolution, 0.5 * resolution / math.tan(math.radians(fov) / 2))

    @classmethod
    def from_vertical_fov(cls, height: int, width: int, fov: float) -> Intrinsics:
        """Image of height x width square pixels with a vertical field of view of `fov` degrees."""
        square = cls.from_fov(height, fov)
        return cls(height, width, square.focal)

    @property
    def vertical_fov(self) -> float:
        """The vertical field of view, degrees."""
        return math.degrees(2 * math.atan(self.height / (2 * self.focal)))

    def resized(self, height: int, width: int) -> Intrinsics:
        """The same camera with another number of pixels (same field of view)."""
        return Intrinsics(height, width, self.focal * width / self.width)


def elevation_from_height(v: float) -> float:
    """Degrees above the horizon of a camera at height v: 90 where it looks straight down, 0 from the side."""
    return math.degrees(math.asin(min(max(1 - 2 * v, -1.0), 1.0)))  # a v that was computed may leave [0, 1] by rounding


def height_from_elevation(degrees: float) -> float:
    """The height v of a camera that stands `degrees` above the horizon, the inverse of `elevation_from_height`."""
    return (1 - math.sin(math.radians(degrees))) / 2


def directions_from_angles(u: Tensor, v: Tensor) -> Tensor:
    """Unit vectors (..., 3) from the origin towards the camera at azimuth u and height v (both of shape (...))."""
    azimuth = 2 * math.pi * u
    cos_polar = 1 - 2 * v
    sin_polar = torch.sqrt((1 - cos_polar.square()).clamp(min=0))
    return torch.stack([sin_polar * torch.cos(azimuth), sin_polar * torch.sin(azimuth), cos_polar], dim=-1)


def pose_from_angles(u: Tensor, v: Tensor, radius: float | Tensor) -> Tensor:
    """Camera-to-world poses (..., 4, 4) on a sphere of `radius` around the origin, looking at the origin, z up.

    u, v: (...), see the notation above; radius: one for all, or (...). At the poles, where "up" is undefined, the
    azimuth still fixes the roll.
    """
    backward = directions_from_angles(u, v)  # the camera looks down -z, so its z axis points away from the object
    azimuth = 2 * math.pi * u
    right = torch.stack([-torch.sin(azimuth), torch.cos(azimuth), torch.zeros_like(azimuth)], dim=-1)
    up = torch.linalg.cross(backward, right)
    rotation = torch.stack([right, up, backward], dim=-1)
    distance = radius[..., None] if isinstance(radius, Tensor) else radius
    top = torch.cat([rotation, (distance * backward)[..., None]], dim=-1)
    bottom = torch.zeros_like(top[..., :1, :])
    bottom[..., 3] = 1
    return torch.cat([top, bottom], dim=-2)


def raise_cameras(poses: Tensor, angle: Tensor) -> Tensor:
    """Poses (B, 4, 4) of cameras that look at the origin, swung up around it by `angle` (B,) radians of elevation."""
    right, up, backward, centre = poses[:, :3].unbind(-1)
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    up, backward = cos * up - sin * backward, cos * backward + sin * up
    top = torch.stack([right, up, backward, torch.linalg.vector_norm(centre, dim=-1, keepdim=True) * backward], dim=-1)
    return torch.cat([top, poses[:, 3:]], dim=1)


def angles_from_pose(poses: Tensor) -> tuple[Tensor, Tensor]:
    """(u, v), each (...), of the camera centres of `poses` (..., 4, 4), wherever the cameras look."""
    centre = poses[..., :3, 3]
    u = torch.remainder(torch.atan2(centre[..., 1], centre[..., 0]) / (2 * math.pi), 1.0)
    cos_polar = centre[..., 2] / torch.linalg.vector_norm(centre, dim=-1).clamp(min=1e-12)
    return u, (1 - cos_polar) / 2


def angle_label(u: Tensor) -> Tensor:
    """The label angle of an azimuth u: round(360 u) mod 360, int64."""
    return torch.remainder(torch.round(360 * u), 360).to(torch.int64)


def label_angles(labels: Tensor, v_list: Sequence[float], angle_direction: str = "ccw") -> tuple[Tensor, Tensor]:
    """(u, v), each (B,), of labels (B, 4): u = angle/360 (turned the other way for "cw"), v = v_list[height_idx]."""
    u = labels[..., 2].to(torch.float32) / 360
    if angle_direction == "cw":
        u = torch.remainder(-u, 1.0)
    elif angle_direction != "ccw":
        raise ValueError(f"angle_direction={angle_direction!r}: expected 'ccw' or 'cw'")
    heights = torch.tensor(list(v_list), dtype=torch.float32, device=labels.device)
    return u, heights[labels[..., 1]]


def rotate(rotation: Tensor, vectors: Tensor) -> Tensor:
    """rotation (..., 3, 3) times vectors (..., 3), which broadcast.

    Without a matrix product: on a GPU that may round its factors to 10 bits (TF32), and these are places.
    """
    x, y, z = vectors[..., 0:1], vectors[..., 1:2], vectors[..., 2:3]
    return x * rotation[..., 0] + y * rotation[..., 1] + z * rotation[..., 2]


def project_points(points: Tensor, poses: Tensor, intrinsics: Intrinsics) -> tuple[Tensor, Tensor]:
    """Pixels (..., 2) (x right, y down, the centre of the first pixel at 0.5) and z-depth (...) of world points.

    points (..., 3) and poses (..., 4, 4) broadcast against each other. Points behind the camera have negative depth.
    """
    relative = points - poses[..., :3, 3]
    camera = rotate(poses[..., :3, :3].mT, relative)
    depth = -camera[..., 2]
    x = intrinsics.width / 2 + intrinsics.focal * camera[..., 0] / depth
    y = intrinsics.height / 2 - intrinsics.focal * camera[..., 1] / depth
    return torch.stack([x, y], dim=-1), depth


def median_height(v_list: Sequence[float]) -> int:
    """The index of the median of `v_list` (the lower one of two), the height at which sample grids are drawn."""
    order = sorted(range(len(v_list)), key=lambda index: v_list[index])
    return order[(len(order) - 1) // 2]


def ring(num_views: int, v: float, start: float = 0.0) -> tuple[Tensor, Tensor]:
    """(u, v), each (num_views,): a full turn at height v, beginning at azimuth `start`."""
    u = torch.remainder(start + torch.arange(num_views, dtype=torch.float32) / num_views, 1.0)
    return u, torch.full((num_views,), float(v))
