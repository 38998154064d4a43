"""Freed memory of a CPU stays at hand for the next step, and goes back to the system when it is asked to."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from graf.runtime import host_allocator, logs

resource = pytest.importorskip("resource")
#: allocates and frees 48 MiB twenty times, more than glibc keeps by itself, and prints pages that Linux had to clear
_PROGRAM = """
import resource, sys, torch
from graf.runtime import host_allocator

def count_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1])

if sys.argv[1] != "leave":
    assert host_allocator.keep_freed_memory()
if sys.argv[1] == "undo":
    host_allocator.free_as_usual()
size = 12 * 2**20
for _ in range(20):  # the heap finds its size
    torch.ones(size)
before = count_faults()
for _ in range(20):
    torch.ones(size)
faults, held = count_faults() - before, resident()
host_allocator.find_release()()
print(faults, held - resident())
"""

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_glibc = pytest.mark.skipif(host_allocator._find("mallopt") is None, reason="needs glibc")


def run_program(way: str, environment: dict[str, str]) -> tuple[int, int]:
    finished = subprocess.run(
        [sys.executable, "-c", _PROGRAM, way], capture_output=True, text=True, env=environment, check=False
    )
    assert finished.returncode == 0, finished.stderr
    faults, given_back = map(int, finished.stdout.split())
    return faults, given_back


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in host_allocator._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return dict(os.environ)


@needs_glibc
@pytest.mark.skipif(HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(), reason="pages of unknown size")
@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.35"), reason="an old glibc keeps nothing as large as this")
def test_kept_memory_is_not_cleared_again_and_can_be_given_back(environment: dict[str, str]) -> None:
    pages = 48 * 2**20 // resource.getpagesize()
    faults, given_back = run_program("keep", environment)
    assert faults < 5 * pages, "of twenty times as many"
    assert given_back > 0.9 * pages
    for way in ("leave", "undo"):
        faults, given_back = run_program(way, environment)
        assert faults > 19 * pages, "what this is good for"
        assert given_back < pages // 10


@needs_glibc
@pytest.mark.parametrize("name", host_allocator._VARIABLES)
def test_what_a_person_has_set_stands(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setattr(logs, "_said", set())
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(host_allocator, "_find", lambda function: lambda *numbers: calls.append(numbers) or 1)
    monkeypatch.setenv(name, f"lib{host_allocator._VARIABLES[name]}of.so")
    with caplog.at_level(logging.INFO, "graf"):
        assert not host_allocator.keep_freed_memory()
        assert not host_allocator.keep_freed_memory()
    assert not calls
    assert [name in message for message in caplog.messages] == [True]
    monkeypatch.delenv(name)
    assert host_allocator.keep_freed_memory()
    assert calls == [(-3, 2**30), (-1, -1)]


def test_an_old_glibc_takes_a_smaller_threshold(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    def mallopt(kind: int, value: int) -> int:
        calls.append((kind, value))
        return int(value <= 2**25)

    monkeypatch.setattr(host_allocator, "_find", lambda function: mallopt)
    assert host_allocator.keep_freed_memory()
    assert calls == [(-3, 2**30), (-3, 2**25), (-1, -1)]


def test_without_glibc_nothing_is_changed(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_allocator, "_find", lambda function: None)
    assert not host_allocator.keep_freed_memory()
    assert host_allocator.find_release() is None


@pytest.mark.parametrize(
    ("name", "value"), [("GLIBC_TUNABLES", "glibc.rtld.optional_static_tls=1"), ("LD_PRELOAD", "libgomp.so")]
)
def test_variables_that_say_nothing_of_the_allocator_do_not_count(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setattr(host_allocator, "_find", lambda function: lambda *numbers: 1)
    monkeypatch.setenv(name, value)
    assert host_allocator.keep_freed_memory()
