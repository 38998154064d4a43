"""What memory costs and what saves it: `python -m benchmarks.memory` writes its section of RESULTS.md and a curve.

One table: the peak of live tensors and the time of a training step, for the plain loop as GRAF published it and for
each measure alone and together, at three patch sizes; predictions of the planner stand beside what was measured and
alone, marked with *, where a step would not fit or would last minutes. Then predictions against measurements over many
configurations, and budgets against what real steps used of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train as train_program
from benchmarks.plots import draw_curves
from benchmarks.published_loop import PlainLoop, published
from benchmarks.results import RESULTS, format_table, hardware, write_section
from graf.app import builders
from graf.app.memory_estimator import Plan, StepPlanner, imagine_dataset
from graf.app.memory_planner import GIB, USABLE_SHARE, BudgetError, candidate_settings, choose_settings
from graf.app.rehearsal import PhaseRecorder
from graf.config import CONFIG_FOLDER, Config, load_config
from graf.geometry.views import PoseSampler
from graf.runtime.amp import Precision, choose_precision
from graf.runtime.live_tensors import LiveTensorMeter
from graf.runtime.memory import MIB, OutOfMemory
from graf.runtime.memory_settings import MemorySettings
from graf.training.trainer import Trainer

CPU = torch.device("cpu")
CURVE = RESULTS.parent / "memory.png"
#: steps that would hold more than this many MiB, or render more than this many rays, are only predicted
LARGEST_MIB, LARGEST_RAYS = 9_000, 8_192
SMALL = ("nerf.netwidth=64", "nerf.netdepth=4", "nerf.N_samples=16", "training.fid_every=0")
#: gives every point some density; of others a step may need less than is predicted, since it leaves them out
EVERY_POINT = ("nerf.density_bias=20", "nerf.bounding_radius=10")
TRIPLANE = ("nerf.field=triplane", "training.match_views=true", "training.photometric=20", "training.opacity=0.1")
#: with the term that takes renders of neighbouring views
SUPER_RESOLUTION = ("ccsr.enabled=true", "ccsr.agreement=0.3")
#: predicted against measured: name -> keys on top of smoke.yaml, SMALL and EVERY_POINT
CONFIGS = {
    "dense": (),
    "dense, 8 chunks": ("training.chunk=64",),
    "checkpoint": ("training.memory_strategy=checkpoint", "training.chunk=64"),
    "deferred": ("training.memory_strategy=deferred", "training.chunk=64"),
    "no R1": ("training.reg_type=none", "training.batch_size=8"),
    "WGAN-GP": ("training.gan_type=wgan", "training.reg_type=wgangp"),
    "6 images in parts of 1": ("training.micro_batch_size=1", "training.batch_size=6"),
    "parts of 3, checkpoint": (
        "training.memory_strategy=checkpoint",
        "training.chunk=50",
        "training.micro_batch_size=3",
        "training.batch_size=8",
    ),
    "importance samples, parts of 2": (
        "training.micro_batch_size=2",
        "training.batch_size=6",
        "nerf.N_importance=8",
        "training.memory_strategy=checkpoint",
        "training.chunk=100",
    ),
    "sines": ("nerf.field=siren",),
    "sines, parts of 2, deferred": (
        "nerf.field=siren",
        "training.memory_strategy=deferred",
        "training.chunk=100",
        "training.micro_batch_size=2",
        "training.batch_size=6",
    ),
    "tri-planes": TRIPLANE,
    "tri-planes, parts of 2, deferred": (
        *TRIPLANE,
        "training.memory_strategy=deferred",
        "training.chunk=100",
        "training.micro_batch_size=2",
        "training.batch_size=6",
    ),
    "planes made of the code": (*TRIPLANE, "nerf.planes=synthesis"),
    "CCSR": SUPER_RESOLUTION,
    "CCSR, parts of 2, deferred": (
        *SUPER_RESOLUTION,
        "training.micro_batch_size=2",
        "training.batch_size=6",
        "training.memory_strategy=deferred",
        "training.chunk=64",
    ),
    "CCSR with RRDB and supervision, shared fakes": (
        *SUPER_RESOLUTION,
        "ccsr.trunk=rrdb",
        "ccsr.blocks=2",
        "ccsr.features=16",
        "ccsr.supervise_generator=1",
        "training.share_fakes=true",
        "training.batch_size=4",
        "training.memory_strategy=checkpoint",
        "training.chunk=128",
    ),
    "bfloat16": ("training.use_amp=true", "training.memory_strategy=checkpoint", "training.chunk=128"),
    "whole images of 256 x 256, narrow field": (
        "data.imsize=256",
        "ray_sampler.N_samples=65536",
        "nerf.netwidth=16",
        "nerf.netdepth=2",
        "training.memory_strategy=checkpoint",
        "training.chunk=1024",
    ),
    "Adam, spectral norm, class loss": (
        "discriminator.spectral_norm=true",
        "training.optimizer=adam",
        "discriminator.class_loss=1",
        "training.share_fakes=true",
    ),
}
#: configurations whose budgets are tried, as keys on top of smoke.yaml and SMALL
BUDGETED = {
    "batch 8": ("training.batch_size=8",),
    "batch 6, CCSR": ("training.batch_size=6", *SUPER_RESOLUTION),
    "batch 8, shared fakes, wide D": (
        "training.batch_size=8",
        "training.share_fakes=true",
        "discriminator.ndf=32",
        "training.optimizer=adam",
    ),
}
NUM_BUDGETS = 6
#: networks for whole images: keys on top of GRAF's published setting
NETWORKS = {"published": (), "narrow": ("nerf.netwidth=32", "nerf.netdepth=4", "discriminator.ndf=16")}
#: memory of cards, GiB, and what is trained on them: name -> patch side and keys on top of GRAF's published setting
CARDS = (4, 8, 12, 24)
CARD_TASKS = {
    "32 x 32 patches": (32, ("training.use_amp=true",)),
    "64 x 64 patches": (64, ("training.use_amp=true",)),
    "64 x 64, CCSR x 2": (64, ("training.use_amp=true", *SUPER_RESOLUTION, "data.imsize=128")),
    "whole 256 x 256": (256, ("training.use_amp=true",)),
}


@dataclass(frozen=True)
class Measured:
    """The phases of a real step and its seconds, of which the meter's share is small where a step lasts seconds."""

    plan: Plan
    seconds: float

    @property
    def peak(self) -> int:
        return self.plan.peak


