"""The mesh that this room makes and that others show and share: triangles with normals and colours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Indices = NDArray[np.int32]


@dataclass(frozen=True)
class ColouredMesh:
    """Triangles of an object in world units, z up.

    vertices: (V, 3) float32; faces: (F, 3) int32, indices of their corners, counter-clockwise seen from outside;
    normals: (V, 3) float32, unit length, outwards; colours: (V, 3) float32, red, green, blue as sRGB in [0, 1], the
    numbers of an image file.
    """

    vertices: Floats
    faces: Indices
    normals: Floats
    colours: Floats

    @property
    def extent(self) -> tuple[float, float, float]:
        """Its size along x, y and z, world units; zeros where it has no vertex."""
        x, y, z = np.ptp(self.vertices, axis=0).tolist() if len(self.vertices) else (0.0, 0.0, 0.0)
        return x, y, z

    @cached_property
    def watertight(self) -> bool:
        """Whether it encloses a volume: see :func:`is_watertight`."""
        return is_watertight(self.faces)


def is_watertight(faces: NDArray[Any]) -> bool:
    """Whether every edge of faces (F, 3) has two triangles, one passing it in each direction: they enclose a volume."""
    keys = np.empty((3, len(faces)), np.int64)  # of an edge: its smaller corner, its larger one, its direction
    for corner, row in enumerate(keys):
        start, end = faces[:, corner], faces[:, (corner + 1) % 3]
        row[:] = np.minimum(start, end)
        row <<= 31
        row |= np.maximum(start, end)
        row <<= 1
        row |= start > end
    edges = keys.reshape(-1)
    edges.sort()
    forth, back = edges[::2], edges[1::2]
    closed = len(forth) == len(back) > 0 and not (forth & 1).any() and (back == forth + 1).all()
    return bool(closed and (forth[1:] != forth[:-1]).all())


def directed_edges(faces: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the edges (3 F,) of triangles start and end."""
    corners = faces.astype(np.int64)
    return corners.ravel(), np.roll(corners, -1, axis=1).ravel()


def face_normals(vertices: NDArray[Any], faces: NDArray[Any]) -> NDArray[Any]:
    """Normals (F, 3) whose length is twice the area of their triangle."""
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    return np.cross(b - a, c - a)
