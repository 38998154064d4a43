"""What it costs that nothing is lost: seconds of a checkpoint with and without its seal, and of holding the lock.

Training a run for `training.save_every` seconds stands beside one save; the lock's thread works in every tenth second.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.results import RESULTS, format_table, hardware, write_section
from graf.app import builders
from graf.app.memory_estimator import imagine_dataset
from graf.base.files import replace_file
from graf.config import load_config
from graf.geometry.views import PoseSampler
from graf.runtime.amp import Precision
from graf.runtime.checkpoint import read_checkpoint, save_checkpoint
from graf.runtime.run_lock import RENEW_EVERY, RunLock

CONFIGS = ("toys", "default", "carla")
REPEATS = 7


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def measure(name: str, folder: Path) -> list[str]:
    """A row: a configuration, its checkpoint's MiB, seconds of a save without and with its seal, of reading it."""
    config = load_config(name)
    info = imagine_dataset(config)
    labels = torch.tensor([(number, 0, 0, -1) for number in range(len(info.class_names))])
    sampler = PoseSampler(labels, builders.build_cameras(config, info))
    trainer = builders.build_trainer(
        config, info, sampler, Precision("cpu", None), torch.device("cpu"), pretrained=False
    )
    for player in trainer.players:  # optimisers have their states after a step
        for parameter in player.parameters:
            parameter.grad = torch.zeros_like(parameter)
        player.optimizer.step()
    state, file = trainer.state, folder / "model.pt"
    contents = {"objects": {key: value.state_dict() for key, value in state.items()}}

    def save_plainly() -> None:
        with replace_file(file) as stream:
            torch.save(contents, stream)

    plain, sealed = fastest(save_plainly), fastest(lambda: save_checkpoint(file, state, {"iteration": 1}))
    reading, size = fastest(lambda: read_checkpoint(file)), file.stat().st_size / 2**20
    share = (sealed - plain) / config.training.save_every
    return [name, f"{size:.1f}", f"{plain:.3f}", f"{sealed:.3f}", f"{reading:.3f}", f"{100 * share:.4f}%"]


def measure_lock(folder: Path) -> float:
    """Seconds of one sign of life."""
    with RunLock(folder / "run") as lock:
        return fastest(lambda: lock.file.touch())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, Path(folder)) for name in CONFIGS]
        lock = measure_lock(Path(folder))
    header = ["configuration", "MiB", "s to save, no seal", "with its seal", "s to read and check", "of training"]
    text = (
        f"{hardware()}; the fastest of {REPEATS}. The last column is what seals take of the time between two saves. "
        f"The lock's sign of life takes {1e6 * lock:.0f} microseconds in every {RENEW_EVERY:.0f} seconds.\n\n"
        f"{format_table(header, rows)}"
    )
    write_section("What saving costs", "python -m benchmarks.saving", text, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
