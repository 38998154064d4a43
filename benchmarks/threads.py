"""Threads and loader workers: images/s of the default configuration's step, and of loading alone, for each number.

Photographs are in memory, as by default, where no worker is needed, or decoded when they are asked for. More threads
than there are cores is what torch starts in a container whose quota it does not see. All combinations are measured in
turn, several times over, and the fastest pass of each counts; what matters are the ratios.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.results import RESULTS, format_table, hardware, write_section
from graf.app import builders
from graf.config import Config, load_config
from graf.data.datasets import PhotoDataset
from graf.runtime.amp import choose_precision
from graf.runtime.device import configure_backends, pick_device
from graf.runtime.memory import prepare_allocator
from graf.runtime.threads import count_usable_cpus
from graf.training.trainer import Trainer

#: as many as a process's cores at most
WORKERS = (0, 1, 2, 4)
#: data.cache_mib: where the photographs are
PLACES = {"in memory": 512, "in files": 0}
ROUNDS, STEPS, LOADED = 2, 5, 60
#: the default's step as it is after iteration 400, on fewer photographs, which load alike
KEYS = ("data.synthetic.count=288", "ccsr.start_iteration=0", "training.use_amp=true")


def build(config: Config, photographs: PhotoDataset, device: torch.device) -> Trainer:
    """The trainer of a configuration."""
    info = builders.describe_dataset(config, photographs)
    sampler = builders.build_pose_sampler(config, photographs, builders.build_cameras(config, info))
    precision = choose_precision(config.training.use_amp, config.training.amp_dtype, device)
    return builders.build_trainer(config, info, sampler, precision, device)


def measure(trainer: Trainer | None, batches: Iterator[tuple[Tensor, Tensor, int]], count: int) -> float:
    """Images per second of so many batches, trained on where there is a trainer."""
    number, started = 0, time.perf_counter()
    for _ in range(count):
        images, labels, size = next(batches)
        if trainer is not None:
            trainer.step(images, labels, size)
        number += len(images)
    return number / (time.perf_counter() - started)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cpu", help="where is trained, as training.device (default: %(default)s)")
    options = parser.parse_args(arguments)
    device, cores = pick_device(options.device), count_usable_cpus()
    prepare_allocator()
    configure_backends(device)
    cases = [("in memory", 0), *(("in files", workers) for workers in WORKERS if workers <= cores)]
    speeds: dict[tuple[str, int, int], float] = {}
    loading: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"data.datadir={folder}", *KEYS]
        photographs = {
            place: builders.open_photographs(load_config("default", [*keys, f"data.cache_mib={cache}"]))
            for place, cache in PLACES.items()
        }
        trainer = build(load_config("default", keys), photographs["in memory"], device)
        for _, (place, workers) in product(range(ROUNDS), cases):
            config = load_config("default", [*keys, f"training.nworkers={workers}"])
            with builders.open_batches(config, photographs[place], 0, device) as batches:
                measure(None, batches, 2)  # workers have started
                for threads in (1, cores, 2 * cores) if place == "in memory" else (1, cores):
                    torch.set_num_threads(threads)
                    measure(trainer, batches, 1)
                    key = place, workers, threads
                    speeds[key] = max(measure(trainer, batches, STEPS), speeds.get(key, 0.0))
                speed = measure(None, batches, LOADED)
                loading[place, workers] = max(speed, loading.get((place, workers), 0.0))
    unit = speeds["in memory", 0, cores]
    counts = sorted({threads for _, _, threads in speeds})
    header = ["photographs", "workers", *(f"{count} thread{'s' * (count > 1)}" for count in counts), "loading alone"]
    rows = [
        [
            place,
            str(workers),
            *(f"{speeds[key] / unit:.2f}" if (key := (place, workers, count)) in speeds else "" for count in counts),
            f"{loading[place, workers] / unit:.0f}",
        ]
        for place, workers in cases
    ]
    text = (
        f"{hardware(device)}, {cores} usable cores. Images/s, as multiples of those of training with {cores} threads "
        f"and photographs in memory ({unit:.1f} images/s); the fastest of {ROUNDS} passes of {STEPS} steps, "
        f"with super-resolution in every second one.\n\n{format_table(header, rows)}"
    )
    command = "python -m benchmarks.threads" + ("" if options.device == "cpu" else f" --device {options.device}")
    write_section("Threads and workers", command, text, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
