"""One HTML file with the coloured meshes of some objects: it opens from a disk, without a server or a network.

`page.html` beside this file is the page, a small WebGL program; this file fills in the meshes. Places are kept as
16-bit and normals as 8-bit numbers, which is finer than a screen shows: about 50 bytes for a vertex with its triangles.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from graf.mesh import ColouredMesh


@dataclass(frozen=True)
class PageCamera:
    """Where a page looks from at first: fov: vertical, degrees; distance from the origin; elevation, degrees.

    background: red, green and blue in [0, 1].
    """

    fov: float
    distance: float
    elevation: float
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)


def build_page(title: str, meshes: Mapping[str, ColouredMesh], camera: PageCamera) -> str:
    """The text of the page, which shows one of the meshes at a time, by name."""
    values = {
        "title": html.escape(title),
        "objects": _script([_encode(name, mesh) for name, mesh in meshes.items()]),
        "fov": _script(math.radians(camera.fov)),
        "distance": _script(camera.distance),
        "elevation": _script(math.radians(camera.elevation)),
        "background": _script(list(camera.background)),
    }
    text = resources.files("graf.viewer").joinpath("page.html").read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def _script(value: object) -> str:
    """A value as JavaScript; a name cannot end the script that it stands in."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _encode(name: str, mesh: ColouredMesh) -> dict[str, Any]:
    scale = float(np.abs(mesh.vertices).max(initial=1e-6))
    places = np.rint(mesh.vertices / scale * 32767).astype("<i2")
    normals = np.rint(mesh.normals * 127).astype("<i1")
    colours = np.rint(mesh.colours.clip(0, 1) * 255).astype("<u1")
    # WebGL reads vertices fastest at multiples of four bytes
    arrays = {"vertices": _pad(places), "normals": _pad(normals), "colours": _pad(colours)}
    arrays["faces"] = mesh.faces.astype("<u4")
    encoded = {key: base64.b64encode(array.tobytes()).decode("ascii") for key, array in arrays.items()}
    return {"name": name, "scale": scale, **encoded}


def _pad(columns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A fourth column (N, 4) of zeros."""
    return np.ascontiguousarray(np.pad(columns, ((0, 0), (0, 1))))
