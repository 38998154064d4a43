"""The command `graf`: chooses a command, and imports the chosen one alone."""

from __future__ import annotations

import argparse
import pkgutil
import sys
from collections.abc import Sequence

from graf import __version__

#: command -> (its function: arguments -> exit code, what it does)
COMMANDS = {
    "train": ("graf.app.train_command:main", "train a generator, or continue a run"),
    "eval": ("graf.app.eval_command:main", "render and score a trained generator"),
    "view": ("graf.app.view_command:main", "look at a trained generator in the browser"),
    "mesh": ("graf.app.mesh_command:main", "take an object of a trained run away as a mesh with colours"),
    "invert": ("graf.app.invert_command:main", "find the object of a photograph, and its camera"),
    "capture": ("graf.app.capture_command:main", "make a data set of a video or photographs of an object"),
    "check": ("graf.app.check_command:main", "look at this machine: what is there, what is missing"),
    "doctor": ("graf.app.doctor:main", "look at a data set and its cameras before training"),
    "plan": ("graf.app.train_command:plan", "predict what training needs of memory, without data or GPU"),
    "export": ("graf.app.export_command:main", "write weights, programs or pictures for other programs"),
    "card": ("graf.app.card_command:main", "make a folder with a model card, ready to upload"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `graf COMMAND ...`; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="graf",
        description="Train 3D-aware GANs on labelled photographs, and look at what they have learned.",
        epilog="graf COMMAND --help lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"graf {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, (_, line) in COMMANDS.items():
        commands.add_parser(name, help=line, add_help=False)
    command = parser.parse_args(arguments[:1]).command  # the rest is the command's own
    return int(pkgutil.resolve_name(COMMANDS[command][0])(arguments[1:]))