# ---------------------------------------------------------------------------------------------------- the program


def measure_step(config: Config, settings: MemorySettings, warm_up: bool = True) -> Measured:
    """The peaks and the time of a real step with these settings.

    The optimisers' states exist by then: a first step makes them or, without `warm_up`, where one step takes long
    enough, an update with empty gradients.
    """
    gc.collect()
    with LiveTensorMeter() as meter:
        trainer = build_trainer(config, settings, CPU)
        trainer.profiler = recorder = PhaseRecorder(meter, trainer)
        if warm_up:
            step_with_everything(trainer)
        else:
            make_optimizer_states(trainer)
        recorder.phases.clear()
        recorder.outside = 0
        meter.reset_peak()
        started = time.perf_counter()
        step_with_everything(trainer)
        seconds = time.perf_counter() - started
        recorder.record("update", max(recorder.outside, meter.peak))
    return Measured(Plan(settings, recorder.phases), seconds)


def make_optimizer_states(trainer: Trainer) -> None:
    """Let every optimiser update once with gradients of zero."""
    for player in trainer.players:
        for parameter in player.parameters:
            parameter.grad = torch.zeros_like(parameter)
        player.optimizer.step()
        player.optimizer.zero_grad(set_to_none=True)


def build_trainer(config: Config, settings: MemorySettings, device: torch.device) -> Trainer:
    """A trainer with these settings and no photographs."""
    dataset_info = imagine_dataset(config)
    labels = torch.tensor([(number, 0, 0, -1) for number in range(len(dataset_info.class_names))])
    precision = Precision(device.type, torch.bfloat16 if config.training.use_amp else None)
    pose_sampler = PoseSampler(labels, builders.build_cameras(config, dataset_info))
    trainer = builders.build_trainer(config, dataset_info, pose_sampler, precision, device)
    trainer.use(settings)
    return trainer


def step_with_everything(trainer: Trainer) -> None:
    """Iteration 0, in which R1, CCSR and density noise all happen, on random images."""
    trainer.progress.iteration = 0
    side, batch_size = trainer.config.photo_size, trainer.config.training.batch_size
    images = torch.rand(batch_size, 3, side, side, device=trainer.device)
    labels = trainer.inputs.pose_sampler.views.labels
    trainer.step(images, labels[torch.arange(batch_size) % len(labels)].to(trainer.device))


