"""Tensors without data, and the bytes that they would hold: what memory_estimator.py rehearses a step on.

What an operation returns is asked of torch's meta tensors, which know it without data; that takes a tenth of a
millisecond or more. A step repeats few operations on few shapes, so the answers are kept, and repeated in less. (torch
has tensors of this kind, FakeTensorMode's, but they belong to its compiler, which takes a second to import.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from graf.base.errors import UserError
from graf.runtime.live_tensors import LiveTensorMeter

CPU = torch.device("cpu")
#: tensors up to this many elements are real
CONTROL_ELEMENTS = 4096

aten = torch.ops.aten


class PredictionError(UserError):
    """This torch cannot tell what a step's tensors would be without data, so that no memory can be predicted."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"memory cannot be predicted: torch {torch.__version__} {reason}; use another version of torch, or set "
            "training.micro_batch_size, memory_strategy and chunk yourself"
        )


class FakeTensor(Tensor):
    """A layout without data, which says that it is on the CPU; asked for its value it says yes, or 1.

    Only a FakeTensorMeter knows what operations on it return. made: a meta tensor, whose storage becomes its own.
    """

    device = CPU  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, made: Tensor) -> FakeTensor:
        fake: FakeTensor = Tensor._make_subclass(  # type: ignore[attr-defined]
            cls, made, made.requires_grad, dispatch_device=True, device_for_backend_keys=CPU
        )
        return fake

    @classmethod
    def like(cls, tensor: Tensor) -> FakeTensor:
        """One of the same layout as a tensor."""
        return cls(_make_twin([], tensor))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # asked from within torch
            return CPU
        raise RuntimeError(f"{func} of a tensor without data, outside of a FakeTensorMeter")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FakeTensor({tuple(self.shape)}, dtype={self.dtype})"

    def tolist(self) -> Any:
        """Yes, or 1, in every place."""
        answer: Any = True if self.dtype is torch.bool else 1
        for side in reversed(self.shape):
            answer = [answer] * side
        return answer


@contextmanager
def build_fake() -> Iterator[None]:
    """Networks and optimisers that are made inside consist of fake tensors."""
    with FakeTensorMeter(control_elements=0):
        yield


