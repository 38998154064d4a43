"""An object seen from around it: where its rays meet it, by its density alone.

A ray meets the object at its half depth, where half of its light is lost (transmittance 1/2, optical depth ln 2): the
median of where it ends. Unlike the mean, which a depth map has, it lies on one surface where a ray passes an edge, and
haze in front of an object moves it little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graf.evaluation.renderer import Renderer
from graf.geometry.rays import Rays
from graf.geometry.views import Views
from graf.geometry.volume_rendering import interval_lengths, points_along, stratified_distances
from graf.mesh.extraction import DensityFunction

#: samples along a ray where only density is asked for
RAY_SAMPLES = 96


@dataclass(frozen=True)
class Encounters:
    """Where rays (B, N) meet an object: half depths along them (B, N), inf where they pass it, and their densities.

    reached: (B, N), the highest density that a ray has met down to its half depth, or anywhere where it passes.
    """

    distance: Tensor
    reached: Tensor

    @property
    def hit(self) -> Tensor:
        """Which rays lose at least half of their light (B, N)."""
        return torch.isfinite(self.distance)


def meet_rays(density: DensityFunction, rays: Rays, num_samples: int = RAY_SAMPLES) -> Encounters:
    """Follow rays (B, N) through an object, whose density counts as constant around each sample; on the CPU.

    Image by image: memory grows with N, not with B.
    """
    met = [_meet_image(density, rays[number : number + 1], num_samples) for number in range(len(rays))]
    return Encounters(torch.cat([one.distance for one in met]), torch.cat([one.reached for one in met]))


def _meet_image(density: DensityFunction, rays: Rays, num_samples: int) -> Encounters:
    """The same for the rays (1, N) of one image."""
    distances = stratified_distances(rays.near, rays.far, num_samples)
    found = density(points_along(rays, distances).reshape(-1, 3)).view(distances.shape)
    lengths = interval_lengths(distances, rays.near, rays.far)
    passed = torch.cumsum(found * lengths, dim=-1)
    hit = passed[..., -1] >= math.log(2)
    place = (passed >= math.log(2)).int().argmax(dim=-1, keepdim=True)
    # inside of the interval in which it is reached, optical depth grows linearly
    ends = rays.near + torch.cumsum(lengths, dim=-1)
    excess = (passed.gather(-1, place) - math.log(2)) / found.gather(-1, place).clamp(min=1e-12)
    half = (ends.gather(-1, place) - excess)[..., 0]
    highest = torch.cummax(found, dim=-1).values
    reached = torch.where(hit, highest.gather(-1, place)[..., 0], highest[..., -1])
    return Encounters(torch.where(hit, half, torch.inf), reached)


def views_around(renderer: Renderer, class_name: str | int, azimuths: int) -> Views:
    """Views of a class from `azimuths` sides at each of the data set's heights, turned a little from height to height.

    Returned are azimuths * heights views.
    """
    heights = sorted(renderer.cameras.v_list)
    turn = torch.arange(azimuths) / azimuths
    u = torch.cat([turn + number / (azimuths * len(heights)) for number in range(len(heights))])
    v = torch.tensor(heights).repeat_interleave(azimuths)
    class_idx = torch.full((len(u),), renderer.class_index(class_name))
    return renderer.cameras.views_at(class_idx, torch.remainder(u, 1.0), v)
