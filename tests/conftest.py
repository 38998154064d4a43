"""Every test starts from one global random state; whole-program tests share one smoke run and run programs here."""

import importlib.util
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from graf.runtime import logs
from graf.runtime.distributed import Launch, Processes
from graf.runtime.interrupt import STOP_SIGNALS
from graf.runtime.live_tensors import LiveTensorMeter

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"

#: (program, "train.py" or "eval.py", and its command line) -> exit code
RunProgram = Callable[..., int]


torch.set_num_threads(1)  # tests run side by side
os.environ["OMP_NUM_THREADS"] = "1"  # and so do the programs that they start
# The first backward pass of a process starts a thread for each kind of device. After fake tensors (torch 2.14) it takes
# pretended ones for real, and forks of a process with such threads may not differentiate: so it happens here.
torch.ones((), requires_grad=True).backward()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are cores: some tests wait, for a signal, a disk or a lock."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


@pytest.fixture(autouse=True)
def _seeded_torch() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def signals_as_in_a_terminal() -> Iterator[None]:
    """No signal to stop is ignored, here or in programs started here, though the tests themselves run under nohup."""
    usual: dict[int, Any] = {number: signal.SIG_DFL for number in STOP_SIGNALS}
    usual[signal.SIGINT] = signal.default_int_handler
    former = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@dataclass(frozen=True)
class SmokeRun:
    """A finished run of configs/smoke.yaml: its working directory, run folder, data folder and what it printed."""

    cwd: Path
    folder: Path
    data: Path
    stdout: str
    stderr: str


def start_program(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """`python train.py ...` or `python eval.py ...` as a person types it, with warnings as errors."""
    program, *rest = arguments
    of_torch = "ignore:Implicitly cleaning up:ResourceWarning"  # torch 2.6 leaves a temporary folder to the end
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-W", of_torch, str(ROOT / program), *rest],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="session")
def run_command_line() -> Callable[..., subprocess.Popen[str]]:
    """:func:`start_program`; test files cannot import this one."""
    return start_program


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """configs/smoke.yaml trained once through the real command line; tests only add files to its eval folder."""
    cwd = tmp_path_factory.mktemp("smoke")
    process = start_program("train.py", "--config", str(SMOKE), cwd=cwd)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return SmokeRun(cwd, cwd / "results" / "smoke", cwd / "data", stdout, stderr)


class SmallDevice(LiveTensorMeter):
    """A device that can hold so many bytes of tensors; `track` what lives on it already."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def _see(self, tensor: torch.Tensor) -> None:
        super()._see(tensor)
        if self.current > self.limit:
            raise torch.cuda.OutOfMemoryError(f"CUDA out of memory: {self.current:.0f} of {self.limit:.0f} bytes")


@pytest.fixture
def small_device() -> type[LiveTensorMeter]:
    """:class:`SmallDevice`, a context in which memory really runs out."""
    return SmallDevice


@pytest.fixture
def restored_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A program's `main` may run here: it starts in tmp_path, and what it sets for its process is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logs, "_said", set())
    logger, handlers, level, environment = logs.logger, list(logs.logger.handlers), logs.logger.level, dict(os.environ)
    yield
    torch.set_flush_denormal(False)
    for name in os.environ.keys() - environment.keys():  # the allocator's variable
        del os.environ[name]
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture
def run_program(restored_process: None) -> RunProgram:
    """Runs a program's `main` in this process, in tmp_path, and puts the process back as it was."""

    def run(program: str, *arguments: str) -> int:
        spec = importlib.util.spec_from_file_location(Path(program).stem + "_program", ROOT / program)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return int(module.main([str(argument) for argument in arguments]))

    return run


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work_in_process(launch: Launch, timeout: float, work: Callable[[Processes], Any], pipe: Any) -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = launch.address.split(":")
    try:
        pipe.send(work(launch.join("cpu", timeout)))
    except BaseException as error:
        pipe.send(error)
    time.sleep(3600)  # the first one keeps the store until all are done


@pytest.fixture
def run_processes() -> Callable[..., list[Any]]:
    """`work(processes)` in each of several processes that are joined by gloo; their results, or errors, by rank.

    They are forks of this one: nothing is imported again, and closures need not be pickled; results are.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs processes that are copies of this one")
    context = multiprocessing.get_context("fork")

    def run(size: int, work: Callable[[Processes], Any], timeout: float = 60.0) -> list[Any]:
        port, children = free_port(), []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (Launch(rank, size, rank, size, f"127.0.0.1:{port}"), timeout, work, there)
            child = context.Process(target=_work_in_process, args=arguments, daemon=True)
            with warnings.catch_warnings():  # Python 3.12: of threads, which the children do without
                warnings.simplefilter("ignore", DeprecationWarning)
                child.start()
            there.close()
            children.append((child, here))
        results = []
        for _, pipe in children:
            assert pipe.poll(timeout + 60), "a process has not come to its end"
            try:
                results.append(pipe.recv())
            except EOFError:  # it has been killed
                results.append(None)
        for child, pipe in children:
            child.kill()
            child.join()
            pipe.close()
        return results

    return run
