"""Claims about precision per device, gradient scaling per optimiser, and builds of torch without a scaler."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from graf.runtime import amp, logs
from graf.runtime.amp import (
    NoOpScaler,
    Precision,
    Scaler,
    choose_precision,
    find_inf,
    float32_region,
    optimizer_step,
    scale_of,
    skips_by_itself,
)
from graf.runtime.device import read_processor
from graf.runtime.torch_release import torch_release

CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def fresh_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_said", set())


def pretend_native_bfloat16(monkeypatch: pytest.MonkeyPatch, native: bool, gain: float = 2.0) -> None:
    monkeypatch.setattr(amp, "has_native_bfloat16", lambda device: native)
    monkeypatch.setattr(amp, "measure_bfloat16_gain", lambda: gain)


@pytest.mark.parametrize("amp_dtype", ["auto", "float16", "bfloat16"])
@pytest.mark.parametrize("native", [True, False])
def test_cpu_never_runs_float16_and_runs_bfloat16_only_where_native(
    monkeypatch: pytest.MonkeyPatch, amp_dtype: str, native: bool
) -> None:
    pretend_native_bfloat16(monkeypatch, native)
    precision = choose_precision(True, amp_dtype, CPU)
    assert precision == Precision("cpu", torch.bfloat16 if native else None)
    assert not precision.make_scaler().is_enabled()


@pytest.mark.parametrize(
    ("amp_dtype", "gain", "expected"),
    [("auto", 1.1, torch.bfloat16), ("auto", 0.9, None), ("float16", 0.9, None), ("bfloat16", 0.9, torch.bfloat16)],
)
def test_a_cpu_that_multiplies_bfloat16_slower_runs_float32_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    amp_dtype: str,
    gain: float,
    expected: torch.dtype | None,
) -> None:
    pretend_native_bfloat16(monkeypatch, True, gain)
    for _ in range(2):
        assert choose_precision(True, amp_dtype, CPU) == Precision("cpu", expected)
    said = [message for message in caplog.messages if "at 0.900 of its rate in float32" in message]
    assert len(said) == (expected is None)


def test_the_gain_of_bfloat16_is_that_of_a_clock_and_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 3e-3, torch.bfloat16: 1e-3}
    timed: list[torch.dtype] = []

    def time_product(factor: torch.Tensor) -> float:
        timed.append(factor.dtype)
        slow = 50 if len(timed) in (1, 7, 8, 10) else 1  # the start, and what a busy machine does at times
        return slow * seconds[factor.dtype]

    monkeypatch.setattr(amp, "_time_product", time_product)
    amp.measure_bfloat16_gain.cache_clear()
    try:
        assert amp.measure_bfloat16_gain() == amp.measure_bfloat16_gain() == pytest.approx(3.0)
    finally:
        amp.measure_bfloat16_gain.cache_clear()
    assert timed == [torch.float32, torch.bfloat16] * 10


def test_each_fallback_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pretend_native_bfloat16(monkeypatch, False)
    with caplog.at_level(logging.INFO, "graf"):
        for _ in range(3):
            choose_precision(True, "auto", CPU)
            choose_precision(True, "auto", torch.device("mps"))
    assert len(caplog.records) == 2
    assert "no native bfloat16" in caplog.messages[0]
    assert "mps" in caplog.messages[1]


@pytest.mark.parametrize("device", [CPU, CUDA, torch.device("mps")])
def test_without_use_amp_everything_is_float32_and_silent(
    device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose_precision(False, "auto", device) == Precision(device.type, None)
    assert not caplog.records


@pytest.mark.parametrize(
    ("amp_dtype", "capability", "expected"),
    [
        ("auto", (9, 0), torch.bfloat16),
        ("auto", (8, 0), torch.bfloat16),
        ("auto", (7, 5), torch.float16),
        ("float16", (9, 0), torch.float16),
        ("bfloat16", (8, 0), torch.bfloat16),
        ("bfloat16", (7, 5), torch.float16),
    ],
)
def test_cuda_runs_bfloat16_where_it_is_native_and_float16_where_not_or_where_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    amp_dtype: str,
    capability: tuple[int, int],
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.version, "hip", None)
    assert choose_precision(True, amp_dtype, CUDA) == Precision("cuda", expected)
    assert bool(caplog.records) == (amp_dtype == "bfloat16" and expected is torch.float16), "asked for, and not there"


def test_bfloat16_on_cuda_has_no_scaler_and_so_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    scaler = choose_precision(True, "auto", CUDA).make_scaler()
    assert isinstance(scaler, NoOpScaler)
    assert find_inf(scaler, make_pair()[1]) is None


def test_an_unknown_dtype_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="amp_dtype='half': expected auto, float16 or bfloat16"):
        choose_precision(True, "half", CPU)  # type: ignore[arg-type]


def test_native_bfloat16_agrees_between_torch_and_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.cpu, "get_capabilities") or not Path("/proc/cpuinfo").exists():
        pytest.skip("needs both ways of asking")
    by_torch = amp.has_native_bfloat16(CPU)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert amp.has_native_bfloat16(CPU) == by_torch


@pytest.mark.parametrize(
    ("flags", "native"),
    [("fpu avx2 avx512f avx512bw", False), ("avx512f avx512_bf16", True), ("amx_tile amx_bf16", True)],
)
def test_native_bfloat16_is_read_from_processor_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, native: bool
) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text(f"processor\t: 0\nflags\t\t: {flags}\nflags\t\t: other\n")
    assert read_processor("flags", str(listing)) == flags
    monkeypatch.setattr(torch.cpu, "get_capabilities", None, raising=False)
    monkeypatch.setattr(amp, "read_processor", lambda key: read_processor(key, str(listing)))
    assert amp.has_native_bfloat16(CPU) == native


def test_a_machine_without_proc_lists_no_flags(tmp_path: Path) -> None:
    assert read_processor("flags", str(tmp_path / "absent")) == ""


def test_autocast_multiplies_in_its_dtype_and_float32_region_switches_it_off_inside() -> None:
    left, right = torch.rand(4, 4), torch.rand(4, 4)
    with Precision("cpu", torch.bfloat16).autocast():
        assert (left @ right).dtype is torch.bfloat16
        with float32_region("cpu"):
            assert torch.equal(left @ right, left.matmul(right))
            assert (left @ right).dtype is torch.float32
        assert (left @ right).dtype is torch.bfloat16
    with Precision("cpu", None).autocast():
        assert (left @ right).dtype is torch.float32


def test_float32_region_is_null_on_a_device_without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: False, raising=False)
    with float32_region("mps"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def test_describe_names_dtype_and_scaling() -> None:
    assert Precision("cpu", None).describe() == "float32"
    assert Precision("cpu", torch.bfloat16).describe() == "bfloat16 autocast"
    assert Precision("cuda", torch.float16).describe() == "float16 autocast with gradient scaling"


# --- scalers: real, enabled torch.amp.GradScaler("cpu") -------------------------------------------------------------


def make_pair(optimizer_class: type = torch.optim.SGD, **options: object) -> tuple[torch.nn.Parameter, object]:
    weight = torch.nn.Parameter(torch.ones(3))
    return weight, optimizer_class([weight], lr=0.5, **options)


def enabled_scaler() -> Scaler:
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("this torch scales gradients on CUDA alone")
    scaler = Precision("cpu", torch.bfloat16).make_scaler(enabled=True)
    assert isinstance(scaler, torch.amp.GradScaler)
    assert scaler.is_enabled()
    return scaler


def test_an_inf_skips_only_its_own_optimiser_and_halves_only_its_own_scale() -> None:
    (weight_g, optimizer_g), (weight_d, optimizer_d) = make_pair(), make_pair()
    scaler_g, scaler_d = enabled_scaler(), enabled_scaler()
    before = scaler_g.get_scale()

    scaler_g.scale((2 * weight_g).sum()).backward()
    scaler_d.scale((weight_d * torch.tensor([1.0, float("inf"), 1.0])).sum()).backward()
    optimizer_step(scaler_g, optimizer_g)
    optimizer_step(scaler_d, optimizer_d)
    scaler_g.update()
    scaler_d.update()

    assert torch.equal(weight_g, torch.zeros(3)), "1 - lr 0.5 x gradient 2, unscaled"
    assert torch.equal(weight_d, torch.ones(3)), "the skipped optimiser has not moved"
    assert scaler_g.get_scale() == before
    assert scaler_d.get_scale() == before / 2


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_an_inf_is_skipped_after_explicit_unscaling_too(bad: float) -> None:
    weight, optimizer = make_pair()
    scaler = enabled_scaler()
    scaler.scale((weight * bad).sum()).backward()
    scaler.unscale_(optimizer)
    optimizer_step(scaler, optimizer)
    assert torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize("factor", [2.0, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("unscaled", [False, True])
def test_an_inf_is_found_before_the_step_and_gradients_are_unscaled_once(factor: float, unscaled: bool) -> None:
    weight, optimizer = make_pair()
    scaler = enabled_scaler()
    scaler.scale((weight * factor).sum()).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    for _ in range(2):
        found = find_inf(scaler, optimizer)
        assert found is not None
        assert (found.dtype, found.shape) == (torch.bool, ())
        assert bool(found) is (factor != 2.0)
    if factor == 2.0:
        assert torch.equal(weight.grad, torch.full((3,), 2.0))


def test_without_scaling_nothing_is_looked_for() -> None:
    weight, optimizer = make_pair()
    (weight * float("inf")).sum().backward()
    assert find_inf(NoOpScaler(), optimizer) is None
    optimizer_step(NoOpScaler(), optimizer)


@pytest.mark.parametrize("skip", [False, True])
def test_what_the_caller_has_read_decides_the_step_and_is_not_read_again(
    monkeypatch: pytest.MonkeyPatch, skip: bool
) -> None:
    weight, optimizer = make_pair()
    scaler = enabled_scaler()
    scaler.scale((2 * weight).sum()).backward()
    scaler.unscale_(optimizer)
    monkeypatch.setattr(type(scaler), "step", lambda *_: pytest.fail("read again"))
    optimizer_step(scaler, optimizer, skip)
    assert torch.equal(weight, torch.ones(3) if skip else torch.zeros(3))


def test_the_scale_is_a_tensor_that_follows_the_scaler() -> None:
    scaler = enabled_scaler()
    assert torch.equal(scale_of(scaler, CPU), torch.tensor(scaler.get_scale()))
    weight, optimizer = make_pair()
    scaler.scale((weight * float("inf")).sum()).backward()
    optimizer_step(scaler, optimizer)
    scaler.update()
    assert float(scale_of(scaler, CPU)) == scaler.get_scale() == 2.0**15
    assert float(scale_of(NoOpScaler(), CPU)) == 1.0


def test_a_step_works_again_after_a_skip() -> None:
    weight, optimizer = make_pair()
    scaler = enabled_scaler()
    for factor in (float("inf"), 2.0):
        optimizer.zero_grad(set_to_none=True)
        scaler.scale((weight * factor).sum()).backward()
        optimizer_step(scaler, optimizer)
        scaler.update()
    assert torch.equal(weight, torch.zeros(3))


def test_a_fused_optimiser_skips_by_itself() -> None:
    scaler = enabled_scaler()
    if torch_release() < (2, 4):
        pytest.skip("this torch fuses Adam on CUDA alone")
    weight, optimizer = make_pair(torch.optim.Adam, fused=True)
    scaler.scale((weight * float("inf")).sum()).backward()
    assert skips_by_itself(optimizer)
    optimizer_step(scaler, optimizer)
    assert torch.equal(weight, torch.ones(3))


def test_scale_and_growth_tracker_survive_a_state_dict_round_trip() -> None:
    weight, optimizer = make_pair()
    scaler = enabled_scaler()
    for factor in (float("inf"), 1.0, 1.0, 1.0):
        optimizer.zero_grad(set_to_none=True)
        scaler.scale((weight * factor).sum()).backward()
        optimizer_step(scaler, optimizer)
        scaler.update()
    state = scaler.state_dict()
    assert state["scale"] == 2.0**15
    assert state["_growth_tracker"] == 3

    resumed = enabled_scaler()
    resumed.load_state_dict(state)
    assert resumed.get_scale() == 2.0**15
    assert resumed.state_dict() == state
    optimizer.zero_grad(set_to_none=True)
    resumed.scale(weight.sum()).backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0**15)), "the restored scale is the one that is used"
    optimizer_step(resumed, optimizer)
    resumed.update()
    assert resumed.state_dict()["_growth_tracker"] == 4


def test_only_float16_gets_a_real_scaler() -> None:
    assert Precision("cpu", torch.float16).make_scaler().is_enabled() is hasattr(torch.amp, "GradScaler")
    for dtype in (None, torch.bfloat16):
        assert isinstance(Precision("cpu", dtype).make_scaler(), NoOpScaler)
    assert isinstance(Precision("cpu", torch.float16).make_scaler(enabled=False), NoOpScaler)


def test_the_noop_scaler_steps_always_and_changes_nothing() -> None:
    weight, optimizer = make_pair()
    scaler = NoOpScaler()
    assert isinstance(scaler, Scaler)
    loss = (2 * weight).sum()
    assert scaler.scale(loss) is loss
    loss.backward()
    scaler.unscale_(optimizer)
    optimizer_step(scaler, optimizer)
    scaler.update()
    scaler.load_state_dict({"scale": 4.0})
    assert torch.equal(weight, torch.zeros(3))
    assert scaler.get_scale() == 1.0
    assert scaler.state_dict() == {}
    assert not scaler.is_enabled()


def test_torch_before_2_3_uses_the_cuda_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    made = object()
    monkeypatch.delattr(torch.amp, "GradScaler", raising=False)
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: made)
    assert Precision("cuda", torch.float16).make_scaler() is made


def test_a_build_without_any_scaler_gets_the_noop_and_one_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(torch.amp, "GradScaler", raising=False)
    monkeypatch.delattr(torch.cuda.amp, "GradScaler")
    monkeypatch.delattr(torch.cuda, "amp")
    for _ in range(2):
        assert isinstance(Precision("cuda", torch.float16).make_scaler(), NoOpScaler)
    assert len(caplog.records) == 1
    assert "no gradient scaler" in caplog.messages[0]


def test_the_tier_is_told_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert amp.name_amp_tier() in ("torch.amp", "torch.amp, scaling by torch.cuda.amp")
    monkeypatch.delattr(torch.amp, "GradScaler", raising=False)
    assert amp.name_amp_tier() == "torch.amp, scaling by torch.cuda.amp"
    with monkeypatch.context() as hidden:
        hidden.delattr(torch, "amp")
        assert amp.name_amp_tier() == "torch.cuda.amp"
        hidden.delattr(torch.cuda, "amp")
        assert amp.name_amp_tier() == "none"
    monkeypatch.delattr(torch.cuda, "amp")
    assert amp.name_amp_tier() == "torch.amp without scaling"
