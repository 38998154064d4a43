"""Writes `graf view --html`: a run's objects as coloured meshes on one page that needs no server."""

from __future__ import annotations

from pathlib import Path

from graf.app.run_arguments import open_run
from graf.app.viewing import ViewOptions, describe
from graf.base.errors import UserError
from graf.base.extras import MissingExtra, import_optional
from graf.base.files import check_writable, write_atomically
from graf.mesh import MeshOptions, extract_mesh
from graf.runtime.logs import logger, progress_bar
from graf.viewer.page import PageCamera, build_page

#: of each mesh at most: about 0.8 MB of the page
TRIANGLES = 30_000
#: cells of a mesh's grid along each axis, unless --resolution says another number
RESOLUTION = 128


def write_mesh_page(options: ViewOptions, path: Path) -> int:
    """One page with a mesh of each class, of the object that the seed names; returns the exit code."""
    import_optional("skimage", "mesh")  # before the run is opened: what is missing is told at once
    check_writable(path.parent)
    opened = open_run(options.run, options.device, options.truncation, options.trust)
    renderer = opened.renderer
    z, meshes = renderer.codes(options.seed, range(1))[0], {}
    made = MeshOptions(resolution=options.resolution or RESOLUTION, triangles=TRIANGLES)
    for class_name in progress_bar(renderer.classes, desc="meshes", unit="class"):
        try:
            meshes[class_name] = extract_mesh(renderer, z, class_name, made)
        except MissingExtra:
            raise
        except UserError as error:  # haze, which has no surface
            logger.warning("class %s is left out: %s", class_name, error)
    if not meshes:
        raise UserError(f"--html {path}: no class has a surface for seed {options.seed}; train longer, or try another")
    red, green, blue = (0.5 * renderer.generator.background_colour.detach().cpu() + 0.5).tolist()
    camera = PageCamera(renderer.fov, renderer.cameras.radius, renderer.default_elevation, (red, green, blue))
    write_atomically(path, build_page(describe(opened.trained, opened.folder), meshes, camera))
    logger.info("wrote %s, %.1f MB: open it in any browser", path, path.stat().st_size / 1e6)
    return 0
