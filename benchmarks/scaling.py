"""What it costs to train in several processes: measured here with one and two, and a model for many GPUs.

`python -m benchmarks.scaling` trains a few steps of a configuration on random photographs, in one process and in two,
each with one thread, and in two that do not know of each other, which is what the machine can give at most. The model
for GPUs adds up step time = compute / N + latency + bytes / bandwidth for stated links.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.plots import draw_curves
from benchmarks.results import RESULTS, format_table, hardware, write_section
from benchmarks.roofline import WorkMeter
from graf.app import builders
from graf.app.memory_estimator import imagine_dataset
from graf.config import Config, load_config
from graf.geometry.views import PoseSampler
from graf.runtime import distributed
from graf.runtime.amp import Precision
from graf.runtime.device import configure_backends
from graf.runtime.distributed import JoinedProcesses, Launch, Processes
from graf.training.trainer import Trainer

CPU = torch.device("cpu")
CONFIGS = ("default", "toys")
#: steps that are not counted, and turns of one, two and two separate processes, of which the median is taken
WARM_UP, TURNS = 2, 3
MIB = 2**20
BUCKETS = (1, 4, 16, 64)  # MiB


@dataclass(frozen=True)
class Link:
    """What connects GPUs: bytes per second that an all-reduce reaches in one direction, and seconds for each of its
    steps."""

    name: str
    bandwidth: float
    latency: float


#: sustained, not nominal, rates: about three quarters of what is printed on the box
LINKS = (
    Link("NVLink 4 (300 GB/s)", 300e9, 8e-6),
    Link("PCIe 4 x16 (20 GB/s)", 20e9, 12e-6),
    Link("InfiniBand NDR (40 GB/s)", 40e9, 15e-6),
    Link("100 Gb Ethernet (10 GB/s)", 10e9, 30e-6),
    Link("10 Gb Ethernet (1 GB/s)", 1e9, 50e-6),
)
GPUS = (2, 4, 8, 16, 32, 64, 128, 256)
#: floating-point operations per second that a GPU is taken to sustain on these small layers, launches included
SUSTAINED = 5e12
#: seconds of one exchange between hosts over TCP, which agreements on the CPU take log2(N) of, there and back
AGREEMENT_LATENCY = 30e-6


# ---------------------------------------------------------------- measured


class Meter:
    """Seconds that a process spends in messages, their bytes and their number."""

    def __init__(self, processes: Processes) -> None:
        self.seconds, self.bytes, self.messages = 0.0, 0, 0
        if isinstance(processes, JoinedProcesses):
            self._connected, self._sum = processes._connected, processes._sum
            processes._connected = self._time  # type: ignore[method-assign]
            processes._sum = self._count  # type: ignore[method-assign]

    @contextmanager
    def _time(self, *messages: Tensor) -> Iterator[None]:
        started = time.perf_counter()
        with self._connected(*messages):
            yield
        self.seconds += time.perf_counter() - started
        self.messages += 1

    def _count(self, flat: Tensor) -> None:
        self.bytes += flat.numel() * flat.element_size()
        self._sum(flat)

    def reset(self) -> None:
        """Begin anew."""
        self.seconds, self.bytes, self.messages = 0.0, 0, 0


def build(name: str, processes: Processes) -> tuple[Config, Trainer]:
    """The trainer of a shipped configuration without its photographs."""
    config = load_config(name, ["training.use_amp=false", "training.sync_check_every=0", "ccsr.start_iteration=0"])
    info = imagine_dataset(config)
    labels = torch.tensor([(number % len(info.class_names), 0, 15 * number, -1) for number in range(48)])
    cameras = builders.build_cameras(config, info)
    sampler = PoseSampler(labels, cameras)
    trainer = builders.build_trainer(config, info, sampler, Precision("cpu", None), CPU, False, processes)
    return config, trainer


def draw_batch(config: Config, trainer: Trainer, processes: Processes) -> tuple[Tensor, Tensor, int]:
    """A process's share of a batch of noise."""
    size = config.training.batch_size
    labels = trainer.inputs.pose_sampler.views.labels[:size]
    images = torch.rand(size, 3, config.photo_size, config.photo_size, generator=torch.Generator().manual_seed(0))
    rows = processes.share(size)
    return images[rows.start : rows.stop] * 2 - 1, labels[rows.start : rows.stop], size


