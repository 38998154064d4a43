"""Generated images from a generator, seeds and cameras: in eval mode, without a graph, in bounded memory, delivered on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graf.data.views import ViewPool, Views
from graf.geometry.rays import RayCaster
from graf.models.generator import Generator, rays_to_image
from graf.runtime.amp import Precision
from graf.runtime.seeding import Draws


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside, the former mode of every submodule afterwards."""
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@dataclass(frozen=True)
class Renders:
    """Images on the CPU: rgb (B, 3, H, W) in [-1, 1], z-depth (B, 1, H, W) and opacity (B, 1, H, W) in [0, 1]."""

    rgb: Tensor
    depth: Tensor
    opacity: Tensor


@dataclass(frozen=True)
class Sampler:
    """Renders views of objects. `resolution`: side of the images, pixels; `uniform_z`: the law of the codes."""

    generator: Generator
    caster: RayCaster
    precision: Precision
    device: torch.device
    resolution: int
    uniform_z: bool = False

    def codes(self, seed: int, indices: range) -> Tensor:
        """Codes z (len(indices), dim_z): row i depends on (seed, indices[i]) alone."""
        draws = Draws(seed, 0, indices)
        dim_z = self.generator.dim_z
        return draws.uniform("sample/z", dim_z) * 2 - 1 if self.uniform_z else draws.normal("sample/z", dim_z)

    def render(self, z: Tensor, views: Views) -> Renders:
        """Render each z (B, dim_z) from its view (B); one image at a time on the device, rays in chunks."""
        with eval_mode(self.generator):
            images = [self._render_one(z[i : i + 1], views.images(i, i + 1)) for i in range(len(views))]
        return Renders(*(torch.cat(parts) for parts in zip(*images, strict=True)))

    def render_random(self, pool: ViewPool, seed: int, indices: range) -> Tensor:
        """rgb of random objects from random views of the pool; image i depends on (seed, indices[i]) alone."""
        views = pool.pick(Draws(seed, 0, indices).uniform("sample/view", 3))
        return self.render(self.codes(seed, indices), views).rgb

    def _render_one(self, z: Tensor, view: Views) -> tuple[Tensor, Tensor, Tensor]:
        view = view.to(self.device)
        rays = self.caster.cast_images(view.poses, self.resolution)
        with self.precision.autocast():
            colours = self.generator(z.to(self.device), view.class_idx, rays)
        parts = (colours.rgb, colours.depth, colours.opacity)
        rgb, depth, opacity = (rays_to_image(part.float(), self.resolution).cpu() for part in parts)
        return rgb.clamp(-1, 1), depth, opacity
