"""Camera paths: through their keyframes, smoothly, around the object and not through it; and their file."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from graf.base.errors import UserError
from graf.evaluation.camera_paths import (
    CameraPath,
    Keyframe,
    catmull_rom,
    check_path,
    path_from_json,
    path_to_json,
    read_path,
    write_path,
)
from graf.geometry.cameras import pose_from_angles


def orbit(count: int = 4, radius: float = 3.5, fov: float = 30.0) -> tuple[Keyframe, ...]:
    u = torch.arange(count) / count
    poses = pose_from_angles(u, torch.full_like(u, 0.3), radius)
    names = ["duck", "mug"] * count
    return tuple(Keyframe(pose, fov, name, torch.randn(5)) for pose, name in zip(poses, names[:count], strict=True))


def centres(path: CameraPath, fps: int = 24) -> torch.Tensor:
    return torch.stack([frame.camera_to_world[:3, 3] for frame in path.frames(fps)])


@pytest.mark.parametrize("closed", [True, False])
def test_a_path_passes_through_its_keyframes_with_their_code_fov_and_class(closed):
    path = CameraPath(orbit(), closed=closed)
    for number, keyframe in enumerate(path.keyframes):
        found = path.at(float(number)) if number < path.pieces else path.at(number - 1e-9)
        assert_close(found.camera_to_world, keyframe.camera_to_world.double(), atol=1e-6, rtol=0)
        assert found.fov == pytest.approx(keyframe.fov)
        assert found.class_name == keyframe.class_name
        assert_close(found.code, keyframe.code, atol=1e-6, rtol=1e-5)


def test_four_cameras_around_an_object_make_a_circle_of_one_speed():
    path = CameraPath(orbit(), seconds=1.0, closed=True)
    places = centres(path)
    assert len(places) == 4 * 24
    assert_close(places.norm(dim=1), torch.full((96,), 3.5).double())
    assert_close(places[:, 2], places[:1, 2].expand(96), atol=1e-6, rtol=0)
    steps = torch.cat([places, places[:1]]).diff(dim=0).norm(dim=1)
    assert_close(steps, steps[:1].expand(96), rtol=1e-4, atol=0)


def test_two_cameras_on_opposite_sides_are_joined_around_the_object():
    keyframes = tuple(
        Keyframe(pose_from_angles(torch.tensor(u), torch.tensor(0.4), 3.5), 30.0, "duck", torch.zeros(1))
        for u in (0.0, 0.49)
    )
    assert centres(CameraPath(keyframes)).norm(dim=1).min() == pytest.approx(3.5, abs=1e-5)


def test_the_camera_moves_without_a_jump_of_speed_at_a_keyframe():
    torch.manual_seed(3)
    poses = pose_from_angles(torch.rand(5), 0.2 + 0.3 * torch.rand(5), 2 + 2 * torch.rand(5))
    path = CameraPath(tuple(Keyframe(pose, 20.0 + 5 * n, "duck", torch.randn(2)) for n, pose in enumerate(poses)))
    small = 1e-5
    for number in (1, 2, 3):
        before, here, after = (path.at(number + offset).camera_to_world for offset in (-small, 0.0, small))
        assert_close((here - before) / small, (after - here) / small, rtol=1e-3, atol=1e-3)


def test_frames_last_as_long_as_the_path():
    assert len(CameraPath(orbit(3), seconds=0.5).frames(24)) == 2 * 12 + 1  # the last keyframe too
    assert len(CameraPath(orbit(3), seconds=0.5, closed=True).frames(24)) == 3 * 12  # the first one once


def test_catmull_rom_reproduces_parabolas():
    points = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    assert_close(catmull_rom(2 * points**2 - points + 3, 0.3), torch.tensor(2 * 0.3**2 - 0.3 + 3))


def test_zooming_never_leaves_what_a_lens_can_be():
    poses = [keyframe.camera_to_world for keyframe in orbit(4)]
    fovs = (2.0, 175.0, 2.0, 175.0)
    path = CameraPath(tuple(Keyframe(pose, fov, "duck", torch.zeros(1)) for pose, fov in zip(poses, fovs, strict=True)))
    assert all(0 < frame.fov < 180 for frame in path.frames(24))


def test_a_file_gives_back_the_path(tmp_path):
    """To the last digit, so that `graf eval --path` shows the very frames of the viewer's own video."""
    path = CameraPath(orbit(fov=math.degrees(0.5)), 1.7, True, 1.3333)
    write_path(tmp_path / "path.json", path)
    found = read_path(tmp_path / "path.json")
    assert (found.seconds, found.closed, found.aspect) == (1.7, True, 1.3333)
    for one, other in zip(found.keyframes, path.keyframes, strict=True):
        assert torch.equal(one.camera_to_world, other.camera_to_world.double())
        assert torch.equal(one.code, other.code)
        assert (one.fov, one.class_name) == (other.fov, other.class_name)


def changed(**changes: object) -> str:
    return json.dumps(json.loads(path_to_json(CameraPath(orbit()))) | changes)


def changed_keyframe(**changes: object) -> str:
    content = json.loads(path_to_json(CameraPath(orbit())))
    content["keyframes"][1] |= changes
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nothing", "JSON"),
        ("[" * 10**5, "JSON"),
        ("{}", '"format"'),
        (changed(version=2), "version 2"),
        (changed(keyframes=[]), "at least two keyframes"),
        (changed(keyframes=3), '"keyframes": expected a list'),
        (changed(seconds="long"), '"seconds"'),
        (changed(seconds=0), "seconds=0"),
        (changed(seconds=math.nan), '"seconds"'),
        (changed(closed="no"), '"closed"'),
        (changed(aspect=-1), "aspect"),
        (changed_keyframe(fov=180), '"fov"'),
        (changed_keyframe(fov=True), '"fov"'),
        (changed_keyframe(code="x"), '"code"'),
        (changed_keyframe(code=[[1.0]]), '"code"'),
        (changed_keyframe(code=[1.0]), "keyframe 1: its code has 1 numbers and that of keyframe 0 has 5"),
        (changed_keyframe(code=[math.inf]), "infinity"),
        (changed_keyframe(camera_to_world=[[1, 0], [0, 1]]), "4 rows"),
        (changed_keyframe(camera_to_world=[[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "no rotation"),
        (changed_keyframe(camera_to_world=[[-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "no rotation"),
        (changed_keyframe(camera_to_world=[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 3, 1]]), "last row"),
        (changed(seconds=10**400), '"seconds"'),
        (changed_keyframe(camera_to_world=[[1, 2], [3]]), '"camera_to_world": expected numbers'),
        (changed_keyframe(**{"class": 3}), "name of a class"),
    ],
)
def test_a_file_that_is_no_path_is_told_what_is_wrong(text, complaint):
    with pytest.raises(UserError, match=complaint):
        path_from_json(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json: cannot be read"):
        read_path(tmp_path / "nowhere.json")


def test_a_path_of_another_run_is_refused():
    path = CameraPath(orbit())
    check_path(path, ("duck", "mug"), 5)
    with pytest.raises(UserError, match="keyframe 1: class 'mug'"):
        check_path(path, ("duck", "car"), 5)
    with pytest.raises(UserError, match="code has 5 numbers and those of this run have 6"):
        check_path(path, ("duck", "mug"), 6)
