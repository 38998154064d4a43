"""What a step costs beside what its arithmetic would: `python -m benchmarks.throughput` writes its section and a plot.

For each row it times steps as `graf train` takes them, counts their arithmetic and traffic, measures in turn with them
what the machine can do at most, and splits their time by phase and by class of operator. GRAF's published model and the
plain published loop are timed in alternation, so that a noisy machine does not decide between them. A run that was
saved before a change (`--save FILE`) stands beside the one after it (`--before FILE`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.plots import Bar, draw_bars
from benchmarks.published_loop import published
from benchmarks.results import RESULTS, format_table, hardware, write_section
from benchmarks.roofline import Limits, LimitsMeter, WorkMeter
from benchmarks.stepping import Clock, Program, PublishedProgram, Subject, do_nothing, mean_step
from graf.base.files import write_atomically
from graf.config import Config, load_config
from graf.runtime import operator_classes
from graf.runtime.device import configure_backends, pick_device
from graf.runtime.profiling import StepProfiler, TimeSplit
from graf.runtime.regions import LOGGING

#: real photographs, where there are any
PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "shared" / "data"
PLAIN = "plain"
AMP = "training.use_amp=true"
#: everything a step may hold from the start, nothing between steps but the line of the log, which is set apart
MEASURED = (
    *("ccsr.start_iteration=0", "training.max_iterations=1000000", "training.fid_every=0"),
    *("training.sample_every=0", "training.monitoring=[]", "data.synthetic.count=288"),
)
#: a field that stays as it begins, half of its points with density: what they are later hangs on what it learns
AT_THE_START = "training.lr_g=1e-9"
#: activations of one image at a time, where points have density
KEPT = (AT_THE_START, "training.memory_strategy=dense", "training.micro_batch_size=1")
NARROW = ("nerf.netwidth=32", "nerf.netdepth=4", "nerf.N_samples=8", "training.batch_size=2")
WHOLE_IMAGES = ("ray_sampler.min_scale=1", "ray_sampler.max_scale=1", AMP)


@dataclass(frozen=True)
class Row:
    """What is measured: a configuration by name or file, None for GRAF's published setting, and keys on top of it."""

    title: str
    config: str | None
    keys: tuple[str, ...] = ()


ROWS = {
    PLAIN: Row("plain published loop", None),
    "published": Row("GRAF's published model, float32", None, (AT_THE_START,)),
    "published_shared": Row(
        "GRAF's published model, float32, one render for D and G", None, (AT_THE_START, "training.share_fakes=true")
    ),
    "published_amp": Row("GRAF's published model, AMP", None, (AT_THE_START, AMP)),
    "published_amp_kept": Row("GRAF's published model, AMP, an image's activations kept", None, (*KEPT, AMP)),
    "published_amp_shared": Row(
        "GRAF's published model, AMP, one render for D and G", None, (AT_THE_START, AMP, "training.share_fakes=true")
    ),
    "toys": Row("tri-plane, an object for each class (toys)", "toys", (AMP,)),
    "default": Row("tri-plane, many instances, CCSR (default)", "default", (AMP,)),
    "default_no_ccsr": Row("the default without CCSR", "default", (AMP, "ccsr.enabled=false")),
    "coil100": Row("photographs (coil100)", "coil100", (AMP,)),
    "patches_64": Row("toys, 64 x 64 patches", "toys", ("ray_sampler.N_samples=4096", *WHOLE_IMAGES)),
    "patches_128": Row(
        "toys, 128 x 128 patches", "toys", ("ray_sampler.N_samples=16384", "data.imsize=128", *WHOLE_IMAGES)
    ),
}
QUICK_ROWS = (PLAIN, "published", "published_amp", "toys", "default", "default_no_ccsr")


@dataclass
class Measured:
    """What was found of a row. Amounts are of the mean step; keys: all that were set on top of the configuration.

    peak: MiB of live tensors, on CUDA allocated; operations, traffic, calls: as of WorkMeter; phases, classes: seconds,
    the profile's shares of `seconds`; unclassified: operators by their share; waits, launches: of a GPU, as of
    TimeSplit.
    """

    title: str
    keys: list[str]
    batch: int
    seconds: float
    cpu_seconds: float
    peak: float
    operations: dict[str, float]
    traffic: float
    calls: float
    limits: Limits
    phases: dict[str, float]
    classes: dict[str, float]
    unclassified: dict[str, float] = field(default_factory=dict)
    waits: float = 0.0
    launches: float = 0.0

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.batch / self.seconds

    @property
    def of_peak(self) -> float:
        """The share of the step that its arithmetic would take at peak."""
        return self.limits.seconds_of_arithmetic(self.operations) / self.seconds

    @property
    def of_bandwidth(self) -> float:
        """The share of the step that its traffic would take at the bandwidth of a copy; caches may make it above 1."""
        return self.limits.seconds_of_traffic(self.traffic) / self.seconds


