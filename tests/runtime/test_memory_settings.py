"""The value that says how a step fits into memory: what is made smaller in which order."""

import pytest

from graf.runtime.memory_settings import SMALLEST_CHUNK, MemorySettings


def shrink_to_the_end(settings: MemorySettings, batch_size: int, renders: bool = True) -> list[MemorySettings]:
    found = [settings]
    while (smaller := found[-1].shrink(batch_size, renders)) is not None:
        found.append(smaller)
    return found


def test_micro_batches_shrink_first_then_activations_then_chunks():
    steps = shrink_to_the_end(MemorySettings(8, "dense", 200), batch_size=5)
    assert [(step.micro_batch_size, step.strategy, step.chunk) for step in steps] == [
        (8, "dense", 200),
        (2, "dense", 200),  # half of the five images that were there
        (1, "dense", 200),
        (1, "checkpoint", 200),
        (1, "checkpoint", 100),
        (1, "checkpoint", SMALLEST_CHUNK),
    ]


def test_deferred_rendering_stays_deferred():
    assert {step.strategy for step in shrink_to_the_end(MemorySettings(1, "deferred", 512), 1)} == {"deferred"}


def test_what_renders_nothing_is_only_split():
    assert shrink_to_the_end(MemorySettings(2, "dense", 512), 2, renders=False)[-1] == MemorySettings(1, "dense", 512)


def test_a_change_names_the_keys():
    change = MemorySettings(4, "dense", 512).describe_change(MemorySettings(4, "checkpoint", 256))
    assert change == "training.memory_strategy dense -> checkpoint, training.chunk 512 -> 256"


@pytest.mark.parametrize("values", [(0, "dense", 64), (1, "dens", 64), (1, "dense", 0)])
def test_impossible_settings_are_refused(values):
    with pytest.raises(ValueError, match="expected sizes of at least 1 and a strategy of dense, checkpoint, deferred"):
        MemorySettings(*values)
