"""The MLP field: GRAF's network (Schwarz et al. 2020, section 3.1), with nothing constant recomputed.

The plain network concatenates [encoded point; shape code] for its trunk and [feature; encoded view direction;
appearance code] for its colour branch, and so multiplies the codes at every point. A linear layer splits over a
concatenation, W [x; z] + b = W_x x + (W_z z + b): here the code's share is computed once per image and the view
direction's once per ray, which gives the same function and the same gradients (tested) for about half the work.
`feature_linear`, which no non-linearity separates from the view layer, is folded into it for the same reason.

The field is conditioned on the class through an embedding and on nothing else of the label: height and angle act
through the camera alone, otherwise the field could paint each view separately and would not be 3D.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from graf.base.tensors import SHARED, TensorBatch
from graf.models.encoding import encoding_size, positional_encoding
from graf.models.field import FieldShape, RadianceField
from graf.models.linear_relu import PackedWeights, linear_relu
from graf.models.occupied_points import number_occupied, pick, place
from graf.runtime.amp import at_least_float32, float32_region, product_dtype
from graf.runtime.torch_release import is_exporting


@dataclass(frozen=True, kw_only=True)
class MLPShape(FieldShape):
    """Sizes of :class:`MLPField`.

    depth x width: the density trunk; `skip`: the layer that sees the input again (GRAF: 5 of 8, counted from 0).
    multires: octaves of the positional encoding of points; dim_class: length of the class embedding.
    """

    depth: int
    width: int
    multires: int
    dim_class: int

    @property
    def skip(self) -> int | None:
        """Index of the layer whose input is joined by the encoded point and shape code again."""
        return self.depth // 2 + 1 if self.depth >= 4 else None


@dataclass(frozen=True)
class MLPCodes(TensorBatch):
    """What :meth:`MLPField.prepare` makes of latent codes and classes, float32.

    trunk_in, trunk_skip, view: each (B, 1, width of its layer), the latents' shares with the layer's bias.
    view_weight: (half width, width), `feature_linear` folded into the view layer, the same for all images.
    packed: the field's weights as products read them, filled in as they are used.
    """

    trunk_in: Tensor
    trunk_skip: Tensor | None
    view: Tensor
    view_weight: Tensor = field(metadata=SHARED)
    packed: PackedWeights | None = None


class MLPField(RadianceField):
    """Radiance and density of points, conditioned on shape code, appearance code and class."""

    def __init__(self, shape: MLPShape) -> None:
        super().__init__()
        self.shape = shape
        self.dim_shape, self.dim_appearance = shape.dim_shape, shape.dim_appearance
        points, directions = encoding_size(shape.multires), encoding_size(shape.multires_views)
        codes = shape.dim_shape + shape.dim_class
        width, half = shape.width, shape.width // 2
        self.class_embedding = nn.Embedding(shape.num_classes, shape.dim_class)
        self.trunk_in = nn.Linear(points, width)
        self.trunk_in_codes = nn.Linear(codes, width, bias=False)
        self.trunk = nn.ModuleList(nn.Linear(width, width) for _ in range(shape.depth - 1))
        if shape.skip is not None:
            self.trunk_skip = nn.Linear(points, width, bias=False)
            self.trunk_skip_codes = nn.Linear(codes, width, bias=False)
        self.raw_density = nn.Linear(width, 1)
        self.feature_linear = nn.Linear(width, width)
        self.view = nn.Linear(width, half)
        self.view_codes = nn.Linear(shape.dim_appearance + shape.dim_class, half, bias=False)
        if shape.use_viewdirs:
            self.view_directions = nn.Linear(directions, half, bias=False)
        self.rgb = nn.Linear(half, 3)
        self._initialise()

    def _initialise(self) -> None:
        """Each split layer starts as one concatenated Linear would: uniform within 1 / sqrt(its whole fan-in)."""
        shape = self.shape
        points, codes = encoding_size(shape.multires), shape.dim_shape + shape.dim_class
        view_fan_in = shape.width + shape.dim_appearance + shape.dim_class
        view_fan_in += encoding_size(shape.multires_views) if shape.use_viewdirs else 0
        groups: list[tuple[int, list[nn.Linear]]] = [(points + codes, [self.trunk_in, self.trunk_in_codes])]
        if shape.skip is not None:
            joined = [self.trunk[shape.skip - 1], self.trunk_skip, self.trunk_skip_codes]
            groups.append((shape.width + points + codes, joined))  # type: ignore[arg-type]
        views = [self.view, self.view_codes] + ([self.view_directions] if shape.use_viewdirs else [])
        groups.append((view_fan_in, views))
        for fan_in, layers in groups:
            bound = 1 / math.sqrt(fan_in)
            for layer in layers:
                nn.init.uniform_(layer.weight, -bound, bound)
                if layer.bias is not None:
                    nn.init.uniform_(layer.bias, -bound, bound)

    def prepare(self, z: Tensor, class_idx: Tensor) -> MLPCodes:
        """The share of the latents: z (B, dim_shape + dim_appearance), class_idx (B,) int64."""
        with float32_region(z.device.type):
            embedding = self.class_embedding(class_idx)
            shape_code = torch.cat([z[:, : self.shape.dim_shape], embedding], dim=-1)
            appearance_code = torch.cat([z[:, self.shape.dim_shape :], embedding], dim=-1)
            trunk_in = self.trunk_in_codes(shape_code) + self.trunk_in.bias
            skip = None
            if self.shape.skip is not None:
                skip = (self.trunk_skip_codes(shape_code) + self._skip_layer.bias)[:, None]
            view = self.view_codes(appearance_code) + (self.view.weight @ self.feature_linear.bias + self.view.bias)
            view_weight = self.view.weight @ self.feature_linear.weight
            return MLPCodes(trunk_in[:, None], skip, view[:, None], view_weight, PackedWeights())

    def forward(
        self, points: Tensor, directions: Tensor, codes: MLPCodes, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """rgb (B, N, S, 3) in [-1, 1] and density (B, N, S) >= 0, float32 (float64 for float64 points and weights).

        points: (B, N, S, 3); directions: (B, N, 3), unit length; noise: (B, N, S), added to the raw density.
        """
        hidden = self._run_trunk(self._encode(points), codes)
        density = self._read_density(hidden, points, noise)
        return self._read_colour(hidden, self._share_of_rays(directions, codes), codes, points.shape[:3]), density

    def forward_visible(
        self, points: Tensor, directions: Tensor, codes: MLPCodes, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As the protocol says. On a CPU colours are computed, and activations kept, where there is density alone.

        The trunk runs everywhere first, without a graph, to tell where that is; its outputs there get one afterwards.
        """
        if points.device.type != "cpu" or is_exporting():  # how many points there are is not to be asked
            return self(points, directions, codes, noise)
        encoded, of_rays = self._encode(points), self._share_of_rays(directions, codes)
        known: list[Tensor] | None = [] if torch.is_grad_enabled() else None
        with torch.no_grad():
            hidden = self._run_trunk(encoded, codes, keep=known)
            density = self._read_density(hidden, points, noise)
            numbers = number_occupied(density != 0)  # NaN is not left out
        shape = points.shape[:3]
        if numbers is None:
            if known is not None:
                hidden = self._run_trunk(encoded, codes, known=known)
                density = self._read_density(hidden, points, noise)
            return self._read_colour(hidden, of_rays, codes, shape), density
        if known is None:
            hidden, of_rays = pick(hidden, numbers), of_rays.to(hidden.dtype)  # what is picked is not cast once more
        else:
            del hidden
            for index, output in enumerate(known):
                known[index] = pick(output, numbers)
                del output
            hidden = self._run_trunk(pick(encoded, numbers), codes, known=known)
            own_noise = None if noise is None else pick(noise.flatten(1, 2)[..., None], numbers)
            own_density = self._read_density(hidden, pick(points.flatten(1, 2), numbers)[:, :, None], own_noise)
            density = place(own_density, numbers, shape)[..., 0]
        of_points = pick(of_rays, numbers // shape[2]) if self.shape.use_viewdirs else of_rays
        rgb = self._read_colour(hidden, of_points, codes, (*numbers.shape, 1))
        return place(rgb[:, :, 0], numbers, shape), density

    def density(self, points: Tensor, codes: MLPCodes) -> Tensor:
        """The density (B, N, S) of points (B, N, S, 3), without computing colours."""
        return self._read_density(self._run_trunk(self._encode(points), codes), points, None)

    def _encode(self, points: Tensor) -> Tensor:
        """Points (B, N, S, 3) as the trunk sees them, (B, N S, channels), in autocast's dtype."""
        dtype = product_dtype(at_least_float32(points))
        return positional_encoding(points, self.shape.multires, self.shape.base_frequency, dtype).flatten(1, 2)

    def _run_trunk(
        self, encoded: Tensor, codes: MLPCodes, keep: list[Tensor] | None = None, known: Sequence[Tensor] = ()
    ) -> Tensor:
        """The last hidden layer (B, P, width) at encoded points (B, P, channels).

        keep: takes the output of each layer. known: these outputs, so that they are not computed.
        """
        hidden = encoded
        for index, layer in enumerate([self.trunk_in, *cast(Iterable[nn.Linear], self.trunk)]):
            shares, again = codes.trunk_in, None
            if codes.trunk_skip is not None and layer is self._skip_layer:
                shares, again = codes.trunk_skip, (encoded, self.trunk_skip.weight)
            elif layer is not self.trunk_in:
                shares = layer.bias.view(1, 1, -1)
            hidden = linear_relu(hidden, layer.weight, shares, again, codes.packed, known[index] if known else None)
            if keep is not None:
                keep.append(hidden)
        return hidden

    def _read_density(self, hidden: Tensor, points: Tensor, noise: Tensor | None) -> Tensor:
        """The density (B, N, S) at points (B, N, S, 3) out of the last hidden layer (B, N S, width)."""
        # cast here: autocast would keep a weight that it has cast without a graph for where there has to be one
        raw = at_least_float32(hidden @ self.raw_density.weight[0].to(hidden.dtype)) + self.raw_density.bias
        return self.shape.density(raw.view(points.shape[:3]), points, noise)

    def _share_of_rays(self, directions: Tensor, codes: MLPCodes) -> Tensor:
        """The share (B, N or 1, half width) of directions (B, N, 3) and codes in the view layer."""
        if not self.shape.use_viewdirs:
            return codes.view
        encoded = positional_encoding(directions, self.shape.multires_views, self.shape.base_frequency)
        return codes.view + functional.linear(encoded, self.view_directions.weight)

    def _read_colour(self, hidden: Tensor, of_rays: Tensor, codes: MLPCodes, shape: tuple[int, ...]) -> Tensor:
        """rgb (B, N, S, 3) of points in a shape (B, N, S) out of the last hidden layer (B, N S, width).

        of_rays: the rays' shares (B, N or 1, half width) in the view layer.
        """
        hidden = hidden.view(*shape, -1)
        colour = linear_relu(hidden, codes.view_weight, of_rays[:, :, None], None, codes.packed)
        return torch.tanh(at_least_float32(self.rgb(colour)))

    @property
    def _skip_layer(self) -> nn.Linear:
        assert self.shape.skip is not None
        return cast(nn.Linear, self.trunk[self.shape.skip - 1])
