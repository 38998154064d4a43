"""Are memory budgets kept on a GPU? `python -m benchmarks.reserved_memory` writes a section of RESULTS.md.

Budgets between the smallest and the largest need of a configuration are given to runs of train.py, each in a process of
its own. What counts is what CUDA's allocator reserves, which other programs on the card cannot have.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality import GRAF
from benchmarks.results import RESULTS, format_table, hardware, write_section
from graf.app.memory_estimator import MemorySettings, StepPlanner
from graf.app.memory_planner import candidate_settings, with_margin
from graf.config import load_config
from graf.runtime.device import pick_device
from graf.runtime.memory import MIB, read_usable_memory

ROOT = Path(__file__).resolve().parents[1]
#: shipped configuration and keys on top of it
CONFIGS: dict[str, tuple[str, ...]] = {
    "GRAF as published, on the toys": ("toys.yaml", *GRAF),
    "toys": ("toys.yaml",),
    "toys, super-resolution": ("toys_sr.yaml", "ccsr.start_iteration=0"),
}
ALWAYS = ("training.use_amp=true", "training.fid_every=0", "training.max_iterations=3", "training.print_every=1")


@dataclass(frozen=True)
class Trial:
    """A budget, what was chosen for it, and the most that the allocator had reserved, MiB; 0 where the run failed."""

    name: str
    budget: float
    chosen: str
    reserved: float


def choose_budgets(keys: Sequence[str], count: int) -> list[int]:
    """`count` budgets, MiB, between the smallest and the largest need of a configuration, as far as they are there."""
    file, *overrides = keys
    config = load_config(file, [*overrides, *ALWAYS])
    planner, batch = StepPlanner(config, device_type="cuda"), config.training.batch_size
    smallest = min(settings.chunk for settings in candidate_settings(config, "cuda"))
    needs = [MemorySettings(1, "checkpoint", smallest), MemorySettings(batch, "dense", 4096)]
    low, high = (with_margin(planner.predict(settings).peak, "cuda") / MIB for settings in needs)
    usable = read_usable_memory(pick_device("cuda"))
    budgets = [round(1.02 * low * (high / low) ** (index / max(count - 1, 1))) for index in range(count)]
    return [budget for budget in budgets if usable is None or budget * MIB <= usable]


def run(name: str, keys: Sequence[str], budget: int, data: Path) -> Trial:
    """Three iterations of train.py with a budget; the peaks are those that the run itself logs."""
    file, *overrides = keys
    with tempfile.TemporaryDirectory() as folder:
        command = ["train.py", "--config", file, "--outdir", folder, "--device", "cuda"]
        command += ["--memory_budget", f"{budget}MiB", *overrides, *ALWAYS, f"data.datadir={data}", "expname=run"]
        result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        output = result.stdout + result.stderr
        if result.returncode:
            return Trial(name, budget, f"failed: {output.strip().splitlines()[-1]}", 0)
        chosen = next(line for line in output.splitlines() if "memory: " in line).split("memory: ")[1].split(",")[0]
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    reserved = max(value for line in lines for key, value in line.items() if key.endswith("_peak_reserved"))
    return Trial(name, budget, chosen, reserved)


def write(trials: Sequence[Trial], results: Path) -> None:
    """The section, as far as it has been measured."""
    rows = [[t.name, f"{t.budget:,}", t.chosen, f"{t.reserved:,.0f}", f"{t.reserved / t.budget:.0%}"] for t in trials]
    kept = sum(0 < trial.reserved <= trial.budget for trial in trials)
    header = ["configuration", "budget, MiB", "chosen", "reserved at most, MiB", "share"]
    text = (
        f"{hardware(pick_device('cuda'))}. `training.memory_budget` of runs of train.py against the peak of what "
        f"CUDA's allocator reserves: {kept} of {len(trials)} kept.\n\n{format_table(header, rows)}"
    )
    write_section("Memory budgets on a GPU", "python -m benchmarks.reserved_memory", text, results)


def main(arguments: Sequence[str] | None = None) -> int:
    """Try all budgets; the section is written after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file whose section is replaced")
    parser.add_argument("--count", type=int, default=3, help="budgets of each configuration (default: %(default)s)")
    options = parser.parse_args(arguments)
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, keys in CONFIGS.items():
            for budget in choose_budgets(keys, options.count):
                trials.append(run(name, keys, budget, Path(folder) / "data"))
                print(trials[-1], flush=True)
                write(trials, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