def measure_on_gpu(step: Callable[[], float], device: torch.device) -> tuple[float, float] | None:
    """Peak bytes of CUDA's allocator and seconds of a second step, None where memory runs out.

    step: returns bytes of a peak that it has measured itself, or 0.
    """
    gc.collect()
    torch.cuda.empty_cache()
    try:
        step()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        own_peak = step()
        torch.cuda.synchronize(device)
    except (torch.cuda.OutOfMemoryError, OutOfMemory):
        return None
    return max(own_peak, float(torch.cuda.max_memory_allocated(device))), time.perf_counter() - started


def step_of_program(config: Config, settings: MemorySettings, device: torch.device) -> Callable[[], float]:
    """A step for :func:`measure_on_gpu`; its phases restart the peak, so it tells the largest."""
    trainer = build_trainer(config, settings, device)

    def step() -> float:
        step_with_everything(trainer)
        if trainer.memory != settings:
            raise OutOfMemory("these settings do not fit")
        return max(reading["peak"] for reading in trainer.profiler.readings.values()) * MIB

    return step


def step_of_plain_loop(config: Config, measures: Sequence[str], device: torch.device) -> Callable[[], float]:
    """The plain loop's step for :func:`measure_on_gpu`."""
    loop = PlainLoop(config, measures, device)

    def step() -> float:
        loop.step()
        return 0.0

    return step


# ---------------------------------------------------------------------------------------------------- the plain loop


def measure_plain(config: Config, measures: Sequence[str] = (), fake: bool = False) -> tuple[int, float]:
    """Peak bytes and seconds (NaN if fake) of the second step of the plain loop."""
    gc.collect()
    if fake:
        with FakeTensorMode(), LiveTensorMeter() as meter:
            return _run_plain(PlainLoop(config, measures), meter)[0], math.nan
    with LiveTensorMeter() as meter:
        return _run_plain(PlainLoop(config, measures), meter)


def _run_plain(loop: PlainLoop, meter: LiveTensorMeter) -> tuple[int, float]:
    loop.step()
    meter.reset_peak()
    started = time.perf_counter()
    loop.step()
    return meter.peak, time.perf_counter() - started


# ---------------------------------------------------------------------------------------------------- tables


def measure_measures(patches: Sequence[int], overrides: Sequence[str] = ()) -> list[list[str]]:
    """Rows of the table of measures: peak measured, predicted, share of the plain loop's, step time; the GPU's."""
    rows = []
    gpu = torch.device("cuda") if torch.cuda.is_available() else None
    for patch in patches:
        config = published(patch, *overrides)
        batch = config.training.batch_size
        amp = published(patch, "training.use_amp=true", *overrides)
        has_amp = choose_precision(True, "bfloat16", CPU).dtype is not None
        plain: tuple[int, float] | None = None
        for measures in ((), ("set_to_none",), ("released",), ("set_to_none", "released")):
            name = "plain loop" + "".join(f" + {measure}" for measure in measures)
            predicted, _ = measure_plain(config, measures, fake=True)
            measured = measure_plain(config, measures) if _runs(config, predicted) else None
            plain = (predicted, math.nan if measured is None else measured[1]) if plain is None else plain
            rows.append(_measure_row(patch, name, predicted, measured, plain))
            if gpu is not None:
                fits = predicted <= _gpu_bytes(gpu)
                rows[-1] += _gpu_cells(measure_on_gpu(step_of_plain_loop(config, measures, gpu), gpu) if fits else None)
        assert plain is not None
        cases = {
            "this program: codes and views not concatenated": (config, MemorySettings(batch, "dense", 4096)),
            "+ bfloat16": (amp, MemorySettings(batch, "dense", 4096)),
            "+ checkpoint, chunks of 1,024": (config, MemorySettings(batch, "checkpoint", 1024)),
            "+ deferred, chunks of 1,024": (config, MemorySettings(batch, "deferred", 1024)),
            "+ parts of 1 image": (config, MemorySettings(1, "dense", 4096)),
            "all: bfloat16, checkpoint, chunks of 512, parts of 1": (amp, MemorySettings(1, "checkpoint", 512)),
        }
        for name, (case, settings) in cases.items():
            predicted = StepPlanner(case).predict(settings, between=False).peak
            runs = _runs(case, predicted) and (has_amp or not case.training.use_amp)
            step = measure_step(case, settings) if runs else None
            rows.append(
                _measure_row(patch, name, predicted, None if step is None else (step.peak, step.seconds), plain)
            )
            if gpu is not None:
                fits = predicted <= _gpu_bytes(gpu)
                rows[-1] += _gpu_cells(measure_on_gpu(step_of_program(case, settings, gpu), gpu) if fits else None)
    return rows


