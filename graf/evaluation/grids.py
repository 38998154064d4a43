"""Pictures of what a generator has learned: objects in rows, views in columns, as colour, depth and opacity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graf.evaluation.pictures import Picture, depth_to_rgb, label_grid, opacity_to_rgb, tile_grid, to_uint8
from graf.evaluation.renderer import Renderer, Renders
from graf.geometry.cameras import ring
from graf.geometry.views import Views
from graf.models.ccsr import upsample


@dataclass(frozen=True)
class Showcase:
    """Objects (codes z (R, dim_z) and class_idx (R,)) and the azimuths u and heights v (both (C,)) to see them from."""

    z: Tensor
    class_idx: Tensor
    u: Tensor
    v: Tensor

    @classmethod
    def around(cls, z: Tensor, class_idx: Sequence[int], num_views: int, v: float) -> Showcase:
        """`num_views` azimuths at one height."""
        u, heights = ring(num_views, v)
        return cls(z, torch.tensor(list(class_idx)), u, heights)

    @property
    def columns(self) -> int:
        """Views per object."""
        return len(self.u)

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, rows: range) -> Showcase:
        """Some of the objects, from the same sides."""
        return replace(self, z=self.z[rows.start : rows.stop], class_idx=self.class_idx[rows.start : rows.stop])


def render_showcase(renderer: Renderer, showcase: Showcase, super_resolve: bool = False) -> Iterator[Renders]:
    """The C views of one object after the other, on the CPU, rendered as they are asked for."""
    for z, class_idx in zip(showcase.z, showcase.class_idx, strict=True):
        views = renderer.cameras.views_at(class_idx.expand(showcase.columns), showcase.u, showcase.v)
        yield renderer.render_views(z.expand(showcase.columns, -1), views, super_resolve)


def colour_showcase(renders: Renders, near: float, far: float) -> dict[str, Tensor]:
    """What is shown of some views as uint8 (N, 3, H, W): "rgb", "depth", "opacity"; with SR also "sr", "bicubic"."""
    kinds = {
        "rgb": to_uint8(renders.rgb),
        "depth": to_uint8(depth_to_rgb(renders.depth, near, far, renders.opacity)),
        "opacity": to_uint8(opacity_to_rgb(renders.opacity)),
    }
    if renders.sr is not None:
        scale = renders.sr.shape[-1] // renders.rgb.shape[-1]
        kinds |= {"sr": to_uint8(renders.sr), "bicubic": to_uint8(upsample(renders.rgb, scale))}
    return kinds


def colour_rows(rows: Iterable[Renders], near: float, far: float) -> dict[str, Tensor]:
    """All images of several objects by name, as in :func:`colour_showcase`; of rendered rows only bytes are kept."""
    kinds: dict[str, list[Tensor]] = {}
    for row in rows:
        for name, images in colour_showcase(row, near, far).items():
            kinds.setdefault(name, []).append(images)
        del row  # else it would wait here until the next one is rendered
    return {name: torch.cat(images) for name, images in kinds.items()}


def tile_showcase(
    images: Mapping[str, Tensor], columns: int, row_labels: Sequence[str] = (), column_labels: Sequence[str] = ()
) -> dict[str, Picture]:
    """The captioned grids by name of uint8 images (R C, 3, H, W), one row for each object."""
    return {name: label_grid(tile_grid(rows, columns), row_labels, column_labels) for name, rows in images.items()}


def draw_showcase(
    rows: Iterable[Renders],
    columns: int,
    near: float,
    far: float,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> dict[str, Picture]:
    """The captioned grids by name, as in :func:`colour_showcase`."""
    return tile_showcase(colour_rows(rows, near, far), columns, row_labels, column_labels)


def compare_with_photographs(
    renderer: Renderer, photographs: Tensor, views: Views, columns: int, super_resolve: bool = False
) -> Picture:
    """Of every class a row of photographs (N, 3, H, W), and below them renders of the same views (N) and instances.

    At most `columns` of a class, spread evenly over its photographs. With `super_resolve` renders are upsampled to the
    photographs' size, and a third row shows them super-resolved.
    """
    rows, captions = [], []
    for class_idx in views.class_idx.unique().tolist():
        places = torch.nonzero(views.class_idx == class_idx)[:, 0]
        chosen = places[torch.linspace(0, len(places) - 1, min(columns, len(places))).round().long()]
        truth, shown = photographs[chosen], views[chosen]
        renders = renderer.render_views(renderer.instance_codes(shown.labels[:, 3]), shown, super_resolve)
        kinds = {"photograph": truth, "render": renders.rgb}
        if renders.sr is not None:
            kinds |= {"render": upsample(renders.rgb, renders.sr.shape[-1] // renders.rgb.shape[-1])}
            kinds |= {"super-resolved": renders.sr}
        for name, images in kinds.items():
            blank = images.new_ones(columns - len(images), *images.shape[1:])
            rows.append(to_uint8(torch.cat([images, blank])))
            captions.append(f"{renderer.classes[class_idx]}, {name}")
    return label_grid(tile_grid(torch.cat(rows), columns), captions)


def path_frames(
    renderer: Renderer,
    z: Tensor,
    class_idx: Sequence[int],
    u: Tensor,
    v: Tensor,
    super_resolve: bool = False,
) -> Iterator[Picture]:
    """Frames along a path: frame f shows codes z[f] (R, dim_z) of z (F, R, dim_z) from azimuth u[f] and height v[f].

    With `super_resolve` a second row shows the super-resolved objects under the bicubically upsampled ones.
    """
    classes = torch.tensor(list(class_idx))
    for codes, azimuth, height in zip(z, u, v, strict=True):
        views = renderer.cameras.views_at(classes, azimuth.expand(len(codes)), height.expand(len(codes)))
        renders = renderer.render_views(codes, views, super_resolve)
        images = renders.rgb
        if renders.sr is not None:
            scale = renders.sr.shape[-1] // renders.rgb.shape[-1]
            images = torch.cat([upsample(renders.rgb, scale), renders.sr])
        yield tile_grid(images, len(codes))
