"""Videos of the synthetic toys with the camera of every frame known: for the tutorial and for benchmarks.

A turntable video stands still while the toy turns a little more than once; a walk-around video circles a toy on a
patterned table at several heights. truth.json beside them tells the camera of every frame in the toy's own frame.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from graf.base.files import write_atomically
from graf.data.shapes import CLASS_NAMES, build_toy
from graf.data.synthetic import render_views
from graf.evaluation.pictures import Picture, write_video
from graf.geometry.cameras import Intrinsics, height_from_elevation, pose_from_angles
from graf.geometry.rays import RayCaster, pixel_grid

FPS = 30
PLAIN_GREY = 0.86  # a wall or a sheet of paper: neither white parts nor black ones of a toy vanish in it
TABLE_RADIUS = 4.0  # of the patterned table, in radii of the toy
TEXELS = 1280  # along the side of its pattern
TABLE_SUPERSAMPLING = 3


@dataclass(frozen=True)
class Shot:
    """How a video is taken. size: pixels along its side; frames: of one turn; turns: of the turntable; fov in degrees.

    radius: distance of the camera in units of the toy's bounding sphere; elevation in degrees; direction: the sense in
    which the camera's azimuth grows as the toy sees it ("ccw" from above where the turntable itself turns clockwise).
    textured: whether there is a patterned wall behind the turntable.
    """

    size: int = 320
    frames: int = 120
    turns: float = 1.1
    fov: float = 30.0
    radius: float = 4.2
    elevation: float = 22.0
    direction: str = "ccw"
    textured: bool = False


@dataclass(frozen=True)
class Walk:
    """How a walk-around is taken: `frames` in all, on circles at `elevations`, by an unsteady hand.

    seed: of the hand and of the table's pattern.
    """

    size: int = 320
    frames: int = 72
    fov: float = 40.0
    radius: float = 4.0
    elevations: tuple[float, ...] = (18.0, 36.0, 54.0)
    unsteadiness: float = 0.04  # of the camera's place and aim, as a share of its distance
    seed: int = 0


@dataclass(frozen=True)
class Footage:
    """Frames uint8 (N, H, W, 3), masks uint8 (N, H, W) and the truth: poses (N, 4, 4) camera-to-world, fov in degrees.

    The world of the poses is the toy's own: z up, the toy inside the unit sphere around the origin.
    """

    frames: Picture
    masks: Picture
    poses: Tensor
    fov: float

    @property
    def azimuths(self) -> Tensor:
        """Of the cameras (N,), in degrees, counter-clockwise from +x seen from above."""
        return torch.rad2deg(torch.atan2(self.poses[:, 1, 3], self.poses[:, 0, 3])) % 360

    def describe(self, fps: int = FPS) -> dict[str, object]:
        """The entry of truth.json."""
        centres = self.poses[:, :3, 3]
        elevations = torch.rad2deg(torch.asin(centres[:, 2] / centres.norm(dim=1)))
        return {
            "fov": self.fov,
            "fps": fps,
            "frames": [
                {"azimuth": round(azimuth, 4), "elevation": round(elevation, 4), "pose": pose}
                for azimuth, elevation, pose in zip(
                    self.azimuths.tolist(), elevations.tolist(), self.poses.tolist(), strict=True
                )
            ],
        }


def film_turntable(toy: str, shot: Shot) -> Footage:
    """A toy that turns in front of a camera that stands still, from a random first azimuth."""
    class_idx = CLASS_NAMES.index(toy)
    count = round(shot.frames * shot.turns)
    sign = 1 if shot.direction == "ccw" else -1
    start = np.random.default_rng([0, class_idx]).uniform()
    u = torch.remainder(start + sign * torch.arange(min(count, shot.frames)) / shot.frames, 1.0)
    poses = pose_from_angles(u, torch.full_like(u, height_from_elevation(shot.elevation)), shot.radius)
    background = torch.full((3, shot.size, shot.size), PLAIN_GREY)
    if shot.textured:
        background = functional.interpolate(make_pattern(TEXELS, seed=1)[None], shot.size, mode="area")[0]
    turn = _film(class_idx, poses, Intrinsics.from_fov(shot.size, shot.fov), background.expand(len(poses), -1, -1, -1))
    again = np.arange(count) % len(poses)  # what a second turn shows is what the first did
    return replace(turn, frames=turn.frames[again], masks=turn.masks[again], poses=turn.poses[again])


def film_walkaround(toy: str, walk: Walk) -> Footage:
    """A camera that walks around a toy on a patterned table, one circle after the other."""
    class_idx = CLASS_NAMES.index(toy)
    poses = walk_poses(walk)
    intrinsics = Intrinsics.from_fov(walk.size, walk.fov)
    return _film(class_idx, poses, intrinsics, render_table(poses, intrinsics, _lowest_point(class_idx), walk.seed))


def walk_poses(walk: Walk) -> Tensor:
    """Camera-to-world poses (N, 4, 4) of a walk: circles of equal length, heights and places a little off."""
    random = np.random.default_rng(walk.seed)
    circles = np.array_split(np.arange(walk.frames), len(walk.elevations))
    u = np.concatenate([np.arange(len(circle)) / len(circle) for circle in circles])
    elevations = np.concatenate([[degrees] * len(some) for degrees, some in zip(walk.elevations, circles, strict=True)])
    # A hand drifts: what is off now is off almost as much in the next frame.
    drift = _drift(random, walk.frames, 5)
    elevations = elevations + np.degrees(walk.unsteadiness) * drift[:, 0]
    radii = walk.radius * (1 + walk.unsteadiness * drift[:, 1])
    v = torch.tensor([height_from_elevation(degrees) for degrees in elevations], dtype=torch.float32)
    poses = pose_from_angles(torch.tensor(u, dtype=torch.float32), v, torch.tensor(radii, dtype=torch.float32))
    return poses @ _small_rotations(torch.tensor(walk.unsteadiness * drift[:, 2:], dtype=torch.float32))


def film_posed_photographs(transforms: Path, ground: float | None, size: int | None = None) -> Footage:
    """Posed RGBA photographs (NeRF's transforms_train.json), on a patterned table at z = `ground` or else on grey.

    size: pixels along the side where they are enlarged. The world is that of the file.
    """
    content = json.loads(transforms.read_text(encoding="utf-8"))
    poses = torch.tensor([frame["transform_matrix"] for frame in content["frames"]], dtype=torch.float32)
    fov = math.degrees(content["camera_angle_x"])
    images = []
    for frame in content["frames"]:
        image = Image.open(transforms.parent / f"{frame['file_path']}.png").convert("RGBA")
        images.append(image if size is None else image.resize((size, size), Image.Resampling.BICUBIC))
    rgba = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    intrinsics = Intrinsics.from_fov(rgba.shape[-1], fov)
    background = torch.full_like(rgba[:, :3], PLAIN_GREY)
    if ground is not None:
        background = render_table(poses, intrinsics, ground)
    alpha = rgba[:, 3:]
    return Footage(_to_bytes(rgba[:, :3] * alpha + background * (1 - alpha)), _to_bytes(alpha)[..., 0], poses, fov)


def render_table(poses: Tensor, intrinsics: Intrinsics, ground: float, seed: int = 0) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] of a round patterned table at z = `ground` in a grey room."""
    fine = intrinsics.resized(intrinsics.height * TABLE_SUPERSAMPLING, intrinsics.width * TABLE_SUPERSAMPLING)
    caster = RayCaster(fine, 0.0, math.inf)
    pattern = make_pattern(TEXELS, seed)
    pictures = []
    for pose in poses:
        rays = caster.cast(pose[None], pixel_grid(1, fine.height, fine.width))
        down = rays.directions[0, :, 2]
        distance = torch.where(down < -1e-4, (ground - rays.origins[0, :, 2]) / down, math.inf)
        place = (rays.origins[0, :, :2] + distance[:, None] * rays.directions[0, :, :2]) / TABLE_RADIUS
        on_table = torch.isfinite(distance) & (place.norm(dim=1) < 1)
        place = torch.where(on_table[:, None], place, 0.0).view(1, fine.height, fine.width, 2)
        colours = functional.grid_sample(pattern[None], place, align_corners=False)[0]
        picture = torch.where(on_table.view(fine.height, fine.width), colours, PLAIN_GREY)
        pictures.append(functional.avg_pool2d(picture, TABLE_SUPERSAMPLING))
    return torch.stack(pictures)


@cache
def make_pattern(side: int, seed: int = 0) -> Tensor:
    """A pattern (3, side, side) in [0, 1] with something to see at every scale, like a rug or a page of a newspaper."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.full((1, 3, side, side), 0.5)
    cells = 4
    while cells < side:  # each finer than the last
        noise = torch.rand(1, 3, cells, cells, generator=generator) - 0.5
        pattern += 0.55 * functional.interpolate(noise, (side, side), mode="bilinear", align_corners=False)
        cells *= 3
    for _ in range(250):  # blots with edges, which are corners and blobs to a detector
        centre_x, centre_y = (torch.rand(2, generator=generator) * side).tolist()
        radius = (0.004 + 0.02 * torch.rand(1, generator=generator).item()) * side
        colour = torch.rand(3, 1, generator=generator)
        rows = slice(max(0, int(centre_y - radius)), int(centre_y + radius) + 2)
        columns = slice(max(0, int(centre_x - radius)), int(centre_x + radius) + 2)
        y, x = torch.meshgrid(torch.arange(side)[rows], torch.arange(side)[columns], indexing="ij")
        inside = (x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2
        pattern[0, :, rows, columns][:, inside] = colour
    return pattern[0].clamp(0.02, 0.98)


def _film(class_idx: int, poses: Tensor, intrinsics: Intrinsics, background: Tensor) -> Footage:
    rgb, _, mask = render_views(class_idx, poses, intrinsics)
    over_white = (rgb + 1) / 2
    frames = over_white - (1 - mask) * (1 - background)
    fov = math.degrees(2 * math.atan(intrinsics.width / 2 / intrinsics.focal))
    return Footage(_to_bytes(frames), _to_bytes(mask)[..., 0], poses, round(fov, 6))


def _to_bytes(images: Tensor) -> Picture:
    """Images (N, C, H, W) in [0, 1] -> uint8 (N, H, W, C)."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _lowest_point(class_idx: int) -> float:
    """The height z of the plane that a toy stands on."""
    axis = torch.linspace(-0.95, 0.95, 96)
    points = torch.stack([part.flatten() for part in torch.meshgrid(axis, axis, axis, indexing="ij")])
    return points[2, build_toy(class_idx).distance(points) < 0.01].min().item()


def _drift(random: np.random.Generator, count: int, kinds: int) -> np.ndarray:
    """Smooth random courses (count, kinds) of unit variance, about six frames long."""
    kernel = np.hanning(9)
    noise = random.standard_normal((count + len(kernel) - 1, kinds)) / np.linalg.norm(kernel)
    return np.stack([np.convolve(course, kernel, "valid") for course in noise.T], axis=1)


def _small_rotations(angles: Tensor) -> Tensor:
    """Rotations (N, 4, 4) by vectors (N, 3) of radians."""
    zero = torch.zeros(len(angles))
    x, y, z = angles.unbind(1)
    skew = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), dim=1).view(-1, 3, 3)
    rotation = torch.eye(4).repeat(len(angles), 1, 1)
    rotation[:, :3, :3] = torch.linalg.matrix_exp(skew)
    return rotation


