"""Batches of tensors: frozen dataclasses whose rows belong together, sliced, moved and joined as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch", bound="TensorBatch")


#: metadata of a dataclass field whose tensor belongs to the whole batch: slicing and joining leave it as it is
SHARED = {"shared": True}


class TensorBatch:
    """Base of frozen dataclasses of tensors with one row for each image.

    Fields are tensors (B, ...), other batches, None, or plain values, which every part of the batch keeps. A tensor
    without rows is declared with `field(metadata=SHARED)`.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Points(TensorBatch):
    ...     places: Tensor
    >>> points = Points(torch.zeros(4, 3))
    >>> len(points[1:3])
    2
    >>> len(Points.cat([points, points]))
    8
    """

    def __len__(self) -> int:
        count = self._count_rows()
        if count is None:
            raise TypeError(f"{type(self).__name__} has no field with rows")
        return count

    def __getitem__(self: Batch, rows: slice | Tensor) -> Batch:
        """The rows of a slice, or those with the numbers in an int64 tensor; the batch itself where a slice has all."""
        count = self._count_rows()
        if count is None or (isinstance(rows, slice) and rows.indices(count) == (0, count, 1)):
            return self
        return self._change(lambda value: value[rows], rows_only=True)

    def map(self: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor replaced by `change(tensor)`."""
        return self._change(lambda value: value.map(change) if isinstance(value, TensorBatch) else change(value))

    def detach(self: Batch) -> Batch:
        """The same tensors without their graphs."""
        return self.map(Tensor.detach)

    def to(self: Batch, device: torch.device | str) -> Batch:
        """The batch on a device. Only copies from pinned memory do not block."""
        return self.map(lambda tensor: move(tensor, torch.device(device)))

    @classmethod
    def cat(cls: type[Batch], parts: Sequence[Batch]) -> Batch:
        """All rows of several batches, in order; what has no rows is taken from the first one."""
        if len(parts) == 1:
            return parts[0]
        changes: dict[str, Any] = {}
        for name, value, is_shared in parts[0]._items():
            if is_shared:
                continue
            if isinstance(value, Tensor):
                changes[name] = torch.cat([getattr(part, name) for part in parts])
            elif isinstance(value, TensorBatch):
                changes[name] = type(value).cat([getattr(part, name) for part in parts])
        return replace(parts[0], **changes)  # type: ignore[type-var]

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor of the batch, in the order of the fields."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return tuple(found)

    def with_tensors(self: Batch, tensors: Sequence[Tensor]) -> Batch:
        """The same batch made of other tensors, in the order of :meth:`tensors`."""
        given = iter(tensors)
        return self.map(lambda _: next(given))

    def _count_rows(self) -> int | None:
        """None where no field has any, as in a batch of missing numbers."""
        for _, value, is_shared in self._items():
            if is_shared or not isinstance(value, (Tensor, TensorBatch)):
                continue
            count = len(value) if isinstance(value, Tensor) else value._count_rows()
            if count is not None:
                return count
        return None

    def _change(self: Batch, change: Callable[[Any], Any], rows_only: bool = False) -> Batch:
        changes = {
            name: change(value)
            for name, value, is_shared in self._items()
            if isinstance(value, (Tensor, TensorBatch)) and not (rows_only and is_shared)
        }
        return replace(self, **changes)  # type: ignore[type-var]

    def _items(self) -> Iterator[tuple[str, Any, bool]]:
        for item in fields(self):  # type: ignore[arg-type]
            yield item.name, getattr(self, item.name), bool(item.metadata.get("shared"))


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; the copy does not block where the tensor is pinned."""
    pinned = device.type == "cuda" and tensor.device.type == "cpu" and tensor.is_pinned()
    return tensor.to(device, non_blocking=pinned)
