"""How far exported programs are from the field that they were made of, and how large and how fast each form is.

Run with `python -m benchmarks.exporting [RUN ...]`: every kind of field at the sizes of a shipped configuration, with
new weights, and the trained runs that are named.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import graf
from benchmarks.results import RESULTS, format_table, hardware, write_section
from graf.app import builders
from graf.app.builders import DatasetInfo
from graf.app.export_tasks import PROGRAMS
from graf.config import load_config
from graf.models.field import RadianceField
from graf.sharing.programs import draw_inputs

#: name -> shipped configuration and overrides
KINDS = {
    "mlp, 8 x 256 (carla)": ("carla",),
    "siren, 8 x 256": ("carla", "nerf.field=siren"),
    "triplane, table (toys)": ("toys",),
    "triplane, synthesis (default)": ("default",),
}
CLASSES = ("car", "duck", "house", "mug")
#: (batch, rays, samples) that speed is measured at
TIMED_SIZE = (1, 1024, 32)


def new_fields() -> Iterator[tuple[str, RadianceField, int]]:
    """(name, field, number of classes) of every kind, with new weights."""
    for name, (config_name, *keys) in KINDS.items():
        config = load_config(config_name, keys)
        generator = builders.build_generator(config, DatasetInfo(CLASSES, (0.3,), 30.0, True))
        yield name, generator.field.eval().requires_grad_(False), len(CLASSES)


def trained_fields(runs: list[str]) -> Iterator[tuple[str, RadianceField, int]]:
    """The same of trained runs."""
    for run in runs:
        renderer = graf.load(run, device="cpu")
        yield f"trained: {Path(run).name}", renderer.generator.field, len(renderer.classes)


def milliseconds(function: Callable[[], object]) -> float:
    """The shortest of several calls."""
    times = []
    for _ in range(7):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


def measure(name: str, field: RadianceField, num_classes: int, folder: Path) -> Iterator[list[str]]:
    """A row of the table for each form."""
    import onnxruntime

    inputs = draw_inputs(TIMED_SIZE, field.dim_z, num_classes)
    named = dict(zip(("z", "class_idx", "points", "directions"), (tensor.numpy() for tensor in inputs), strict=True))
    with torch.no_grad():
        z, class_idx, points, directions = inputs
        own = milliseconds(lambda: field(points, directions, field.prepare(z, class_idx)))
        for kind, write in PROGRAMS.items():
            path = folder / f"field.{kind}"
            started = time.perf_counter()
            differences = write(path, field, num_classes, {})
            took = time.perf_counter() - started
            if kind == "pt2":
                program = torch.export.load(path).module()
                speed = milliseconds(lambda program=program: program(*inputs))  # type: ignore[misc]
            else:
                session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
                speed = milliseconds(lambda session=session: session.run(None, named))  # type: ignore[misc]
            size = path.stat().st_size / 2**20
            differences_text = (
                f"{differences.rgb:.1e}",
                f"{differences.density:.1e}",
                f"{differences.largest_density:.3g}",
            )
            yield [name, kind, *differences_text, f"{size:.1f}", f"{took:.1f}", f"{speed:.1f}", f"{own:.1f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="trained runs to measure besides")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        fields = (*new_fields(), *trained_fields(options.runs))
        rows = [row for field in fields for row in measure(*field, Path(folder))]
    batch, rays, samples = TIMED_SIZE
    header = ("field", "form", "rgb", "density", "of up to", "MiB", "s to export", "ms a call", "the field's ms")
    text = (
        f"{hardware(torch.device('cpu'))}. The largest differences from the field at four sizes of batch, rays and "
        "samples, beside the largest density that was met; nothing is written where rgb is off by more than 1e-5, or "
        "density by more than 1e-5 of the largest. One call is on "
        f"{batch} x {rays} rays x {samples} samples; the last column is the field's own time.\n\n"
        f"{format_table(header, rows)}"
    )
    write_section("Exported programs", "python -m benchmarks.exporting", text, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
