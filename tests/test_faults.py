"""Faults of the machine, put in on purpose: what survives, what is said, which exit code, and that a run goes on."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from graf.base import files
from graf.runtime import logs
from graf.runtime.checkpoint import read_checkpoint
from graf.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"
BARE = ("training.fid_every=0", "training.sample_every=0", "training.monitoring=[]")


@pytest.fixture
def train(run_program, smoke_run):
    """train.py on configs/smoke.yaml in tmp_path, with the photographs of the shared run; returns the exit code."""
    return lambda *arguments: run_program("train.py", "--config", SMOKE, f"data.datadir={smoke_run.data}", *arguments)


def saved_iterations(run: Path) -> list[int]:
    return sorted(int(file.stem.split("_")[1]) for file in (run / "checkpoints").glob("model_0*.pt"))


def can_mount() -> bool:
    """Whether a process here may have a file system of its own."""
    if shutil.which("unshare") is None:
        return False
    script = "mount -t tmpfs -o size=1m tmpfs /mnt"
    return subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True).returncode == 0


#: what is written when the disk is full -> keys, and bytes that are left on it
FULL = {
    "saving": ((*BARE, "training.save_every=1e-9", "training.keep_checkpoints=9"), 700_000),
    "sampling and logging": (("training.fid_every=0", "training.sample_every=1"), 400_000),
    "scoring": (("training.fid_every=1", "training.sample_every=0", "evaluation.num_images=8"), 500_000),
}


@pytest.mark.skipif(not can_mount(), reason="needs a file system of its own")
@pytest.mark.parametrize("work", FULL)
def test_a_disk_that_is_really_full_costs_nothing_that_was_saved(tmp_path, smoke_run, work):
    keys, size = FULL[work]
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(SMOKE), f"data.datadir={smoke_run.data}"]
    command += [*keys, "training.backup_every=0", "training.max_iterations=12"]
    script = f"""
        mkdir -p results && mount -t tmpfs -o size={size} tmpfs results
        "$@"; echo "first $?"
        ls results/smoke/checkpoints
        mount -o remount,size=100m results
        "$@"; echo "second $?"
        ls results/smoke/checkpoints; ls -A results/smoke | grep -c saving
    """
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "first 1\n" in done.stdout, done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    first, second = done.stdout.split("first 1\n")[1].split("second 0\n")
    assert "model_00000012.pt" in second
    assert second.strip().endswith("0")  # nothing half-written is left
    if work == "saving":
        assert "model_" in first.split("data:")[0]
        assert "resuming from" in done.stdout


@pytest.mark.skipif(not can_mount(), reason="needs a file system of its own")
def test_a_folder_that_is_read_only_is_one_line(tmp_path, smoke_run):
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(SMOKE), f"data.datadir={smoke_run.data}", *BARE]
    script = 'mkdir -p results && mount -t tmpfs -o ro tmpfs results && "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Read-only file system" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


class FailingDisk:
    """Opens files for writing as the system does, but for the `first` to the `last` time fails, or takes its time."""

    def __init__(self, first: int, last: int, seconds: float = 0.0) -> None:
        self.first, self.last, self.seconds, self.opened = first, last, seconds, 0

    def open(self, file, mode="r", *arguments, **options):
        if set(mode) & set("wax+"):
            self.opened += 1
            if self.first <= self.opened <= self.last:
                if not self.seconds:
                    raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
                time.sleep(self.seconds)
        return open(file, mode, *arguments, **options)


@pytest.mark.parametrize(
    ("room", "first"),
    [*((files, first) for first in (1, 3, 6, 9)), *((logs, first) for first in (1, 3, 6))],
    ids=[*(f"checkpoints and pictures {n}" for n in (1, 3, 6, 9)), *(f"log lines {n}" for n in (1, 3, 6))],
)
def test_a_disk_that_fails_is_one_line_and_the_same_command_goes_on(train, tmp_path, monkeypatch, capsys, room, first):
    keys = ("training.fid_every=0", "training.monitoring=[]", "training.save_every=1e-9")
    monkeypatch.setattr("graf.app.hooks.RETRY_AFTER", (0.0, 0.0))
    run = tmp_path / "results" / "smoke"
    with monkeypatch.context() as patch:
        patch.setattr(room, "open", FailingDisk(first, first + 1000).open, raising=False)
        code = train(*keys)
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 1
    assert "Input/output error" in error
    before = saved_iterations(run) if run.is_dir() else []
    assert train(*keys) == 0
    assert set(saved_iterations(run)) >= {6}
    assert [row["iteration"] for row in read_rows(run)] == [1, 2, 3, 4, 5, 6]
    assert not before or max(before) <= 6


def test_a_disk_that_fails_for_a_moment_costs_nothing(train, tmp_path, monkeypatch, capsys):
    keys = (*BARE, "training.save_every=1e-9")
    monkeypatch.setattr("graf.app.hooks.RETRY_AFTER", (0.0, 0.0))
    monkeypatch.setattr(files, "open", FailingDisk(3, 4).open, raising=False)
    assert train(*keys) == 0
    assert "trying again in" in capsys.readouterr().err
    assert max(saved_iterations(tmp_path / "results" / "smoke")) == 6


def test_a_slow_disk_only_takes_time(train, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "open", FailingDisk(1, 1000, seconds=0.3).open, raising=False)
    assert train(*BARE, "--max_iterations", "2") == 0


def read_rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_clock_that_is_set_back_changes_nothing(train, tmp_path, monkeypatch):
    """Not the order of checkpoints, nor when they are saved, nor how long the run may last."""
    keys = (*BARE, "training.save_every=1e-9", "training.max_minutes=10")
    assert train(*keys, "--outdir", "whole") == 0
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 1e6)
    assert train(*keys, "--max_iterations", "3") == 0
    for file in (tmp_path / "results" / "smoke" / "checkpoints").iterdir():
        os.utime(file, (now - 2e6, now - 2e6))
    assert train(*keys) == 0
    found, expected = (
        read_checkpoint(tmp_path / folder / "smoke" / "checkpoints" / "model_00000006.pt")["objects"]["generator"]
        for folder in ("results", "whole")
    )
    assert all(torch.equal(found[name], weights) for name, weights in expected.items())


@pytest.mark.parametrize("change", ["removed", "cut short", "replaced"])
def test_a_photograph_that_changes_in_mid_run_is_named_and_the_run_goes_on(
    run_program, smoke_run, tmp_path, monkeypatch, caplog, change
):
    photos = tmp_path / "photos"
    [source] = smoke_run.data.iterdir()
    shutil.copytree(source, photos)
    original = Trainer.step

    def step(trainer, *batch):
        if trainer.progress.iteration == 1:
            for file in sorted(photos.glob("*.png"))[::2]:
                if change == "removed":
                    file.unlink()
                else:
                    file.write_bytes(b"" if change == "cut short" else b"something else")
        return original(trainer, *batch)

    monkeypatch.setattr(Trainer, "step", step)
    keys = (f"data.datadir={photos}", "data.type=turntable", "data.v_list=[0.2,0.3,0.4]", "data.cache_mib=0", *BARE)
    assert run_program("train.py", "--config", SMOKE, *keys, "--max_iterations", "8") == 0
    assert ".png" in caplog.text
    assert saved_iterations(tmp_path / "results" / "smoke") == [8]
