"""`graf card`: its options and exit codes; what is written stands in card_tasks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from graf.app.failures import ErrorLog, run_command
from graf.app.run_arguments import add_run_arguments


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="graf card", description="Make a folder with weights, pictures, scores and a model card, ready to upload."
    )
    add_run_arguments(parser)
    parser.add_argument("--out", help="the new folder (default: card in the run's eval/)")
    parser.add_argument("--name", help="name of the model (default: expname)")
    parser.add_argument(
        "--license",
        default="other",
        help="licence of the weights, as cc-by-4.0: yours to choose (default: %(default)s)",
    )
    parser.add_argument(
        "--dataset", action="append", default=[], metavar="ID", help="id of a data set on the hub; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0, help="names the drawn objects of the pictures (default: 0)")
    parser.add_argument("--frames", type=int, default=48, help="frames of the video; 0: none (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the folder; returns the exit code."""
    options = build_parser().parse_args(sys.argv[1:] if arguments is None else arguments)

    def command(errors: ErrorLog) -> int:
        from graf.app.card_tasks import CardOptions, write_card_folder
        from graf.app.run_arguments import open_run

        chosen = CardOptions(options.name, options.license, tuple(options.dataset), options.seed, options.frames)
        opened = open_run(options.run, options.device, options.truncation, options.trust)
        print(write_card_folder(opened, chosen, options.out))
        return 0

    return run_command(command, debug=options.debug, interrupted="interrupted; nothing was written")
