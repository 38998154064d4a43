"""Where the features of a tri-plane field's planes come from: a table of them, or a network that makes them of a code.

Both map shape codes (B, dim_shape) and class indices (B,) to planes (B, 3, channels, resolution, resolution), float32
and laid out in memory as they are looked up (plane_lookup.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from graf.models.plane_lookup import arrange_planes
from graf.runtime.amp import float32_region, product_dtype
from graf.runtime.device import for_convolution

#: Planes are stored at this share of their value: a step of Adam, which is as long as the learning rate, then moves
#: features ten times as far as the decoder's weights, which was better than three times on toys and photographs.
STORED_SHARE = 0.1
#: standard deviation of the features of a new field
INITIAL_STD = 0.1
#: side of the constant that the synthesis starts from
SMALLEST_SIDE = 8


@dataclass(frozen=True)
class PlaneShape:
    """resolution^2 features of `channels` numbers on each of three planes, for codes and classes of these sizes.

    width: channels of the synthesis at its two finest sides, half as many as below, and units of its mapping network.
    """

    resolution: int
    channels: int
    width: int
    dim_shape: int
    num_classes: int


class PlaneTable(nn.Module):
    """One set of planes for each class, whatever the code."""

    def __init__(self, shape: PlaneShape) -> None:
        super().__init__()
        size = shape.resolution
        std = INITIAL_STD * STORED_SHARE
        self.stored = nn.Parameter(std * torch.randn(shape.num_classes, 3, shape.channels, size, size))

    def forward(self, shape_code: Tensor, class_idx: Tensor) -> Tensor:
        return arrange_planes(self.stored_planes(class_idx) * (1 / STORED_SHARE))

    def stored_planes(self, class_idx: Tensor) -> Tensor:
        """The classes' planes (B, 3, channels, resolution, resolution) at the share at which they are stored."""
        # not stored[class_idx], whose backward pass adds number by number and takes ten times as long
        return functional.embedding(class_idx, self.stored.flatten(1)).unflatten(1, self.stored.shape[1:])


class PlaneSynthesis(nn.Module):
    """A class's table of planes plus what a small convolutional network makes of the code (EG3D, EpiGRAF).

    The network is StyleGAN2's in small (Karras et al., CVPR 2020, section 2): a mapping network turns code and class
    into a style; from a constant, layers of convolutions that the style modulates double the side up to the planes'.
    The table holds what the objects of a class share, so that the network, which begins with nothing, has to make
    their differences only.
    """

    def __init__(self, shape: PlaneShape) -> None:
        super().__init__()
        self.shape, width = shape, shape.width
        self.table = PlaneTable(shape)
        self.class_embedding = nn.Embedding(shape.num_classes, width)
        self.mapping = nn.Sequential(
            ScaledLinear(shape.dim_shape + width, 2 * width),
            nn.LeakyReLU(0.2),
            ScaledLinear(2 * width, 2 * width),
            nn.LeakyReLU(0.2),
        )
        sides = [shape.resolution]
        while sides[0] > SMALLEST_SIDE:
            sides.insert(0, -(-sides[0] // 2))
        self.sides = sides
        channels = [2 * width if 2 * side < shape.resolution else width for side in sides]
        self.constant = nn.Parameter(torch.randn(1, channels[0], sides[0], sides[0]))
        inputs = [channels[0], *channels[:-1]]
        self.layers = nn.ModuleList(
            ModulatedConvolution(inside, outside, 3, 2 * width)
            for inside, outside in zip(inputs, channels, strict=True)
        )
        self.output = nn.Parameter(torch.zeros(3 * shape.channels, width, 1, 1))

    def forward(self, shape_code: Tensor, class_idx: Tensor) -> Tensor:
        dtype = product_dtype(shape_code)
        if dtype is torch.float16:  # sums over scaled channels could be too large for it
            dtype = torch.float32
        with float32_region(shape_code.device.type):
            style = self.mapping(torch.cat([shape_code, self.class_embedding(class_idx)], dim=1))
            hidden = for_convolution(self.constant, dtype).expand(style.shape[0], -1, -1, -1)
            for side, layer in zip(self.sides, self.layers, strict=True):
                if hidden.shape[-1] != side:
                    hidden = functional.interpolate(hidden, size=(side, side), mode="bilinear")
                hidden = functional.leaky_relu_(layer(hidden, style), 0.2)
            made = functional.conv2d(hidden, (self.output / math.sqrt(self.shape.width)).to(dtype))
            shared = self.table.stored_planes(class_idx)
            # what is made lies in memory as planes are looked up on a CPU, and the sum with it
            return arrange_planes(made.to(shared.dtype).view(shared.shape).add(shared, alpha=1 / STORED_SHARE))


class ScaledLinear(nn.Linear):
    """A linear layer whose stored weights are standard normal, whatever its width (ProGAN, Karras et al., ICLR 2018).

    Adam's steps are then small beside every weight; as they stand, weights of a wide layer would change by a tenth.
    """

    def __init__(self, inside: int, outside: int, bias: float = 0.0) -> None:
        super().__init__(inside, outside)
        nn.init.normal_(self.weight)
        nn.init.constant_(self.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight / math.sqrt(self.in_features), self.bias)


class ModulatedConvolution(nn.Module):
    """A convolution whose input channels a style scales, with output of unit variance (StyleGAN2, eq. 1 and 3).

    Scaling the activations instead of the weights gives the same and lets a batch share one convolution. Weights are
    stored as in :class:`ScaledLinear`.
    """

    def __init__(self, inside: int, outside: int, size: int, dim_style: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outside, inside, size, size))
        self.bias = nn.Parameter(torch.zeros(outside))
        self.style = ScaledLinear(dim_style, inside, bias=1.0)

    def forward(self, images: Tensor, style: Tensor) -> Tensor:
        scale = self.style(style)
        variance = scale.square() @ self.weight.square().sum((2, 3)).T
        normal = torch.rsqrt(variance + 1e-8)[:, :, None, None]
        padding, dtype = self.weight.shape[-1] // 2, images.dtype
        weight = for_convolution(self.weight, dtype)
        output = functional.conv2d(images * scale[:, :, None, None].to(dtype), weight, padding=padding)
        return torch.addcmul(self.bias[:, None, None].to(dtype), output, normal.to(dtype))
