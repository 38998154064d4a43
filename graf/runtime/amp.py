"""Mixed precision: which dtype autocast uses on a device and how gradients are scaled; the only place naming torch.amp.

float16 has 5 exponent bits, so its gradients underflow without a scaler; bfloat16 has float32's range and needs none.
Use one scaler per optimiser: an inf in one must not shrink the other's scale.

Autocast and scaler are torch.amp's, else torch.cuda.amp's, else none: the three tiers of docs/compatibility.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal, Protocol, TypeVar, cast, runtime_checkable

import torch

from graf.runtime.device import read_processor
from graf.runtime.logs import warn_once

Outputs = TypeVar("Outputs")
#: matrices by which dtypes are compared, large enough to be computed at full rate, and how often
_SIDE, _PAIRS = 512, 9


@runtime_checkable
class Scaler(Protocol):
    """What the training step uses of `torch.amp.GradScaler`."""

    def scale(self, outputs: Any) -> Any: ...
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None: ...
    def step(self, optimizer: torch.optim.Optimizer) -> float | None: ...
    def update(self) -> None: ...
    def get_scale(self) -> float: ...
    def is_enabled(self) -> bool: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class NoOpScaler:
    """A scaler of scale 1 that never skips a step, so that the training step needs no `if use_amp`."""

    def scale(self, outputs: Outputs) -> Outputs:
        return outputs

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are not scaled."""

    def step(self, optimizer: torch.optim.Optimizer) -> float | None:
        return optimizer.step()

    def update(self) -> None:
        """The scale stays 1."""

    def get_scale(self) -> float:
        return 1.0

    def is_enabled(self) -> bool:
        return False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """A scale of 1 is right whatever the scale was: there is nothing to restore."""


@dataclass(frozen=True)
class Precision:
    """How forward passes are computed: autocast to `dtype` on `device_type`, or float32 where `dtype` is None."""

    device_type: str
    dtype: torch.dtype | None

    def autocast(self) -> AbstractContextManager[Any]:
        """A fresh context under which matrix products and convolutions run in `dtype`; a null context when off."""
        return nullcontext() if self.dtype is None else _autocast(self.device_type, dtype=self.dtype)

    def make_scaler(self, enabled: bool | None = None) -> Scaler:
        """A gradient scaler for one optimiser: real for float16, else a no-op; `enabled` overrides that choice."""
        if not (self.dtype is torch.float16 if enabled is None else enabled):
            return NoOpScaler()
        if hasattr(_torch_amp(), "GradScaler"):  # torch 2.3
            return cast(Scaler, torch.amp.GradScaler(self.device_type))
        if self.device_type == "cuda" and hasattr(torch.cuda, "amp"):
            return cast(Scaler, torch.cuda.amp.GradScaler())
        warn_once(
            f"torch {torch.__version__} has no gradient scaler for {self.device_type}: gradients are not scaled and "
            "small ones may vanish; update torch or use amp_dtype bfloat16"
        )
        return NoOpScaler()

    def describe(self) -> str:
        """One phrase for the log."""
        if self.dtype is None:
            return "float32"
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} autocast with gradient scaling" if self.dtype is torch.float16 else f"{name} autocast"


def choose_precision(
    use_amp: bool, amp_dtype: Literal["auto", "float16", "bfloat16"], device: torch.device
) -> Precision:
    """The precision to run with; a difference from the request is reported once.

    CUDA: bfloat16 where native, which needs no scaler, else float16; where one is asked for, that one, if it is there.
    CPU: bfloat16 where the processor computes it natively and, unless it is asked for by name, faster than float32,
    which a short measurement tells; else float32; never float16, which is 4x slower there. Other devices: float32.
    """
    if amp_dtype not in ("auto", "float16", "bfloat16"):
        raise ValueError(f"amp_dtype={amp_dtype!r}: expected auto, float16 or bfloat16")
    if not use_amp:
        return Precision(device.type, None)
    if device.type in ("cuda", "cpu") and not _has_autocast(device.type):
        warn_once(f"mixed precision is off: torch {torch.__version__} has no autocast for {device.type}")
        return Precision(device.type, None)
    if device.type == "cuda":
        return Precision("cuda", _choose_cuda_dtype(amp_dtype, device))
    if device.type == "cpu":
        return Precision("cpu", _choose_cpu_dtype(amp_dtype))
    warn_once(f"mixed precision is off: {device.type} runs in float32")
    return Precision(device.type, None)


def _choose_cuda_dtype(amp_dtype: str, device: torch.device) -> torch.dtype:
    if amp_dtype == "float16":
        return torch.float16
    if has_native_bfloat16(device):
        return torch.bfloat16
    if amp_dtype == "bfloat16":
        warn_once(f"amp_dtype=bfloat16: {torch.cuda.get_device_name(device)} has no native bfloat16; float16 is used")
    return torch.float16


def _choose_cpu_dtype(amp_dtype: str) -> torch.dtype | None:
    if not has_native_bfloat16(torch.device("cpu")):
        warn_once(
            "mixed precision is off: this processor has no native bfloat16 (AVX512-BF16 or AMX), and emulating it is "
            "slower than float32"
        )
        return None
    if amp_dtype == "float16":
        warn_once("amp_dtype=float16: on the CPU it is slower than float32; bfloat16 is used where it gains")
    if amp_dtype != "bfloat16" and (gain := measure_bfloat16_gain()) < 1:
        warn_once(
            f"mixed precision is off: this processor multiplies bfloat16 at {gain:.3f} of its rate in float32; "
            "training.amp_dtype=bfloat16 takes it all the same, to save memory"
        )
        return None
    return torch.bfloat16


