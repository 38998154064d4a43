"""What is taken off a surface: pieces that float beside the object, and cavities that nobody sees."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from graf.base.extras import import_optional
from graf.mesh.coloured_mesh import Floats, Indices, face_normals

#: pieces with less than this share of the largest piece's volume are floaters
FLOATER_SHARE = 0.05
#: faces whose volume is computed at once
FACES_AT_ONCE = 2**14


def label_components(faces: NDArray[Any], num_vertices: int) -> NDArray[np.int32]:
    """The number of the connected piece of each vertex (V,); scipy takes 70 bytes for each face meanwhile."""
    corners = np.ascontiguousarray(faces, np.int32)
    start, end = corners[:, :2].ravel(), corners[:, 1:].ravel()  # two edges join the three corners of a triangle
    sparse, graphs = import_optional("scipy.sparse", "mesh"), import_optional("scipy.sparse.csgraph", "mesh")
    edges = sparse.coo_array((np.ones(len(start), np.int8), (start, end)), shape=(num_vertices, num_vertices))
    _, labels = graphs.connected_components(edges, directed=False)
    return np.asarray(labels, np.int32)


def enclosed_volumes(vertices: Floats, faces: Indices, labels: NDArray[np.int32]) -> NDArray[np.float64]:
    """The volume that each closed piece encloses, negative where its triangles look inwards, as a cavity's do."""
    total = np.zeros(int(labels.max()) + 1)
    for start in range(0, len(faces), FACES_AT_ONCE):
        part = faces[start : start + FACES_AT_ONCE]
        volume = np.einsum("ij,ij->i", vertices[part[:, 0]], face_normals(vertices, part)) / 6
        total += np.bincount(labels[part[:, 0]], volume, minlength=len(total))
    return total


def drop_floaters(vertices: Floats, faces: Indices, share: float = FLOATER_SHARE) -> tuple[Floats, Indices, int]:
    """The pieces that enclose at least `share` of the volume of the largest one, and how many others there were.

    Cavities, which enclose a negative volume and which only the inside of the object sees, go too.
    """
    labels = label_components(faces, len(vertices))
    volumes = enclosed_volumes(vertices, faces, labels)
    kept = volumes >= share * volumes.max()
    if kept.all():
        return vertices, faces, 0
    return *_select(vertices, faces, kept[labels]), int(np.count_nonzero(~kept))


def _select(vertices: Floats, faces: Indices, kept: NDArray[np.bool_]) -> tuple[Floats, Indices]:
    """The vertices that are kept (V,) and the faces between them."""
    numbers = np.cumsum(kept, dtype=np.int32) - np.int32(1)
    return vertices[kept], numbers[faces[kept[faces[:, 0]]]]
