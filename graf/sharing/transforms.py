"""Renders of one object as a data set with poses: RGBA pictures and the transforms.json that NeRF programs read.

Poses are camera-to-world, right-handed, the camera looks down -z, z up: OpenGL's and NeRF's convention, which is also
this program's, so they are written as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graf.base.errors import UserError
from graf.base.files import create_folder, write_atomically
from graf.evaluation.pictures import Picture, save_png
from graf.evaluation.renderer import Renderer
from graf.geometry.cameras import Intrinsics, elevation_from_height, height_from_elevation, ring
from graf.geometry.views import Views
from graf.runtime.logs import progress_bar

FILE_NAME, IMAGE_FOLDER = "transforms.json", "images"
#: opacity below which a pixel's own colour cannot be told from the background, less than half a grey level of 255
_INVISIBLE = 0.5 / 255


def turntable_views(renderer: Renderer, class_idx: int, count: int, elevations: Sequence[float] | None = None) -> Views:
    """`count` cameras around an object, evenly over one turn, at each of the elevations (degrees) in turn.

    elevations: None for those of the data set. Raises UserError for fewer than two cameras, or an elevation out of
    [-90, 90].
    """
    if count < 2:
        raise UserError(f"--transforms {count}: expected at least 2 pictures; 50 to 100 are usual")
    if elevations is None:
        elevations = [elevation_from_height(v) for v in renderer.cameras.v_list]
    for degrees in elevations:
        if not -90 <= degrees <= 90:
            raise UserError(f"--elevations {degrees:g}: expected -90 to 90 degrees above the horizon")
    u, _ = ring(count, 0.5)
    heights = [height_from_elevation(elevations[number % len(elevations)]) for number in range(count)]
    return renderer.cameras.views_at(torch.full((count,), class_idx), u, torch.tensor(heights))


def write_transforms(
    folder: Path, renderer: Renderer, z: Tensor, views: Views, provenance: Mapping[str, Any] | None = None
) -> list[Path]:
    """Render the object of code z (dim_z,) from views (N) into a new folder; returns transforms.json and the pictures.

    provenance: plain values, kept under "graf", which readers pass over. The folder appears when it is whole. Raises
    UserError where something is there already, OSError where it cannot be written.
    """
    with create_folder(folder) as making:
        names = _write_pictures(making, renderer, z, views)
        content = _describe(renderer.lens(), names, views.poses) | {"graf": dict(provenance or {})}
        write_atomically(making / FILE_NAME, json.dumps(content, indent=1) + "\n")
    return [folder / FILE_NAME, *(folder / name for name in names)]


def _write_pictures(folder: Path, renderer: Renderer, z: Tensor, views: Views) -> list[str]:
    background = renderer.generator.background_colour.detach().cpu()
    names = []
    for number in progress_bar(range(len(views)), desc="pictures", unit="picture"):
        renders = renderer.render_views(z[None], views[number : number + 1])
        names.append(f"{IMAGE_FOLDER}/{number:04d}.png")
        save_png(folder / names[-1], cut_out(renders.rgb[0], renders.opacity[0], background))
    return names


def cut_out(rgb: Tensor, opacity: Tensor, background: Tensor) -> Picture:
    """RGBA (H, W, 4), not premultiplied, of a render rgb (3, H, W) in [-1, 1] before a background (3,).

    A render is c a + b (1 - a) for the object's colour c, opacity a (1, H, W) in [0, 1] and background b; this solves
    it for c. Laid over the same background, the picture is the render again, to a grey level or two of 255.
    """
    behind = background[:, None, None]
    colour = torch.where(opacity > _INVISIBLE, behind + (rgb - behind) / opacity.clamp(min=_INVISIBLE), behind)
    levels = torch.cat([(colour + 1) / 2, opacity]).clamp(0, 1) * 255
    return np.asarray(levels.round().to(torch.uint8).permute(1, 2, 0))


def _describe(lens: Intrinsics, names: Sequence[str], poses: Tensor) -> dict[str, Any]:
    """The keys that nerfstudio and NeRF's own readers want; the optical axis is in the middle of the picture."""
    size, focal = lens.width, lens.focal
    angle = 2 * math.atan(size / (2 * focal))
    return {
        "camera_model": "OPENCV",
        "camera_angle_x": angle,
        "camera_angle_y": angle,
        "fl_x": focal,
        "fl_y": focal,
        "cx": size / 2,
        "cy": size / 2,
        "w": size,
        "h": size,
        **dict.fromkeys(("k1", "k2", "p1", "p2"), 0.0),
        "frames": [
            {"file_path": name, "transform_matrix": pose} for name, pose in zip(names, poses.tolist(), strict=True)
        ],
    }