class FakeTensorMeter(LiveTensorMeter):
    """Computes tensors of up to so many elements and makes larger ones fake."""

    def __init__(self, control_elements: int = CONTROL_ELEMENTS) -> None:
        super().__init__()
        try:
            FakeTensor(torch.empty(0, device="meta"))
        except (AttributeError, TypeError, RuntimeError) as error:  # private: a release of torch may change it
            raise PredictionError("has no tensors without data where they are looked for") from error
        self.control_elements = control_elements
        self._answers: dict[Any, _Answer] = {}
        self._fakes_of_real = WeakTensorKeyDictionary()

    def compute(self, func: Any, types: Sequence[type], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What an operation returns."""
        if FakeTensor in types:
            if func is torch.ops.prim.device.default:
                return CPU
            if func is aten._local_scalar_dense.default:
                return True if args[0].dtype is torch.bool else 1
            if _works_in_place(func):
                return args[0] if func._schema.returns else None  # nothing to fill
        elif not self._is_large(func, args) or _is_meta(args, kwargs):
            return func(*args, **kwargs)
        return self._answer(func, args, kwargs)

    def _answer(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What a call returns, from the answer to an equal one where there is any."""
        tensors: list[Tensor] = []
        question = func, _describe(args, tensors), _describe(tuple(kwargs.items()), tensors)
        try:
            known = self._answers.get(question)
        except TypeError:  # something in it cannot be compared
            known = question = None  # type: ignore[assignment]
        if known is None:
            known = _ask(func, args, kwargs)
            if question is not None:
                self._answers[question] = known
        return known.repeat(tensors, self._fake)

    def _fake(self, tensor: Tensor) -> Tensor:
        """A tensor itself if it is fake, else the fake one in place of it: always the same."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor not in self._fakes_of_real:
            self._fakes_of_real[tensor] = FakeTensor.like(tensor)
        fake: Tensor = self._fakes_of_real[tensor]
        return fake

    def _is_large(self, func: Any, args: Any) -> bool:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if tensors:
            return max(tensor.numel() for tensor in tensors) > self.control_elements
        shape = args[0] if args and isinstance(args[0], (list, tuple, torch.Size)) else ()
        return all(isinstance(side, int) for side in shape) and math.prod(shape) > self.control_elements


def _describe(value: Any, tensors: list[Tensor]) -> Any:
    """Everything of an argument that decides what an operation returns; tensors are appended to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return type(value), value.shape, value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple([_describe(item, tensors) for item in value])
    return type(value), value  # 1, 1.0 and True are equal


@dataclass(frozen=True)
class _FakeOutput:
    """One tensor that an operation returns: its argument number `source` itself, a view of it, or (None) a new tensor.

    The outputs before it count among the arguments. elements: of a new one's storage.
    """

    source: int | None
    is_source: bool
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    elements: int

    def repeat(self, tensors: Sequence[Tensor], fake: Callable[[Tensor], Tensor]) -> Tensor:
        """The same of other arguments; fake: what stands for one of them."""
        if self.source is None:
            whole = torch.empty(self.elements, dtype=self.dtype, device="meta")
        else:
            source = fake(tensors[self.source])
            if self.is_source:
                return source
            whole = torch.empty(0, dtype=self.dtype, device="meta").set_(source.untyped_storage())
        return FakeTensor(whole.as_strided(self.shape, self.stride, self.offset))  # set_ alone cuts the storage in 2.1


@dataclass(frozen=True)
class _Answer:
    """What an operation returns: tensors and other values, in a sequence of some kind or (None) one alone."""

    kind: type | None
    outputs: tuple[Any, ...]

    def repeat(self, tensors: Sequence[Tensor], fake: Callable[[Tensor], Tensor]) -> Any:
        """The same of other arguments."""
        found: list[Any] = []
        for output in self.outputs:
            found.append(output.repeat([*tensors, *found], fake) if isinstance(output, _FakeOutput) else output)
        return found[0] if self.kind is None else self.kind(found)


def _ask(func: Any, args: Any, kwargs: Mapping[str, Any]) -> _Answer:
    """What a call returns, from meta tensors of the same layouts as its own."""
    twins: list[Tensor] = []
    own_args, own_kwargs = tree_map_only(Tensor, partial(_make_twin, twins), (args, dict(kwargs)))
    if "device" in own_kwargs:
        own_kwargs["device"] = torch.device("meta")
    before = [_describe(twin, []) for twin in twins]
    try:
        rule = _RULES.get(str(func))
        outputs = NotImplemented if rule is None else rule(*own_args, **own_kwargs)
        if outputs is NotImplemented:
            outputs = func(*own_args, **own_kwargs)
    except Exception as error:
        reason = str(error).split(". ")[0]  # torch goes on with all that it has
        raise PredictionError(f"does not tell what {func} returns without data ({reason})") from error
    if before != [_describe(twin, []) for twin in twins]:
        raise PredictionError(f"changes the layout of a tensor in {func}")
    kind = type(outputs) if isinstance(outputs, (tuple, list)) else None
    found = [outputs] if kind is None else outputs
    read = [_read_output(output, [*twins, *found[:number]]) for number, output in enumerate(found)]
    return _Answer(kind, tuple(read))


def _make_twin(twins: list[Tensor], tensor: Tensor) -> Tensor:
    """A tensor without data of the same layout, with a storage of its own; appended to `twins`."""
    shape, stride, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
    twin = torch.empty(offset + _reach(tensor), dtype=tensor.dtype, device="meta").as_strided(shape, stride, offset)
    twins.append(twin)
    return twin


def _read_output(output: Any, values: Sequence[Any]) -> Any:
    """How to make an output again from the arguments and the outputs before it; what is no tensor stays as it is."""
    if not isinstance(output, Tensor):
        return output
    same = [number for number, value in enumerate(values) if value is output]
    shared = [number for number, value in enumerate(values) if isinstance(value, Tensor) and _share(value, output)]
    source = next(iter(same or shared), None)
    elements, offset = output.untyped_storage().nbytes() // output.element_size(), int(output.storage_offset())
    return _FakeOutput(source, bool(same), output.shape, output.stride(), offset, output.dtype, elements)


def _share(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have one storage."""
    return first.untyped_storage()._cdata == second.untyped_storage()._cdata


def _reach(tensor: Tensor) -> int:
    """Elements from the first to the last of a tensor."""
    steps = sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True))
    return 1 + steps if tensor.numel() else 0


def _works_in_place(func: Any) -> bool:
    """Whether an operation fills its first argument, or the tensors in it, and leaves their layouts as they are."""
    is_named_so = func._schema.name.endswith("_") and func._schema.is_mutable  # __and__ is not
    return is_named_so and torch.Tag.inplace_view not in func.tags


def _is_meta(args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation is on tensors that are without data by themselves."""
    return str(kwargs.get("device")) == "meta" or any(isinstance(arg, Tensor) and arg.is_meta for arg in args)


# ---------------------------------------------------------------------------------------- what meta tensors do not know


def _resample(images: Tensor, size: Sequence[int]) -> Tensor:
    return images.new_empty((*images.shape[:2], *size))


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    if transposed:
        return NotImplemented
    lasts = (x.shape[2:], weight.shape[2:], stride, padding, dilation)
    sides = [
        (side + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for side, kernel, step, pad, spread in zip(*lasts, strict=True)
    ]
    return x.new_empty((len(x), len(weight), *sides)).contiguous(memory_format=_layout_of_convolution(x, weight))


def _convolve_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, *more: Any
) -> tuple[Tensor | None, ...]:
    output_mask = more[-1]
    layout, (needs_x, needs_weight, needs_bias) = _layout_of_convolution(x, weight), output_mask
    return (
        x.new_empty(x.shape).contiguous(memory_format=layout) if needs_x else None,
        weight.new_empty(weight.shape).contiguous(memory_format=layout) if needs_weight else None,
        gradient.new_empty(list(bias_sizes or [gradient.shape[1]])) if needs_bias else None,
    )


def _layout_of_convolution(x: Tensor, weight: Tensor) -> torch.memory_format:
    """channels_last where one of both is, as the libraries of CPUs and GPUs have it."""
    some = any(_is_channels_last(tensor) for tensor in (x, weight))
    return torch.channels_last if some else torch.contiguous_format


def _is_channels_last(images: Tensor) -> bool:
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def _sum_bags(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:
    """As a CPU sums, which notes the bag of every index in float64 alone."""
    if mode != 0:  # a mean or a maximum
        return NotImplemented
    bags = len(offsets) - include_last_offset
    with_bags = len(indices) if weight.dtype is torch.float64 else 0
    sums = weight.new_empty(bags, weight.shape[1])
    return sums, offsets.new_empty(with_bags), offsets.new_empty(len(offsets)), offsets.new_empty(bags)


#: What operations return, by name. Results of some are laid out as a device's library wants them, which meta tensors do
#: not know; others meta tensors take apart, which lasts as long as a hundred operations, or do not have in torch 2.1.
_RULES: dict[str, Callable[..., Any]] = {
    "aten.convolution.default": _convolve,
    "aten.convolution_backward.default": _convolve_backward,
    "aten._embedding_bag_forward_only.default": _sum_bags,
    "aten._foreach_norm.Scalar": lambda tensors, *_: [tensor.new_empty(()) for tensor in tensors],
    "aten.grid_sampler_2d.default": lambda images, grid, *_: _resample(images, grid.shape[1:3]),
    "aten.upsample_bilinear2d.default": lambda images, size, *_: _resample(images, size),
    "aten.upsample_bicubic2d.default": lambda images, size, *_: _resample(images, size),
    "mkldnn._reorder_linear_weight.default": lambda weight, *_: weight.new_empty(weight.shape),
}
