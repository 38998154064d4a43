"""Batches of tensors: rows, parts, joins, and what has no rows."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from graf.base.tensors import SHARED, TensorBatch


@dataclass(frozen=True)
class Inner(TensorBatch):
    weight: Tensor


@dataclass(frozen=True)
class Outer(TensorBatch):
    name: str
    rows: Tensor
    inner: Inner
    whole: Tensor = field(metadata=SHARED)
    absent: Tensor | None = None


@dataclass(frozen=True)
class Missing(TensorBatch):
    noise: Tensor | None = None


def make(count: int = 5) -> Outer:
    return Outer("x", torch.arange(count), Inner(torch.arange(2.0 * count).reshape(count, 2)), torch.ones(7))


def test_parts_have_their_rows_and_the_whole_of_what_has_none():
    part = make()[1:3]
    assert len(part) == 2
    assert part.rows.tolist() == [1, 2]
    assert part.inner.weight.tolist() == [[2, 3], [4, 5]]
    assert part.whole is not None
    assert len(part.whole) == 7
    assert (part.name, part.absent) == ("x", None)
    assert make()[torch.tensor([4, 0])].rows.tolist() == [4, 0]


def test_all_rows_are_the_batch_itself():
    whole = make()
    assert whole[:] is whole
    assert whole[0:9] is whole
    assert len(whole[0:4]) == 4
    assert whole[torch.arange(5)] is not whole


def test_parts_of_a_batch_take_along_what_has_no_rows_at_all():
    @dataclass(frozen=True)
    class Holder(TensorBatch):
        missing: Missing
        rows: Tensor

    part = Holder(Missing(), torch.arange(5))[1:3]
    assert part.rows.tolist() == [1, 2]
    assert part.missing == Missing()
    assert len(Holder(Missing(), torch.arange(5))) == 5


def test_joined_parts_are_the_batch():
    whole = make()
    again = Outer.cat([whole[:2], whole[2:3], whole[3:]])
    for a, b in zip(whole.tensors(), again.tensors(), strict=True):
        assert torch.equal(a, b)
    assert Outer.cat([whole]) is whole


def test_tensors_go_out_and_come_back_in_the_same_order():
    whole = make()
    assert [tuple(tensor.shape) for tensor in whole.tensors()] == [(5,), (5, 2), (7,)]
    doubled = whole.with_tensors([2 * tensor for tensor in whole.tensors()])
    assert torch.equal(doubled.inner.weight, 2 * whole.inner.weight)


def test_a_batch_is_moved_as_a_whole():
    moved = make().to("meta")
    assert {tensor.device.type for tensor in moved.tensors()} == {"meta"}


def test_detached_tensors_have_no_graph():
    batch = Inner(torch.ones(2, requires_grad=True) * 2)
    assert batch.weight.requires_grad
    assert not batch.detach().weight.requires_grad


def test_a_batch_without_rows_has_no_length():
    @dataclass(frozen=True)
    class Nothing(TensorBatch):
        name: str = "x"

    with pytest.raises(TypeError, match="Nothing has no field with rows"):
        len(Nothing())
