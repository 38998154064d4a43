"""What `graf export` writes: weights, programs and pictures of an opened run; it reads no command line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from graf import __version__
from graf.app.loading import TUNED_KEY, TrainedGenerator
from graf.app.run_arguments import OpenedRun, object_code, output_path
from graf.app.runs import run_name
from graf.base.errors import UserError
from graf.config import Config
from graf.sharing.programs import write_onnx, write_torch_program
from graf.sharing.transforms import turntable_views, write_transforms
from graf.sharing.weights import write_weights

PROGRAMS = {"pt2": write_torch_program, "onnx": write_onnx}
#: keys of the configuration that name places on the machine that trained
PLACES = (("data", "datadir"), ("training", "outdir"), ("evaluation", "inception_weights"), ("ccsr", "weights"))


@dataclass(frozen=True)
class PictureOptions:
    """How many pictures of an object, their side in pixels, and from which degrees above the horizon, in turn."""

    count: int
    resolution: int | None = None
    elevations: Sequence[float] | None = None


def write_model(opened: OpenedRun, kind: str, out: str | None) -> str:
    """Write weights or a program; returns the line to print. Raises UserError for a file of another suffix."""
    trained = opened.trained
    if out is not None and Path(out).suffix != f".{kind}":
        raise UserError(f"--out {out}: a file of --to {kind} ends in .{kind}, by which programs know it")
    path = output_path(out, opened, f"model.{kind}")
    if kind == "safetensors":
        write_trained(path, trained)
        return f"wrote {path}; graf.load({str(path)!r}) opens it"
    field, classes = trained.renderer.generator.field, len(trained.renderer.classes)
    differences = PROGRAMS[kind](path, field, classes, describe_program(trained))
    return f"wrote {path}; {differences.text()}"


def write_trained(path: Path, trained: TrainedGenerator) -> None:
    """Write the averaged weights of a run and its description to a safetensors file."""
    write_weights(path, averaged_states(trained), describe_trained(trained))


def averaged_states(trained: TrainedGenerator) -> dict[str, dict[str, Tensor]]:
    """The state dicts of the averaged networks, under the names that checkpoints use."""
    renderer = trained.renderer
    states = {"generator_average": renderer.generator.state_dict()}
    if renderer.ccsr is not None:
        states["ccsr_average"] = renderer.ccsr.state_dict()
    return states


def describe_trained(trained: TrainedGenerator) -> dict[str, Any]:
    """What a checkpoint says of its run (config, dataset, photographs, iteration, machine), without its places."""
    tuned = {key: Path(value).name for key, value in trained.tuned.items()}
    return {
        **({TUNED_KEY: tuned} if tuned else {}),
        "config": without_places(trained.renderer.config).model_dump(mode="json"),
        "dataset": asdict(trained.dataset_info),
        "photographs": dict(trained.photographs),
        "iteration": trained.iteration,
        "machine": dict(trained.machine),
        "graf": __version__,
    }


def without_places(config: Config) -> Config:
    """The configuration with folders and files by their own names alone: where they lie is nobody else's business."""
    for section, key in PLACES:
        values = getattr(config, section)
        place = getattr(values, key)
        if place is not None:
            values = values.model_copy(update={key: Path(place).name or place})
            config = config.model_copy(update={section: values})
    return config


def describe_program(trained: TrainedGenerator) -> dict[str, Any]:
    """What a program needs to know to render a field: codes, classes, and where rays begin and end."""
    renderer = trained.renderer
    field, caster = renderer.generator.field, renderer.caster
    return {
        "classes": list(renderer.classes),
        "dim_shape": field.dim_shape,
        "dim_appearance": field.dim_appearance,
        "codes": "uniform in [-1, 1]" if renderer.uniform_z else "standard normal",
        "near": caster.near,
        "far": caster.far,
        "bounding_radius": caster.bounding_radius,
        "camera_distance": renderer.cameras.radius,
        "fov_degrees": renderer.fov,
        "background": renderer.generator.background_colour.tolist(),
        "iteration": trained.iteration,
        "graf": __version__,
    }


def write_pictures(opened: OpenedRun, given: dict[str, Any], pictures: PictureOptions, out: str | None) -> str:
    """Write renders of one object with their cameras; returns the line to print.

    given: class_name, seed, instance and object_file of the command line.
    """
    class_name, z, name = object_code(opened.trained, given)
    renderer = opened.renderer
    if pictures.resolution is not None:
        if not 8 <= pictures.resolution <= 8192:
            raise UserError(f"--resolution {pictures.resolution}: expected 8 to 8192 pixels")
        renderer = replace(renderer, resolution=pictures.resolution)
    folder = output_path(out, opened, f"transforms_{name}")
    views = turntable_views(renderer, renderer.class_index(class_name), pictures.count, pictures.elevations)
    provenance = {"class": class_name, "object": name, "iteration": opened.trained.iteration, "graf": __version__}
    write_transforms(folder, renderer, z, views, provenance | {"truncation": renderer.truncation})
    near, far = renderer.caster.near, renderer.caster.far
    texts = run_name(name), str(folder)
    expname, datadir = (json.dumps(text, ensure_ascii=False) for text in texts)  # texts in YAML too
    keys = [f"expname={expname}", "data.type=transforms", f"data.datadir={datadir}"]
    keys += [f"data.imsize={renderer.resolution}", f"data.radius={renderer.cameras.radius:g}"]
    keys += [f"data.near={near:g}", f"data.far={far:g}"]
    return f"wrote {folder}; to train on it: {shlex.join(['graf', 'train', '--config', 'toys', *keys])}"
