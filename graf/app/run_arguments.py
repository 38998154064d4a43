"""What commands about one object of a trained run share: its arguments, and how it is opened."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graf.base.files import check_writable

if TYPE_CHECKING:  # torch is imported when a run is opened, so that --help answers at once
    from torch import Tensor

    from graf.app.loading import TrainedGenerator
    from graf.app.runs import RunFolder
    from graf.evaluation.renderer import Renderer


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, --truncation, --device, --trust and --debug."""
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="run folder or checkpoint file (default: the newest run under results/)"
    )
    parser.add_argument(
        "--truncation", type=float, default=1.0, help="factor on drawn codes; below 1 surer, less various (default: 1)"
    )
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:1 | mps (default: %(default)s)")
    add_trust_argument(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")


def add_trust_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """--trust."""
    parser.add_argument(
        "--trust", action="store_true", help="take a .pt file from outside a run folder though torch is below 2.10"
    )


def add_object_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """--class and --seed, or --instance, or --object."""
    parser.add_argument(
        "--class", dest="class_name", help="name or index of the class (default: the object's own, else the first)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seed", type=int, default=0, help="names a drawn object (default: %(default)s)")
    which.add_argument("--instance", help="name or number of an object that training knows, instead of a drawn one")
    which.add_argument(
        "--object", dest="object_file", metavar="FILE", help="object.json of graf invert, instead of both"
    )


@dataclass(frozen=True)
class OpenedRun:
    """A trained generator and the folder of its run, into whose `evaluation` commands write where no --out is given."""

    trained: TrainedGenerator
    folder: RunFolder

    @property
    def renderer(self) -> Renderer:
        return self.trained.renderer


def open_run(run: str | None, device: str, truncation: float, trust: bool = False) -> OpenedRun:
    """Open the best checkpoint of a run folder, or a checkpoint file; None: of the newest run under results/.

    trust: take a file from outside a run folder that an old torch cannot read safely. Raises ConfigError,
    CheckpointError, UntrustedFile, DeviceError and, for a truncation out of range, UserError.
    """
    from graf.app.runs import find_run
    from graf.runtime.logs import setup_console

    setup_console()
    return open_first(*find_run(run, trust=trust), device, truncation)


def open_first(folder: RunFolder, files: Sequence[Path], device: str, truncation: float) -> OpenedRun:
    """Open the first of a run's checkpoints that can be read. Raises as `open_run` does."""
    from graf.app.loading import open_checkpoint
    from graf.runtime.device import configure_backends, describe_device, pick_device
    from graf.runtime.logs import logger
    from graf.runtime.memory import prepare_allocator

    prepare_allocator()
    picked = pick_device(device)
    configure_backends(picked)
    trained = open_checkpoint(files, picked)
    trained = replace(trained, renderer=replace(trained.renderer, truncation=truncation))
    logger.info("%s, iteration %d, on %s", trained.file, trained.iteration, describe_device(picked))
    return OpenedRun(trained, folder)


def object_code(trained: TrainedGenerator, given: dict[str, Any]) -> tuple[str, Tensor, str]:
    """The object that --class, --seed, --instance and --object name: its class, its code z (dim_z,), a name for files.

    Without --class, a known instance and the object of a file are of their own classes, a drawn one of the first.
    Raises UserError for an unknown class or instance, and for a file that describes no object of this run.
    """
    from graf.base.errors import UserError

    renderer, instances = trained.renderer, trained.dataset_info.instance_names
    if given.get("object_file") is not None:
        return _object_of_file(Path(given["object_file"]), renderer, given["class_name"])
    if given["instance"] is None:
        class_name = renderer.classes[renderer.class_index(given["class_name"] or 0)]
        return class_name, renderer.codes(given["seed"], range(1))[0], f"{class_name}_{given['seed']}"
    name = given["instance"]
    if renderer.generator.instances is None or name not in (*instances, *map(str, range(len(instances)))):
        known = ", ".join(instances) or "none"
        raise UserError(f"--instance {name}: expected one of the objects that this run knows: {known}")
    number = instances.index(name) if name in instances else int(name)
    own_class = instances[number].partition("/")[0]
    class_name = renderer.classes[renderer.class_index(given["class_name"] or own_class)]
    return class_name, renderer.instance_codes([number])[0], f"{class_name}_{instances[number]}".replace("/", "_")


def _object_of_file(path: Path, renderer: Renderer, class_name: str | None) -> tuple[str, Tensor, str]:
    """What --object names; --class, where it is given, has its code in another class."""
    from graf.inversion.object_file import read_object

    found = read_object(path)
    found.check_generator(renderer.generator, path)
    index = renderer.class_index(found.class_name if class_name is None else class_name)
    return renderer.classes[index], found.code, f"{renderer.classes[index]}_{found.name}"


def output_path(given: str | None, opened: OpenedRun, name: str) -> Path:
    """Where a command writes: --out, else `name` in the run's eval/ folder, which is tried. Raises UserError."""
    path = opened.folder.evaluation / name if given is None else Path(given)
    check_writable(path.parent)
    return path
