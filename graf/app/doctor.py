"""Look at a data set before training: `graf doctor --config configs/x.yaml [section.key=value ...]`.

Prints what the set holds and what is wrong with it, and draws a contact sheet, the cameras, and photographs with the
projected unit sphere and axes, from which radius, field of view, elevation and the sense of rotation can be checked:
the object should fill the sphere, and its front should keep to the red axis.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from graf.app.builders import (
    DatasetInfo,
    build_cameras,
    build_pose_sampler,
    describe_dataset,
    mean_radius,
    open_photographs,
)
from graf.app.failures import ErrorLog, run_command
from graf.app.refined_cameras import build_camera_refinement
from graf.base.files import check_writable
from graf.config import Config, DataConfig, load_config
from graf.data.datasets import PhotoDataset
from graf.evaluation.pictures import to_uint8
from graf.geometry.cameras import Intrinsics, elevation_from_height, project_points
from graf.geometry.rays import Patches
from graf.geometry.views import NUM_UNIFORMS
from graf.runtime.logs import setup_console

RED, GREEN, BLUE, GREY, ORANGE = (225, 40, 40), (30, 160, 60), (40, 90, 230), (130, 130, 130), (240, 140, 20)
AXIS_COLOURS = (RED, GREEN, BLUE)
SHEET_COLUMNS, MAX_SHEET_ROWS, SHEET_TILE = 12, 24, 96
OVERLAY_COLUMNS, OVERLAY_TILE = 4, 320
CAMERA_PANEL, CAPTION = 420, 14
SAMPLED_POSES = 500  # drawn where poses are sampled during training


@dataclass(frozen=True)
class Inspection:
    """An opened data set with its cameras as training would see them.

    poses: (N, 4, 4) of the photographs, or sampled ones where they are unknown; shown: the part that each photograph
    shows of the image plane of dataset_info.fov.
    """

    config: DataConfig
    dataset: PhotoDataset
    dataset_info: DatasetInfo
    poses: Tensor
    shown: Patches

    @property
    def fov(self) -> float:
        """Field of view, degrees, with the lens as data.refined_cameras knows it."""
        known = self.config.refined_cameras
        return self.dataset_info.fov if known is None else known.fov

    @property
    def elevations(self) -> list[float]:
        """Degrees above the horizon of each height, as data.refined_cameras knows them."""
        known = self.config.refined_cameras
        return [elevation_from_height(v) for v in self.dataset.v_list] if known is None else list(known.elevations)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the doctor; returns the exit code."""
    parser = argparse.ArgumentParser(prog="graf doctor", description="Look at a data set before training.")
    parser.add_argument(
        "--config", default="default", help="YAML file, or name of a shipped configuration (default: %(default)s)"
    )
    parser.add_argument("--out", default="doctor", help="folder of the pictures (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any key of the configuration")
    options = parser.parse_intermixed_args(arguments)

    def command(errors: ErrorLog) -> int:
        setup_console()
        config = load_config(options.config, options.overrides)
        check_writable(Path(options.out))
        inspection = inspect_data(config)
        pictures = write_pictures(inspection, Path(options.out))  # first: who reads the rest may leave, as head does
        print("\n".join(describe(inspection)))
        for path in pictures:
            print(f"wrote {path}")
        return 0

    return run_command(command, debug=options.debug, interrupted="interrupted")


def inspect_data(config: Config) -> Inspection:
    """Open all photographs of a config, held-out ones included, and find their cameras."""
    dataset = open_photographs(config, "all")
    dataset_info = describe_dataset(config, dataset)
    cameras = build_cameras(config, dataset_info)
    pose_sampler = build_pose_sampler(config, dataset, cameras)
    if dataset.poses_known:
        views = pose_sampler.select(range(len(dataset)))
    else:
        views = pose_sampler.pick(torch.rand(SAMPLED_POSES, NUM_UNIFORMS, generator=torch.Generator().manual_seed(0)))
    poses, shown = views.poses, Patches.whole(len(views))
    refinement = build_camera_refinement(config.data, dataset_info)
    if refinement is not None:
        with torch.no_grad():
            poses, shown = refinement(views, shown)
    return Inspection(config.data, dataset, dataset_info, poses, shown)


