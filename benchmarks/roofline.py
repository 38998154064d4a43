"""What a machine can do at most, what a step asks of it, and how near the step comes: the roofline of Williams et al.
(CACM 2009).

Arithmetic is counted by torch's formulas for matrix products and convolutions; nothing but an algorithm changes it.
Traffic is what operators read and write, as if none found anything in a cache: the estimator of memory knows what
lives, not what is moved. So arithmetic at peak is a bound on a step's time; traffic at bandwidth is one as far as
operators stay as they are and their tensors outgrow the caches.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from graf.runtime.amp import has_native_bfloat16
from graf.runtime.device import wait_for

SIDE = 2048
#: bytes that are copied to measure bandwidth, beyond any cache
COPIED = 256 * 2**20
#: calls that a GPU is given before anybody waits for it
QUEUED = 50


def _count_linear(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


#: torch's formulas, under the name that they had before 2.2 too, and one for oneDNN's fused layer
_FORMULAS: Mapping[Any, Callable[..., int]] = {
    **(getattr(flop_counter, "flop_registry", None) or vars(flop_counter)["flop_mapping"]),
    getattr(torch.ops.mkldnn, "_linear_pointwise", None): _count_linear,
}
_WRITE_ONLY = {torch.ops.aten.copy_, torch.ops.aten.fill_, torch.ops.aten.zero_, torch.ops.aten.normal_}
_ALLOCATIONS = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}


@dataclass(frozen=True)
class Limits:
    """Peaks of a device: operations/s of matrix products by name of dtype, and bytes/s of a copy, reads and writes."""

    products: dict[str, float]
    bandwidth: float

    def seconds_of_arithmetic(self, operations: Mapping[str, float]) -> float:
        """How long operations by dtype take at peak; a dtype that has not been measured counts as float32."""
        return sum(count / self.products.get(name, self.products["float32"]) for name, count in operations.items())

    def seconds_of_traffic(self, traffic: float) -> float:
        """How long bytes take at the bandwidth of a copy."""
        return traffic / self.bandwidth


class LimitsMeter:
    """Measures :class:`Limits`, a little in each call, so that what slows a machine slows them as it does a step.

    float32 as the program multiplies it, which on CUDA is TF32; bfloat16 where it is native. On a GPU many at once, as
    launching one takes longer than the product.
    """

    def __init__(self, device: torch.device, side: int = SIDE, copied: int = COPIED) -> None:
        self.device = device
        dtypes = [torch.float32, *([torch.bfloat16] if has_native_bfloat16(device) else [])]
        self._factors = {dtype: torch.randn(side, side, device=device).to(dtype) for dtype in dtypes}
        self._source = torch.zeros(copied // 4, device=device)
        self._target = torch.empty_like(self._source)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._side, self._copied = side, copied

    def measure(self) -> None:
        """One product of each dtype and one copy, on a GPU QUEUED of them."""
        for dtype, factor in self._factors.items():
            self._time(_name(dtype), lambda factor=factor: factor @ factor)  # type: ignore[misc]
        self._time("copy", lambda: self._target.copy_(self._source))

    def limits(self) -> Limits:
        """From the medians of all measurements so far."""
        rates = {
            name: 2.0 * self._side**3 / statistics.median(self._seconds[name]) for name in map(_name, self._factors)
        }
        return Limits(rates, 2.0 * self._copied / statistics.median(self._seconds["copy"]))

    def _time(self, name: str, call: Callable[[], Any]) -> None:
        if name not in self._seconds:  # the first one starts libraries and threads
            call()
        count = 1 if self.device.type == "cpu" else QUEUED
        wait_for(self.device)
        started = time.perf_counter()
        for _ in range(count):
            call()
        wait_for(self.device)
        self._seconds[name].append((time.perf_counter() - started) / count)


class WorkMeter(TorchDispatchMode):
    """Counts the work of operators inside, in backward passes too.

    operations: floating-point ones of matrix products and convolutions, by name of dtype; traffic: bytes that operators
    read and write, each number of an expanded tensor once; calls: of operators that move any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[str, float] = defaultdict(float)
        self.traffic = 0.0
        self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet = function._overloadpacket
        formula = _FORMULAS.get(packet)
        if formula is not None:
            shapes = tree_map(flop_counter.get_shape, (args, kwargs, result))
            operations = inspect.unwrap(formula)(*shapes[0], **shapes[1], out_shape=shapes[2])
            self.operations[_name(_tensors_in(args)[0].dtype)] += operations
        moved = _count_traffic(function, args, kwargs, result)
        self.traffic += moved
        self.calls += moved > 0
        return result


def _count_traffic(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that an operator reads and writes; none where it makes a view or only finds room."""
    packet, arguments = function._overloadpacket, function._schema.arguments
    given = [
        *zip(arguments, args, strict=False),
        *((item, kwargs[item.name]) for item in arguments if item.name in kwargs),
    ]
    changed = [value for item, value in given if item.alias_info is not None and item.alias_info.is_write]
    known = {_storage(tensor) for tensor in _tensors_in((args, kwargs))}
    made = [tensor for tensor in _tensors_in(result) if _storage(tensor) not in known]
    written = [*_tensors_in(changed), *made]
    if packet in _ALLOCATIONS or not written:
        return 0
    read = _tensors_in((args[1:] if packet in _WRITE_ONLY else args, kwargs))
    return sum(map(count_bytes, [*read, *written]))


def count_bytes(tensor: Tensor) -> int:
    """Bytes of the numbers that a tensor refers to, each once."""
    if tensor.layout is not torch.strided:
        return tensor.numel() * tensor.element_size()
    sides = [side for side, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sides) * tensor.element_size() if tensor.numel() else 0


def _tensors_in(values: Any) -> list[Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]


def _storage(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided:  # packed by a library for itself
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
