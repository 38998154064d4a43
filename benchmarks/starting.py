"""Seconds from a command to what it is for: help, a plan, the first step of the default configuration; and their parts.

Every command runs in a process of its own, several times, of which the fastest counts. The default's toys are drawn
before, once: they are a minute's work, which only the first run on a machine has.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

#: name -> the arguments of `graf`; of a training the first step is waited for
COMMANDS = {
    "graf --help": ["--help"],
    "graf train --help": ["train", "--help"],
    "graf plan --config default": ["plan", "--config", "default"],
    "graf train --config default": ["train", "--config", "default"],
    "graf train --config default --memory_budget 1GiB": ["train", "--config", "default", "--memory_budget", "1GiB"],
}
#: part of the time -> the functions in which it passes; one that is called by another one of them counts for that one
PARTS = {
    "planning": ("graf.app.memory_planner:describe_plans", "graf.app.training_run:choose_for_budget"),
    "photographs": ("graf.app.builders:open_photographs",),
    "networks": ("graf.app.builders:build_trainer",),
    "first step": ("graf.training.trainer:Trainer.step",),
}
REPEATS = 3


class Stopwatch:
    """Seconds of the named parts of a program, of which the outermost one counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.is_running = False

    def time(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose seconds are added to a part."""

        @wraps(work)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            if self.is_running:
                return work(*arguments, **keywords)
            started, self.is_running = time.perf_counter(), True
            try:
                return work(*arguments, **keywords)
            finally:
                self.is_running = False
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

        return timed


def run_command(arguments: Sequence[str], report: Path) -> None:
    """Run `graf` in this process, which ends with the first step; writes the seconds of the parts."""
    watch, started = Stopwatch(), time.perf_counter()
    if "--help" not in arguments:
        import graf.app.training_run  # noqa: F401  all that a command imports

        watch.seconds["imports"] = time.perf_counter() - started
        _time_parts(watch, report)
    from graf.app.command_line import main

    try:
        sys.exit(main(arguments))
    finally:
        report.write_text(json.dumps(watch.seconds))


def _time_parts(watch: Stopwatch, report: Path) -> None:
    import pkgutil

    def end_after(step: Callable[..., Any]) -> Callable[..., Any]:
        def last(*arguments: Any, **keywords: Any) -> Any:
            if watch.is_running:  # the planner rehearses steps
                return step(*arguments, **keywords)
            step(*arguments, **keywords)
            report.write_text(json.dumps(watch.seconds))
            os._exit(0)  # nothing is saved and no worker waited for

        return last

    for part, places in PARTS.items():
        for place in places:
            owner, _, name = place.replace(":", ".").rpartition(".")
            parent = pkgutil.resolve_name(owner)
            timed = watch.time(part, getattr(parent, name))
            setattr(parent, name, end_after(timed) if part == "first step" else timed)


def measure(arguments: Sequence[str], folder: Path) -> dict[str, float]:
    """Seconds of a command in a process of its own: "all", "CPU" and its parts."""
    report, before, started = folder / "seconds.json", os.times(), time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.starting", "--report", str(report), "--", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    seconds, after = time.perf_counter() - started, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    parts = json.loads(report.read_text())
    return {"all": seconds, "CPU": used, **parts, "rest": seconds - sum(parts.values())}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="file whose section is replaced")
    parser.add_argument("--datadir", type=Path, help="folder in which the default's toys are, or will be")
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.report is not None:
        run_command(options.command, options.report)

    import torch

    from benchmarks.results import RESULTS, format_table, hardware, write_section
    from graf.app import builders
    from graf.config import load_config
    from graf.runtime.threads import count_usable_cpus

    columns = ["all", "CPU", "imports", *PARTS, "rest"]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = options.datadir or folder / "data"
        builders.open_photographs(load_config("default", [f"data.datadir={data}"]))
        for name, command in COMMANDS.items():
            keys = [f"data.datadir={data}", "--outdir", str(folder), "--device", "cpu", "--resume", "none"]
            given = command if "train" not in command or "--help" in command else [*command, *keys]
            found = min((measure(given, folder) for _ in range(REPEATS)), key=lambda seconds: seconds["all"])
            rows.append([f"`{name}`", *(f"{found[column]:.2f}" if column in found else "" for column in columns)])
    text = (
        f"{hardware(torch.device('cpu'))}, {count_usable_cpus()} usable cores. Seconds; the fastest of {REPEATS} runs, "
        f"a training up to the end of its first step.\n\n{format_table(['command', *columns], rows)}"
    )
    write_section("Starting", "python -m benchmarks.starting", text, options.results or RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
