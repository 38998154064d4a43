"""Claims about seeds and draws: stable, independent of rank and micro-batch, and free of side effects."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from graf.runtime import randomness
from graf.runtime.randomness import (
    Draws,
    derive_seed,
    draw_normal,
    draw_uniform,
    make_keys,
    preserve_rng,
    seed_everything,
)


def test_derived_seeds_are_these_on_every_platform_and_in_every_process() -> None:
    assert derive_seed(0, "z") == 5_943_720_150_693_979_858
    assert derive_seed(1, "pose", 500, 7) == 3_097_319_565_199_182_425


def test_every_part_changes_the_seed_and_all_fit_63_bits() -> None:
    grid = list(itertools.product(range(-2, 5), ["z", "pose", "z1", ""], [0, 1, 11, 10**9], [0, 1, 11]))
    seeds = {derive_seed(*parts) for parts in grid}
    assert len(seeds) == len(grid)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**61, "the whole range is used"


def test_numpy_integers_derive_the_same_seed_and_floats_are_refused() -> None:
    assert derive_seed(np.int64(5), "z", np.int32(6), np.int64(7)) == derive_seed(5, "z", 6, 7)
    with pytest.raises(TypeError):
        derive_seed(5, "z", 6.0)  # type: ignore[arg-type]


DRAWS = {
    "uniform": lambda draws: draws.uniform("u", 5, 7),
    "normal": lambda draws: draws.normal("n", 33),
    "integers": lambda draws: draws.integers("i", 360, 2),
    "scalar": lambda draws: draws.uniform("s"),
}


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("sizes", [(8,), (4, 4), (3, 5), (1,) * 8, (7, 0, 1)])
def test_any_split_of_the_batch_gives_the_same_rows(kind: str, sizes: tuple[int, ...]) -> None:
    draw = DRAWS[kind]
    whole = draw(Draws(1, 10, range(8)))
    starts = [0, *itertools.accumulate(sizes)]
    parts = [draw(Draws(1, 10, range(start, stop))) for start, stop in itertools.pairwise(starts)]
    assert torch.equal(torch.cat(parts), whole)


def test_rows_follow_their_index_in_any_order() -> None:
    order = (6, 0, 3)
    whole = Draws(1, 10, range(8)).normal("z", 256)
    assert torch.equal(Draws(1, 10, order).normal("z", 256), whole[list(order)])


def test_rows_purposes_iterations_and_seeds_differ() -> None:
    base = Draws(1, 10, range(2))
    rows = [
        *base.uniform("a", 4),
        *base.uniform("b", 4),
        *Draws(1, 11, range(2)).uniform("a", 4),
        *Draws(2, 10, range(2)).uniform("a", 4),
    ]
    assert len({tuple(row.tolist()) for row in rows}) == 8


def test_draws_have_their_distribution_over_samples() -> None:
    draws = Draws(0, 0, range(4000))
    uniform, normal, integers = draws.uniform("u"), draws.normal("n"), draws.integers("i", 10)
    assert uniform.shape == normal.shape == integers.shape == (4000,)
    assert uniform.dtype == normal.dtype == torch.float32
    assert integers.dtype == torch.int64
    assert uniform.min() >= 0
    assert uniform.max() < 1
    # Five standard errors of the mean of 4,000 draws.
    assert uniform.mean().item() == pytest.approx(0.5, abs=5 * 12**-0.5 / 4000**0.5)
    assert normal.mean().item() == pytest.approx(0, abs=5 / 4000**0.5)
    assert normal.std().item() == pytest.approx(1, abs=5 / 8000**0.5)
    assert torch.equal(integers.unique(), torch.arange(10))
    assert torch.bincount(integers).sub(400).abs().max() < 5 * 360**0.5


def test_draws_leave_the_global_generators_alone() -> None:
    seed_everything(3)
    expected = torch.rand(4)
    seed_everything(3)
    Draws(1, 10, range(8)).normal("z", 16)
    assert torch.equal(torch.rand(4), expected)


def draw_from_all() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_seed_everything_repeats_all_three_libraries(seed: int) -> None:
    seed_everything(seed)
    first = draw_from_all()
    assert draw_from_all() != first
    seed_everything(seed)
    assert draw_from_all() == first


def test_preserve_rng_hides_what_the_block_draws() -> None:
    seed_everything(5)
    expected = draw_from_all()
    seed_everything(5)
    with preserve_rng():
        seed_everything(99)
        draw_from_all()
    assert draw_from_all() == expected


def test_preserve_rng_restores_after_a_failure_too() -> None:
    seed_everything(5)
    expected = draw_from_all()
    seed_everything(5)

    def draw_and_fail() -> None:
        with preserve_rng():
            draw_from_all()
            raise KeyError("failed inside")

    with pytest.raises(KeyError):
        draw_and_fail()
    assert draw_from_all() == expected


# ---------------------------------------------------------------- the counter-based generator


def hash_in_python(value: int) -> int:
    """MurmurHash3's finaliser with shifts by 32, on Python's integers."""
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value ^= value >> 32
        value = value * multiplier % 2**64
    return value ^ value >> 32


def numbers_in_python(seed: int, purpose: str, iteration: int, index: int, count: int) -> list[float]:
    """Uniform numbers of one row, by the definition."""
    origin, golden = derive_seed(seed, purpose, iteration), 0x9E3779B97F4A7C15
    start = hash_in_python((index * golden + origin) % 2**64)
    step = hash_in_python((index * golden + origin + 0xC4CEB9FE1A85EC53) % 2**64) | 1
    found = []
    for pair in range(-(-count // 2)):
        word = hash_in_python((start + pair * step) % 2**64)
        found += [(word & 0xFFFFFF) / 2**24, (word >> 32 & 0xFFFFFF) / 2**24]
    return found[:count]


@pytest.mark.parametrize(("seed", "purpose", "iteration", "index"), [(0, "z", 0, 0), (-7, "g/jitter", 99_999, 2**40)])
def test_numbers_are_those_of_the_definition(seed: int, purpose: str, iteration: int, index: int) -> None:
    found = Draws(seed, iteration, (index,)).uniform(purpose, 101)[0]
    assert found.tolist() == numbers_in_python(seed, purpose, iteration, index, 101)


@pytest.mark.parametrize("draw", [draw_uniform, draw_normal])
@pytest.mark.parametrize(("first", "count"), [(0, 1000), (1, 1), (37, 64), (38, 63), (999, 1), (500, 0)])
def test_a_part_of_a_row_is_made_without_the_rest(draw, first: int, count: int) -> None:
    keys = make_keys(3, "jitter", 8, range(4))
    assert torch.equal(draw(keys, count, first), draw(keys, 1000)[:, first : first + count])


def test_normal_numbers_are_the_quantiles_of_the_uniform_ones() -> None:
    keys = make_keys(3, "n", 8, range(4))
    uniform, normal = draw_uniform(keys, 5000).double(), draw_normal(keys, 5000).double()
    torch.testing.assert_close(torch.special.ndtr(normal), uniform + 2.0**-25, rtol=0, atol=1e-6)


def test_the_outermost_quantiles_are_finite_and_symmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    places = torch.tensor([[0.0, 1 - 2.0**-24]])  # the smallest and the largest number of 24 bits
    monkeypatch.setattr(randomness, "draw_uniform", lambda keys, count, first: places)
    outermost = draw_normal(make_keys(0, "n", 0, range(1)), 2)
    assert bool(torch.isfinite(outermost).all())
    assert float(outermost[0, 1]) > 5
    assert float(outermost.sum()) == 0


#: a million numbers of 64 neighbouring samples
ROWS, LENGTH = 64, 16_384


@pytest.fixture(scope="module")
def million() -> torch.Tensor:
    return draw_uniform(make_keys(0, "jitter", 5, range(ROWS)), LENGTH).double()


def test_numbers_are_uniform_in_every_row_and_every_bit(million: torch.Tensor) -> None:
    bins = 64
    expected = LENGTH / bins
    for row in million:
        chi_squared = ((torch.histc(row.float(), bins, 0, 1) - expected) ** 2 / expected).sum()
        assert 15 < chi_squared < 140  # 63 degrees of freedom: mean 63, and 7 standard deviations of 11.2
    bits = (million * 2**24).long()
    for bit in range(24):  # a million fair coins: a standard deviation of 0.0005
        assert abs(float((bits >> bit & 1).double().mean()) - 0.5) < 5 * 0.5 / (ROWS * LENGTH) ** 0.5


def test_neighbouring_numbers_samples_iterations_and_purposes_do_not_correlate(million: torch.Tensor) -> None:
    centred = (million - 0.5) * 12**0.5
    for lag in (1, 2, 3, 8, 24, 64, 1024):
        correlation = float((centred[:, lag:] * centred[:, :-lag]).mean())
        assert abs(correlation) < 5 / (ROWS * (LENGTH - lag)) ** 0.5
    between = (centred @ centred.T / LENGTH).triu(1)
    assert between.abs().max() < 5.5 / LENGTH**0.5  # the largest of 2,016 pairs
    for other in (make_keys(0, "jitter", 6, range(ROWS)), make_keys(0, "density", 5, range(ROWS))):
        correlation = float((centred * ((draw_uniform(other, LENGTH).double() - 0.5) * 12**0.5)).mean())
        assert abs(correlation) < 5 / (ROWS * LENGTH) ** 0.5


def test_consecutive_counters_form_no_lattice_in_two_or_three_dimensions(million: torch.Tensor) -> None:
    for dimensions, cells in ((2, 32), (3, 8)):
        points = (
            million.flatten()[: million.numel() // dimensions * dimensions].reshape(-1, dimensions) * cells
        ).long()
        index = points @ (cells ** torch.arange(dimensions))
        counts = torch.bincount(index, minlength=cells**dimensions).double()
        expected = len(points) / cells**dimensions
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        freedom = cells**dimensions - 1
        assert abs(chi_squared - freedom) < 6 * (2 * freedom) ** 0.5


def test_the_spectrum_of_a_row_is_flat(million: torch.Tensor) -> None:
    power = torch.fft.rfft((million - 0.5) * 12**0.5).abs().square()[:, 1:-1] / LENGTH  # 64 x 8,191
    assert abs(float(power.mean()) - 1) < 0.01
    assert power.max() < 25  # exponential with mean 1: exp(-25) x 524,224 values is 7e-6
    bands = power[:, : 64 * 127].unflatten(1, (64, 127)).mean((0, 2))  # of 64 x 127 values each
    assert float((bands - 1).abs().max()) < 5 / (64 * 127) ** 0.5


def test_birthdays_are_spaced_as_those_of_random_numbers() -> None:
    """Marsaglia's birthday spacings: of m = 512 in n = 2^24 days, duplicates are Poisson with mean m^3 / 4 n = 2."""
    days = (draw_uniform(make_keys(0, "days", 0, range(1000)), 512) * 2**24).long().sort(dim=1).values
    spacings = days.diff(dim=1).sort(dim=1).values
    duplicates = (spacings.diff(dim=1) == 0).sum(1).double()
    assert abs(float(duplicates.mean()) - 2) < 5 * (2 / 1000) ** 0.5
    assert abs(float(duplicates.var()) - 2) < 0.6


