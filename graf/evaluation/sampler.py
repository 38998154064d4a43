"""Images from a generator, seeds and cameras: in eval mode, without a graph, in bounded memory, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from graf.geometry.rays import Patches, RayCaster
from graf.geometry.views import NUM_UNIFORMS as NUM_VIEW_UNIFORMS
from graf.geometry.views import PoseSampler, Views
from graf.geometry.volume_rendering import RayColours, RaySampling
from graf.models.ccsr import CCSR
from graf.models.generator import Generator, rays_to_image
from graf.runtime.amp import Precision
from graf.runtime.memory import retry_smaller
from graf.runtime.randomness import Draws

#: pixels of super-resolved output that the trunk works on at once, besides borders: 1024 x 1024
STRIP_PIXELS = 2**20


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
    """Images on the CPU: rgb (B, 3, H, W), z-depth (B, 1, H, W) and opacity (B, 1, H, W) in [0, 1].

    sr: (B, 3, s H, s W), super-resolved, where that was asked for. CCSR's projection may leave [-1, 1]: clip its
    colours before they are shown.
    """

    rgb: Tensor
    depth: Tensor
    opacity: Tensor
    sr: Tensor | None = None

    @classmethod
    def join(cls, parts: Sequence[Renders]) -> Renders:
        """All images of several renders, in order."""
        sr = [part.sr for part in parts if part.sr is not None]
        return cls(
            torch.cat([part.rgb for part in parts]),
            torch.cat([part.depth for part in parts]),
            torch.cat([part.opacity for part in parts]),
            torch.cat(sr) if sr else None,
        )


@dataclass(frozen=True)
class Sampler:
    """Renders views of objects. `resolution`: side of the images, pixels; `uniform_z`: uniform codes, else normal.

    ccsr: super-resolves the renders on request; sampling: samples per ray, None for as many as in training.
    """

    generator: Generator
    caster: RayCaster
    precision: Precision
    device: torch.device
    resolution: int
    uniform_z: bool = False
    ccsr: CCSR | None = None
    sampling: RaySampling | None = None

    def codes(self, seed: int, indices: range) -> Tensor:
        """Codes z (len(indices), dim_z): row i depends on (seed, indices[i]) alone."""
        draws = Draws(seed, 0, indices)
        dim_z = self.generator.dim_z
        return draws.uniform("sample/z", dim_z) * 2 - 1 if self.uniform_z else draws.normal("sample/z", dim_z)

    def render(self, z: Tensor, views: Views, super_resolve: bool = False) -> Renders:
        """Render each z (B, dim_z) from its view (B); one image at a time on the device, rays in chunks."""
        with eval_mode(self.generator):
            return Renders.join(
                [self._render_one(z[i : i + 1], views.images(i, i + 1), super_resolve) for i in range(len(views))]
            )

    def render_random(
        self, pose_sampler: PoseSampler, seed: int, indices: range, super_resolve: bool = False
    ) -> Renders:
        """Random objects from random views of the sampler; image i depends on (seed, indices[i]) alone."""
        views = pose_sampler.pick(Draws(seed, 0, indices).uniform("sample/view", NUM_VIEW_UNIFORMS))
        return self.render(self.codes(seed, indices), views, super_resolve)

    def _render_one(self, z: Tensor, view: Views, super_resolve: bool) -> Renders:
        """One image; where memory runs out, with fewer rays or rows at once, now and from then on."""
        if super_resolve and self.ccsr is None:
            raise ValueError("this run has no super-resolution; train one with ccsr.enabled=true")
        view = view.to(self.device)
        colours = retry_smaller(
            lambda: self._cast(z, view), self.generator.halve_chunk, self.device, "lower --resolution or data.imsize"
        )
        parts = (colours.rgb, colours.depth, colours.opacity)
        rgb, depth, opacity = (rays_to_image(part.float(), self.resolution) for part in parts)
        sr = None
        if super_resolve and self.ccsr is not None:
            halve = partial(self.ccsr.halve_rows, self.resolution)
            advice = "lower --resolution, or ccsr.features and ccsr.blocks of the next run"
            sr = retry_smaller(lambda: self._super_resolve(rgb, view), halve, self.device, advice)
        return Renders(rgb.cpu(), depth.cpu(), opacity.cpu(), sr)

    def _cast(self, z: Tensor, view: Views) -> RayColours:
        rays = self.caster.cast_images(view.poses, self.resolution)
        with self.precision.autocast():
            return self.generator(z.to(self.device), view.class_idx, rays, sampling=self.sampling)

    def _super_resolve(self, rgb: Tensor, view: Views) -> Tensor:
        assert self.ccsr is not None
        # A CPU that runs out of memory kills instead of raising an error that could be answered with fewer rows.
        rows = max(1, STRIP_PIXELS // (self.ccsr.scale**2 * rgb.shape[-1]))
        self.ccsr.rows = min(self.ccsr.rows or rows, rows)
        with eval_mode(self.ccsr), self.precision.autocast():
            return self.ccsr(rgb, view.labels[:, 2], Patches.whole(len(rgb), rgb.device)).image.float().cpu()
