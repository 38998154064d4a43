"""Claims about devices and memory on every torch: what is asked of it, and what is said where it has nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from graf.base.tensors import TensorBatch
from graf.runtime import memory
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
from graf.runtime.memory import (
    MIB,
    OutOfMemory,
    is_out_of_memory,
    prepare_allocator,
    read_memory,
    read_usable_memory,
    record_allocations,
    release_cache,
    retry_smaller,
)

CPU, MPS = torch.device("cpu"), torch.device("mps")


@dataclass(frozen=True)
class Numbers(TensorBatch):
    values: Tensor
    flags: Tensor


def test_a_device_is_picked_described_and_set_up() -> None:
    assert list_devices()[-1] == "cpu"
    assert pick_device("auto").type == list_devices()[0].partition(":")[0]
    assert pick_device("cpu") == CPU
    with pytest.raises(DeviceError, match="'gpu' is not available; this machine offers"):
        pick_device("gpu")
    configure_backends(CPU)
    assert float(torch.tensor(1e-39) * 1.0) == 0.0, "denormals are flushed"
    assert describe_device(CPU).startswith("cpu (")


def test_batches_travel_as_bytes() -> None:
    numbers = Numbers(torch.rand(3, 5), torch.tensor([True, False, True]))
    assert move_in_one_copy(numbers, CPU).values is numbers.values
    buffer, starts = pack(numbers.tensors())
    for before, after in zip(numbers.tensors(), unpack(buffer, numbers.tensors(), starts)):  # noqa: B905
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["empty_cache", None])
def test_caches_are_given_back_where_torch_can(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    calls: list[str] = []
    if name is None:
        monkeypatch.delattr(torch, "mps", raising=False)  # torch 1.13
    else:
        monkeypatch.setattr(torch, "mps", SimpleNamespace(empty_cache=lambda: calls.append("mps")), raising=False)
    assert release_cache(MPS) > 0
    assert release_cache(CPU) > 0
    assert calls == ([] if name is None else ["mps"])


def test_memory_of_mps_is_read_where_torch_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    amounts: dict[str, Any] = {
        "current_allocated_memory": lambda: 3 * MIB,
        "driver_allocated_memory": lambda: 5 * MIB,
    }
    monkeypatch.setattr(torch, "mps", SimpleNamespace(**amounts), raising=False)  # torch 2.0 to 2.4
    assert read_memory(MPS) == {"current": 3.0, "driver": 5.0}
    assert read_usable_memory(MPS) is None
    amounts["recommended_max_memory"] = lambda: 7 * MIB
    monkeypatch.setattr(torch, "mps", SimpleNamespace(**amounts), raising=False)  # torch 2.5
    assert read_usable_memory(MPS) == 7 * MIB
    monkeypatch.delattr(torch, "mps")  # torch 1.13
    assert "current" not in read_memory(MPS)
    assert read_usable_memory(MPS) is None


def test_memory_of_this_process_is_read() -> None:
    assert set(read_memory(CPU)) <= {"rss", "peak_rss"}
    if Path("/proc/meminfo").exists():
        usable = read_usable_memory(CPU)
        assert usable is not None
        assert usable > 0


@pytest.mark.parametrize(
    ("version", "variable"),
    [
        ("1.13.1", None),
        ("2.0.1", None),
        ("2.1.2+cu121", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.8.0", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.9.0", "PYTORCH_ALLOC_CONF"),
        ("2.10.0a0+git12ab", "PYTORCH_ALLOC_CONF"),
    ],
)
def test_the_allocator_is_asked_under_the_name_of_its_release(
    monkeypatch: pytest.MonkeyPatch, pretend_release: Callable[[str], None], version: str, variable: str | None
) -> None:
    """CUDA does not start where it finds a word that it does not know."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.host_allocator, "keep_freed_memory", lambda: True)
    pretend_release(version)
    prepare_allocator()
    assert os.environ == ({} if variable is None else {variable: "expandable_segments:True"})


@pytest.mark.parametrize(("version", "device"), [("2.1.2", "cpu"), ("1.13.1", "cuda"), ("2.0.1", "cuda")])
def test_a_history_that_torch_does_not_keep_is_said(
    pretend_release: Callable[[str], None], caplog: pytest.LogCaptureFixture, tmp_path: Path, version: str, device: str
) -> None:
    pretend_release(version)
    with caplog.at_level("INFO", "graf"), record_allocations(tmp_path / "history.pickle", torch.device(device)):
        pass
    assert f"since torch 2.1, found {device} and torch {version}; nothing is recorded" in caplog.text
    assert not list(tmp_path.iterdir())


def test_running_out_of_memory_is_recognised_and_tried_again_smaller() -> None:
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    sizes = [8]

    def run() -> int:
        if sizes[0] > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return sizes[0]

    def shrink() -> str | None:
        sizes[0] //= 2
        return f"now {sizes[0]}" if sizes[0] else None

    assert retry_smaller(run, shrink, CPU, "lower it") == 2
    with pytest.raises(OutOfMemory, match="lower it"):
        retry_smaller(lambda: torch.empty(2**60, dtype=torch.uint8), lambda: None, CPU, "lower it")
