"""Tests of what touches torch most closely: they run from torch 1.13.1 on, and import nothing that one lacks.

They need torch, NumPy, pytest, pydantic, tqdm and PyYAML: `python -m pytest tests/compat/seams`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from graf.runtime import logs


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Messages are said anew in every test, and flags of the process put back."""
    monkeypatch.setattr(logs, "_said", set())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_flush_denormal(False)


@pytest.fixture
def leave_tier(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Hides modules of torch until the named tier is the first that is left."""

    def leave(tier: str) -> None:
        if tier != "torch.amp":
            monkeypatch.delattr(torch, "amp")
        if tier == "none":
            monkeypatch.delattr(torch.cuda, "amp")

    return leave


@pytest.fixture
def pretend_release(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has torch say that it is another version."""
    return lambda version: monkeypatch.setattr(torch, "__version__", version)
