"""`graf capture SOURCE --out photos/`: a data set and its configuration from a video or photographs of one's own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graf.app.failures import ErrorLog, run_command
from graf.base.errors import UserError

if TYPE_CHECKING:  # what captures needs torch and OpenCV, for which --help does not wait
    from graf.app.capture_turntable import TurntableOptions


#: option -> smallest and largest value
RANGES = {"frames": (8, 3600), "size": (64, 1024), "fov": (1, 150), "elevation": (-30, 89), "turns": (0.2, 1000)}


#: what says nothing to a walk around an object, or with markers
TURNTABLE_ONLY = ("instance", "replace", "elevation", "turns", "direction", "first_angle")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if (options.source is None) == (options.marker_sheet is None):
        parser.error("expected a SOURCE to capture, or --marker-sheet FILE")

    def command(errors: ErrorLog) -> int:
        from graf.runtime.logs import setup_console

        setup_console()
        print("\n".join(capture(options)))
        return 0

    return run_command(command, debug=options.debug, interrupted="interrupted; the set is as it was")


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="graf capture",
        description="Make a data set of a video (or a folder of photographs) of an object on a turntable, or of one "
        "that you walk around. Repeated with the same --out it adds classes, objects and heights.",
    )
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="video, or folder of photographs in order")
    parser.add_argument("--out", default="photos", help="folder of the set (default: %(default)s)")
    parser.add_argument("--class", dest="class_name", help="what it is (default: object; of a walk-around: --out)")
    parser.add_argument("--instance", default="", help="which one of its class it is, where a set has several")
    parser.add_argument("--replace", action="store_true", help="in place of the photographs of it that are there")
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument("--frames", type=int, help="how many (default: 72 of a video, all photographs)")
    pictures.add_argument(
        "--mask", default="auto", help="none | auto (or the photographs' own transparency) | a folder of mask files"
    )
    pictures.add_argument("--size", type=int, default=512, help="side of the pictures, at most (default: %(default)s)")
    camera = parser.add_argument_group("camera")
    camera.add_argument("--fov", type=float, help="degrees across the longer side (default: by EXIF, else a phone's)")
    camera.add_argument("--elevation", type=float, help="degrees above the table (turntable; default: 20)")
    camera.add_argument("--turns", type=float, help="how often the table turns in SOURCE (default: found)")
    camera.add_argument(
        "--direction",
        choices=("auto", "cw", "ccw"),
        default="auto",
        help="of the table, seen from above (default: found)",
    )
    camera.add_argument(
        "--first-angle", type=float, default=0.0, help="of the first frame, degrees, where heights have to agree"
    )
    other = parser.add_argument_group("other ways to capture")
    other.add_argument("--walkaround", action="store_true", help="the camera moves around the object (pycolmap)")
    other.add_argument(
        "--features",
        choices=("scene", "object"),
        default="scene",
        help="by which a walk-around is followed; object: "
        "only inside the masks, where the object moved against what is behind it (default: %(default)s)",
    )
    other.add_argument("--markers", action="store_true", help="the object stands on the printed marker sheet")
    other.add_argument("--marker-sheet", metavar="FILE", help="write that sheet as a PDF (letter.pdf: for US paper)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser


def capture(options: argparse.Namespace) -> list[str]:
    """Do what the options ask; returns lines that say what was done and what to do next."""
    _check(options)
    if options.marker_sheet is not None:
        from graf.capture.marker_sheet import write_marker_sheet

        paper = "letter" if "letter" in Path(options.marker_sheet).stem.lower() else "a4"
        write_marker_sheet(Path(options.marker_sheet), paper)
        return [f"wrote {options.marker_sheet}: print it at 100%, and check the bar of 100 mm with a ruler"]
    if options.walkaround or options.markers:
        from graf.app.capture_walkaround import WalkOptions, capture_walk

        return capture_walk(
            WalkOptions(
                source=Path(options.source),
                out=Path(options.out),
                mask=options.mask,
                frames=options.frames,
                size=options.size,
                fov=options.fov,
                markers=options.markers,
                features=options.features,
            )
        )
    from graf.app.capture_turntable import capture_turntable

    return capture_turntable(_turntable_options(options))


def _turntable_options(options: argparse.Namespace) -> TurntableOptions:
    from graf.app.capture_turntable import TurntableOptions

    return TurntableOptions(
        source=Path(options.source),
        out=Path(options.out),
        class_name="object" if options.class_name is None else options.class_name.strip(),
        instance=options.instance.strip(),
        replace=options.replace,
        frames=options.frames,
        mask=options.mask,
        size=options.size,
        fov=options.fov,
        elevation=options.elevation,
        turns=options.turns,
        counter_clockwise=None if options.direction == "auto" else options.direction == "ccw",
        first_angle=options.first_angle,
    )


def _check(options: argparse.Namespace) -> None:
    """Raises UserError for numbers out of range, before anything is read."""
    for name, (low, high) in RANGES.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} {value:g}: expected {low:g} to {high:g}")
    if options.class_name is not None and (options.walkaround or options.markers):
        raise UserError(
            f"--class {options.class_name}: a set with poses of its own has one class, named after its folder; use "
            f"--out {options.class_name}"
        )
    if options.walkaround and options.markers:
        raise UserError("--walkaround --markers: poses come from either; leave one out")
    _check_way(options)
    if not -360 <= options.first_angle <= 360:
        raise UserError(f"--first-angle {options.first_angle:g}: expected -360 to 360 degrees")


def _check_way(options: argparse.Namespace) -> None:
    """Raises UserError for an option that the way of capturing would ignore."""
    way, ignored = "a turntable", ["features"]
    if options.walkaround or options.markers:
        way = "a walk-around" if options.walkaround else "a capture by markers"
        ignored = [*TURNTABLE_ONLY, *([] if options.walkaround else ignored)]
    parser = build_parser()
    for name in ignored:
        if getattr(options, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')}: {way} has no use for it; leave it out")
