"""The density law: how a field's raw output at a point becomes its density there, the same for all fields."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class DensityLaw:
    """scale * activation(raw + bias + sphere_prior (prior_radius - |p|)) inside of bounding_radius, 0 outside.

    activation: "relu" (GRAF) or "softplus"; a positive sphere_prior makes a new field a soft ball of prior_radius.
    bounding_radius: no density outside this distance from the origin (None: everywhere). Where the density is exactly
    0, so is its gradient: points without density are left out of backward passes (occupied_points.py). Defaults of all
    stand in the configuration (`nerf.density`, ...).
    """

    activation: str
    scale: float
    bias: float
    sphere_prior: float
    prior_radius: float
    bounding_radius: float | None

    def __call__(self, raw: Tensor, points: Tensor, noise: Tensor | None = None) -> Tensor:
        """Density (B, N, S) from raw (B, N, S) at points (B, N, S, 3); noise (B, N, S) is added to raw."""
        if noise is not None:
            raw = raw + noise
        distance = torch.linalg.vector_norm(points, dim=-1)
        raw = raw + self.bias
        if self.sphere_prior:
            raw = raw + self.sphere_prior * (self.prior_radius - distance)
        density = torch.relu(raw) if self.activation == "relu" else functional.softplus(raw)
        if self.bounding_radius is not None:
            density = density * (distance <= self.bounding_radius)
        return self.scale * density