def _gpu_bytes(device: torch.device) -> float:
    return USABLE_SHARE * torch.cuda.get_device_properties(device).total_memory


def _gpu_cells(measured: tuple[float, float] | None) -> list[str]:
    return ["-", "-"] if measured is None else [f"{measured[0] / MIB:,.0f}", f"{measured[1]:.2f}"]


def _runs(config: Config, peak: int) -> bool:
    rays = config.training.batch_size * config.ray_sampler.N_samples
    return peak <= LARGEST_MIB * MIB and rays <= LARGEST_RAYS


def _measure_row(
    patch: int, name: str, predicted: int, measured: tuple[int, float] | None, plain: tuple[int, float]
) -> list[str]:
    peak, seconds = (math.nan, math.nan) if measured is None else measured
    return [
        f"{patch} x {patch}",
        name,
        "-" if measured is None else f"{peak / MIB:,.0f}",
        f"{predicted / MIB:,.0f}" + ("*" if measured is None else ""),
        f"{predicted / plain[0]:.1%}",
        "-" if math.isnan(seconds) else f"{seconds:.2f}",
        "-" if math.isnan(seconds / plain[1]) else f"{seconds / plain[1]:.2f}",
    ]


def read_compared(name: str) -> Config:
    """A configuration of CONFIGS."""
    return load_config(
        CONFIG_FOLDER / "smoke.yaml", [*SMALL, *EVERY_POINT, "training.memory_strategy=dense", *CONFIGS[name]]
    )


def compare_predictions(names: Sequence[str]) -> list[list[str]]:
    """Rows of predicted and measured peaks."""
    rows = []
    for name in names:
        config = read_compared(name)
        settings = builders.build_memory_settings(config, "cpu")
        predicted = StepPlanner(config).predict(settings, between=False).peak
        measured = measure_step(config, settings).peak
        rows.append([name, f"{predicted / MIB:.2f}", f"{measured / MIB:.2f}", f"{predicted / measured - 1:+.2%}"])
    return rows


@dataclass(frozen=True)
class BudgetTrial:
    """One budget, what `train.py` chose for it, the live tensors it then needed, bytes, and its resident size, MiB."""

    name: str
    budget: int
    chosen: str
    used: int
    resident: float
    larger_exists: bool


def try_budgets(name: str, count: int = NUM_BUDGETS, overrides: Sequence[str] = ()) -> list[BudgetTrial]:
    """`count` budgets between the smallest and the largest need of a configuration, each given to a run of train.py."""
    keys = [*SMALL, "nerf.density=softplus", *BUDGETED[name], *overrides]  # nothing is left out, all is used
    config = load_config(CONFIG_FOLDER / "smoke.yaml", keys)
    planner, batch = StepPlanner(config), config.training.batch_size
    smallest = min(settings.chunk for settings in candidate_settings(config, "cpu"))
    low = planner.predict(MemorySettings(1, "checkpoint", smallest)).peak
    high = planner.predict(builders.build_memory_settings(config, "cpu")).peak
    trials = []
    for index in range(count):
        budget = round(1.02 * low * (high / low) ** (index / max(count - 1, 1)))
        with tempfile.TemporaryDirectory() as folder:
            trials.append(_try_budget(name, budget, Path(folder), keys, batch))
    return trials


def _try_budget(name: str, budget: int, folder: Path, keys: Sequence[str], batch: int) -> BudgetTrial:
    """Three iterations with sampling and a checkpoint; peaks are those that the run itself logs."""
    arguments = ["--config", str(CONFIG_FOLDER / "smoke.yaml"), "--outdir", str(folder), "--max_iterations", "3"]
    arguments += ["--device", "cpu", "--memory_budget", f"{budget / MIB:.4f}MiB", f"data.datadir={folder}", *keys]
    with _messages("memory: ") as messages:
        if train_program.main(arguments):
            sys.exit(f"{name}: train.py failed with a budget of {budget / MIB:.2f} MiB")
    chosen = messages[0].removeprefix("memory: ").split(",")[0]
    lines = [json.loads(line) for line in (folder / "smoke" / "metrics.jsonl").read_text().splitlines()]
    used = max(value for line in lines for key, value in line.items() if key.endswith("_live_peak"))
    resident = max(line["memory_rss"] for line in lines if "memory_rss" in line)
    return BudgetTrial(
        name, budget, chosen, round(used * MIB), resident, not chosen.startswith(f"micro_batch_size={batch} ")
    )


