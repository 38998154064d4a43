"""Inversion measured on photographs whose truth is known: objects of the run itself, and toys that training never saw.

For a run on the synthetic toys (data.type=synthetic, with held-out instances). What counts is not the photograph, which
any camera and code may imitate, but other views of the same object, in the world's own coordinates: a wrong azimuth
costs there too. Their PSNR is the mean over VIEWS azimuths at the middle height.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.results import RESULTS, format_table, hardware, write_section
from graf.app.invert_command import choose_starts, describe_search
from graf.app.loading import TrainedGenerator, open_checkpoint
from graf.app.runs import find_run
from graf.data.shapes import CLASS_NAMES
from graf.data.synthetic import render_views
from graf.evaluation.metrics import psnr
from graf.evaluation.pictures import save_png
from graf.evaluation.renderer import Renderer
from graf.geometry.cameras import Intrinsics, height_from_elevation, pose_from_angles
from graf.inversion.distance import PhotoDistance
from graf.inversion.photograph import Photograph
from graf.inversion.pictures import compare, show_around
from graf.inversion.search import Hypothesis, Search, angle_between
from graf.inversion.tuning import TuningSettings, measure_psnr, tune_generator
from graf.runtime.device import pick_device
from graf.runtime.randomness import Draws

VIEWS = 8
CODES, STEPS = 12, 100
SEED = 11

#: azimuths and elevations in degrees -> colours (N, 3, H, H) and opacity (N, 1, H, H) of the true object
Truth = Callable[[Sequence[float], Sequence[float]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Subject:
    """An object whose truth is known, and the camera of its photograph."""

    name: str
    class_name: str
    azimuth: float
    elevation: float
    truth: Truth


@dataclass(frozen=True)
class Rendered:
    """An object of the run, as the run renders it."""

    renderer: Renderer
    class_name: str
    z: Tensor

    def __call__(self, azimuths: Sequence[float], elevations: Sequence[float]) -> tuple[Tensor, Tensor]:
        renders = self.renderer.sample(z=self.z, class_name=self.class_name, azimuth=azimuths, elevation=elevations)
        return renders.rgb, renders.opacity


@dataclass(frozen=True)
class Traced:
    """A toy, drawn by its distance fields at twice the renderer's resolution and reduced."""

    renderer: Renderer
    class_name: str
    instance: int
    fov: float

    def __call__(self, azimuths: Sequence[float], elevations: Sequence[float]) -> tuple[Tensor, Tensor]:
        data = self.renderer.config.data
        u = torch.tensor([degrees / 360 for degrees in azimuths])
        v = torch.tensor([height_from_elevation(degrees) for degrees in elevations])
        rgb, _, mask = render_views(
            CLASS_NAMES.index(self.class_name),
            pose_from_angles(u, v, self.renderer.cameras.radius),
            Intrinsics.from_fov(2 * self.renderer.resolution, self.fov),
            instance=self.instance,
            seed=data.synthetic.seed,
            white_bkgd=data.white_bkgd,
        )
        return functional.avg_pool2d(rgb, 2), functional.avg_pool2d(mask, 2)


def own_objects(trained: TrainedGenerator, per_class: int) -> list[Subject]:
    """Objects of drawn codes."""
    renderer, subjects = trained.renderer, []
    for number, (class_name, azimuth, elevation) in enumerate(draw_cameras(trained, "own", per_class)):
        truth = Rendered(renderer, class_name, renderer.codes(SEED, range(number, number + 1)))
        subjects.append(Subject(f"{class_name} {number % per_class}", class_name, azimuth, elevation, truth))
    return subjects


def unseen_objects(trained: TrainedGenerator, per_class: int) -> list[Subject]:
    """Toys of instances that training held out."""
    renderer, subjects = trained.renderer, []
    known = renderer.config.data.synthetic
    per_class = min(per_class, known.heldout_instances)
    for number, (class_name, azimuth, elevation) in enumerate(draw_cameras(trained, "unseen", per_class)):
        instance = known.instances - known.heldout_instances + number % per_class
        truth = Traced(renderer, class_name, instance, trained.dataset_info.fov)
        subjects.append(Subject(f"{class_name} {instance}", class_name, azimuth, elevation, truth))
    return subjects


