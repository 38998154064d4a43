"""Claims about autocast and gradient scaling with torch.amp, with torch.cuda.amp alone, and with neither."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from graf.runtime import amp
from graf.runtime.amp import (
    NoOpScaler,
    Precision,
    Scaler,
    capture_autocast,
    choose_precision,
    find_inf,
    float32_region,
    optimizer_step,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
#: torch.amp has a scaler, on the CPU too
HAS_SCALER = hasattr(torch.amp, "GradScaler")
TIERS = ("torch.amp", "torch.cuda.amp", "none")

LeaveTier = Callable[[str], None]


@contextmanager
def without_gpu() -> Iterator[None]:
    """torch says that CUDA's autocast or scaler does nothing on a machine without CUDA, and that a name is old."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*CUDA is not available.*")
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.cuda.amp.*")
        yield


def product_dtype() -> torch.dtype:
    return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize("tier", TIERS)
def test_autocast_on_the_cpu_is_torch_amps_or_none(
    leave_tier: LeaveTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tier: str
) -> None:
    monkeypatch.setattr(amp, "has_native_bfloat16", lambda device: True)
    leave_tier(tier)
    for _ in range(2):
        precision = choose_precision(True, "bfloat16", CPU)
    with precision.autocast():
        assert product_dtype() is (torch.bfloat16 if tier == "torch.amp" else torch.float32)
    if tier == "torch.amp":
        assert not caplog.records
    else:
        assert precision == Precision("cpu", None)
        assert caplog.messages == [f"mixed precision is off: torch {torch.__version__} has no autocast for cpu"]


@pytest.mark.parametrize("tier", TIERS)
def test_autocast_on_cuda_is_of_the_first_tier_that_is_there(leave_tier: LeaveTier, tier: str) -> None:
    kinds = {"torch.amp": torch.amp.autocast, "torch.cuda.amp": torch.cuda.amp.autocast, "none": nullcontext}
    leave_tier(tier)
    with without_gpu():
        context = Precision("cuda", torch.float16).autocast()
    assert type(context) is kinds[tier]
    if tier != "none":
        assert (context.device, context.fast_dtype) == ("cuda", torch.float16)  # type: ignore[attr-defined]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("amp_dtype", ["auto", "float16", "bfloat16"])
