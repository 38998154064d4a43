"""The command `graf mesh`: an object of a trained run as a mesh, a point cloud, depth maps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graf.app.failures import ErrorLog, run_command
from graf.app.run_arguments import add_object_arguments, add_run_arguments, object_code, open_run, output_path

if TYPE_CHECKING:  # torch is imported when a run is opened, so that --help answers at once
    from graf.app.run_arguments import OpenedRun
    from graf.mesh import ColouredMesh

#: of the pictures that --points and --depth are made of: cameras at each height, pixels along a side
AZIMUTHS, RESOLUTION = 8, 128


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="graf mesh", description="Turn an object of a trained run into a mesh with colours.", allow_abbrev=False
    )
    add_run_arguments(parser)
    add_object_arguments(parser)
    shape = parser.add_argument_group("the surface")
    shape.add_argument("--resolution", type=int, default=256, help="cells of the grid along an axis (default: 256)")
    shape.add_argument("--level", type=float, help="density of the surface (default: where rays meet the object)")
    shape.add_argument(
        "--floaters",
        choices=("drop", "keep"),
        default="drop",
        help="small pieces beside the object and cavities inside it (default: %(default)s)",
    )
    shape.add_argument("--triangles", type=int, help="reduce the mesh to about so many triangles")
    shape.add_argument(
        "--colours",
        choices=("normal", "views"),
        default="normal",
        help="of a vertex: seen straight from above, or averaged over cameras that see it (default: %(default)s)",
    )
    shape.add_argument("--budget", type=float, default=128, metavar="MIB", help="memory of the grid (default: 128)")
    files = parser.add_argument_group("what is written")
    files.add_argument(
        "--out",
        nargs="+",
        metavar="FILE",
        help=".glb, .ply, .obj with colours, .stl without (default: a .glb in the run's eval folder)",
    )
    files.add_argument("--lit", action="store_true", help="a GLB that viewers shade; its colours hold light already")
    files.add_argument("--points", action="store_true", help="also a cloud of the points that cameras around it see")
    files.add_argument("--depth", action="store_true", help="also the depth maps of these cameras")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files of an object; returns the exit code."""
    given = vars(build_parser().parse_args(sys.argv[1:] if arguments is None else arguments))

    def command(errors: ErrorLog) -> int:
        from graf.base.extras import import_optional
        from graf.mesh.formats import encoder_of

        for file in given["out"] or ():
            encoder_of(Path(file))  # a wrong suffix is told before anything is computed
        import_optional("skimage", "mesh")  # as is a missing extra
        if given["triangles"] is not None:
            import_optional("fast_simplification", "mesh")
        opened = open_run(given["run"], given["device"], given["truncation"], given["trust"])
        errors.folder = opened.folder.path
        for line in write_object(opened, given):
            print(line)
        return 0

    return run_command(command, debug=given["debug"], interrupted="interrupted; files are written whole or not at all")


def write_object(opened: OpenedRun, given: dict[str, Any]) -> list[str]:
    """Write everything that was asked for; returns the lines that say what it is. Raises UserError and OSError."""
    from graf.mesh import MeshOptions, extract_mesh, save_mesh
    from graf.mesh.field_of_object import FieldOfObject
    from graf.mesh.formats import save_points
    from graf.mesh.level import Level
    from graf.mesh.point_cloud import collect_points, write_depth_maps

    class_name, z, name = object_code(opened.trained, given)
    shape = FieldOfObject(opened.renderer, z, class_name)
    options = MeshOptions(
        resolution=given["resolution"],
        level=given["level"],
        keep_floaters=given["floaters"] == "keep",
        triangles=given["triangles"],
        colours=given["colours"],
        budget_mib=given["budget"],
        progress=True,
    )
    options.grid(shape.radius)  # what does not fit is told before anything is computed
    paths = [output_path(file, opened, f"mesh_{name}.glb") for file in given["out"] or [None]]  # as is where to write
    level = shape.level() if given["level"] is None else Level(given["level"], "as given")
    mesh = extract_mesh(opened.renderer, z, class_name, replace(options, level=level.density))
    lines = [f"level: {level.density:.4g} ({level.reason})", describe(mesh)]
    for path in paths:
        save_mesh(path, mesh, unlit=not given["lit"])
        lines.append(f"wrote {path}")
    base = paths[0].with_suffix("") if given["out"] else paths[0].with_name(f"mesh_{name}")
    if given["points"]:
        cloud = collect_points(shape, AZIMUTHS, RESOLUTION)
        path = base.with_name(f"{base.name}_points.ply")
        save_points(path, cloud)
        lines.append(f"wrote {path}: {len(cloud.places):,} points")
    if given["depth"]:
        folder = base.with_name(f"{base.name}_depth")
        *maps, cameras = write_depth_maps(shape, AZIMUTHS, RESOLUTION, folder)
        lines.append(f"wrote {folder}: {len(maps)} depth maps and their {cameras.name}")
    return lines


def describe(mesh: ColouredMesh) -> str:
    """A line on a mesh: its triangles, size and whether it is closed."""
    size = " x ".join(f"{length:.3f}" for length in mesh.extent)
    closed = "watertight" if mesh.watertight else "not watertight"
    return f"mesh: {len(mesh.faces):,} triangles, {len(mesh.vertices):,} vertices, {closed}, {size} world units (x y z)"
