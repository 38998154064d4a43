"""Rings of neighbouring views around one object: what they hold and how they are rendered, not what is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graf.evaluation.renderer import Renderer
from graf.geometry.cameras import ring
from graf.geometry.rays import Patches
from graf.geometry.views import Views
from graf.geometry.volume_rendering import Render
from graf.geometry.warping import SurfaceView


@dataclass(frozen=True)
class Ring:
    """One object from V neighbouring views, the last of which is the first one's neighbour.

    views: whole-image renders (V, 3, H, W) with their surface; sr: (V, 3, s H, s W), not clipped; truth: where it is
    known, rgb as fine as sr, z-depth and opacity (the covered share) as the renders.
    """

    views: SurfaceView
    sr: Tensor
    truth: Render | None = None


#: (class index, views, side of the renders, side of the super-resolved images) -> what a true object looks like
TruthRenderer = Callable[[int, Views, int, int], Render]


def render_ring(
    renderer: Renderer,
    z: Tensor,
    class_idx: int,
    num_views: int,
    v: float,
    truth: TruthRenderer | None = None,
) -> Ring:
    """The object of code z (1, dim_z), super-resolved, from `num_views` azimuths at height v."""
    views = renderer.cameras.views_at(torch.full((num_views,), class_idx), *ring(num_views, v))
    renders = renderer.render_views(z.expand(num_views, -1), views, super_resolve=True)
    assert renders.sr is not None
    with torch.no_grad():
        aimed = renderer.generator.aim(views.to(renderer.device), Patches.whole(num_views, renderer.device))
    poses, patches = aimed[0].cpu(), aimed[1].to("cpu")
    surface = SurfaceView.from_render(renders, poses, patches, renderer.caster)
    low, high = renders.rgb.shape[-1], renders.sr.shape[-1]
    return Ring(surface, renders.sr, None if truth is None else truth(class_idx, views, low, high))
