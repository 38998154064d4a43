"""The learning-rate range test: on a parabola whose stable rates are known, on made-up gains, and on a real step."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from graf.app import builders
from graf.training.lr_range import RangeTest, RateRange, measure_range
from graf.training.players import DivergenceError


def made_up(gains: list[float], loss: str = "loss_g_photometric") -> RangeTest:
    """A test in which the player at rest had a loss of 1, over rates from 1e-5 to 1."""
    rates = RateRange(iterations=len(gains))
    return RangeTest("g", loss, rates, tuple(1 - gain for gain in gains), (1.0,) * len(gains))


def plateau(rate: float) -> float:
    """Nothing is gained below 1e-3, as much as can be up to 1e-2, and above all is lost."""
    return 0.0 if rate < 1e-3 else 0.4 if rate <= 1e-2 else -1.0


def test_rates_grow_by_one_factor_from_the_lowest_to_the_highest():
    rates = RateRange(1e-4, 1e-1, iterations=4)
    assert [rates.rate(step) for step in range(4)] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])


def test_smoothing_takes_medians_of_half_a_power_of_ten():
    rates = RateRange(1e-4, 1.0, iterations=16)  # four steps a power
    assert rates.reach == 1
    assert rates.smooth([5.0, 1.0, 9.0, 2.0]) == [3.0, 5.0, 2.0, 5.5]


def test_the_middle_of_the_useful_rates_is_suggested_whatever_single_steps_say():
    rates = RateRange(iterations=101)  # 20 a power of ten
    gains = [plateau(rates.rate(step)) for step in range(101)]
    gains[10], gains[50], gains[90] = 7.0, -7.0, 7.0
    test = made_up(gains)
    assert test.useful == pytest.approx((1e-3, 1e-2), rel=0.3)
    assert test.suggestion == pytest.approx(10**-2.5, rel=0.3)


def test_a_generator_without_photographs_gets_the_lowest_useful_rate():
    test = made_up([0.0] * 50 + [0.4] * 50, loss="loss_g")
    assert test.suggestion == test.useful[0] == pytest.approx(1e-5 * 10 ** (5 * 50 / 99), rel=0.2)


@pytest.mark.parametrize("gains", [[], [0.0] * 40, [-0.1] * 40])
def test_without_a_gain_nothing_is_suggested(gains):
    assert made_up(gains).suggestion is None


class Parabola:
    """Stands in for a trainer: gradient descent on curvature / 2 w^2, stable below 2 / curvature.

    The loss also moves by itself, by -0.5 in every step, as a GAN's does where the other players learn.
    """

    def __init__(self, curvature: float, iteration: int = 0) -> None:
        self.weight, self.curvature, self.steps = 1.0, curvature, 0
        self.player = SimpleNamespace(suffix="d", lr=None, schedule=None)
        self.players = [SimpleNamespace(suffix="g"), self.player]
        self.progress = SimpleNamespace(iteration=iteration)

    def settle(self) -> None:
        """Losses are checked in each step."""

    def step(self) -> dict[str, torch.Tensor]:
        loss = self.curvature / 2 * self.weight**2 - 0.5 * self.steps
        if not math.isfinite(loss):
            raise DivergenceError("not finite")
        self.weight -= self.player.lr * self.player.schedule(self.progress.iteration) * self.curvature * self.weight
        self.progress.iteration += 1
        self.steps += 1
        return {"loss_d": torch.tensor(loss), "loss_g": torch.tensor(math.nan)}


@pytest.mark.parametrize("curvature", [1e2, 1e3])
@pytest.mark.parametrize("iteration", [0, 2400])
def test_a_parabola_is_given_a_stable_rate_that_gets_somewhere(curvature, iteration):
    test = measure_range(lambda: (Parabola(curvature, iteration), itertools.repeat(())), "d", RateRange())
    assert test.loss == "loss_d"
    assert test.has_diverged
    assert test.at_rest[:3] == (curvature / 2, curvature / 2 - 0.5, curvature / 2 - 1)  # no step of it was taken
    assert 0.02 / curvature < test.suggestion < 2 / curvature
    assert test.rates[-1] < 40 / curvature  # and it was stopped soon


def test_a_start_that_diverges_by_itself_is_no_answer():
    def start():
        trainer = Parabola(1.0)
        trainer.weight = math.inf
        return trainer, itertools.repeat(())

    with pytest.raises(DivergenceError):
        measure_range(start, "d", RateRange())


@pytest.mark.parametrize("suffix", ["d", "g", "sr"])
def test_trials_begin_alike_and_the_player_at_rest_stays_where_it_was(make_trainer, smoke_config, batches, suffix):
    keys = ("data.imsize=16", "ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1")
    photographs = builders.open_photographs(smoke_config(*keys))
    trainers, begun = [], []

    def start():
        trainers.append(make_trainer(*keys, data=photographs))
        begun.append({player.suffix: parameters_of(player) for player in trainers[-1].players})
        return trainers[-1], batches(3, data=photographs)

    test = measure_range(start, suffix, RateRange(1e-4, 1e-2, iterations=3))
    assert len(trainers) == 2
    assert test.losses[0] == test.at_rest[0]
    assert test.losses[2] != test.at_rest[2]
    for trainer, before, moved in zip(trainers, begun, ({"d", "g", "sr"} - {suffix}, {"d", "g", "sr"}), strict=True):
        assert {
            player.suffix for player in trainer.players if not torch.equal(parameters_of(player), before[player.suffix])
        } == moved


def parameters_of(player) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in player.parameters])