@cache
def measure_bfloat16_gain() -> float:
    """How many times as fast as in float32 this CPU multiplies matrices in bfloat16, measured in some milliseconds.

    With AVX512-BF16 it is 2 on AMD's Zen 4 and a half on Intel's where a virtual machine hides AMX, so that no flag
    tells. The median of pairs of products: nothing that slows a machine for a while decides.
    """
    factors = [torch.ones(_SIDE, _SIDE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    ratios = []
    for _ in range(1 + _PAIRS):
        single, half = (_time_product(factor) for factor in factors)
        ratios.append(single / half)
    return statistics.median(ratios[1:])  # the first pair starts threads and makes kernels


def _time_product(factor: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mm(factor, factor)
    return time.perf_counter() - started


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware: on a CPU AVX512-BF16 or AMX, on CUDA capability 8 (Ampere).

    Of a CPU it asks torch where that can tell, else Linux; where neither knows the answer is no, which only costs
    speed. MPS is not asked: nothing is computed in half precision there.
    """
    if device.type == "cuda":
        # is_bf16_supported() also counts emulation, which is slower than float32
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        found = capabilities()
        return bool(found.get("avx512_bf16", False) or found.get("amx_bf16", False))
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(read_processor("flags").split())


def name_amp_tier() -> str:
    """Which of torch's modules autocast and scaling come from, or "none"."""
    has_amp, has_scaler = hasattr(torch, "amp"), hasattr(getattr(torch, "amp", None), "GradScaler")
    if has_scaler or not hasattr(torch.cuda, "amp"):
        return ("torch.amp" if has_scaler else "torch.amp without scaling") if has_amp else "none"
    return "torch.amp, scaling by torch.cuda.amp" if has_amp else "torch.cuda.amp"


def float32_region(device_type: str) -> AbstractContextManager[Any]:
    """A context in which autocast is off, for R1, compositing and losses; its inputs still need `.float()`."""
    return _autocast(device_type, enabled=False)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in float64 where it has that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def capture_autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast state of this moment on a device type, as a factory of contexts that enter it again later."""
    if not _has_autocast(device_type):
        return nullcontext
    dtype = _current_autocast(device_type)
    return lambda: float32_region(device_type) if dtype is None else _autocast(device_type, dtype=dtype)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a product with x would be computed at this moment: autocast's where it is on, else x's own."""
    dtype = _current_autocast(x.device.type) if x.dtype is torch.float32 else None
    return x.dtype if dtype is None else dtype


def _current_autocast(device_type: str) -> torch.dtype | None:
    """Autocast's dtype on a device type, None where it is off."""
    if not _has_autocast(device_type):  # torch refuses to say
        return None
    if hasattr(torch, "get_autocast_dtype"):  # torch >= 2.4
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    if device_type == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def _torch_amp() -> ModuleType | None:
    """torch.amp, which not every build of torch has."""
    return getattr(torch, "amp", None)


def _has_autocast(device_type: str) -> bool:
    if _torch_amp() is None:
        return device_type == "cuda" and hasattr(torch.cuda, "amp")
    if device_type in ("cuda", "cpu"):  # always; and torch.export of 2.6 cannot trace the question
        return True
    is_available = getattr(torch.amp, "is_autocast_available", lambda kind: False)  # torch >= 2.4
    return bool(is_available(device_type))


def _autocast(device_type: str, **choices: Any) -> AbstractContextManager[Any]:
    """torch.amp's autocast, else torch.cuda.amp's; a null context, in which all is float32, where there is neither."""
    if not _has_autocast(device_type):
        return nullcontext()
    if _torch_amp() is None:
        return torch.cuda.amp.autocast(**choices)
    return torch.amp.autocast(device_type, **choices)


def find_inf(scaler: Scaler, optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
    """Whether unscaling met an inf or NaN gradient, as a bool on the device; None where gradients are not scaled.

    Unscales the gradients if that has not been done.
    """
    records = _found_infs(scaler, optimizer)
    if not records:
        return None
    first, *others = records
    return sum((value.to(first.device) for value in others), first).squeeze() > 0


def _found_infs(scaler: Scaler, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What unscaling has met, one number for each device; empty without scaling. There has to be a gradient."""
    if not scaler.is_enabled():
        return []
    # Torch records found_inf per optimiser and has no public reader for it; the name is the same since torch 1.6.
    if not cast(Any, scaler)._found_inf_per_device(optimizer):
        scaler.unscale_(optimizer)
    return list(cast(Any, scaler)._found_inf_per_device(optimizer).values())


def optimizer_step(scaler: Scaler, optimizer: torch.optim.Optimizer, skip: bool | None = None) -> None:
    """Step `optimizer` unless a gradient is inf or NaN under an enabled scaler.

    skip: what :func:`find_inf` found, where the caller has read it. Else a GPU is waited for, unless the optimiser
    :func:`skips_by_itself`. Does not call `update()`: that happens once per scaler at the end of the step.
    """
    if skip is None and _found_infs(scaler, optimizer):
        scaler.step(optimizer)
    elif not skip:
        optimizer.step()


def skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser leaves out a step on the device where the scaler has found an inf: fused Adam does."""
    # torch's own mark of such optimisers, by which GradScaler decides whether to wait; the same name since torch 1.13
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def scale_of(scaler: Scaler, device: torch.device) -> torch.Tensor:
    """The loss scale as a tensor on `device`, without waiting for it as `get_scale` does."""
    scale: torch.Tensor = scaler.scale(torch.ones((), device=device))
    return scale
