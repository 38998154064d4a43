"""Lets another process have the processor first: niceness, and on Linux that of the session too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: the lowest priority: what a process of this niceness gets of a busy core is 1.5%
LOWEST = 19
#: Linux shares a core among sessions (terminals) first, so that niceness counts within one only (man 7 sched)
AUTOGROUP = Path("/proc/self/autogroup")


@contextmanager
def give_way() -> Iterator[None]:
    """Take what others leave of the processor, from here on; a session that is this program's alone does so inside.

    Where others of its session compute, such as training in the background of the same terminal, the session keeps its
    share and niceness decides within it. Systems without niceness share as they do.
    """
    if hasattr(os, "nice"):
        os.nice(LOWEST)
    former = _session_niceness()
    if former is None or not _has_session_alone():
        yield
        return
    with suppress(OSError):  # a system that does not allow it shares as it does
        AUTOGROUP.write_text(str(LOWEST))
    try:
        yield
    finally:
        with suppress(OSError):
            AUTOGROUP.write_text(former)


def _session_niceness() -> str | None:
    """The niceness of this session among others; None where there is no such thing."""
    try:
        enabled = Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() == "1"
        return AUTOGROUP.read_text().split()[-1] if enabled else None
    except (OSError, IndexError):
        return None


def _has_session_alone() -> bool:
    """Whether this process and those that it was started by, such as a shell, are the only ones of their session."""
    session, family, process = os.getsid(0), {os.getpid()}, os.getppid()
    while process > 1 and process not in family:
        family.add(process)
        process = _parent(process)
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) not in family:
            with suppress(OSError):  # it has ended
                if os.getsid(int(entry.name)) == session:
                    return False
    return True


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0
