"""What eval.py can do with a checkpoint: grids, videos, scores.

It opens the run and calls graf.evaluation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graf.app import builders
from graf.app.runs import RunFolder, describe_changes, newest_run
from graf.config import Config, ConfigError
from graf.evaluation.extractor import choose_extractor
from graf.evaluation.fidelity import Plain, write_scores
from graf.evaluation.grids import Showcase, draw_showcase, path_frames, render_showcase
from graf.evaluation.heldout import HeldoutPhotographs, mean_images_by_class, measure_heldout
from graf.evaluation.pictures import Picture, save_png, write_video
from graf.evaluation.sampler import Sampler
from graf.evaluation.scoring import ScoringTask
from graf.geometry.cameras import median_height, ring
from graf.geometry.views import Cameras, Views
from graf.runtime.amp import choose_precision
from graf.runtime.checkpoint import CheckpointError, read_checkpoint, restore
from graf.runtime.device import configure_backends, describe_device, pick_device
from graf.runtime.logs import logger, progress_bar, setup_console
from graf.runtime.memory import prepare_allocator

NUM_HELDOUT_CODES = 8


@dataclass(frozen=True)
class Presentation:
    """A generator ready to render, with the choices of the command line."""

    options: argparse.Namespace
    config: Config
    dataset_info: builders.DatasetInfo
    cameras: Cameras
    sampler: Sampler
    folder: Path
    checkpoint: str
    iteration: int
    classes: list[int]
    heights: list[float]

    @property
    def seed(self) -> int:
        """Seed of the codes that are shown."""
        return 0 if self.options.seed is None else int(self.options.seed)

    def codes(self) -> Tensor:
        """One code per object, (objects, dim_z); the same ones for every class, so that classes compare."""
        return self.sampler.codes(self.seed, range(self.options.objects))

    def path(self, name: str) -> Path:
        """A file in the evaluation folder."""
        return self.folder / name

    def progress(self, frames: Iterable[Picture], name: str) -> Iterable[Picture]:
        """A progress bar over the frames of a video."""
        return progress_bar(frames, desc=name, total=self.options.frames, unit="frame")


class AveragedNetwork:
    """Takes the network out of a checkpoint's average and leaves the count of its updates unread."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.network.state_dict(), "updates": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["module"])


