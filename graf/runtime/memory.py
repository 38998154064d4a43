"""Device memory: releasing caches, reading current and peak use, recognising an out-of-memory error.

All amounts are MiB (2^20 bytes).
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from graf.base.errors import UserError
from graf.runtime import host_allocator
from graf.runtime.control_groups import ControlGroup, find_groups
from graf.runtime.logs import info_once, logger
from graf.runtime.phase_timer import PhaseTimer
from graf.runtime.torch_release import torch_release

Result = TypeVar("Result")

MIB = 2**20

_OUT_OF_MEMORY_MESSAGES = (
    "out of memory",  # "CUDA error: out of memory", "MPS backend out of memory"
    "can't allocate memory",  # the CPU allocator on Linux and macOS
    "not enough memory",  # the CPU allocator on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    # cuDNN, where memory is left for none of its algorithms. It says the same of what it cannot compute at all: then
    # smaller parts do not help, and OutOfMemory quotes it
    "was unable to find an engine to execute this computation",  # FIND and GET
    "Unable to find a valid cuDNN algorithm to run convolution",
)


def release_cache(device: torch.device) -> float:
    """Collect garbage and give the allocators' cached blocks back to device and host; returns the seconds it took.

    Belongs at phase boundaries (after sampling, scoring, a checkpoint): the next step allocates everything anew.
    """
    start = time.perf_counter()
    gc.collect()
    for release in (_find_release(device), host_allocator.find_release()):
        if release is not None:
            release()
    return time.perf_counter() - start


def _find_release(device: torch.device) -> Callable[[], None] | None:
    """What gives a GPU's cache back; None on a CPU, whose allocator is the host's, and on MPS in an old torch."""
    kind = getattr(torch, device.type, None) if device.type in ("cuda", "mps") else None
    return getattr(kind, "empty_cache", None)


def name_cache_release(device: torch.device) -> str:
    """What :func:`release_cache` does on a device besides collecting garbage."""
    releases = {
        f"torch.{device.type}.empty_cache": _find_release(device),
        "malloc_trim": host_allocator.find_release(),
    }
    return " and ".join(name for name, release in releases.items() if release) or "nothing to give back"


class CacheRelease:
    """When caches are given back: after every phase ("phase"), never ("never"), or every n-th iteration (a number).

    timer: is told of it as the phase release_cache.
    """

    def __init__(self, policy: str | int, device: torch.device, timer: PhaseTimer[Any]) -> None:
        self.policy, self.device, self.timer = policy, device, timer

    def after_phase(self) -> None:
        """Call after sampling, scoring or saving."""
        if self.policy == "phase":
            self._release()

    def after_step(self, iteration: int) -> None:
        """Call after every training step."""
        if isinstance(self.policy, int) and iteration % self.policy == 0:
            self._release()

    def _release(self) -> None:
        with self.timer.phase("release_cache"):
            release_cache(self.device)


@contextmanager
def spare_long_lived_objects() -> Iterator[None]:
    """What there is now is not searched for garbage inside: every thirty steps Python would, for 0.2 s of nothing."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def prepare_allocator() -> None:
    """Have the host's allocator keep what is freed, and ask CUDA's for expandable segments, which do not fragment.

    Where the user has set anything for one of them, that stands. Must run before CUDA starts. The variable was renamed
    in torch 2.9; before 2.1 CUDA does not start with that word.
    """
    host_allocator.keep_freed_memory()
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    can_expand = sys.platform == "linux" and torch_release() >= (2, 1)
    if can_expand and not any(name in os.environ for name in names):
        os.environ[names[0] if torch_release() >= (2, 9) else names[1]] = "expandable_segments:True"


@contextmanager
def record_allocations(path: Path | None, device: torch.device) -> Iterator[None]:
    """Write CUDA's allocation history of what happens inside to `path`, for the viewer at pytorch.org/memory_viz.

    None records nothing; on other devices, and before torch 2.1, a message says that there is no such history.
    """
    if path is None or device.type != "cuda" or torch_release() < (2, 1):
        if path is not None:
            found = f"{device.type} and torch {torch.__version__}"
            info_once(
                f"--memory_snapshot: CUDA alone keeps an allocation history, since torch 2.1, found {found}; nothing "
                "is recorded"
            )
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    try:
        yield
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("allocation history: %s", path)


