"""What can be done with a trained generator besides training it: grids, videos, scores.

It opens the run and calls graf.evaluation; it reads no command line. Files are written before figures are printed: who
reads these may leave, as head does.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graf.app import builders, resuming
from graf.app.eval_options import ACTIONS, EvalOptions
from graf.app.failures import ErrorLog
from graf.app.loading import open_checkpoint
from graf.app.runs import find_run, named_run
from graf.base.files import check_writable, write_atomically
from graf.config import Config, ConfigError
from graf.data.datasets import PhotoDataset
from graf.data.labels import LABELS_FILE
from graf.evaluation.camera_paths import read_path, render_path
from graf.evaluation.enlargement import EnlargementReport, measure_enlargement
from graf.evaluation.extractor import choose_extractor
from graf.evaluation.fidelity import Plain, write_scores
from graf.evaluation.grids import Showcase, compare_with_photographs, draw_showcase, path_frames, render_showcase
from graf.evaluation.heldout import CodeNumbers, HeldoutPhotographs, mean_images_by_class, measure_heldout
from graf.evaluation.pictures import check_video_size, save_png, tiled_side, write_video
from graf.evaluation.renderer import Renderer
from graf.evaluation.scoring import ScoringTask
from graf.geometry.cameras import elevation_from_height, height_from_elevation, ring
from graf.geometry.views import Views
from graf.models.ccsr import upsample
from graf.runtime.device import configure_backends, describe_device, pick_device
from graf.runtime.logs import logger, progress_bar, setup_console
from graf.runtime.memory import prepare_allocator

NUM_HELDOUT_CODES = 4


@dataclass(frozen=True)
class Evaluation:
    """A trained generator, what is asked of it, and the folder that the results go to.

    photographs: what the checkpoint remembers of those that it was trained on; classes: indices of the classes that are
    evaluated; heights: heights v of the cameras.
    """

    options: EvalOptions
    config: Config
    dataset_info: builders.DatasetInfo
    photographs: Mapping[str, Any]
    renderer: Renderer
    folder: Path
    iteration: int
    classes: list[int]
    heights: list[float]

    @property
    def seed(self) -> int:
        """Seed of the codes of pictures."""
        return self.options.seed or 0

    @property
    def side(self) -> int:
        """Of the images that are shown, pixels."""
        ccsr = self.renderer.ccsr
        return self.renderer.resolution * (ccsr.scale if self.options.sr and ccsr is not None else 1)

    def codes(self) -> Tensor:
        """One code per object, (objects, dim_z); the same ones for every class, so that classes compare."""
        return self.renderer.codes(self.seed, range(self.options.objects))


def run_evaluation(options: EvalOptions, errors: ErrorLog) -> list[Path]:
    """Do everything that is asked for, in the order of ACTIONS; returns the files that were written.

    errors: is told the run folder.
    """
    evaluation = open_evaluation(options)
    errors.folder = evaluation.folder.parent
    check_writable(evaluation.folder)
    asked = [pkgutil.resolve_name(function) for name, (function, _) in ACTIONS.items() if name in options.actions]
    return [path for act in asked for path in act(evaluation)]


def open_evaluation(options: EvalOptions) -> Evaluation:
    """Find run and checkpoint and open the averaged generator."""
    setup_console()
    run, files = find_run(options.checkpoint or options.run, options.outdir, options.trust)
    if options.run is not None:
        run = named_run(options.run)
    prepare_allocator()
    device = pick_device(options.device)
    configure_backends(device)
    opened = open_checkpoint(files, device)
    renderer, config = opened.renderer, opened.renderer.config
    if options.chunk is not None:
        renderer.generator.chunk = options.chunk
    renderer = replace(renderer, truncation=options.truncation)
    if options.resolution is not None:
        renderer = replace(renderer, resolution=options.resolution)
    if options.datadir is not None:
        data = config.data.model_copy(update={"datadir": options.datadir})
        config = config.model_copy(update={"data": data})
    logger.info("%s, iteration %d, on %s", opened.file, opened.iteration, describe_device(device))
    if options.sr and renderer.ccsr is None:
        raise ConfigError("--sr: this run has no super-resolution; train one with ccsr.enabled=true")
    compared = [f"--{name}" for name in ("fid_kid", "heldout") if name in options.actions]
    if compared and renderer.resolution != config.data.imsize:
        raise ConfigError(
            f"--resolution={renderer.resolution}: {compared[0]} compares with photographs of {config.data.imsize} x "
            f"{config.data.imsize} pixels (data.imsize); leave --resolution out"
        )
    heights = options.heights or [height_from_elevation(degrees) for degrees in options.elevations or ()]
    return Evaluation(
        options=options,
        config=config,
        dataset_info=opened.dataset_info,
        photographs=opened.photographs,
        renderer=renderer,
        folder=run.evaluation,
        iteration=opened.iteration,
        classes=[renderer.class_index(name) for name in options.classes or renderer.classes],
        heights=list(heights) or [renderer.default_height],
    )


def _name_elevation(height: float) -> str:
    """Degrees above the horizon of a height v, for captions and file names."""
    return f"{elevation_from_height(height):.4g}"


def write_grids(evaluation: Evaluation) -> list[Path]:
    """One grid per class: objects (and heights) in rows, azimuths in columns; rgb, depth and opacity."""
    options, renderer, z = evaluation.options, evaluation.renderer, evaluation.codes()
    columns = [f"{360 * view / options.views:.0f}" for view in range(options.views)]
    elevations = [_name_elevation(height) for height in evaluation.heights]
    rows = [f"{number}  elevation {degrees}" for degrees in elevations for number in range(len(z))]
    near, far, written = renderer.caster.near, renderer.caster.far, []
    for class_idx in progress_bar(evaluation.classes, desc="grids", unit="class"):
        showcases = [Showcase.around(z, [class_idx] * len(z), options.views, v) for v in evaluation.heights]
        renders = chain.from_iterable(render_showcase(renderer, showcase, options.sr) for showcase in showcases)
        for name, picture in draw_showcase(renders, options.views, near, far, rows, columns).items():
            written.append(save_png(evaluation.folder / f"grid_{renderer.classes[class_idx]}_{name}.png", picture))
    return written


def _write_path(evaluation: Evaluation, name: str, z: Tensor, classes: list[int], u: Tensor, v: Tensor) -> list[Path]:
    """A video of objects side by side along a path of codes and cameras, one frame for each of (z, u, v)."""
    rows, side = 2 if evaluation.options.sr else 1, evaluation.side
    advice = "lower --objects or --resolution, or name fewer --classes"
    check_video_size(tiled_side(len(classes), side), tiled_side(rows, side), advice)
    frames = path_frames(evaluation.renderer, z, classes, u, v, evaluation.options.sr)
    shown = progress_bar(frames, desc=name, total=evaluation.options.frames, unit="frame")
    return [write_video(evaluation.folder / f"{name}.mp4", shown, evaluation.options.fps)]


def _all_objects(evaluation: Evaluation) -> tuple[Tensor, list[int]]:
    """Every object of every class: codes (R, dim_z) and classes."""
    z = evaluation.codes()
    return z.repeat(len(evaluation.classes), 1), [class_idx for class_idx in evaluation.classes for _ in range(len(z))]


def write_rotation(evaluation: Evaluation) -> list[Path]:
    """A full turn at every height."""
    z, classes = _all_objects(evaluation)
    written = []
    for height in evaluation.heights:
        u, v = ring(evaluation.options.frames, height)
        name = "rotation" if len(evaluation.heights) == 1 else f"rotation_{_name_elevation(height)}deg"
        written += _write_path(evaluation, name, z.expand(len(u), *z.shape), classes, u, v)
    return written


def write_elevation(evaluation: Evaluation) -> list[Path]:
    """From the lowest to the highest camera of the collection and back, from azimuth 45 degrees."""
    z, classes = _all_objects(evaluation)
    v_list, frames = evaluation.renderer.cameras.v_list, evaluation.options.frames
    low, high = max(v_list), min(v_list)
    if low - high < 0.05:  # one height: show what the field has learned around it
        low, high = max(low, min(low + 0.15, 0.5)), max(high - 0.15, 0.0)
    swing = 0.5 - 0.5 * torch.cos(2 * torch.pi * torch.arange(frames) / frames)
    u = torch.full_like(swing, 0.125)
    return _write_path(evaluation, "elevation", z.expand(len(u), *z.shape), classes, u, low + (high - low) * swing)


def write_interpolation(evaluation: Evaluation) -> list[Path]:
    """From object to object and back to the first, along straight lines between codes, of every class."""
    count, frames, classes = max(evaluation.options.objects, 3), evaluation.options.frames, evaluation.classes
    corners = evaluation.renderer.codes(evaluation.seed, range(count))
    place = torch.arange(frames) * count / frames
    start, share = place.long(), (place - place.long())[:, None]
    z = corners[start] * (1 - share) + corners[(start + 1) % count] * share
    u, v = torch.full_like(place, 0.125), torch.full_like(place, evaluation.heights[0])
    return _write_path(evaluation, "interpolation", z[:, None].expand(-1, len(classes), -1), classes, u, v)


def write_camera_path(evaluation: Evaluation) -> list[Path]:
    """A video along the camera path of --path, at its own speed, super-resolved with --sr.

    It has the name of the file, with path_ before it where the videos of other actions have such names.
    """
    options, renderer = evaluation.options, evaluation.renderer
    assert options.path is not None
    path = read_path(options.path)
    check_video_size(round(evaluation.side * path.aspect), evaluation.side, "lower --resolution")
    pictures = render_path(renderer, path, renderer.resolution, options.fps, options.sr)
    shown = progress_bar(pictures, desc="path", total=len(path.frames(options.fps)), unit="frame")
    name = Path(options.path).stem
    name = f"path_{name}" if name.startswith(("rotation", "elevation", "interpolation")) else name
    return [write_video(evaluation.folder / f"{name}.mp4", shown, options.fps)]


def write_shape_appearance(evaluation: Evaluation) -> list[Path]:
    """Per class a grid of shape codes (rows) x appearance codes (columns), from azimuth 45 degrees."""
    renderer, count, written = evaluation.renderer, max(evaluation.options.objects, 5), []
    z, split = renderer.codes(evaluation.seed, range(count)), renderer.generator.field.dim_shape
    codes = torch.cat([z[:, None, :split].expand(-1, count, -1), z[None, :, split:].expand(count, -1, -1)], dim=-1)
    u, v = torch.full((count * count,), 0.125), torch.full((count * count,), evaluation.heights[0])
    rows, columns = ([f"{part} {number}" for number in range(count)] for part in ("shape", "appearance"))
    for class_idx in progress_bar(evaluation.classes, desc="shape x appearance", unit="class"):
        views = renderer.cameras.views_at(torch.full((count * count,), class_idx), u, v)
        renders = renderer.render_views(codes.reshape(count * count, -1), views, evaluation.options.sr)
        pictures = draw_showcase([renders], count, 0, 1, rows, columns)
        name = f"shape_appearance_{renderer.classes[class_idx]}"
        for kind in ("rgb", "sr", "bicubic"):
            if kind in pictures:
                file = f"{name}.png" if kind == "rgb" else f"{name}_{kind}.png"
                written.append(save_png(evaluation.folder / file, pictures[kind]))
    return written


def write_fid_kid(evaluation: Evaluation) -> list[Path]:
    """FID and KID against the training photographs, computed exactly as during training.

    With super-resolution also of its output, and of bicubic upsampling, against the high-resolution photographs.
    """
    config, renderer = evaluation.config, evaluation.renderer
    photographs, protocol = builders.open_photographs(config), builders.build_protocol(config)
    if evaluation.options.seed is not None:
        protocol = replace(protocol, seed=evaluation.seed)
    pose_sampler = builders.build_pose_sampler(config, photographs, renderer.cameras)
    extractor, cache = builders.find_extractor(config), evaluation.folder.parent / "feature_cache"
    count = evaluation.options.num_images or config.evaluation.num_images
    task = ScoringTask(renderer, pose_sampler, extractor, protocol, count, cache)
    provenance: dict[str, Plain] = {"iteration": evaluation.iteration, "ema": config.training.model_average_beta > 0}
    real = builders.real_images(photographs, renderer.ccsr)
    if "sr" in real:
        real["bicubic"] = real["sr"]
    rows, lines = [], []
    for output, images in real.items():
        scores = task.score(output, images, images.fingerprint(), provenance)
        write_scores(evaluation.folder, scores)
        rows.append(scores.as_dict())
        lines.append("  ".join(f"{name} {value:.6g}" for name, value in scores.values.items()))
    written = [evaluation.folder / "scores.csv", _write_json(evaluation.folder / "scores.json", rows)]
    print("\n".join(lines))
    return written


def write_consistency(evaluation: Evaluation) -> list[Path]:
    """How well super-resolved views agree with their renders, each other and, on synthetic data, the truth."""
    if evaluation.renderer.ccsr is None:
        raise ConfigError("--consistency: this run has no super-resolution; train one with ccsr.enabled=true")
    config, dataset_info = evaluation.config, evaluation.dataset_info
    task = builders.build_consistency(config, dataset_info, evaluation.renderer, evaluation.classes)
    if evaluation.options.seed is not None:
        task = replace(task, seed=evaluation.seed)
    report = task.measure()
    own = {"iteration": evaluation.iteration, "truncation": evaluation.renderer.truncation, "seed": task.seed}
    written = [_write_json(evaluation.folder / "consistency.json", own | report.as_dict())]
    print(report.text())
    return written


def write_heldout(evaluation: Evaluation) -> list[Path]:
    """Renders of the test split against its photographs; see graf.evaluation.heldout.

    Figures, whether training never saw these photographs, and a picture of both, `--views` of them in a row.
    """
    config, renderer = evaluation.config, evaluation.renderer
    if not evaluation.dataset_info.poses_known:
        raise ConfigError(
            "--heldout: the views of these photographs are unknown (data.type=image_folder); it needs labels or poses"
        )
    training, heldout = (builders.open_photographs(config, subset) for subset in ("train", "test"))
    never_seen = _never_seen(evaluation, training)
    class_means = mean_images_by_class(builders.real_images(training, renderer.ccsr)["render"])
    images, labels = _stack(builders.real_images(heldout, renderer.ccsr)["render"])
    views = builders.build_pose_sampler(config, heldout, renderer.cameras).views

    is_known = builders.shows_known_object(renderer.generator, labels)

    def choose(rows: Tensor, shown: str) -> HeldoutPhotographs:
        if rows.sum() < 2:
            raise ConfigError(
                f"--heldout: {int(rows.sum())} of the {len(rows)} photographs of the test split show {shown}, with "
                f"data.heldout_every={config.data.heldout_every}: expected at least 2; train with a value of 2 or more "
                "that is below half of the number of distinct angles (of photographs, where data.type=transforms), or "
                f"with more of them in the column split of {LABELS_FILE}, where that decides"
            )
        return HeldoutPhotographs(images[rows], views[rows.nonzero()[:, 0]], class_means, renderer.classes)

    photographs = choose(is_known, "an object that the generator knows")
    unseen = None if is_known.all() else choose(~is_known, "an object that it does not know")
    total = NUM_HELDOUT_CODES * len(images) + 3 * int(is_known.sum())
    with progress_bar(desc="held-out views", unit="image", total=total) as bar:

        def render(views: Views, codes: CodeNumbers) -> Tensor:
            bar.update(len(views))
            if codes is None:
                z = renderer.instance_codes(views.labels[:, 3])
            else:
                numbers = codes if isinstance(codes, range) else range(codes, codes + 1)
                z = renderer.codes(evaluation.seed, numbers).expand(len(views), -1)
            return renderer.render_views(z, views).rgb

        report = measure_heldout(
            photographs,
            render,
            choose_extractor("offline"),
            builders.build_protocol(config),
            renderer.device,
            unseen=unseen,
            num_z=NUM_HELDOUT_CODES,
            provenance={"iteration": evaluation.iteration, "truncation": renderer.truncation},
        )
    shown = photographs.images
    if renderer.ccsr is not None:
        shown = torch.stack([heldout[index][0] for index in is_known.nonzero()[:, 0].tolist()])
        report = replace(report, enlargement=_measure_enlargement(evaluation, shown, photographs.views))
    super_resolve = renderer.ccsr is not None
    picture = compare_with_photographs(renderer, shown, photographs.views, evaluation.options.views, super_resolve)
    written = [
        _write_json(evaluation.folder / "heldout.json", {"never_seen": never_seen} | report.as_dict()),
        save_png(evaluation.folder / "heldout.png", picture),
    ]
    print(report.text())
    return written


def _never_seen(evaluation: Evaluation, training: PhotoDataset) -> bool | None:
    """Whether training never saw what is held out of these photographs; None where the checkpoint does not remember.

    What speaks against it is said. Splits go by rank: one photograph more or less, or another data.heldout_every, and
    what was trained on is held out.
    """
    known = evaluation.photographs
    change = resuming.compare_photographs(training, known)
    if change is not None:
        reason = f"they are not those that it was on ({change}); bring those back, or name their folder by --datadir"
    elif known.get("exchanged"):
        reason = "the run has gone on with others than it began with; only a new run can leave its test split unseen"
    else:
        return True if known.get("exchanged") is False else None
    logger.warning("%s: training may have seen photographs of the test split: %s", training.index.root, reason)
    return False


def _measure_enlargement(evaluation: Evaluation, images: Tensor, views: Views) -> EnlargementReport:
    """Super-resolution and bicubic enlargement of the same renders, against photographs at their full resolution."""
    renderer = evaluation.renderer
    with progress_bar(desc="super-resolved views", unit="image", total=len(images)) as bar:

        def render(views: Views) -> dict[str, Tensor]:
            bar.update(len(views))
            renders = renderer.render_views(renderer.instance_codes(views.labels[:, 3]), views, super_resolve=True)
            assert renderer.ccsr is not None
            assert renders.sr is not None
            return {"sr": renders.sr, "bicubic": upsample(renders.rgb, renderer.ccsr.scale)}

        protocol = builders.build_protocol(evaluation.config)
        extractor, provenance = choose_extractor("offline"), {"iteration": evaluation.iteration}
        return measure_enlargement(images, views, render, extractor, protocol, renderer.device, provenance)


def _stack(photographs: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(photographs[index] for index in range(len(photographs))), strict=True)
    return torch.stack(images), torch.stack(labels)


def _write_json(path: Path, content: object) -> Path:
    write_atomically(path, json.dumps(content, indent=2) + "\n")
    return path
