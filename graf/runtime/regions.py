"""Names for stretches of a program, which a profiler that is recording takes down; nobody else pays for them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

#: in front of the names, to tell them from those of operators
PREFIX = "graf: "

RANDOM_NUMBERS = "random numbers"
DATA = "data"
LOGGING = "log"


def region(name: str) -> AbstractContextManager[Any]:
    """A context whose inside appears under `name` in the profile that is being recorded, if one is."""
    if not torch.autograd._profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function(PREFIX + name)
