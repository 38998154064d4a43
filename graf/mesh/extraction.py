"""Surfaces of constant density by marching cubes, slab by slab, so that memory does not grow with the cube of detail.

A grid of resolution^3 cells covers a cube around the origin and is surrounded by points without density, so that every
surface is closed. Marching cubes with Lewiner's table (Lewiner et al., Journal of Graphics Tools 2003; scikit-image)
sees a slab of a few layers of the grid at a time. Two neighbouring slabs share one layer with the same numbers, on
which they find the same vertices: those are merged.

What is marched is f = (d - level) / (d + level) = tanh(log(d / level) / 2), which is 0 where the density d is level. It
is bounded, and nearly linear where d grows exponentially, as the softplus of a network does at the border of an object:
vertices, which are found by linear interpolation, lie nearer to the surface than with d itself. f stays FLATTEST away
from 0, so that no vertex falls on a grid point: each then lies on an edge of its own, and equal ones are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graf.base.errors import UserError
from graf.base.extras import import_optional
from graf.mesh.coloured_mesh import Floats, Indices
from graf.runtime.logs import progress_bar

#: densities >= 0 (N,) at points (N, 3), both float32 on the CPU
DensityFunction = Callable[[Tensor], Tensor]
Places = TypeVar("Places", Tensor, Floats)

#: the share of a cell by which a vertex may be moved away from a grid point
FLATTEST = 2e-3
#: points whose density is asked for at once
POINTS_AT_ONCE = 2**17
#: Bytes for each point of a slab while it is marched (measured, benchmarks/meshes.py): its value, twice while f is
#: computed, and what marching cubes needs for triangles that are found there.
BYTES_PER_POINT = 24
#: beyond it, coordinates in a slab, in float32, would no longer tell a vertex from a grid point
MAX_RESOLUTION = 2048


class EmptySurface(UserError):
    """There is no point as dense as the level, or no point that is less dense."""


@dataclass(frozen=True)
class Grid:
    """A cube [-radius, radius]^3, world units, of resolution^3 cells, and the MiB that a slab of it may take."""

    radius: float
    resolution: int
    budget_mib: float = 128.0

    def __post_init__(self) -> None:
        if not 2 <= self.resolution <= MAX_RESOLUTION:
            raise UserError(f"resolution={self.resolution}: expected 2 to {MAX_RESOLUTION} cells along an axis")
        if not math.isfinite(self.budget_mib):
            raise UserError(f"a budget of {self.budget_mib} MiB: expected a finite number")
        if self.slab_layers < 1:
            needed = 2 * BYTES_PER_POINT * self.padded_points**2 / 2**20
            raise UserError(
                f"a budget of {self.budget_mib:g} MiB is less than one layer of a grid of resolution "
                f"{self.resolution} needs; expected at least {math.ceil(needed)} MiB"
            )

    @property
    def cell(self) -> float:
        """Side of a cell, world units."""
        return 2 * self.radius / self.resolution

    @property
    def padded_points(self) -> int:
        """Points along an axis: resolution + 1 inside of the cube, and one without density beyond either end."""
        return self.resolution + 3

    @property
    def slab_layers(self) -> int:
        """How many layers of cells a slab has so that it keeps to the budget."""
        layers = int(self.budget_mib * 2**20 / (BYTES_PER_POINT * self.padded_points**2))
        return min(layers - 1, self.padded_points - 1)

    def place(self, indices: Places) -> Places:
        """World coordinates of indices into the padded grid."""
        return (indices - 1) * self.cell - self.radius


def extract_surface(
    density: DensityFunction, level: float, grid: Grid, progress: bool = False
) -> tuple[Floats, Indices]:
    """The surface where the density is `level`: vertices (V, 3) in world units and outward faces (F, 3); watertight.

    The density counts as 0 outside of the grid's cube. Raises EmptySurface where there is none, MissingExtra without
    scikit-image. progress: show a bar.
    """
    if not level > 0:
        raise UserError(f"level={level}: expected a density above 0")
    measure = import_optional("skimage.measure", "mesh")
    merged = _MergedSlabs()
    with progress_bar(total=grid.padded_points - 1, desc="marching", unit="layer", disable=not progress) as bar:
        for first, values in _signed_slabs(density, level, grid):
            if values.min() < 0 < values.max():
                vertices, faces, _, _ = measure.marching_cubes(values, 0.0, gradient_direction="ascent")
                merged.append(first, len(values) - 1, vertices, faces)
            bar.update(len(values) - 1)
    vertices, faces = merged.joined()
    if not len(faces):
        raise EmptySurface(
            f"there is no surface at level {level:.4g}: no point of the grid is as dense; try a lower --level"
        )
    return grid.place(vertices), faces


def _signed_slabs(density: DensityFunction, level: float, grid: Grid) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """f on one slab after the other, (layers, points, points), and the number of its first layer, the former's last."""
    points, thickness = grid.padded_points, grid.slab_layers
    shared = np.full((points, points), -1, np.float32)  # in front of the first layer of cells there is nothing
    for first in range(0, points - 1, thickness):
        last = min(first + thickness, points - 1)
        values = np.full((last - first + 1, points, points), -1, np.float32)
        values[0] = shared
        own = values[1 : min(last, points - 2) - first + 1, 1:-1, 1:-1]  # without the layer of nothing at the end
        _fill(own, density, level, grid, first + 1)
        shared = values[-1].copy()
        yield first, values


