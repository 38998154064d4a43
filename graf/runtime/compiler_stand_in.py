"""Something in place of torch's compiler, for a while in which nothing is compiled.

torch's optimisers and some of its functions import the compiler, which takes a second, only in order to tell it that
they are not for compiling. A program that is over in a few seconds can do without. (What it would have been told inside
is not told again: who compiles an optimiser's step later in the same program has its bookkeeping compiled too.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

NAME = "torch._dynamo"


@contextmanager
def without_compiler() -> Iterator[None]:
    """Inside, torch does not import its compiler, unless it needs more of it than to say that it is not wanted."""
    if NAME in sys.modules:
        yield
        return
    _install(_StandIn(NAME))
    try:
        yield
    finally:
        _remove()


class _NoOptions:
    """None of the compiler's options is set."""

    def __getattr__(self, name: str) -> None:
        return None


class _StandIn(ModuleType):
    """What torch asks of its compiler where nothing is compiled; asked for more it makes room for the real one."""

    config = _NoOptions()

    @staticmethod
    def disable(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        return function

    @staticmethod
    def graph_break(*_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # asked by Python itself; the path by imports of parts of it
            raise AttributeError(name)
        _remove()
        return getattr(import_module(NAME), name)


def _install(module: ModuleType) -> None:
    sys.modules[NAME] = module
    torch._dynamo = module  # type: ignore[attr-defined, assignment]


def _remove() -> None:
    """Take the stand-in away, if it is still there."""
    if isinstance(sys.modules.get(NAME), _StandIn):
        del sys.modules[NAME]
    if isinstance(vars(torch).get("_dynamo"), _StandIn):
        del torch._dynamo  # type: ignore[attr-defined]
