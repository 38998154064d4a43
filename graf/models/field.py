"""What a radiance field is: the protocol between the volume renderer and whatever represents the objects.

To add a field, write a file beside this one with a subclass of :class:`RadianceField`, and a line in
`graf.app.builders.FIELDS` that builds it under a name for `nerf.field`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graf.models.density import DensityLaw


@dataclass(frozen=True, kw_only=True)
class FieldShape:
    """Sizes and output laws that every shipped field has; defaults stand in the configuration (`nerf`, `z_dist`).

    multires_views: octaves of the positional encoding of directions, whose first angular frequency is base_frequency;
    use_viewdirs: whether colour may depend on the direction. dim_shape, dim_appearance: latent codes; density: how
    numbers of a network become densities.
    """

    multires_views: int
    base_frequency: float
    use_viewdirs: bool
    dim_shape: int
    dim_appearance: int
    num_classes: int
    density: DensityLaw


class RadianceField(nn.Module, ABC):
    """Radiance and density of points in the world, given a latent code and a class.

    A field may draw no random numbers and keep nothing from call to call, so that it can be evaluated in any chunks and
    once more in the backward pass; and a density that is exactly 0 has no gradient, so that its point can be left out
    there. dim_shape, dim_appearance: lengths of the two parts of the latent code, of which the second one may change
    colours only.
    """

    dim_shape: int
    dim_appearance: int

    @property
    def dim_z(self) -> int:
        """Length of the latent code: shape code first, then appearance code."""
        return self.dim_shape + self.dim_appearance

    @abstractmethod
    def prepare(self, z: Tensor, class_idx: Tensor) -> Any:
        """Everything that does not depend on the point, as a TensorBatch of B rows, computed once per batch.

        z: (B, dim_z); class_idx: (B,) int64. Gradients to z, and to weights used here, flow through the result.
        """

    def point_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that :meth:`forward` uses itself, not through the codes: all, unless a field knows better."""
        return self.parameters()

    @abstractmethod
    def forward(
        self, points: Tensor, directions: Tensor, codes: Any, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """rgb (B, N, S, 3) in [-1, 1] and density (B, N, S) >= 0, float32 or float64.

        points: (B, N, S, 3), S samples along N rays; directions: (B, N, 3), unit length; codes: of :meth:`prepare`;
        noise: (B, N, S), added to the density before its activation.
        """

    def forward_visible(
        self, points: Tensor, directions: Tensor, codes: Any, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, for renderings: colours of points without density, which nobody sees, may be 0.

        Nor have such points a gradient, so that a field may keep nothing of them. A field that has nothing to gain from
        it leaves this as it is; one that has is not called as a module here, so that hooks of the module do not run.
        """
        found: tuple[Tensor, Tensor] = self(points, directions, codes, noise)
        return found

    @abstractmethod
    def density(self, points: Tensor, codes: Any) -> Tensor:
        """The density of :meth:`forward` alone (B, N, S), without noise and without computing colours."""
