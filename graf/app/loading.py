"""Opens trained generators: a run folder or a checkpoint file in, averaged weights ready to render out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from graf.app import builders
from graf.app.runs import RunFolder
from graf.config import ConfigError, build_config
from graf.evaluation.renderer import Renderer
from graf.runtime.amp import choose_precision
from graf.runtime.checkpoint import CheckpointError, read_checkpoint, restore
from graf.runtime.device import pick_device


def load(path: str | Path, device: str = "auto", truncation: float = 1.0) -> Renderer:
    """Open a trained generator: averaged weights, in evaluation mode, with the configuration that they were saved with.

    path: a run folder, of which model_best.pt is opened, else the newest checkpoint; or a checkpoint file. The run's
    config.yaml, which may be newer, is not read. device: "auto" (the first of cuda, mps, cpu) | "cpu" | "cuda" |
    "cuda:1" | "mps". Flags of the whole process, such as TF32, are left as they are. truncation: factor in [0, 1] on
    drawn codes; below 1 objects are surer and less various.

    Raises an error that says what to do: CheckpointError where nothing is there, where the file cannot be read or was
    written by another version; ConfigError where a folder is no run; DeviceError where there is no such device.

    >>> import graf
    >>> renderer = graf.load(run, device="cpu")  # run = "results/default", for example
    >>> renderer.classes
    ('car', 'duck', 'house', 'mug')
    >>> renderer.config.data.imsize
    16
    >>> renderer.sample(class_name="mug", azimuth=45, elevation=20).pil()[0].save(run / "mug.png")
    """
    file = RunFolder(Path(path)).choose_checkpoint() if Path(path).is_dir() else Path(path)
    return replace(open_checkpoint(file, pick_device(device)).renderer, truncation=truncation)


@dataclass(frozen=True)
class TrainedGenerator:
    """What a checkpoint holds for rendering, and what it says about its run."""

    renderer: Renderer
    dataset_info: builders.DatasetInfo
    iteration: int


def open_checkpoint(file: Path, device: torch.device) -> TrainedGenerator:
    """Rebuild the averaged networks of a checkpoint from its own configuration. Raises CheckpointError."""
    checkpoint = read_checkpoint(file)
    try:
        dataset_info = builders.DatasetInfo(**checkpoint["meta"]["dataset"])
        iteration = int(checkpoint["meta"]["iteration"])
        config = build_config(checkpoint["meta"]["config"])
    except ConfigError as error:
        reasons = "; ".join(str(error).splitlines())
        raise CheckpointError(
            f"{file}: was saved with a configuration that this version does not take ({reasons}); use the version that "
            "wrote it"
        ) from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: has no description of its run ({error}); it is not a checkpoint of train.py"
        ) from error
    generator = builders.build_generator(config, dataset_info).to(device)
    ccsr = builders.build_ccsr(config, pretrained=False)
    averages: dict[str, nn.Module] = {"generator_average": generator}
    if ccsr is not None:
        averages["ccsr_average"] = ccsr.to(device)
    restore(checkpoint, averages, file, partial=True)
    for network in averages.values():
        network.eval().requires_grad_(False)
    precision = choose_precision(config.training.use_amp, config.training.amp_dtype, device)
    renderer = builders.build_renderer(config, dataset_info, precision, device, generator, ccsr)
    return TrainedGenerator(renderer, dataset_info, iteration)