def work(name: str, processes: Processes, steps: int) -> dict[str, float]:
    """Train for some steps; seconds of the median step, and what messages took of all of them."""
    torch.set_num_threads(1)
    configure_backends(CPU)
    config, trainer = build(name, processes)
    batch, meter = draw_batch(config, trainer, processes), Meter(processes)
    seconds = []
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            meter.reset()
        started = time.perf_counter()
        trainer.step(*batch)
        seconds.append(time.perf_counter() - started)
    own = seconds[WARM_UP:]
    return {
        "seconds": statistics.median(own),
        "share": meter.seconds / sum(own),
        "bytes": meter.bytes / steps,
        "messages": meter.messages / steps,
    }


def measure_messages(processes: Processes) -> dict[str, float]:
    """Seconds of an agreement, and of summing 64 MiB in buckets of so many MiB, between processes that wait."""
    torch.set_num_threads(1)
    assert isinstance(processes, JoinedProcesses)
    found = {}
    flat = torch.ones(64 * MIB // 4)
    for size in BUCKETS:
        distributed.BUCKET = size * MIB
        found[f"{size} MiB"] = _fastest(lambda: processes._sum(flat), 5)
    found["agreement"] = _fastest(lambda: [processes.any(False) for _ in range(100)], 5) / 100
    return found


def _fastest(call: Any, times: int) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def start(size: int, task: str, steps: int, folder: Path) -> list[subprocess.Popen[bytes]]:
    """`size` processes that are joined and do a task, whose results the first one writes down."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(size):
        own = {key: str(value) for key, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        file = folder / f"{port}.json"
        command = [sys.executable, "-m", "benchmarks.scaling", "--work", task, "--steps", str(steps), "--to", str(file)]
        started.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **own}))
    return started


def run(size: int, groups: int, task: str, steps: int) -> list[dict[str, float]]:
    """What the first process of each of several groups has found."""
    with tempfile.TemporaryDirectory() as folder:
        started = [process for _ in range(groups) for process in start(size, task, steps, Path(folder))]
        for process in started:
            if process.wait():
                raise SystemExit(f"a process of {task} ended with {process.returncode}")
        return [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]


def measure(name: str, steps: int) -> list[list[str]]:
    """Rows for one process, two separate and two joined ones."""
    batch = load_config(name).training.batch_size
    kinds = {"1": (1, 1), "2, separate": (1, 2), "2": (2, 1)}
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(TURNS):
        for kind, (size, groups) in kinds.items():
            results = run(size, groups, name, steps)
            # separate ones take whole batches each
            rates = [groups * batch / result["seconds"] for result in results]
            found[kind].append({**results[0], "rate": statistics.mean(rates)})
    rows, alone = [], statistics.median(turn["rate"] for turn in found["1"])
    for kind, turns in found.items():
        middle = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        rows.append(
            [
                name,
                kind,
                f"{middle['rate']:.2f}",
                f"{middle['rate'] / alone:.2f}",
                f"{middle['share']:.1%}" if kind == "2" else "-",
                f"{middle['bytes'] / MIB:.2f}" if kind == "2" else "-",
                f"{middle['messages']:.1f}" if kind == "2" else "-",
            ]
        )
    return rows


# ---------------------------------------------------------------- modelled


@dataclass(frozen=True)
class StepCost:
    """What a configuration's step takes: operations per image, bytes of gradients, sums and agreements per step."""

    name: str
    operations: float
    bytes: float
    sums: float
    agreements: float


def count(name: str) -> StepCost:
    """Count them over four steps, in which everything that is due now and then is due."""
    config, trainer = build(name, Processes())
    batch = draw_batch(config, trainer, Processes())
    applied = [0]
    original = Processes.sum_gradients

    def note(processes: Processes, parameters: Any, terms: Any) -> dict[str, Tensor]:
        applied[0] += 1
        size[0] += sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        return {}

    size = [0]
    Processes.sum_gradients = note  # type: ignore[method-assign, assignment]
    try:
        with WorkMeter() as meter:
            for _ in range(4):
                trainer.step(*batch)
    finally:
        Processes.sum_gradients = original  # type: ignore[method-assign]
    operations = sum(meter.operations.values()) / 4 / config.training.batch_size
    # each sum follows two agreements, on its phase and on which gradients there are; between steps there are three
    # more, on signals, on saving and on the next photographs
    return StepCost(name, operations, size[0] / 4, applied[0] / 4, 2 * applied[0] / 4 + 3)


def communication(cost: StepCost, link: Link, gpus: int) -> float:
    """Seconds of messages in a step: ring all-reduces of the gradients, and agreements of the hosts."""
    ring = 2 * (gpus - 1) / gpus * cost.bytes / link.bandwidth + cost.sums * 2 * math.log2(gpus) * link.latency
    return ring + cost.agreements * 2 * math.log2(gpus) * AGREEMENT_LATENCY


def smallest_batch(cost: StepCost, link: Link, gpus: int, share: float = 0.1) -> float:
    """Images on each GPU from which on messages take less than a share of the step."""
    return communication(cost, link, gpus) * (1 - share) / share / (cost.operations / SUSTAINED)


def model_table(costs: Sequence[StepCost]) -> str:
    """Images on each GPU at which messages take a tenth of the step."""
    rows = [
        [cost.name, link.name, *(f"{math.ceil(smallest_batch(cost, link, gpus)):,}" for gpus in GPUS)]
        for cost in costs
        for link in LINKS
    ]
    return format_table(["configuration", "link", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the section and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=6, help="steps of a turn (default: %(default)s)")
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), help="shipped configurations")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        processes = Launch.read(os.environ).join("cpu", 600)
        if options.work == "messages":
            found = measure_messages(processes)
        else:
            found = work(options.work, processes, options.steps)
        if processes.is_first:
            options.to.write_text(json.dumps(found))
        processes.close()
        return 0
    rows = [row for name in options.configs for row in measure(name, options.steps)]
    messages = run(2, 1, "messages", options.steps)[0]
    costs = [count(name) for name in options.configs]
    write(options, rows, messages, costs)
    return 0


