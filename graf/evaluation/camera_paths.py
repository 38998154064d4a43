"""Keyframed camera paths: a smooth curve through cameras and objects, and the JSON file that keeps one.

A pose is taken apart into its rotation and where the object's origin lies in front of the camera: rotations follow
quaternion curves (squad, Shoemake 1987), the rest Catmull-Rom splines. So keyframes that orbit the object are joined by
arcs around it instead of chords through it. Codes go along straight lines, as they do in interpolation videos, and the
class is that of the nearer keyframe.

The file, docs/view.md describes it for people:

    {"format": "graf camera path", "version": 1, "seconds": 2.0, "closed": false, "aspect": 1.0,
     "keyframes": [{"camera_to_world": [4 rows of 4 numbers], "fov": 30.0, "class": "duck", "code": [numbers]}, ...]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graf.base.errors import UserError
from graf.base.files import write_atomically
from graf.evaluation.pictures import Picture
from graf.evaluation.renderer import Renderer
from graf.geometry.cameras import Intrinsics
from graf.geometry.rotations import quaternion_from_rotation, rotation_from_quaternion, squad, unroll

FORMAT, VERSION = "graf camera path", 1
#: how far a rotation in a file may be from one: numbers written with few digits still are
ROTATION_TOLERANCE = 1e-3
MAX_SECONDS, MAX_ASPECT = 3600.0, 10.0


@dataclass(frozen=True)
class Keyframe:
    """A camera and the object that it sees.

    camera_to_world: (4, 4), looking down -z; fov: vertical, degrees; class_name; code: (dim_z,).
    """

    camera_to_world: Tensor
    fov: float
    class_name: str
    code: Tensor


@dataclass(frozen=True)
class CameraPath:
    """A path through two keyframes or more; raises UserError where it cannot be one.

    seconds: from each keyframe to the next; closed: whether it leads back to the first one; aspect: width / height.
    """

    keyframes: tuple[Keyframe, ...]
    seconds: float = 2.0
    closed: bool = False
    aspect: float = 1.0

    def __post_init__(self) -> None:
        if len(self.keyframes) < 2:
            raise UserError(f"a camera path needs at least two keyframes, this one has {len(self.keyframes)}")
        first = len(self.keyframes[0].code)
        for number, keyframe in enumerate(self.keyframes):
            if len(keyframe.code) != first:
                raise UserError(
                    f"keyframe {number}: its code has {len(keyframe.code)} numbers and that of keyframe 0 has {first}: "
                    "expected codes of one run"
                )
        if not 0 < self.seconds <= MAX_SECONDS:
            raise UserError(f"camera path: seconds={self.seconds}: expected above 0 and at most {MAX_SECONDS:.0f}")
        if not 1 / MAX_ASPECT <= self.aspect <= MAX_ASPECT:
            raise UserError(f"camera path: aspect={self.aspect}: expected {1 / MAX_ASPECT} to {MAX_ASPECT:.0f}")

    @property
    def pieces(self) -> int:
        """How many stretches from keyframe to keyframe there are."""
        return len(self.keyframes) - (0 if self.closed else 1)

    @property
    def duration(self) -> float:
        """Seconds of the whole path."""
        return self.pieces * self.seconds

    def frames(self, fps: int) -> list[Keyframe]:
        """Cameras and objects at `fps` frames per second, from the first keyframe to the last.

        A closed path ends one frame before it begins again, so that its video can be repeated.
        """
        count = max(2, round(self.duration * fps)) + (0 if self.closed else 1)
        last = count if self.closed else count - 1
        return [self.at(self.pieces * number / last) for number in range(count)]

    def at(self, place: float) -> Keyframe:
        """Camera and object at `place` in [0, pieces]; whole numbers are the keyframes."""
        piece = min(int(place), self.pieces - 1)
        share = place - piece
        neighbours = [self._keyframe(piece + offset) for offset in (-1, 0, 1, 2)]
        poses = torch.stack([keyframe.camera_to_world.double() for keyframe in neighbours])
        before, start_turn, end_turn, after = unroll(quaternion_from_rotation(poses[:, :3, :3]))
        rotation = rotation_from_quaternion(squad(before, start_turn, end_turn, after, share))
        # where the origin of the world is, in the axes of the camera: constant on an orbit
        offsets = (poses[:, :3, :3].mT @ poses[:, :3, 3:])[..., 0]
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, :3] = rotation
        pose[:3, 3] = rotation @ catmull_rom(offsets, share)
        # along the logarithm of the focal length, so that zooming looks even and never leaves (0, 180) degrees
        focals = torch.tensor([math.log(math.tan(math.radians(keyframe.fov) / 2)) for keyframe in neighbours])
        fov = math.degrees(2 * math.atan(math.exp(catmull_rom(focals.double(), share).item())))
        start, end = neighbours[1:3]
        code = start.code + share * (end.code - start.code)
        return Keyframe(pose, fov, (start if share < 0.5 else end).class_name, code)

    def _keyframe(self, number: int) -> Keyframe:
        """The keyframe of a number; beyond the ends of an open path the last one stands still."""
        count = len(self.keyframes)
        return self.keyframes[number % count if self.closed else min(max(number, 0), count - 1)]


def catmull_rom(points: Tensor, share: float) -> Tensor:
    """The point (...) at `share` of the way from points[1] to points[2] of four (4, ...), on a Catmull-Rom spline."""
    before, start, end, after = points
    cubic = 3 * (start - end) + after - before
    square = 2 * before - 5 * start + 4 * end - after
    return start + 0.5 * share * (end - before + share * (square + share * cubic))


# ------------------------------------------------------------------------------------------------ the file


def path_to_json(path: CameraPath) -> str:
    """The text of a path's file, with every digit: it gives back the very same path."""
    keyframes = [
        {
            "camera_to_world": keyframe.camera_to_world.tolist(),
            "fov": keyframe.fov,
            "class": keyframe.class_name,
            "code": keyframe.code.tolist(),
        }
        for keyframe in path.keyframes
    ]
    content = {"format": FORMAT, "version": VERSION, "seconds": path.seconds, "closed": path.closed}
    return json.dumps(content | {"aspect": path.aspect, "keyframes": keyframes}, indent=1) + "\n"