def save_footage(folder: Path, name: str, footage: Footage) -> Path:
    """Write `name`.mp4 and its entry in truth.json of the folder; returns the video."""
    video = write_video(folder / f"{name}.mp4", footage.frames, FPS)
    truth_file = folder / "truth.json"
    truth = json.loads(truth_file.read_text(encoding="utf-8")) if truth_file.is_file() else {}
    truth[video.name] = footage.describe()
    write_atomically(truth_file, json.dumps(truth, indent=1))
    return video


def main(arguments: Sequence[str] | None = None) -> int:
    """Render the videos; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the videos and truth.json")
    parser.add_argument("--toys", nargs="+", choices=CLASS_NAMES, default=["duck", "mug"])
    parser.add_argument("--walkaround", action="store_true", help="a camera that circles the toy, no turntable")
    parser.add_argument(
        "--background", choices=("plain", "textured"), default="plain", help="behind a turntable (default: %(default)s)"
    )
    parser.add_argument("--direction", choices=("ccw", "cw"), default="ccw", help="in which the azimuth grows")
    parser.add_argument("--elevation", type=float, default=Shot.elevation, help="degrees, of the turntable's camera")
    parser.add_argument("--size", type=int, default=Shot.size, help="pixels along the side (default: %(default)s)")
    parser.add_argument("--frames", type=int, help="of one turn of a turntable, or of a whole walk-around")
    options = parser.parse_args(arguments)
    for toy in options.toys:
        if options.walkaround:
            walk = Walk(size=options.size, frames=options.frames or Walk.frames)
            video = save_footage(options.out, f"{toy}_walkaround", film_walkaround(toy, walk))
        else:
            shot = Shot(
                size=options.size,
                frames=options.frames or Shot.frames,
                elevation=options.elevation,
                direction=options.direction,
                textured=options.background == "textured",
            )
            video = save_footage(options.out, toy, film_turntable(toy, shot))
        print(f"wrote {video}")
    print(f"wrote {options.out / 'truth.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
