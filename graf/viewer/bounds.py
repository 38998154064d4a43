"""The box that holds an object: what lies outside of it need not be sampled while a picture has to be quick."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graf.evaluation.renderer import Renderer

#: cells along an axis of the grid on which densities are looked up: a thirtieth of a quick picture's time
CELLS = 24
#: share of its light that a ray loses in a cell from which on the cell belongs to the object
VISIBLE = 0.02
#: objects whose boxes are kept: a few clients' last ones
KEPT = 32


@dataclass(frozen=True)
class Bounds:
    """Two corners (3,) of a box whose sides are parallel to the axes, world units."""

    low: Tensor
    high: Tensor


def find_bounds(renderer: Renderer, z: Tensor, class_name: str) -> Bounds:
    """The box around everything that can be seen of an object, a cell wider; all of its sphere where that is haze."""
    radius = renderer.caster.bounding_radius
    if radius is None:
        radius = max(renderer.cameras.radius - renderer.caster.near, renderer.caster.far - renderer.cameras.radius)
    cell = 2 * radius / CELLS
    centres = (torch.arange(CELLS) + 0.5) * cell - radius
    points = torch.cartesian_prod(centres, centres, centres)
    points = points[points.norm(dim=1) < radius + cell]
    lost = -torch.expm1(-renderer.density(points, z=z, class_name=class_name) * cell)
    seen = points[lost > VISIBLE]
    if len(seen) == 0:
        return Bounds(torch.full((3,), -radius), torch.full((3,), radius))
    return Bounds(seen.amin(0) - 1.5 * cell, seen.amax(0) + 1.5 * cell)


@dataclass
class BoundsOfObjects:
    """The boxes of a renderer's objects, each found when it is first asked for."""

    renderer: Renderer
    _found: OrderedDict[tuple[str, bytes], Bounds] = field(default_factory=OrderedDict)

    def of(self, z: Tensor, class_name: str) -> Bounds:
        """The box of one object; z: (dim_z,)."""
        key = (class_name, z.numpy().tobytes())
        if key not in self._found:
            self._found[key] = find_bounds(self.renderer, z, class_name)
            if len(self._found) > KEPT:
                self._found.popitem(last=False)
        self._found.move_to_end(key)
        return self._found[key]
