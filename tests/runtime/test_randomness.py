"""Claims about seeds and draws: stable, independent of rank and micro-batch, and free of side effects."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from graf.runtime.randomness import Draws, derive_seed, preserve_rng, seed_everything


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


def test_a_row_is_what_its_own_generator_draws() -> None:
    rows = Draws(1, 10, range(2)).normal("z", 256)
    generator = torch.Generator().manual_seed(derive_seed(1, "z", 10, 1))
    assert torch.equal(rows[1], torch.randn(256, generator=generator))


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_cuda_draws_split_and_the_global_generator_is_preserved() -> None:
    whole = Draws(1, 10, range(8)).normal("z", 256, device="cuda:0")
    assert whole.device == torch.device("cuda:0")
    assert torch.equal(Draws(1, 10, (6, 3)).normal("z", 256, device="cuda:0"), whole[[6, 3]])
    before = torch.cuda.get_rng_state(0)
    with preserve_rng():
        torch.rand(4, device="cuda:0")
    assert torch.equal(torch.cuda.get_rng_state(0), before)
