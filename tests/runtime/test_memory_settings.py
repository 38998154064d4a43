"""How a step is made smaller, one setting at a time, and what is said of it."""

from __future__ import annotations

import pytest

from graf.runtime.activation_checkpointing import STRATEGIES
from graf.runtime.memory_settings import SMALLEST_CHUNK, MemorySettings, halve_chunk


def shrink_to_the_end(settings: MemorySettings, batch_size: int, renders: bool = True) -> list[MemorySettings]:
    """Every smaller settings in order."""
    found: list[MemorySettings] = []
    smaller = settings.shrink(batch_size, renders)
    while smaller is not None:
        found.append(smaller)
        smaller = smaller.shrink(batch_size, renders)
    return found


def test_the_micro_batch_shrinks_first_then_checkpointing_begins_then_chunks_shrink() -> None:
    assert shrink_to_the_end(MemorySettings(5, "dense", 300), 8) == [
        MemorySettings(2, "dense", 300),
        MemorySettings(1, "dense", 300),
        MemorySettings(1, "checkpoint", 300),
        MemorySettings(1, "checkpoint", 150),
        MemorySettings(1, "checkpoint", 75),
        MemorySettings(1, "checkpoint", 64),
    ]


@pytest.mark.parametrize("strategy", ["checkpoint", "deferred"])
def test_a_strategy_that_recomputes_is_kept(strategy: str) -> None:
    found = shrink_to_the_end(MemorySettings(2, strategy, 128), 2)
    assert found == [MemorySettings(1, strategy, 128), MemorySettings(1, strategy, 64)]


def test_what_does_not_render_only_takes_fewer_images() -> None:
    found = shrink_to_the_end(MemorySettings(4, "dense", 4096), 8, renders=False)
    assert found == [MemorySettings(2, "dense", 4096), MemorySettings(1, "dense", 4096)]


def test_a_micro_batch_that_is_larger_than_the_batch_shrinks_from_the_batch() -> None:
    assert MemorySettings(100, "dense", 4096).shrink(6) == MemorySettings(3, "dense", 4096)
    assert MemorySettings(100, "dense", 4096).shrink(1) == MemorySettings(100, "checkpoint", 4096)


@pytest.mark.parametrize("chunk", [1, SMALLEST_CHUNK])
def test_nothing_is_left_of_the_smallest_settings(chunk: int) -> None:
    assert MemorySettings(1, "checkpoint", chunk).shrink(8) is None
    assert MemorySettings(1, "dense", chunk).shrink(8, renders=False) is None


@pytest.mark.parametrize(("chunk", "expected"), [(4096, 2048), (300, 150), (127, 64), (65, 64)])
def test_half_a_chunk_is_never_smaller_than_the_smallest(chunk: int, expected: int) -> None:
    assert halve_chunk(chunk) == expected


def test_a_change_names_the_keys_and_both_values_and_nothing_that_stays() -> None:
    settings = MemorySettings(4, "dense", 4096)
    assert settings.describe_change(MemorySettings(2, "dense", 4096)) == "training.micro_batch_size 4 -> 2"
    assert settings.describe_change(MemorySettings(4, "checkpoint", 64)) == (
        "training.memory_strategy dense -> checkpoint, training.chunk 4096 -> 64"
    )
    assert settings.describe_change(settings) == ""


def test_settings_are_written_as_their_keys() -> None:
    assert str(MemorySettings(2, "deferred", 128)) == "micro_batch_size=2 memory_strategy=deferred chunk=128"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_is_valid(strategy: str) -> None:
    assert MemorySettings(1, strategy, 1).strategy == strategy


@pytest.mark.parametrize(
    ("size", "strategy", "chunk"),
    [(0, "dense", 64), (-1, "dense", 64), (1, "dense", 0), (1, "dense", -64), (1, "sparse", 64), (1, "", 64)],
)
def test_invalid_values_are_refused_and_shown_with_what_is_expected(size: int, strategy: str, chunk: int) -> None:
    expected = rf"micro_batch_size={size} memory_strategy={strategy} chunk={chunk}: .*dense, checkpoint, deferred"
    with pytest.raises(ValueError, match=expected):
        MemorySettings(size, strategy, chunk)
