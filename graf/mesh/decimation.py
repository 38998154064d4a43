"""Fewer triangles for the same shape, and what that may break put right: every edge has two triangles afterwards."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from graf.base.errors import UserError
from graf.base.extras import import_optional
from graf.mesh.coloured_mesh import Floats, Indices, directed_edges

#: a tetrahedron
FEWEST_TRIANGLES = 4
#: how far the middles of an edge that was several are moved apart, each into its own wall, as a share of its length
APART = 0.01


def decimate(vertices: Floats, faces: Indices, triangles: int) -> tuple[Floats, Indices]:
    """About `triangles` triangles that keep the shape, by quadric edge collapse (Garland & Heckbert, SIGGRAPH 1997).

    A closed surface stays one: see :func:`separate_walls`. Raises MissingExtra without fast-simplification, UserError
    for fewer than four triangles, or so few that nothing is left.
    """
    if triangles < FEWEST_TRIANGLES:
        raise UserError(f"triangles={triangles}: expected at least {FEWEST_TRIANGLES}, a tetrahedron")
    if len(faces) <= triangles:
        return vertices, faces
    simplification = import_optional("fast_simplification", "mesh")
    fewer, corners = simplification.simplify(vertices, faces, target_count=triangles)
    fewer, faces = np.asarray(fewer, np.float32), drop_flaps(np.asarray(corners, np.int32))
    if not len(faces):
        raise UserError(f"triangles={triangles}: nothing of this shape is left of so few; ask for more")
    used = np.zeros(len(fewer), np.bool_)
    used[faces] = True
    return separate_walls(fewer[used], (np.cumsum(used, dtype=np.int32) - np.int32(1))[faces])


def drop_flaps(faces: Indices) -> Indices:
    """Faces (F, 3) without lines, and without pairs that lie back to back, between which there is nothing."""
    faces = faces[(faces != np.roll(faces, 1, axis=1)).all(axis=1)]
    ordered = np.sort(faces, axis=1)
    _, group = np.unique(ordered, axis=0, return_inverse=True)
    # cyclic orders of three corners are two, which the smallest corner's successor tells apart
    successor = np.take_along_axis(np.roll(faces, -1, axis=1), faces.argmin(axis=1)[:, None], axis=1)[:, 0]
    turn = np.where(successor == ordered[:, 1], 1, -1)
    surplus = np.bincount(group.ravel(), turn).astype(np.int64)[group.ravel()]
    order = np.lexsort((turn, group.ravel()))
    rank = np.empty(len(faces), np.int64)  # of each face among those of its corners and its turn
    starts = np.flatnonzero(np.diff(np.stack([group.ravel()[order], turn[order]]), axis=1, prepend=-2).any(axis=0))
    rank[order] = np.arange(len(faces)) - np.repeat(starts, np.diff([*starts, len(faces)]))
    return faces[rank < turn * surplus]


def separate_walls(vertices: Floats, faces: Indices) -> tuple[Floats, Indices]:
    """The closed surface with two triangles at every edge, where walls without thickness had left four or more.

    Where several walls meet in one edge, it becomes an edge of each: its middle is doubled, and every copy is moved a
    little into its wall. Edges have to be passed as often in one direction as in the other.
    """
    while len(shared := _shared_edges(faces)):
        middles: list[Floats] = []
        halves: list[tuple[int, int, int]] = []
        split: set[int] = set()
        near = np.flatnonzero(np.isin(faces, shared).sum(axis=1) >= 2)  # the few faces that have such an edge
        for start, end in shared.tolist():
            around = near[((faces[near] == start) | (faces[near] == end)).sum(axis=1) == 2].tolist()
            if not split.isdisjoint(around):
                continue  # a triangle with several such edges is split at one at a time
            split.update(around)
            for middle, wall in _walls_at(vertices, faces, start, end, around):
                for face in wall:
                    halves += _halve(faces[face].tolist(), start, end, len(vertices) + len(middles))
                middles.append(middle)
        vertices = np.concatenate([vertices, np.stack(middles)])
        faces = np.concatenate([np.delete(faces, sorted(split), axis=0), np.array(halves, np.int32)])
    return vertices, faces


def _shared_edges(faces: Indices) -> NDArray[np.int64]:
    """The edges (E, 2), smaller corner first, that more than two triangles have."""
    edges = np.sort(np.stack(directed_edges(faces), axis=1), axis=1)
    found, counts = np.unique(edges, axis=0, return_counts=True)
    return np.asarray(found[counts > 2])


def _walls_at(
    vertices: Floats, faces: Indices, start: int, end: int, around: list[int]
) -> list[tuple[Floats, tuple[int, int]]]:
    """The middle (3,) of an edge for each wall that meets in it, and the two of the triangles `around` that bound it.

    Seen along the edge, a wall lies counter-clockwise of a triangle that passes the edge backwards, up to one that
    passes it forwards. Walls that go through each other are paired like brackets.
    """
    origin, along = vertices[start].astype(np.float64), (vertices[end] - vertices[start]).astype(np.float64)
    length = float(np.linalg.norm(along))
    along = along / max(length, 1e-30)
    first = np.cross(along, np.eye(3)[np.abs(along).argmin()])
    first = first / np.linalg.norm(first).clip(min=1e-30)
    second = np.cross(along, first)
    angles, forwards = {}, set()
    for face in around:
        corners = faces[face].tolist()
        apex = vertices[next(corner for corner in corners if corner not in (start, end))] - origin
        angles[face] = math.atan2(float(apex @ second), float(apex @ first))
        if corners[(corners.index(start) + 1) % 3] == end:
            forwards.add(face)
    walls, waiting, seen = [], [], set()
    for face in 2 * sorted(around, key=lambda number: angles[number]):  # twice, for walls across the turn's beginning
        if face not in forwards and face not in seen:
            waiting.append(face)
            seen.add(face)
        elif face in forwards and face not in seen and waiting:
            walls.append((waiting.pop(), face))
            seen.add(face)
    middles = []
    for behind, ahead in walls:
        angle = angles[behind] + (angles[ahead] - angles[behind]) % (2 * math.pi) / 2
        inwards = math.cos(angle) * first + math.sin(angle) * second
        middles.append(((origin + length * (along / 2 + APART * inwards)).astype(np.float32), (behind, ahead)))
    return middles


def _halve(corners: list[int], start: int, end: int, middle: int) -> list[tuple[int, int, int]]:
    """The two triangles of one that is split at `middle` of its edge between start and end."""
    place = next(number for number in range(3) if {corners[number], corners[(number + 1) % 3]} == {start, end})
    a, b, c = corners[place], corners[(place + 1) % 3], corners[(place + 2) % 3]
    return [(a, middle, c), (middle, b, c)]
