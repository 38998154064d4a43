"""Rays through pixels, and patches on one continuous grid for rays and real images alike.

The image plane has continuous coordinates in [-1, 1] x [-1, 1], x right and y down, edge to edge: the centre of pixel
(i, j) of an H x W image lies at ((2 j + 1) / W - 1, (2 i + 1) / H - 1) (`align_corners=False` in torch's words). A
patch of K x K pixels with scale s and centre c covers the square c +- s with K x K square cells and samples the middle
of each. So s = 1 is the whole image, K = W with s = 1 is every pixel, s = K / W at a whole-pixel offset is a crop, and
a patch of n K pixels with the same s and c covers the same square n times as finely. This is GRAF's patch sampler
(Schwarz et al. 2020, section 3.2) on pixel areas instead of corner points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from graf.base.tensors import TensorBatch
from graf.geometry.cameras import Intrinsics, rotate

#: distance in front of a camera from which on it sees, world units, where it stands close to an object or inside
NEAREST = 0.02


@dataclass(frozen=True)
class Rays(TensorBatch):
    """A bundle of rays per image.

    origins, directions: (B, N, 3), directions of unit length. near, far: (B, N, 1), distances along the ray between
    which it is sampled; near == far means that the ray meets nothing. axis_cosine: (B, N, 1), cosine between the ray
    and the optical axis: z-depth = axis_cosine * distance.
    """

    origins: Tensor
    directions: Tensor
    near: Tensor
    far: Tensor
    axis_cosine: Tensor

    @property
    def per_image(self) -> int:
        """N, the number of rays of each image."""
        return self.origins.shape[1]

    def slice(self, start: int, stop: int) -> Rays:
        """The rays start..stop of every image."""
        return self.map(lambda part: part[:, start:stop])

    def within(self, low: Tensor, high: Tensor) -> Rays:
        """The same rays, sampled inside the box between two corners (3,) only (slabs, Kay & Kajiya 1986).

        near == far where they miss it, as for a bounding sphere.
        """
        to_low, to_high = (low - self.origins) / self.directions, (high - self.origins) / self.directions
        # a ray in the plane of a side is 0 / 0 away from it: that side then cuts nothing off
        enter = torch.minimum(to_low, to_high).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        leave = torch.maximum(to_low, to_high).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        near = torch.maximum(self.near, enter.amax(-1, keepdim=True))
        far = torch.minimum(self.far, leave.amin(-1, keepdim=True))
        missed = near >= far
        return replace(self, near=torch.where(missed, self.far, near), far=torch.where(missed, self.far, far))


@dataclass(frozen=True)
class RayChunk:
    """Rays that are rendered at once: start..stop of each of some images."""

    images: slice
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many these are, over all images."""
        return (self.images.stop - self.images.start) * (self.stop - self.start)


def cut_chunks(num_images: int, rays_per_image: int, most: int) -> list[RayChunk]:
    """All rays of some images in chunks of at most so many: parts of one image, or as many whole images as that is.

    Rays of one image share their codes, and what these are multiplied with; so parts of an image cost least.
    """
    images, rays = _shape_chunks(rays_per_image, most)
    return [
        RayChunk(slice(first, min(first + images, num_images)), start, min(start + rays, rays_per_image))
        for first in range(0, num_images, images)
        for start in range(0, rays_per_image, rays)
    ]