def load_row(row: Row, folder: Path) -> Config:
    """The configuration of a row; folder: where drawn photographs are kept."""
    keys = [*MEASURED, *row.keys]
    if row.config is None:
        return published(32, *keys)
    data = load_config(row.config, keys).data
    place = folder if data.type == "synthetic" else PHOTOGRAPHS / Path(data.datadir).name
    return load_config(row.config, [f"data.datadir={place}", *keys])


def lacks_photographs(row: Row, config: Config) -> bool:
    """Whether a row needs photographs that are not here."""
    return row.config is not None and config.data.type != "synthetic" and not Path(config.data.datadir).is_dir()


# ---------------------------------------------------------------- measuring


def measure_together(
    rows: Mapping[str, Row], configs: Mapping[str, Config], turns: int, device: torch.device
) -> dict[str, Measured]:
    """Measure rows in alternation: in each turn a whole period of steps of each."""
    with ExitStack() as stack:
        subjects: dict[str, Subject] = {}
        for name, config in configs.items():
            if name == PLAIN:
                subjects[name] = PublishedProgram(config, device)
            else:
                subjects[name] = Program(config, device, rows[name].config is not None, stack)
        clocks = {name: Clock(device) for name in subjects}
        limits = LimitsMeter(device)
        for subject in subjects.values():
            subject.prepare()
            subject.run(subject.period, do_nothing)
        for _ in range(turns):
            for name, subject in subjects.items():
                limits.measure()
                subject.prepare()
                clocks[name].start()
                subject.run(subject.period, clocks[name])
        return {
            name: describe(subject, rows[name], clocks[name], limits.limits()) for name, subject in subjects.items()
        }


def describe(subject: Subject, row: Row, clock: Clock, limits: Limits) -> Measured:
    """What is found of a subject besides its times: work, memory, and a profile."""
    subject.prepare()
    meter = WorkMeter()

    def run_once() -> None:
        with meter:
            subject.run(subject.period, do_nothing)

    peak = subject.measure_peak(run_once)
    with StepProfiler(subject.device, 1, subject.period) as profiler:
        subject.run(1 + subject.period, profiler.step, log=True)
    split = profiler.split
    assert split is not None
    seconds = mean_step(clock.seconds, subject.period)
    phases, classes = spread(split, seconds, subject.lines)
    unknown = split.longest(5, operator_classes.UNKNOWN)
    return Measured(
        title=row.title,
        keys=list(row.keys),
        batch=subject.batch,
        seconds=seconds,
        cpu_seconds=mean_step(clock.cpu_seconds, subject.period),
        peak=peak,
        operations={name: count / subject.period for name, count in meter.operations.items()},
        traffic=meter.traffic / subject.period,
        calls=meter.calls / subject.period,
        limits=limits,
        phases=phases,
        classes=classes,
        unclassified={name: operator.seconds / split.seconds for name, operator in unknown},
        waits=split.waits,
        launches=split.launches,
    )


def spread(split: TimeSplit, seconds: float, lines: float) -> tuple[dict[str, float], dict[str, float]]:
    """The seconds of a step by phase and by class in the shares of a profile, which wrote a line of the log each step.

    lines: those that a step writes.
    """
    phases: dict[str, float] = {}
    classes: dict[str, float] = {}
    parts = {key: value * (lines if key[0] == LOGGING else 1) for key, value in split.parts.items()}
    total = sum(parts.values())
    for (phase, kind), value in parts.items():
        phases[phase] = phases.get(phase, 0.0) + seconds * value / total
        classes[kind] = classes.get(kind, 0.0) + seconds * value / total
    return phases, classes


# ---------------------------------------------------------------- telling


def save(path: Path, measured: Mapping[str, Measured], device: torch.device) -> None:
    """Write what was measured as JSON."""
    found = {name: asdict(row) for name, row in measured.items()}
    write_atomically(path, json.dumps({"hardware": hardware(device), "rows": found}, indent=1))


def read(path: Path) -> tuple[str, dict[str, Measured]]:
    """The hardware and the rows of an earlier run."""
    found = json.loads(path.read_text())
    rows = {name: Measured(**(row | {"limits": Limits(**row["limits"])})) for name, row in found["rows"].items()}
    return found["hardware"], rows


