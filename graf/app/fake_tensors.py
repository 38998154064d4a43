"""Tensors without data, and the bytes that they would hold: what memory_estimator.py rehearses a step on.

What an operation returns is asked of torch's meta tensors, which know it without data, and of FakeTensorMode where
these do not; that takes a fifth of a millisecond or more. A step repeats few operations on few shapes, so the answers
are kept, and repeated in less.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from graf.base.errors import UserError
from graf.runtime.live_tensors import LiveTensorMeter

try:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
except ImportError:  # private: a release of torch may move it, and then nothing else is lost
    FakeTensor = FakeTensorMode = None  # type: ignore[assignment, misc]

CPU = torch.device("cpu")
#: tensors up to this many elements are real
CONTROL_ELEMENTS = 4096
#: operations that FakeTensorMode takes apart, which lasts as long as a hundred others, and the shapes that they return
RESAMPLING: dict[Any, Callable[..., tuple[int, ...]]] = {
    torch.ops.aten.grid_sampler_2d.default: lambda images, grid, *_: (*images.shape[:2], *grid.shape[1:3]),
    torch.ops.aten.upsample_bilinear2d.default: lambda images, size, *_: (*images.shape[:2], *size),
    torch.ops.aten.upsample_bicubic2d.default: lambda images, size, *_: (*images.shape[:2], *size),
}

#: operations whose results, or their places in memory, are as the device's library wants them, which FakeTensorMode
#: finds out
BY_DEVICE = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
    torch.ops.aten._embedding_bag.default,
    torch.ops.aten._embedding_bag_forward_only.default,
}


class PredictionError(UserError):
    """This torch has no tensors without data where they are looked for, so that no memory can be predicted."""


class FakeTensorModes:
    """The modes of one prediction: `building` makes networks, `running` runs code on them under the meter."""

    def __init__(self) -> None:
        if FakeTensorMode is None:
            raise PredictionError(
                f"memory cannot be predicted: torch {torch.__version__} has no torch._subclasses.fake_tensor; use "
                "another version of torch, or set training.micro_batch_size, memory_strategy and chunk yourself"
            )
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.fake_mode.cache_enabled = False  # finding an answer there takes as long as a new one
        self.meter = FakeTensorMeter(self.fake_mode)

    @contextmanager
    def building(self) -> Iterator[None]:
        with self.fake_mode, warnings.catch_warnings():
            # copy.deepcopy asks a fake parameter for its address, is told 0, and then clones it: as it should be
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield

    @contextmanager
    def running(self) -> Iterator[FakeTensorMeter]:
        with _fake_lists(), self.meter:
            yield self.meter


class FakeTensorMeter(LiveTensorMeter):
    """Computes small tensors and makes large ones fake; asked for its value, a fake one says yes, or 1."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()
        self.fake_mode = fake_mode
        self._answers: dict[Any, _Answer | None] = {}

    def compute(self, func: Any, types: Sequence[type], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What an operation returns."""
        if FakeTensor in types:
            if func is torch.ops.prim.device.default:
                return args[0].fake_device
            if func is torch.ops.aten._local_scalar_dense.default:
                return True if args[0].dtype is torch.bool else 1
            if kwargs.get("generator") is not None:  # filled in place with random numbers: nothing to do
                return args[0]
        elif not _is_large(func, args) or _is_meta(args, kwargs):
            return func(*args, **kwargs)
        return self._answer(func, args, kwargs)

    def _answer(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What a call returns, from the answer to an equal one where there is any."""
        tensors: list[Tensor] = []
        question = func, _describe(args, tensors), _describe(tuple(kwargs.items()), tensors)
        try:
            known = self._answers.get(question, _UNKNOWN)
        except TypeError:  # something in it cannot be compared
            return self._ask(func, args, kwargs)
        if known is _UNKNOWN:
            known = self._answers[question] = _ask_meta(func, args, kwargs, tensors)
            if known is None:
                outputs = self._ask(func, args, kwargs)
                unchanged = question[1:] == (_describe(args, []), _describe(tuple(kwargs.items()), []))
                self._answers[question] = _read_answer(outputs, tensors) if unchanged else None
                return outputs
        return self._ask(func, args, kwargs) if known is None else known.repeat(tensors, self.fake_mode)

    def _ask(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        if func in RESAMPLING:
            return args[0].new_empty(RESAMPLING[func](*args))
        with self.fake_mode:
            outputs = func(*args, **kwargs)
        works_in_place = func._schema.name.endswith("_") and isinstance(outputs, Tensor)
        return args[0] if works_in_place else outputs  # where it is decomposed, a new tensor comes back


#: in place of an answer: the question has not been asked
_UNKNOWN: Any = object()


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
    """One tensor that an operation returns: its argument number `source` itself, a view of it, or a new tensor."""

    source: int | None
    is_source: bool
    shape: torch.Size
    stride: tuple[int, ...]
    offset: Any
    dtype: torch.dtype

    def repeat(self, tensors: Sequence[Tensor], fake_mode: FakeTensorMode) -> Tensor:
        """The same of other arguments."""
        if self.source is None:
            made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        elif self.is_source:
            return tensors[self.source]
        else:
            whole = torch.empty(0, dtype=self.dtype, device="meta").set_(tensors[self.source].untyped_storage())
            made = whole.as_strided(self.shape, self.stride, self.offset)  # set_ alone cuts the storage in torch 2.1
        return FakeTensor(fake_mode, made, CPU)


@dataclass(frozen=True)
class _Answer:
    """What an operation returns: nothing, tensors and missing ones in a sequence of some kind, or (None) a tensor."""

    kind: type | None
    outputs: tuple[_FakeOutput | None, ...]

    def repeat(self, tensors: Sequence[Tensor], fake_mode: FakeTensorMode) -> Any:
        """The same of other arguments."""
        found = [None if output is None else output.repeat(tensors, fake_mode) for output in self.outputs]
        return found[0] if self.kind is None else self.kind(found)


def _ask_meta(func: Any, args: Any, kwargs: Mapping[str, Any], tensors: Sequence[Tensor]) -> _Answer | None:
    """What meta tensors of the same kinds as `tensors` tell of a call; None where they tell nothing, or not enough."""
    if func in BY_DEVICE or func in RESAMPLING:
        return None
    twins: list[Tensor] = []
    own_args, own_kwargs = tree_map_only(Tensor, partial(_make_twin, twins), (args, dict(kwargs)))
    if "device" in own_kwargs:
        own_kwargs["device"] = torch.device("meta")
    before = [_describe(twin, []) for twin in twins]
    try:
        outputs = func(*own_args, **own_kwargs)
    except Exception:  # whatever a release of torch says of it, FakeTensorMode is asked next
        return None
    if before != [_describe(twin, []) for twin in twins]:
        return None
    answer = _read_answer(outputs, twins)
    shared = [] if answer is None else [output.source for output in answer.outputs if output is not None]
    # what shares the memory of a real tensor is fake by itself
    return answer if all(source is None or isinstance(tensors[source], FakeTensor) for source in shared) else None


def _make_twin(twins: list[Tensor], tensor: Tensor) -> Tensor:
    """A tensor without data of the same layout, with a storage of its own; appended to `twins`."""
    shape, stride, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
    twin = torch.empty(offset + _reach(tensor), dtype=tensor.dtype, device="meta").as_strided(shape, stride, offset)
    twins.append(twin)
    return twin


def _read_answer(outputs: Any, tensors: Sequence[Tensor]) -> _Answer | None:
    """What can be repeated of the outputs of an operation on `tensors`; None where something cannot."""
    kind = type(outputs) if isinstance(outputs, (tuple, list)) else None
    found = [outputs] if kind is None else outputs
    if any(output is not None and not isinstance(output, Tensor) for output in found):
        return None
    read = [None if output is None else _read_output(output, tensors) for output in found]
    made = [output for output, fake in zip(found, read, strict=True) if fake is not None and fake.source is None]
    if any(not _is_plain(output) for output in made) or len({_storage_key(output) for output in made}) < len(made):
        return None
    return _Answer(kind, tuple(read))


def _read_output(output: Tensor, tensors: Sequence[Tensor]) -> _FakeOutput:
    same = [number for number, tensor in enumerate(tensors) if tensor is output]
    shared = [number for number, tensor in enumerate(tensors) if _storage_key(tensor) == _storage_key(output)]
    source = next(iter(same or shared), None)
    return _FakeOutput(source, bool(same), output.shape, output.stride(), output.storage_offset(), output.dtype)


def _is_plain(output: Tensor) -> bool:
    """Whether a new tensor is without data and has no more storage than its elements need."""
    has_no_data = isinstance(output, FakeTensor) or output.is_meta
    return has_no_data and _reach(output) * output.element_size() == output.untyped_storage().nbytes()


def _reach(tensor: Tensor) -> int:
    """Elements from the first to the last of a tensor."""
    steps = sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True))
    return 1 + steps if tensor.numel() else 0


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_large(func: Any, args: Any) -> bool:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if tensors:
        return max(tensor.numel() for tensor in tensors) > CONTROL_ELEMENTS
    shape = args[0] if args and isinstance(args[0], (list, tuple, torch.Size)) else ()
    return all(isinstance(side, int) for side in shape) and math.prod(shape) > CONTROL_ELEMENTS


def _is_meta(args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation is on tensors that are without data by themselves."""
    return str(kwargs.get("device")) == "meta" or any(isinstance(arg, Tensor) and arg.is_meta for arg in args)


@contextmanager
def _fake_lists() -> Iterator[None]:
    """Teach fake tensors `tolist`, which torch 2.1 has not done: as for one value, the answer is yes, or 1."""
    if "tolist" in vars(FakeTensor):
        yield
        return
    FakeTensor.tolist = _list_answers  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del FakeTensor.tolist


def _list_answers(tensor: Tensor) -> Any:
    answer: Any = True if tensor.dtype is torch.bool else 1
    for side in reversed(tensor.shape):
        answer = [answer] * side
    return answer
