"""The embedded synthetic set: toys rendered by a small sphere tracer and stored as an ordinary `turntable` folder.

The light belongs to the world, not to the camera, so that a toy is one consistent scene with baked shading. Depth is
z-depth along the optical axis, 0 where nothing is hit. Marching: Hart, "Sphere tracing" (The Visual Computer, 1996).
"""

import csv
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import torch
from imageio.v3 import imwrite
from torch import Tensor
from torch.nn import functional

from graf.data.errors import DataError
from graf.data.labels import LABELS_FILE, LABELS_HEADER, OPTIONAL_COLUMNS
from graf.data.shapes import CLASS_NAMES, Toy, build_toy
from graf.geometry.cameras import Intrinsics, height_from_elevation, label_angles, pose_from_angles
from graf.geometry.rays import RayCaster, pixel_grid
from graf.runtime.logs import progress_bar
from graf.runtime.threads import count_usable_cpus

VERSION = 2  # part of the cache key: raise it whenever the pictures change
DEPTH_FOLDER, MASK_FOLDER, SCENE_FILE = "depth", "mask", "scene.json"
DEFAULT_V_LIST = tuple(round(height_from_elevation(degrees), 4) for degrees in (12, 27, 42))
ANGLE_COUNTS = (72, 90, 120, 180, 360)

BOUNDING_RADIUS = 0.95
MAX_STEPS = 64
HIT_DISTANCE = 1e-3
NORMAL_STEP = 2e-3
OCCLUSION_REACH = 0.12
CONE_STEPS = 16
CONE = 8  # pixels along the side of what one cone sees
VIEWS_AT_ONCE = 16
RAYS_AT_ONCE = 262144  # few enough for the cache, enough to hide the cost of calling an operation
LIGHT = (0.48, 0.36, 0.80)  # towards the light, unit length: in front, to the left, above
AMBIENT, DIFFUSE, SKY = 0.56, 0.42, 0.10


View = tuple[int, int, int, int]  # class, instance, height, angle


@dataclass(frozen=True)
class SyntheticSettings:
    """What the synthetic set depends on, all of it in the cache key. `fov` in degrees, `v_list` heights v in [0, 1].

    Of the `instances` of each class the last `heldout_instances` are test and validation in turn, and the first
    `known_instances`, all others where it is None, are named in labels.csv. Named ones that are not all are seen from
    many sides, the others a few times: either kind has half of a class's photographs. A single object per class needs
    no name.
    """

    imsize: int
    count: int
    seed: int
    instances: int
    known_instances: int | None
    heldout_instances: int
    radius: float
    fov: float
    v_list: tuple[float, ...]
    white_bkgd: bool

    def __post_init__(self) -> None:
        if self.radius <= BOUNDING_RADIUS:
            raise DataError(
                f"data.radius={self.radius}: the camera stands inside the toys, which reach {BOUNDING_RADIUS}; try 3.5"
            )
        if not 0 <= self.heldout_instances < self.instances:
            raise DataError(
                f"data.synthetic.heldout_instances={self.heldout_instances}: expected fewer than "
                f"data.synthetic.instances={self.instances}, so that some are left to train on"
            )
        if self.known_instances is not None and self.known_instances > self.instances - self.heldout_instances:
            raise DataError(
                f"data.synthetic.known_instances={self.known_instances}: expected at most the "
                f"{self.instances - self.heldout_instances} instances that are trained on"
            )
        groups, places = len(CLASS_NAMES) * len(self.groups), len(self.v_list) * ANGLE_COUNTS[-1]
        fewest, most = groups * max(map(len, self.groups)), groups * min(map(len, self.groups)) * places
        if not fewest <= self.count <= most:
            raise DataError(
                f"data.synthetic.count={self.count}: expected {fewest} (one image of each object) to {most} "
                f"(every degree at every one of {len(self.v_list)} heights)"
            )

    @property
    def groups(self) -> list[range]:
        """Instances that are seen equally often: the named ones and the others, which share a class's photographs."""
        known = self.known_instances or 0
        return [group for group in (range(known), range(known, self.instances)) if group]

    def share_out(self, count: int) -> list[int]:
        """How many of `count` photographs of a class each instance has."""
        parts = _share_out(count, len(self.groups))
        return [share for part, group in zip(parts, self.groups, strict=True) for share in _share_out(part, len(group))]

    def instance_and_split(self, instance: int) -> tuple[str, str]:
        """What labels.csv says of an instance's photographs: its name and their split, either may be empty."""
        training = self.instances - self.heldout_instances
        if self.instances == 1:
            return "", ""
        if instance >= training:
            return "", ("test", "validation")[(instance - training) % 2]
        known = training if self.known_instances is None else self.known_instances
        return (str(instance), "") if instance < known else ("", "train")

    @property
    def folder_name(self) -> str:
        """Name of the set's folder: resolution and a hash of everything that changes the pictures."""
        key = json.dumps({"version": VERSION, "classes": CLASS_NAMES, **asdict(self)}, sort_keys=True)
        return f"synthetic_{self.imsize}_{hashlib.sha256(key.encode()).hexdigest()[:10]}"


