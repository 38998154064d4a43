"""The generator: latent code, class and rays in; colour, depth and opacity out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graf.geometry.rays import Rays
from graf.geometry.volume_rendering import RayColours, RayNoise, RaySampling, render_rays
from graf.models.field import ConditionalField, FieldCodes, FieldShape

BACKGROUNDS = {"white": 1.0, "black": -1.0}


class Generator(nn.Module):
    """A conditional radiance field seen through a volume renderer.

    background: "white" or "black"; with learn_background it is where one colour for the whole collection starts.
    chunk: rays rendered at once, counted over all images of the batch; smaller costs time, larger costs memory.
    """

    def __init__(
        self,
        shape: FieldShape,
        sampling: RaySampling,
        background: str = "white",
        learn_background: bool = False,
        chunk: int = 4096,
    ) -> None:
        super().__init__()
        if background not in BACKGROUNDS:
            raise ValueError(f"background={background!r}: expected one of {', '.join(BACKGROUNDS)}")
        self.field = ConditionalField(shape)
        self.sampling = sampling
        self.chunk = chunk
        colour = torch.full((3,), BACKGROUNDS[background])
        if learn_background:
            self.background = nn.Parameter(colour)
        else:
            self.register_buffer("background", colour)

    @property
    def dim_z(self) -> int:
        """Length of the latent code: shape code first, then appearance code."""
        return self.field.shape.dim_shape + self.field.shape.dim_appearance

    def forward(self, z: Tensor, class_idx: Tensor, rays: Rays, noise: RayNoise | None = None) -> RayColours:
        """Render `rays` (B x N) of the objects z (B, dim_z) of class class_idx (B,), int64.

        Without `noise` samples sit in the middle of their bins and nothing is added to the density. Returns float32
        rgb (B, N, 3) in [-1, 1], z-depth (B, N, 1) and opacity (B, N, 1).
        """
        codes = self.field.prepare(z, class_idx)
        noise = RayNoise() if noise is None else noise
        step = max(1, self.chunk // len(z))
        chunks = [
            self.render_chunk(codes, rays.slice(start, start + step), noise.slice(start, start + step))
            for start in range(0, len(rays), step)
        ]
        if len(chunks) == 1:
            return chunks[0]
        return RayColours(*(torch.cat(parts, dim=1) for parts in zip(*map(_parts, chunks), strict=True)))

    def render_chunk(self, codes: FieldCodes, rays: Rays, noise: RayNoise) -> RayColours:
        """Render one chunk of rays with latents that `field.prepare` has already projected."""

        def field(points: Tensor, directions: Tensor, density_noise: Tensor | None) -> tuple[Tensor, Tensor]:
            return self.field(points, directions, codes, density_noise)

        return render_rays(field, rays, self.sampling, noise, self.background)


def _parts(colours: RayColours) -> tuple[Tensor, Tensor, Tensor]:
    return colours.rgb, colours.depth, colours.opacity


def rays_to_image(values: Tensor, size: int) -> Tensor:
    """(B, size * size, C) of a square grid of rays -> (B, C, size, size)."""
    return values.transpose(1, 2).reshape(values.shape[0], -1, size, size)
