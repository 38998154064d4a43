"""The learning-rate range test (Smith 2017) of a player: its rate grows from step to step, and its loss tells what for.

A GAN's losses move by themselves: with the batch, and with what the other players learn. So a player is tested alone,
the others keeping the rates that they are given, since together nobody could tell whose rate broke the game; and its
loss is compared with that of the same steps, from the same start, in which it stands still. What counts is the distance
to photographs where a player has one; D has its own loss, and so has a generator without a photometric term, of which
this tells less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

from graf.training.players import DivergenceError
from graf.training.trainer import Trainer

#: G's loss where there is no distance to photographs
ADVERSARIAL = "loss_g"
#: the loss that judges each player, by its suffix: the first one that there is
LOSSES = {
    "g": ("loss_g_photometric", ADVERSARIAL),
    "d": ("loss_d",),
    "sr": ("loss_sr_photometric", "loss_sr_photographs", "loss_sr_consistency"),
}
#: losses are smoothed over so much of the growth, in powers of ten
SMOOTHING = 0.5
#: share of the largest gain above which a rate counts as useful
USEFUL = 0.5

#: a trainer where the test begins, and its batches from there on
Start = Callable[[], tuple[Trainer, Iterator[tuple[Any, ...]]]]


@dataclass(frozen=True)
class RateRange:
    """Learning rates that grow from `lowest` to `highest` in so many iterations, by the same factor each."""

    lowest: float = 1e-5
    highest: float = 1.0
    iterations: int = 100

    def rate(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        return float(self.lowest * (self.highest / self.lowest) ** (step / max(self.iterations - 1, 1)))

    @property
    def reach(self) -> int:
        """Steps on either side that smoothing looks at."""
        return round(SMOOTHING / 2 * self.iterations / math.log10(self.highest / self.lowest))

    def smooth(self, values: Sequence[float]) -> list[float]:
        """The medians of the values of every step and those around it, which no single one moves."""
        reach = self.reach
        return [median(values[max(step - reach, 0) : step + reach + 1]) for step in range(len(values))]


@dataclass(frozen=True)
class RangeTest:
    """What a test has seen of the player `suffix`: its loss `loss` with each rate and, in the same step, at rest.

    losses and at_rest are as long as the range, or shorter where the loss has diverged.
    """

    suffix: str
    loss: str
    range: RateRange
    losses: tuple[float, ...]
    at_rest: tuple[float, ...]

    @property
    def rates(self) -> list[float]:
        """The rates of the losses."""
        return [self.range.rate(step) for step in range(len(self.losses))]

    @property
    def has_diverged(self) -> bool:
        """Whether the highest rates were too high."""
        return len(self.losses) < self.range.iterations

    @property
    def gains(self) -> list[float]:
        """By how much each rate has lowered the loss."""
        return [rest - loss for loss, rest in zip(self.losses, self.at_rest, strict=True)]

    @property
    def useful(self) -> tuple[float, float] | None:
        """The lowest and highest of the rates around the largest gain that bring half of it; None without a gain."""
        gains = self.range.smooth(self.gains)
        most = max(range(len(gains)), key=gains.__getitem__, default=None)
        if most is None or gains[most] <= 0:
            return None
        first = last = most
        while first > 0 and gains[first - 1] >= USEFUL * gains[most]:
            first -= 1
        while last + 1 < len(gains) and gains[last + 1] >= USEFUL * gains[most]:
            last += 1
        return self.range.rate(first), self.range.rate(last)

    @property
    def suggestion(self) -> float | None:
        """The middle of the useful rates, on their logarithmic axis; None where the test cannot tell.

        A generator that only has D to please fools it with any rate from some on, however noisy its images: there it is
        the lowest useful one.
        """
        if self.useful is None:
            return None
        lowest, highest = self.useful
        return lowest if self.loss == ADVERSARIAL else math.sqrt(lowest * highest)


def measure_range(start: Start, suffix: str, rates: RateRange) -> RangeTest:
    """Test one player: twice from the same start, at rest, and with growing rates until its loss diverges.

    Diverged is a loss, smoothed, that exceeds the one at rest by all that this is on average, or that is not finite.
    Raises DivergenceError where the other players diverge by themselves.
    """
    at_rest = list(islice(_train(start, suffix, lambda step: 0.0), rates.iterations))
    size = sum(abs(loss) for _, loss in at_rest) / len(at_rest)
    losses: list[float] = []
    excesses: list[float] = []
    with suppress(DivergenceError):  # a gradient that is not finite ends the test like a loss
        for (_, rest), (_, loss) in zip(at_rest, _train(start, suffix, rates.rate), strict=False):
            if not math.isfinite(loss):
                break
            losses.append(loss)
            excesses.append(loss - rest)
            if median(excesses[-rates.reach - 1 :]) > size:
                break
    name, _ = at_rest[0]
    return RangeTest(suffix, name, rates, tuple(losses), tuple(loss for _, loss in at_rest[: len(losses)]))


def _train(start: Start, suffix: str, rate: Callable[[int], float]) -> Iterator[tuple[str, float]]:
    """Step on with a player's learning rate as `rate` gives it for each step; the name and value of its loss."""
    trainer, batches = start()
    player = next(player for player in trainer.players if player.suffix == suffix)
    first = trainer.progress.iteration
    player.lr, player.schedule = 1.0, lambda iteration: rate(iteration - first)
    for batch in batches:
        statistics = trainer.step(*batch)
        trainer.settle()
        name = next(name for name in LOSSES[suffix] if name in statistics)
        yield name, float(statistics[name])
