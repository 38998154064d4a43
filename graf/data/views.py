"""Which object seen from where: the cameras of labelled images, and the distribution from which generated images take theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graf.geometry.cameras import angle_label, angles_from_pose, label_angles, pose_from_angles


@dataclass(frozen=True)
class Views:
    """class_idx (B,) int64, azimuth u and height v (B,), camera-to-world poses (B, 4, 4) and labels (B, 3) int64."""

    class_idx: Tensor
    u: Tensor
    v: Tensor
    poses: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.class_idx)

    def images(self, start: int, stop: int) -> Views:
        """The views start..stop."""
        return Views(*(part[start:stop] for part in self._parts()))

    def to(self, device: torch.device | str) -> Views:
        """The same views on another device."""
        return Views(*(part.to(device, non_blocking=True) for part in self._parts()))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.class_idx, self.u, self.v, self.poses, self.labels


@dataclass(frozen=True)
class Cameras:
    """How labels become cameras: distance from the origin, the heights v of the labels, and the sense of their angles."""

    radius: float
    v_list: tuple[float, ...]
    angle_direction: str = "ccw"

    def views_of_labels(self, labels: Tensor) -> Views:
        """The views that labels (B, 3) name."""
        u, v = label_angles(labels, self.v_list, self.angle_direction)
        return Views(labels[:, 0], u, v, pose_from_angles(u, v, self.radius), labels)

    def views_at(self, class_idx: Tensor, u: Tensor, v: Tensor) -> Views:
        """Views of classes (B,) from azimuths u and heights v (B,), labelled with the nearest height."""
        heights = torch.tensor(self.v_list, device=v.device)
        height_idx = (v[:, None] - heights).abs().argmin(1)
        angle = angle_label(u if self.angle_direction == "ccw" else torch.remainder(-u, 1.0))
        labels = torch.stack([class_idx, height_idx, angle], dim=1)
        return Views(class_idx, u, v, pose_from_angles(u, v, self.radius), labels)


@dataclass(frozen=True)
class PoseRanges:
    """Azimuth and height ranges from which unknown poses are drawn, uniformly (GRAF)."""

    umin: float
    umax: float
    vmin: float
    vmax: float


class ViewPool:
    """The distribution of (class, camera) of a collection, from which generated images take their views.

    Labelled collections give their own views, all equally likely, so that a discriminator sees no angle on one side only.
    Collections without poses give the classes of their images and poses from `ranges`.
    """

    def __init__(
        self, labels: Tensor, cameras: Cameras, *, poses: Tensor | None = None, ranges: PoseRanges | None = None
    ) -> None:
        self.cameras = cameras
        self.ranges = ranges
        views = cameras.views_of_labels(labels)
        if poses is not None:
            u, v = angles_from_pose(poses)
            views = Views(labels[:, 0], u, v, poses, labels)
        self.views = views

    def __len__(self) -> int:
        return len(self.views)

    def select(self, indices: Tensor | Sequence[int]) -> Views:
        """The views of the images with these indices."""
        picked = torch.as_tensor(indices)
        views = self.views
        return Views(*(part[picked] for part in (views.class_idx, views.u, views.v, views.poses, views.labels)))

    def pick(self, uniforms: Tensor) -> Views:
        """One view per row of random numbers `uniforms` (B, 3) in [0, 1)."""
        views = self.select((uniforms[:, 0] * len(self)).long().clamp(max=len(self) - 1))
        if self.ranges is None:
            return views
        u = self.ranges.umin + (self.ranges.umax - self.ranges.umin) * uniforms[:, 1]
        v = self.ranges.vmin + (self.ranges.vmax - self.ranges.vmin) * uniforms[:, 2]
        return self.cameras.views_at(views.class_idx, torch.remainder(u, 1.0), v)

    def describe(self) -> str:
        """The pose distribution in words, for the provenance of a score."""
        if self.ranges is not None:
            ranges = self.ranges
            return f"u in [{ranges.umin}, {ranges.umax}], v in [{ranges.vmin}, {ranges.vmax}], uniform"
        return f"the {len(self)} views of the data set, equally likely"
