"""Look at and score a trained generator: `python eval.py` renders the newest run from all sides. See README.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from graf.app.failures import ErrorLog, run_command


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Without any action, --grid and --rotation are done."""
    parser = argparse.ArgumentParser(prog="graf eval", description="Render and score a trained generator.")
    source = parser.add_argument_group("what to evaluate")
    source.add_argument("--run", help="run folder (default: the newest under --outdir)")
    source.add_argument("--outdir", default="results", help="folder of all runs (default: %(default)s)")
    source.add_argument("--checkpoint", help="checkpoint file (default: model_best.pt of the run, else the newest)")
    source.add_argument("--classes", nargs="+", help="names or indices of classes (default: all)")
    source.add_argument(
        "--seed", type=int, help="seed of the codes (default: 0; of --fid_kid: as in training, evaluation.seed)"
    )
    source.add_argument("--objects", type=int, default=1, help="objects (codes) per class (default: %(default)s)")
    action = parser.add_argument_group("what to do (default: --grid --rotation)")
    action.add_argument("--grid", action="store_true", help="grid of views per class: rgb, depth, opacity")
    action.add_argument("--rotation", action="store_true", help="video of a full turn")
    action.add_argument("--elevation", action="store_true", help="video from the lowest to the highest camera and back")
    action.add_argument("--shape_appearance", action="store_true", help="grid of shape codes x appearance codes")
    action.add_argument("--interpolate", action="store_true", help="video from object to object")
    action.add_argument("--fid_kid", action="store_true", help="FID and KID against the photographs, as JSON and CSV")
    action.add_argument("--consistency", action="store_true", help="how well super-resolved views agree, as JSON")
    action.add_argument("--heldout", action="store_true", help="PSNR and KID at the labels held out of training")
    detail = parser.add_argument_group("how")
    detail.add_argument("--sr", action="store_true", help="grids and videos super-resolved, beside bicubic upsampling")
    detail.add_argument("--views", type=int, default=8, help="azimuths of a grid (default: %(default)s)")
    detail.add_argument("--heights", type=float, nargs="+", help="heights v in [0, 1] (default: median of data.v_list)")
    detail.add_argument("--frames", type=int, default=72, help="frames of a video (default: %(default)s)")
    detail.add_argument("--fps", type=int, default=24, help="frames per second (default: %(default)s)")
    detail.add_argument("--num_images", type=int, help="generated images for --fid_kid (default: as in training)")
    detail.add_argument("--resolution", type=int, help="side of the renders, pixels (default: data.imsize)")
    detail.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:1 | mps (default: %(default)s)")
    detail.add_argument("--chunk", type=int, help="rays rendered at once; smaller needs less memory")
    detail.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit code is 0, or 1 after one line that says what is wrong and what to do."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)

    def command(errors: ErrorLog) -> None:
        from graf.app.eval_tasks import ACTIONS, open_presentation

        presentation = open_presentation(options)
        errors.folder = presentation.folder.parent
        chosen = [name for name in ACTIONS if getattr(options, name)] or ["grid", "rotation"]
        written = [path for name in chosen for path in ACTIONS[name](presentation)]
        print("written:", " ".join(str(path) for path in written))

    interrupted = "interrupted; what was written before stays"
    return run_command(command, debug=options.debug, interrupted=interrupted)
