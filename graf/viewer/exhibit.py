"""What a viewer shows: a trained generator, the objects and photographs of its run, and how they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from graf.evaluation.pictures import Picture
from graf.evaluation.renderer import Renderer


@dataclass(frozen=True)
class Photograph:
    """A training camera: camera_to_world (4, 4), the class that it saw, and what it saw, where that is at hand."""

    camera_to_world: Tensor
    class_name: str
    thumbnail: Picture | None = None


@dataclass(frozen=True)
class Exhibit:
    """renderer; title: of the page; instances: objects that the run knows, class/name; photographs: some of the run's.

    full_height: rows of a picture that stands still, and seed: of the object that is shown, until a client chooses
    others.
    """

    renderer: Renderer = field(repr=False)
    title: str
    instances: Sequence[str] = ()
    photographs: Sequence[Photograph] = ()
    full_height: int = 256
    seed: int = 0
