"""`graf export`: its options and exit codes; what is written stands in export_tasks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from graf.app.failures import ErrorLog, run_command
from graf.app.run_arguments import add_object_arguments, add_run_arguments
from graf.base.errors import UserError

#: values of --to, which are also the suffixes of the files -> what is written
FORMATS = {
    "safetensors": "averaged weights with their configuration, which graf.load opens",
    "pt2": "the radiance field as a torch.export program, its rgb within 1e-5, its density within 1e-5 of the largest",
    "onnx": "the same as an ONNX model",
}

#: what names the object of --transforms -> the option
OBJECT_OPTIONS = {"class_name": "--class", "seed": "--seed", "instance": "--instance", "object_file": "--object"}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="graf export", description="Write a trained generator, or pictures of an object, for other programs."
    )
    add_run_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    lines = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    what.add_argument("--to", choices=FORMATS, help=lines)
    what.add_argument(
        "--transforms", type=int, metavar="N", help="N pictures of one object, with their cameras in transforms.json"
    )
    parser.add_argument("--out", help="file, or folder of --transforms (default: in the run's eval/)")
    pictures = parser.add_argument_group("which object --transforms shows, and how")
    add_object_arguments(pictures)
    pictures.add_argument("--resolution", type=int, help="side of the pictures, pixels (default: data.imsize)")
    pictures.add_argument(
        "--elevations", type=float, nargs="+", help="degrees above the horizon, in turn (default: the data set's)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Export; returns the exit code."""
    options = build_parser().parse_args(sys.argv[1:] if arguments is None else arguments)

    def command(errors: ErrorLog) -> int:
        if options.to is not None:
            refuse_object_options(options)
        from graf.app import export_tasks
        from graf.app.run_arguments import open_run

        opened = open_run(options.run, options.device, options.truncation, options.trust)
        if options.to is not None:
            line = export_tasks.write_model(opened, options.to, options.out)
        else:
            object_options = {name: getattr(options, name) for name in OBJECT_OPTIONS}
            pictures = export_tasks.PictureOptions(options.transforms, options.resolution, options.elevations)
            line = export_tasks.write_pictures(opened, object_options, pictures, options.out)
        print(line)
        return 0

    return run_command(command, debug=options.debug, interrupted="interrupted; nothing was written")


def refuse_object_options(options: argparse.Namespace) -> None:
    """Raise UserError for options that have no meaning with --to, which exports every object."""
    defaults = vars(build_parser().parse_args(["--to", options.to]))
    for name in (*OBJECT_OPTIONS, "resolution", "elevations", "truncation"):
        if getattr(options, name) != defaults[name]:
            flag = OBJECT_OPTIONS.get(name, f"--{name}")
            raise UserError(f"{flag}: chooses pictures, and --to {options.to} writes the whole model; leave it out")
