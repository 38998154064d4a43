"""The C library's allocator, which tensors on a CPU come from: whether memory that is freed stays at hand.

glibc gives a large tensor's memory back to Linux when it is freed, and Linux clears every page of it again when the
next step asks for as much. Kept, a step takes 3 to 10 percent less, more with larger batches. It is given back where
caches of a GPU are, by `graf.runtime.memory.release_cache`. Elsewhere than on Linux with glibc nothing is changed.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from graf.runtime.logs import info_once

#: mallopt's numbers for: from how many bytes on memory is mapped by itself; how many free ones at the end are kept
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
#: above any tensor of a step; and the most that an old glibc takes, which then keeps all but the largest ones
_LARGE = (2**30, 2**25)
_NEVER = -1
#: where glibc's own thresholds, which follow what is freed, end up in a program that frees tensors of all sizes
_USUAL = ((_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**26))
#: variables by which a person tunes the allocator, or takes another one, and what their values then hold
_VARIABLES = {
    "MALLOC_MMAP_THRESHOLD_": "",
    "MALLOC_TRIM_THRESHOLD_": "",
    "MALLOC_TOP_PAD_": "",
    "GLIBC_TUNABLES": "glibc.malloc.",
    "LD_PRELOAD": "malloc",
}


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed; returns whether it does. What a person has set in the environment stands."""
    mallopt = _find("mallopt")
    if mallopt is None:
        return False
    for name, part in _VARIABLES.items():
        if os.environ.get(name) and part in os.environ[name]:
            info_once(f"{name} is set: memory that a step frees is kept or given back as it says")
            return False
    return any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGE) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))


def free_as_usual() -> None:
    """Undo :func:`keep_freed_memory`: what is freed goes back to the system where glibc itself would give it back."""
    mallopt, release = _find("mallopt"), find_release()
    if mallopt is not None and release is not None:
        for threshold in _USUAL:
            mallopt(*threshold)
        release()


def find_release() -> Callable[[], None] | None:
    """What gives freed memory back to the system; None where the C library has no such call."""
    malloc_trim = _find("malloc_trim")
    return None if malloc_trim is None else lambda: malloc_trim(0)


@cache
def _find(name: str) -> Any:
    """A function of glibc, None where there is none."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
