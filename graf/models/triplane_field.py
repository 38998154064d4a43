"""The tri-plane field: features on three planes, looked up where a point projects, and a small decoder (EG3D).

Chan et al., "Efficient geometry-aware 3D generative adversarial networks" (CVPR 2022), section 4. A point reads three
feature vectors instead of running a deep network, so that a render costs a fraction of the MLP field's, and detail is
stored where it is instead of being composed out of waves: the first sharp pictures come after minutes.

The planes come from a table with one set for each class, or from a network that makes them of the shape code
(plane_sources.py). The decoder has one hidden layer, whose input the shape code scales and shifts (FiLM, Perez et al.
2018). A colour is a mixture of components, c(p, d) = tanh(sum_k m_k(d) c_k(p)): the components depend on the point, the
mixture on the ray's direction and the appearance code (FastNeRF, Garbin et al. 2021, eq. 3). Only that little product
is computed for each pair of both; whatever depends on the code alone is folded into the decoder's weights once per
image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from graf.base.tensors import TensorBatch
from graf.models.encoding import encoding_size, positional_encoding
from graf.models.field import FieldShape, RadianceField
from graf.models.plane_decoder import decode
from graf.models.plane_lookup import sample_planes
from graf.models.plane_sources import PlaneShape, PlaneSynthesis, PlaneTable
from graf.runtime.amp import at_least_float32, float32_region

#: the values of nerf.planes
PLANE_SOURCES: dict[str, Callable[[PlaneShape], nn.Module]] = {"table": PlaneTable, "synthesis": PlaneSynthesis}


@dataclass(frozen=True, kw_only=True)
class TriplaneShape(FieldShape):
    """Sizes of :class:`TriplaneField`.

    planes: "table" or "synthesis", the latter with layers of synthesis_width; plane_resolution^2 features of
    plane_channels numbers on each plane, which cover [-extent, extent] on both axes; decoder_width: its hidden units;
    colour_components: those that directions and appearance mix, besides one that is always there.
    """

    planes: str
    plane_resolution: int
    plane_channels: int
    synthesis_width: int
    decoder_width: int
    colour_components: int
    extent: float


@dataclass(frozen=True)
class TriplaneCodes(TensorBatch):
    """What :meth:`TriplaneField.prepare` makes of latent codes and classes, float32.

    planes: (B, 3, channels, resolution, resolution); weight (B, width, channels) and bias (B, 1, width): the hidden
    layer with the shape code in it; head (B, 1 + 3 M, width) and head_bias (B, 1, 1 + 3 M): raw density, and red, green
    and blue of M components; mixture (B, 1, M): their weights, as far as the appearance code decides them. Without view
    directions that is all, and the M components have been mixed into one.
    """

    planes: Tensor
    weight: Tensor
    bias: Tensor
    head: Tensor
    head_bias: Tensor
    mixture: Tensor


class TriplaneField(RadianceField):
    """Radiance and density of points from three planes of features, conditioned on shape, appearance and class."""

    def __init__(self, shape: TriplaneShape) -> None:
        super().__init__()
        self.shape = shape
        self.dim_shape, self.dim_appearance = shape.dim_shape, shape.dim_appearance
        channels, width = shape.plane_channels, shape.decoder_width
        self.planes = PLANE_SOURCES[shape.planes](
            PlaneShape(shape.plane_resolution, channels, shape.synthesis_width, shape.dim_shape, shape.num_classes)
        )
        self.modulation = nn.Linear(shape.dim_shape, 2 * channels, bias=False)
        self.hidden = nn.Linear(channels, width)
        self.raw_density = nn.Linear(width, 1)
        self.components = nn.Linear(width, 3 * (1 + shape.colour_components))
        mixture = nn.Linear(width, shape.colour_components, bias=False)
        self.appearance = nn.Sequential(nn.Linear(shape.dim_appearance, width), nn.LeakyReLU(0.2), mixture)
        if shape.use_viewdirs:
            self.view_directions = nn.Linear(encoding_size(shape.multires_views), shape.colour_components)
        for layer in (self.modulation, mixture):  # a new field shows every code the same object
            nn.init.zeros_(layer.weight)

    def prepare(self, z: Tensor, class_idx: Tensor) -> TriplaneCodes:
        """The planes of z (B, dim_shape + dim_appearance) and the classes class_idx (B,), and the decoder of z."""
        batch, width = z.shape[0], self.shape.decoder_width  # len() would fix torch.export's batch
        shape_code, appearance_code = z.split([self.dim_shape, self.dim_appearance], dim=1)
        planes = self.planes(shape_code, class_idx)  # in a precision of their source's choice
        with float32_region(z.device.type):
            scale, shift = self.modulation(shape_code)[:, None].chunk(2, dim=-1)
            mixture = functional.pad(self.appearance(appearance_code)[:, None], (1, 0), value=1.0)
            colours, colour_bias = self.components.weight.view(1, 3, -1, width), self.components.bias.view(1, 3, -1)
            if not self.shape.use_viewdirs:  # one mixture for all rays of an image
                colours = (mixture[..., None] * colours).sum(2, keepdim=True)
                colour_bias = (mixture * colour_bias).sum(2, keepdim=True)
            return TriplaneCodes(
                planes=planes,
                weight=self.hidden.weight * (1 + scale),
                bias=functional.linear(shift, self.hidden.weight, self.hidden.bias),
                head=_stack_head(self.raw_density.weight, colours, batch),
                head_bias=_stack_head(self.raw_density.bias[:, None], colour_bias[..., None], batch).mT,
                mixture=mixture,
            )

    def point_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the view directions; everything else is in the codes."""
        return self.view_directions.parameters() if self.shape.use_viewdirs else iter(())

    def forward(
        self, points: Tensor, directions: Tensor, codes: TriplaneCodes, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As the protocol says; float64 for float64 points and weights."""
        batch, rays, samples, _ = points.shape
        outputs = self._decode(points, codes, codes.head, codes.head_bias)
        raw, colours = outputs.split([1, outputs.shape[-1] - 1], dim=-1)
        if self.shape.use_viewdirs:
            encoded = positional_encoding(directions, self.shape.multires_views, self.shape.base_frequency)
            mixture = codes.mixture + functional.pad(self.view_directions(encoded), (1, 0))
            colours = colours.reshape(batch * rays, samples * 3, -1) @ mixture.view(batch * rays, -1, 1)
        # contiguous: read through strides, a tanh takes ten times as long
        rgb = torch.tanh(at_least_float32(colours).reshape(batch, rays, samples, 3).contiguous())
        return rgb, self.shape.density(at_least_float32(raw).view(batch, rays, samples), points, noise)

    def density(self, points: Tensor, codes: TriplaneCodes) -> Tensor:
        """The density (B, N, S) of points (B, N, S, 3), without computing colours."""
        raw = self._decode(points, codes, codes.head[:, :1], codes.head_bias[..., :1])
        return self.shape.density(at_least_float32(raw).view(points.shape[:3]), points)

    def _decode(self, points: Tensor, codes: TriplaneCodes, head: Tensor, head_bias: Tensor) -> Tensor:
        """What rows of the head say of points (B, N, S, 3): (B, N S, rows)."""
        features = sample_planes(codes.planes, points.flatten(1, 2) / self.shape.extent)
        return decode(features, codes.weight, codes.bias, head, head_bias)


def _stack_head(density: Tensor, colours: Tensor, batch: int) -> Tensor:
    """Rows (B, 1 + 3 M, width) of density (1, width) and of colours (1 or B, 3, M, width), red first."""
    rows = [density[None].expand(batch, -1, -1), colours.flatten(1, 2).expand(batch, -1, -1)]
    return torch.cat(rows, dim=1)
