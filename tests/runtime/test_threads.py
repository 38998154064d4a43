"""Claims about cores: quotas of both versions of control groups, nested ones, affinity; and the threads that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from graf.runtime import control_groups, threads
from graf.runtime.device import configure_backends

#: a quota of so many microseconds in 100,000, as each version writes it, in the files of a group
V2 = {"cpu.max": "{} 100000"}
V1 = {"cpu.cfs_quota_us": "{}", "cpu.cfs_period_us": "100000"}


@pytest.fixture
def write_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """This process is in /job/step, of which the system has `entry`; groups are written by hand, 64 cores allowed."""
    monkeypatch.setattr(control_groups, "CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(control_groups, "OWN_CONTROL_GROUPS", tmp_path / "own")
    monkeypatch.setattr(threads, "count_allowed_cpus", lambda: 64)

    def write(entry: str, group: str, files: dict[str, str], quota: str) -> None:
        (tmp_path / "own").write_text(f"9:pids:/other\n{entry}\n")
        folder = tmp_path / "groups" / ("" if entry.startswith("0::") else "cpu") / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text.format(quota) + "\n")

    return write


@pytest.fixture
def threads_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(threads.VARIABLE)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)


VERSIONS = pytest.mark.parametrize(
    ("entry", "files", "unlimited"), [("0::/job/step", V2, "max"), ("4:cpu,cpuacct:/job/step", V1, "-1")]
)


@VERSIONS
def test_the_smallest_quota_of_a_group_and_those_around_it_counts(write_group, entry, files, unlimited):
    write_group(entry, "", files, unlimited)
    assert threads.count_usable_cpus() == 64
    write_group(entry, "job", files, "1000000")
    write_group(entry, "job/step", files, unlimited)
    assert threads.count_usable_cpus() == 10, "of the group around it"
    write_group(entry, "job/step", files, "250000")
    assert threads.count_usable_cpus() == 2, "its own; half a core is not a thread's"
    write_group(entry, "job/step", files, "20000")
    assert threads.count_usable_cpus() == 1


@VERSIONS
def test_a_container_that_sees_its_own_group_as_the_root_has_its_quota(write_group, entry, files, unlimited):
    write_group(entry.replace("/job/step", "/docker/not/seen/here"), "", files, "300000")
    assert threads.count_usable_cpus() == 3


@pytest.mark.parametrize("text", ["", "many 100000", "100000 0", "100000"])
def test_a_quota_that_cannot_be_read_is_none(write_group, text):
    write_group("0::/", "", {"cpu.max": text}, "")
    assert threads.count_usable_cpus() == 64


def test_the_affinity_counts_where_it_is_less_than_the_quota(monkeypatch, write_group):
    write_group("0::/", "", V2, "800000")
    monkeypatch.setattr(threads, "count_allowed_cpus", lambda: 3)
    assert threads.count_usable_cpus() == 3
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {4, 5}, raising=False)
    monkeypatch.undo()
    assert 1 <= threads.count_usable_cpus() <= threads.count_allowed_cpus()


def test_a_system_without_groups_or_affinity_has_its_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(control_groups, "OWN_CONTROL_GROUPS", tmp_path / "absent")
    monkeypatch.delattr(threads.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 12)
    assert threads.count_usable_cpus() == 12


@pytest.mark.usefixtures("threads_restored")
def test_torch_computes_with_as_many_threads_as_the_quota_has_cores_for(write_group):
    torch.set_num_threads(6)
    write_group("0::/", "", V2, "400000")
    configure_backends(torch.device("cpu"))
    assert torch.get_num_threads() == 4
    configure_backends(torch.device("cpu"), processes=3)
    assert torch.get_num_threads() == 1
    assert threads.describe_threads(3) == "1 for computing in each of 3 processes, cores for 1"


@pytest.mark.usefixtures("threads_restored")
def test_fewer_threads_than_cores_are_not_raised(write_group):
    torch.set_num_threads(2)
    write_group("0::/", "", V2, "800000")
    threads.limit_threads()
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize(
    ("processes", "count", "expected"),
    [
        (2, 1, "as torchrun does where nobody has set it, but cores for 4: start with OMP_NUM_THREADS=4"),
        (1, 1, "1 for computing, by OMP_NUM_THREADS=1, but cores for 8: start with OMP_NUM_THREADS=8"),
        (2, 6, "6 for computing in each of 2 processes, by OMP_NUM_THREADS=6, but cores for 4: start"),
        (2, 4, "4 for computing in each of 2 processes, cores for 4"),
    ],
)
def test_what_the_environment_says_stands_and_is_told_where_it_does_not_fit(
    monkeypatch, write_group, processes, count, expected
):
    monkeypatch.setenv(threads.VARIABLE, str(count))
    torch.set_num_threads(count)
    write_group("0::/", "", V2, "800000")
    configure_backends(torch.device("cpu"), processes=processes)
    assert torch.get_num_threads() == count
    text = threads.describe_threads(processes)
    assert expected in text
    assert "\n" not in text


def test_a_task_of_slurm_has_its_own_cores_and_torchruns_processes_share_theirs(monkeypatch, write_group) -> None:
    write_group("0::/", "", V2, "max")
    monkeypatch.setattr(threads, "count_allowed_cpus", lambda: 8)  # srun binds every task to cores of its own
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert threads.share_of_cpus(4) == 8
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "42")
    assert threads.share_of_cpus(4) == 2


def test_a_run_says_once_how_many_threads_it_has_and_cores_for_how_many(smoke_run) -> None:
    lines = [line for line in smoke_run.stdout.splitlines() if line.startswith("threads: ")]
    cores = threads.count_usable_cpus()
    advice = f", by OMP_NUM_THREADS=1, but cores for {cores}: start with OMP_NUM_THREADS={cores}"
    assert lines == ["threads: 1 for computing" + (advice if cores > 1 else ", cores for 1")]
