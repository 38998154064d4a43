"""Cameras from photographs alone: a real reconstruction with known truth, and what is said where there can be none."""

import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from benchmarks.videos import Walk, film_walkaround
from benchmarks.walkaround import compare_cameras
from graf.base.extras import MissingExtra
from graf.capture import walkaround
from graf.capture.errors import CaptureError
from graf.capture.frames import DEFAULT_FRAMES
from graf.capture.posed import centre_on_object
from graf.capture.walkaround import (
    EXHAUSTIVE_BELOW,
    WalkaroundSettings,
    read_result,
    reconstruct,
    run_worker,
    to_camera_to_world,
)

#: it is looked for and not imported: it takes the signals of its process over
needs_pycolmap = pytest.mark.skipif(find_spec("pycolmap") is None, reason="needs pycolmap")
ROOT = Path(__file__).resolve().parents[2]
COUNT = 12
IMAGES = [np.zeros((60, 80, 3), np.uint8)] * COUNT
NAMES = [f"IMG_{number}.jpg" for number in range(COUNT)]
FILES = [f"{number:04d}.png" for number in range(COUNT)]


def camera_from_world(azimuth: float) -> list[list[float]]:
    """COLMAP's matrix of a camera on a circle of radius 3 that looks at the origin, its y axis down."""
    cosine, sine = np.cos(azimuth), np.sin(azimuth)
    rotation = np.array([[-sine, cosine, 0], [0, 0, -1], [-cosine, -sine, 0]])
    return np.column_stack([rotation, [0, 0, 3]]).tolist()


def answer(*groups: range, step: float = 0.5, **changes: object) -> dict[str, object]:
    """A worker's answer: a model for each group of photographs, their cameras `step` radians apart."""
    camera = {"width": 80, "height": 60, "focal": 90.0, "centre": [40.0, 30.0], "radial": 0.0}
    models = [
        {
            "camera": camera,
            "poses": {FILES[number]: camera_from_world(step * number) for number in group},
            "error": 0.5,
            "points": 100,
            "some_points": [],
        }
        for group in groups
    ]
    features = dict.fromkeys(FILES, 800)
    return {"features": features, "pairs": 66, "matches": 1000, "still": 10, "models": models} | changes


@needs_pycolmap
def test_a_walk_around_a_toy_on_a_patterned_table_gives_its_cameras():
    footage = film_walkaround("duck", Walk(size=224, frames=20, elevations=(25.0, 45.0)))
    settings = WalkaroundSettings(threads=1)
    found = reconstruct(list(footage.frames), list(footage.masks), None, settings)
    numbers = [int(name.split()[-1]) for name in found.photographs.names]
    assert len(numbers) >= 18
    rotations, centres, _ = compare_cameras(found.photographs.poses, footage.poses.numpy()[numbers])
    assert np.quantile(rotations, 0.9) < 2
    assert np.quantile(centres, 0.9) < 0.03  # the toy's radius is 1
    assert found.photographs.lens.fov == pytest.approx(40, abs=1)
    rotations, _, similarity = compare_cameras(
        centre_on_object(found.photographs).poses, footage.poses.numpy()[numbers]
    )
    assert np.degrees(np.arccos(min(1, similarity.rotation[2, 2]))) < 0.5  # the table is level, the hand is not
    assert np.linalg.norm(similarity.shift) < 0.15  # where the middle of the toy is found
    assert 0.75 < similarity.scale < 1.05  # it lies inside a sphere of radius 0.95


@needs_pycolmap
def test_photographs_of_nothing_are_an_error_that_says_what_to_do():
    blank = [np.full((120, 160, 3), 90 + number, np.uint8) for number in range(8)]
    with pytest.raises(CaptureError, match=r"8 of 8 photographs have fewer than .* textured"):
        reconstruct(blank, settings=WalkaroundSettings(threads=1))


def test_without_the_library_the_command_that_brings_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    with pytest.raises(MissingExtra, match=r"pycolmap is not installed; run: pip install .*\[capture\]"):
        reconstruct(IMAGES, settings=WalkaroundSettings(threads=1))


def test_frames_of_a_video_are_compared_each_with_each_unless_more_are_asked_for():
    assert DEFAULT_FRAMES < EXHAUSTIVE_BELOW


def test_a_library_that_aborts_is_an_error_with_its_last_words(capfd):
    code = "import os, sys; print('mutex poisoned', file=sys.stderr, flush=True); os.abort()"
    with pytest.raises(CaptureError, match=r"ended by signal 6; its last words: mutex poisoned"):
        run_worker([sys.executable, "-c", code], threads=1, patience=60)


def test_a_library_that_hangs_is_stopped():
    code = "import sys, time; print('I20260101 all is well', file=sys.stderr, flush=True); time.sleep(100)"
    started = time.monotonic()
    with pytest.raises(CaptureError, match="showed no progress for 1 seconds"):
        run_worker([sys.executable, "-c", code], threads=1, patience=1.0)
    assert time.monotonic() - started < 30


