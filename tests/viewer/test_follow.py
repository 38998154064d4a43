"""Following a folder: every new or changed file is taken once, whatever happens to others meanwhile."""

import logging
import os
import threading
import time

import pytest

from graf.viewer.follow import Follower, sign


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model_1.pt").write_bytes(b"one")
    return tmp_path


def files(folder):
    return list(folder.glob("*.pt"))


def test_nothing_new_is_not_taken_and_each_change_is_taken_once(folder):
    taken = []
    follower = Follower(lambda: files(folder), sign(files(folder)), lambda: taken.append(None))
    assert not follower.look()
    (folder / "model_2.pt").write_bytes(b"two")
    assert follower.look()
    assert not follower.look()
    os.utime(folder / "model_2.pt", (1, 1))  # written anew under the same name, as model_best.pt is
    assert follower.look()
    assert len(taken) == 2


def test_what_was_saved_since_the_first_files_were_read_is_new(folder):
    """Opening a run and its photographs takes seconds, in which training may save."""
    taken = []
    seen = sign(files(folder))
    (folder / "model_2.pt").write_bytes(b"two")
    assert Follower(lambda: files(folder), seen, lambda: taken.append(None)).look()
    assert len(taken) == 1


def test_files_that_are_removed_are_no_news(folder):
    """Training keeps a few checkpoints: what is shown already is not read again when an older one goes."""
    (folder / "model_2.pt").write_bytes(b"two")
    follower = Follower(lambda: files(folder), sign(files(folder)), lambda: pytest.fail("nothing is new"))
    (folder / "model_1.pt").unlink()
    assert not follower.look()
    (folder / "model_2.pt").unlink()
    assert not follower.look()


def test_files_that_go_are_no_reason_to_stop(folder):
    gone = folder / "model_9.pt"
    assert sign([*files(folder), gone]) == sign(files(folder))


def test_a_checkpoint_that_cannot_be_read_is_told_and_the_next_one_taken(folder, caplog):
    taken, fails = [], [True]

    def take() -> None:
        if fails.pop():
            fails.append(False)
            raise ValueError("half a file")
        fails.append(False)
        taken.append(None)

    follower = Follower(lambda: files(folder), sign(files(folder)), take, every=0.01)
    with caplog.at_level(logging.WARNING):
        follower.start()
        (folder / "model_2.pt").write_bytes(b"two")
        wait_for(lambda: "half a file" in caplog.text)
        (folder / "model_3.pt").write_bytes(b"three")
        wait_for(lambda: len(taken) == 1)
    follower.stop()
    assert not any(thread.name == "graf-view-follow" for thread in threading.enumerate())


def wait_for(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
