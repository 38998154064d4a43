"""Which object is seen from where: the cameras of labelled images and the distribution of generated ones' cameras."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from graf.base.tensors import TensorBatch
from graf.geometry.cameras import angle_label, elevation_from_height, label_angles, pose_from_angles

#: random numbers that `PoseSampler.pick` takes per view
NUM_UNIFORMS = 4


@dataclass(frozen=True)
class Views(TensorBatch):
    """class_idx (B,) int64, azimuth u and height v (B,), camera-to-world poses (B, 4, 4) and labels (B, 4) int64.

    Where data come with true poses, `poses` are these and render; u and v stay the labels' and condition D.
    photographed: labels name these views, so they are framed as photographs are (graf.models.camera_refinement).
    """

    class_idx: Tensor
    u: Tensor
    v: Tensor
    poses: Tensor
    labels: Tensor
    angle_sign: int = 1
    photographed: bool = False

    def turn(self, degrees: Tensor | float) -> Views:
        """The same objects from cameras moved counter-clockwise around the z axis by `degrees`, one for all or (B,)."""
        turned = torch.as_tensor(degrees, dtype=self.u.dtype, device=self.u.device).expand_as(self.u)
        cos, sin = torch.cos(torch.deg2rad(turned)), torch.sin(torch.deg2rad(turned))
        poses = self.poses.clone()  # rows are the world's axes; no matrix product, which TF32 would round
        x, y = self.poses[:, 0], self.poses[:, 1]
        poses[:, 0], poses[:, 1] = cos[:, None] * x - sin[:, None] * y, sin[:, None] * x + cos[:, None] * y
        u = torch.remainder(self.u + turned / 360, 1.0)
        labels = self.labels.clone()
        labels[:, 2] = torch.remainder(labels[:, 2] + self.angle_sign * torch.round(turned).long(), 360)
        return replace(self, u=u, poses=poses, labels=labels)

    def mirror(self) -> Views:
        """The same objects from the mirrored azimuths: cameras reflected in the x-z plane, which u = 0 lies in."""
        reflection, flip = torch.ones(2, 4, dtype=self.poses.dtype, device=self.poses.device)
        reflection[1] = -1  # of the world's y axis
        flip[0] = -1  # of the camera's x axis, so that it stays right-handed
        labels = self.labels.clone()
        labels[:, 2] = torch.remainder(-labels[:, 2], 360)
        poses = reflection[:, None] * self.poses * flip
        return replace(self, u=torch.remainder(-self.u, 1.0), poses=poses, labels=labels)


@dataclass(frozen=True)
class Cameras:
    """How labels become cameras: distance from the origin, heights v of the labels, and the sense of their angles."""

    radius: float
    v_list: tuple[float, ...]
    angle_direction: str = "ccw"

    @property
    def angle_sign(self) -> int:
        """1 where label angles grow counter-clockwise, -1 where they grow clockwise."""
        return 1 if self.angle_direction == "ccw" else -1

    def views_of_labels(self, labels: Tensor, poses: Tensor | None = None) -> Views:
        """The views that labels (B, 4) name; poses (B, 4, 4): where these came with the photographs.

        u and v stay the labels' then: a discriminator that saw binned angles on photographs and true ones on renders
        would tell them apart by that alone.
        """
        u, v = label_angles(labels, self.v_list, self.angle_direction)
        poses = pose_from_angles(u, v, self.radius) if poses is None else poses
        return Views(labels[:, 0], u, v, poses, labels, self.angle_sign, photographed=True)

    def views_at(self, class_idx: Tensor, u: Tensor, v: Tensor, radius: Tensor | None = None) -> Views:
        """Views of classes (B,) from azimuths u, heights v and distances (all (B,)).

        Labels take the nearest height, and -1 for the instance.
        """
        heights = torch.tensor(self.v_list, device=v.device)
        height_idx = (v[:, None] - heights).abs().argmin(1)
        angle = angle_label(u if self.angle_direction == "ccw" else torch.remainder(-u, 1.0))
        labels = torch.stack([class_idx, height_idx, angle, torch.full_like(angle, -1)], dim=1)
        poses = pose_from_angles(u, v, self.radius if radius is None else radius)
        return Views(class_idx, u, v, poses, labels, self.angle_sign)


@dataclass(frozen=True)
class PoseRanges:
    """Azimuth, height and distance ranges from which unknown poses are drawn, uniformly (GRAF)."""

    umin: float
    umax: float
    vmin: float
    vmax: float
    radius_min: float
    radius_max: float


class PoseSampler:
    """The distribution of (class, camera) of a collection, from which generated images take their views.

    Labelled collections give their own views, all equally likely, so that a discriminator sees no angle on one side
    only. Collections without poses give the classes of their images and poses from `ranges`.
    """

    def __init__(
        self, labels: Tensor, cameras: Cameras, *, poses: Tensor | None = None, ranges: PoseRanges | None = None
    ) -> None:
        self.cameras = cameras
        self.ranges = ranges
        self.views = cameras.views_of_labels(labels, poses)
        self._has_poses = poses is not None

    def __len__(self) -> int:
        return len(self.views)

    def select(self, indices: Tensor | Sequence[int]) -> Views:
        """The views of the images with these indices."""
        return self.views[torch.as_tensor(indices)]

    def pick(self, uniforms: Tensor) -> Views:
        """One view per row of random numbers `uniforms` (B, NUM_UNIFORMS) in [0, 1)."""
        return self._place(self.select((uniforms[:, 0] * len(self)).long().clamp(max=len(self) - 1)), uniforms)

    def views_of_photographs(self, labels: Tensor, uniforms: Tensor, poses: Tensor | None = None) -> Views:
        """The views of photographs with labels (B, 4), with their own poses (B, 4, 4) where the collection has such.

        Where poses are unknown, drawn ones.
        """
        if (poses is not None) != self._has_poses:  # labels are too coarse to compare renders with photographs at
            raise ValueError(f"poses of photographs {'missing' if self._has_poses else 'of a collection without any'}")
        return self._place(self.cameras.views_of_labels(labels, poses), uniforms)

    def _place(self, views: Views, uniforms: Tensor) -> Views:
        if self.ranges is None:
            return views
        u = self.ranges.umin + (self.ranges.umax - self.ranges.umin) * uniforms[:, 1]
        v = self.ranges.vmin + (self.ranges.vmax - self.ranges.vmin) * uniforms[:, 2]
        radius = self.ranges.radius_min + (self.ranges.radius_max - self.ranges.radius_min) * uniforms[:, 3]
        return self.cameras.views_at(views.class_idx, torch.remainder(u, 1.0), v, radius)

    def describe(self) -> str:
        """The pose distribution in words, for the provenance of a score."""
        if self.ranges is not None:
            u0, u1, v0, v1, r0, r1 = astuple(self.ranges)
            low, high = elevation_from_height(v1), elevation_from_height(v0)
            heights = f"v in [{v0}, {v1}] (elevation {low:.0f} to {high:.0f} degrees)"
            return f"u in [{u0}, {u1}], {heights}, radius in [{r0}, {r1}], uniform"
        return f"the {len(self)} views of the data set, equally likely"
