"""Phases on a clock that the test turns, on the program's own, and on a CUDA device, which is never waited for."""

import time

import pytest
import torch

from graf.runtime import phase_timer
from graf.runtime.phase_timer import REST, PhaseTimer, make_timer

CPU = torch.device("cpu")


class SlowDevice:
    """A clock whose marks are times of the program; the device has come to those up to `reached`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reached = float("inf")

    def mark(self) -> float:
        return self.now

    def is_past(self, mark: float) -> bool:
        return mark <= self.reached

    def seconds(self, start: float, end: float) -> float:
        assert end <= self.reached, "read before the device was there"
        return end - start


@pytest.fixture
def clock() -> SlowDevice:
    return SlowDevice()


def test_time_counts_towards_the_innermost_phase_and_adds_up(clock):
    timer = PhaseTimer(clock)
    clock.now = 5.0  # before the first phase nothing is timed
    with timer.phase("outer"):
        clock.now += 1
        for seconds in (2, 4):
            with timer.phase("inner"):
                clock.now += seconds
        clock.now += 8
    clock.now += 16
    with timer.phase("outer"):
        clock.now += 32
    assert timer.totals() == {"outer": 41, "inner": 6, REST: 16}
    assert sum(timer.totals().values()) == clock.now - 5


def test_what_is_taken_is_what_came_since_the_last_time(clock):
    timer = PhaseTimer(clock)
    for expected in (1.0, 3.0):
        with timer.phase("d"):
            clock.now += expected
        assert timer.take()["d"] == expected
    assert timer.take() == {"d": 0, REST: 0}
    assert timer.totals()["d"] == 4


def test_a_phase_that_fails_ends(clock):
    timer = PhaseTimer(clock)
    with pytest.raises(KeyError), timer.phase("d"):
        raise KeyError
    clock.now += 2
    with timer.phase("g"):
        clock.now += 4
    assert timer.totals() == {"d": 0, REST: 2, "g": 4}


def test_what_the_device_has_not_reached_is_found_later(clock):
    timer = PhaseTimer(clock)
    clock.reached = 1.0
    for _ in range(3):
        with timer.phase("d"):
            clock.now += 1
    assert timer.take()["d"] == 1
    clock.reached = 3.0
    assert timer.take()["d"] == 2


def test_marks_do_not_pile_up_where_nobody_asks(clock, monkeypatch):
    monkeypatch.setattr(phase_timer, "MOST_PENDING", 10)
    timer = PhaseTimer(clock)
    for _ in range(100):
        with timer.phase("d"):
            clock.now += 1
        assert len(timer._pending) <= 10
    assert timer.totals()["d"] == 100


def test_on_a_cpu_phases_take_the_time_of_the_program():
    timer, started = make_timer(CPU), time.perf_counter()
    with timer.phase("sleep"):
        time.sleep(0.01)
    assert 0.01 <= timer.totals()["sleep"] <= time.perf_counter() - started


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_phases_take_the_time_of_the_device_which_is_not_waited_for():
    device = torch.device("cuda")
    timer, matrix = make_timer(device), torch.rand(4096, 4096, device=device)
    torch.cuda.synchronize()
    started = time.perf_counter()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with timer.phase("long"):
            for _ in range(20):
                matrix = torch.nn.functional.normalize(matrix @ matrix)
        with timer.phase("short"):
            matrix = matrix + 1
        timer.totals()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    elapsed, totals = time.perf_counter() - started, timer.totals()
    assert totals["long"] > 5 * totals["short"] > 0
    assert 0 < sum(totals.values()) <= elapsed
