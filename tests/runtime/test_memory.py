"""Claims about releasing caches, reading memory and recognising an out-of-memory error."""

from __future__ import annotations

import builtins
import gc
import logging
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from graf.runtime import logs, memory
from graf.runtime.memory import is_out_of_memory, read_memory, release_cache, reset_peak

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_said", set())


def test_release_collects_reference_cycles_and_returns_its_seconds() -> None:
    class Node:
        pass

    gc.disable()
    try:
        node = Node()
        node.itself = node
        alive = weakref.ref(node)
        del node
        assert alive() is not None
        seconds = release_cache(CPU)
    finally:
        gc.enable()
    assert alive() is None
    assert 0 < seconds < 60


@pytest.mark.skipif(sys.platform != "linux", reason="resident size is read from /proc")
def test_resident_size_follows_an_allocation_and_the_peak_remembers_it() -> None:
    before = read_memory(CPU)
    block = np.ones(64 * memory.MIB // 8)
    during = read_memory(CPU)
    del block
    after = read_memory(CPU)
    assert during["rss"] - before["rss"] == pytest.approx(64, abs=8)
    assert after["rss"] < during["rss"] - 48
    assert after["peak_rss"] >= during["rss"] - 1


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_a_control_group_bounds_what_is_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, use = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "CONTROL_GROUP_FILES", ((limit, use), (tmp_path / "none", tmp_path / "none")))
    system = memory.read_usable_memory(CPU)
    assert system is not None
    use.write_text("30000000\n")
    limit.write_text("40000000\n")
    assert memory.read_usable_memory(CPU) == 10_000_000
    limit.write_text("max\n")
    assert memory.read_usable_memory(CPU) == pytest.approx(system, rel=0.3)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is restarted through /proc")
def test_a_restarted_peak_forgets_the_earlier_one_or_says_that_it_cannot(caplog: pytest.LogCaptureFixture) -> None:
    block = np.ones(128 * memory.MIB // 8)
    peak = read_memory(CPU)["peak_rss"]
    del block
    with caplog.at_level(logging.INFO, "graf"):
        reset_peak(CPU)
    assert read_memory(CPU)["peak_rss"] < peak - 64 or "cannot be restarted" in caplog.text


def test_a_device_that_keeps_no_peak_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "graf"):
        reset_peak(torch.device("mps"))
        reset_peak(torch.device("mps"))
    assert len(caplog.records) == 1
    assert "mps keeps no peak" in caplog.text


def test_without_proc_the_peak_comes_from_the_resource_module(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resource")
    with_proc = read_memory(CPU)

    def no_file(*_: object, **__: object) -> None:
        raise FileNotFoundError("/proc/self/status")

    monkeypatch.setattr(memory, "open", no_file, raising=False)
    without_proc = read_memory(CPU)
    assert set(without_proc) == {"peak_rss"}
    assert without_proc["peak_rss"] >= with_proc["rss"] - 64


def test_a_system_with_neither_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real_import = builtins.__import__

    def no_resource(name: str, *rest: object) -> object:
        if name == "resource":
            raise ImportError(name)
        return real_import(name, *rest)

    def no_file(*_: object, **__: object) -> None:
        raise FileNotFoundError("/proc/self/status")

    monkeypatch.setattr(memory, "open", no_file, raising=False)
    monkeypatch.setattr(builtins, "__import__", no_resource)
    with caplog.at_level(logging.INFO, "graf"):
        assert read_memory(CPU) == {}
        assert read_memory(CPU) == {}
    assert len(caplog.records) == 1


def test_the_cpu_allocators_own_error_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)


def test_numpys_own_error_is_out_of_memory() -> None:
    with pytest.raises(MemoryError) as caught:
        np.empty(2**50)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.99 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_known_messages_are_out_of_memory(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError("out of memory"), KeyError("x")]
)
def test_other_errors_are_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_memory_follows_an_allocation() -> None:
    device = torch.device("cuda:0")
    release_cache(device)
    reset_peak(device)
    before = read_memory(device)
    block = torch.empty(64 * memory.MIB, dtype=torch.uint8, device=device)
    during = read_memory(device)
    del block
    release_cache(device)
    after = read_memory(device)
    assert during["allocated"] - before["allocated"] == pytest.approx(64)
    assert after["allocated"] == before["allocated"]
    assert after["reserved"] < during["reserved"]
    assert after["peak"] == pytest.approx(during["allocated"])
