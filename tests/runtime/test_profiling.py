"""Where steps' time goes: counted on events made by hand, and on steps that torch's profiler has really watched."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from graf.runtime import operator_classes as classes
from graf.runtime.profiling import REST, StepProfiler, split_time
from graf.runtime.regions import DATA, PREFIX, RANDOM_NUMBERS, region

CPU = torch.device("cpu")


def event(name, start, end, own=None, thread=1, kernels=(), device=DeviceType.CPU):
    """What split_time reads of a FunctionEvent; own: microseconds without those of events inside."""
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        self_cpu_time_total=end - start if own is None else own,
        thread=thread,
        is_async=False,
        device_type=device,
        kernels=[SimpleNamespace(duration=duration) for duration in kernels],
    )


# ---------------------------------------------------------------- events made by hand


def test_the_parts_of_two_steps_are_their_own_times_by_innermost_phase_and_class():
    events = [
        event("ProfilerStep*", 0, 100, own=10),
        event(f"{PREFIX}d", 10, 60, own=5),
        event("aten::linear", 12, 30, own=2),
        event("aten::addmm", 14, 30),
        event(f"{PREFIX}r1", 30, 50, own=1),
        event("aten::mul", 31, 50),
        event("aten::sum", 50, 59),
        event("Optimizer.step#Adam.step", 60, 80, own=4),
        event("aten::add_", 62, 78),
        event(f"{PREFIX}{RANDOM_NUMBERS}", 80, 100, own=15),
        event("aten::mul", 90, 95),
        event("ProfilerStep*", 100, 200),
    ]
    split = split_time(reversed(events))
    assert split.steps == 2
    assert split.seconds == pytest.approx(100e-6)
    expected = {
        (REST, classes.OVERHEAD): 110,
        ("d", classes.OVERHEAD): 5,
        ("d", classes.MATRIX_PRODUCT): 18,
        ("r1", classes.OVERHEAD): 1,
        ("r1", classes.ELEMENTWISE): 19,
        ("d", classes.REDUCTION): 9,
        (REST, classes.OPTIMISER): 20,
        (REST, classes.RANDOM): 20,
    }
    assert split.parts == pytest.approx({key: 1e-6 * value / 2 for key, value in expected.items()})
    assert split.by_phase() == pytest.approx({REST: 75e-6, "d": 16e-6, "r1": 10e-6})
    assert list(split.by_class()) == sorted(split.by_class(), key=lambda kind: -split.by_class()[kind])
    assert split.operators["aten::mul"].calls == pytest.approx(1)  # two in two steps
    assert split.longest(1, classes.MATRIX_PRODUCT)[0][0] == "aten::addmm"


def test_random_numbers_of_a_phase_stay_in_it_and_all_of_loading_is_data():
    events = [
        event("ProfilerStep*", 0, 50, own=0),
        event(f"{PREFIX}{DATA}", 0, 20, own=5),
        event("aten::stack", 5, 20),
        event(f"{PREFIX}g", 20, 50, own=20),
        event(f"{PREFIX}{RANDOM_NUMBERS}", 30, 40),
    ]
    parts = split_time(events).parts
    assert parts == pytest.approx(
        {(DATA, classes.DATA): 20e-6, ("g", classes.OVERHEAD): 20e-6, ("g", classes.RANDOM): 10e-6}
    )


def test_on_the_cpu_other_threads_and_what_lies_outside_of_steps_do_not_count():
    events = [
        event("aten::mm", 0, 10),
        event("ProfilerStep*", 10, 20, own=10),
        event("aten::mm", 12, 18, thread=2),
        event("aten::mm", 20, 30),
    ]
    assert split_time(events).parts == pytest.approx({(REST, classes.OVERHEAD): 10e-6})


def test_on_a_gpu_kernels_count_where_they_were_launched_and_the_rest_of_the_step_is_idle():
    events = [
        event("ProfilerStep*", 0, 100, own=1),
        event(f"{PREFIX}g", 0, 50, own=1, kernels=[45]),  # a stretch of the device's time under this name
        event("aten::mm", 5, 8, kernels=[30]),
        event("cudaLaunchKernel", 6, 7),
        event("aten::add", 20, 22, thread=2, kernels=[10, 5]),  # of the backward pass, in its own thread
        event("Optimizer.step#Adam.step", 60, 70),
        event("aten::_fused_adam_", 61, 62, kernels=[5]),
        event("cudaStreamSynchronize", 70, 90),
        event("kernel", 5, 35, device=DeviceType.CUDA),  # stands with the operator that launched it
    ]
    split = split_time(events, "cuda")
    assert split.parts == pytest.approx(
        {
            ("g", classes.MATRIX_PRODUCT): 30e-6,
            ("g", classes.ELEMENTWISE): 15e-6,
            (REST, classes.OPTIMISER): 5e-6,
            (REST, classes.IDLE): 50e-6,
        }
    )
    assert (split.launches, split.waits) == (pytest.approx(1), pytest.approx(20e-6))
    assert "1 launches; the host waits 0.02 ms" in split.describe()


def test_a_profile_without_a_whole_step_is_empty():
    split = split_time([event("aten::mm", 0, 10)])
    assert (split.steps, split.seconds, dict(split.parts)) == (0, 0.0, {})


# ---------------------------------------------------------------- steps that were watched


def take_steps(profiler, count, device=CPU):
    """Steps of a linear layer, each with a phase, random numbers and an update."""
    layer = nn.Linear(64, 64).to(device)
    optimizer = torch.optim.RMSprop(layer.parameters())
    for _ in range(count):
        with region("g"):
            with region(RANDOM_NUMBERS):
                inputs = torch.randn(256, 64, device=device)
            layer(inputs).relu().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        profiler.step()


@pytest.mark.parametrize("warm_up", [1, 3])
def test_steps_after_the_warm_up_are_recorded_once_and_their_parts_add_up(warm_up):
    ready = []
    with StepProfiler(CPU, warm_up, 2, ready.append) as profiler:
        take_steps(profiler, warm_up + 1)
        assert ready == []
        take_steps(profiler, 4)
        assert ready == [profiler]
    assert ready == [profiler]
    split = profiler.split
    assert split.steps == 2
    assert sum(split.parts.values()) == pytest.approx(split.seconds, rel=1e-3)
    assert {("g", classes.MATRIX_PRODUCT), ("g", classes.RANDOM), (REST, classes.OPTIMISER)} <= split.parts.keys()
    assert not split.longest(9, classes.UNKNOWN)
    assert split.operators["aten::addmm"].calls == pytest.approx(1)
    assert split.operators["aten::mm"].calls == pytest.approx(1)  # the weight's gradient: the inputs take none
    text = split.describe()
    assert all(name in text for name in ("matrix product", "g ", "aten::addmm"))


def test_the_trace_is_valid_json_with_regions_and_operators(tmp_path):
    path = tmp_path / "trace.json"
    with StepProfiler(CPU, 1, 1, lambda profiler: profiler.write_trace(path)) as profiler:
        take_steps(profiler, 3)
    events = json.loads(path.read_text())["traceEvents"]
    assert {f"{PREFIX}g", "aten::addmm", f"{PREFIX}{RANDOM_NUMBERS}"} <= {item["name"] for item in events}
    assert [item.name for item in tmp_path.iterdir()] == ["trace.json"]


def test_a_loop_that_ends_early_reports_the_steps_that_it_took():
    ready = []
    with StepProfiler(CPU, 1, 10, ready.append) as profiler:
        take_steps(profiler, 4)
    assert [found.split.steps for found in ready] == [3]


def test_a_loop_that_fails_reports_nothing_and_the_next_profile_works():
    ready = []

    def fail():
        with StepProfiler(CPU, 1, 10, ready.append) as profiler:
            take_steps(profiler, 4)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert ready == []
    with StepProfiler(CPU, 1, 1, ready.append) as profiler:
        take_steps(profiler, 2)
    assert len(ready) == 1


def test_a_region_that_nobody_records_is_no_event():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded, region("g"):
        pass
    assert f"{PREFIX}g" in {item.name for item in recorded.events()}
    assert type(region("g")).__name__ == "nullcontext"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_real_gpu_kernels_launches_and_idle_time_make_up_the_step():
    device = torch.device("cuda:0")
    with StepProfiler(device, 2, 2) as profiler:
        take_steps(profiler, 4, device)
    split = profiler.split
    assert split.steps == 2
    assert split.launches >= 5
    assert split.parts[REST, classes.IDLE] > 0
    assert split.parts["g", classes.MATRIX_PRODUCT] > 0
    assert sum(split.parts.values()) >= split.seconds * (1 - 1e-6)
