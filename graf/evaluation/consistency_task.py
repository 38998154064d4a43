"""Rings of neighbouring views around generated objects, which the consistency measurement looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from graf.evaluation.consistency import ConsistencyReport, Ring, TrueViews, measure_consistency
from graf.evaluation.renderer import Renderer
from graf.geometry.cameras import ring
from graf.geometry.rays import Patches
from graf.geometry.views import Views
from graf.geometry.warping import SurfaceView

#: (class index, views, side of the renders, side of the super-resolved images) -> what a true object looks like
TruthRenderer = Callable[[int, Views, int, int], TrueViews]


@dataclass(frozen=True)
class ConsistencyTask:
    """Which objects are measured: one of each class, with the codes of `seed`, from num_views azimuths at height v.

    truth: renders the true objects, where the data are synthetic.
    """

    renderer: Renderer
    classes: Sequence[int]
    v: float
    num_views: int = 24
    seed: int = 0
    truth: TruthRenderer | None = None

    def measure(self) -> ConsistencyReport:
        """How well super-resolved views agree with their renders, with each other and with the truth."""
        assert self.renderer.ccsr is not None
        return measure_consistency(self._rings(), self.renderer.caster.intrinsics, down=self.renderer.ccsr.down)

    def _rings(self) -> Iterator[Ring]:
        for class_idx in self.classes:
            yield self._render_ring(class_idx)

    def _render_ring(self, class_idx: int) -> Ring:
        z = self.renderer.codes(self.seed, range(1)).expand(self.num_views, -1)
        views = self.renderer.cameras.views_at(torch.full((self.num_views,), class_idx), *ring(self.num_views, self.v))
        renders = self.renderer.render_views(z, views, super_resolve=True)
        assert renders.sr is not None
        surface = SurfaceView.from_render(
            renders.rgb, renders.depth, renders.opacity, views.poses, Patches.whole(len(views)), self.renderer.caster
        )
        low, high = renders.rgb.shape[-1], renders.sr.shape[-1]
        truth = None if self.truth is None else self.truth(class_idx, views, low, high)
        return Ring(surface, renders.sr, truth)
