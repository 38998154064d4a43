"""Views of one surface warped into each other by their depth, and where that is allowed: what both cameras see.

Notation: a and b are two cameras; "b into a" means that every pixel of a looks up the colour of its surface point in
b's image (backward warping), so no pixel is left empty, and a mask says where the two really see the same point. Depth
is the z-depth of the surface along the optical axis, in world units. Images, depth and opacity of one view cover the
same square patch (graf.geometry.rays) with any number of pixels each: the image may be finer than the depth.

Geometry is taken as given: gradients flow into the colours alone. Everything here is meant to run in float32 or better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from graf.base.tensors import TensorBatch
from graf.geometry.cameras import Intrinsics, project_points
from graf.geometry.rays import Patches, RayCaster, patch_grid
from graf.geometry.volume_rendering import Render

#: below this opacity a composited depth says nothing about a surface
LEAST_OPACITY = 1e-3
#: how far, in pixels, a sample may lie outside the outermost pixel centres before it counts as out of frame: rounding
FRAME_SLACK = 1e-3


@dataclass(frozen=True)
class Visibility:
    """When two cameras count as seeing the same surface point.

    tolerance: how far, in world units, the point may lie before or behind the surface that the other camera sees.
    min_opacity: both views are more opaque than this there. max_step: the depths of the four pixels that an
    interpolated depth comes from span at most this, in world units, else an edge runs between them.
    """

    tolerance: float = 0.05
    min_opacity: float = 0.9
    max_step: float = 0.25


DEFAULT_VISIBILITY = Visibility()


@dataclass(frozen=True)
class SurfaceView(TensorBatch):
    """What a camera sees of a surface: image (B, C, N, N), the surface's z-depth and its opacity, both (B, 1, n, n).

    poses: (B, 4, 4); patches: the part of each view that is covered. Where the opacity is low the depth has no meaning,
    but it is finite. Raises ValueError where the shapes do not belong together.
    """

    image: Tensor
    depth: Tensor
    opacity: Tensor
    poses: Tensor
    patches: Patches

    def __post_init__(self) -> None:
        count, size = len(self.image), self.depth.shape[-1]
        found = [tuple(part.shape) for part in (self.image, self.depth, self.opacity, self.poses, self.patches.scale)]
        square = self.image.dim() == 4 and self.image.shape[-1] == self.image.shape[-2]
        if not square or found[1:] != [(count, 1, size, size), (count, 1, size, size), (count, 4, 4), (count,)]:
            raise ValueError(
                f"image, depth, opacity, poses, patches of shapes {', '.join(map(str, found))}: expected (B, C, N, N), "
                "(B, 1, n, n) twice, (B, 4, 4) and B patches"
            )

    @classmethod
    def from_render(
        cls, render: Render, poses: Tensor, patches: Patches, caster: RayCaster, image: Tensor | None = None
    ) -> SurfaceView:
        """From rendered images, whose rays `caster` cast; `image`: other colours than theirs, at any resolution."""
        background = background_depth(caster, poses, patches, render.depth.shape[-1])
        surface = recover_surface_depth(render.depth, render.opacity, background)
        return cls(render.rgb if image is None else image, surface, render.opacity, poses, patches)


def background_depth(caster: RayCaster, poses: Tensor, patches: Patches, size: int) -> Tensor:
    """z-depth (B, 1, size, size) of the end of every ray, where the renderer puts the background.

    It differs from ray to ray: by the angle to the optical axis, and because rays end at the bounding sphere.
    """
    rays = caster.cast_patches(poses, patches, size)
    return (rays.far * rays.axis_cosine).reshape(len(poses), 1, size, size)


def recover_surface_depth(depth: Tensor, opacity: Tensor, background: Tensor) -> Tensor:
    """z-depth of the surface alone, (depth - (1 - opacity) background) / opacity, all (B, 1, H, W).

    Undoes what the renderer composites over the background. Where the opacity is under 0.001 it is the background's.
    """
    surface = (depth - (1 - opacity) * background) / opacity.clamp(min=LEAST_OPACITY)
    return torch.where(opacity < LEAST_OPACITY, background, surface)


def reproject(
    grid: Tensor, depth: Tensor, poses_a: Tensor, poses_b: Tensor, intrinsics: Intrinsics
) -> tuple[Tensor, Tensor]:
    """Where camera b sees the surface points of camera a's pixels.

    grid: (B, H, W, 2), image-plane coordinates in a; depth: (B, 1, H, W), z-depth there; poses: (B, 4, 4). Returns
    image-plane coordinates (B, H, W, 2) in b, and z-depth (B, 1, H, W) seen from b, which is negative behind b; a point
    in b's own plane has no finite coordinates.
    """
    batch, height, width, _ = grid.shape
    rays = RayCaster(intrinsics, 0.0, 1.0).cast(poses_a, grid)
    distance = depth.reshape(batch, -1, 1) / rays.axis_cosine
    pixels, depth_b = project_points(rays.origins + distance * rays.directions, poses_b[:, None], intrinsics)
    x, y = 2 * pixels[..., 0] / intrinsics.width - 1, 2 * pixels[..., 1] / intrinsics.height - 1
    return torch.stack([x, y], dim=-1).reshape(grid.shape), depth_b.reshape(batch, 1, height, width)


def warp_to_view(
    view: SurfaceView, grid: Tensor, depth: Tensor, visibility: Visibility = DEFAULT_VISIBILITY
) -> tuple[Tensor, Tensor]:
    """The colours of `view` at image-plane coordinates, and where it really sees the points that are asked for.

    grid: (B, H, W, 2) in the view's image plane; depth: (B, 1, H, W), the points' z-depth seen from it (both as
    :func:`reproject` returns them). Returns the bilinearly sampled image (B, C, H, W), finite everywhere, and the mask
    (B, 1, H, W) of 0 and 1, of the image's dtype: in front of the camera, inside the patch (between the outermost pixel
    centres, so that no colour is extrapolated), on an opaque part, and not hidden (z-buffer test).
    """
    place = _place_in_patch(grid.detach(), view.patches)
    in_front = (depth > 0)[:, 0]
    place = torch.where((in_front & place.isfinite().all(-1))[..., None], place, 2.0)  # 2 lies outside the patch
    pixels = view.image.shape[-1]
    inside = (place.abs() <= 1 + (2 * FRAME_SLACK - 1) / pixels).all(-1)[:, None]
    surface_depth, solid = _sample_surface(view, place, visibility)
    visible = inside & solid & ((depth - surface_depth).abs() <= visibility.tolerance)
    image = view.image.to(torch.promote_types(view.image.dtype, place.dtype))
    colours = functional.grid_sample(
        image, place.to(image.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )
    return colours, visible.to(colours.dtype)


def warp_between(
    a: SurfaceView, b: SurfaceView, intrinsics: Intrinsics, visibility: Visibility = DEFAULT_VISIBILITY
) -> tuple[Tensor, Tensor]:
    """The image of `b` seen from `a`, (B, C, N, N) of a's image size, and the mask (B, 1, N, N) of where both see.

    Depth and opacity are interpolated to the image's resolution. Differentiable with respect to b.image; the mask is 0
    or 1 and constant.

    >>> warped, mask = warp_between(a, b, intrinsics)
    >>> loss = (mask * (a.image - warped).abs()).sum() / (3 * mask.sum()).clamp(min=1)
    """
    with torch.no_grad():
        size = a.image.shape[-1]
        grid = patch_grid(a.patches, size)
        depth, solid = _sample_surface(a, _place_in_patch(grid, a.patches), visibility)
        grid_b, depth_b = reproject(grid, depth, a.poses, b.poses, intrinsics)
    colours, visible = warp_to_view(b, grid_b, depth_b, visibility)
    return colours, visible * solid


@torch.no_grad()
def _sample_surface(view: SurfaceView, place: Tensor, visibility: Visibility) -> tuple[Tensor, Tensor]:
    """z-depth (B, 1, H, W) at places (B, H, W, 2) in [-1, 1] of a view's patch, and where it is one opaque surface.

    Depths are weighted by their opacity, since that of a transparent pixel means nothing; likewise transparent pixels
    neither make nor hide an edge.
    """
    height, width = place.shape[1:3]
    neighbours, weights = _find_neighbours(place, view.depth.shape[-1])
    depth, opacity = (
        part.flatten(1).gather(1, neighbours.flatten(1)).reshape(weights.shape) for part in (view.depth, view.opacity)
    )
    total = (weights * opacity).sum(-1)
    mean = (weights * opacity * depth).sum(-1) / total.clamp(min=LEAST_OPACITY)
    counts = (opacity > visibility.min_opacity) & (weights > FRAME_SLACK)
    step = depth.masked_fill(~counts, -torch.inf).amax(-1) - depth.masked_fill(~counts, torch.inf).amin(-1)
    solid = (total > visibility.min_opacity) & (step <= visibility.max_step)
    shape = (len(place), 1, height, width)
    return mean.reshape(shape), solid.reshape(shape)


def _find_neighbours(place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Flat indices (B, H, W, 4) of the four pixels around places in a size x size map, and their bilinear weights."""
    position = (((place + 1) * size - 1) / 2).clamp(0, size - 1)  # in pixels; outside, the edge repeats
    low = position.floor().clamp(max=max(size - 2, 0))
    share = position - low
    x, y = low.long().unbind(-1)
    right, below = (x + 1).clamp(max=size - 1), (y + 1).clamp(max=size - 1)
    x_share, y_share = share.unbind(-1)
    indices = torch.stack([y * size + x, y * size + right, below * size + x, below * size + right], dim=-1)
    weights = torch.stack(
        [(1 - y_share) * (1 - x_share), (1 - y_share) * x_share, y_share * (1 - x_share), y_share * x_share], dim=-1
    )
    return indices, weights


def _place_in_patch(grid: Tensor, patches: Patches) -> Tensor:
    """Image-plane coordinates (B, H, W, 2) as places in [-1, 1] of each patch."""
    centre = patches.centre.to(grid.dtype)
    return (grid - centre[:, None, None]) / patches.scale.to(grid.dtype)[:, None, None, None]
