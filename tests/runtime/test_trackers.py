"""Trackers: real ones, offline, keep what a run sends; one that fails is said once, and the others go on."""

from pathlib import Path

import numpy as np
import pytest

from graf.base.extras import MissingExtra
from graf.config import build_config
from graf.runtime import trackers
from graf.runtime.trackers import TRACKERS, Trackers

PICTURE = np.full((4, 6, 3), 200, np.uint8)


class Recorder:
    """A tracker that keeps what it is told, and fails at the call with number `fails_at`."""

    def __init__(self, fails_at: int = 1000) -> None:
        self.calls: list[tuple] = []
        self.fails_at = fails_at

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        if len(self.calls) == self.fails_at:
            raise ConnectionError("the server has gone")

    def scalars(self, iteration, values):
        self._note("scalars", iteration, dict(values))

    def image(self, iteration, tag, pixels):
        self._note("image", iteration, tag)

    def flush(self):
        self._note("flush")

    def close(self):
        self._note("close")


def open_recorders(monkeypatch, warnings: list[str], **recorders: Recorder) -> Trackers:
    openers = {name: (name, lambda *_, recorder=recorder: recorder) for name, recorder in recorders.items()}
    monkeypatch.setattr(trackers, "TRACKERS", openers)
    return Trackers(list(recorders), Path(), 0, None, {}, warnings.append)


def test_all_are_told_all(monkeypatch):
    warnings: list[str] = []
    first, second = Recorder(), Recorder()
    opened = open_recorders(monkeypatch, warnings, first=first, second=second)
    opened.scalars(1, {"loss": 2.0})
    opened.image(1, "grid", PICTURE)
    opened.flush()
    opened.close()
    opened.close()
    expected = [("scalars", 1, {"loss": 2.0}), ("image", 1, "grid"), ("flush",), ("close",)]
    assert first.calls == second.calls == expected
    assert warnings == []


def test_one_that_fails_is_said_once_and_ends_alone(monkeypatch):
    warnings: list[str] = []
    broken, sound = Recorder(fails_at=2), Recorder()
    opened = open_recorders(monkeypatch, warnings, broken=broken, sound=sound)
    for iteration in range(1, 5):
        opened.scalars(iteration, {"loss": 0.0})
    opened.close()
    assert len(broken.calls) == 2
    assert len(sound.calls) == 5
    assert len(warnings) == 1
    assert warnings[0].startswith("monitoring: broken cannot write (the server has gone); the run goes on without it")


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (ConnectionError("no network"), "W&B could not start (no network); the run goes on without it"),
        (OSError(28, "No space left on device"), "W&B could not start (No space left on device)"),
        (MissingExtra("wandb is not installed; run: pip"), "wandb is not installed; run: pip, or leave broken out"),
    ],
)
def test_one_that_cannot_start_is_said_and_the_others_go_on(monkeypatch, failure, expected):
    def refuse(*_):
        raise failure

    warnings: list[str] = []
    sound = Recorder()
    monkeypatch.setattr(trackers, "TRACKERS", {"broken": ("W&B", refuse), "sound": ("sound", lambda *_: sound)})
    opened = Trackers(["broken", "sound"], Path(), 0, None, {}, warnings.append)
    opened.scalars(1, {"loss": 2.0})
    opened.close()
    assert sound.calls == [("scalars", 1, {"loss": 2.0}), ("close",)]
    assert len(warnings) == 1
    assert expected in warnings[0]


def test_the_configuration_takes_exactly_these():
    config = build_config({"training": {"monitoring": list(TRACKERS)}})
    assert config.training.monitoring == tuple(TRACKERS)


def test_wandb_offline_keeps_a_run_in_its_folder_and_a_resume_continues_it(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    warnings: list[str] = []
    for start in (0, 1):
        opened = Trackers(["wandb"], tmp_path, start, None, {}, warnings.append)
        opened.scalars(start + 1, {"loss": 0.5})
        opened.image(start + 1, "samples/rgb", PICTURE)
        opened.close()
    assert warnings == []
    own = (tmp_path / "wandb_id.txt").read_text()
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{own}.wandb"}
    assert all(file.stat().st_size > 0 for file in files)


def test_trackio_on_this_machine_keeps_a_run_and_a_resume_continues_it(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")  # read when trackio is imported
    warnings: list[str] = []
    folder = tmp_path / "run"
    folder.mkdir()
    for start in (0, 1):
        opened = Trackers(["trackio"], folder, start, None, {}, warnings.append)
        opened.scalars(start + 1, {"loss": 0.5 + start})
        opened.close()
    assert warnings == []
    name = f"run-{(folder / 'trackio_id.txt').read_text()}"
    rows = sqlite_storage.SQLiteStorage.get_logs("graf", name)
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(1, 0.5), (2, 1.5)]
    assert (tmp_path / "trackio").is_dir()
