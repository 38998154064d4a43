"""From an object of a trained run to its mesh: level, surface, cleaning, colours, in this order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graf.evaluation.renderer import Renderer
from graf.geometry.rays import Rays
from graf.mesh.cleaning import decimate, drop_floaters
from graf.mesh.coloured_mesh import ColouredMesh
from graf.mesh.colouring import colour_along_normals, estimate_normals
from graf.mesh.extraction import Grid, extract_surface
from graf.mesh.level import Level, choose_level
from graf.mesh.rays_around import views_around


@dataclass(frozen=True)
class MeshOptions:
    """How a mesh is made.

    resolution: cells of the grid along an axis; level: the density of the surface, None for an automatic one;
    keep_floaters: also pieces beside the object and cavities in it; triangles: reduce it to about so many; budget_mib:
    memory for the grid, besides the mesh and what the network needs.
    """

    resolution: int = 256
    level: float | None = None
    keep_floaters: bool = False
    triangles: int | None = None
    budget_mib: float = 128.0


@dataclass(frozen=True)
class FieldOfObject:
    """One object of a renderer as a function of places: density and radiance, nothing beyond its bounding sphere."""

    renderer: Renderer
    z: Tensor
    class_name: str | int

    @property
    def radius(self) -> float:
        """Of the sphere that holds everything that is rendered, world units."""
        caster, distance = self.renderer.caster, self.renderer.cameras.radius
        if caster.bounding_radius is not None:
            return caster.bounding_radius
        return max(distance - caster.near, caster.far - distance)

    def density(self, points: Tensor) -> Tensor:
        """Densities (N,) at points (N, 3); points beyond the sphere cost nothing."""
        found = torch.zeros(len(points))
        inside = torch.nonzero(points.norm(dim=1) <= self.radius)[:, 0]
        if len(inside):
            found[inside] = self.renderer.density(points[inside], z=self.z, class_name=self.class_name)
        return found

    def radiance(self, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Colours (N, 3) in [-1, 1] and densities (N,) at points (N, 3) in directions (N, 3)."""
        return self.renderer.radiance(points, directions, z=self.z, class_name=self.class_name)

    def rays_around(self, azimuths: int, resolution: int) -> Rays:
        """Rays (B, resolution^2) of cameras around the object at the data set's heights, on the CPU."""
        views = views_around(self.renderer, self.class_name, azimuths)
        return self.renderer.rays(views, resolution).to("cpu")

    def level(self) -> Level:
        """The level at which its surface lies where rays meet it. Raises UserError where it has none."""
        return choose_level(self.density, self.rays_around(azimuths=6, resolution=40))


def extract_mesh(
    renderer: Renderer, z: Tensor, class_name: str | int, options: MeshOptions | None = None
) -> ColouredMesh:
    """The mesh of the object z (dim_z,) of a class, in world units, with the field's own colours.

    Raises UserError for options out of range, for an object without a surface, and MissingExtra without the packages
    of the extra `mesh`.
    """
    options = options or MeshOptions()
    shape = FieldOfObject(renderer, z, class_name)
    grid = Grid(shape.radius, options.resolution, options.budget_mib)
    level = shape.level().density if options.level is None else options.level
    vertices, faces = extract_surface(shape.density, level, grid)
    if not options.keep_floaters:
        vertices, faces, _ = drop_floaters(vertices, faces)
    if options.triangles is not None:
        vertices, faces = decimate(vertices, faces, options.triangles)
    normals = estimate_normals(shape.density, vertices, faces, grid.cell)
    colours = colour_along_normals(shape.radiance, vertices, normals, 2 * grid.cell)
    return ColouredMesh(vertices, faces, normals, colours)