def write(
    options: argparse.Namespace, rows: list[list[str]], messages: dict[str, float], costs: list[StepCost]
) -> None:
    """The section of RESULTS.md, and the plot beside it."""
    header = ["configuration", "processes", "images/s", "of one", "in messages", "MiB a step", "messages a step"]
    plot = options.results.parent / "scaling.png"
    lines = {
        f"{cost.name}, {link.name.split(' (')[0]}": [(gpus, smallest_batch(cost, link, gpus)) for gpus in GPUS]
        for cost in costs[:1]
        for link in LINKS
    }
    draw_curves(lines, plot, "images on each GPU at which messages take 10% of a step", "GPUs")
    facts = [
        [c.name, f"{c.operations / 1e9:.1f}", f"{c.bytes / MIB:.1f}", f"{c.sums:.1f}", f"{c.agreements:.1f}"]
        for c in costs
    ]
    sums = ", ".join(f"{1000 * messages[f'{size} MiB']:.0f} ms in buckets of {size} MiB" for size in BUCKETS)
    text = (
        f"{hardware(CPU)}. One thread each, float32, the batch of the configuration; the median of {TURNS} turns of "
        f"{options.steps} steps. Two separate processes train on a batch each and know nothing of each other: "
        f"the machine cannot give more. Time in messages includes waiting for the other process.\n\n"
        f"{format_table(header, rows)}\n\n"
        f"An agreement takes {1e6 * messages['agreement']:.0f} microseconds between two processes here; 64 MiB of "
        f"gradients are summed in {sums}.\n\n"
        f"What a step sends, counted:\n\n"
        f"{format_table(['configuration', 'GFLOP an image', 'MiB a step', 'sums', 'agreements'], facts)}\n\n"
        f"Model, not measured: step time = compute / N + latency + bytes / bandwidth, with rings of 2 (N - 1) / N "
        f"times the bytes, 2 log2 N steps of latency, a GPU that sustains {SUSTAINED / 1e12:.0f} TFLOP/s, and hosts "
        f"that agree in {1e6 * AGREEMENT_LATENCY:.0f} microseconds an exchange. Images on each GPU at which messages "
        f"take a tenth of a step:\n\n{model_table(costs)}\n\n"
        f"![images on each GPU at which messages take 10% of a step, modelled]({plot.name})\n"
    )
    write_section("Several processes", "python -m benchmarks.scaling", text, options.results)


if __name__ == "__main__":
    sys.exit(main())
