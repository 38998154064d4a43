"""Claims about picking a device, its backend flags, and transfers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

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


def test_describe_names_the_processor_and_its_threads() -> None:
    text = describe_device(torch.device("cpu"))
    assert text.startswith("cpu (")
    assert f"{torch.get_num_threads()} threads" in text


def test_describe_works_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_file(*_: object, **__: object) -> None:
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr(device_module, "open", no_file, raising=False)
    assert describe_device(torch.device("cpu")).startswith("cpu (")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_flags_are_set_and_the_device_is_current() -> None:
    picked = torch.device(list_devices()[-2])
    configure_backends(picked)
    assert torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.cuda.current_device() == picked.index
    assert str(picked) in describe_device(picked)


def test_tensors_of_any_type_come_back_out_of_one_buffer() -> None:
    tensors = [
        torch.tensor([True, False, True]),
        torch.arange(5),
        torch.rand(2, 3),
        torch.rand(3, 1, 2, dtype=torch.float64),
        torch.tensor(1.5),
        torch.empty(0, 4),
        torch.rand(4, 6)[:, ::2],
    ]
    buffer, starts = pack(tensors)
    assert all(start % 16 == 0 for start in starts)
    for old, new in zip(tensors, unpack(buffer, tensors, starts), strict=True):
        assert old.dtype == new.dtype
        assert torch.equal(old, new)


@dataclass(frozen=True)
class Inputs(TensorBatch):
    z: torch.Tensor
    labels: torch.Tensor


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_batch_is_moved_with_its_values(kind: str) -> None:
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    batch = Inputs(torch.rand(3, 2), torch.arange(3))
    moved = move_in_one_copy(batch, torch.device(kind))
    assert torch.equal(moved.z.cpu(), batch.z)
    assert torch.equal(moved.labels.cpu(), batch.labels)
    assert moved.z.device.type == kind
