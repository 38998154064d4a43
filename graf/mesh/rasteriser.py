"""A mesh drawn with a z-buffer, in numpy, without shading: the picture that is compared with renders of its field."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graf.geometry.cameras import Intrinsics, project_points
from graf.mesh.coloured_mesh import ColouredMesh, Floats

#: pairs of a triangle and a pixel that are looked at together
PAIRS_AT_ONCE = 2**20


@dataclass(frozen=True)
class Drawing:
    """A picture of a mesh: colours (H, W, 3), sRGB in [0, 1], z-depth (H, W), inf beside it, and mask (H, W)."""

    colours: Floats
    depth: Floats

    @property
    def mask(self) -> NDArray[np.bool_]:
        return np.isfinite(self.depth)


def draw_mesh(mesh: ColouredMesh, pose: Tensor, intrinsics: Intrinsics, background: Floats | None = None) -> Drawing:
    """What the camera-to-world pose (4, 4) sees: pixel centres, perspective, colours linear across a triangle.

    background: (3,), sRGB in [0, 1], white where it is None. Triangles that reach behind the camera are left out.
    """
    height, width = intrinsics.height, intrinsics.width
    projected, depths = project_points(torch.from_numpy(mesh.vertices), pose, intrinsics)
    places, depth = projected.double().numpy(), depths.double().numpy()
    faces = mesh.faces[(depth[mesh.faces] > 1e-6).all(axis=1)]
    corners = places[faces]  # (F, 3, 2)
    first = np.ceil(corners.min(1) - 0.5).clip(0).astype(np.int64)  # pixels whose centres lie in the bounding box
    last = np.minimum(np.floor(corners.max(1) - 0.5), [width - 1, height - 1]).astype(np.int64)
    spans = (last - first + 1).clip(min=0)
    counts = spans.prod(1)
    colours = np.broadcast_to(np.ones(3) if background is None else background, (height * width, 3)).astype(np.float32)
    nearest = np.full(height * width, np.inf)
    for part in np.split(np.arange(len(faces)), np.flatnonzero(np.diff(np.cumsum(counts) // PAIRS_AT_ONCE)) + 1):
        owner = np.repeat(part, counts[part])
        number = np.arange(len(owner)) - np.repeat(np.cumsum(counts[part]) - counts[part], counts[part])
        column, row = first[owner, 0] + number % spans[owner, 0], first[owner, 1] + number // spans[owner, 0]
        weights = _barycentric(corners[owner], np.stack([column, row], axis=1) + 0.5)
        inside = (weights >= 0).all(axis=1)
        owner, pixel = owner[inside], (row * width + column)[inside]
        shares = weights[inside] / depth[faces[owner]]  # what is linear in the picture is the inverse of depth
        z = 1 / shares.sum(1)
        order = np.argsort(-z, kind="stable")  # the nearest one is written last
        order = order[z[order] < nearest[pixel[order]]]
        nearest[pixel[order]] = z[order]
        mixed = (shares[order] * z[order, None])[..., None] * mesh.colours[faces[owner[order]]]
        colours[pixel[order]] = mixed.sum(1)
    return Drawing(colours.reshape(height, width, 3), nearest.reshape(height, width).astype(np.float32))


def _barycentric(corners: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights (N, 3) of the corners (N, 3, 2) of triangles at points (N, 2); all negative where one has no area."""
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    area = _cross(b - a, c - a)
    weights = np.stack([_cross(c - b, points - b), _cross(a - c, points - c), _cross(b - a, points - a)], axis=1)
    return np.where(area[:, None] == 0, -1.0, weights / np.where(area == 0, 1.0, area)[:, None])


def _cross(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])
