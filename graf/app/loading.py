"""Opens trained generators: a run folder or a checkpoint file in, averaged weights ready to render out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graf.app import builders
from graf.app.builders import DatasetInfo
from graf.app.runs import WEIGHT_SUFFIXES, RunFolder, read_first, require_origin
from graf.config import ConfigError, build_config
from graf.data.errors import DataError
from graf.data.labels import check_name
from graf.evaluation.renderer import Renderer
from graf.runtime.amp import choose_precision
from graf.runtime.checkpoint import CheckpointError, restore
from graf.runtime.device import pick_device

#: what the description of a generator that was tuned to one photograph has besides that of its run
TUNED_KEY = "tuned"


def load(path: str | Path, device: str = "auto", truncation: float = 1.0, trust: bool = False) -> Renderer:
    """Open a trained generator: averaged weights, in evaluation mode, with the configuration that they were saved with.

    path: a run folder, of which model_best.pt is opened, else the newest checkpoint that can be read; or a checkpoint
    file; or a .safetensors file of `graf export`. The run's config.yaml, which may be newer, is not read. device:
    "auto" (the first of cuda, mps, cpu) | "cpu" | "cuda" | "cuda:1" | "mps". Flags of the whole process, such as TF32,
    are left as they are. truncation: factor in [0, 1] on drawn codes; below 1 objects are surer and less various.
    trust: take a .pt file that lies in no run folder though torch is so old that it could do harm; .safetensors cannot.

    Raises an error that says what to do: CheckpointError where no such file is there, where it cannot be read or was
    written by another version; UntrustedFile where it needs `trust`; ConfigError where a folder is no run; DeviceError
    where there is no such device.

    >>> import graf
    >>> renderer = graf.load(run, device="cpu")  # run = "results/default", for example
    >>> renderer.classes
    ('car', 'duck', 'house', 'mug')
    >>> renderer.config.data.imsize
    16
    >>> renderer.sample(class_name="mug", azimuth=45, elevation=20).pil()[0].save(run / "mug.png")
    """
    if Path(path).is_file() or Path(path).suffix in WEIGHT_SUFFIXES:
        files = [Path(path)]
        require_origin(files[0], trust)
    else:
        files = RunFolder(Path(path)).best_first()
    return replace(open_checkpoint(files, pick_device(device)).renderer, truncation=truncation)


@dataclass(frozen=True)
class TrainedGenerator:
    """What a checkpoint holds for rendering, and what it says about its run.

    machine: what it was trained on (device, precision, torch); empty where an older version wrote the checkpoint.
    photographs: what it was trained on, as `resuming.describe_photographs` tells; likewise.
    tuned: of a generator that `graf invert --tune` has tuned, the photograph and the weights that it comes from; else
    empty.
    """

    renderer: Renderer
    dataset_info: DatasetInfo
    iteration: int
    file: Path
    machine: Mapping[str, str]
    photographs: Mapping[str, Any]
    tuned: Mapping[str, str] = field(default_factory=dict)


def read_meta(checkpoint: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The description of a run in its checkpoint. Raises CheckpointError where it is none."""
    meta: dict[str, Any] = checkpoint["meta"]
    if not all(isinstance(meta.get(key), dict) for key in ("config", "dataset")):
        raise CheckpointError(
            f"{file}: has no description of its run (config, dataset); it is not a checkpoint of train.py"
        )
    return meta


def read_dataset_info(meta: Mapping[str, Any], file: Path) -> DatasetInfo:
    """What the photographs of a checkpoint's run said about the world. Raises CheckpointError for anything else."""
    saved = meta["dataset"]
    try:
        names = [check_name(name, "class", str(file)) for name in saved["class_names"]]
        heights, fov = [float(height) for height in saved["v_list"]], float(saved["fov"])
        instances = [str(name) for name in saved.get("instance_names", ())]
        radius = None if saved.get("radius") is None else float(saved["radius"])
        if not names or not heights or not 0 < fov < 180 or not all(0 <= height <= 1 for height in heights):
            raise ValueError(f"classes {names}, heights {heights}, field of view {fov}")
        if radius is not None and not 0 < radius < math.inf:
            raise ValueError(f"distance of the cameras {radius}")
        return DatasetInfo(tuple(names), tuple(heights), fov, bool(saved["poses_known"]), tuple(instances), radius)
    except (KeyError, TypeError, ValueError, AttributeError, DataError) as error:
        raise CheckpointError(
            f"{file}: what it says of its photographs cannot be used ({error}); it is not a checkpoint of train.py"
        ) from error


def read_words(meta: Mapping[str, Any], key: str) -> dict[str, str]:
    """What a checkpoint says under `key` of where it comes from, in words; empty where it says nothing."""
    saved = meta.get(key)
    return {str(name): str(value) for name, value in saved.items()} if isinstance(saved, Mapping) else {}


def read_photographs(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint remembers of the photographs of its run; empty where an older version wrote it."""
    saved = meta.get("photographs")
    return saved if isinstance(saved, Mapping) else {}


def open_checkpoint(files: Sequence[Path], device: torch.device) -> TrainedGenerator:
    """Rebuild averaged networks from the first checkpoint that can be read, with its own configuration.

    Raises CheckpointError.
    """
    file, checkpoint = read_first(files)
    meta = read_meta(checkpoint, file)
    dataset_info = read_dataset_info(meta, file)
    try:
        iteration = int(meta["iteration"])
        config = build_config(meta["config"])
    except ConfigError as error:
        reasons = "; ".join(str(error).splitlines())
        raise CheckpointError(
            f"{file}: was saved with a configuration that this version does not take ({reasons}); use the version that "
            "wrote it"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: does not tell its iteration ({error!r}); it is not a checkpoint of train.py"
        ) from error
    generator = builders.build_generator(config, dataset_info).to(device)
    generator.use(builders.build_memory_settings(config, device.type))
    ccsr = builders.build_ccsr(config, pretrained=False)
    averages: dict[str, nn.Module] = {"generator_average": generator}
    if ccsr is not None:
        averages["ccsr_average"] = ccsr.to(device)
    restore(checkpoint, averages, file, partial=True)
    for network in averages.values():
        network.eval().requires_grad_(False)
    precision = choose_precision(config.training.use_amp, config.training.amp_dtype, device)
    renderer = builders.build_renderer(config, dataset_info, precision, device, generator, ccsr)
    machine, photographs = read_words(meta, "machine"), read_photographs(meta)
    return TrainedGenerator(renderer, dataset_info, iteration, file, machine, photographs, read_words(meta, TUNED_KEY))
