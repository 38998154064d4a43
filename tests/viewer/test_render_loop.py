"""Who is drawn when: the newest request, quick ones first and in turns, full ones where nothing moves."""

import logging
import threading
import time
from collections.abc import Callable

import pytest

from graf.viewer.drawing import Interrupted
from graf.viewer.render_loop import STILL_AFTER, Job, RenderLoop


class Studio:
    """A loop whose drawing can be held up, and what it has delivered as (client, request, quick)."""

    def __init__(self) -> None:
        self.loop: RenderLoop[object] = RenderLoop(self.draw, self.deliver)
        self.delivered: list[tuple[object, object, bool]] = []
        self.interrupted: list[object] = []
        self.busy, self.go_on, self.hold_full = threading.Event(), threading.Event(), False
        self.failures = 0
        self.go_on.set()
        self.loop.start()

    def draw(self, job: Job[object]) -> object:
        self.busy.set()
        if self.failures:
            self.failures -= 1
            raise ValueError("a defect")
        if job.quick or not self.hold_full:
            assert self.go_on.wait(5)
        deadline = time.monotonic() + 5
        try:
            self.loop.check()
            while not job.quick and self.hold_full and time.monotonic() < deadline:
                self.loop.check()
                time.sleep(0.002)
        except Interrupted:
            self.interrupted.append(job.request)
            raise
        return job.request

    def deliver(self, job: Job[object], result: object) -> None:
        self.delivered.append((job.client, result, job.quick))


@pytest.fixture
def studio():
    studio = Studio()
    yield studio
    studio.go_on.set()
    studio.loop.stop()


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this did not happen in time"
        time.sleep(0.002)


def test_a_request_is_drawn_quickly_and_then_in_full_when_nothing_newer_comes(studio):
    started = time.monotonic()
    studio.loop.ask("a", 1)
    wait_for(lambda: len(studio.delivered) == 2)
    assert studio.delivered == [("a", 1, True), ("a", 1, False)]
    assert time.monotonic() - started >= STILL_AFTER
    time.sleep(0.05)
    assert len(studio.delivered) == 2  # nothing moves: nothing is drawn


def test_of_many_requests_the_newest_is_drawn(studio):
    studio.go_on.clear()
    studio.loop.ask("a", 0)
    assert studio.busy.wait(5)
    for number in range(1, 50):
        studio.loop.ask("a", number)
    studio.go_on.set()
    wait_for(lambda: ("a", 49, False) in studio.delivered)
    assert studio.delivered == [("a", 0, True), ("a", 49, True), ("a", 49, False)]


def test_a_full_picture_is_interrupted_by_a_newer_request_and_a_quick_one_is_not(studio):
    studio.hold_full = True
    studio.loop.ask("a", 1)
    wait_for(lambda: ("a", 1, True) in studio.delivered)
    studio.busy.clear()
    assert studio.busy.wait(5)  # the full picture has begun
    studio.loop.ask("a", 2)
    wait_for(lambda: ("a", 2, True) in studio.delivered)
    assert studio.interrupted == [1]
    studio.hold_full = False
    wait_for(lambda: ("a", 2, False) in studio.delivered)
    assert ("a", 1, False) not in studio.delivered


def test_a_full_picture_that_another_client_interrupted_is_drawn_later(studio):
    studio.hold_full = True
    studio.loop.ask("a", 1)
    wait_for(lambda: ("a", 1, True) in studio.delivered)
    studio.busy.clear()
    assert studio.busy.wait(5)
    studio.loop.ask("b", 2)
    wait_for(lambda: ("b", 2, True) in studio.delivered)
    studio.hold_full = False
    wait_for(lambda: ("a", 1, False) in studio.delivered and ("b", 2, False) in studio.delivered)


def test_moving_clients_are_drawn_in_turns(studio):
    stop = time.monotonic() + 0.3
    while time.monotonic() < stop:
        for client in "abc":
            studio.loop.ask(client, 0)
        time.sleep(0.001)
    counts = [sum(1 for client, _, quick in studio.delivered if quick and client == name) for name in "abc"]
    assert min(counts) > 5
    assert max(counts) - min(counts) <= 0.2 * max(counts) + 2


def test_nothing_is_drawn_for_a_client_that_has_gone(studio):
    studio.go_on.clear()
    studio.loop.ask("a", 1)
    assert studio.busy.wait(5)
    studio.loop.forget("a")
    studio.go_on.set()
    wait_for(lambda: studio.interrupted == [1])
    time.sleep(STILL_AFTER + 0.05)
    assert studio.delivered == []


def test_a_defect_of_one_picture_is_told_and_does_not_end_the_viewer(studio, caplog):
    studio.failures = 1
    with caplog.at_level(logging.ERROR):
        studio.loop.ask("a", 1)
        wait_for(lambda: ("a", 1, False) in studio.delivered)
    assert "could not be drawn" in caplog.text
    assert "a defect" in caplog.text


def test_stopping_ends_the_thread_in_the_middle_of_a_picture():
    studio = Studio()
    studio.hold_full = True
    studio.loop.ask("a", 1)
    wait_for(lambda: ("a", 1, True) in studio.delivered)
    time.sleep(STILL_AFTER)
    studio.loop.stop()
    assert not any(thread.name == "graf-view-render" for thread in threading.enumerate())
