"""Counts the bytes of all live tensors, real or fake, so that a peak can be measured or predicted.

A storage counts once, however many views share it, from the operation that made it until nothing refers to it. What is
not a tensor is not seen: a library's workspaces, a device's context, the gaps that an allocator leaves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

#: the layout of what oneDNN has packed for itself
_PACKED_LAYOUT = torch._mkldnn  # type: ignore[attr-defined]


class LiveTensorMeter(TorchDispatchMode):
    """Follows every storage that operations create inside, in backward passes and their threads too.

    >>> with LiveTensorMeter() as meter:
    ...     loss = network(images).sum()
    ...     loss.backward()
    >>> meter.peak  # bytes

    device_type: count the tensors of one kind of device only ("cuda"); None counts all. Under FakeTensorMode enter it
    after that mode. While it is active autograd adds gradients out of place, as for every dispatch mode, so a run that
    is not measured may need slightly less. Needs torch 2.1.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self.device_type = device_type
        self.peak = 0
        self._counted = 0
        self._sizes: dict[int, int] = {}
        self._polled: dict[int, StorageWeakRef] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """That torch's compiler need not be kept out of what follows; to keep it out is to import it, in a second."""
        return False

    @property
    def current(self) -> int:
        """Bytes of what is alive now."""
        if self._polled:
            for key in [key for key, storage in self._polled.items() if storage.expired()]:
                self._forget(key)
        return self._counted

    def reset_peak(self) -> None:
        """Start a new peak from what is alive now."""
        self.peak = self.current

    def track(self, *owners: nn.Module | torch.optim.Optimizer | Tensor) -> None:
        """Count what existed before: tensors, modules with their gradients, optimisers with their states."""
        for owner in owners:
            for tensor in tensors_of(owner):
                self._see(tensor)

    def expect(self, more: int) -> None:
        """Take note of a peak of `more` bytes above what is alive now, which was measured elsewhere."""
        self.peak = max(self.peak, self.current + more)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        outputs = self.compute(func, types, args, kwargs or {})
        if outputs is None and args and isinstance(args[0], (tuple, list)):  # _foreach_add_(tensors, ...)
            self._see(args[0])
        self._see(outputs)
        return outputs

    def compute(self, func: Callable[..., Any], types: Sequence[type], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What an operation returns."""
        return func(*args, **kwargs)

    def _see(self, tensor: Any) -> None:
        """Count a tensor, or each one of a list."""
        if isinstance(tensor, (tuple, list)):
            for item in tensor:
                self._see(item)
            return
        if not isinstance(tensor, Tensor) or tensor.layout not in (torch.strided, _PACKED_LAYOUT):
            return
        if self.device_type is not None and tensor.device.type != self.device_type:
            return
        if tensor.layout is _PACKED_LAYOUT:  # has no storage to ask
            key, size = id(tensor), tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is None and tensor.layout is _PACKED_LAYOUT:
            weakref.finalize(tensor, self._forget, key).atexit = False  # type: ignore[misc]
        elif known is None:
            self._watch(storage, key)
        self._sizes[key] = size
        self._counted += size - (known or 0)
        if self._counted > self.peak:
            self.peak = max(self.peak, self.current)

    def _watch(self, storage: torch.UntypedStorage, key: int) -> None:
        if _ENDS_ARE_TOLD:
            weakref.finalize(storage, self._forget, key).atexit = False  # type: ignore[misc]
        else:
            self._polled[key] = StorageWeakRef(storage)  # which also keeps the key from being used again

    def _forget(self, key: int) -> None:
        self._counted -= self._sizes.pop(key, 0)
        self._polled.pop(key, None)


def _storages_keep_objects() -> bool:
    """Whether a storage has one Python object, which lives as long as it does; in torch 2.1 it has many."""
    tensor = torch.empty(1)
    tensor.untyped_storage().is_kept = True  # type: ignore[attr-defined]
    return hasattr(tensor.untyped_storage(), "is_kept")


_ENDS_ARE_TOLD = _storages_keep_objects()


def tensors_of(owner: nn.Module | torch.optim.Optimizer | Tensor) -> Iterator[Tensor]:
    """A tensor and its gradient; a module's parameters, their gradients and buffers; an optimiser's states."""
    if isinstance(owner, nn.Module):
        for tensor in (*owner.parameters(), *owner.buffers()):
            yield from tensors_of(tensor)
    elif isinstance(owner, torch.optim.Optimizer):
        for state in owner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
    else:
        yield owner
        if owner.is_leaf and owner.grad is not None:
            yield owner.grad


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each storage once."""
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())