def compare(measured: Mapping[str, Measured], before: Mapping[str, Measured]) -> dict[str, Measured]:
    """The rows of an earlier run that measured the same as this one."""
    return {
        name: before[name]
        for name, row in measured.items()
        if name in before and (before[name].title, before[name].keys) == (row.title, row.keys)
    }


def table_of_steps(measured: Mapping[str, Measured], before: Mapping[str, Measured]) -> str:
    """Times and rates, what a step asks for, and how near it comes to the machine's limits."""
    header = ["row", "batch", "s a step", "CPU s", "images/s"]
    header += [*(["images/s before", "x before"] if before else []), "x plain"]
    header += ["GFLOP", "GB", "operators", "of peak", "of bandwidth", "peak MiB"]
    plain, lines = measured.get(PLAIN), []
    for name, row in measured.items():
        earlier = before.get(name)
        line = [row.title, str(row.batch), f"{row.seconds:.3g}", f"{row.cpu_seconds:.3g}", f"{row.rate:.2f}"]
        if before:
            line += ["-", "-"] if earlier is None else [f"{earlier.rate:.2f}", f"{row.rate / earlier.rate:.2f}"]
        is_of_published = name in ROWS and ROWS[name].config is None
        line += [f"{row.seconds / plain.seconds:.3f}" if plain is not None and is_of_published else "-"]
        line += [f"{sum(row.operations.values()) / 1e9:.1f}", f"{row.traffic / 1e9:.2f}", f"{row.calls:,.0f}"]
        line += [f"{row.of_peak:.0%}", f"{row.of_bandwidth:.0%}", f"{row.peak:,.0f}"]
        lines.append(line)
    return format_table(header, lines)


def table_of_shares(measured: Mapping[str, Measured], parts: Callable[[Measured], dict[str, float]]) -> str:
    """The shares of a step's time by phase or by class, in the order of their sum over all rows."""
    sums: dict[str, float] = {}
    for row in measured.values():
        for name, seconds in parts(row).items():
            sums[name] = sums.get(name, 0.0) + seconds / row.seconds
    names = sorted(sums, key=lambda name: -sums[name])
    lines = [
        [row.title, *(f"{parts(row).get(name, 0.0) / row.seconds:.1%}" for name in names)] for row in measured.values()
    ]
    return format_table(["row", *names], lines)


def describe_limits(measured: Mapping[str, Measured]) -> str:
    """What the machine could do while the rows were measured, from the least to the most."""
    limits = [row.limits for row in measured.values()]
    products = {name: [found.products[name] for found in limits] for name in limits[0].products}
    phrases = [f"{_range(rates)} GFLOP/s in {name}" for name, rates in products.items()]
    return f"{', '.join(phrases)} and {_range([found.bandwidth for found in limits])} GB/s"


def _range(rates: Sequence[float]) -> str:
    low, high = (f"{rate / 1e9:,.0f}" for rate in (min(rates), max(rates)))
    return low if low == high else f"{low} to {high}"


def make_bars(measured: Mapping[str, Measured], before: Mapping[str, Measured]) -> list[Bar]:
    """Where an image's time goes: a bar for each row, relative to that of the earlier run where there is one above it.

    An image's and not a step's, since the earlier run may have had batches of another size.
    """
    bars = []
    for name, row in measured.items():
        earlier = before.get(name)
        unit = 1 / (row if earlier is None else earlier).rate
        for label, found in (("before", earlier), ("now" if earlier else "", row)):
            if found is not None:
                shares = {kind: seconds / found.batch / unit for kind, seconds in found.classes.items()}
                title = row.title if found is (earlier or row) else ""
                bars.append(Bar(title, f"{label} {1000 / found.rate:,.1f} ms".strip(), shares))
    return bars