def test_normal_numbers_have_the_moments_of_their_distribution() -> None:
    normal = draw_normal(make_keys(0, "n", 0, range(ROWS)), LENGTH).double()
    error = (ROWS * LENGTH) ** -0.5
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((normal**power).mean()) - moment) < 5 * variance**0.5 * error
    assert bool(torch.isfinite(normal).all())
    assert 4.3 < float(normal.abs().max()) < 5.43


class Elsewhere(torch.Tensor):
    """A tensor that is treated as one of another device, so that torch makes its numbers."""


@pytest.mark.parametrize("draw", [draw_uniform, draw_normal])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 4096), (37, 20_000), (10**7, 5)])
def test_torch_makes_the_same_numbers_as_numpy(draw, first: int, count: int) -> None:
    keys = make_keys(-3, "jitter", 8, range(7))
    found = draw(keys.clone().as_subclass(Elsewhere), count, first).as_subclass(torch.Tensor)
    assert torch.equal(found, draw(keys, count, first))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_makes_the_numbers_of_the_cpu() -> None:
    keys = make_keys(1, "jitter", 10, range(8))
    assert torch.equal(draw_uniform(keys.cuda(), 4099, 3).cpu(), draw_uniform(keys, 4099, 3))
    torch.testing.assert_close(
        draw_normal(keys.cuda(), 4099, 3).cpu(), draw_normal(keys, 4099, 3), rtol=1e-5, atol=1e-5
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_global_generator_of_a_gpu_is_preserved() -> None:
    before = torch.cuda.get_rng_state(0)
    with preserve_rng():
        torch.rand(4, device="cuda:0")
    assert torch.equal(torch.cuda.get_rng_state(0), before)
