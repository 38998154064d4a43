"""What a machine makes of training, in one command that keeps its time: `python -m benchmarks.all --gpu --minutes 25`.

Each part runs in a process of its own for at most its share of the time that is left; what it does not use is left to
the parts behind it. A folder takes the Markdown, the plots and the log of each, and summary.md, which is replaced
whenever a part begins or ends: whatever ends the command leaves what has been measured until then. It needs the
checkout, and pytest for its tests. Without --gpu the same is measured on the CPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.results import format_table
from graf.base.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
#: seconds that a part is given to end by itself when it is asked to, before it is killed
GRACE = 5.0
TOYS, PUBLISHED = "+ opacity term: toys.yaml", "GRAF as published"


@dataclass(frozen=True)
class Part:
    """One benchmark. weight: of its share among those that are left.

    command: what follows `python`, from the folder of the results and the seconds that it has.
    """

    name: str
    about: str
    weight: float
    command: Callable[[Path, float], Sequence[str]]


def _module(name: str, *options: str) -> Callable[[Path, float], Sequence[str]]:
    """`python -m benchmarks.NAME`, which writes its section to NAME.md of the folder."""
    return lambda folder, seconds: ["-m", f"benchmarks.{name}", "--results", str(folder / f"{name}.md"), *options]


def _throughput(folder: Path, seconds: float) -> Sequence[str]:
    return [*_module("throughput")(folder, seconds), "--save", str(folder / "throughput.json")]


def _quality(folder: Path, seconds: float) -> Sequence[str]:
    """Two runs, each of which trains for a third of the time; the last third is for starting and measuring."""
    command = [*_module("quality")(folder, seconds), "--levers", TOYS, PUBLISHED]
    return [*command, "--seconds", *(f"{seconds / share:.0f}" for share in (12, 6, 3))]


def _gpu_tests(folder: Path, seconds: float) -> Sequence[str]:
    return ["-m", "pytest", "-m", "gpu", "-n", "0", "-q", "-p", "no:cacheprovider"]


GPU_PARTS = (
    Part("throughput", "seconds of a step, where they go, and what the machine could do", 7, _throughput),
    Part("reserved_memory", "memory budgets against what the allocator reserves", 3, _module("reserved_memory")),
    Part("quality", "PSNR over seconds, of the toys and of GRAF at its published size", 6, _quality),
    Part("tests", "the tests that need a GPU: waits, copies, half precision, NCCL", 6, _gpu_tests),
    Part("scaling", "one and two processes of the CPU, and a model of many GPUs", 2, _module("scaling")),
)
CPU_PARTS = (
    Part("throughput", "seconds of a step, where they go, and what the machine could do", 7, _throughput),
    Part("memory", "predicted and measured memory, budgets", 2, _module("memory", "--quick")),
    Part("quality", "PSNR over seconds, of the toys and of GRAF at its published size", 6, _quality),
    Part("scaling", "one and two processes, and a model of many GPUs", 3, _module("scaling")),
)


@dataclass
class Summary:
    """summary.md: what has become of each part, replaced as a whole at every change."""

    folder: Path
    heading: str
    parts: Sequence[Part]
    rows: dict[str, tuple[str, str, str]] = field(default_factory=dict)

    def note(self, part: Part, state: str, seconds: str = "", last: str = "") -> None:
        """Write down the state of a part, the seconds that it took and the last line that it printed."""
        self.rows[part.name] = (state, seconds, last)
        self.write()

    def write(self) -> None:
        """Replace the file."""
        rows = [
            [self._link(part), part.about, *self.rows.get(part.name, ("not reached", "", ""))] for part in self.parts
        ]
        table = format_table(["part", "what", "state", "seconds", "last line"], rows)
        write_atomically(self.folder / "summary.md", f"{self.heading}\n\n{table}\n")

    def _link(self, part: Part) -> str:
        file = self.folder / f"{part.name}.md"
        return f"[{part.name}]({file.name})" if file.exists() else part.name


def run_parts(
    parts: Sequence[Part], folder: Path, heading: str, seconds: float, environment: Mapping[str, str]
) -> bool:
    """Run them in turn within so many seconds; returns whether all have ended well."""
    until = time.monotonic() + seconds
    summary = Summary(folder, heading, parts)
    summary.write()
    for index, part in enumerate(parts):
        for kind in (".md", ".log"):
            (folder / f"{part.name}{kind}").unlink(missing_ok=True)
        behind = parts[index:]
        left = until - time.monotonic() - GRACE * len(behind)
        share = left * part.weight / sum(other.weight for other in behind)
        if share <= 0:
            summary.note(part, "no time was left")
            continue
        _run(part, folder, share, summary, environment)
    return all(summary.rows[part.name][0] == "done" for part in parts)


def _run(part: Part, folder: Path, share: float, summary: Summary, environment: Mapping[str, str]) -> None:
    print(f"{part.name}: at most {share:.0f} s", flush=True)
    summary.note(part, f"running, at most {share:.0f} s")
    log, started = folder / f"{part.name}.log", time.monotonic()
    command = [sys.executable, *part.command(folder, share)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it has started itself can be ended with it
        )
        state = "interrupted"
        try:
            code = process.wait(timeout=share)
            state = "done" if code == 0 else f"failed with exit code {code}: see {log.name}"
        except subprocess.TimeoutExpired:
            state = f"ended after its share of {share:.0f} s: see {log.name}"
        finally:
            _end(process)
            summary.note(part, state, f"{time.monotonic() - started:.0f}", _last_line(log))
            print(f"{part.name}: {state}", flush=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started: by asking first."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()
    return lines[-1].strip()[:120] if lines else ""


def describe_machine(environment: Mapping[str, str]) -> str:
    """Device and torch that the parts will find, asked in a process of its own, since CUDA takes memory in each."""
    question = "from benchmarks.results import hardware; print(hardware())"
    asked = subprocess.run([sys.executable, "-c", question], cwd=ROOT, env=environment, capture_output=True, text=True)
    if asked.returncode:
        sys.exit(f"error: the machine cannot be described: {asked.stderr.strip()}")
    return asked.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; 0 if all have ended well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="measure on the GPU, and run the tests that need one")
    parser.add_argument("--minutes", type=float, default=25.0, help="in which all has to end (default: %(default)g)")
    parser.add_argument("--into", type=Path, help="folder of the results (default: benchmarks/gpu or benchmarks/cpu)")
    names = sorted({part.name for part in (*GPU_PARTS, *CPU_PARTS)})
    parser.add_argument("--parts", nargs="+", choices=names, help="some of them (default: all)")
    options = parser.parse_args(arguments)
    here = GPU_PARTS if options.gpu else CPU_PARTS
    if unknown := sorted(set(options.parts or ()) - {part.name for part in here}):
        how, known = "with" if options.gpu else "without", ", ".join(part.name for part in here)
        parser.error(f"--parts {' '.join(unknown)}: expected {how} --gpu some of {known}")
    started = time.monotonic()
    environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}  # logs are whole, whatever ends a part
    if not options.gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    machine = describe_machine(environment)
    if options.gpu and not machine.startswith("cuda"):
        sys.exit(f"error: --gpu: torch finds no CUDA GPU here, but {machine}; leave it out to measure the CPU")
    kind = "gpu" if options.gpu else "cpu"
    folder = (options.into or ROOT / "benchmarks" / kind).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parts = [part for part in here if options.parts is None or part.name in options.parts]
    command = f"python -m benchmarks.all{' --gpu' if options.gpu else ''} --minutes {options.minutes:g}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the running part is ended too
    seconds = 60 * options.minutes - (time.monotonic() - started)
    is_whole = run_parts(parts, folder, f"# Benchmarks\n\n{machine}\n\n`{command}`", seconds, environment)
    print(f"summary: {folder / 'summary.md'}")
    return 0 if is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
