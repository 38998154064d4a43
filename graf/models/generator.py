"""The generator: latent code, class and rays in; colour, depth and opacity out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graf.geometry.rays import Rays
from graf.geometry.volume_rendering import RayColours, RayNoise, RaySampling, render_rays
from graf.models.field import ConditionalField, FieldCodes, FieldShape
from graf.runtime.activation_checkpointing import evaluate_chunks

BACKGROUNDS = {"white": 1.0, "black": -1.0}
#: fewer rays at once save no memory that matters
SMALLEST_CHUNK = 64


class Generator(nn.Module):
    """A conditional radiance field seen through a volume renderer.

    background: "white" or "black"; with learn_background it is where one colour for the whole collection starts.
    chunk: rays rendered at once, counted over all images of the batch; strategy: which of their activations are kept
    for the backward pass, "dense" | "checkpoint" | "deferred" (graf.runtime.activation_checkpointing). Both may be
    changed at any time.
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
        self.strategy = "dense"
        colour = torch.full((3,), BACKGROUNDS[background])
        if learn_background:
            self.background = nn.Parameter(colour)
        else:
            self.register_buffer("background", colour)

    @property
    def dim_z(self) -> int:
        """Length of the latent code: shape code first, then appearance code."""
        return self.field.shape.dim_shape + self.field.shape.dim_appearance

    def halve_chunk(self) -> str | None:
        """Render half as many rays at once from now on; says what changed, None where that would no longer help."""
        before = self.chunk
        if before <= SMALLEST_CHUNK:
            return None
        self.chunk = max(SMALLEST_CHUNK, before // 2)
        return f"training.chunk {before} -> {self.chunk}"

    def forward(
        self,
        z: Tensor,
        class_idx: Tensor,
        rays: Rays,
        noise: RayNoise | None = None,
        sampling: RaySampling | None = None,
    ) -> RayColours:
        """Render `rays` (B x N) of the objects z (B, dim_z) of class class_idx (B,), int64.

        Without `noise` samples sit in the middle of their bins and nothing is added to the density; `sampling` takes
        another number of samples than in training. Returns float32 rgb (B, N, 3) in [-1, 1], z-depth (B, N, 1) and
        opacity (B, N, 1).
        """
        codes = self.field.prepare(z, class_idx)
        noise = RayNoise() if noise is None else noise
        sampling = self.sampling if sampling is None else sampling
        step = max(1, self.chunk // len(z))

        def render_chunk(number: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            start, stop = number * step, (number + 1) * step
            part, part_noise = rays.slice(start, stop), noise.slice(start, stop)
            return self._render(codes.with_tensors(tensors), part, part_noise, sampling)

        parameters = [*self.field.parameters(), self.background]
        outputs = evaluate_chunks(render_chunk, -(-len(rays) // step), codes.tensors, parameters, self.strategy)
        return RayColours(*outputs)

    def _render(self, codes: FieldCodes, rays: Rays, noise: RayNoise, sampling: RaySampling) -> tuple[Tensor, ...]:
        """Colour, depth and opacity of one chunk of rays."""

        def field(points: Tensor, directions: Tensor, density_noise: Tensor | None) -> tuple[Tensor, Tensor]:
            return self.field(points, directions, codes, density_noise)

        colours = render_rays(field, rays, sampling, noise, self.background)
        return colours.rgb, colours.depth, colours.opacity


def rays_to_image(values: Tensor, size: int) -> Tensor:
    """(B, size * size, C) of a square grid of rays -> (B, C, size, size)."""
    return values.transpose(1, 2).reshape(values.shape[0], -1, size, size)
