"""Threads and loader workers: images/s of the default configuration's step, and of loading alone, for each number.

More threads than there are cores is what torch starts in a container whose quota it does not see. All combinations are
measured in turn, several times over, and the fastest pass of each counts; what matters are the ratios.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.results import RESULTS, format_table, hardware, write_section
from graf.app import builders
from graf.config import Config, load_config
from graf.data.datasets import PhotoDataset
from graf.data.loader import Batches, make_loader
from graf.runtime.amp import choose_precision
from graf.runtime.device import configure_backends
from graf.runtime.threads import count_usable_cpus
from graf.training.trainer import Trainer

CPU = torch.device("cpu")
WORKERS = (0, 1, 2)
ROUNDS, STEPS, LOADED = 3, 6, 80
#: the default's step as it is after iteration 800, on fewer photographs, which load alike
KEYS = ("data.synthetic.count=288", "ccsr.start_iteration=0", "training.use_amp=true")


def build(config: Config, photographs: PhotoDataset) -> Trainer:
    """The trainer of a configuration on the CPU."""
    info = builders.describe_dataset(config, photographs)
    sampler = builders.build_pose_sampler(config, photographs, builders.build_cameras(config, info))
    precision = choose_precision(config.training.use_amp, config.training.amp_dtype, CPU)
    return builders.build_trainer(config, info, sampler, precision, CPU)


def measure(trainer: Trainer | None, batches: Batches, count: int) -> float:
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
    options = parser.parse_args(arguments)
    configure_backends(CPU)
    cores = count_usable_cpus()
    threads = (1, cores, 2 * cores) if cores > 1 else (1, 2)
    training: dict[tuple[int, int], float] = {}
    loading: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("default", [f"data.datadir={folder}", *KEYS])
        photographs = builders.open_photographs(config)
        trainer = build(config, photographs)
        for _ in range(ROUNDS):
            for workers in WORKERS:
                loader = make_loader(
                    photographs, config.training.batch_size, nworkers=workers, drop_last=True, seed=0, processes=1
                )
                loader.num_workers = workers  # also where there are not so many cores
                with Batches(loader) as batches:
                    measure(None, batches, 2)  # workers have started
                    for count in threads:
                        torch.set_num_threads(count)
                        measure(trainer, batches, 2)
                        speed = measure(trainer, batches, STEPS)
                        training[workers, count] = max(speed, training.get((workers, count), 0.0))
                    torch.set_num_threads(1)
                    loading[workers] = max(measure(None, batches, LOADED), loading.get(workers, 0.0))
    unit = training[0, cores]
    header = ["workers", *(f"{count} thread{'s' * (count > 1)}" for count in threads), "loading alone, images/s"]
    rows = [
        [str(workers), *(f"{training[workers, count] / unit:.2f}" for count in threads), f"{loading[workers]:.0f}"]
        for workers in WORKERS
    ]
    text = (
        f"{hardware(CPU)}, {cores} usable cores. Images/s of training, as a share of those with {cores} threads and no "
        f"worker ({unit:.1f} images/s); the fastest of {ROUNDS} passes of {STEPS} steps with super-resolution in every "
        f"second one.\n\n{format_table(header, rows)}"
    )
    write_section("Threads and workers", "python -m benchmarks.threads", text, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