def _fill(values: NDArray[np.float32], density: DensityFunction, level: float, grid: Grid, first: int) -> None:
    """f at the points of the cube in layers (n, resolution + 1, resolution + 1), of which the first is `first`."""
    side = values.shape[1]
    for start in range(0, values.size, POINTS_AT_ONCE):
        numbers = torch.arange(start, min(start + POINTS_AT_ONCE, values.size))
        layer, row, column = numbers // side**2 + first, numbers // side % side + 1, numbers % side + 1
        places = grid.place(torch.stack([layer, row, column], dim=1).float())
        found = density(places).double()
        signed = ((found - level) / (found + level)).float()
        signed = torch.where(signed < 0, signed.clamp(max=-FLATTEST), signed.clamp(min=FLATTEST))
        values[(numbers // side**2).numpy(), (row - 1).numpy(), (column - 1).numpy()] = signed.numpy()


@dataclass
class _MergedSlabs:
    """Surfaces of slabs in the order of the grid, whose equal vertices on shared layers are merged as they come."""

    vertices: list[Floats] = field(default_factory=list)
    faces: list[Indices] = field(default_factory=list)
    count: int = 0
    last_layer: int = 0
    #: the vertices on the last layer: their places in it, sorted, and their numbers
    keys: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    numbers: Indices = field(default_factory=lambda: np.empty(0, np.int32))

    def append(self, first: int, thickness: int, vertices: Floats, faces: Indices) -> None:
        """Add the surface of the slab that begins at layer `first`; its vertices count layers from there."""
        on_shared = vertices[:, 0] == 0
        numbers = np.empty(len(vertices), np.int32)
        numbers[~on_shared] = np.arange(self.count, self.count + np.count_nonzero(~on_shared), dtype=np.int32)
        if on_shared.any():
            keys = _keys(vertices[on_shared])
            found = np.searchsorted(self.keys, keys)
            if self.last_layer != first or not np.array_equal(self.keys[found.clip(max=len(self.keys) - 1)], keys):
                raise RuntimeError(f"the slabs before and after layer {first} do not fit each other")
            numbers[on_shared] = self.numbers[found]
        ends = vertices[:, 0] == thickness
        keys = _keys(vertices[ends])
        order = np.argsort(keys)
        self.keys, self.numbers, self.last_layer = keys[order], numbers[ends][order], first + thickness
        new = vertices[~on_shared].astype(np.float32)
        new[:, 0] += first
        self.vertices.append(new)
        self.faces.append(numbers[faces])
        self.count += len(new)

    def joined(self) -> tuple[Floats, Indices]:
        """All vertices, in indices of the padded grid, and all faces; what was collected is let go."""
        if not self.faces:
            return np.empty((0, 3), np.float32), np.empty((0, 3), np.int32)
        vertices = np.concatenate(self.vertices)
        self.vertices.clear()
        faces = np.concatenate(self.faces)
        self.faces.clear()
        return vertices, faces


def _keys(vertices: Floats) -> NDArray[np.uint64]:
    """One whole number for each place (second and third coordinate, >= 0) of vertices (N, 3)."""
    bits = np.ascontiguousarray(vertices[:, 1:], np.float32).view(np.uint32).astype(np.uint64)
    return (bits[:, 0] << np.uint64(32)) | bits[:, 1]
