"""The SIREN field: layers of sines whose frequencies and phases the shape code sets (pi-GAN, Chan et al. 2021).

"pi-GAN: Periodic implicit generative adversarial networks" (CVPR 2021), section 3.2: h <- sin(gamma (W h + b) + beta),
with gamma and beta of each layer from a mapping network (FiLM, Perez et al. 2018). The first layer takes points as they
are, for the sines are an encoding that training chooses. gamma and beta do not depend on the point, so they are folded
into the layers' weights and biases once per image, which leaves one product and one sine a layer.

Colour depends on the last layer, view direction and appearance code as in the MLP field, and the class acts through an
embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from graf.base.tensors import TensorBatch
from graf.models.encoding import encoding_size, positional_encoding
from graf.models.field import FieldShape, RadianceField
from graf.models.linear_relu import linear_relu
from graf.runtime.amp import at_least_float32, float32_region

#: gamma = FREQUENCY + FREQUENCY_RANGE times what the mapping network says (pi-GAN's published code)
FREQUENCY, FREQUENCY_RANGE = 30, 15


@dataclass(frozen=True, kw_only=True)
class SirenShape(FieldShape):
    """Sizes of :class:`SirenField`: depth x width, its layers of sines; dim_class, length of the class embedding."""

    depth: int
    width: int
    dim_class: int


@dataclass(frozen=True)
class SirenCodes(TensorBatch):
    """What :meth:`SirenField.prepare` makes of latent codes and classes, float32.

    first: (B, width, 3) and trunk: (B, depth - 1, width, width), gamma W of the layers; phases: (B, depth, 1, width),
    their gamma b + beta; view: (B, 1, half width), the appearance code's share of the view layer with its bias.
    """

    first: Tensor
    trunk: Tensor
    phases: Tensor
    view: Tensor


class SirenField(RadianceField):
    """Radiance and density of points out of sines, conditioned on shape code, appearance code and class."""

    def __init__(self, shape: SirenShape) -> None:
        super().__init__()
        self.shape = shape
        self.dim_shape, self.dim_appearance = shape.dim_shape, shape.dim_appearance
        depth, width, half = shape.depth, shape.width, shape.width // 2
        self.class_embedding = nn.Embedding(shape.num_classes, shape.dim_class)
        self.mapping = nn.Sequential(
            *(nn.Linear(shape.dim_shape + shape.dim_class, width), nn.LeakyReLU(0.2)),
            *(nn.Linear(width, width), nn.LeakyReLU(0.2)),
            nn.Linear(width, 2 * depth * width),
        )
        self.first = nn.Parameter(torch.empty(width, 3))
        self.trunk = nn.Parameter(torch.empty(depth - 1, width, width))
        self.bias = nn.Parameter(torch.empty(depth, width))
        self.raw_density = nn.Linear(width, 1)
        self.view = nn.Linear(width, half)
        self.view_codes = nn.Linear(shape.dim_appearance + shape.dim_class, half, bias=False)
        if shape.use_viewdirs:
            self.view_directions = nn.Linear(encoding_size(shape.multires_views), half, bias=False)
        self.rgb = nn.Linear(half, 3)
        self._initialise()

    def _initialise(self) -> None:
        """As published: SIREN's law for arguments of sines (Sitzmann et al. 2020, section 3.2), codes that act little.

        The first layer's frequencies are up to FREQUENCY / 3 radians per unit of length on each axis.
        """
        width = self.shape.width
        for weight, bound in ((self.first, 1 / 3), (self.trunk, math.sqrt(6 / width) / 25)):
            nn.init.uniform_(weight, -bound, bound)
        for bias, fan_in in zip(self.bias.unbind(), [3] + [width] * (self.shape.depth - 1), strict=True):
            nn.init.uniform_(bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        with torch.no_grad():
            cast(nn.Linear, self.mapping[-1]).weight.mul_(0.25)

    def prepare(self, z: Tensor, class_idx: Tensor) -> SirenCodes:
        """The layers of z (B, dim_shape + dim_appearance) and the classes class_idx (B,) int64."""
        with float32_region(z.device.type):
            shape_code, appearance_code = z.split([self.dim_shape, self.dim_appearance], dim=1)
            embedding = self.class_embedding(class_idx)
            mapped = self.mapping(torch.cat([shape_code, embedding], dim=1)).view(z.shape[0], 2, self.shape.depth, -1)
            gamma = FREQUENCY + FREQUENCY_RANGE * mapped[:, 0]
            view = self.view_codes(torch.cat([appearance_code, embedding], dim=1)) + self.view.bias
            return SirenCodes(
                first=gamma[:, 0, :, None] * self.first,
                trunk=gamma[:, 1:, :, None] * self.trunk,
                phases=(gamma * self.bias + mapped[:, 1])[:, :, None],
                view=view[:, None],
            )

    def point_parameters(self) -> Iterator[nn.Parameter]:
        """Those behind the layers of sines, which are in the codes."""
        layers = [self.raw_density, self.view, self.rgb] + ([self.view_directions] if self.shape.use_viewdirs else [])
        return (parameter for layer in layers for parameter in layer.parameters())

    def forward(
        self, points: Tensor, directions: Tensor, codes: SirenCodes, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As the protocol says; float64 for float64 points and weights."""
        hidden, density = self._run_trunk(points, codes, noise)
        per_ray = codes.view
        if self.shape.use_viewdirs:
            encoded = positional_encoding(directions, self.shape.multires_views, self.shape.base_frequency)
            per_ray = per_ray + self.view_directions(encoded)
        colour = linear_relu(hidden.view(*points.shape[:3], -1), self.view.weight, per_ray[:, :, None])
        return torch.tanh(at_least_float32(self.rgb(colour))), density

    def density(self, points: Tensor, codes: SirenCodes) -> Tensor:
        """The density (B, N, S) of points (B, N, S, 3), without computing colours."""
        return self._run_trunk(points, codes, None)[1]

    def _run_trunk(self, points: Tensor, codes: SirenCodes, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """The last layer of sines (B, N S, width) and the density (B, N, S)."""
        with float32_region(points.device.type):  # half precision would round the first angles to a tenth of a radian
            angles = torch.baddbmm(codes.phases[:, 0], at_least_float32(points).flatten(1, 2), codes.first.mT)
        hidden = torch.sin(angles)
        for weight, phase in zip(codes.trunk.unbind(1), codes.phases[:, 1:].unbind(1), strict=True):
            hidden = torch.sin(torch.baddbmm(phase, hidden, weight.mT))
        raw = at_least_float32(self.raw_density(hidden)).view(points.shape[:3])
        return hidden, self.shape.density(raw, points, noise)
