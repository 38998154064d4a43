"""Random numbers of rendered rays, made for each chunk of rays from the keys of its images and kept nowhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from graf.base.tensors import TensorBatch
from graf.geometry.volume_rendering import RayNoise, RaySampling
from graf.runtime.randomness import draw_normal, draw_uniform


@dataclass(frozen=True)
class RayNoiseKeys(TensorBatch):
    """A :class:`graf.geometry.volume_rendering.NoiseSource`: numbers of ray r depend on its image's keys and r alone.

    jitter, importance_jitter, density: keys (B, 2) of graf.runtime.randomness, None for no such noise; density_std: the
    standard deviation of the noise on the raw density.
    """

    jitter: Tensor | None = None
    importance_jitter: Tensor | None = None
    density: Tensor | None = None
    density_std: float = 0.0

    def of_rays(self, start: int, stop: int, sampling: RaySampling) -> RayNoise:
        """The numbers of the rays start..stop of every image."""
        rays = range(start, stop)
        density = _draw(draw_normal, self.density, rays, sampling.total)
        return RayNoise(
            jitter=_draw(draw_uniform, self.jitter, rays, sampling.coarse),
            importance_jitter=_draw(draw_uniform, self.importance_jitter, rays, sampling.importance),
            density=None if density is None else density * self.density_std,
        )


def _draw(draw: Callable[[Tensor, int, int], Tensor], keys: Tensor | None, rays: range, samples: int) -> Tensor | None:
    if keys is None or not samples:
        return None
    return draw(keys, len(rays) * samples, rays.start * samples).reshape(len(keys), len(rays), samples)