def describe(inspection: Inspection) -> list[str]:
    """Lines that say what the data set holds and what is wrong with it."""
    dataset, data = inspection.dataset, inspection.config
    labels = dataset.labels
    lines = [f"{dataset.index.root}: {len(dataset)} photographs, {len(dataset.class_names)} classes"]
    for class_idx, name in enumerate(dataset.class_names):
        chosen = labels[labels[:, 0] == class_idx]
        line = f"  class {class_idx} {name}: {len(chosen)} photographs"
        if dataset.poses_known:
            line += f", {len(chosen[:, 2].unique())} angles"
        if dataset.instance_names:
            known = chosen[chosen[:, 3] >= 0, 3]
            line += f", known instances: {len(known.unique())} (in {len(known)} photographs)"
        lines.append(line)
    if dataset.poses_known:
        lines += _describe_views(inspection)
    else:
        lines.append(f"poses unknown: sampled with u in {data.umin}..{data.umax}, v in {data.vmin}..{data.vmax}")
    lines.append("sizes: " + ", ".join(f"{w}x{h} ({n})" for (w, h), n in dataset.report.sizes.most_common(8)))
    lines.append(f"read as {dataset.imsize}x{dataset.imsize}")
    if data.heldout_every:
        if data.type in ("turntable", "synthetic"):
            what, total = "angles", len(labels[[not split for split in dataset.index.splits], 2].unique())
        else:  # those that cannot be read were counted too when the set was split
            what, total = "photographs", len(dataset) + len(dataset.report.unreadable)
        heldout = len(range(0, total, data.heldout_every))
        halves = f"{heldout - heldout // 2} for test, {heldout // 2} for validation"
        lines.append(f"held out: {heldout} of {total} {what}, {halves}")
    if given := Counter(split for split in dataset.index.splits if split):
        lines.append("split by labels.csv: " + ", ".join(f"{count} for {split}" for split, count in given.items()))
    radii = inspection.poses[:, :3, 3].norm(dim=1)
    lines.append(f"cameras: radius {radii.min():.2f}..{radii.max():.2f}, field of view {inspection.fov:.1f} degrees")
    problems = list(dataset.report.lines())
    if dataset.fov is not None and abs(dataset.fov - data.fov) > 0.1:
        problems.append(f"data.fov={data.fov} is not the photographs' own, {dataset.fov:.2f}, which is used instead")
    if dataset.poses is not None and (radii.mean() - mean_radius(data)).abs() > 0.05 * radii.mean():
        problems.append(
            f"data.radius={data.radius} is not the true poses' {radii.mean():.2f} (mean), which is used instead"
        )
    return lines + [f"problem: {problem}" for problem in problems or ["none found"]]