def tell(
    measured: Mapping[str, Measured],
    before: Mapping[str, Measured],
    earlier: str | None,
    device: torch.device,
    plot: Path,
) -> str:
    """The text of the section. before: the rows that were measured before too; earlier: the hardware of then."""
    text = [
        f"{hardware(device)}. Medians of steps of each kind (with R1, with super-resolution, with moving cameras), and "
        "their mean; AMP where the device gains from it. Each row was timed in turn with products of 2048 x 2048 "
        f"matrices and copies of 256 MiB, in which the machine reached {describe_limits(measured)}.",
        "",
        table_of_steps(measured, before),
        "",
        "GFLOP are those of matrix products and convolutions, GB what operators read and write, in a step, operators "
        "those that do so. Of peak, of "
        "bandwidth: the share of the step that they would take at these limits; caches serve what is beyond 100%. "
        "Peaks are of live tensors, on a GPU of what its allocator has given out. x plain: of the published loop's "
        "step, timed in alternation; it alone gives memory back as it frees it, as glibc does by itself.",
        "",
        "Phases, in shares of the step by torch's profiler. `render` is the one that D and G share, where they do; "
        "else it is a part of d and g:",
        "",
        table_of_shares({name: row for name, row in measured.items() if name != PLAIN}, lambda row: row.phases),
        "",
        "Classes of operators:",
        "",
        table_of_shares(measured, lambda row: row.classes),
        "",
        f"Not classified: {name_unclassified(measured)}.",
    ]
    on_gpu = [row for row in measured.values() if row.launches]
    if on_gpu:
        waits = "; ".join(f"{row.title}: {row.launches:,.0f}, {1000 * row.waits:.2f} ms" for row in on_gpu)
        text += ["", f"Kernels launched, and what the host waits for the device, in a step: {waits}."]
    if earlier is not None:
        text += ["", f"Before: {earlier}, {describe_limits(before) if before else 'no row in common'}."]
    return "\n".join([*text, "", f"![where the time of an image goes]({plot.name})"])


def name_unclassified(measured: Mapping[str, Measured]) -> str:
    """The operators without a class, with their largest share of a step."""
    largest: dict[str, float] = {}
    for row in measured.values():
        for name, share in row.unclassified.items():
            largest[name] = max(share, largest.get(name, 0.0))
    found = sorted((item for item in largest.items() if item[1] >= 5e-4), key=lambda item: -item[1])
    return ", ".join(f"`{name}` (at most {share:.2%})" for name, share in found) or "nothing above 0.05% of a step"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the section and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file whose section is replaced")
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help=f"some of {', '.join(ROWS)}, or names of configurations (default: all)"
    )
    parser.add_argument("--turns", type=int, default=3, help="how often the steps of a row are timed (default: 3)")
    parser.add_argument("--quick", action="store_true", help="one turn, a narrow published model, no large patches")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")
    parser.add_argument("--data", type=Path, help="folder for drawn photographs, to find them again")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write what was measured as JSON, after every row")
    parser.add_argument("--before", type=Path, metavar="FILE", help="a saved run that stands beside this one")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys that count for all rows")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    device = pick_device(options.device)
    configure_backends(device)
    earlier, before = read(options.before) if options.before else (None, {})
    names = options.rows or (QUICK_ROWS if options.quick else tuple(ROWS))
    rows = choose_rows(names, options.quick, options.set)
    measured: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as folder:
        for group in group_rows(rows):
            configs = {name: load_row(row, options.data or Path(folder)) for name, row in group.items()}
            if any(lacks_photographs(group[name], config) for name, config in configs.items()):
                print(f"left out, no photographs in {PHOTOGRAPHS}: {', '.join(group)}", file=sys.stderr)
                continue
            measured |= measure_together(group, configs, 1 if options.quick else options.turns, device)
            if options.save:
                save(options.save, measured, device)
            # after every group: whoever runs out of time has what there is
            same, plot = compare(measured, before), options.results.with_name("throughput.png")
            title = "where the time of an image goes, by class of operator"
            draw_bars(make_bars(measured, same), operator_classes.CLASSES, plot, title)
            text = tell(measured, same, earlier, device, plot)
            write_section("Throughput", "python -m benchmarks.throughput", text, options.results)
    if not measured:
        return 1
    print(text)
    return 0


def choose_rows(names: Sequence[str], quick: bool, keys: Sequence[str]) -> dict[str, Row]:
    """Rows by name, with all of their keys; a name that is not of ROWS is a configuration's."""
    rows = {}
    for name in names:
        row = ROWS.get(name) or Row(name, name)
        is_narrow = quick and row.config is None
        title = f"{row.title}, narrow" if is_narrow else row.title
        rows[name] = Row(title, row.config, (*row.keys, *(NARROW if is_narrow else ()), *keys))
    return rows


def group_rows(rows: Mapping[str, Row]) -> list[dict[str, Row]]:
    """Rows that are measured in alternation: the published ones, and each other one alone."""
    together = {name: row for name, row in rows.items() if row.config is None}
    alone = [{name: row} for name, row in rows.items() if row.config is not None]
    return [together, *alone] if together else alone


if __name__ == "__main__":
    sys.exit(main())
