"""How fast pictures become good: `python -m benchmarks.quality` trains with each lever and draws PSNR over seconds.

Every lever adds to the one before it, from the MLP field with drawn views to configs/toys.yaml; the last line is GRAF's
published algorithm and network on the same data. With --config a configuration of one's own runs as it stands instead.
The curve is measured on the validation split with the averaged weights, while the clock of training stands still; the
table's last columns are the test split's, measured after each of the --seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from benchmarks.results import RESULTS, format_table, hardware, write_section
from graf.app import builders
from graf.config import Config, load_config
from graf.evaluation.extractor import choose_extractor
from graf.evaluation.fidelity import TensorImages, score_images
from graf.evaluation.pictures import to_uint8
from graf.evaluation.scoring import ValidationTask
from graf.runtime.amp import choose_precision
from graf.runtime.device import configure_backends, pick_device
from graf.runtime.memory import prepare_allocator
from graf.training.trainer import Trainer

CURVE = RESULTS.parent / "quality.png"
#: PSNR, dB, whose first crossing the table tells
MARKS = (20.0, 24.0, 28.0, 30.0)
#: training goes on for so many times the seconds between two measurements, at first and at most
FIRST_STEP, GROWTH = 7.5, 1.5
#: drawn codes whose renders are compared with each other
NUM_CODES = 8

MLP = (
    *("nerf.field=mlp", "nerf.netdepth=4", "nerf.netwidth=128", "nerf.multires=5", "nerf.dim_class=64"),
    *("nerf.N_samples=24", "nerf.N_importance=0", "ray_sampler.snap=false", "ray_sampler.max_scale=1"),
    *("ray_sampler.scale_anneal=0.12", "training.lr_g=1e-3", "training.match_views=false", "training.photometric=0"),
    "training.opacity=0",
)
TRIPLANE = ("nerf.field=triplane", "training.lr_g=3e-3")
PHOTOMETRIC = ("training.photometric=20",)
#: lever -> keys that it adds to those before it
LEVERS = {
    "MLP, drawn views": MLP,
    "+ the photographs' views": ("training.match_views=true",),
    "+ tri-planes": TRIPLANE,
    "+ photometric term": PHOTOMETRIC,
    "+ whole pixels": ("ray_sampler.snap=true", "ray_sampler.max_scale=0.5", "ray_sampler.scale_anneal=0"),
    "+ importance samples": ("nerf.N_samples=12", "nerf.N_importance=12"),
    "+ opacity term: toys.yaml": ("training.opacity=0.3",),
}
#: GRAF's network and game (Schwarz et al. 2020), R1 converted to its weight per image, on the toys
GRAF = (
    *("nerf.field=mlp", "nerf.netdepth=8", "nerf.netwidth=256", "nerf.multires=10", "nerf.N_samples=64"),
    *("nerf.N_importance=0", "nerf.use_viewdirs=true", "nerf.raw_noise_std=1", "nerf.density=relu"),
    *("nerf.density_scale=1", "nerf.density_bias=0", "nerf.sphere_prior=0", "nerf.bounding_radius=null"),
    *("z_dist.dim=256", "z_dist.dim_appearance=128", "ray_sampler.snap=false", "ray_sampler.min_scale=0.25"),
    *("ray_sampler.max_scale=1", "ray_sampler.scale_anneal=0.0025", "discriminator.norm=instance"),
    *("discriminator.condition_maps=0", "discriminator.augment={colour: 0}", "training.batch_size=8"),
    *("training.share_fakes=false", "training.match_views=false", "training.photometric=0", "training.opacity=0"),
    *("training.optimizer=rmsprop", "training.lr_g=5e-4", "training.lr_d=1e-4", "training.lr_schedule=multistep"),
    *("training.lr_anneal=0.5", "training.reg_param=0.009765625", "training.reg_every=1"),
    *("training.model_average_beta=0.999", "training.chunk=auto"),
)


@dataclass(frozen=True)
class Point:
    """A measurement of a run: seconds of training, images seen, PSNR in dB and SSIM on the validation split."""

    seconds: float
    images: int
    psnr: float
    ssim: float


@dataclass(frozen=True)
class Mark:
    """What is measured on the test split at a mark.

    point: with z = 0 or the instances' codes; kid: of drawn codes, one for each photograph's view, against the
    photographs; recall: the share of photographs that lie among those renders (graf.evaluation.fidelity); diversity:
    root of the mean squared distance between renders of two drawn codes at one view, in [0, 2].
    """

    point: Point
    kid: float
    recall: float
    diversity: float


def build(config: Config) -> tuple[Trainer, ValidationTask, ValidationTask]:
    """A trainer, and its renders against the validation split and against the test split."""
    device = pick_device(config.training.device)
    prepare_allocator()
    configure_backends(device)
    precision = choose_precision(config.training.use_amp, config.training.amp_dtype, device)
    photographs = builders.open_photographs(config)
    dataset_info = builders.describe_dataset(config, photographs)
    sampler = builders.build_pose_sampler(config, photographs, builders.build_cameras(config, dataset_info))
    trainer = builders.build_trainer(config, dataset_info, sampler, precision, device)
    renderer = builders.build_renderer(config, dataset_info, precision, device, *trainer.averaged_networks)
    tasks = [builders.build_validation(config, renderer, split) for split in ("validation", "test")]
    assert tasks[0] is not None
    assert tasks[1] is not None
    return trainer, tasks[0], tasks[1]


def judge_draws(config: Config, test: ValidationTask) -> tuple[float, float, float]:
    """KID, recall and diversity as in :class:`Mark`."""
    renderer, views = test.renderer, test.views
    rgb = renderer.render_views(renderer.codes(config.seed, range(len(views))), views).rgb
    pairs = TensorImages(to_uint8(test.images)), TensorImages(to_uint8(rgb))
    protocol, device = builders.build_protocol(config), renderer.device
    scores = score_images(*pairs, choose_extractor("offline"), protocol, device).values
    distances = []
    for class_idx in views.class_idx.unique():
        row = int((views.class_idx == class_idx).nonzero()[0])
        same = views[torch.full((NUM_CODES,), row)]
        rgb = renderer.render_views(renderer.codes(config.seed, range(NUM_CODES)), same).rgb.flatten(1)
        distances.append(torch.pdist(rgb).square().mean() / rgb.shape[1])
    return scores["kid_offline"], scores["recall_offline"], float(torch.stack(distances).mean().sqrt())


def trace(config: Config, seconds: Sequence[float]) -> tuple[list[Point], list[Mark]]:
    """Train until the last of `seconds`, or the end: the curve on the validation split, and marks on the test split.

    The latter are taken after each of the increasing `seconds` that training reaches, and where it ends before.
    """
    trainer, validation, test = build(config)
    curve: list[Point] = []
    reached: list[Mark] = []
    due = FIRST_STEP

    def judge(trainer: Trainer) -> Mark:
        return Mark(measure(trainer, test), *judge_draws(config, test))

    def measure(trainer: Trainer, task: ValidationTask) -> Point:
        trainer.settle()
        progress, scores = trainer.progress, task.measure()
        images = progress.iteration * config.training.batch_size
        return Point(progress.seconds, images, scores["psnr_validation"], scores["ssim_validation"])

    def look(trainer: Trainer, statistics: object) -> None:
        nonlocal due
        mark = seconds[len(reached)]
        if trainer.progress.seconds >= min(due, mark):
            curve.append(measure(trainer, validation))
            due = max(due * GROWTH, trainer.progress.seconds)
        if trainer.progress.seconds >= mark:
            reached.append(judge(trainer))
        if len(reached) == len(seconds):
            trainer.stop_reason = "the time is up"

    with builders.open_batches(config, builders.open_photographs(config), 0, trainer.device) as batches:
        trainer.run(batches, [look])
    if len(reached) < len(seconds):
        curve.append(measure(trainer, validation))
        reached.append(judge(trainer))
    return curve, reached


def first_crossing(curve: Sequence[Point], mark: float) -> float | None:
    """Seconds at which a curve reaches `mark` dB, between its measurements linearly; None where it does not."""
    before: Point | None = None
    for point in curve:
        if point.psnr >= mark:
            if before is None:
                return point.seconds
            share = (mark - before.psnr) / (point.psnr - before.psnr)
            return before.seconds + share * (point.seconds - before.seconds)
        before = point
    return None


def draw_curves(curves: dict[str, list[Point]], path: Path) -> None:
    """PSNR over seconds, both axes linear, a colour for each curve."""
    width, height, left, right, bottom, top = 1080, 480, 50, 220, 40, 24
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    points = [point for curve in curves.values() for point in curve]
    longest = max(point.seconds for point in points)
    low, high = min(point.psnr for point in points) - 1, max(point.psnr for point in points) + 1

    def place(seconds: float, psnr: float) -> tuple[float, float]:
        x = left + (width - left - right) * seconds / longest
        return x, top + (height - top - bottom) * (high - psnr) / (high - low)

    for level in range(2 * round(low / 2), round(high) + 1, 2):
        if low <= level <= high:
            draw.line([place(0, level), place(longest, level)], fill="#dddddd")
            draw.text((left - 24, place(0, level)[1] - 6), str(level), fill="black")
    for second in range(0, round(longest) + 1, 30):
        draw.text((place(second, low)[0] - 8, height - bottom + 6), str(second), fill="black")
    colours = ("#999999", "#8c564b", "#ff7f0e", "#9467bd", "#2ca02c", "#1f77b4", "#d62728", "black")
    for index, (name, curve) in enumerate(curves.items()):
        colour = colours[index % len(colours)]
        draw.line([place(point.seconds, point.psnr) for point in curve], fill=colour, width=2)
        draw.text((width - right + 16, top + 16 * (len(curves) - 1 - index)), name, fill=colour)
    draw.text((left, 6), "PSNR on the validation split, dB, over seconds of training", fill="black")
    image.save(path)


def choose_lines(options: argparse.Namespace) -> dict[str, Config]:
    """The configurations that are trained, by the name of their line."""
    if options.config is not None:
        return {Path(options.config).stem: load_config(options.config, ["training.use_amp=true", *options.overrides])}
    keys: tuple[str, ...] = ()
    lines: dict[str, tuple[str, ...]] = {}
    for name, more in LEVERS.items():
        keys += more
        lines[name] = keys
    lines["GRAF as published"] = GRAF
    own = [f"data.datadir={options.datadir}", "training.use_amp=true"]
    return {
        name: load_config("toys.yaml", [*own, *lines[name], *options.overrides]) for name in options.levers or lines
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every line; the section and the picture are written after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[180.0], help="of training, at which the test split is measured"
    )
    parser.add_argument("--datadir", default="data", help="where the toys of the levers are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--config", help="one line: this configuration as it stands, instead of the levers")
    parser.add_argument(
        "--levers", nargs="+", choices=[*LEVERS, "GRAF as published"], help="some of them by name; all by default"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="on top of every line")
    options = parser.parse_intermixed_args(arguments)
    if options.config is not None and options.levers is not None:
        parser.error("--levers are what is done to the toys: leave it out with --config")

    seconds = sorted(options.seconds)
    curves: dict[str, list[Point]] = {}
    rows: list[list[str]] = []
    for name, config in choose_lines(options).items():
        curves[name], reached = trace(config, seconds)
        crossings = [first_crossing(curves[name], mark) for mark in MARKS]
        for mark in reached:
            point = mark.point
            rows.append(
                [
                    name,
                    f"{point.images / point.seconds:.1f}",
                    *("-" if crossing is None else f"{crossing:.0f}" for crossing in crossings),
                    f"{point.seconds:.3g} s",
                    f"{point.psnr:.2f}",
                    f"{point.ssim:.4f}",
                    f"{mark.kid:.4f}",
                    f"{mark.recall:.2f}",
                    f"{mark.diversity:.3f}",
                ]
            )
            print(" | ".join(rows[-1]), flush=True)
        write(options, curves, rows)
    return 0


def write(options: argparse.Namespace, curves: dict[str, list[Point]], rows: list[list[str]]) -> None:
    """The section and the picture, of the lines that have been run."""
    crossed = [f"s to {mark:g} dB" for mark in MARKS]
    draws = ("KID of draws", "their recall", "diversity")
    header = ["line", "images/s", *crossed, "after", "test PSNR, dB", "SSIM", *draws]
    name, command = "Time to a given quality", "python -m benchmarks.quality"
    path = options.results.parent / CURVE.name
    if options.config is not None:
        line = next(iter(curves))
        name, command = f"{name}: {line}", f"{command} --config {options.config}"
        path = path.with_stem(f"{CURVE.stem}_{line}")
    draw_curves(curves, path)
    text = (
        f"{hardware()}; one seed, averaged weights. Seconds of training alone; those to a PSNR are read off the "
        "validation split's curve. PSNR and SSIM with z = 0 or the instances' codes; KID and recall (offline "
        "extractor) and diversity (RMS distance of two of a class at one view) of drawn codes.\n\n"
        f"{format_table(header, rows)}\n\n![PSNR over seconds]({path.name})"
    )
    write_section(name, command, text, options.results)


if __name__ == "__main__":
    sys.exit(main())