def test_signs_of_progress_are_not_taken_for_a_hang():
    code = "import time\nfor n in range(8):\n print('next', flush=True); time.sleep(0.25)"
    run_worker([sys.executable, "-c", code], threads=1, patience=1.5)


@pytest.mark.parametrize(
    ("line", "share"),
    [
        ("I2026 feature_extraction.cc:284] Processed file [3/40]", 3 / 40),
        ("I2026 pairing.cc:213] Processing block [2/4, 1/4]", 5 / 16),
        ("I2026 timer.cc:90] Elapsed time: 0.056 [minutes]", None),
    ],
)
def test_how_far_the_library_is_is_read_from_what_it_says(line, share):
    assert walkaround._share_done(line) == (None if share is None else pytest.approx(share))


def test_a_worker_that_fails_says_why():
    with pytest.raises(CaptureError, match=r"exit code 1; .*no-such-folder"):
        run_worker([sys.executable, "-m", "graf.capture.colmap_worker", "no-such-folder"], threads=1, patience=60)


def test_of_two_groups_that_do_not_connect_the_largest_is_taken_and_the_rest_is_named():
    found = read_result(answer(range(7), range(7, 12)), IMAGES, None, NAMES, FILES)
    assert list(found.photographs.names) == NAMES[:7]
    assert found.lost == NAMES[7:]
    assert found.other_models == [5]
    report = "\n".join(found.report())
    assert "placed 7 of 12" in report
    assert "15-20 degrees apart" in report
    assert "IMG_11.jpg" in report


def test_cameras_that_all_stand_in_one_place_are_a_standing_background():
    with pytest.raises(CaptureError, match=r"background stands still.*turntable"):
        read_result(answer(range(12), step=0.002), IMAGES, None, NAMES, FILES)


def test_matches_that_do_not_move_are_a_standing_background():
    with pytest.raises(CaptureError, match=r"90% of all matches stand still.*turntable"):
        read_result(answer(still=900), IMAGES, None, NAMES, FILES)


def test_photographs_that_do_not_connect_are_an_error_with_advice():
    with pytest.raises(CaptureError, match=r"could not be connected \(3 pairs.*textured"):
        read_result(answer(pairs=3), IMAGES, None, NAMES, FILES)


def test_colmaps_cameras_become_the_projects():
    pose = to_camera_to_world(np.array(camera_from_world(0.0)))
    np.testing.assert_allclose(pose[:3, 3], (3, 0, 0), atol=1e-12)
    np.testing.assert_allclose(pose[:3, 2], (1, 0, 0), atol=1e-12)  # looks down -z, at the origin
    np.testing.assert_allclose(pose[:3, 1], (0, 0, 1), atol=1e-12)


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (IMAGES[:5], {}, "at least 8"),
        ([*IMAGES[:9], np.zeros((80, 60, 3), np.uint8)], {}, "one camera with one zoom"),
        (IMAGES, {"features": "object"}, "need masks"),
    ],
)
def test_what_cannot_work_is_said_before_any_work(images, settings, message, monkeypatch):
    monkeypatch.setattr(walkaround, "run_worker", lambda *_: pytest.fail("the worker was started"))
    with pytest.raises(CaptureError, match=message):
        reconstruct(images, settings=WalkaroundSettings(**settings))


def test_the_worker_goes_when_the_program_that_started_it_is_killed_even_before_it_looks(tmp_path):
    folder = tmp_path / "graf_walkaround_1"
    folder.mkdir()
    worker = (
        "import os, pathlib, sys, time; from graf.capture.colmap_worker import end_with_parent\n"
        "folder, parent = pathlib.Path(sys.argv[1]), os.getppid()\n"
        "(folder / 'number').write_text(str(os.getpid()))\n"
        "(folder / 'number').rename(folder / 'ready')\n"
        "while os.getppid() == parent: time.sleep(0.02)\n"
        "end_with_parent(folder)"
    )
    program = (
        "import sys; from graf.capture.walkaround import run_worker\n"
        f"run_worker([sys.executable, '-c', {worker!r}, sys.argv[1]], threads=1, patience=60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], cwd=ROOT) as parent:
        assert wait_until((folder / "ready").is_file)
        number = int((folder / "ready").read_text())
        parent.kill()
    assert wait_until(lambda: not is_alive(number))
    assert not folder.exists()


def test_a_worker_without_a_program_that_waits_ends_and_leaves_a_folder_that_somebody_named(tmp_path):
    (tmp_path / "job.json").write_text("{")
    code = "import pathlib, sys; from graf.capture.colmap_worker import end_with_parent as end; "
    code += "end(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=60, check=False).returncode == 1
    assert (tmp_path / "job.json").is_file()


def wait_until(is_true: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return is_true()


def is_alive(number: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
