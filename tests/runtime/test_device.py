"""Claims about picking a device, its backend flags, and transfers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from graf.base.tensors import TensorBatch
from graf.runtime import device as device_module
from graf.runtime.device import (
    DeviceError,
    configure_backends,
    describe_device,
    list_devices,
    move_in_one_copy,
    pack,
    pick_device,
    unpack,
)


@pytest.fixture
def denormals_restored() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


def pretend_devices(monkeypatch: pytest.MonkeyPatch, cuda_count: int, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda_count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda_count", "mps", "expected"),
    [(2, True, "cuda:0"), (0, True, "mps:0"), (0, False, "cpu"), (1, False, "cuda:0")],
)
def test_auto_prefers_cuda_then_mps_then_cpu(
    monkeypatch: pytest.MonkeyPatch, cuda_count: int, mps: bool, expected: str
) -> None:
    pretend_devices(monkeypatch, cuda_count, mps)
    picked = pick_device("auto")
    assert picked.type == torch.device(expected).type
    if picked.type == "cuda":
        assert picked == torch.device(expected), "cuda has an index, so that it equals tensor.device"


def test_cuda_without_an_index_is_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_devices(monkeypatch, 2, False)
    assert pick_device("cuda") == torch.device("cuda:0")
    assert pick_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("request_name", ["cuda:2", "mps", "gpu", "cuda:x", "", "cpu:0:1"])
def test_an_absent_device_is_an_error_that_names_request_and_alternatives(
    monkeypatch: pytest.MonkeyPatch, request_name: str
) -> None:
    pretend_devices(monkeypatch, 2, False)
    with pytest.raises(DeviceError) as caught:
        pick_device(request_name)
    message = str(caught.value)
    assert repr(request_name) in message
    assert "cuda:0, cuda:1, cpu" in message
    assert "'auto'" in message
    assert "\n" not in message


@pytest.mark.parametrize(("cuda_version", "hint"), [(None, "install a build of torch"), ("13.2", "check the driver")])
def test_cuda_on_a_machine_without_it_says_whether_build_or_driver_is_missing(
    monkeypatch: pytest.MonkeyPatch, cuda_version: str | None, hint: str
) -> None:
    pretend_devices(monkeypatch, 0, False)
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(DeviceError, match=hint):
        pick_device("cuda")


@pytest.mark.usefixtures("denormals_restored")
def test_denormals_are_flushed_on_the_cpu_only_after_configuring() -> None:
    smallest_normal = torch.tensor([torch.finfo(torch.float32).tiny] * 64)
    assert (smallest_normal / 4 > 0).all(), "torch keeps denormals by default"
    configure_backends(torch.device("cpu"))
    assert (smallest_normal / 4 == 0).all()


@pytest.mark.parametrize("deterministic", [False, True])
def test_on_cuda_sums_have_one_order_when_asked(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    """The flags that torch documents for reproducibility, without a GPU to try them on."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    flags, precision = (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32), torch.get_float32_matmul_precision()
    try:
        configure_backends(torch.device("cuda", 0), deterministic)
        assert cudnn.benchmark is not deterministic
        assert cudnn.deterministic is deterministic
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = flags
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize(("threads", "said"), [(1, "1 thread)"), (2, "2 threads)")])
def test_describe_names_the_processor_and_its_threads(monkeypatch: pytest.MonkeyPatch, threads: int, said: str) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    text = describe_device(torch.device("cpu"))
    assert text.startswith("cpu (")
    assert text.endswith(f", {said}")


def test_describe_works_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_file(*_: object, **__: object) -> None:
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr(device_module, "open", no_file, raising=False)
    assert describe_device(torch.device("cpu")).startswith("cpu (")


@dataclass(frozen=True)
class Inner(TensorBatch):
    number: Tensor
    flags: Tensor | None = None


@dataclass(frozen=True)
class Outer(TensorBatch):
    name: str
    image: Tensor
    inner: Inner


def make_batch() -> Outer:
    return Outer("x", torch.rand(2, 3), Inner(torch.tensor([1, 2]), torch.tensor([True, False])))


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_moved_batch_keeps_its_nesting_and_its_values(kind: str) -> None:
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    batch = make_batch()
    moved = move_in_one_copy(batch, torch.device(kind))
    assert isinstance(moved, Outer)
    assert isinstance(moved.inner, Inner)
    assert moved.name == "x"
    for before, after in zip(batch.tensors(), moved.tensors(), strict=True):
        assert after.device.type == kind
        assert torch.equal(before, after.cpu())


def test_a_batch_goes_to_cuda_in_one_asynchronous_copy_of_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, copies, pinned = make_batch(), [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(id(self)) or self)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, non_blocking: copies.append((id(self), device, non_blocking)) or self
    )
    moved = move_in_one_copy(batch, torch.device("cuda:0"))
    monkeypatch.undo()
    assert copies == [(pinned[0], torch.device("cuda:0"), True)]
    assert len(pinned) == 1
    for before, after in zip(batch.tensors(), moved.tensors(), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("kind", "pinned", "expected"),
    [("cuda", True, True), ("cuda", False, False), ("cpu", True, False), ("mps", True, False)],
)
def test_only_transfers_to_cuda_from_pinned_memory_are_asynchronous(
    monkeypatch: pytest.MonkeyPatch, kind: str, pinned: bool, expected: bool
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: calls.append(non_blocking) or self)
    make_batch().to(torch.device(kind))
    assert calls == [expected] * 3


DTYPES = (torch.bool, torch.int64, torch.float32, torch.float64)
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (3,), (2, 0, 5), (3, 1, 7), (5, 4, 4))


def draw(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return (100 * torch.randn(shape, dtype=torch.float64)).round().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tensor_is_unpacked_as_it_was_packed(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = draw(dtype, shape)
    buffer, starts = pack([tensor])
    (again,) = unpack(buffer, [tensor], starts)
    assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(again, tensor)


def test_tensors_of_all_kinds_share_a_buffer_and_each_is_aligned() -> None:
    tensors = [draw(dtype, shape) for shape in SHAPES for dtype in DTYPES]
    buffer, starts = pack(tensors)
    assert buffer.dtype == torch.uint8
    assert len(starts) == len(tensors)
    for tensor, start, again in zip(tensors, starts, unpack(buffer, tensors, starts), strict=True):
        assert start % 16 == 0
        assert again.data_ptr() % tensor.element_size() == 0
        assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(again, tensor)


def test_tensors_whose_memory_is_not_contiguous_are_packed_by_value() -> None:
    tensors = [torch.arange(12).reshape(3, 4).t(), torch.ones(1, 3).expand(4, 3), torch.arange(10)[::3]]
    buffer, starts = pack(tensors)
    for tensor, again in zip(tensors, unpack(buffer, tensors, starts), strict=True):
        assert torch.equal(again, tensor)


def test_no_tensors_and_tensors_without_elements_pack_to_nothing() -> None:
    assert pack([])[0].numel() == 0
    empty = [torch.zeros(0), torch.zeros(0, 3, dtype=torch.int64)]
    buffer, starts = pack(empty)
    assert (buffer.numel(), starts) == (0, [0, 0])
    assert [found.shape for found in unpack(buffer, empty, starts)] == [tensor.shape for tensor in empty]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_flags_are_set_and_the_device_is_current() -> None:
    picked = torch.device(list_devices()[-2])
    configure_backends(picked)
    assert torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.cuda.current_device() == picked.index
    assert str(picked) in describe_device(picked)
    assert {tensor.device for tensor in move_in_one_copy(make_batch(), picked).tensors()} == {picked}