def _describe_views(inspection: Inspection) -> list[str]:
    dataset, lines = inspection.dataset, []
    for height_idx, (v, degrees) in enumerate(zip(dataset.v_list, inspection.elevations, strict=True)):
        count = int((dataset.labels[:, 1] == height_idx).sum())
        lines.append(f"  height {height_idx}, v = {v:.3f} (elevation {degrees:.0f} degrees): {count} photographs")
    sectors = Counter((dataset.labels[:, 2] // 45 * 45).tolist())
    lines.append("  angles: " + ", ".join(f"{first}-{first + 44}: {sectors[first]}" for first in range(0, 360, 45)))
    return lines


def write_pictures(inspection: Inspection, folder: Path) -> list[Path]:
    """Write contact_sheet.png, cameras.png and overlay.png into `folder`; returns their paths. Raises OSError."""
    pictures = {
        "contact_sheet.png": draw_contact_sheet(inspection.dataset),
        "cameras.png": draw_cameras(inspection.poses),
        "overlay.png": draw_overlays(inspection),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / name)
    return [folder / name for name in pictures]


def draw_contact_sheet(dataset: PhotoDataset) -> Image.Image:
    """A row of evenly spaced photographs, ordered by angle and height, for each class (the first 24 classes)."""
    count = min(len(dataset.class_names), MAX_SHEET_ROWS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * SHEET_TILE, count * (SHEET_TILE + CAPTION)), "white")
    for row in range(count):
        for column, index in enumerate(_choose_evenly(dataset, row, SHEET_COLUMNS, sort_by=[2, 1])):
            corner = (column * SHEET_TILE, row * (SHEET_TILE + CAPTION))
            _paste_photograph(sheet, dataset, index, corner, SHEET_TILE)
    return sheet


def draw_cameras(poses: Tensor) -> Image.Image:
    """Cameras (orange) around the unit sphere: from above (x to the right, y up) and from the side (z up)."""
    centres = poses[:, :3, 3]
    scale = 0.45 * CAMERA_PANEL / max(centres.norm(dim=1).max().item(), 1.0)
    picture = Image.new("RGB", (2 * CAMERA_PANEL, CAMERA_PANEL + CAPTION), "white")
    draw = ImageDraw.Draw(picture)
    from_the_side = torch.stack((centres[:, :2].norm(dim=1), centres[:, 2]), dim=1)
    views = (
        ("from above: x red, y green", centres[:, :2], (RED, GREEN)),
        ("from the side: distance from the z axis, z blue", from_the_side, (GREY, BLUE)),
    )
    for panel, (title, points, colours) in enumerate(views):
        middle = torch.tensor([(panel + 0.5) * CAMERA_PANEL, CAPTION + 0.5 * CAMERA_PANEL])
        draw.text((panel * CAMERA_PANEL + 4, 1), title, fill="black")
        _dot(draw, middle, scale, outline=GREY)
        for axis, colour in zip(torch.eye(2), colours, strict=True):
            _line(draw, torch.stack((middle, middle + scale * axis * torch.tensor([1.0, -1.0]))), colour, 3)
        for point in points:
            _dot(draw, middle + scale * point * torch.tensor([1.0, -1.0]), 2.5, fill=ORANGE)
    return picture


def draw_overlays(inspection: Inspection) -> Image.Image:
    """Photographs with the unit sphere's outline, equator and axes (x red, y green, z blue).

    Without known poses the outline alone is drawn: it is the same for every camera that looks at the origin.
    """
    dataset = inspection.dataset
    count = OVERLAY_COLUMNS if len(dataset.class_names) > 1 else 3 * OVERLAY_COLUMNS
    members = []
    for class_idx in range(len(dataset.class_names)):
        members += _choose_evenly(dataset, class_idx, count, sort_by=[2])
    members = members[: 6 * OVERLAY_COLUMNS]
    rows = -(-len(members) // OVERLAY_COLUMNS)
    sheet = Image.new("RGB", (OVERLAY_COLUMNS * OVERLAY_TILE, rows * (OVERLAY_TILE + CAPTION)), "white")
    for place, index in enumerate(members):
        tile = Image.new("RGB", (OVERLAY_TILE, OVERLAY_TILE + CAPTION), "white")
        _paste_photograph(tile, dataset, index, (0, 0), OVERLAY_TILE)
        _draw_sphere(ImageDraw.Draw(tile), inspection, index if dataset.poses_known else 0)
        corner = (place % OVERLAY_COLUMNS * OVERLAY_TILE, place // OVERLAY_COLUMNS * (OVERLAY_TILE + CAPTION))
        sheet.paste(tile, corner)
    return sheet


def outline_sphere(pose: Tensor, count: int = 96) -> Tensor:
    """Points (count, 3) of the unit sphere that a camera sees edge-on; the camera must stand outside the sphere."""
    centre = pose[:3, 3].double()
    distance = centre.norm()
    towards = centre / distance
    right = pose[:3, 0].double()
    right = torch.nn.functional.normalize(right - (right @ towards) * towards, dim=0)
    turn = torch.linspace(0, 2 * math.pi, count, dtype=torch.float64)[:, None]
    circle = torch.cos(turn) * right + torch.sin(turn) * torch.linalg.cross(towards, right)
    # A tangent from distance d touches where the normal has cosine 1/d to the direction of the camera.
    return (towards / distance + circle * (1 - 1 / distance**2).clamp(min=0).sqrt()).to(pose.dtype)


def _draw_sphere(draw: ImageDraw.ImageDraw, inspection: Inspection, number: int) -> None:
    """Sphere and axes as the camera of that number sees them, on a photograph of OVERLAY_TILE pixels a side."""
    pose, scale, centre = inspection.poses[number], inspection.shown.scale[number], inspection.shown.centre[number]
    intrinsics = Intrinsics.from_fov(2, inspection.dataset_info.fov)  # the image plane's coordinates are pixels then

    def project(points: Tensor) -> Tensor:
        plane = project_points(points, pose, intrinsics)[0] - 1
        return ((plane - centre) / scale + 1) * OVERLAY_TILE / 2

    if pose[:3, 3].norm() <= 1:
        return  # inside the sphere there is no outline
    _line(draw, project(outline_sphere(pose)), GREY, 2)
    if not inspection.dataset.poses_known:
        return
    turn = torch.linspace(0, 2 * math.pi, 96)
    equator = torch.stack((torch.cos(turn), torch.sin(turn), torch.zeros_like(turn)), dim=1)
    _line(draw, project(equator), GREY, 1)
    for axis, colour in zip(torch.eye(3), AXIS_COLOURS, strict=True):
        ends = project(torch.stack((torch.zeros(3), axis)))
        _line(draw, ends, colour, 3)
        _dot(draw, ends[1], 4, fill=colour)


def _paste_photograph(
    sheet: Image.Image, dataset: PhotoDataset, index: int, corner: tuple[int, int], size: int
) -> None:
    """Photograph number `index` enlarged or shrunk to `size`, with its class, height and angle below it."""
    image, label = dataset[index]
    pixels = to_uint8(image).permute(1, 2, 0).numpy()
    sheet.paste(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC), corner)
    class_idx, height_idx, angle, _ = label.tolist()
    text = dataset.class_names[class_idx] + (f" h{height_idx} {angle}" if dataset.poses_known else "")
    ImageDraw.Draw(sheet).text((corner[0] + 2, corner[1] + size + 1), text, fill="black")


def _choose_evenly(dataset: PhotoDataset, class_idx: int, count: int, sort_by: list[int]) -> list[int]:
    """Evenly spaced photographs of a class, in the order of these columns of their labels."""
    members = torch.nonzero(dataset.labels[:, 0] == class_idx)[:, 0].tolist()
    members.sort(key=lambda index: dataset.labels[index, sort_by].tolist())
    step = max(1.0, len(members) / count)
    return [members[int(place * step)] for place in range(min(count, len(members)))]


def _line(draw: ImageDraw.ImageDraw, points: Tensor, colour: tuple[int, int, int], width: int) -> None:
    draw.line([(x, y) for x, y in points.tolist()], fill=colour, width=width)


def _dot(draw: ImageDraw.ImageDraw, centre: Tensor, radius: float, **colours: Any) -> None:
    """A disc; colours: `fill`, `outline` or both."""
    x, y = centre.tolist()
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), **colours)
