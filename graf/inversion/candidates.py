"""Hypotheses of inversion, an object and a camera each, and how they are rendered with gradients to both."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graf.base.tensors import TensorBatch
from graf.evaluation.renderer import Renderer
from graf.geometry.rays import Patches, Rays
from graf.geometry.volume_rendering import RaySampling, Render
from graf.models.generator import Generator


@dataclass(frozen=True)
class Candidates(TensorBatch):
    """B objects seen by a camera each.

    class_idx (B,) int64; code (B, dim_z): z divided by the truncation; azimuth u (B,), in turns and not wrapped;
    elevation (B,), radians above the horizon; log_distance (B,): log of the camera's distance over the run's own.
    """

    class_idx: Tensor
    code: Tensor
    u: Tensor
    elevation: Tensor
    log_distance: Tensor

    def parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is optimised: code, azimuth, elevation, distance."""
        return self.code, self.u, self.elevation, self.log_distance

    def leaves(self) -> Candidates:
        """A copy whose parameters are leaves that want gradients."""
        return Candidates(self.class_idx, *(part.detach().clone().requires_grad_() for part in self.parameters()))

    def degrees(self) -> Tensor:
        """Azimuths (B,) in [0, 360)."""
        return torch.remainder(360 * self.u.detach(), 360)

    def turned(self, degrees: float) -> Candidates:
        """The same objects from cameras turned around them."""
        return replace(self, u=self.u + degrees / 360)


def shrink_activations(generator: Generator) -> str | None:
    """Have a generator keep fewer activations, then fewer rays at once; returns what was done, None: nothing."""
    if generator.strategy == "dense":
        generator.strategy = "checkpoint"
        return "activations are computed again instead of kept"
    return generator.halve_chunk()


def cast_candidates(renderer: Renderer, candidates: Candidates, places: Tensor) -> Rays:
    """Rays through places (B, ..., 2) of the image planes of the candidates' cameras."""
    v = (1 - torch.sin(candidates.elevation)) / 2
    radius = renderer.cameras.radius * torch.exp(candidates.log_distance)
    views = renderer.cameras.views_at(candidates.class_idx, candidates.u, v, radius)
    poses, whole = renderer.generator.aim(views, Patches.whole(len(v), v.device))
    grid = whole.centre[:, None] + whole.scale[:, None, None] * places.reshape(len(v), -1, 2)
    casters = renderer.casters_at(poses)
    return Rays.cat([caster.cast(poses[i : i + 1], grid[i : i + 1]) for i, caster in enumerate(casters)])


def render_candidates(
    renderer: Renderer, candidates: Candidates, places: Tensor, truncation: float, sampling: RaySampling | None = None
) -> Render:
    """Images (B, ., H, H) of the candidates at places (H, H, 2), the same for all; sampling: by default training's."""
    rays = cast_candidates(renderer, candidates, places[None].expand(len(candidates), -1, -1, -1))
    with renderer.precision.autocast():
        return renderer.generator(
            truncation * candidates.code, candidates.class_idx, rays, sampling=sampling
        ).as_images()