def test_cuda_runs_in_float32_where_nothing_casts(
    leave_tier: LeaveTier,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tier: str,
    amp_dtype: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    leave_tier(tier)
    for _ in range(2):
        precision = choose_precision(True, amp_dtype, CUDA)  # type: ignore[arg-type]
    if tier == "none":
        assert precision == Precision("cuda", None)
        assert caplog.messages == [f"mixed precision is off: torch {torch.__version__} has no autocast for cuda"]
    else:
        assert precision.dtype in (torch.float16, torch.bfloat16)
        assert not caplog.records


@pytest.mark.parametrize("tier", TIERS)
def test_the_scaler_of_cuda_is_of_the_first_tier_that_is_there(
    leave_tier: LeaveTier, caplog: pytest.LogCaptureFixture, tier: str
) -> None:
    of_cuda = torch.cuda.amp.GradScaler
    kinds = {
        "torch.amp": torch.amp.GradScaler if HAS_SCALER else of_cuda,
        "torch.cuda.amp": of_cuda,
        "none": NoOpScaler,
    }
    leave_tier(tier)
    with without_gpu():
        scalers = [Precision("cuda", torch.float16).make_scaler() for _ in range(2)]
    for scaler in scalers:
        assert type(scaler) is kinds[tier]
        assert isinstance(scaler, Scaler)
    assert len(caplog.records) == (1 if tier == "none" else 0)
    assert "no gradient scaler for cuda" in caplog.text or tier != "none"


@pytest.mark.parametrize("tier", TIERS)
def test_the_scaler_of_the_cpu_is_torch_amps_or_the_no_op(
    leave_tier: LeaveTier, caplog: pytest.LogCaptureFixture, tier: str
) -> None:
    leave_tier(tier)
    scaler = Precision("cpu", torch.float16).make_scaler()
    is_real = HAS_SCALER and tier == "torch.amp"
    assert scaler.is_enabled() is is_real
    assert isinstance(scaler, NoOpScaler) is not is_real
    assert ("no gradient scaler for cpu" in caplog.text) is not is_real


@pytest.mark.parametrize("tier", TIERS)
def test_bfloat16_and_float32_need_no_scaler_and_say_nothing(
    leave_tier: LeaveTier, caplog: pytest.LogCaptureFixture, tier: str
) -> None:
    leave_tier(tier)
    for device_type in ("cuda", "cpu"):
        for dtype in (torch.bfloat16, None):
            assert isinstance(Precision(device_type, dtype).make_scaler(), NoOpScaler)
    assert not caplog.records


@pytest.mark.parametrize("tier", TIERS)
def test_float32_regions_and_captured_states_are_entered_on_every_tier(leave_tier: LeaveTier, tier: str) -> None:
    leave_tier(tier)
    cast = torch.bfloat16 if tier == "torch.amp" else torch.float32
    with Precision("cpu", torch.bfloat16).autocast():
        inside = capture_autocast("cpu")
        with float32_region("cpu"):
            assert product_dtype() is torch.float32
            with inside():
                assert product_dtype() is cast
        assert product_dtype() is cast
    outside = capture_autocast("cpu")
    with Precision("cpu", torch.bfloat16).autocast(), outside():
        assert product_dtype() is torch.float32


def test_a_device_without_autocast_is_left_alone(leave_tier: LeaveTier) -> None:
    for tier in TIERS:
        with pytest.MonkeyPatch.context() as patch:
            if tier != "torch.amp":
                patch.delattr(torch, "amp")
            else:
                patch.setattr(torch.amp, "is_autocast_available", lambda kind: False, raising=False)
            with float32_region("mps"), capture_autocast("mps")():
                assert product_dtype() is torch.float32


@pytest.mark.parametrize("tier", TIERS)
def test_steps_without_casting_are_plain_ones(leave_tier: LeaveTier, tier: str) -> None:
    """The training step's calls, on the tier, against the update that they stand for."""
    leave_tier(tier)
    expected, weight = (torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    plain, optimizer = (torch.optim.Adam([parameter], lr=0.1) for parameter in (expected, weight))
    precision = Precision("cpu", None)
    scaler = precision.make_scaler()
    for _ in range(3):
        plain.zero_grad(set_to_none=True)
        (expected**2).sum().backward()
        plain.step()
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast(), float32_region("cpu"):
            loss = (weight**2).sum()
        scaler.scale(loss).backward()
        assert find_inf(scaler, optimizer) is None
        optimizer_step(scaler, optimizer)
        scaler.update()
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("home", ["torch.amp", "torch.cuda.amp"])
def test_the_record_of_infinities_is_where_it_is_looked_for(home: str) -> None:
    """find_inf reads it; torch has no public reader."""
    module = torch.amp if home == "torch.amp" else torch.cuda.amp
    if not hasattr(module, "GradScaler"):
        pytest.skip("torch.amp has a scaler since torch 2.3")
    assert callable(module.GradScaler._found_inf_per_device)


# --- needs a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_steps_on_cuda_scale_unscale_and_skip_on_every_tier(leave_tier: LeaveTier, tier: str) -> None:
    leave_tier(tier)
    weight = torch.nn.Parameter(torch.ones(4, 4, device=CUDA))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    precision = choose_precision(True, "float16", CUDA)
    scaler = precision.make_scaler()
    assert precision.dtype is (None if tier == "none" else torch.float16)
    assert scaler.is_enabled() is (tier != "none")
    with precision.autocast():
        product = weight @ torch.ones(4, 4, device=CUDA)
    assert product.dtype is (torch.float32 if tier == "none" else torch.float16)
    scaler.scale(product.float().sum()).backward()
    optimizer_step(scaler, optimizer)
    scaler.update()
    assert torch.equal(weight, torch.full_like(weight, -1.0)), "1 - lr 0.5 x gradient 4, unscaled"
    if tier == "none":
        return
    before = scaler.get_scale()
    optimizer.zero_grad(set_to_none=True)
    scaler.scale((weight * float("inf")).sum()).backward()
    optimizer_step(scaler, optimizer)
    scaler.update()
    assert torch.equal(weight, torch.full_like(weight, -1.0))
    assert scaler.get_scale() == before / 2