def count_chunks(num_images: int, rays_per_image: int, most: int) -> int:
    """How many :func:`cut_chunks` makes."""
    images, rays = _shape_chunks(rays_per_image, most)
    return -(-num_images // images) * -(-rays_per_image // rays)


def count_rays_at_once(num_images: int, rays_per_image: int, most: int) -> int:
    """How many rays the largest of them has."""
    images, rays = _shape_chunks(rays_per_image, most)
    return min(images, num_images) * rays


def _shape_chunks(rays_per_image: int, most: int) -> tuple[int, int]:
    """How many images a chunk has rays of, and how many of each."""
    return max(1, most // rays_per_image), min(most, rays_per_image)


@dataclass(frozen=True)
class Patches(TensorBatch):
    """Where a batch of square patches lies: `scale` (B,) in (0, 1] and `centre` (B, 2), inside the image."""

    scale: Tensor
    centre: Tensor

    @classmethod
    def whole(cls, count: int, device: torch.device | str = "cpu") -> Patches:
        """The whole image, `count` times."""
        return cls(torch.ones(count, device=device), torch.zeros(count, 2, device=device))


def annealed_min_scale(iteration: int, min_scale: float, max_scale: float, anneal: float) -> float:
    """The smallest patch scale at `iteration`: GRAF's s_min = max(min_scale, min(0.9 max_scale, max_scale e)), e =
    exp(-3 anneal (it // 1000)).

    anneal <= 0 means no annealing: min_scale from the start. GRAF anneals in steps of 1000 iterations; here the same
    curve is continuous, e = exp(-3 anneal it / 1000), so that short runs anneal too.
    """
    if anneal <= 0:
        return min_scale
    return max(min_scale, min(0.9 * max_scale, max_scale * math.exp(-3 * anneal * iteration / 1000)))


def place_patches(uniforms: Tensor, min_scale: float, max_scale: float) -> Patches:
    """Patches with scale uniform in [min_scale, max_scale], placed uniformly inside the image.

    uniforms: (B, 3) in [0, 1): the random numbers for the scale and the two coordinates.
    """
    scale = min_scale + (max_scale - min_scale) * uniforms[:, 0]
    centre = (2 * uniforms[:, 1:] - 1) * (1 - scale)[:, None]
    return Patches(scale, centre)


def place_pixel_patches(uniforms: Tensor, min_scale: float, max_scale: float, size: int, resolution: int) -> Patches:
    """Patches of size x size pixels whose pixel centres are those of images of `resolution` pixels.

    A patch takes every n-th pixel of size rows and columns, and so has scale n size / resolution; n is drawn from the
    whole numbers that give scales in [min_scale, max_scale], else it is the largest one below them (at least 1), and
    the first pixel uniformly. Patches of photographs are then the photographs' own pixels, with nothing lost to
    interpolation. Every n-th pixel from the first on stands for an area that may reach n / 2 pixels over the image's
    edge. uniforms: (B, 3) in [0, 1).
    """
    finest = resolution / size
    low, high = math.ceil(min_scale * finest - 1e-6), max(1, math.floor(max_scale * finest + 1e-6))
    low = min(max(1, low), high)
    step = low + torch.floor(uniforms[:, 0] * (high - low + 1))
    first = torch.floor(uniforms[:, 1:] * (resolution - (size - 1) * step)[:, None])
    scale = step * size / resolution
    return Patches(scale, ((2 * first + 1 - step[:, None]) / resolution - 1) + scale[:, None])


def subdivide_patches(patches: Patches, size: int, factor: int, corner: Tensor) -> Patches:
    """Where crops of size x size pixels lie that are cut out of patches of (factor size) x (factor size) pixels.

    corner: (B, 2) = (x, y), the crop's first pixel. A crop has 1 / factor of the patch's scale.
    """
    shift = (2 * corner.to(patches.scale.dtype) + size) / (factor * size) - 1
    return Patches(patches.scale / factor, patches.centre + patches.scale[:, None] * shift)


def patch_grid(patches: Patches, size: int) -> Tensor:
    """Image-plane coordinates (B, size, size, 2), x then y, of the pixel centres of patches of size x size pixels."""
    cells = _centres(size, patches.scale.device, patches.scale.dtype)
    x, y = (patches.centre[:, None] + patches.scale[:, None, None] * cells[:, None]).unbind(-1)
    return torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1)


def _centres(count: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The middles (count,) of equal cells of [-1, 1]."""
    edge = 1 - 1 / count
    return torch.linspace(-edge, edge, count, device=device, dtype=dtype)


def pixel_grid(batch: int, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Image-plane coordinates (batch, height, width, 2) of all pixel centres of a whole image."""
    x, y = _centres(width, device), _centres(height, device)
    grid = torch.stack([x[None, :].expand(height, -1), y[:, None].expand(-1, width)], dim=-1)
    return grid[None].expand(batch, -1, -1, -1)


def crop_images(images: Tensor, patches: Patches, size: int, interpolation: str = "bilinear") -> Tensor:
    """The patches of real images: (B, C, H, W) -> (B, C, size, size).

    interpolation: "bilinear", which GRAF uses and which blurs between pixels, or "bicubic", which keeps most of what
    a ray there would see; on pixel centres both give the pixels. The outermost half pixel repeats the edge.
    """
    grid = patch_grid(patches, size).to(images.dtype)
    return functional.grid_sample(images, grid, mode=interpolation, padding_mode="border", align_corners=False)


def crop_pixels(images: Tensor, pixels: Tensor) -> Tensor:
    """Crops (B, C, h, w) of images (B, C, H, W), made of pixels (B, h, w) with these numbers, counted row by row."""
    numbers = pixels.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, numbers).unflatten(2, pixels.shape[1:])


def number_pixels(corner: Tensor, size: int, width: int) -> Tensor:
    """Numbers (B, size, size), for :func:`crop_pixels`, of square crops of images with `width` pixels in a row.

    corner: (B, 2) = (x, y), the crop's first pixel.
    """
    inside = torch.arange(size, device=corner.device)
    return (corner[:, 1] * width + corner[:, 0])[:, None, None] + width * inside[:, None] + inside


@dataclass(frozen=True)
class RayCaster:
    """One camera model for a whole collection: intrinsics, and the range near..far in which rays are sampled.

    With `bounding_radius`, near and far shrink to the sphere of that radius around the origin, so that no sample is
    spent outside it; a ray that misses it gets near == far. Gradients with respect to cameras pass through origins and
    directions; where a ray is sampled counts as given.
    """

    intrinsics: Intrinsics
    near: float
    far: float
    bounding_radius: float | None = None

    def moved(self, distance: float) -> RayCaster:
        """The same rays from cameras that stand `distance` further away from the origin: the range goes along.

        Where a bounding sphere says where the object ends, the range only grows, which costs nothing.
        """
        near, far = max(self.near + distance, min(self.near, NEAREST)), self.far + distance
        if self.bounding_radius is not None:
            near, far = min(near, self.near), max(far, self.far)
        return replace(self, near=near, far=max(far, 2 * min(self.near, NEAREST)))

    def cast(self, poses: Tensor, grid: Tensor) -> Rays:
        """Rays of cameras (B, 4, 4) through image-plane coordinates (B, ..., 2), flattened to N per image."""
        intrinsics = self.intrinsics
        grid = grid.reshape(grid.shape[0], -1, 2).to(poses.dtype)
        x = grid[..., 0] * (intrinsics.width / (2 * intrinsics.focal))
        y = -grid[..., 1] * (intrinsics.height / (2 * intrinsics.focal))
        camera = torch.stack([x, y, -torch.ones_like(x)], dim=-1)
        length = torch.linalg.vector_norm(camera, dim=-1, keepdim=True)
        directions = rotate(poses[:, None, :3, :3], camera / length)
        origins = poses[:, None, :3, 3].expand_as(directions)
        near, far = torch.full_like(length, self.near), torch.full_like(length, self.far)
        if self.bounding_radius is not None:
            centre, towards = origins.detach(), directions.detach()
            middle = -(centre * towards).sum(-1, keepdim=True)
            half_squared = self.bounding_radius**2 - (centre.square().sum(-1, keepdim=True) - middle.square())
            half = half_squared.clamp(min=0).sqrt()
            near, far = (middle - half).clamp(self.near, self.far), (middle + half).clamp(self.near, self.far)
        return Rays(origins, directions, near, far, 1 / length)

    def cast_patches(self, poses: Tensor, patches: Patches, size: int) -> Rays:
        """Rays of patches of size x size pixels, row by row."""
        return self.cast(poses, patch_grid(patches, size))

    def cast_images(self, poses: Tensor, resolution: int) -> Rays:
        """Rays of whole square images, row by row; `resolution` may differ from that of the intrinsics."""
        return self.cast(poses, pixel_grid(len(poses), resolution, resolution, poses.device))

    def cast_pictures(self, poses: Tensor) -> Rays:
        """Rays of whole images with as many pixels as the intrinsics have, square or not, row by row."""
        return self.cast(poses, pixel_grid(len(poses), self.intrinsics.height, self.intrinsics.width, poses.device))
