"""`graf train` and `graf plan`: their options and exit codes."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence

from graf.app.failures import ErrorLog, run_command
from graf.app.run_arguments import add_trust_argument

#: of a run that was stopped by a signal or training.max_minutes and has saved: EX_TEMPFAIL of sysexits.h, which
#: schedulers take for "run me again"
EXIT_STOPPED = 75
#: of a trial of learning rates, which with fewer iterations would skip those that matter
LEAST_STEPS = 20


def main(arguments: Sequence[str] | None = None, program: str = "graf train") -> int:
    """Train; returns the exit code. program: how a person starts it, for messages."""
    started = time.monotonic()
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments, program)

    def command(errors: ErrorLog) -> int:
        from graf.config import load_config

        config = load_config(options.config, collect_overrides(options))
        if options.plan:
            from graf.app.memory_planner import print_plan

            print_plan(config)
            return 0
        if options.lr_range_test:
            from graf.app.learning_rates import find_rates

            find_rates(
                config, options.range_iterations, options.resume or "none", options.accept_new_data, options.trust
            )
            return 0
        from graf.app.training_run import train

        finished = train(
            config,
            options.resume or "auto",
            accept_new_data=options.accept_new_data,
            trust=options.trust,
            memory_snapshot=options.memory_snapshot,
            profile=options.profile,
            started=started,
            program=program,
            errors=errors,
        )
        # to torchrun every other code is a failure, after which it would start the processes again
        is_zero = finished or options.exit_zero_when_stopped or "TORCHELASTIC_RUN_ID" in os.environ
        return 0 if is_zero else EXIT_STOPPED

    trains = not (options.plan or options.lr_range_test)
    interrupted = "interrupted; nothing was written"
    if trains:
        interrupted = "interrupted before the step was finished; nothing was saved since the last checkpoint"
    return run_command(command, debug=options.debug, interrupted=interrupted, ends_on_sigterm=not trains)


def plan(arguments: Sequence[str]) -> int:
    """Predict what training needs of memory; returns the exit code."""
    return main(["--plan", *arguments], program="graf plan")


def parse_arguments(arguments: Sequence[str], program: str) -> argparse.Namespace:
    """The command line; flags are shorthands for configuration keys and win over the file."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Train a label-conditional generative radiance field.",
        epilog=f"Any key of the configuration can be overridden: {program} --config coil100 data.datadir=photos "
        "training.batch_size=2",
    )
    parser.add_argument(
        "--config", default="default", help="YAML file, or name of a shipped configuration (default: %(default)s)"
    )
    parser.add_argument(
        "--use_amp", action="store_const", const=True, help="mixed precision where the device gains from it"
    )
    parser.add_argument("--device", help="auto | cpu | cuda | cuda:1 | mps")
    parser.add_argument("--resume", help="auto: newest checkpoint of the run (default); none: afresh; or a file")
    add_trust_argument(parser)
    parser.add_argument(
        "--accept_new_data", action="store_true", help="go on though photographs were added, removed or labelled anew"
    )
    parser.add_argument("--outdir", help="folder of all runs; this one is written to OUTDIR/expname")
    parser.add_argument("--max_iterations", type=int, help="length of the run and of its schedules")
    parser.add_argument("--max_minutes", type=float, help="stop and save after so many minutes")
    parser.add_argument("--seed", type=int, help="seed of every random number")
    parser.add_argument(
        "--memory_snapshot", action="store_true", help="CUDA: write the allocator's history for its viewer"
    )
    parser.add_argument(
        "--profile",
        type=_at_least(1),
        metavar="N",
        help="record N steps: a trace in the run folder, and where their time went in the log; training goes on",
    )
    parser.add_argument(
        "--exit_zero_when_stopped",
        action="store_true",
        help=f"a run that was asked to stop, and has saved, exits with 0 instead of {EXIT_STOPPED}",
    )
    parser.add_argument("--plan", action="store_true", help="predict memory, print what fits and exit; needs no data")
    parser.add_argument(
        "--lr_range_test",
        action="store_true",
        help="suggest learning rates by short trials of each player, afresh unless --resume is given; trains no run",
    )
    parser.add_argument(
        "--range_iterations",
        type=_at_least(LEAST_STEPS),
        default=100,
        help="of every such trial (default: %(default)s)",
    )
    parser.add_argument("--memory_budget", help="training.memory_budget: auto, or an amount such as 8GiB")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any key of the configuration")
    options = parser.parse_intermixed_args(arguments)  # keys may stand between flags
    _refuse_useless(parser, options)
    return options


def _refuse_useless(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a message where somebody would wait in vain for what an option writes."""
    instead = "plan" if options.plan else "lr_range_test" if options.lr_range_test else None
    for name in ("profile", "memory_snapshot", "lr_range_test"):
        if instead not in (None, name) and getattr(options, name):
            parser.error(f"--{name}: does nothing beside --{instead}, which trains no run")


def _at_least(least: int) -> Callable[[str], int]:
    """Reads a whole number that is not smaller."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least {least}")
        return int(text)

    return read


def collect_overrides(options: argparse.Namespace) -> list[str]:
    """The flags as overrides of configuration keys, before the explicit ones.

    Their values are written as JSON, which is YAML: a folder `runs #2`, or 2024, is a text to the shell too.
    """
    flags = ("device", "outdir", "max_iterations", "max_minutes", "memory_budget", "use_amp")
    values = {f"training.{flag}": getattr(options, flag) for flag in flags} | {"seed": options.seed}
    given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value is not None]
    return given + list(options.overrides)
