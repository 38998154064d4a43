"""Renders objects of a generator from codes, classes and cameras: in eval mode, without a graph, in bounded memory.

It opens no files: `graf.load` makes a Renderer of a trained run.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from graf.base.errors import UserError
from graf.evaluation.pictures import to_uint8
from graf.geometry.cameras import (
    Intrinsics,
    angles_from_pose,
    elevation_from_height,
    height_from_elevation,
    median_height,
)
from graf.geometry.rays import Patches, RayCaster, Rays
from graf.geometry.views import NUM_UNIFORMS as NUM_VIEW_UNIFORMS
from graf.geometry.views import Cameras, PoseSampler, Views
from graf.geometry.volume_rendering import RaySampling, Render
from graf.models.ccsr import CCSR
from graf.models.generator import Generator, draw_latents
from graf.runtime.amp import Precision
from graf.runtime.memory import retry_smaller
from graf.runtime.randomness import Draws

#: pixels of super-resolved output that the trunk works on at once, besides borders: 1024 x 1024
STRIP_PIXELS = 2**20
#: distances from the origin that differ by a smaller share are one: poses are float32
SAME_DISTANCE = 1e-5

#: one value for all images of a batch, or one for each
Numbers = float | Sequence[float]
ClassNames = str | int | Sequence[str | int]


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside, the former mode of every submodule afterwards."""
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@dataclass(frozen=True)
class Renders(Render):
    """Images on the CPU: rgb (B, 3, H, W), z-depth (B, 1, H, W) in world units and opacity (B, 1, H, W) in [0, 1].

    sr: (B, 3, s H, s W), super-resolved, where that was asked for. CCSR's projection may leave [-1, 1]: clip its
    colours before they are shown.
    """

    sr: Tensor | None = None

    def numpy(self, output: str = "rgb") -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The images of `output`, "rgb" or "sr", clipped, as uint8 (B, H, W, 3).

        Raises UserError where there is no super-resolution.

        >>> renderer.sample(azimuth=[0, 90]).numpy().shape
        (2, 16, 16, 3)
        """
        images = {"rgb": self.rgb, "sr": self.sr}.get(output)
        if images is None:
            raise UserError(f"output={output!r}: expected rgb, or sr of what was rendered with super_resolve=True")
        return to_uint8(images).permute(0, 2, 3, 1).numpy()

    def pil(self, output: str = "rgb") -> list[Image.Image]:
        """The same as a list of PIL images, one for each row of the batch.

        >>> renderer.sample(super_resolve=True).pil("sr")[0].size
        (32, 32)
        """
        return [Image.fromarray(image) for image in self.numpy(output)]


@dataclass(frozen=True)
class Renderer:
    """A generator ready to render: what `graf.load` returns, and what training samples and scores with.

    generator, ccsr: networks on `device` (None: no super-resolution); caster, cameras: how rays and poses are made;
    resolution: side of the images, pixels; classes: the names of the classes, in the order of their indices;
    uniform_z: the distribution of the codes, uniform in [-1, 1] instead of normal; sampling: samples per ray, None for
    as many as in training; config: the configuration that the networks were trained with; truncation: factor in [0, 1]
    on drawn codes, as the truncation trick of Brock et al. (ICLR 2019) limits them: nearer to the mean object, which
    z = 0 stands for, renders are surer and less various; before_image: is called before each image, and before
    each chunk of points whose densities or colours are asked for; it may raise, to end a long piece of work.

    Every method works in eval mode and without gradients, in chunks that are halved where memory runs out, and returns
    float32 tensors on the CPU. Arguments that cannot be used raise UserError.
    """

    generator: Generator = field(repr=False)
    caster: RayCaster
    precision: Precision
    device: torch.device
    resolution: int
    cameras: Cameras
    classes: tuple[str, ...]
    uniform_z: bool = False
    ccsr: CCSR | None = field(default=None, repr=False)
    sampling: RaySampling | None = None
    config: Any = field(default=None, repr=False)
    truncation: float = 1.0
    before_image: Callable[[], None] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.truncation <= 1:
            raise UserError(f"truncation={self.truncation}: expected 0 to 1")

    # ------------------------------------------------------------------------------------------------ for people

    def sample(
        self,
        seed: int | Sequence[int] = 0,
        z: Tensor | None = None,
        class_name: ClassNames | None = None,
        azimuth: Numbers = 45.0,
        elevation: Numbers | None = None,
        radius: Numbers | None = None,
        resolution: int | None = None,
        super_resolve: bool = False,
        num_samples: int | None = None,
    ) -> Renders:
        """Render objects from cameras around them that look at the origin.

        A list for any of the first six arguments makes a batch of B images; the others then have one value or B.

        seed: names the object; z: its code instead, (dim_z,) or (B, dim_z); class_name: a name out of `classes`, or an
        index (default: the first). azimuth: degrees, counter-clockwise from +x seen from above; elevation: degrees
        above the horizon in [-90, 90] (default: the median of the data set's heights); radius: distance of the camera
        from the origin, world units (default: as in training); what a ray is sampled between moves with it.
        resolution: side of the renders, pixels; num_samples: samples per ray besides importance samples, at least 2
        (both: as the run's samples).

        Returns rgb (B, 3, H, W) in [-1, 1], z-depth and opacity (B, 1, H, W) and, with super_resolve, sr
        (B, 3, s H, s W). Raises UserError for an unknown class, for values out of range, for lists whose lengths do not
        fit, and for super_resolve where the run has no super-resolution.

        >>> renders = renderer.sample(seed=[0, 1, 2], class_name="mug", azimuth=90, elevation=20)
        >>> renders.rgb.shape, renders.depth.shape, renders.opacity.shape
        (torch.Size([3, 3, 16, 16]), torch.Size([3, 1, 16, 16]), torch.Size([3, 1, 16, 16]))
        >>> turn = renderer.sample(azimuth=range(0, 360, 90), super_resolve=True)
        >>> turn.sr.shape
        torch.Size([4, 3, 32, 32])
        """
        given = _broadcast(
            seed=seed,
            z=_rows(z),
            class_name=0 if class_name is None else class_name,
            azimuth=azimuth,
            elevation=self.default_elevation if elevation is None else elevation,
            radius=self.cameras.radius if radius is None else radius,
        )
        _check("azimuth", given["azimuth"], math.isfinite, "a finite number of degrees")
        _check("elevation", given["elevation"], lambda v: -90 <= v <= 90, "-90 to 90 degrees above the horizon")
        distance = "a finite distance above 0 from the origin, world units"
        _check("radius", given["radius"], lambda v: 0 < v < math.inf, distance)
        views = self.cameras.views_at(
            self._class_indices(given["class_name"]),
            torch.tensor([float(degrees) % 360 / 360 for degrees in given["azimuth"]]),
            torch.tensor([height_from_elevation(degrees) for degrees in given["elevation"]]),
            torch.tensor([float(distance) for distance in given["radius"]]),
        )
        return self._with(resolution, num_samples)._render_from(self._codes_of(given), views, super_resolve)

    def render(
        self,
        z: Tensor,
        class_name: ClassNames,
        camera_to_world: Tensor,
        resolution: int | None = None,
        super_resolve: bool = False,
        num_samples: int | None = None,
    ) -> Renders:
        """Render objects from any cameras.

        z: codes (B, dim_z), see :meth:`codes`, or (dim_z,); class_name: as in :meth:`sample`; camera_to_world:
        (B, 4, 4) or (4, 4), right-handed, x right, y up, the camera looks down -z, in a world with z up and the object
        at the origin. Each of the three has one row or B. Super-resolution takes its view from the azimuth of the
        camera's centre. What a ray is sampled between moves with the camera. The rest, the result and the errors are as
        in :meth:`sample`.

        >>> pose = torch.eye(4)
        >>> pose[2, 3] = 3.5  # above the object, looking straight down
        >>> renderer.render(renderer.codes(0, range(2)), ["car", "duck"], pose, resolution=24).rgb.shape
        torch.Size([2, 3, 24, 24])
        """
        if camera_to_world.shape[-2:] != (4, 4) or camera_to_world.dim() > 3:
            raise UserError(f"camera_to_world has shape {tuple(camera_to_world.shape)}: expected (4, 4) or (B, 4, 4)")
        given = _broadcast(z=_rows(z), class_name=class_name, camera_to_world=camera_to_world.reshape(-1, 4, 4))
        poses = torch.stack(given["camera_to_world"]).float().cpu()
        class_idx = self._class_indices(given["class_name"])
        views = replace(self.cameras.views_at(class_idx, *angles_from_pose(poses)), poses=poses)
        return self._with(resolution, num_samples)._render_from(self._codes_of(given), views, super_resolve)

    def render_camera(
        self,
        z: Tensor,
        class_name: str | int,
        camera_to_world: Tensor,
        intrinsics: Intrinsics,
        super_resolve: bool = False,
        num_samples: int | None = None,
        rays: Rays | None = None,
    ) -> Renders:
        """Render one object through any pinhole camera: any field of view, any height and width, near or far.

        z: (dim_z,) or (1, dim_z); camera_to_world: (4, 4) or (1, 4, 4), as in :meth:`render`; intrinsics: the image's
        height, width and focal length in pixels. The lens is the given one; none that was learned changes it. What a
        ray is sampled between moves with the camera, and rays that miss the bounding sphere show the background at no
        cost. rays: those of :meth:`camera_rays`, where less of them is to be sampled. The rest, the result (B = 1) and
        the errors are as in :meth:`render`.

        >>> pose = torch.eye(4)
        >>> pose[2, 3] = 5.0
        >>> wide = Intrinsics.from_vertical_fov(height=18, width=32, fov=40.0)
        >>> renderer.render_camera(renderer.codes(0, range(1)), "duck", pose, wide).rgb.shape
        torch.Size([1, 3, 18, 32])
        """
        if camera_to_world.numel() != 16:
            raise UserError(f"camera_to_world has shape {tuple(camera_to_world.shape)}: expected (4, 4)")
        poses = camera_to_world.reshape(1, 4, 4).float().cpu()
        class_idx = self._class_indices([class_name])
        view = replace(self.cameras.views_at(class_idx, *angles_from_pose(poses)), poses=poses)
        codes = self._codes_of({"z": [z.reshape(-1)]})
        rays = self.camera_rays(poses, intrinsics) if rays is None else rays
        with eval_mode(self.generator):
            return self._with(None, num_samples)._render_picture(codes, view, rays, intrinsics, super_resolve)

    def camera_rays(self, camera_to_world: Tensor, intrinsics: Intrinsics) -> Rays:
        """The rays (1, H W), row by row and on the device, that :meth:`render_camera` renders."""
        poses = camera_to_world.reshape(1, 4, 4).float()
        (caster,) = self.casters_at(poses)
        return replace(caster, intrinsics=intrinsics).cast_pictures(poses.to(self.device))

    def casters_at(self, poses: Tensor) -> list[RayCaster]:
        """How cameras (B, 4, 4) cast rays: sampled as far before and behind the origin as training samples them."""
        near, far, usual = self.caster.near, self.caster.far, self.cameras.radius
        if not near < usual < far:  # poses of a data set, to which data.radius says nothing
            usual = (near + far) / 2
        moved = [distance - usual for distance in poses[:, :3, 3].detach().norm(dim=1).tolist()]
        return [self.caster if abs(by) < SAME_DISTANCE * usual else self.caster.moved(by) for by in moved]

    @property
    def fov(self) -> float:
        """Field of view of the run's images, degrees, with the lens as it was learned."""
        return self.lens().vertical_fov

    def lens(self, resolution: int | None = None) -> Intrinsics:
        """The camera that square renders are taken with, as its focal length was learned.

        >>> renderer.lens(64).width
        64
        """
        size = self.resolution if resolution is None else resolution
        view = self.cameras.views_at(torch.zeros(1, dtype=torch.int64), torch.zeros(1), torch.zeros(1))
        _, patches = self.generator.aim(view.to(self.device), Patches.whole(1, self.device))
        return Intrinsics(size, size, self.caster.intrinsics.resized(size, size).focal / patches.scale.item())

    def density(
        self,
        points: Tensor,
        seed: int | Sequence[int] = 0,
        z: Tensor | None = None,
        class_name: ClassNames | None = None,
    ) -> Tensor:
        """Volume density, per world unit, at points of objects; no colour is computed.

        points: (N, 3) of one object, or (B, N, 3); seed, z, class_name: as in :meth:`sample`, one value or B. Returns
        densities >= 0 of shape (N,) or (B, N). Raises UserError as :meth:`sample` does.

        >>> renderer.density(torch.zeros(5, 3), seed=3, class_name="mug").shape
        torch.Size([5])
        >>> bool((renderer.density(torch.rand(2, 5, 3), seed=[0, 1]) >= 0).all())
        True
        """
        (densities,) = self._evaluate_field(self._density, (points,), seed, z, class_name)
        return densities

    def radiance(
        self,
        points: Tensor,
        directions: Tensor,
        seed: int | Sequence[int] = 0,
        z: Tensor | None = None,
        class_name: ClassNames | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Colour and volume density at points of objects, as rays in `directions` meet them; no background in it.

        points, directions: (N, 3) of one object, or (B, N, 3); directions lead away from who looks and need no unit
        length; seed, z, class_name: as in :meth:`sample`, one value or B. Returns rgb in [-1, 1], (N, 3) or (B, N, 3),
        and densities >= 0 per world unit, (N,) or (B, N). Raises UserError as :meth:`sample` does.

        >>> points = torch.rand(5, 3)
        >>> rgb, density = renderer.radiance(points, -points, seed=3, class_name="mug")
        >>> rgb.shape, density.shape
        (torch.Size([5, 3]), torch.Size([5]))
        """
        if directions.shape != points.shape:
            raise UserError(
                f"directions has shape {tuple(directions.shape)}: expected {tuple(points.shape)}, one for each point"
            )
        rgb, densities = self._evaluate_field(self._radiance, (points, directions), seed, z, class_name)
        return rgb, densities

    def instance_codes(self, instances: Tensor | Sequence[int]) -> Tensor:
        """Codes z (B, dim_z) of known instances, by number (B,), as learned; z = 0 for -1, an instance that is unknown.

        A generator that knows none answers z = 0 to every number. Raises UserError for any other number.

        >>> renderer.instance_codes([-1, -1]).shape
        torch.Size([2, 8])
        """
        known = self.generator.instances
        high = math.inf if known is None else len(known) - 1
        expected = "a whole number of at least -1" if known is None else f"a whole number from -1 to {high}"
        _check("instance", instances, lambda number: _is_whole(number, -1, high), expected)
        numbers = torch.as_tensor(instances, dtype=torch.int64, device=self.device)  # an empty list would be float
        zero = torch.zeros(len(numbers), self.generator.dim_z, device=self.device)
        return self.generator.codes(zero, numbers).detach().cpu()

    def codes(self, seed: int, indices: range) -> Tensor:
        """Codes z (len(indices), dim_z): row i depends on (seed, indices[i]) alone; index 0 is what a seed names.

        >>> torch.equal(renderer.codes(0, range(8))[5:], renderer.codes(0, range(5, 8)))
        True
        """
        _check("seed", [seed], _is_whole, "a whole number")
        z = draw_latents(Draws(seed, 0, indices), "sample/z", self.generator.dim_z, self.uniform_z)
        return self.truncation * z

    @property
    def default_height(self) -> float:
        """Height v of the cameras where none is asked for: the median of the data set's heights."""
        return self.cameras.v_list[median_height(self.cameras.v_list)]

    @property
    def default_elevation(self) -> float:
        """The same in degrees above the horizon."""
        return elevation_from_height(self.default_height)

    def class_index(self, name: str | int) -> int:
        """The index of a class named by its name or its index, a number or its digits. Raises UserError for any other.

        >>> renderer.classes
        ('car', 'duck', 'house', 'mug')
        >>> renderer.class_index("house")
        2
        """
        if name in self.classes:
            return self.classes.index(str(name))
        if str(name).isdecimal() and int(name) < len(self.classes):
            return int(name)
        (nearest,) = difflib.get_close_matches(str(name), self.classes, n=1, cutoff=0)
        known = ", ".join(self.classes)
        raise UserError(f"class {name!r}: expected a name or an index of {known}; did you mean {nearest}?")

    # ------------------------------------------------------------------------------------------------ for the program

    def render_views(self, z: Tensor, views: Views, super_resolve: bool = False) -> Renders:
        """Render each z (B, dim_z) from its view (B); one image at a time on the device, rays in chunks."""
        with eval_mode(self.generator):
            return Renders.cat(
                [self._render_one(z[i : i + 1], views[i : i + 1], super_resolve) for i in range(len(views))]
            )

    def rays(self, views: Views, resolution: int | None = None) -> Rays:
        """The rays (B, resolution^2), row by row, that renders of these views are made of, on the device."""
        views = views.to(self.device)
        poses, patches = self.generator.aim(views, Patches.whole(len(views), self.device))
        return self.caster.cast_patches(poses, patches, self.resolution if resolution is None else resolution)

    def render_random(
        self, pose_sampler: PoseSampler, seed: int, indices: range, super_resolve: bool = False
    ) -> Renders:
        """Random objects from random views; image i depends on (seed, indices[i]) alone."""
        views = pose_sampler.pick(Draws(seed, 0, indices).uniform("sample/view", NUM_VIEW_UNIFORMS))
        return self.render_views(self.codes(seed, indices), views, super_resolve)

    def _render_from(self, z: Tensor, views: Views, super_resolve: bool) -> Renders:
        """As `render_views`, from cameras that may be nearer or farther than those of training: the range follows."""
        casters = self.casters_at(views.poses)
        return Renders.cat(
            [
                replace(self, caster=caster).render_views(z[i : i + 1], views[i : i + 1], super_resolve)
                for i, caster in enumerate(casters)
            ]
        )

    def _with(self, resolution: int | None, num_samples: int | None) -> Renderer:
        """The same generator at another resolution, with another number of samples per ray."""
        changes: dict[str, Any] = {}
        if resolution is not None:
            _check("resolution", [resolution], lambda number: _is_whole(number, 1), "at least 1 pixel, whole")
            changes["resolution"] = resolution
        if num_samples is not None:
            _check(
                "num_samples", [num_samples], lambda number: _is_whole(number, 2), "at least 2 samples per ray, whole"
            )
            changes["sampling"] = replace(self.sampling or self.generator.sampling, coarse=num_samples)
        return replace(self, **changes)

    def _codes_of(self, given: dict[str, list[Any]]) -> Tensor:
        """The codes (B, dim_z) that broadcast arguments name, by `z` or else by `seed`."""
        if given["z"][0] is None:
            return torch.cat([self.codes(seed, range(1)) for seed in given["seed"]])
        z = torch.stack(given["z"]).float().cpu()
        if z.shape[-1] != self.generator.dim_z:
            raise UserError(f"z has {z.shape[-1]} numbers: expected {self.generator.dim_z}, the length of a code")
        if not z.isfinite().all():
            raise UserError("z holds NaN or infinity: expected finite numbers")
        return z

    def _class_indices(self, names: Sequence[str | int]) -> Tensor:
        return torch.tensor([self.class_index(name) for name in names])

    def _render_one(self, z: Tensor, view: Views, super_resolve: bool) -> Renders:
        """One image; where memory runs out, with fewer rays or rows at once, now and from then on."""
        if super_resolve and self.ccsr is None:
            raise UserError("super_resolve=True: this run has no super-resolution; train one with ccsr.enabled=true")
        if self.before_image is not None:
            self.before_image()
        view = view.to(self.device)
        colours = retry_smaller(
            lambda: self._cast(z, view), self.generator.halve_chunk, self.device, "lower --resolution or data.imsize"
        )
        rgb, depth, opacity = colours.as_images().map(Tensor.float).tensors()
        sr = None
        if super_resolve and self.ccsr is not None:
            halve = partial(self.ccsr.halve_rows, self.resolution)
            advice = "lower --resolution, or ccsr.features and ccsr.blocks of the next run"
            sr = retry_smaller(lambda: self._super_resolve(rgb, view), halve, self.device, advice)
        return Renders(rgb.cpu(), depth.cpu(), opacity.cpu(), sr)

    def _render_picture(
        self, z: Tensor, view: Views, rays: Rays, intrinsics: Intrinsics, super_resolve: bool
    ) -> Renders:
        """One image of height x width; only rays that meet the bounding sphere are rendered."""
        if super_resolve and self.ccsr is None:
            raise UserError("super_resolve=True: this run has no super-resolution; train one with ccsr.enabled=true")
        if self.before_image is not None:
            self.before_image()
        view = view.to(self.device)
        colour = self.generator.background_colour.detach().float()
        seen = Render(
            colour.expand(1, rays.per_image, 3).clone(), rays.far * rays.axis_cosine, torch.zeros_like(rays.far)
        )
        met = (rays.far > rays.near)[0, :, 0].nonzero()[:, 0]

        def render() -> Render:
            with self.precision.autocast():
                inside = rays.map(lambda part: part[:, met])
                return self.generator(z.to(self.device), view.class_idx, inside, sampling=self.sampling)

        if len(met):
            found = retry_smaller(render, self.generator.halve_chunk, self.device, "render a smaller picture")
            for whole, part in zip(seen.tensors(), found.tensors(), strict=True):
                whole[:, met] = part.float()
        height, width = intrinsics.height, intrinsics.width
        rgb, depth, opacity = (part.mT.reshape(1, -1, height, width) for part in seen.tensors())
        sr = None
        if super_resolve and self.ccsr is not None:
            # latents are those of square images: the picture is the middle of one
            side, scale = max(height, width), self.ccsr.scale
            top, left = (side - height) // 2, (side - width) // 2
            border = (left, side - width - left, top, side - height - top)
            square = functional.pad(rgb, border, mode="replicate")
            sr = self._super_resolve(square, view)
            sr = sr[..., scale * top : scale * (top + height), scale * left : scale * (left + width)]
        return Renders(rgb.cpu(), depth.cpu(), opacity.cpu(), sr)

    def _cast(self, z: Tensor, view: Views) -> Render:
        rays = self.rays(view)
        with self.precision.autocast():
            return self.generator(z.to(self.device), view.class_idx, rays, sampling=self.sampling)

    def _super_resolve(self, rgb: Tensor, view: Views) -> Tensor:
        assert self.ccsr is not None
        # A CPU that runs out of memory kills instead of raising an error that could be answered with fewer rows.
        rows = max(1, STRIP_PIXELS // (self.ccsr.scale**2 * rgb.shape[-1]))
        self.ccsr.rows = min(self.ccsr.rows or rows, rows)
        with eval_mode(self.ccsr), self.precision.autocast():
            return self.ccsr(rgb, view.labels[:, 2], Patches.whole(len(rgb), rgb.device)).image.float().cpu()

    def _evaluate_field(
        self,
        evaluate: Callable[..., tuple[Tensor, ...]],
        places: tuple[Tensor, ...],
        seed: int | Sequence[int],
        z: Tensor | None,
        class_name: ClassNames | None,
    ) -> tuple[Tensor, ...]:
        """What `evaluate` finds at places, points (N, 3) or (B, N, 3) and more of that shape, of one object or B."""
        points = places[0]
        if points.shape[-1:] != (3,) or points.dim() not in (2, 3):
            raise UserError(f"points has shape {tuple(points.shape)}: expected (N, 3) or (B, N, 3)")
        together = torch.stack(places, dim=-3)  # (B, 1 or 2, N, 3), so that they broadcast as one argument
        given = _broadcast(
            points=together[None] if points.dim() == 2 else together,
            seed=seed,
            z=_rows(z),
            class_name=0 if class_name is None else class_name,
        )
        if points.dim() == 2 and len(given["points"]) > 1:
            raise UserError(f"points has shape {tuple(points.shape)}, of one object: expected (B, N, 3) for several")
        codes, class_idx = self._codes_of(given), self._class_indices(given["class_name"])
        with eval_mode(self.generator):
            found = [
                retry_smaller(
                    partial(self._in_chunks, evaluate, given["points"][i], codes[i : i + 1], class_idx[i : i + 1]),
                    self.generator.halve_chunk,
                    self.device,
                    "lower training.chunk",
                )
                for i in range(len(codes))
            ]
        return found[0] if points.dim() == 2 else tuple(map(torch.stack, zip(*found, strict=True)))

    def _in_chunks(
        self, evaluate: Callable[..., tuple[Tensor, ...]], places: Tensor, z: Tensor, class_idx: Tensor
    ) -> tuple[Tensor, ...]:
        """`evaluate` of one object at places (1 or 2, N, 3), as many at once as a chunk of rays has samples."""
        count, step, parts = places.shape[1], self.generator.chunk * self.generator.sampling.total, []
        if not count:  # one place says what is found, though there is nothing to be found
            return tuple(found[:0] for found in self._in_chunks(evaluate, torch.zeros(len(places), 1, 3), z, class_idx))
        with self.precision.autocast():
            codes = self.generator.field.prepare(z.to(self.device), class_idx.to(self.device))
            for start in range(0, count, step):
                if self.before_image is not None:
                    self.before_image()
                part = places[:, start : start + step].to(self.device, torch.float32)
                parts.append([values.float().cpu() for values in evaluate(codes, *part[:, None])])
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def _density(self, codes: Any, points: Tensor) -> tuple[Tensor]:
        """Densities (N,) at points (1, N, 3)."""
        return (self.generator.field.density(points[:, :, None], codes)[0, :, 0],)

    def _radiance(self, codes: Any, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Colours (N, 3) and densities (N,) at points (1, N, 3) in directions (1, N, 3)."""
        rgb, density = self.generator.field(points[:, :, None], functional.normalize(directions, dim=-1), codes)
        return rgb[0, :, 0], density[0, :, 0]


def _broadcast(**arguments: Any) -> dict[str, list[Any]]:
    """Every argument as a list, those of one value repeated to the length of the longest."""
    lists = {name: _as_list(value) for name, value in arguments.items()}
    longest = max(lists, key=lambda name: len(lists[name]))
    count = len(lists[longest])
    for name, values in lists.items():
        if len(values) not in (1, count):
            raise UserError(f"{name} has {len(values)} values and {longest} {count}: give one value or {count}")
    return {name: values * count if len(values) == 1 else values for name, values in lists.items()}


def _as_list(value: Any) -> list[Any]:
    many = isinstance(value, (Tensor, np.ndarray, Sequence)) and not isinstance(value, str)
    return list(value) if many else [value]


def _rows(z: Tensor | None) -> Tensor | None:
    """Codes as rows (B, numbers); None where none are given."""
    return None if z is None else torch.atleast_2d(z).flatten(0, -2)


def _is_whole(number: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether a whole number lies in [low, high]. Raises TypeError for any other value."""
    return low <= operator.index(number) <= high


def _check(name: str, values: Iterable[Any], fits: Callable[[Any], bool], expected: str) -> None:
    """Raise UserError for the first value of an argument that does not fit, or is of a type that cannot."""
    for value in values:
        try:
            good = fits(value)
        except (TypeError, ValueError, RuntimeError):
            good = False
        if not good:
            raise UserError(f"{name}={value}: expected {expected}")
