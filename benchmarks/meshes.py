"""Meshes of toys against the distance fields that drew them, and the memory of a large grid.

`python -m benchmarks.meshes RUN` takes a trained run of the plain toys (configs/toys.yaml). What cameras cannot see,
such as the underside of a toy, is learned by nobody and compared with nothing: both surfaces are sampled where rays of
pictures from the data set's heights meet them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import graf
from benchmarks.results import RESULTS, format_table, hardware, write_section
from graf.base.extras import import_optional
from graf.data.shapes import CLASS_NAMES, Toy, build_toy
from graf.data.synthetic import DEFAULT_V_LIST, render_views
from graf.geometry.cameras import Intrinsics, pose_from_angles
from graf.geometry.rays import RayCaster
from graf.mesh import ColouredMesh, MeshOptions, extract_mesh
from graf.mesh.field_of_object import FieldOfObject
from graf.mesh.rasteriser import draw_mesh

RADIUS, FOV, PIXELS, AZIMUTHS = 3.5, 30.0, 96, 4

MEMORY_PROGRAM = """
import re, sys, torch
from pathlib import Path
from graf.mesh.cleaning import drop_floaters
from graf.mesh.extraction import Grid, extract_surface
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
def ball(points):
    return 100 * torch.sigmoid(100 * (0.9 - points.norm(dim=1)))
drop_floaters(*extract_surface(ball, 50.0, Grid(1.0, 32)))
before = peak()
vertices, faces, _ = drop_floaters(*extract_surface(ball, 50.0, Grid(1.0, int(sys.argv[1]))))
print(peak() - before, len(faces))
"""


@dataclass(frozen=True)
class Accuracy:
    """How far a mesh is from the truth: mean distances in world units, normals' mean angle in degrees, both where seen.

    to_truth: from the mesh to the toy; to_mesh: from the toy to the mesh; iou: of silhouettes with true masks.
    """

    to_truth: float
    to_mesh: float
    normal_angle: float
    iou: float

    @property
    def chamfer(self) -> float:
        """The mean of both directions."""
        return (self.to_truth + self.to_mesh) / 2


def measure_accuracy(mesh: ColouredMesh, class_idx: int, toy: Toy) -> Accuracy:
    """Compare a mesh with the plain toy of a class."""
    intrinsics = Intrinsics.from_fov(PIXELS, FOV)
    heights = torch.tensor(DEFAULT_V_LIST).repeat_interleave(AZIMUTHS)
    poses = pose_from_angles((torch.arange(len(heights)) + 0.3) / len(heights) * 3 % 1, heights, RADIUS)
    _, true_depth, mask = render_views(class_idx, poses, intrinsics, supersampling=1)
    rays = RayCaster(intrinsics, 0.1, 10).cast_images(poses, PIXELS)

    def places(depth: Tensor, seen: Tensor) -> Tensor:
        return (rays.origins + rays.directions * (depth.view(len(poses), -1, 1) / rays.axis_cosine))[seen]

    coded = replace(mesh, colours=np.asarray((mesh.normals + 1) / 2, np.float32))
    drawings = [draw_mesh(coded, pose, intrinsics) for pose in poses]
    drawn = torch.stack([torch.from_numpy(drawing.mask) for drawing in drawings]).flatten(1)
    depth = torch.stack([torch.from_numpy(drawing.depth) for drawing in drawings])
    found = places(depth, drawn).T
    normals = torch.stack([torch.from_numpy(drawing.colours) for drawing in drawings]).flatten(1, 2)[drawn] * 2 - 1
    cosine = torch.cosine_similarity(normals, gradient(toy, found).T, dim=1)
    seen = mask.flatten(1) > 0.5
    vertices = np.concatenate([mesh.vertices, mesh.vertices[mesh.faces].mean(1)])
    nearest, _ = import_optional("scipy.spatial", "mesh").cKDTree(vertices).query(places(true_depth, seen).numpy())
    return Accuracy(
        to_truth=float(toy.distance(found).abs().mean()),
        to_mesh=float(nearest.mean()),
        normal_angle=float(torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).mean()),
        iou=float((drawn & seen).sum() / (drawn | seen).sum()),
    )


def gradient(toy: Toy, points: Tensor, step: float = 2e-3) -> Tensor:
    """The gradient (3, P) of a toy's distance at points (3, P)."""
    steps = step * torch.eye(3)[:, :, None]
    return torch.stack([toy.distance(points + move) - toy.distance(points - move) for move in steps]) / (2 * step)


def measure_memory(resolution: int) -> tuple[float, int, float]:
    """MiB that a grid of a cheap field takes (on Linux), its triangles, and seconds of the process."""
    started = time.perf_counter()
    command = [sys.executable, "-c", MEMORY_PROGRAM, str(resolution)]
    mib, faces = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(mib), int(faces), time.perf_counter() - started


def measure_class(renderer: Any, name: str, resolution: int) -> list[str]:
    """A row: a class, its level, triangles and accuracy."""
    z = renderer.codes(0, range(1))[0]
    level = FieldOfObject(renderer, z, name).level()
    started = time.perf_counter()
    mesh = extract_mesh(renderer, z, name, MeshOptions(resolution=resolution, level=level.density))
    seconds = time.perf_counter() - started
    class_idx = CLASS_NAMES.index(name)
    found = measure_accuracy(mesh, class_idx, build_toy(class_idx))
    figures = [f"{found.chamfer:.4f}", f"{found.normal_angle:.1f}", f"{found.iou:.3f}", f"{seconds:.1f}"]
    return [name, f"{level.density:.1f}", f"{len(mesh.faces):,}", *figures]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder of a trained configs/toys.yaml")
    parser.add_argument("--resolution", type=int, default=192)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    renderer = graf.load(options.run, device="cpu")
    rows = [measure_class(renderer, name, options.resolution) for name in renderer.classes]
    memory = []
    for size in (256, 512):
        mib, faces, seconds = measure_memory(size)
        memory.append([f"{size}^3", f"{mib:.0f}", f"{faces:,}", f"{seconds:.1f}"])
    header = ["class", "level", "triangles", "Chamfer distance", "normals, degrees", "silhouette IoU", "s"]
    text = (
        f"{hardware()}; resolution {options.resolution}, automatic level, seed 0. Distances in world units (the toys "
        "fill a sphere of radius 0.95), against the distance fields that drew the photographs, where cameras at the "
        f"data set's heights see either surface.\n\n{format_table(header, rows)}\n\n"
        "Peak memory of the surface of a ball in a cheap field and its cleaning, on top of the program's (budget 128 "
        f"MiB, triangles and vertices included):\n\n{format_table(['grid', 'MiB', 'triangles', 's'], memory)}"
    )
    write_section("Meshes against the truth", "python -m benchmarks.meshes RUN", text, options.results)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
