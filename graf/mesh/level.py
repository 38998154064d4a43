"""Which density is the surface: chosen so that the surface lies where rays meet the object, and nowhere else.

A ray that loses half of its light meets the object, at its half depth (rays_around). The surface of level L lies in
front of it where the ray has met a density above L by then: else a picture of the surface has a hole there. A ray that
keeps its light passes the object: where it meets a density above L, the surface is too large, or has a floater there.
The level is the one that is wrong about the fewest rays, by the intersection over union of the rays that meet the
object and those that meet its surface. It follows the scale of densities, and haze, in which no ray loses half of its
light, pushes it up instead of becoming a wall. (Fixed levels, often 10 or 50, fit one kind of field; the median density
at half depth, tried first, tears holes into thin walls.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graf.base.errors import UserError
from graf.geometry.rays import Rays
from graf.mesh.extraction import DensityFunction
from graf.mesh.rays_around import meet_rays


@dataclass(frozen=True)
class Level:
    """A density, per world unit, and how it was chosen, in words."""

    density: float
    reason: str


def choose_level(density: DensityFunction, rays: Rays) -> Level:
    """The level of an object as rays (B, N) from around it see it. Raises UserError where none of them meets it."""
    met = meet_rays(density, rays)
    if not met.hit.any():
        raise UserError(
            "no ray loses half of its light in this object, so that it has no surface: train longer, try another "
            f"--seed, or give --level (the highest density that a ray has met is {float(met.reached.max()):.3g})"
        )
    reached, order = met.reached.flatten().sort(descending=True)
    hit = met.hit.flatten()[order]
    # with the first k rays, those that have met most, counted as meeting the surface
    agreement = hit.cumsum(0) / (hit.sum() + (~hit).cumsum(0))
    best = int(agreement.argmax())
    below = reached[best + 1] if best + 1 < len(reached) else torch.zeros(())
    level = float((reached[best] + below) / 2)
    share = float(hit.float().mean())
    return Level(
        level, f"agrees with {float(agreement[best]):.1%} of what {share:.0%} of {len(hit)} rays around it meet"
    )