@contextmanager
def _messages(start: str) -> Iterator[list[str]]:
    """The program's log lines that begin with `start`."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith(start):
                found.append(record.getMessage())

    handler = Keep()
    logging.getLogger("graf").addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger("graf").removeHandler(handler)


# ---------------------------------------------------------------------------------------------------- what is left


def name_what_is_left(config: Config, settings: MemorySettings) -> list[list[str]]:
    """Rows of what lives at the worst moment of a step, predicted: part, MiB."""
    plan = StepPlanner(config).predict(settings, between=False)
    name, phase = max(plan.phases.items(), key=lambda item: item[1].peak)
    count, batch = config.training.batch_size * config.ray_sampler.N_samples, config.training.batch_size
    parts = {
        "weights, gradients, optimiser states, average": phase.peak - phase.rest,
        f"{count:,} rays: origins, directions, near, far": 4 * 8 * count,
        "renders (colour, depth, opacity), colour's gradient, photographs": 4 * (5 + 3) * count
        + 4 * 3 * batch * config.photo_size**2,
    }
    parts[f"activations: one chunk of {settings.chunk:,} rays, or D"] = phase.peak - sum(parts.values())
    rows = [[part, f"{size / MIB:,.0f}"] for part, size in parts.items()]
    return [*rows, [f"**peak, in phase {name}**", f"**{phase.peak / MIB:,.0f}**"]]


def plan_cards() -> list[list[str]]:
    """Rows of what training.memory_budget=auto chooses on cards of several sizes: card, then one cell per task."""
    rows = []
    planners = {
        name: StepPlanner(published(patch, *keys), device_type="cuda") for name, (patch, keys) in CARD_TASKS.items()
    }
    for card in CARDS:
        cells = [f"{card} GB"]
        for planner in planners.values():
            try:
                plan = choose_settings(planner, round(USABLE_SHARE * card * GIB))
            except BudgetError:
                cells.append("does not fit")
                continue
            chosen = plan.settings
            cells.append(f"{chosen.micro_batch_size}, {chosen.strategy}, {chosen.chunk} ({plan.peak / MIB:,.0f} MiB)")
        rows.append(cells)
    return rows


def curve(patches: Sequence[int], overrides: Sequence[str] = ()) -> dict[str, list[tuple[int, float]]]:
    """Predicted peak, MiB, against rays per step, per strategy (chunks of 1,024) and for the plain loop."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for patch in patches:
        config = published(patch, *overrides)
        rays, planner = config.training.batch_size * patch * patch, StepPlanner(config)
        peaks = {"plain loop": measure_plain(config, fake=True)[0]}
        for strategy in ("dense", "checkpoint", "deferred"):
            settings = MemorySettings(config.training.batch_size, strategy, 1024)
            peaks[strategy] = planner.predict(settings, between=False).phases["g"].peak
        for name, peak in peaks.items():
            lines.setdefault(name, []).append((rays, peak / MIB))
    return lines


