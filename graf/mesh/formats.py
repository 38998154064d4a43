"""Files of meshes and of point clouds: PLY, GLB, OBJ, STL; what each wants of axes, units and colours is done here.

Inside of this program an object lies in world units with z up, its front towards +x, and its colours are sRGB. PLY, OBJ
and STL keep the axes and say so where the format has comments. GLB (glTF 2.0) has y up, its front towards +z and its
left towards +x, so that (x, y, z) becomes (y, z, x), and its vertex colours are linear by its specification (section
3.7.2.1): sRGB numbers in their place look washed out, and 8 bits of linear ones show bands in the dark, so they are 16
bits. One world unit is a metre in glTF, and a unit of the slicer's in STL.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graf.base.errors import UserError
from graf.base.files import write_atomically
from graf.mesh.coloured_mesh import ColouredMesh, Floats, face_normals

GENERATOR = "graf"
AXES = "z up, front towards +x; unit: one world unit"
GLTF_AXES = "y up, front towards +z; unit: one metre is one world unit"
#: numbers of glTF's specification
ARRAY_BUFFER, ELEMENT_ARRAY_BUFFER = 34962, 34963
FLOAT, UNSIGNED_INT, UNSIGNED_SHORT, TRIANGLES = 5126, 5125, 5123, 4


@dataclass(frozen=True)
class PointCloud:
    """Coloured points: places (N, 3) in world units; normals (N, 3), unit length; colours (N, 3), sRGB in [0, 1]."""

    places: Floats
    normals: Floats
    colours: Floats


def save_mesh(path: Path | str, mesh: ColouredMesh, unlit: bool = True) -> None:
    """Write a mesh as the suffix of `path` says: .ply, .glb, .obj (with colours) or .stl (without).

    unlit: a GLB asks viewers to show its colours as they are (KHR_materials_unlit), as they were photographed with
    their light. Raises UserError for another suffix, for an STL that is not watertight, and OSError.
    """
    path = Path(path)
    content = encoder_of(path)(mesh, unlit)
    write_atomically(path, content)


def encoder_of(path: Path) -> Callable[[ColouredMesh, bool], bytes]:
    """What makes the bytes of a file with the suffix of `path`. Raises UserError where there is no such format."""
    encode = _ENCODERS.get(path.suffix.lower())
    if encode is None:
        found = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise UserError(f"{path}: has {found}; expected one of {', '.join(MESH_SUFFIXES)}")
    return encode


def save_points(path: Path | str, cloud: PointCloud) -> None:
    """Write a point cloud as PLY. Raises UserError for another suffix, and OSError."""
    path = Path(path)
    if path.suffix.lower() != ".ply":
        raise UserError(f"{path}: point clouds are written as .ply; give the file that suffix")
    write_atomically(path, _encode_ply(cloud.places, cloud.normals, cloud.colours))


def linear_from_srgb(colours: NDArray[Any]) -> NDArray[np.float64]:
    """Linear intensities in [0, 1] of sRGB numbers in [0, 1] (IEC 61966-2-1)."""
    values = np.asarray(colours, np.float64)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _encode_ply(places: Floats, normals: Floats, colours: Floats, faces: NDArray[Any] | None = None) -> bytes:
    """Binary little-endian PLY."""
    names = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("nx", "<f4"), ("ny", "<f4"), ("nz", "<f4")]
    points = np.empty(len(places), [*names, ("red", "u1"), ("green", "u1"), ("blue", "u1")])
    for (name, _), values in zip(names, np.hstack([places, normals]).T, strict=True):
        points[name] = values
    for name, values in zip(("red", "green", "blue"), _to_uint8(colours).T, strict=True):
        points[name] = values
    header = ["ply", "format binary_little_endian 1.0", f"comment {GENERATOR}", f"comment {AXES}"]
    header += ["comment colours are sRGB", f"element vertex {len(points)}"]
    header += [f"property float {name}" for name, _ in names]
    header += [f"property uchar {name}" for name in ("red", "green", "blue")]
    parts = [points.tobytes()]
    if faces is not None:
        triangles = np.empty(len(faces), [("count", "u1"), ("corners", "<i4", 3)])
        triangles["count"], triangles["corners"] = 3, faces
        header += [f"element face {len(faces)}", "property list uchar int vertex_indices"]
        parts.append(triangles.tobytes())
    return b"".join([("\n".join([*header, "end_header"]) + "\n").encode(), *parts])


def _encode_ply_mesh(mesh: ColouredMesh, unlit: bool) -> bytes:
    return _encode_ply(mesh.vertices, mesh.normals, mesh.colours, mesh.faces)


def _encode_glb(mesh: ColouredMesh, unlit: bool) -> bytes:
    """Binary glTF 2.0 of one mesh with one material."""
    places = np.ascontiguousarray(mesh.vertices[:, [1, 2, 0]], "<f4")
    colours = np.full((len(places), 4), 65535, "<u2")  # with an opacity: three of them would not be aligned
    colours[:, :3] = np.rint(linear_from_srgb(mesh.colours.clip(0, 1)) * 65535)
    arrays: list[tuple[NDArray[Any], int, int, str]] = [
        (places, FLOAT, ARRAY_BUFFER, "VEC3"),
        (np.ascontiguousarray(mesh.normals[:, [1, 2, 0]], "<f4"), FLOAT, ARRAY_BUFFER, "VEC3"),
        (colours, UNSIGNED_SHORT, ARRAY_BUFFER, "VEC4"),
        (mesh.faces.astype("<u4").ravel(), UNSIGNED_INT, ELEMENT_ARRAY_BUFFER, "SCALAR"),
    ]
    views, accessors, start = [], [], 0
    for number, (array, component, target, kind) in enumerate(arrays):
        views.append({"buffer": 0, "byteOffset": start, "byteLength": array.nbytes, "target": target})
        accessors.append({"bufferView": number, "componentType": component, "count": len(array), "type": kind})
        start += array.nbytes
    accessors[0] |= {"min": places.min(0).tolist(), "max": places.max(0).tolist()}
    accessors[2]["normalized"] = True
    material: dict[str, Any] = {"pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 1}}
    attributes = {"POSITION": 0, "NORMAL": 1, "COLOR_0": 2}
    scene: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": GENERATOR, "extras": {"axes": GLTF_AXES, "colours": "linear"}},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": attributes, "indices": 3, "material": 0, "mode": TRIANGLES}]}],
        "materials": [material],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": start}],
    }
    if unlit:
        material["extensions"] = {"KHR_materials_unlit": {}}
        scene["extensionsUsed"] = ["KHR_materials_unlit"]
    text = json.dumps(scene, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    data = b"".join(array.tobytes() for array, *_ in arrays)  # every array is a multiple of four bytes
    length = 12 + 8 + len(text) + 8 + len(data)
    header = np.array([0x46546C67, 2, length, len(text), 0x4E4F534A], "<u4").tobytes()  # "glTF", ..., "JSON"
    return b"".join([header, text, np.array([len(data), 0x004E4942], "<u4").tobytes(), data])  # "BIN"


def _encode_obj(mesh: ColouredMesh, unlit: bool) -> bytes:
    """Text with colours behind the places of vertices, as most programs read them; no material file."""
    lines = [f"# {GENERATOR}", f"# {AXES}", "# v x y z red green blue (sRGB)"]
    rows = np.hstack([mesh.vertices, mesh.colours.clip(0, 1)]).tolist()
    lines += ["v {:.6g} {:.6g} {:.6g} {:.4f} {:.4f} {:.4f}".format(*row) for row in rows]
    lines += ["vn {:.4f} {:.4f} {:.4f}".format(*row) for row in mesh.normals.tolist()]
    lines += [f"f {a}//{a} {b}//{b} {c}//{c}" for a, b, c in (mesh.faces.astype(np.int64) + 1).tolist()]
    return ("\n".join(lines) + "\n").encode()


def _encode_stl(mesh: ColouredMesh, unlit: bool) -> bytes:
    """Binary STL, for printing. Raises UserError for a mesh that encloses no volume."""
    if not mesh.watertight:
        raise UserError(
            "the mesh is not watertight, as a print needs it; try it without --triangles, or another --resolution"
        )
    corners = mesh.vertices[mesh.faces]
    normals = face_normals(mesh.vertices, mesh.faces)
    triangles = np.zeros(len(corners), [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("more", "<u2")])
    triangles["normal"] = normals / np.linalg.norm(normals, axis=1, keepdims=True).clip(min=1e-30)
    triangles["corners"] = corners
    header = f"{GENERATOR}: z up, front towards +x".encode().ljust(80)  # it must not begin with "solid"
    return b"".join([header, np.array([len(triangles)], "<u4").tobytes(), triangles.tobytes()])


def _to_uint8(colours: Floats) -> NDArray[np.uint8]:
    return np.asarray(np.rint(colours.clip(0, 1) * 255), np.uint8)


_ENCODERS: dict[str, Callable[[ColouredMesh, bool], bytes]] = {
    ".ply": _encode_ply_mesh,
    ".glb": _encode_glb,
    ".obj": _encode_obj,
    ".stl": _encode_stl,
}
#: what a mesh can be written as
MESH_SUFFIXES = tuple(_ENCODERS)
