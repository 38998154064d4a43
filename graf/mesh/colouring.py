"""Normals and colours of a surface's vertices, asked of the field that the surface was found in.

A colour is composited like a pixel's, along a short ray that passes the vertex from outside to inside, and divided by
the opacity of that stretch: the field's own colour, without background. The ray comes along the normal, or from the
cameras that see the vertex. See NeRF's eq. 3 (Mildenhall et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from graf.geometry.volume_rendering import compositing_weights
from graf.mesh.coloured_mesh import Floats, Indices, face_normals
from graf.mesh.extraction import DensityFunction

#: (points (N, 3), directions (N, 3)) -> (rgb (N, 3) in [-1, 1], densities (N,) >= 0), on the CPU
RadianceFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

#: samples of the short ray through a vertex
STRETCH_SAMPLES = 6
#: vertices coloured at once
VERTICES_AT_ONCE = 2**14


def estimate_normals(density: DensityFunction, vertices: Floats, faces: Indices, step: float) -> Floats:
    """Unit normals (V, 3): against the gradient of the density, by central differences over 2 `step`.

    Where the gradient vanishes or points against the triangles around the vertex, which are outward, theirs counts:
    the mean of their normals by area.
    """
    flat = _vertex_normals(vertices, faces)
    normals = np.empty_like(flat)
    steps = step * torch.eye(3)
    for start in range(0, len(vertices), VERTICES_AT_ONCE):
        part = slice(start, start + VERTICES_AT_ONCE)
        centre, outward = torch.from_numpy(vertices[part]), torch.from_numpy(flat[part])
        places = torch.stack([centre[:, None] - steps, centre[:, None] + steps])  # (2, N, axis, 3)
        lower, upper = density(places.reshape(-1, 3)).view(2, -1, 3)
        smooth = functional.normalize(lower - upper, dim=-1)
        agrees = (smooth * outward).sum(-1, keepdim=True) > 0
        normals[part] = torch.where(agrees, smooth, outward).numpy()
    return normals


def colour_along(radiance: RadianceFunction, vertices: Tensor, directions: Tensor, reach: float) -> Tensor:
    """Colours (N, 3) in [-1, 1] of places (N, 3) on a surface, met in unit `directions` (N, 3).

    reach: how far inside the stretch ends, world units; it begins at half of that outside.
    """
    length = 1.5 * reach / STRETCH_SAMPLES
    distances = (torch.arange(STRETCH_SAMPLES) + 0.5) * length - 0.5 * reach
    points = vertices[:, None] + distances[:, None] * directions[:, None]
    rgb, density = radiance(points.reshape(-1, 3), directions.repeat_interleave(STRETCH_SAMPLES, dim=0))
    # a floor of density far below any surface's, so that a stretch through nothing has the mean colour on it
    density = density.view(len(vertices), 1, STRETCH_SAMPLES) + 1e-6
    weights = compositing_weights(density, torch.full_like(density, length))[:, 0]
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights[..., None] * rgb.view(*points.shape)).sum(1)


def colour_along_normals(radiance: RadianceFunction, vertices: Floats, normals: Floats, reach: float) -> Floats:
    """Colours (V, 3), sRGB in [0, 1], of vertices that are looked at straight from above."""
    colours = np.empty_like(vertices)
    for start in range(0, len(vertices), VERTICES_AT_ONCE):
        part = slice(start, start + VERTICES_AT_ONCE)
        towards = -torch.from_numpy(normals[part])
        colours[part] = colour_along(radiance, torch.from_numpy(vertices[part]), towards, reach).numpy()
    return _from_render(colours)


def _from_render(colours: Floats) -> Floats:
    """sRGB in [0, 1] of renders' colours in [-1, 1]."""
    return ((colours + 1) / 2).clip(0, 1)


def _vertex_normals(vertices: Floats, faces: Indices) -> Floats:
    """Unit normals (V, 3), the mean of the triangles' around each vertex by area."""
    total = np.zeros((len(vertices), 3), np.float64)
    across = face_normals(vertices, faces).astype(np.float64)
    for axis in range(3):
        for corner in range(3):
            total[:, axis] += np.bincount(faces[:, corner], across[:, axis], minlength=len(vertices))
    length = np.linalg.norm(total, axis=1, keepdims=True)
    return np.asarray(np.where(length > 0, total / np.maximum(length, 1e-30), (0.0, 0.0, 1.0)), np.float32)
