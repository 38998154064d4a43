"""Photographs with known cameras made a data set: the world centred on the object, pictures aimed at it, and
`transforms.json`.

The world of what finds the cameras is any; what is written has the object in the unit sphere around the origin, z up,
and every camera aimed at the origin.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from graf.base.extras import import_optional
from graf.base.files import create_folder, write_atomically
from graf.capture.cameras import Lens, PosedPhotographs, find_up, look_at_origin, move_world
from graf.capture.errors import CaptureError
from graf.capture.frames import fit_within
from graf.capture.photo_set import free_folder
from graf.capture.visual_hull import find_sphere

TRANSFORMS_FILE, IMAGES_FOLDER = "transforms.json", "images"
MARGIN = 1.05  # of the pictures that are written, around the unit sphere
MAX_SIDE = 1024  # of them, pixels


def centre_on_object(photographs: PosedPhotographs, level: bool = True) -> PosedPhotographs:
    """The same photographs in the object's world: it fills the unit sphere, z is up, the first camera at azimuth 0.

    The object is what the masks enclose from all sides; without masks it is what all pictures show. level: z is
    up from the floor, or else as the cameras are held; else its axes are kept, z is up already.
    """
    centre, radius = find_sphere(photographs)
    return move_world(photographs, _upright(photographs, centre) if level else np.eye(3), centre, radius)


def _upright(photographs: PosedPhotographs, centre: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) to the world in which z is up and the first camera at azimuth 0."""
    poses, floor = photographs.poses, photographs.floor
    up = find_up(poses) if floor is None else floor[:3]
    towards = poses[0, :3, 3] - centre
    x = towards - (towards @ up) * up
    if np.linalg.norm(x) < 1e-6 * np.linalg.norm(towards):  # it looks straight down: where its right side is
        x = np.cross(poses[0, :3, 0], up)
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(up, x), up])


def aim_at_object(photographs: PosedPhotographs, most: int = MAX_SIDE) -> PosedPhotographs:
    """Square pictures by pinhole cameras at the same places that look at the origin, upright, the unit sphere filling
    the picture of the nearest ones.

    A camera that turns around its own centre sees the same rays, so this is exact, and takes the lens's distortion out.
    The object keeps its size in pixels where pictures are then at most `most` pixels wide, and is reduced by averaging
    else.
    """
    cv2 = import_optional("cv2", "capture")
    nearest = float(np.quantile(photographs.distances, 0.02))
    if nearest <= 1.2:
        raise CaptureError(
            f"the nearest cameras stand {nearest:.2f} radii from the middle of the object, almost inside it; look at "
            "the masks, or take photographs from farther away"
        )
    tangent = MARGIN * math.tan(math.asin(1 / nearest))
    natural = 2 * max(8, round(photographs.lens.focal * tangent))
    side = min(most, natural)
    fine = side * math.ceil(natural / side)
    fov = math.degrees(2 * math.atan(tangent))
    poses = np.stack([look_at_origin(pose[:3, 3]) for pose in photographs.poses])
    y, x = np.mgrid[:fine, :fine]
    rays = Lens.from_fov(fine, fine, fov).ray(np.stack([x, y], axis=-1) + 0.5)
    images, masks = [], []
    for number, (pose, aimed) in enumerate(zip(photographs.poses, poses, strict=True)):
        turned = rays @ (pose[:3, :3].T @ aimed[:3, :3]).T
        # Pixels beyond the picture, and behind the camera, are -1: outside.
        pixels = np.nan_to_num(photographs.lens.project(turned) - 0.5, nan=-1e4).clip(-1e4, 3e4).astype(np.float32)
        image = photographs.images[number]
        image = cv2.remap(image, pixels, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        images.append(fit_within(image, side))
        if photographs.masks is not None:
            mask = photographs.masks[number]
            mask = cv2.remap(mask, pixels, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
            masks.append(fit_within(mask, side))
    return replace(photographs, images=images, masks=masks or None, poses=poses, lens=Lens.from_fov(side, side, fov))


def check_new(folder: Path) -> None:
    """Raises CaptureError where a folder has a transforms.json already, before any work is done for it."""
    if (folder / TRANSFORMS_FILE).exists():
        raise CaptureError(
            f"{folder / TRANSFORMS_FILE} exists already; photographs with poses are one class in one folder: "
            "give another --out, or remove it"
        )


def write_transforms(folder: Path, photographs: PosedPhotographs) -> Path:
    """Write images/NNNN.png (with masks as transparency) and, when all are there, transforms.json; returns its path.

    As `data.type: transforms` and nerfstudio read it. The lens must be a pinhole. Where there are images already, which
    may be the very photographs, new ones go into images-2. Raises CaptureError, OSError.
    """
    check_new(folder)
    lens = photographs.lens
    if lens.radial:
        raise ValueError("transforms.json holds pinhole cameras here; aim_at_object makes them")
    frames, place = [], free_folder(folder, IMAGES_FOLDER)
    with create_folder(place) as staged:
        for number, (image, pose) in enumerate(zip(photographs.images, photographs.poses, strict=True)):
            file = f"{number:04d}.png"
            if photographs.masks is not None:
                image = np.dstack([image, photographs.masks[number]])
            Image.fromarray(image).save(staged / file, format="PNG")
            frames.append(
                {
                    "file_path": f"{place.name}/{file}",
                    "transform_matrix": pose.tolist(),
                    "source": photographs.names[number],
                }
            )
    content = {
        "camera_model": "PINHOLE",
        "camera_angle_x": math.radians(lens.fov),
        "w": lens.width,
        "h": lens.height,
        "fl_x": lens.focal,
        "fl_y": lens.focal,
        "cx": lens.centre[0],
        "cy": lens.centre[1],
        "frames": frames,
    }
    write_atomically(folder / TRANSFORMS_FILE, json.dumps(content, indent=1))
    return folder / TRANSFORMS_FILE


def training_overrides(photographs: PosedPhotographs) -> dict[str, float]:
    """The keys of a configuration that these cameras need, in the unit sphere's world: radius, near and far."""
    distances = photographs.distances
    return {
        "data.radius": round(float(distances.mean()), 2),
        "data.near": round(max(0.05, float(distances.min()) - 1), 2),
        "data.far": round(float(distances.max()) + 1, 2),
        "data.fov": round(photographs.lens.fov, 2),
    }
