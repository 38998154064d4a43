"""What a client asked to see, as a picture with depth: colour, super-resolved, depth, opacity or normals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from graf.evaluation.pictures import Picture, depth_to_rgb, opacity_to_rgb, to_uint8
from graf.evaluation.renderer import Renderer, Renders
from graf.geometry.rays import Rays
from graf.geometry.volume_rendering import RaySampling
from graf.models.ccsr import upsample
from graf.runtime.activation_checkpointing import ChunkFunction, ChunkRunner
from graf.viewer.bounds import Bounds
from graf.viewer.viewpoints import Viewpoint

MODES = ("colour", "super-resolved", "depth", "opacity", "normals")
#: colours that may take the place of the trained background, in [-1, 1]
BACKGROUNDS = {"white": 1.0, "grey": 0.0, "black": -1.0}
AS_TRAINED = "as trained"
#: z-depth of pixels that show nothing, world units: the farthest that viser's pages can be told, 2^24 - 1 hundredths
#: of a millimetre, which lies behind everything else in the scene
NOTHING = 167.0
#: opacity from which on a pixel has a surface
SURFACE = 0.5
#: samples per ray of quick pictures at most, in equal bins inside the object's box: they differ from full pictures as
#: little as 24 in the whole sphere, and take half of the time of those
QUICK_SAMPLES = 20
#: Rays rendered at once by a viewer, whatever the chunks of training are, which are made for a backward pass: without
#: one, a picture of 128 x 128 takes a fourth of the time in chunks of 4096 that it takes in those of 512 (two cores).
CHUNK = 4096


class Interrupted(Exception):
    """A picture that nobody waits for any more was left unfinished."""


@dataclass(frozen=True)
class Look:
    """What is seen: an object and how it is shown.

    class_name: out of the renderer's; z: (dim_z,); mode: out of MODES; num_samples: per ray besides importance samples,
    None: as the run's pictures; background: out of BACKGROUNDS, or AS_TRAINED.
    """

    class_name: str
    z: Tensor
    mode: str = "colour"
    num_samples: int | None = None
    background: str = AS_TRAINED


@dataclass(frozen=True)
class Drawing:
    """picture: uint8 (H, W, 3); depth: float32 (H, W), z-depth of what is seen in world units, NOTHING where none is.

    Super-resolved pictures have more pixels than their depth.
    """

    picture: Picture
    depth: np.ndarray[Any, np.dtype[np.float32]]


def interruptible(renderer: Renderer, check: Callable[[], None]) -> Renderer:
    """The same networks in large chunks, before each of which `check` may raise Interrupted; the other is untouched."""
    generator = copy.copy(renderer.generator)
    generator.chunk = max(generator.chunk, CHUNK)

    def run(
        function: ChunkFunction, number: int, shared: tuple[Tensor, ...], parameters: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        check()
        return function(number, shared)

    def make_runner(sizes: Sequence[int]) -> ChunkRunner:
        return run

    generator.make_runner = make_runner
    return replace(renderer, generator=generator, before_image=check)


def draw(
    renderer: Renderer,
    look: Look,
    viewpoint: Viewpoint,
    height: int,
    quick: bool = False,
    bounds: Bounds | None = None,
) -> Drawing:
    """The picture of `height` rows (super-resolved: times the scale) that a look shows from a viewpoint.

    quick: with fewer samples, and colour instead of super-resolution; bounds: sample inside of them only. Raises
    UserError as the renderer does.
    """
    intrinsics = viewpoint.intrinsics(height)
    super_resolve = look.mode == "super-resolved" and not quick
    num_samples = look.num_samples
    if quick:
        coarse = num_samples or (renderer.sampling or renderer.generator.sampling).coarse
        renderer, num_samples = replace(renderer, sampling=RaySampling(min(coarse, QUICK_SAMPLES))), None
    pose = viewpoint.camera_to_world
    rays = renderer.camera_rays(pose, intrinsics)
    if bounds is not None:
        rays = rays.within(bounds.low.to(rays.near), bounds.high.to(rays.near))
    renders = renderer.render_camera(look.z, look.class_name, pose, intrinsics, super_resolve, num_samples, rays)
    surface = surface_depth(renders, rays)
    images = _shown(renderer, look, renders, rays, surface)
    return Drawing(to_uint8(images)[0].permute(1, 2, 0).cpu().numpy(), surface[0, 0].numpy())


def surface_depth(renders: Renders, rays: Rays) -> Tensor:
    """z-depth (1, 1, H, W) of what is seen, NOTHING where less than SURFACE of it is opaque.

    A render's depth counts the background at the far end of the ray; here it is taken out again.
    """
    far = (rays.far * rays.axis_cosine).mT.reshape(renders.depth.shape).cpu()
    depth = far + (renders.depth - far) / renders.opacity.clamp(min=SURFACE)
    return torch.where(renders.opacity < SURFACE, NOTHING, depth)


def normals_from_depth(depth: Tensor, rays: Rays) -> Tensor:
    """Unit normals (1, 3, H, W) in the world, towards the camera, of a surface seen as z-depth (1, 1, H, W).

    Of the two differences to neighbours on each axis the smaller one counts, so that edges of the object stay edges.
    """
    height, width = depth.shape[-2:]
    distance = depth.reshape(1, 1, -1).mT / rays.axis_cosine.cpu()
    points = (rays.origins.cpu() + distance * rays.directions.cpu()).mT.reshape(1, 3, height, width)
    across, down = _smaller_difference(points, depth, 3), _smaller_difference(points, depth, 2)
    normals = functional.normalize(torch.linalg.cross(down, across, dim=1), dim=1)
    towards = -rays.directions.cpu().mT.reshape(1, 3, height, width)
    return torch.where((normals * towards).sum(1, keepdim=True) < 0, -normals, normals)


def _smaller_difference(points: Tensor, depth: Tensor, axis: int) -> Tensor:
    """Differences (1, 3, H, W) to the next or the last point along an axis, whichever is nearer in depth."""
    size = points.shape[axis]
    if size == 1:
        return torch.zeros_like(points)
    steps, jumps = points.diff(dim=axis), depth.diff(dim=axis).abs()
    ahead = torch.cat([jumps, torch.full_like(jumps.narrow(axis, 0, 1), torch.inf)], dim=axis)
    behind = torch.cat([torch.full_like(jumps.narrow(axis, 0, 1), torch.inf), jumps], dim=axis)
    forwards = torch.cat([steps, steps.narrow(axis, size - 2, 1)], dim=axis)
    backwards = torch.cat([steps.narrow(axis, 0, 1), steps], dim=axis)
    return torch.where(ahead <= behind, forwards, backwards)


def _shown(renderer: Renderer, look: Look, renders: Renders, rays: Rays, surface: Tensor) -> Tensor:
    """The image (1, 3, H, W) in [-1, 1] of a look's mode, on its background."""
    trained = renderer.generator.background_colour.detach().float().cpu().view(1, 3, 1, 1)
    colour = trained if look.background == AS_TRAINED else torch.full_like(trained, BACKGROUNDS[look.background])
    opacity = renders.opacity
    if look.mode == "opacity":
        return opacity_to_rgb(opacity)
    if look.mode == "depth":
        distance = rays.origins[0, 0].norm().item()
        return _over(depth_to_rgb(surface, distance - 1, distance + 1), opacity >= SURFACE, colour)
    if look.mode == "normals":
        return _over(normals_from_depth(surface, rays), opacity >= SURFACE, colour)
    if renders.sr is not None:
        assert renderer.ccsr is not None
        return renders.sr + (1 - upsample(opacity, renderer.ccsr.scale).clamp(0, 1)) * (colour - trained)
    return renders.rgb + (1 - opacity) * (colour - trained)


def _over(images: Tensor, is_surface: Tensor, background: Tensor) -> Tensor:
    return torch.where(is_surface, images, background)
