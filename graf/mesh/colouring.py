"""Normals and colours of a surface's vertices, asked of the field that the surface was found in.

A colour is composited like a pixel's, along a short ray that passes the vertex from outside to inside, and divided by
the opacity of that stretch: the field's own colour, without background. The ray comes along the normal, or from the
cameras that see the vertex. See NeRF's eq. 3 (Mildenhall et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from graf.geometry.rays import Rays
from graf.geometry.volume_rendering import compositing_weights
from graf.mesh.coloured_mesh import Floats, Indices, face_normals
from graf.mesh.extraction import DensityFunction
from graf.mesh.rays_around import meet_rays

#: (points (N, 3), directions (N, 3)) -> (rgb (N, 3) in [-1, 1], densities (N,) >= 0), on the CPU
RadianceFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class RadiantShape(Protocol):
    """An object inside of a sphere of `radius`, as a function of places."""

    @property
    def radius(self) -> float: ...

    def density(self, points: Tensor) -> Tensor:
        """Densities (N,) at points (N, 3)."""

    def radiance(self, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Colours (N, 3) and densities (N,)."""


#: Samples of the short ray through a vertex, and its length in radii of the object's sphere. It is long enough for what
#: a pixel's colour is made of behind the surface: a field that 64 pixels taught is some hundredths of that deep.
STRETCH_SAMPLES, STRETCH = 8, 0.1
#: smallest cosine between a normal and the direction to a camera that counts
SHALLOWEST = 0.2
#: vertices coloured at once
VERTICES_AT_ONCE = 2**14
#: faces whose normals are added to their corners' at once
FACES_AT_ONCE = 2**18


def estimate_normals(density: DensityFunction, vertices: Floats, faces: Indices, step: float) -> Floats:
    """Unit normals (V, 3) of a surface: :func:`gradient_normals`, where it says nothing the triangles' around it."""
    flat = _vertex_normals(vertices, faces)
    normals = np.empty_like(flat)
    for part in _parts(len(vertices)):
        outward = torch.from_numpy(flat[part])
        normals[part] = gradient_normals(density, torch.from_numpy(vertices[part]), outward, step).numpy()
    return normals


def gradient_normals(density: DensityFunction, points: Tensor, outward: Tensor, step: float) -> Tensor:
    """Unit normals (N, 3) at points: against the gradient of the density, by central differences over 2 `step`.

    Where the gradient vanishes or points against `outward` (N, 3), which is roughly right, that is the normal.
    """
    steps = step * torch.eye(3)
    places = torch.stack([points[:, None] - steps, points[:, None] + steps])  # (2, N, axis, 3)
    lower, upper = density(places.reshape(-1, 3)).view(2, -1, 3)
    smooth = functional.normalize(lower - upper, dim=-1)
    return torch.where((smooth * outward).sum(-1, keepdim=True) > 0, smooth, outward)


def colour_along(radiance: RadianceFunction, points: Tensor, directions: Tensor, radius: float) -> Tensor:
    """Colours (N, 3) in [-1, 1] of places (N, 3) on a surface, met in unit `directions` (N, 3).

    radius: of the sphere that holds the object; the stretch is STRETCH of it long.
    """
    length = STRETCH * radius / STRETCH_SAMPLES
    distances = (torch.arange(STRETCH_SAMPLES) - 0.5) * length  # the first sample outside, the others inside
    places = points[:, None] + distances[:, None] * directions[:, None]
    rgb, density = radiance(places.reshape(-1, 3), directions.repeat_interleave(STRETCH_SAMPLES, dim=0))
    # a floor of density far below any surface's, so that a stretch through nothing has the mean colour on it
    density = density.view(len(points), 1, STRETCH_SAMPLES) + 1e-6
    weights = compositing_weights(density, torch.full_like(density, length))[:, 0]
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights[..., None] * rgb.view(*places.shape)).sum(1)


def colour_along_normals(radiance: RadianceFunction, vertices: Floats, normals: Floats, radius: float) -> Floats:
    """Colours (V, 3), sRGB in [0, 1], of vertices that are looked at straight from above."""
    colours = np.empty_like(vertices)
    for part in _parts(len(vertices)):
        towards = -torch.from_numpy(normals[part])
        colours[part] = srgb_of(colour_along(radiance, torch.from_numpy(vertices[part]), towards, radius)).numpy()
    return colours


