"""The command line of evaluation: arguments in, an exit code out; what is done stands in eval_tasks."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from graf.app.eval_options import ACTIONS, EvalOptions
from graf.app.failures import ErrorLog, run_command
from graf.app.run_arguments import add_trust_argument
from graf.base.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The command line; its defaults are those of EvalOptions."""
    parser = argparse.ArgumentParser(prog="graf eval", description="Render and score a trained generator.")
    source = parser.add_argument_group("what to evaluate")
    source.add_argument("--run", help="run folder (default: the newest under --outdir)")
    source.add_argument("--outdir", help="folder of all runs (default: %(default)s)")
    source.add_argument("--checkpoint", help="checkpoint file (default: model_best.pt of the run, else the newest)")
    add_trust_argument(source)
    source.add_argument("--classes", nargs="+", help="names or indices of classes (default: all)")
    source.add_argument(
        "--seed",
        type=int,
        help="seed of the codes (default: 0; of --fid_kid and --consistency: as in training, evaluation.seed)",
    )
    source.add_argument("--objects", type=int, help="objects (codes) per class (default: %(default)s)")
    source.add_argument(
        "--truncation", type=float, help="factor on drawn codes; below 1 surer, less various (default: %(default)s)"
    )
    source.add_argument("--datadir", help="folder of the photographs (default: as in training, data.datadir)")
    action = parser.add_argument_group("what to do (default: --grid --rotation)")
    for name, (_, text) in ACTIONS.items():
        if name == "path":
            action.add_argument("--path", metavar="FILE", help=text)
            continue
        action.add_argument(
            f"--{name}", dest="actions", action="append_const", const=name, default=argparse.SUPPRESS, help=text
        )
    detail = parser.add_argument_group("how")
    detail.add_argument("--sr", action="store_true", help="grids and videos super-resolved, beside bicubic upsampling")
    detail.add_argument("--views", type=int, help="azimuths of a grid (default: %(default)s)")
    cameras = detail.add_mutually_exclusive_group()
    cameras.add_argument(
        "--elevations", type=float, nargs="+", help="degrees above the horizon (default: the median of the data set)"
    )
    cameras.add_argument("--heights", type=float, nargs="+", help="the same as heights v in [0, 1], as in data.v_list")
    detail.add_argument("--frames", type=int, help="frames of a video (default: %(default)s)")
    detail.add_argument("--fps", type=int, help="frames per second (default: %(default)s)")
    detail.add_argument("--num_images", type=int, help="generated images for --fid_kid (default: as in training)")
    detail.add_argument(
        "--resolution", type=int, help="side of grids and videos, pixels (default: data.imsize, as of what is scored)"
    )
    detail.add_argument("--device", help="auto | cpu | cuda | cuda:1 | mps (default: %(default)s)")
    detail.add_argument("--chunk", type=int, help="rays rendered at once; smaller needs less memory")
    detail.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    defaults = vars(EvalOptions())
    parser.set_defaults(**{name: value for name, value in defaults.items() if name != "actions"})
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at or score a run; returns the exit code."""
    given = vars(build_parser().parse_args(sys.argv[1:] if arguments is None else arguments))
    debug = given.pop("debug")
    if given["path"] is not None:
        given["actions"] = [*given.get("actions", ()), "path"]

    def command(errors: ErrorLog) -> int:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}: graf eval works in one process; start it without torchrun"
            )
        from graf.app.eval_tasks import run_evaluation

        written = run_evaluation(EvalOptions(**given), errors)
        print("written:", " ".join(str(path) for path in written))
        return 0

    return run_command(command, debug=debug, interrupted="interrupted; what was written before stays")
