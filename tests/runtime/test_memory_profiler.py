"""What phases report: peaks of live tensors against hand-counted bytes, nested phases, and CUDA's own count."""

import pytest
import torch
from torch import nn

from graf.runtime import memory
from graf.runtime.memory_profiler import MemoryProfiler

CPU = torch.device("cpu")
#: float32 numbers in a MiB
MIB = memory.MIB // 4


def test_a_watched_phase_reports_its_own_peak_and_what_existed_before():
    network = nn.Linear(1, MIB // 2)  # weights and bias: 1 MiB
    meter = MemoryProfiler(CPU)
    with meter.watch(network):
        kept = torch.ones(2 * MIB)
        with meter.phase("first"):
            torch.ones(3 * MIB)
        with meter.phase("second"):
            torch.ones(MIB)
    assert meter.readings["first"]["live_peak"] == pytest.approx(6, abs=1e-3)
    assert meter.readings["second"]["live_peak"] == pytest.approx(4, abs=1e-3)
    assert meter.worst == ("first", pytest.approx(6, abs=1e-3))
    assert len(kept) == 2 * MIB


def test_an_inner_phase_counts_towards_the_outer_one_and_reports_its_largest_occurrence():
    meter = MemoryProfiler(CPU)
    with meter.watch(), meter.phase("outer"):
        torch.ones(4 * MIB)
        for size in (5, 2):
            with meter.phase("inner"):
                torch.ones(size * MIB)
        torch.ones(MIB)
    assert meter.readings["inner"]["live_peak"] == 5
    assert meter.readings["outer"]["live_peak"] == 5
    with meter.watch(), meter.phase("outer"):
        torch.ones(3 * MIB)
        with meter.phase("inner"):
            torch.ones(MIB)
    assert (meter.readings["inner"]["live_peak"], meter.readings["outer"]["live_peak"]) == (1, 3)


def test_a_phase_that_fails_is_closed():
    meter = MemoryProfiler(CPU)
    with meter.watch():
        with pytest.raises(KeyError), meter.phase("outer"), meter.phase("inner"):
            raise KeyError
        with meter.phase("next"):
            torch.ones(MIB)
    assert meter.readings["next"]["live_peak"] == 1


def test_without_watching_only_the_processs_size_is_read():
    meter = MemoryProfiler(CPU)
    with meter.phase("step"):
        torch.ones(MIB)
    assert set(meter.readings["step"]) <= {"rss"}
    assert meter.worst is None
    assert set(meter.scalars()) <= {"memory_step_rss"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cudas_peak_is_that_of_the_phase():
    device = torch.device("cuda:0")
    meter = MemoryProfiler(device)
    memory.release_cache(device)
    before = torch.cuda.memory_allocated(device) / memory.MIB
    with meter.phase("outer"):
        with meter.phase("inner"):
            torch.ones(8 * MIB, device=device)
        torch.ones(2 * MIB, device=device)
    assert meter.readings["inner"]["peak"] - before == pytest.approx(8)
    assert meter.readings["outer"]["peak"] - before == pytest.approx(8)
    assert set(meter.readings["outer"]) == {"peak", "peak_reserved", "allocated", "reserved"}