def render_views(
    class_idx: int,
    poses: Tensor,
    intrinsics: Intrinsics,
    *,
    instance: int = 0,
    seed: int = 0,
    white_bkgd: bool = True,
    supersampling: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """True pictures of a toy from camera-to-world `poses` (N, 4, 4), which must lie outside its bounding sphere.

    Returns rgb (N, 3, H, W) in [-1, 1]; z-depth (N, 1, H, W), the mean over the part of the pixel that is covered, 0
    where nothing is; mask (N, 1, H, W), the covered share of the pixel in [0, 1]. Computed in float32 on the CPU.
    supersampling: rays along each side of a pixel; by default 3 up to 64 x 64 pixels, whose outlines would show steps
    with fewer, and 2 beyond.
    """
    toy = build_toy(class_idx, instance, seed)
    supersampling = supersampling or (3 if intrinsics.width <= 64 else 2)
    fine = intrinsics.resized(intrinsics.height * supersampling, intrinsics.width * supersampling)
    views_at_once = max(1, RAYS_AT_ONCE // (fine.height * fine.width))
    with _one_thread_per_operation():
        parts = [
            [functional.avg_pool2d(image, supersampling) for image in _render_fine(toy, some, fine, white_bkgd)]
            for some in poses.float().cpu().split(views_at_once)
        ]
    rgb, depth, mask = (torch.cat(images) for images in zip(*parts, strict=True))
    return rgb * 2 - 1, torch.where(mask > 0, depth / mask.clamp(min=1e-6), 0.0), mask


@contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    """Objects in parallel instead: these operations are so short that joining torch's threads would cost more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _render_fine(toy: Toy, poses: Tensor, intrinsics: Intrinsics, white_bkgd: bool) -> tuple[Tensor, Tensor, Tensor]:
    """rgb (N, 3, H, W) in [0, 1], depth and mask (N, 1, H, W), one ray per pixel; depth 0 where nothing is hit."""
    shape = (len(poses), intrinsics.height, intrinsics.width)
    rays = RayCaster(intrinsics, 0.0, math.inf, BOUNDING_RADIUS).cast(poses, pixel_grid(*shape))
    origins, directions = rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3)
    near = torch.maximum(rays.near.flatten(), _march_cones(toy, poses, intrinsics).flatten())
    far, axis_cosine = rays.far.flatten(), rays.axis_cosine.flatten()

    rgb = torch.full((3, len(near)), 1.0 if white_bkgd else 0.0)
    depth, mask = torch.zeros(len(near)), torch.zeros(len(near))
    for pixels in torch.nonzero(far > near)[:, 0].split(RAYS_AT_ONCE):
        origin, direction = origins[pixels].T.contiguous(), directions[pixels].T.contiguous()
        distance, hit = _march(toy, origin, direction, near[pixels], far[pixels])
        pixels, distance = pixels[hit], distance[hit]
        rgb[:, pixels] = _shade(toy, origin[:, hit] + direction[:, hit] * distance)
        depth[pixels] = distance * axis_cosine[pixels]
        mask[pixels] = 1.0
    return rgb.reshape(3, *shape).transpose(0, 1), depth.reshape(shape)[:, None], mask.reshape(shape)[:, None]


def _march_cones(toy: Toy, poses: Tensor, intrinsics: Intrinsics) -> Tensor:
    """How far every pixel's ray (N, H, W) is free: found for CONE x CONE pixels at once, by what surrounds them.

    At a distance t from the camera all rays of a cone of angle a lie within a t of its axis.
    """
    height, width = -(-intrinsics.height // CONE), -(-intrinsics.width // CONE)
    coarse = intrinsics.resized(height, width)
    angle = math.sqrt(0.5) / coarse.focal
    rays = RayCaster(coarse, 0.0, math.inf, BOUNDING_RADIUS).cast(poses, pixel_grid(len(poses), height, width))
    t = (poses[:, :3, 3].norm(dim=1, keepdim=True) - BOUNDING_RADIUS).expand(-1, height * width)
    for _ in range(CONE_STEPS):
        points = rays.origins + t[..., None] * rays.directions
        t = t + ((toy.distance(points.reshape(-1, 3).T).view_as(t) - angle * t) / (1 + angle)).clamp(min=0)
    rows, columns = (
        (2 * torch.arange(fine) + 1) * count // (2 * fine)
        for fine, count in ((intrinsics.height, height), (intrinsics.width, width))
    )
    return t.view(-1, height, width)[:, rows[:, None], columns]


def _march(toy: Toy, origins: Tensor, directions: Tensor, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (P,) along rays (3, P) to the surface, and whether it was hit; rays that are done leave the loop."""
    distance, hit = near.clone(), torch.zeros_like(near, dtype=torch.bool)
    active = torch.arange(len(near))
    t, origin, direction, end = near, origins, directions, far
    for _ in range(MAX_STEPS):
        step = toy.distance(origin + direction * t)
        t = t + step
        arrived = step < HIT_DISTANCE
        distance[active] = t
        hit[active[arrived]] = True
        going = torch.nonzero(~arrived & (t < end))[:, 0]
        active, t, end = active[going], t[going], end[going]
        origin, direction = origin.index_select(1, going), direction.index_select(1, going)
        if len(active) == 0:
            break
    return distance, hit


def _shade(toy: Toy, points: Tensor) -> Tensor:
    """Colour (3, P) in [0, 1]: Lambert from one distant light, ambient light, a little sky, darker in creases."""
    normal = _estimate_normals(toy, points)
    light = torch.tensor(LIGHT)
    lambert = (normal * (light / light.norm())[:, None]).sum(0).clamp(min=0)
    openness = (toy.distance(points + OCCLUSION_REACH * normal) / OCCLUSION_REACH).clamp(0, 1)
    brightness = (0.6 + 0.4 * openness) * (AMBIENT + DIFFUSE * lambert + SKY * normal[2].clamp(min=0))
    return (toy.colour(points) * brightness).clamp(0, 1)


def _estimate_normals(toy: Toy, points: Tensor) -> Tensor:
    """Unit normals (3, P): central differences over the corners of a tetrahedron, four evaluations instead of six."""
    corners = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
    gradient = sum(corner[:, None] * toy.distance(points + NORMAL_STEP * corner[:, None]) for corner in corners)
    return functional.normalize(torch.as_tensor(gradient), dim=0)


def _share_out(count: int, parts: int) -> list[int]:
    """`count` things in equal parts, the first ones larger by one where it does not divide."""
    return [len(range(part, count, parts)) for part in range(parts)]


def choose_views(settings: SyntheticSettings) -> list[View]:
    """The (class, instance, height, angle) of every image, sorted: from a regular grid of angles.

    Classes get equal shares, in them groups of instances, and in those instances (the first ones an image more where a
    count does not divide). 72 angles, or the next divisor of 360 where the count needs more. A single object of a class
    has seeded random places on that grid; of several, each is seen along a helix with a seeded start: heights in turn,
    and one angle at random in each of as many equal parts of the circle, so that every angle is as likely as another.
    """
    heights = len(settings.v_list)
    shares = [settings.share_out(count) for count in _share_out(settings.count, len(CLASS_NAMES))]
    angles = next(angles for angles in ANGLE_COUNTS if heights * angles >= max(map(max, shares)))
    views = []
    for class_idx in range(len(CLASS_NAMES)):
        random = np.random.default_rng([settings.seed, class_idx])
        for instance, share in enumerate(shares[class_idx]):
            if settings.instances == 1:
                places = [divmod(number, angles) for number in random.permutation(heights * angles)[:share].tolist()]
            else:
                height, angle = random.integers(heights), random.integers(angles)
                edges = [n * angles // share for n in range(share + 1)]
                inside = [random.integers(low, max(high, low + 1)) for low, high in pairwise(edges)]
                places = [((height + n) % heights, (angle + offset) % angles) for n, offset in enumerate(inside)]
            views += sorted((class_idx, instance, int(h), int(a) * 360 // angles) for h, a in places)
    return views


def ensure_synthetic(datadir: str | Path, settings: SyntheticSettings) -> Path:
    """Folder of the synthetic set under `datadir`, rendered first where it does not exist yet.

    It holds RGB images and labels.csv (type `turntable`, ccw), and the sub-folders depth (16-bit PNG) and mask (8-bit
    PNG) with the same file names; depth/scene.json tells the settings and `max_depth`, for which the value 65535
    stands. The set is written to a temporary folder and renamed, so that an interrupted run leaves no half set.
    """
    root = Path(datadir)
    folder = root / settings.folder_name
    if os.path.exists(folder):
        if not (folder / LABELS_FILE).is_file():
            raise DataError(f"{folder}: {LABELS_FILE} is missing; put it back, or remove the folder to render it anew")
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{settings.folder_name}_", dir=root) as temporary:
            _write_set(Path(temporary) / folder.name, settings)
            if not folder.exists():  # else another process was faster, with the same pictures
                (Path(temporary) / folder.name).rename(folder)
    except OSError as error:
        if not os.path.isfile(folder / LABELS_FILE):
            raise DataError(
                f"data.datadir={root} cannot be written ({error}); the synthetic set needs a folder with free space"
            ) from error
    return folder


def _write_set(folder: Path, settings: SyntheticSettings) -> None:
    for name in (DEPTH_FOLDER, MASK_FOLDER):
        (folder / name).mkdir(parents=True)
    max_depth = settings.radius + BOUNDING_RADIUS
    intrinsics = Intrinsics.from_fov(settings.imsize, settings.fov)

    def render(views: list[View]) -> list[tuple[object, ...]]:
        """Write one object's photographs; returns their rows of labels.csv."""
        class_idx, instance, *_ = views[0]
        u, v = label_angles(torch.tensor(views)[:, [0, 2, 3]], settings.v_list)
        pictures = render_views(
            class_idx,
            pose_from_angles(u, v, settings.radius),
            intrinsics,
            instance=instance,
            seed=settings.seed,
            white_bkgd=settings.white_bkgd,
        )
        class_name = CLASS_NAMES[class_idx]
        name = class_name + (f"_i{instance}" if settings.instances > 1 else "")
        written: list[tuple[object, ...]] = []
        for (_, _, height, angle), rgb, depth, mask in zip(views, *pictures, strict=True):
            file = f"{name}_h{height}__{angle}.png"
            _write_view(folder, file, rgb, depth / max_depth, mask)
            written.append((file, class_name, height, angle, *settings.instance_and_split(instance)))
        return written

    rows: list[tuple[object, ...]] = []
    views = choose_views(settings)
    objects = (list(group) for _, group in groupby(views, key=lambda view: view[:2]))
    parts = [some[start : start + VIEWS_AT_ONCE] for some in objects for start in range(0, len(some), VIEWS_AT_ONCE)]
    with (
        progress_bar(desc="rendering synthetic set", total=len(views), unit="image") as progress,
        _one_thread_per_operation(),
        ThreadPoolExecutor(count_usable_cpus()) as pool,
    ):
        for found in pool.map(render, parts):
            rows += found
            progress.update(len(found))
    with (folder / LABELS_FILE).open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([LABELS_HEADER + OPTIONAL_COLUMNS, *rows])
    scene = {"version": VERSION, "classes": CLASS_NAMES, "max_depth": max_depth, **asdict(settings)}
    (folder / DEPTH_FOLDER / SCENE_FILE).write_text(json.dumps(scene, indent=2), encoding="utf-8")


def _write_view(folder: Path, file: str, rgb: Tensor, relative_depth: Tensor, mask: Tensor) -> None:
    pixels = ((rgb + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    imwrite(folder / file, pixels.numpy())
    imwrite(folder / DEPTH_FOLDER / file, (relative_depth[0] * 65535).round().numpy().astype(np.uint16))
    imwrite(folder / MASK_FOLDER / file, (mask[0] * 255).round().to(torch.uint8).numpy())
