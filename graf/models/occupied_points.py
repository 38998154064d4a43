"""Evaluating a radiance field once more, for its gradients, at those points alone that had any density.

A point without density weighs nothing in its ray, so its colour gets no gradient; and a density that is 0 exactly, as a
ReLU makes it, has none either. In GRAF's model that is half of all points at first, when noise decides, and most of
them later, when most of a scene is empty. What is left out changes no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graf.geometry.rays import RayChunk, Rays
from graf.geometry.volume_rendering import FieldFunction, RaySampling

#: points are picked in whole sixteenths of all of them: libraries make and keep a program for each size
SHARE = 1 / 16
#: where more sixteenths have density, all are computed: to pick points and their rays takes time and memory too
MOST_SHARES = 12


class OccupiedPoints:
    """Which of the coarse samples of one rendering, (B, N, S), had density; noted at first, and used later.

    Further samples are where densities say, and could have moved by a rounding error since: they are all computed. For
    tensors of a CPU: to know how many points there are, a GPU would have to be waited for.
    """

    def __init__(self, rays: Rays, sampling: RaySampling) -> None:
        shape = (*rays.origins.shape[:2], sampling.coarse)
        # ones: a plan fills in nothing, since its densities have no data
        self._occupied = torch.ones(shape, dtype=torch.bool, device=rays.origins.device)

    def note(self, field: FieldFunction, chunk: RayChunk) -> FieldFunction:
        """The field, at all points; which of a chunk's have density in its first call is noted."""
        unnoted = [self._of(chunk)]

        def evaluate(points: Tensor, directions: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
            rgb, density = field(points, directions, noise)
            if unnoted:
                unnoted.pop().copy_(density != 0)  # NaN is not left out
            return rgb, density

        return evaluate

    def recall(self, field: FieldFunction, chunk: RayChunk) -> FieldFunction:
        """The field, in its first call at the points that have been noted; elsewhere colour and density are 0 there."""
        unread = [self._of(chunk)]

        def evaluate(points: Tensor, directions: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
            numbers = number_occupied(unread.pop()) if unread else None
            if numbers is None:
                return field(points, directions, noise)
            return evaluate_at(field, numbers, points, directions, noise)

        return evaluate

    def _of(self, chunk: RayChunk) -> Tensor:
        return self._occupied[chunk.images, chunk.start : chunk.stop]


def evaluate_at(
    field: FieldFunction, numbers: Tensor, points: Tensor, directions: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A field at the points (B, K) with these numbers, counted ray by ray; elsewhere colour and density are 0."""
    batch, rays, samples, _ = points.shape
    triples = numbers[..., None].expand(-1, -1, 3)
    own_points = points.flatten(1, 2).gather(1, triples)
    own_directions = directions.gather(1, (numbers // samples)[..., None].expand(-1, -1, 3))
    own_noise = None if noise is None else noise.flatten(1, 2).gather(1, numbers)[..., None]
    rgb, density = field(own_points[:, :, None], own_directions, own_noise)  # rays of one sample
    all_rgb = rgb.new_zeros(batch, rays * samples, 3).scatter(1, triples, rgb[:, :, 0])
    all_density = density.new_zeros(batch, rays * samples).scatter(1, numbers, density[..., 0])
    return all_rgb.view(points.shape), all_density.view(points.shape[:3])


def number_occupied(occupied: Tensor) -> Tensor | None:
    """Numbers (B, K) of the occupied points among (B, N, S), counted ray by ray; None: too few are empty to matter.

    Images that have fewer take empty points besides. A plan, whose tensors have no data and say yes, is made for points
    that are all occupied.
    """
    if occupied.all():
        return None
    flat = occupied.flatten(1)
    share = math.ceil(SHARE * flat.shape[1])
    shares = max(1, -(-int(flat.sum(1).max()) // share))  # of none nothing would have a graph
    return None if shares > MOST_SHARES else torch.argsort(~flat, dim=1, stable=True)[:, : shares * share]