def write_path(file: Path | str, path: CameraPath) -> None:
    """Replace a file by a path. Raises OSError."""
    write_atomically(file, path_to_json(path))


def read_path(file: Path | str) -> CameraPath:
    """Read a path. Raises UserError, which names the file and what is wrong in it."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"{file}: cannot be read ({reason}); expected a camera path that graf view saved") from error
    try:
        return path_from_json(text)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def path_from_json(text: str) -> CameraPath:
    """The path of a file's text. Raises UserError, which says what is wrong."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON ({error}); expected a camera path that graf view saved") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f'expected "format": "{FORMAT}", as graf view saves it')
    if content.get("version") != VERSION:
        raise UserError(f"version {content.get('version')!r}: this program reads version {VERSION}")
    keyframes = content.get("keyframes")
    if not isinstance(keyframes, list):
        raise UserError('"keyframes": expected a list')
    closed = content.get("closed", False)
    if not isinstance(closed, bool):
        raise UserError(f'"closed": {closed!r}: expected true or false')
    return CameraPath(
        tuple(_read_keyframe(number, keyframe) for number, keyframe in enumerate(keyframes)),
        _read_number(content, "seconds", "the path"),
        closed,
        _read_number(content, "aspect", "the path", 1.0),
    )


def _read_keyframe(number: int, content: object) -> Keyframe:
    where = f"keyframe {number}"
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected an object with camera_to_world, fov, class and code")
    pose, code = _read_tensor(content, "camera_to_world", where), _read_tensor(content, "code", where)
    if pose.shape != (4, 4):
        raise UserError(f'{where}, "camera_to_world": expected 4 rows of 4 numbers, found shape {tuple(pose.shape)}')
    if pose[3].tolist() != [0, 0, 0, 1]:
        raise UserError(f'{where}, "camera_to_world": its last row is {pose[3].tolist()}, expected 0, 0, 0, 1')
    rotation = pose[:3, :3]
    if (rotation @ rotation.mT - torch.eye(3)).abs().max() > ROTATION_TOLERANCE or torch.linalg.det(rotation) < 0:
        raise UserError(f'{where}, "camera_to_world": its first three columns are no rotation')
    if code.dim() != 1:
        raise UserError(f'{where}, "code": expected a list of numbers')
    fov = _read_number(content, "fov", where)
    if not 0 < fov < 180:
        raise UserError(f'{where}, "fov": {fov}: expected above 0 and below 180 degrees')
    class_name = content.get("class")
    if not isinstance(class_name, str):
        raise UserError(f'{where}, "class": {class_name!r}: expected the name of a class')
    return Keyframe(pose, fov, class_name, code.float())


def _read_tensor(content: Mapping[str, Any], key: str, where: str) -> Tensor:
    try:
        tensor = torch.tensor(content[key], dtype=torch.float64)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f'{where}, "{key}": expected numbers') from error
    if not torch.isfinite(tensor).all():
        raise UserError(f'{where}, "{key}": holds NaN or infinity')
    return tensor


def _read_number(content: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = content.get(key, default)
    try:
        if not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        value = "a number beyond all measure"
    raise UserError(f'{where}, "{key}": {value!r}: expected a number')


def check_path(path: CameraPath, classes: tuple[str, ...], dim_z: int) -> None:
    """Raises UserError where a generator of these classes and codes cannot show a path: it is another run's."""
    for number, keyframe in enumerate(path.keyframes):
        if keyframe.class_name not in classes:
            raise UserError(f"keyframe {number}: class {keyframe.class_name!r}: expected one of {', '.join(classes)}")
        if len(keyframe.code) != dim_z:
            raise UserError(
                f"keyframe {number}: its code has {len(keyframe.code)} numbers and those of this run have {dim_z}; "
                "play the path with the run that it was saved with"
            )


# ------------------------------------------------------------------------------------------------ its pictures


def render_path(
    renderer: Renderer, path: CameraPath, height: int, fps: int, super_resolve: bool = False
) -> Iterator[Picture]:
    """The pictures along a path, `height` rows each (times the scale where super-resolved). Raises UserError."""
    check_path(path, renderer.classes, renderer.generator.dim_z)
    width = max(1, round(height * path.aspect))
    for frame in path.frames(fps):
        intrinsics = Intrinsics.from_vertical_fov(height, width, frame.fov)
        renders = renderer.render_camera(frame.code, frame.class_name, frame.camera_to_world, intrinsics, super_resolve)
        yield renders.numpy("sr" if super_resolve else "rgb")[0]
