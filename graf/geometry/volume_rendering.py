"""Volume rendering along rays: where to sample, how much each sample weighs, and the colours that result.

Equations are NeRF's (Mildenhall et al. 2020).

Notation: t is the distance along a unit-length ray, S the number of samples, sigma the density, delta the length of the
interval that a sample stands for. Every sample owns the interval up to the midpoints to its neighbours, and the
outermost ones reach to near and far, so the intervals always add up to far - near. (The published NeRF code instead
ends in an interval of 1e10, which turns any density at the last sample into an opaque wall.)

All shapes are (B, N, S) for samples and (B, N, ...) for rays. Everything here is meant to run in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from graf.base.tensors import TensorBatch
from graf.geometry.rays import Rays

#: (points (B, N, S, 3), directions (B, N, 3), noise (B, N, S) added to the raw density, or None)
#: -> (rgb (B, N, S, 3) in [-1, 1], density (B, N, S) >= 0)
FieldFunction = Callable[[Tensor, Tensor, "Tensor | None"], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Render(TensorBatch):
    """What is seen: rgb in [-1, 1], z-depth in world units, opacity in [0, 1].

    Of rays (B, N, 3), (B, N, 1), (B, N, 1); of square images (B, 3, H, H), (B, 1, H, H), (B, 1, H, H).
    The depth is composited like the colour, over a background at `far`: sum_i w_i z_i + (1 - opacity) z_far.
    """

    rgb: Tensor
    depth: Tensor
    opacity: Tensor

    def as_images(self) -> Render:
        """Of the rays of square images, row by row, as images."""
        size = math.isqrt(self.rgb.shape[1])
        return self.map(lambda part: part.transpose(1, 2).reshape(part.shape[0], -1, size, size))


def stratified_distances(near: Tensor, far: Tensor, num_samples: int, jitter: Tensor | None = None) -> Tensor:
    """One distance in each of `num_samples` equal bins of [near, far] (NeRF, eq. 2): (B, N, S), increasing.

    near, far: (B, N, 1). jitter: (B, N, S) in [0, 1), the place inside each bin; None takes the middle.
    """
    bins = torch.arange(num_samples, device=near.device, dtype=near.dtype)
    place = (bins + (0.5 if jitter is None else jitter)) / num_samples
    return near + (far - near) * place


def interval_lengths(distances: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """The length delta (B, N, S) that each of the sorted `distances` (B, N, S) stands for; they sum to far - near."""
    middles = 0.5 * (distances[..., 1:] + distances[..., :-1])
    edges = torch.cat([near, middles, far], dim=-1)
    return edges[..., 1:] - edges[..., :-1]


def compositing_weights(density: Tensor, lengths: Tensor) -> Tensor:
    """w_i = T_i (1 - exp(-sigma_i delta_i)), T_i = exp(-sum_{j<i} sigma_j delta_j) (NeRF, eq. 3): (B, N, S)."""
    optical = density * lengths
    # summed without the sample itself: subtracting it afterwards would cancel in front of a dense sample
    passed = functional.pad(torch.cumsum(optical[..., :-1], dim=-1), (1, 0))
    return torch.exp(-passed) * -torch.expm1(-optical)


def importance_distances(
    distances: Tensor, weights: Tensor, near: Tensor, far: Tensor, num_samples: int, jitter: Tensor | None = None
) -> Tensor:
    """`num_samples` distances (B, N, num_samples) drawn from the piecewise constant density that `weights` describe.

    distances, weights: (B, N, S), each weight spread evenly over its interval (NeRF, section 5.2). jitter:
    (B, N, num_samples) in [0, 1); None takes evenly spaced quantiles. No gradient flows through the result.
    """
    with torch.no_grad():
        lengths = interval_lengths(distances, near, far)
        edges = torch.cat([near, near + torch.cumsum(lengths, dim=-1)], dim=-1)
        mass = weights + 1e-5  # a ray that meets nothing falls back to uniform sampling
        cdf = torch.cumsum(mass, dim=-1)
        cdf = torch.cat([torch.zeros_like(cdf[..., :1]), cdf], dim=-1) / cdf[..., -1:]
        quantiles = stratified_distances(torch.zeros_like(near), torch.ones_like(far), num_samples, jitter)
        upper = torch.searchsorted(cdf, quantiles.contiguous(), right=True).clamp(1, cdf.shape[-1] - 1)
        cdf_low, cdf_high = cdf.gather(-1, upper - 1), cdf.gather(-1, upper)
        edge_low, edge_high = edges.gather(-1, upper - 1), edges.gather(-1, upper)
        place = (quantiles - cdf_low) / (cdf_high - cdf_low).clamp(min=1e-12)
        return edge_low + place.clamp(0, 1) * (edge_high - edge_low)


def composite_along_rays(
    rgb: Tensor, density: Tensor, distances: Tensor, rays: Rays, background: Tensor | None = None
) -> Render:
    """Colour, depth and opacity of rays from their samples (NeRF, eq. 3).

    rgb: (B, N, S, 3); density, distances: (B, N, S); background: (3,) or (B, 1, 3) in [-1, 1],
    None for grey (0).
    """
    weights = compositing_weights(density, interval_lengths(distances, rays.near, rays.far))
    opacity = weights.sum(-1, keepdim=True)
    colour = (weights[..., None] * rgb).sum(-2)
    if background is not None:
        colour = colour + (1 - opacity) * background
    distance = (weights * distances).sum(-1, keepdim=True) + (1 - opacity) * rays.far
    return Render(colour, distance * rays.axis_cosine, opacity)


@dataclass(frozen=True)
class RaySampling:
    """Samples of a ray: `coarse` in equal bins, then `importance` more where the first ones found density."""

    coarse: int
    importance: int = 0

    @property
    def total(self) -> int:
        return self.coarse + self.importance


@dataclass(frozen=True)
class RayNoise(TensorBatch):
    """The random numbers of one rendering, drawn beforehand so that it can be repeated, split and resumed.

    jitter (B, N, S) and importance_jitter (B, N, S_importance), in [0, 1), place the samples in their bins; density
    (B, N, S + S_importance) is added to the raw density, already scaled to its standard deviation. None means none.
    """

    jitter: Tensor | None = None
    importance_jitter: Tensor | None = None
    density: Tensor | None = None

    def of_rays(self, start: int, stop: int, sampling: RaySampling) -> RayNoise:
        """As :class:`NoiseSource`: what has been drawn already."""
        return self.map(lambda part: part[:, start:stop])


class NoiseSource(Protocol):
    """Makes the random numbers of the rays start..stop of every image, whenever they are asked for.

    A slice of it makes those of some images.
    """

    def __getitem__(self, images: slice) -> NoiseSource: ...

    def of_rays(self, start: int, stop: int, sampling: RaySampling) -> RayNoise: ...


#: samples in the middle of their bins, densities as they are
NO_NOISE = RayNoise()


def render_rays(
    field: FieldFunction,
    rays: Rays,
    sampling: RaySampling,
    noise: RayNoise,
    background: Tensor | None = None,
) -> Render:
    """Render rays through any radiance field; `background` as in :func:`composite_along_rays`.

    Importance samples are merged with the coarse ones, so that no evaluation of the field is thrown away.

    >>> fog = lambda points, directions, noise: (torch.ones_like(points), torch.ones_like(points[..., 0]))
    >>> render_rays(fog, rays, RaySampling(64), RayNoise()).opacity  # 1 - exp(-(far - near))
    """
    coarse = sampling.coarse
    distances = stratified_distances(rays.near, rays.far, coarse, noise.jitter)
    coarse_noise = None if noise.density is None else noise.density[..., :coarse]
    rgb, density = field(points_along(rays, distances), rays.directions, coarse_noise)
    if sampling.importance:
        weights = compositing_weights(density.detach(), interval_lengths(distances, rays.near, rays.far))
        fine = importance_distances(
            distances, weights, rays.near, rays.far, sampling.importance, noise.importance_jitter
        )
        fine_noise = None if noise.density is None else noise.density[..., coarse:]
        fine_rgb, fine_density = field(points_along(rays, fine), rays.directions, fine_noise)
        distances, order = torch.sort(torch.cat([distances, fine], dim=-1), dim=-1)
        density = torch.cat([density, fine_density], dim=-1).gather(-1, order)
        rgb = torch.cat([rgb, fine_rgb], dim=-2).gather(-2, order[..., None].expand(*order.shape, 3))
    return composite_along_rays(rgb, density, distances, rays, background)


def points_along(rays: Rays, distances: Tensor) -> Tensor:
    """World points (B, N, S, 3) at `distances` (B, N, S)."""
    return rays.origins[:, :, None] + distances[..., None] * rays.directions[:, :, None]