def write_whole(path: Path, measured_network: str, overrides: Sequence[str] = ()) -> None:
    """Steps on whole images of 256 x 256, batch 8, float32: GRAF's network predicted, one of NETWORKS really run."""
    rows = []
    for name, keys in NETWORKS.items():
        config = published(256, *keys, *overrides)
        planner = StepPlanner(config)
        for chunk in (1024, 768):
            settings = MemorySettings(8, "checkpoint", chunk)
            predicted = planner.predict(settings, between=False)
            is_measured = name == measured_network and chunk == 1024
            measured = measure_step(config, settings, warm_up=False) if is_measured else None
            row = [name, f"{chunk:,}"]
            for phase, peak in [*((n, p.peak) for n, p in predicted.phases.items()), ("**all**", predicted.peak)]:
                found = "-"
                if measured is not None:
                    own = measured.plan.phases[phase].peak if phase in measured.plan.phases else measured.peak
                    found = f"{own / MIB:,.1f}"
                rows.append([*row, phase, f"{peak / MIB:,.1f}", found])
            if measured is not None:
                rows[-1][-1] += f" ({measured.seconds:,.0f} s)"
    text = (
        f"{hardware(CPU)}. Batch 8, 524,288 rays of 64 samples, float32, checkpointed. Peaks of live tensors, MiB.\n\n"
        f"{format_table(['network', 'chunk', 'phase', 'predicted', 'measured, one real step'], rows)}"
    )
    command = "python -m benchmarks.memory --whole" + ("" if measured_network == "narrow" else f" {measured_network}")
    write_section("Memory: whole images of 256 x 256", command, text, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the section and the curve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small networks and few configurations: a minute")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file whose section is replaced")
    parser.add_argument(
        "--whole",
        nargs="?",
        const="narrow",
        choices=tuple(NETWORKS),
        help="instead: whole images; which network runs one real step (published: half an hour on two cores)",
    )
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    if options.whole:
        write_whole(options.results, options.whole)
        return 0
    shrunk: tuple[str, ...] = ()
    patches: tuple[int, ...] = (32, 64, 256)
    names, budgets, count = list(CONFIGS), list(BUDGETED), NUM_BUDGETS
    if options.quick:
        shrunk = ("nerf.netwidth=32", "nerf.netdepth=4", "nerf.N_samples=8", "training.batch_size=2")
        patches, names, budgets, count = (16,), ["dense"], ["batch 8"], 1
    text: list[Any] = [
        f"{hardware(CPU)}. Peaks are of live tensors, MiB; * is predicted, not measured. That nothing here sets "
        "a default device tensor saves no byte by itself, so it has no row: it is what lets images wait on the host. "
        "On a CPU points without density are left out of the backward pass, half of GRAF's when it begins, of which a "
        "prediction knows nothing.",
        "",
    ]
    header = ["patch", "what", "measured", "predicted", "of plain", "s per step", "x plain"]
    if torch.cuda.is_available():
        text[0] += f" GPU: {hardware()}, peak allocated."
        header += ["GPU MiB", "GPU s"]
    text += [format_table(header, measure_measures(patches, shrunk)), ""]

    path = options.results.with_name(CURVE.name)
    lines = curve((16, 32) if options.quick else (16, 32, 64, 128, 256), shrunk)
    draw_curves(lines, path, "peak of live tensors in the generator's step, MiB", "rays per step")
    text += [f"![peak against rays, predicted]({path.name})", "", "The curve is predicted.", ""]

    whole, settings = published(patches[-1], *shrunk), MemorySettings(2 if options.quick else 8, "checkpoint", 1024)
    text += [f"Whole images of {patches[-1]} x {patches[-1]}, float32, {settings}: what is left, predicted:", ""]
    text += [format_table(["part", "MiB"], name_what_is_left(whole, settings)), ""]

    text += ["Predicted against measured, small networks:", ""]
    text += [format_table(["configuration", "predicted", "measured", "difference"], compare_predictions(names)), ""]

    narrow = ("training.memory_strategy=checkpoint", "training.chunk=128") if options.quick else ()
    trials = [trial for name in budgets for trial in try_budgets(name, count, narrow)]
    rows = [
        [
            t.name,
            f"{t.budget / MIB:.2f}",
            t.chosen,
            f"{t.used / MIB:.2f}",
            f"{t.used / t.budget:.0%}",
            f"{t.resident:.0f}",
        ]
        for t in trials
    ]
    header = ["configuration", "budget", "chosen", "used", "share", "RSS"]
    kept = sum(t.used <= t.budget for t in trials)
    least = min((t.used / t.budget for t in trials if t.larger_exists), default=math.nan)
    text += [
        "Budgets of live tensors, MiB, given to runs of train.py (most of RSS is Python and its libraries): "
        f"{kept} of {len(trials)} kept; where a larger micro-batch exists at least {least:.0%} is used.",
        "",
        format_table(header, rows),
    ]
    if not options.quick:
        text += [
            "",
            "What `training.memory_budget=auto` chooses on a card, published setting, batch 8, AMP, predicted:",
            "",
        ]
        text += [format_table(["card", *CARD_TASKS], plan_cards()), ""]
        text += ["Cells: micro_batch_size, memory_strategy, chunk (peak of live tensors)."]
    command = "python -m benchmarks.memory" + (" --quick" if options.quick else "")
    write_section("Memory", command, "\n".join(text), options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
