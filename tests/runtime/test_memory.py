"""Claims about releasing caches, reading memory and recognising an out-of-memory error."""

from __future__ import annotations

import builtins
import gc
import logging
import mmap
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from graf.runtime import control_groups, logs, memory
from graf.runtime.memory import (
    CacheRelease,
    is_out_of_memory,
    read_memory,
    release_cache,
    reset_peak,
    spare_long_lived_objects,
)
from graf.runtime.phase_timer import make_timer

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
    with mmap.mmap(-1, 64 * memory.MIB) as block:  # from the system; an allocator may have some left
        for place in range(0, len(block), 4096):
            block[place] = 1
        during = read_memory(CPU)
    after = read_memory(CPU)
    assert during["rss"] - before["rss"] == pytest.approx(64, abs=8)
    assert after["rss"] < during["rss"] - 48
    assert after["peak_rss"] >= during["rss"] - 1


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
@pytest.mark.parametrize(
    ("entry", "root", "limit_file", "use_file", "pages"),
    [
        ("0::/job/step", "", "memory.max", "memory.current", "inactive_file"),
        ("4:memory:/job/step", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        (
            "4:cpu,memory:/not/seen/here",
            "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
)
def test_a_control_group_and_those_around_it_bound_what_is_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, root: str, limit_file: str, use_file: str, pages: str
) -> None:
    groups, own = tmp_path / "groups", tmp_path / "own"
    monkeypatch.setattr(control_groups, "CONTROL_GROUPS", groups)
    monkeypatch.setattr(control_groups, "OWN_CONTROL_GROUPS", own)
    system = memory.read_usable_memory(CPU)
    assert system is not None
    own.write_text(f"9:pids:/other\n{entry}\n")

    def write(group: str, limit: str, use: int, reclaimable: int) -> None:
        folder = groups / root / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit_file).write_text(f"{limit}\n")
        (folder / use_file).write_text(f"{use}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{pages} {reclaimable}\n")

    write("", "max" if not root else str(2**63 - 4096), 30_000_000, 0)
    assert memory.read_usable_memory(CPU) == pytest.approx(system, rel=0.3)
    write("", "40000000", 30_000_000, 2_000_000)
    assert memory.read_usable_memory(CPU) == 12_000_000
    if "job" in entry:
        write("job", "20000000", 19_000_000, 0)
        write("job/step", "max" if not root else str(2**63 - 4096), 5, 0)
        assert memory.read_usable_memory(CPU) == 1_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is restarted through /proc")
def test_a_restarted_peak_forgets_the_earlier_one_or_says_that_it_cannot(caplog: pytest.LogCaptureFixture) -> None:
    with mmap.mmap(-1, 128 * memory.MIB) as block:  # not the allocator's, which may keep what is freed
        block.write(bytes(128 * memory.MIB))
        peak = read_memory(CPU)["peak_rss"]
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
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
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


@pytest.mark.skipif(sys.platform != "linux", reason="expandable segments exist on Linux")
@pytest.mark.parametrize(
    ("version", "already", "expected"),
    [
        ("2.9.0+cu130", {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ("2.5.1", {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ("2.9.0", {"PYTORCH_CUDA_ALLOC_CONF": "garbage_collection_threshold:0.8"}, {}),
        ("2.9.0", {"PYTORCH_ALLOC_CONF": ""}, {}),
    ],
)
def test_expandable_segments_are_asked_for_unless_the_user_has_set_anything(
    monkeypatch: pytest.MonkeyPatch, version: str, already: dict[str, str], expected: dict[str, str]
) -> None:
    environment = dict(already)
    monkeypatch.setattr(memory.os, "environ", environment)
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(memory.host_allocator, "keep_freed_memory", lambda: True)
    memory.prepare_allocator()
    assert environment == already | expected


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_each_allocator_is_asked_once_and_named(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("torch.cuda.empty_cache"))
    monkeypatch.setattr(memory.host_allocator, "find_release", lambda: lambda: asked.append("malloc_trim"))
    release_cache(torch.device(kind))
    assert asked == [*(["torch.cuda.empty_cache"] if kind == "cuda" else []), "malloc_trim"]
    assert memory.name_cache_release(torch.device(kind)) == " and ".join(asked)


def test_what_lived_before_is_not_searched_for_garbage_and_what_comes_after_is() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.own = self

    before, own = weakref.ref(Cycle()), None
    with spare_long_lived_objects():
        own = weakref.ref(Cycle())
        gc.collect()
        assert own() is None
        assert before() is not None
    gc.collect()
    assert before() is None


def test_where_there_is_no_allocation_history_it_is_said_and_nothing_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "graf"), memory.record_allocations(tmp_path / "x.pickle", CPU):
        pass
    assert "CUDA alone keeps an allocation history, since torch 2.1, found cpu" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_allocation_history_is_written_even_when_the_run_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda *args, **keys: calls.append(keys.get("enabled", "on"))
    )
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", calls.append)
    with (
        pytest.raises(ZeroDivisionError),
        memory.record_allocations(tmp_path / "run" / "x.pickle", torch.device("cuda")),
    ):
        raise ZeroDivisionError
    assert calls == ["on", str(tmp_path / "run" / "x.pickle"), None]
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize(
    ("policy", "after_phase", "after_steps"), [("never", 0, []), ("phase", 1, []), (3, 0, [3, 6])], ids=str
)
def test_caches_are_given_back_when_the_policy_says_and_its_time_is_a_phase(
    monkeypatch, policy, after_phase, after_steps
):
    timer, step = make_timer(CPU), 0
    released: list[int] = []
    monkeypatch.setattr(memory, "release_cache", lambda device: released.append(step))
    caches = CacheRelease(policy, CPU, timer)
    caches.after_phase()
    for step in range(1, 8):
        caches.after_step(step)
    assert released == [0] * after_phase + after_steps
    assert ("release_cache" in timer.totals()) is bool(released)
