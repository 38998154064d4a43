"""object.json: a found object that can be used again, as plain values; written and read, and checked against a run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graf.base.errors import UserError
from graf.base.files import write_atomically
from graf.models.generator import Generator
from graf.runtime.logs import logger

FORMAT = 1
CAMERA_KEYS = ("azimuth", "elevation", "radius")


@dataclass(frozen=True)
class ObjectFile:
    """An object of a generator, and the camera that a photograph saw it from.

    class_name; z: its code; camera: azimuth and elevation in degrees, radius (the distance) in world units, as
    `Renderer.sample` takes them; name: for files about it; weights: fingerprints of the generators that the code is
    for, see :func:`fingerprint`; details: whatever else is worth keeping.
    """

    class_name: str
    z: tuple[float, ...]
    camera: dict[str, float]
    name: str
    weights: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> Tensor:
        """z as a tensor (dim_z,)."""
        return torch.tensor(self.z)

    def write(self, path: Path) -> None:
        """Replace `path` by this object. Raises OSError."""
        values = asdict(self)
        details = values.pop("details")
        write_atomically(path, json.dumps({"format": FORMAT, **values, **details}, indent=2) + "\n")

    def check_generator(self, generator: Generator, path: Path) -> None:
        """Raise UserError where the code does not fit a generator; say so where it was found in another one."""
        if len(self.z) != generator.dim_z:
            raise UserError(
                f"{path}: its code has {len(self.z)} numbers, those of this run {generator.dim_z}; use its own run"
            )
        if self.weights and fingerprint(generator) not in self.weights:
            logger.warning("%s: was found in another generator, whose code means another object in this one", path)


def read_object(path: Path) -> ObjectFile:
    """The object that a file describes. Raises UserError where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; expected object.json of graf invert") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected object.json of graf invert") from error
    try:
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, this version reads {FORMAT}")
        z = tuple(float(number) for number in values["z"])
        camera = {key: float(values["camera"][key]) for key in CAMERA_KEYS}
        if not z or not all(math.isfinite(number) for number in (*z, *camera.values())):
            raise ValueError("numbers that are not finite")
        known = {"format", "class_name", "z", "camera", "name", "weights"}
        return ObjectFile(
            class_name=str(values["class_name"]),
            z=z,
            camera=camera,
            name=Path(str(values["name"])).name,
            weights=tuple(str(hashed) for hashed in values["weights"]),
            details={key: value for key, value in values.items() if key not in known},
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: describes no object ({error!r}); expected object.json of graf invert") from error


def fingerprint(generator: nn.Module) -> str:
    """SHA-256 of a generator's weights, whatever file they come from."""
    digest = hashlib.sha256()
    tensors: Mapping[str, Tensor] = generator.state_dict()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
