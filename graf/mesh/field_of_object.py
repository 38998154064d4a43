"""One object of a trained run as a function of places, as the rest of this room wants it; densities and colours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graf.evaluation.renderer import Renderer
from graf.geometry.rays import Rays
from graf.mesh.level import Level, choose_level
from graf.mesh.rays_around import views_around


@dataclass(frozen=True)
class FieldOfObject:
    """One object of a renderer as a function of places: density and radiance, nothing beyond its bounding sphere."""

    renderer: Renderer
    z: Tensor
    class_name: str | int

    @property
    def radius(self) -> float:
        """Of the sphere that holds everything that is rendered, world units."""
        caster, distance = self.renderer.caster, self.renderer.cameras.radius
        if caster.bounding_radius is not None:
            return caster.bounding_radius
        return max(distance - caster.near, caster.far - distance)

    def density(self, points: Tensor) -> Tensor:
        """Densities (N,) at points (N, 3); points beyond the sphere cost nothing."""
        found = torch.zeros(len(points))
        inside = torch.nonzero(torch.linalg.vector_norm(points, dim=1) <= self.radius)[:, 0]
        if len(inside):
            found[inside] = self.renderer.density(points[inside], z=self.z, class_name=self.class_name)
        return found

    def radiance(self, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Colours (N, 3) in [-1, 1] and densities (N,) at points (N, 3) in directions (N, 3)."""
        return self.renderer.radiance(points, directions, z=self.z, class_name=self.class_name)

    def rays_around(self, azimuths: int, resolution: int) -> Rays:
        """Rays (B, resolution^2) of cameras around the object at the data set's heights, on the CPU."""
        views = views_around(self.renderer, self.class_name, azimuths)
        return self.renderer.rays(views, resolution).to("cpu")

    def level(self) -> Level:
        """The level at which its surface lies where rays meet it. Raises UserError where it has none."""
        return choose_level(self.density, self.rays_around(azimuths=6, resolution=40))
