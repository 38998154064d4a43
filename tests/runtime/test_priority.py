"""Giving way: what a busy core gives to a process that does, and to one that does not."""

import os
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="not Linux")

SPIN = """
import os, sys, time
from contextlib import nullcontext
from graf.runtime.priority import AUTOGROUP, give_way
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
with give_way() if sys.argv[1] == "gives way" else nullcontext():
    print("ready", flush=True)
    start, end = map(float, sys.stdin.readline().split())  # by the clock that processes share
    time.sleep(max(0, start - time.monotonic()))
    before = time.process_time()
    while time.monotonic() < end:
        pass
    print(time.process_time() - before, os.nice(0), flush=True)
print(AUTOGROUP.read_text().split()[-1:] if AUTOGROUP.exists() else [])  # empty: a session in no group
"""


@pytest.mark.parametrize("own_session", [True, False], ids=["in another terminal", "in the same terminal"])
def test_who_gives_way_takes_next_to_nothing_of_a_busy_core(own_session):
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", SPIN, how],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=own_session,
        )
        for how in ("works", "gives way")
    ]  # fmt: skip
    for process in pair:
        assert process.stdout.readline() == "ready\n"
    start = time.monotonic() + 0.2
    for process in pair:
        process.stdin.write(f"{start} {start + 1}\n")
        process.stdin.flush()
    (works, after), (gives_way, restored) = (process.communicate()[0].splitlines() for process in pair)
    taken, niceness = gives_way.split()
    assert niceness == "19"
    assert float(taken) < 0.3 * float(works.split()[0])  # half without giving way, whatever else runs
    assert restored == after  # the shell's session is as it was
