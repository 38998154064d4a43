"""What cameras around an object see of its shape: a cloud of coloured points, and depth maps with their cameras."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from graf.base.errors import UserError
from graf.base.files import replace_file, write_atomically
from graf.geometry.views import Views
from graf.mesh.colouring import colour_along, gradient_normals, srgb_of
from graf.mesh.field_of_object import FieldOfObject
from graf.mesh.formats import PointCloud
from graf.mesh.rays_around import meet_rays, views_around

#: the value of a depth map that stands for `max_depth` in cameras.json
WHITE = 65535
CAMERAS_FILE = "cameras.json"


def collect_points(shape: FieldOfObject, azimuths: int, resolution: int) -> PointCloud:
    """Points where rays of cameras around the object meet it, with the colours that they see there.

    azimuths, resolution: cameras at each of the data set's heights, and pixels along a side. Raises UserError where no
    ray meets the object.
    """
    places, normals, colours = [], [], []
    step = shape.radius / resolution
    for view in _one_by_one(views_around(shape.renderer, shape.class_name, azimuths)):
        rays = shape.renderer.rays(view, resolution).to("cpu")
        met = meet_rays(shape.density, rays)
        directions = rays.directions[met.hit]
        points = rays.origins[met.hit] + met.distance[met.hit][:, None] * directions
        places.append(points)
        normals.append(gradient_normals(shape.density, points, -directions, step))
        colours.append(srgb_of(colour_along(shape.radiance, points, directions, shape.radius)))
    if not sum(map(len, places)):
        raise UserError("no ray meets this object, so that it has no points: train longer, or try another --seed")
    return PointCloud(*(torch.cat(parts).numpy() for parts in (places, normals, colours)))


def write_depth_maps(shape: FieldOfObject, azimuths: int, resolution: int, folder: Path) -> list[Path]:
    """Depth maps of cameras around the object as 16-bit PNGs, and cameras.json; returns what was written.

    A value of 65535 is `max_depth` world units along the optical axis, 0 is where nothing is met; `frames` tell each
    picture's camera-to-world pose (x right, y up, looking down -z), `focal` is in pixels.
    """
    views = views_around(shape.renderer, shape.class_name, azimuths)
    depths, frames, written = [], [], []
    for view in _one_by_one(views):
        rays = shape.renderer.rays(view, resolution).to("cpu")
        distance = meet_rays(shape.density, rays).distance
        along_axis = torch.where(torch.isfinite(distance), distance * rays.axis_cosine[..., 0], 0.0)
        depths.append(along_axis.view(resolution, resolution).numpy())
    max_depth = max(float(depth.max()) for depth in depths) or 1.0
    for number, (view, depth) in enumerate(zip(_one_by_one(views), depths, strict=True)):
        file = folder / f"{number:03d}.png"
        picture = Image.fromarray(np.rint(depth / max_depth * WHITE).astype(np.uint16))
        with replace_file(file) as stream:
            picture.save(stream, format="PNG")
        frames.append({"file": file.name, "camera_to_world": view.poses[0].tolist()})
        written.append(file)
    description: dict[str, Any] = {
        "width": resolution,
        "height": resolution,
        "focal": shape.renderer.lens(resolution).focal,
        "max_depth": max_depth,
        "axes": "right-handed, z up; cameras look down -z, y up",
        "frames": frames,
    }
    write_atomically(folder / CAMERAS_FILE, json.dumps(description, indent=2))
    return [*written, folder / CAMERAS_FILE]


def _one_by_one(views: Views) -> list[Views]:
    return [views[number : number + 1] for number in range(len(views))]
