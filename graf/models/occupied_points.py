"""Leaving points without density out: which points have any, and evaluating a radiance field at these alone.

A point without density weighs nothing in its ray, so its colour gets no gradient; and a density that is 0 exactly, as a
ReLU makes it, has none either. In GRAF's model that is half of all points at first, when noise decides, and most of
them later, when most of a scene is empty. What is left out changes no picture and no gradient. A field may leave them
out by itself (RadianceField.forward_visible); of any field's deferred renderings they are left out when these are
repeated for their gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graf.geometry.rays import RayChunk, Rays
from graf.geometry.volume_rendering import FieldFunction, RaySampling

#: points are picked in whole shares of all of them, since libraries make and keep a program for each size
SHARE = 1 / 32
#: where a larger part has density, all are computed: to pick points and their rays takes time and memory too
MOST = 3 / 4


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
    samples = points.shape[2]
    own_points, own_directions = pick(points.flatten(1, 2), numbers), pick(directions, numbers // samples)
    own_noise = None if noise is None else pick(noise.flatten(1, 2)[..., None], numbers)
    rgb, density = field(own_points[:, :, None], own_directions, own_noise)  # rays of one sample
    return place(rgb[:, :, 0], numbers, points.shape[:3]), place(density, numbers, points.shape[:3])[..., 0]


def pick(rows: Tensor, numbers: Tensor) -> Tensor:
    """The rows (B, K, C) of (B, P, C) with these numbers (B, K)."""
    if len(rows) > 1:
        numbers = numbers + torch.arange(len(rows), device=rows.device)[:, None] * rows.shape[1]
    # whole rows: gather would look up each of their numbers
    return rows.flatten(0, 1).index_select(0, numbers.flatten()).view(*numbers.shape, -1)


def place(rows: Tensor, numbers: Tensor, shape: torch.Size) -> Tensor:
    """Rows (B, K, C) at their numbers among points of a shape (B, N, S), (B, N, S, C); elsewhere 0."""
    batch, rays, samples = shape
    channels = rows.shape[2]
    found = rows.new_zeros(batch, rays * samples, channels)
    return found.scatter(1, numbers[..., None].expand(-1, -1, channels), rows).view(*shape, channels)


def number_occupied(occupied: Tensor) -> Tensor | None:
    """Numbers (B, K) of the occupied points among (B, N, S), counted ray by ray; None: too few are empty to matter.

    Images that have fewer take empty points besides. A plan, whose tensors have no data and say yes, is made for points
    that are all occupied.
    """
    if occupied.all():
        return None
    flat = occupied.flatten(1)
    share = math.ceil(SHARE * flat.shape[1])
    count = share * max(1, -(-int(flat.sum(1).max()) // share))  # of none nothing would have a graph
    return None if count > MOST * flat.shape[1] else torch.argsort(~flat, dim=1, stable=True)[:, :count]
