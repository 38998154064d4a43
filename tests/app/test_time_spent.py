"""The line on where a run's time went."""

from graf.app.time_spent import describe_time


def test_the_longest_phase_comes_first_and_small_ones_belong_to_the_rest():
    seconds = {"data": 0.2, "d": 30.0, "g": 50.0, "save": 18.0, "rest": 1.8}
    assert describe_time(seconds) == "100.0 s: generator 50%, discriminator 30%, saving 18%, rest 2%"