def open_presentation(options: argparse.Namespace) -> Presentation:
    """Find run and checkpoint and rebuild the averaged generator."""
    setup_console()
    if options.run:
        run = RunFolder(Path(options.run))
    elif options.checkpoint:
        run = RunFolder(Path(options.checkpoint).resolve().parent.parent)
    else:
        run = newest_run(Path(options.outdir))
    config = run.load_config()
    file = Path(options.checkpoint) if options.checkpoint else run.choose_checkpoint()
    checkpoint = read_checkpoint(file)
    try:
        dataset_info = builders.DatasetInfo(**checkpoint["meta"]["scene"])
        iteration = int(checkpoint["meta"]["iteration"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: has no description of its data set ({error}); it is not a checkpoint of train.py"
        ) from error
    if file.resolve().parent != run.checkpoints.resolve():
        _require_same_renders(checkpoint["meta"].get("config", {}), config, file, run)
    prepare_allocator()
    device = pick_device(options.device)
    configure_backends(device)
    precision = choose_precision(config.training.use_amp, config.training.amp_dtype, device)
    generator = builders.build_generator(config, len(dataset_info.class_names)).to(device)
    ccsr = builders.build_ccsr(config, pretrained=False)
    networks = {"average": AveragedNetwork(generator)}
    if ccsr is not None:
        networks["average_ccsr"] = AveragedNetwork(ccsr.to(device))
    wanted = {name: state for name, state in checkpoint["objects"].items() if name.startswith("average")}
    restore({**checkpoint, "objects": wanted}, networks, file)
    if options.chunk is not None:
        if options.chunk < 1:
            raise ConfigError(f"--chunk={options.chunk}: expected at least 1 ray")
        generator.chunk = options.chunk
    logger.info("%s, iteration %d, on %s", file, iteration, describe_device(device))
    if options.sr and ccsr is None:
        raise ConfigError("--sr: this run has no super-resolution; train one with ccsr.enabled=true")
    heights = options.heights or [dataset_info.v_list[median_height(dataset_info.v_list)]]
    for name, value, low, high in (
        ("--views", options.views, 1, 360),
        ("--frames", options.frames, 2, 100_000),
        ("--seed", options.seed or 0, 0, 2**31),
        ("--objects", options.objects, 1, 10_000),
        ("--resolution", options.resolution or config.data.imsize, 8, 8192),
        ("--fps", options.fps, 1, 240),
        ("--num_images", config.evaluation.num_images if options.num_images is None else options.num_images, 2, 10**7),
        *(("--heights", height, 0, 1) for height in heights),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{name}={value}: expected {low} to {high}")
    sampler = builders.build_sampler(config, dataset_info, precision, device, generator, ccsr)
    if options.resolution is not None:
        sampler = replace(sampler, resolution=options.resolution)
    return Presentation(
        options=options,
        config=config,
        dataset_info=dataset_info,
        cameras=builders.build_cameras(config, dataset_info),
        sampler=sampler,
        folder=run.evaluation,
        checkpoint=str(file),
        iteration=iteration,
        classes=_choose_classes(options.classes, dataset_info.class_names),
        heights=list(heights),
    )


#: keys that decide what a network's renders look like; shapes of tensors tell the others
RENDERING_KEYS = {
    "data": ("imsize", "white_bkgd", "near", "far", "radius", "fov", "v_list", "angle_direction"),
    "nerf": (
        *("N_samples", "N_importance", "base_frequency", "use_viewdirs", "density", "density_scale", "density_bias"),
        *("sphere_prior", "prior_radius", "bounding_radius", "background"),
    ),
    "z_dist": ("type", "dim", "dim_appearance"),
    "ccsr": ("enabled", "scale", "view_mode", "trunk", "kernel"),
}


def _require_same_renders(saved: dict[str, Any], config: Config, file: Path, run: RunFolder) -> None:
    """Raise CheckpointError where a checkpoint from elsewhere was trained to be rendered in another way."""

    def select(values: dict[str, Any]) -> dict[str, Any]:
        return {
            section: {key: values.get(section, {}).get(key) for key in keys} for section, keys in RENDERING_KEYS.items()
        }

    changes = describe_changes(select(saved), select(config.model_dump(mode="json")))
    if changes:
        raise CheckpointError(
            f"{file}: a checkpoint of another config than {run.config_file} ({', '.join(changes[:3])}); leave out "
            f"--run, or name the run that it belongs to"
        )


def _choose_classes(names: list[str] | None, known: tuple[str, ...]) -> list[int]:
    """Indices of the classes named on the command line, by name or by index."""
    if names is None:
        return list(range(len(known)))
    indices = []
    for name in names:
        if name in known:
            indices.append(known.index(name))
        elif name.isdigit() and int(name) < len(known):
            indices.append(int(name))
        else:
            raise ConfigError(f"--classes {name}: expected names or indices of {', '.join(known)}")
    return indices


def write_grids(shown: Presentation) -> list[Path]:
    """One grid per class: objects (and heights) in rows, azimuths in columns; rgb, depth and opacity."""
    z, written = shown.codes(), []
    columns = [f"{360 * view / shown.options.views:.0f}" for view in range(shown.options.views)]
    caster = shown.sampler.caster
    for class_idx in progress_bar(shown.classes, desc="grids", unit="class"):
        views = shown.options.views
        showcases = [Showcase.around(z, [class_idx] * len(z), views, height) for height in shown.heights]
        renders = chain.from_iterable(
            render_showcase(shown.sampler, shown.cameras, showcase, shown.options.sr) for showcase in showcases
        )
        rows = [f"{number}  v {height:g}" for height in shown.heights for number in range(len(z))]
        for name, picture in draw_showcase(renders, views, caster.near, caster.far, rows, columns).items():
            written.append(
                save_png(shown.path(f"grid_{shown.dataset_info.class_names[class_idx]}_{name}.png"), picture)
            )
    return written


def _write_path(shown: Presentation, name: str, z: Tensor, classes: list[int], u: Tensor, v: Tensor) -> list[Path]:
    """A video of objects side by side along a path of codes and cameras, one frame for each of (z, u, v)."""
    frames = path_frames(shown.sampler, shown.cameras, z, classes, u, v, shown.options.sr)
    return [write_video(shown.path(f"{name}.mp4"), shown.progress(frames, name), shown.options.fps)]


def _all_objects(shown: Presentation) -> tuple[Tensor, list[int]]:
    """Every object of every class: codes (R, dim_z) and classes."""
    z = shown.codes()
    return z.repeat(len(shown.classes), 1), [class_idx for class_idx in shown.classes for _ in range(len(z))]


def write_rotation(shown: Presentation) -> list[Path]:
    """A full turn at every height."""
    z, classes = _all_objects(shown)
    written = []
    for height in shown.heights:
        u, v = ring(shown.options.frames, height)
        name = "rotation" if len(shown.heights) == 1 else f"rotation_v{height:g}"
        written += _write_path(shown, name, z.expand(len(u), *z.shape), classes, u, v)
    return written


def write_elevation(shown: Presentation) -> list[Path]:
    """From the lowest to the highest camera of the collection and back, from azimuth 45 degrees."""
    z, classes = _all_objects(shown)
    low, high = max(shown.dataset_info.v_list), min(shown.dataset_info.v_list)
    if low - high < 0.05:  # one height: show what the field has learned around it
        low, high = min(low + 0.15, 0.5), max(high - 0.15, 0.0)
    swing = 0.5 - 0.5 * torch.cos(2 * torch.pi * torch.arange(shown.options.frames) / shown.options.frames)
    u = torch.full_like(swing, 0.125)
    return _write_path(shown, "elevation", z.expand(len(u), *z.shape), classes, u, low + (high - low) * swing)


def write_interpolation(shown: Presentation) -> list[Path]:
    """From object to object and back to the first, along straight lines between codes, of every class."""
    count = max(shown.options.objects, 3)
    corners = shown.sampler.codes(shown.seed, range(count))
    place = torch.arange(shown.options.frames) * count / shown.options.frames
    start, share = place.long(), (place - place.long())[:, None]
    z = corners[start] * (1 - share) + corners[(start + 1) % count] * share
    u, v = torch.full_like(place, 0.125), torch.full_like(place, shown.heights[0])
    return _write_path(shown, "interpolation", z[:, None].expand(-1, len(shown.classes), -1), shown.classes, u, v)


def write_shape_appearance(shown: Presentation) -> list[Path]:
    """Per class a grid of shape codes (rows) x appearance codes (columns), from azimuth 45 degrees."""
    count, written = max(shown.options.objects, 5), []
    z, split = shown.sampler.codes(shown.seed, range(count)), shown.sampler.generator.field.shape.dim_shape
    codes = torch.cat([z[:, None, :split].expand(-1, count, -1), z[None, :, split:].expand(count, -1, -1)], dim=-1)
    for class_idx in progress_bar(shown.classes, desc="shape x appearance", unit="class"):
        classes = torch.full((count * count,), class_idx)
        views = shown.cameras.views_at(
            classes, torch.full((len(classes),), 0.125), torch.full((len(classes),), shown.heights[0])
        )
        renders = shown.sampler.render(codes.reshape(count * count, -1), views, shown.options.sr)
        labels = [str(number) for number in range(count)]
        pictures = draw_showcase(
            [renders], count, 0, 1, [f"shape {n}" for n in labels], [f"appearance {n}" for n in labels]
        )
        name = f"shape_appearance_{shown.dataset_info.class_names[class_idx]}"
        for kind in ("rgb", "sr", "bicubic"):
            if kind in pictures:
                file = f"{name}.png" if kind == "rgb" else f"{name}_{kind}.png"
                written.append(save_png(shown.path(file), pictures[kind]))
    return written


def write_fid_kid(shown: Presentation) -> list[Path]:
    """FID and KID against the training photographs, computed exactly as during training.

    With super-resolution also of its output, and of bicubic upsampling, against the high-resolution photographs.
    """
    evaluation = shown.config.evaluation
    photographs = builders.open_photographs(shown.config)
    protocol = builders.build_protocol(shown.config)
    if shown.options.seed is not None:
        protocol = replace(protocol, seed=shown.seed)
    task = ScoringTask(
        shown.sampler,
        builders.build_pose_sampler(shown.config, photographs, shown.cameras),
        choose_extractor(evaluation.feature_extractor, evaluation.inception_weights, evaluation.download),
        protocol,
        shown.options.num_images or evaluation.num_images,
        shown.folder.parent / "feature_cache",
    )
    provenance: dict[str, Plain] = {
        "iteration": shown.iteration,
        "ema": shown.config.training.model_average_beta > 0,
    }
    real = builders.real_images(photographs, shown.sampler.ccsr)
    if "sr" in real:
        real["bicubic"] = real["sr"]
    rows = []
    for output, images in real.items():
        scores = task.score(output, images, images.fingerprint(), provenance)
        write_scores(shown.folder, scores)
        print("  ".join(f"{name} {value:.6g}" for name, value in scores.values.items()))
        rows.append(scores.as_dict())
    return [shown.path("scores.csv"), _write_json(shown.path("scores.json"), rows)]


def write_consistency(shown: Presentation) -> list[Path]:
    """How well super-resolved views agree with their renders, each other and, on synthetic data, the truth."""
    if shown.sampler.ccsr is None:
        raise ConfigError("--consistency: this run has no super-resolution; train one with ccsr.enabled=true")
    report = builders.build_consistency(shown.config, shown.dataset_info, shown.sampler, shown.classes).measure()
    print(report.text())
    return [_write_json(shown.path("consistency.json"), {"iteration": shown.iteration, **report.as_dict()})]


def write_heldout(shown: Presentation) -> list[Path]:
    """Renders of the views that training never saw against their photographs; see graf.evaluation.heldout."""
    if not shown.dataset_info.poses_known:
        raise ConfigError(
            "--heldout: the views of these photographs are unknown (data.type=image_folder); it needs labels or poses"
        )
    if not shown.config.data.heldout_every:
        raise ConfigError("--heldout: nothing was held out of this run; train with data.heldout_every=6, for example")
    training, heldout = (builders.open_photographs(shown.config, subset) for subset in ("train", "heldout"))
    means, (images, _) = (
        _stack(builders.real_images(photographs, shown.sampler.ccsr)["render"]) for photographs in (training, heldout)
    )
    views = builders.build_pose_sampler(shown.config, heldout, shown.cameras).views
    photographs = HeldoutPhotographs(images, views, mean_images_by_class(*means), shown.dataset_info.class_names)
    codes = shown.sampler.codes(shown.seed, range(NUM_HELDOUT_CODES))
    with progress_bar(desc="held-out views", unit="image", total=3 * len(codes) * len(images)) as bar:

        def render(views: Views, code: int) -> Tensor:
            bar.update(len(views))
            return shown.sampler.render(codes[code : code + 1].expand(len(views), -1), views).rgb

        report = measure_heldout(
            photographs,
            render,
            choose_extractor("offline"),
            builders.build_protocol(shown.config),
            shown.sampler.device,
            num_z=len(codes),
            provenance={"iteration": shown.iteration},
        )
    print(report.text())
    return [_write_json(shown.path("heldout.json"), report.as_dict())]


def _stack(photographs: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(photographs[index] for index in range(len(photographs))), strict=True)
    return torch.stack(images), torch.stack(labels)


def _write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


ACTIONS: dict[str, Callable[[Presentation], list[Path]]] = {
    "grid": write_grids,
    "rotation": write_rotation,
    "elevation": write_elevation,
    "shape_appearance": write_shape_appearance,
    "interpolate": write_interpolation,
    "fid_kid": write_fid_kid,
    "consistency": write_consistency,
    "heldout": write_heldout,
}
