"""Sizes of moving pictures: a steady rate on any machine, and back again when its load changes."""

import pytest

from graf.viewer.pacing import RATE, SMALLEST, Pacer


def drive(pacer: Pacer, pictures: int, seconds_per_pixel: float, aspect: float = 1.0, overhead: float = 0.005) -> float:
    """Seconds of the last of some pictures on a machine of this speed."""
    seconds = 0.0
    for _ in range(pictures):
        height = pacer.height(aspect, 512)
        pixels = height * round(height * aspect)
        seconds = overhead + pixels * seconds_per_pixel
        pacer.note(pixels, seconds)
    return seconds


@pytest.mark.parametrize("seconds_per_pixel", [2e-5, 6e-6, 2e-6])
@pytest.mark.parametrize("aspect", [0.6, 1.0, 2.2])
def test_the_rate_is_kept_on_slow_and_fast_machines(seconds_per_pixel, aspect):
    seconds = drive(Pacer(), 6, seconds_per_pixel, aspect)
    assert 0.6 / RATE < seconds < 1.1 / RATE


def test_a_load_that_comes_and_goes_is_followed_within_a_second():
    pacer = Pacer()
    drive(pacer, 10, 4e-6)
    before = pacer.height(1.0, 512)
    assert drive(pacer, 5, 12e-6) < 1.25 / RATE
    assert pacer.height(1.0, 512) < before
    drive(pacer, 8, 4e-6)
    assert pacer.height(1.0, 512) >= before - 16


def test_pictures_are_never_larger_than_the_full_one_nor_smaller_than_shows_something():
    fast, slow = Pacer(), Pacer()
    fast.note(10**6, 0.001)
    slow.note(100, 10.0)
    assert fast.height(1.0, 200) == 200
    assert slow.height(1.0, 200) == SMALLEST
    assert slow.height(1.0, 20) == 20
