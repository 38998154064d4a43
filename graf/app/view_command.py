"""The command `graf view`: a run in the browser, one in training too, or its objects in one HTML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from graf.app.failures import ErrorLog, run_command
from graf.app.run_arguments import add_run_arguments


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="graf view", description="Look at a trained generator in the browser: turn, zoom, change codes, save."
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--follow", action="store_true", help="take every new checkpoint of a run in training; --device auto: the CPU"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8080, help="port, or the next free one (default: %(default)s)")
    parser.add_argument("--height", type=int, help="rows of a picture that stands still (default: 4 x data.imsize)")
    parser.add_argument("--datadir", help="folder of the photographs (default: as in training, data.datadir)")
    parser.add_argument("--html", metavar="FILE", help="write meshes of the classes into one page instead of serving")
    parser.add_argument(
        "--seed", type=int, default=0, help="names the object that is shown first, or those of --html (default: 0)"
    )
    parser.add_argument("--resolution", type=int, help="of --html: cells of a mesh's grid (default: 128)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """View a run until Ctrl-C, or write its page; returns the exit code."""
    given = vars(build_parser().parse_args(arguments))
    debug = given.pop("debug")

    def command(errors: ErrorLog) -> int:
        from graf.app.viewing import ViewOptions, view_run

        options = ViewOptions(**given)
        if options.html is None:
            return view_run(options)
        from graf.app.mesh_page import write_mesh_page

        return write_mesh_page(options, Path(options.html))

    return run_command(command, debug=debug, interrupted="interrupted")