def colour_from_views(
    shape: RadiantShape, vertices: Floats, normals: Floats, unseen: Floats, poses: Tensor, rays: Rays
) -> Floats:
    """Colours (V, 3), sRGB in [0, 1]: means over the cameras that see a vertex, which count by their cosine to it.

    poses: (B, 4, 4); rays: (B, n^2), of square pictures of theirs, whose half depths tell what they see; unseen:
    (V, 3), the colours of vertices that none of them sees.
    """
    total, weight = np.zeros(vertices.shape), np.zeros((len(vertices), 1))
    for number, pose in enumerate(poses):
        own = rays[number : number + 1]
        towards = torch.from_numpy(vertices) - pose[:3, 3]
        distance = towards.norm(dim=1)
        towards = towards / distance[:, None]
        cosine = -(towards * torch.from_numpy(normals)).sum(1)
        seen = (cosine > SHALLOWEST) & (distance <= _half_depths_at(shape.density, own, pose, towards))
        for part in np.array_split(np.flatnonzero(seen.numpy()), -(-int(seen.sum()) // VERTICES_AT_ONCE) or 1):
            points, directions = torch.from_numpy(vertices[part]), towards[part]
            found = srgb_of(colour_along(shape.radiance, points, directions, shape.radius))
            total[part] += (found * cosine[part][:, None]).numpy()
            weight[part] += cosine[part][:, None].numpy()
    return np.where(weight > 0, total / weight.clip(min=1e-12), unseen).astype(np.float32)


def srgb_of(colours: Tensor) -> Tensor:
    """sRGB in [0, 1] of renders' colours in [-1, 1]."""
    return ((colours + 1) / 2).clamp(0, 1)


def _half_depths_at(density: DensityFunction, rays: Rays, pose: Tensor, directions: Tensor) -> Tensor:
    """How far a camera sees along unit directions (N, 3): the farthest half depth of the pixels beside, (N,).

    rays: (1, n^2), row by row, of the camera's picture. Directions beside the picture see nothing (-inf).
    """
    size = math.isqrt(rays.per_image)
    depths = meet_rays(density, rays).distance.view(1, 1, size, size)
    depths = functional.max_pool2d(torch.where(torch.isfinite(depths), depths, rays.far.view_as(depths)), 3, 1, 1)
    local = directions @ pose[:3, :3]
    corner = rays.directions[0, 0] @ pose[:3, :3]  # the centre of the first pixel, at (1 / n - 1) of the image plane
    place = torch.stack([local[:, 0] / -local[:, 2], local[:, 1] / local[:, 2]], dim=1)
    place = place / (corner[0] / corner[2]) * (1 - 1 / size)
    column, row = ((place + 1) / 2 * size).floor().long().unbind(1)
    inside = (local[:, 2] < 0) & (place.abs() < 1).all(1)
    found = depths[0, 0, row.clamp(0, size - 1), column.clamp(0, size - 1)]
    return torch.where(inside, found, -torch.inf)


def _parts(count: int) -> list[slice]:
    return [slice(start, start + VERTICES_AT_ONCE) for start in range(0, count, VERTICES_AT_ONCE)]


def _vertex_normals(vertices: Floats, faces: Indices) -> Floats:
    """Unit normals (V, 3), the mean of the triangles' around each vertex by area."""
    total = np.zeros((len(vertices), 3), np.float64)
    for start in range(0, len(faces), FACES_AT_ONCE):
        part = faces[start : start + FACES_AT_ONCE]
        across = face_normals(vertices, part)
        for axis in range(3):
            for corner in range(3):
                total[:, axis] += np.bincount(part[:, corner], across[:, axis], minlength=len(vertices))
    length = np.linalg.norm(total, axis=1, keepdims=True)
    return np.asarray(np.where(length > 0, total / np.maximum(length, 1e-30), (0.0, 0.0, 1.0)), np.float32)
