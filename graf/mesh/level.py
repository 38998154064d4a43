"""Which density is the surface: chosen so that the surface lies where rays meet the object.

A ray that comes to its half depth (rays_around) has met densities up to some highest one, and the surface of level L
lies in front of the half depth where that is more than L. The median of these densities over all rays that hit is
therefore the level whose surface lies as often in front of the half depth as behind it: the surface of NeRF's depth
maps, which a fixed level (often 10 or 50) is only by chance. It follows the scale of densities, and haze, which no ray
loses half of its light in, has no say.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """The level of an object as rays (B, N) from around it see it. Raises UserError where none of them hits it."""
    met = meet_rays(density, rays)
    if not met.hit.any():
        raise UserError(
            "no ray loses half of its light in this object, so that it has no surface: train longer, try another "
            f"--seed, or give --level (the highest density that a ray has met is {float(met.reached.max()):.3g})"
        )
    share = float(met.hit.float().mean())
    level = float(met.reached[met.hit].median())
    return Level(level, f"met by half of the rays at their half depth; {share:.0%} of {met.hit.numel()} rays hit")
