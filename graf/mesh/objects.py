"""From an object of a trained run to its mesh: level, surface, cleaning, colours, in this order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graf.base.errors import UserError
from graf.evaluation.renderer import Renderer
from graf.mesh.cleaning import drop_floaters
from graf.mesh.coloured_mesh import ColouredMesh
from graf.mesh.colouring import colour_along_normals, colour_from_views, estimate_normals
from graf.mesh.decimation import FEWEST_TRIANGLES, decimate
from graf.mesh.extraction import Grid, extract_surface
from graf.mesh.field_of_object import FieldOfObject
from graf.mesh.rays_around import views_around
from graf.runtime.logs import logger

COLOUR_SOURCES = ("normal", "views")
#: Cameras at each height that colours are averaged over, and the pixels of the depth maps that tell what they see.
COLOUR_AZIMUTHS, VISIBILITY_RESOLUTION = 6, 96


@dataclass(frozen=True)
class MeshOptions:
    """How a mesh is made.

    resolution: cells of the grid along an axis; level: the density of the surface, None for an automatic one;
    keep_floaters: also pieces beside the object and cavities in it; triangles: reduce it to about so many; colours:
    "normal", as seen straight from above, or "views", averaged over the cameras around it that see the vertex; they
    differ where colours depend on the direction; budget_mib: memory for the grid, besides the mesh and what the network
    needs; progress: show a bar.

    The mesh is watertight whatever is chosen.
    """

    resolution: int = 256
    level: float | None = None
    keep_floaters: bool = False
    triangles: int | None = None
    colours: str = "normal"
    budget_mib: float = 128.0
    progress: bool = False

    def __post_init__(self) -> None:
        if self.colours not in COLOUR_SOURCES:
            raise UserError(f"colours={self.colours!r}: expected {' or '.join(COLOUR_SOURCES)}")
        if self.level is not None and not self.level > 0:
            raise UserError(f"level={self.level}: expected a density above 0")
        if self.triangles is not None and self.triangles < FEWEST_TRIANGLES:
            raise UserError(f"triangles={self.triangles}: expected at least {FEWEST_TRIANGLES}, a tetrahedron")

    def grid(self, radius: float) -> Grid:
        """The grid in the cube around a sphere of `radius`. Raises UserError where it does not fit the budget."""
        return Grid(radius, self.resolution, self.budget_mib)


def extract_mesh(
    renderer: Renderer, z: Tensor, class_name: str | int, options: MeshOptions | None = None
) -> ColouredMesh:
    """The mesh of the object z (dim_z,) of a class, in world units, with the field's own colours.

    Raises UserError for options out of range, for an object without a surface, and MissingExtra without the packages
    of the extra `mesh`.

    >>> import graf
    >>> from graf.mesh import MeshOptions, extract_mesh, save_mesh
    >>> renderer = graf.load(run, device="cpu")
    >>> mesh = extract_mesh(renderer, renderer.codes(0, range(1))[0], "duck", MeshOptions(resolution=32, level=0.5))
    >>> mesh.watertight
    True
    >>> save_mesh(run / "duck.glb", mesh)
    """
    options = options or MeshOptions()
    shape = FieldOfObject(renderer, z, class_name)
    grid = options.grid(shape.radius)
    level = shape.level().density if options.level is None else options.level
    vertices, faces = extract_surface(shape.density, level, grid, options.progress)
    if not options.keep_floaters:
        vertices, faces, dropped = drop_floaters(vertices, faces)
        if dropped:
            logger.info("left out: %d small pieces and inner cavities", dropped)
    if options.triangles is not None:
        vertices, faces = decimate(vertices, faces, options.triangles)
    normals = estimate_normals(shape.density, vertices, faces, grid.cell)
    colours = colour_along_normals(shape.radiance, vertices, normals, shape.radius)
    if options.colours == "views":
        views = views_around(renderer, class_name, COLOUR_AZIMUTHS)
        rays = renderer.rays(views, VISIBILITY_RESOLUTION).to("cpu")
        colours = colour_from_views(shape, vertices, normals, colours, views.poses, rays)
    return ColouredMesh(vertices, faces, normals, colours)