def read_memory(device: torch.device) -> dict[str, float]:
    """Memory use in MiB.

    CUDA: `allocated`, `reserved`, and their `peak` and `peak_reserved`. MPS since torch 2.0: `current`, `driver`. CPU,
    and MPS before: `rss` and `peak_rss` of this process; only `peak_rss` where there is no /proc.
    """
    if device.type == "cuda":
        counts = torch.cuda.memory_stats_as_nested_dict(device)  # once: each reading of one of them makes all
        allocated, reserved = (counts[f"{kind}_bytes"]["all"] for kind in ("allocated", "reserved"))
        return {
            "allocated": allocated["current"] / MIB,
            "reserved": reserved["current"] / MIB,
            "peak": allocated["peak"] / MIB,
            "peak_reserved": reserved["peak"] / MIB,
        }
    if device.type == "mps" and hasattr(torch, "mps"):
        return {
            "current": torch.mps.current_allocated_memory() / MIB,
            "driver": torch.mps.driver_allocated_memory() / MIB,
        }
    return _read_process_memory()


def read_usable_memory(device: torch.device) -> int | None:
    """Bytes that this process's tensors could take, those that exist included; None if unknown.

    GPU: what is free and what this process's allocator holds. CPU: what the system, or the process's control group (a
    container, a batch job), still gives to programs; what it has taken already is not counted there.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        recommend = getattr(getattr(torch, "mps", None), "recommended_max_memory", None)  # torch 2.5
        return None if recommend is None else int(recommend())
    release = host_allocator.find_release()
    if release is not None:  # what is kept is free, though the system cannot know
        release()
    available = _read_amounts("/proc/meminfo", "MemAvailable").get("MemAvailable")
    return None if available is None else min([available, *_read_control_groups()])


def _read_amounts(listing: str, *names: str) -> dict[str, int]:
    """Bytes by name of the lines `name: number kB` of a file in /proc; empty on macOS, Windows, in some sandboxes.

    Other lines are passed over: this is read in every phase of a step.
    """
    try:
        with open(listing, encoding="utf-8") as file:
            lines = [line.split() for line in file if line.startswith(names)]
    except FileNotFoundError:
        return {}
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines}


#: files of a group by version: limit and use in bytes, and the line of memory.stat that counts reclaimable file pages
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def _read_control_groups() -> list[int]:
    """Bytes that the process's control group and those around it leave; empty without one, or without a limit."""
    return [left for group in find_groups("memory") if (left := _read_group(group)) is not None]


def _read_group(group: ControlGroup) -> int | None:
    """Bytes left in one group; None where it has no limit, or is not there."""
    limit, use, reclaimable = _FILES[group.version]
    try:
        most = group.read(limit)
        if most == "max":
            return None
        statistics = dict(line.split() for line in group.read("memory.stat").splitlines())
        used = int(group.read(use)) - int(statistics.get(reclaimable, 0))
        return max(0, int(most) - used)
    except (OSError, ValueError):
        return None


def _read_process_memory() -> dict[str, float]:
    amounts = _read_amounts("/proc/self/status", "VmRSS", "VmHWM")
    if {"VmRSS", "VmHWM"} <= amounts.keys():
        return {"rss": amounts["VmRSS"] / MIB, "peak_rss": amounts["VmHWM"] / MIB}
    try:
        import resource
    except ImportError:  # Windows
        info_once("this system has no way to read a process's memory without another package: it is not logged")
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_rss": peak / MIB if sys.platform == "darwin" else peak / 1024}


def reset_peak(device: torch.device) -> None:
    """Start a new peak; where the system cannot (MPS, CPU outside Linux), say so once and keep the old one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if device.type == "cpu":
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")  # proc(5): resets VmHWM to the current resident size
            return
        except OSError as error:
            reason = str(error)
    else:
        reason = f"{device.type} keeps no peak"
    info_once(f"the memory peak cannot be restarted here ({reason}): it counts from the start of the process")


class OutOfMemory(UserError):
    """Memory ran out and nothing is left to make smaller."""


def retry_smaller(
    run: Callable[[], Result], shrink: Callable[[], str | None], device: torch.device, advice: str
) -> Result:
    """`run()`, and whenever it runs out of memory, again after `shrink()` has made something smaller.

    shrink: returns what it changed, which is logged, or None when nothing is left to shrink; then OutOfMemory is
    raised with `advice`, which names the keys to lower. `run` must be repeatable: it starts from what it finds and
    keeps nothing of a failed try. It may itself retry parts of its work: where those have given up, so does this.
    """
    while True:
        try:
            return run()
        except Exception as error:
            if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
                raise
            reason = str(error).strip().split("\n")[0][:200]
        # Only here, outside the except block, is the traceback gone that held every tensor of the failed try.
        release_cache(device)
        change = shrink()
        if change is None:
            raise OutOfMemory(f"out of memory even at the smallest size; {advice} [{reason}]")
        logger.warning("out of memory (%s); %s, which is kept from now on", reason, change)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: CUDA, MPS, torch's CPU allocator, NumPy or Python."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError, OutOfMemory)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_MESSAGES)