def draw_cameras(trained: TrainedGenerator, purpose: str, per_class: int) -> list[tuple[str, float, float]]:
    """(class, azimuth, elevation) of photographs: anywhere between the lowest and the highest camera of training."""
    names = trained.renderer.classes
    low, high = (edge(describe_search(trained, SEED, STEPS).elevations) for edge in (min, max))
    draws = Draws(SEED, 0, range(len(names) * per_class)).uniform(f"benchmark/{purpose}", 2).tolist()
    return [
        (names[number // per_class], 360 * first, low + (high - low) * second)
        for number, (first, second) in enumerate(draws)
    ]


def measure_views(renderer: Renderer, found: Hypothesis, subject: Subject) -> float:
    """Mean PSNR in dB over other views of the true object and of the found one, from the same cameras."""
    azimuths = [subject.azimuth + 360 * (number + 0.5) / VIEWS for number in range(VIEWS)]
    elevations = [renderer.default_elevation] * VIEWS
    truth, _ = subject.truth(azimuths, elevations)
    shown = renderer.sample(
        z=found.z, class_name=found.class_idx, azimuth=azimuths, elevation=renderer.default_elevation
    )
    return float(psnr(shown.rgb.clamp(-1, 1), truth).mean())


def measure_change(before: Renderer, after: Renderer) -> float:
    """PSNR in dB between renders of other objects, two of each class, before and after tuning."""
    names = [name for name in before.classes for _ in range(2)]
    codes = before.codes(SEED + 1, range(len(names)))
    azimuths = [40.0 * number for number in range(len(names))]
    shown = [each.sample(z=codes, class_name=names, azimuth=azimuths).rgb for each in (before, after)]
    return float(psnr(*shown).mean())


def measure(
    trained: TrainedGenerator, subject: Subject, tune: bool, pictures: Path | None
) -> tuple[list[str], dict[str, float]]:
    """A row of the table, and its numbers."""
    renderer, distance = trained.renderer, PhotoDistance()
    colours, mask = subject.truth([subject.azimuth], [subject.elevation])
    photograph, search = Photograph(colours, mask), describe_search(trained, SEED, STEPS)
    started, processor = time.perf_counter(), time.process_time()
    ranked = Search(renderer, photograph, distance, search).run(choose_starts(trained, None, CODES, SEED))
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    found, name = ranked[0], renderer.classes[ranked[0].class_idx]
    numbers = {
        "class": float(name == subject.class_name),
        "azimuth": angle_between(found.azimuth, subject.azimuth),
        "elevation": abs(found.elevation - subject.elevation),
        "psnr": found.psnr,
        "views": measure_views(renderer, found, subject),
        "seconds": seconds,
        "processor": processor,
    }
    rows = [("found", renderer)]
    if tune:
        started = time.perf_counter()
        tuned = tune_generator(renderer, photograph, found, distance, search, TuningSettings(seed=SEED))
        numbers["tuning seconds"] = time.perf_counter() - started
        numbers["tuned psnr"] = measure_psnr(tuned, photograph, found)
        numbers["tuned views"] = measure_views(tuned, found, subject)
        numbers["others"] = measure_change(renderer, tuned)
        rows.append(("tuned", tuned))
    if pictures is not None:
        file = subject.name.replace(" ", "_")
        save_png(pictures / f"{file}.png", compare(rows, photograph, found))
        save_png(pictures / f"{file}_views.png", show_around(rows, found))
    shown = [f"{number:.1f}" for key, number in numbers.items() if key != "class"]
    row = [subject.name, f"{subject.azimuth:.0f}, {subject.elevation:.0f}", name, *shown]
    print(" | ".join(row), flush=True)
    return row, numbers


def describe(trained: TrainedGenerator, subjects: Sequence[Subject], tune: bool, pictures: Path | None) -> str:
    """The table of some objects, and their summary."""
    measured = [measure(trained, subject, tune, pictures) for subject in subjects]
    header = ["object", "true azimuth, elevation", "class found", "azimuth off", "elevation off"]
    header += ["photograph, dB", "other views, dB", "s", "s of processor"]
    if tune:
        header += ["s of tuning", "photograph, tuned", "other views, tuned", "other objects against before"]
    table = [numbers for _, numbers in measured]
    means = {key: sum(numbers[key] for numbers in table) / len(table) for key in table[0]}
    right = sum(numbers["class"] for numbers in table)
    near = [numbers["azimuth"] for numbers in table if numbers["azimuth"] <= 90]
    text = (
        f"Right class: {right:.0f} of {len(table)}. Azimuth off by {means['azimuth']:.1f} degrees in the mean, "
        f"{sum(numbers['azimuth'] <= 5 for numbers in table)} of {len(table)} within 5; seen from another side (more "
        f"than 90 degrees off): {len(table) - len(near)}."
    )
    average = ["mean", "", f"{right:.0f} of {len(table)}"]
    average += [f"{mean:.1f}" for key, mean in means.items() if key != "class"]
    return f"{text}\n\n{format_table(header, [*(row for row, _ in measured), average])}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder, trained on data.type=synthetic")
    parser.add_argument("--own", type=int, default=2, help="objects of the run, per class (default: %(default)s)")
    parser.add_argument("--unseen", type=int, default=2, help="held-out toys, per class (default: %(default)s)")
    parser.add_argument("--pictures", type=Path, help="folder for pictures of what was found")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    trained = open_checkpoint(find_run(options.run)[1], pick_device("auto"))
    parts = [f"{hardware()}; iteration {trained.iteration} of the run."]
    if options.own:
        text = describe(trained, own_objects(trained, options.own), False, options.pictures)
        parts.append(f"Objects of the run itself (drawn codes):\n\n{text}")
    if options.unseen:
        text = describe(trained, unseen_objects(trained, options.unseen), True, options.pictures)
        parts.append(f"Toys that training never saw:\n\n{text}")
    write_section("Finding objects", "python -m benchmarks.inversion RUN", "\n\n".join(parts), options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
