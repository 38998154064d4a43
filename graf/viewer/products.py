"""What a client takes home: a picture, the video of a camera path, a mesh; as the bytes of files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from imageio.v3 import imwrite

from graf.evaluation.camera_paths import CameraPath, check_path
from graf.evaluation.pictures import Picture, write_video
from graf.evaluation.renderer import Renderer
from graf.viewer.drawing import Look, draw
from graf.viewer.viewpoints import Viewpoint

#: name of a file -> its bytes
Files = dict[str, bytes]


def picture_file(renderer: Renderer, look: Look, viewpoint: Viewpoint, height: int) -> Files:
    """What a client sees, without axes and cameras, as PNG."""
    picture = draw(renderer, look, viewpoint, height).picture
    return {f"{look.class_name}_{look.mode}.png": imwrite("<bytes>", picture, extension=".png")}


def path_video(
    renderer: Renderer, path: CameraPath, look: Look, height: int, fps: int, progress: Callable[[float], None]
) -> Files:
    """The video of a path in a look's mode, on its background; `progress` is told the share that is done."""
    check_path(path, renderer.classes, renderer.generator.dim_z)
    frames = path.frames(fps)

    def pictures() -> Iterator[Picture]:
        for number, frame in enumerate(frames):
            progress(number / len(frames))
            shown = replace(look, class_name=frame.class_name, z=frame.code)
            yield draw(renderer, shown, Viewpoint(frame.camera_to_world, frame.fov, path.aspect), height).picture

    with tempfile.TemporaryDirectory() as folder:
        file = write_video(Path(folder) / "camera_path.mp4", pictures(), fps)
        return {file.name: file.read_bytes()}


def mesh_file(renderer: Renderer, look: Look, resolution: int) -> Files:
    """The object as a coloured mesh, GLB, which has y up."""
    from graf.mesh import MeshOptions, extract_mesh, save_mesh

    mesh = extract_mesh(renderer, look.z, look.class_name, MeshOptions(resolution=resolution))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{look.class_name}.glb"
        save_mesh(file, mesh)
        return {file.name: file.read_bytes()}
