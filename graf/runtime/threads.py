"""Cores: how many this process may keep busy, and how many threads torch computes with on them.

torch counts the cores of the machine. A container or a batch job often has a few of them only, as a quota of time that
torch does not see: its threads are then stopped in turn, and every operation waits for the one that was.
"""

from __future__ import annotations

import os

import torch

from graf.runtime.control_groups import ControlGroup, find_groups

#: by which a person, or torchrun, says how many threads each process takes
VARIABLE = "OMP_NUM_THREADS"


def count_usable_cpus() -> int:
    """Cores that this process may keep busy, at least 1: those that it may run on, within its control groups' quota.

    A part of a core is left out: the thread on it would be the one that the others wait for.
    """
    return max(1, int(min([float(count_allowed_cpus()), *_read_quotas()])))


def count_allowed_cpus() -> int:
    """Cores that this process may run on: its affinity where the system tells it, else the machine's count."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_of_cpus(processes: int) -> int:
    """Cores for each of so many processes on this machine, at least 1.

    Processes that Slurm has started one by one have those of their task; others, as torchrun's, share what there is.
    """
    of_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if processes > 1 and of_task.isdecimal() and "TORCHELASTIC_RUN_ID" not in os.environ:
        return max(1, min(int(of_task), count_usable_cpus()))
    return max(1, count_usable_cpus() // processes)


def _read_quotas() -> list[float]:
    """Seconds on a core in every second that the control group and those around it allow; empty without a limit."""
    return [quota for group in find_groups("cpu") if (quota := _read_quota(group)) is not None]


def _read_quota(group: ControlGroup) -> float | None:
    try:
        if group.version == 2:
            quota, period = group.read("cpu.max").split()
        else:
            quota, period = group.read("cpu.cfs_quota_us"), group.read("cpu.cfs_period_us")
        return int(quota) / int(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def limit_threads(processes: int = 1) -> None:
    """Let torch compute with no more threads than there are cores for each of so many processes on this machine.

    What OMP_NUM_THREADS says is left as it is: :func:`describe_threads` tells whether it fits.
    """
    if not os.environ.get(VARIABLE) and share_of_cpus(processes) < torch.get_num_threads():
        torch.set_num_threads(share_of_cpus(processes))


def describe_threads(processes: int = 1) -> str:
    """One phrase for the log: threads of each of so many processes, how many it has cores for, and what to set."""
    threads, cores, said = torch.get_num_threads(), share_of_cpus(processes), os.environ.get(VARIABLE)
    text = f"{threads} for computing" + (f" in each of {processes} processes" if processes > 1 else "")
    if not said or threads == cores:
        return f"{text}, cores for {cores}"
    source = ", as torchrun does where nobody has set it" if processes > 1 and said == "1" else ""
    return f"{text}, by {VARIABLE}={said}{source}, but cores for {cores}: start with {VARIABLE}={cores}"
