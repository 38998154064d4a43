"""The run lock: one process at a time, released by any end of it, stale notes recognised on this host and others."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graf.runtime import logs, run_lock
from graf.runtime.run_lock import LockedError, RunLock

REPOSITORY = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from graf.runtime.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def fresh_messages(monkeypatch):
    monkeypatch.setattr(logs, "_said", set())


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def write_note(folder: Path, age: float = 0, **changes: object) -> Path:
    """The note that a process has left, `age` seconds ago."""
    file = folder / run_lock.NAME
    file.write_text(json.dumps(run_lock._own_note() | changes))
    os.utime(file, (time.time() - age, time.time() - age))
    return file


def test_a_second_process_stops_at_once_and_is_told_who_is_there(tmp_path, holder):
    started = time.monotonic()
    expected = rf"another process trains there \(process {holder.pid} on .*, since .*\); wait for it, stop it, or"
    with pytest.raises(LockedError, match=expected), RunLock(tmp_path):
        pass
    assert time.monotonic() - started < 1


def assert_can_be_taken(folder: Path) -> None:
    """The lock is ours, and its note says so."""
    with RunLock(folder) as lock:
        note = json.loads(lock.file.read_text())
        assert (note["pid"], note["host"]) == (os.getpid(), socket.gethostname())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_goes_with_its_process_however_it_ends(tmp_path, holder, number, caplog):
    caplog.set_level("INFO", "graf")
    holder.send_signal(number)
    holder.wait()
    with RunLock(tmp_path):
        assert f"was left by process {holder.pid}" in caplog.text


def test_within_one_process_it_is_held_once_and_free_afterwards(tmp_path):
    for _ in range(2):
        with RunLock(tmp_path):
            with pytest.raises(LockedError, match=f"process {os.getpid()} "), RunLock(tmp_path):
                pass
            with pytest.raises(LockedError), RunLock(tmp_path):  # and the refusal has not released it
                pass
            note = json.loads((tmp_path / run_lock.NAME).read_text())
            assert note["pid"] == os.getpid()
        assert (tmp_path / run_lock.NAME).read_bytes() == b""


def test_folders_that_were_made_for_the_lock_alone_go_with_it(tmp_path):
    run = tmp_path / "results" / "toys"
    with RunLock(run):
        assert run.is_dir()
    assert list(tmp_path.iterdir()) == []
    with RunLock(run):
        (run / "config.yaml").touch()
    assert sorted(file.name for file in run.iterdir()) == [run_lock.NAME, "config.yaml"]
    (tmp_path / "mine").mkdir()
    with RunLock(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_outlives_the_holder_does_not_keep_the_lock(tmp_path):
    program = HOLD.replace("time.sleep(60)", "import os\n    pid = os.fork()\n    print(pid, flush=True) if pid else 0")
    program += "\n    os._exit(9) if pid else time.sleep(60)\n"
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        child = int(process.stdout.readline())
        try:
            assert process.wait() == 9
            with RunLock(tmp_path):
                os.kill(child, 0)  # still there
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 5}, {"boot": "an earlier one"}, {"pid": None}])
def test_without_locks_of_the_system_the_note_of_a_dead_process_on_this_host_is_stale(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(run_lock, "fcntl", None)
    write_note(tmp_path, **{"pid": os.getppid()} | changes)
    assert_can_be_taken(tmp_path)


def test_without_locks_of_the_system_the_note_of_a_living_process_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "fcntl", None)
    write_note(tmp_path, age=1e6, pid=os.getppid())
    with pytest.raises(LockedError, match=f"process {os.getppid()} "), RunLock(tmp_path):
        pass


def test_another_hosts_note_is_stale_after_a_while_without_a_sign_of_life(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_lock, "GONE_AFTER", 3)
    write_note(tmp_path, age=4, host="elsewhere", boot="another")
    assert_can_be_taken(tmp_path)
    assert "finding out" not in caplog.text
    write_note(tmp_path, age=2, host="elsewhere", boot="another")
    assert_can_be_taken(tmp_path)
    assert "finding out whether process" in caplog.text


def test_another_host_that_renews_its_note_is_at_work(tmp_path, monkeypatch):
    file = write_note(tmp_path, age=1, host="elsewhere", boot="another")
    monkeypatch.setattr(time, "sleep", lambda seconds: os.utime(file))
    with pytest.raises(LockedError, match="on elsewhere"), RunLock(tmp_path):
        pass


def test_another_host_that_ends_meanwhile_is_not_at_work(tmp_path, monkeypatch):
    file = write_note(tmp_path, age=1, host="elsewhere", boot="another")
    monkeypatch.setattr(time, "sleep", lambda seconds: file.write_bytes(b""))
    assert_can_be_taken(tmp_path)


@pytest.mark.skipif(run_lock.fcntl is None or not run_lock._boot(), reason="needs locks and a boot id")
def test_a_container_of_this_machine_that_is_gone_is_not_waited_for(tmp_path, monkeypatch):
    write_note(tmp_path, age=1, host="0a1b2c3d4e5f")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits"))
    assert_can_be_taken(tmp_path)


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "RENEW_EVERY", 0.01)
    with RunLock(tmp_path) as lock:
        os.utime(lock.file, (1, 1))
        deadline = time.monotonic() + 5
        while lock.file.stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lock.file.stat().st_mtime > 1


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"{}", b'{"pid": "x"}' * 1000])
def test_a_note_that_is_none_is_nobodys(tmp_path, content):
    (tmp_path / run_lock.NAME).write_bytes(content)
    assert_can_be_taken(tmp_path)
