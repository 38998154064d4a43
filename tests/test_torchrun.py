"""The real torchrun: several processes train, stop, resume and fail as one; who is gone leaves nobody waiting."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from graf.runtime.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"
BARE = ("training.fid_every=0", "training.sample_every=0", "training.monitoring=[]", "training.batch_size=4")
ENDLESS = (*BARE, "training.max_iterations=1000000")
#: seconds in which everything has to be over, whatever happens to one process
A_MINUTE = 60
#: the variable by which processes of one program know each other
MARK = "GRAF_TEST_PROGRAM"

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch connects no processes"),
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc"),
]


@contextmanager
def running(*arguments: object, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A program, of which and of whose processes nothing is left at the end."""
    command = [str(argument) for argument in arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, MARK: f"{os.getpid()}.{time.monotonic_ns()}"}
    process = subprocess.Popen(command, cwd=cwd, text=True, env=environment, **pipes)
    process.mark = environment[MARK]
    try:
        yield process
    finally:
        for number in members(process):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.communicate()


def environment_of(number: int) -> dict[str, str]:
    """What a living process was started with; empty for one that has ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{number}/environ").read_text(errors="replace").split("\0")
        return dict(line.split("=", 1) for line in lines if "=" in line)
    return {}


def members(process: subprocess.Popen[str]) -> dict[int, dict[str, str]]:
    """The living processes of a program, with their environments; torchrun gives its workers sessions of their own."""
    found = {int(folder.name): environment_of(int(folder.name)) for folder in Path("/proc").glob("[0-9]*")}
    return {number: one for number, one in found.items() if one.get(MARK) == process.mark}


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Those that train, by rank."""
    ranks = {int(one["RANK"]): number for number, one in members(process).items() if "RANK" in one}
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.fixture
def launch(smoke_run) -> Callable[..., tuple[object, ...]]:
    """The command of torchrun on configs/smoke.yaml, with the photographs of the shared run."""

    def command(size: int, *keys: object, options: tuple[str, ...] = ()) -> tuple[object, ...]:
        start = (sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={size}", "--master_port=0")
        if not options or not options[0].startswith("--nnodes"):
            start = (*start[:-1], "--standalone")
        return (*start, *options, ROOT / "train.py", "--config", SMOKE, f"data.datadir={smoke_run.data}", *keys)

    return command


def finish(process: subprocess.Popen[str], seconds: float = A_MINUTE) -> tuple[int, str, str]:
    """Exit code and what was printed, of a program that ends in time and leaves no process."""
    stdout, stderr = process.communicate(timeout=seconds)
    assert not members(process)
    return process.returncode, stdout, stderr


def rows_of(run: Path) -> list[dict]:
    with suppress(FileNotFoundError):
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return []


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = A_MINUTE) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.05)


def wait_for_rows(run: Path, process: subprocess.Popen[str], count: int = 2) -> None:
    wait_for(lambda: len(rows_of(run)) >= count, process)


def errors_of(stderr: str) -> list[str]:
    """The messages; another process's bar may stand in front of one."""
    return [line[line.index("error:") :] for line in stderr.splitlines() if "error:" in line]


def weights_of(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    state = read_checkpoint(run / "checkpoints" / f"model_{iteration:08d}.pt")["objects"]
    return {f"{name}.{key}": value for name in ("generator", "discriminator") for key, value in state[name].items()}


def test_two_processes_train_sample_score_and_go_on_as_one_three_and_none_of_it_shows(launch, tmp_path, run_program):
    keys = ("training.batch_size=6", "training.sample_every=2", "training.fid_every=4", "data.synthetic.instances=1")
    keys += ("training.save_every=1e-9", "training.keep_checkpoints=9", "training.sync_check_every=1")
    several, run = tmp_path / "several", tmp_path / "several" / "results" / "smoke"
    several.mkdir()
    for size, iterations in ((2, 2), (3, 4)):  # each goes on where the one before has stopped
        with running(*launch(size, *keys, "--max_iterations", iterations), cwd=several) as process:
            code, stdout, stderr = finish(process, 120)
        assert code == 0, stderr
        if size == 2:
            assert "2 processes share every batch of 6 images: 3 each" in stdout
        if size == 3:
            assert "resuming from" in stdout
    command = ("train.py", "--config", SMOKE, *launch(1)[-1:], *keys, "--max_iterations")
    assert run_program(*command, 5, "--outdir", several / "results") == 0
    for iterations in (2, 4, 5):
        assert run_program(*command, iterations) == 0
    alone = tmp_path / "results" / "smoke"
    expected, found = weights_of(alone, 5), weights_of(run, 5)
    # RMSprop divides tiny gradients by their own size: single weights follow the rounding of their sums, not the whole
    distance = sum(float((found[name].double() - value).square().sum()) for name, value in expected.items())
    assert distance <= 1e-6 * sum(float(value.double().square().sum()) for value in expected.values())
    for one, other in zip(rows_of(run), rows_of(alone), strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if key.startswith(("loss", "grad_norm", "penalty", "fid", "psnr", "d_", "lr")):
                assert one[key] == pytest.approx(other[key], rel=2e-2, abs=1e-4), key
    names = {file.name for file in (alone / "samples").iterdir()}
    assert {file.name for file in (run / "samples").iterdir()} == names


@pytest.mark.parametrize("rank", [0, 1])
def test_kill_9_of_one_process_ends_all_with_one_message(launch, tmp_path, rank):
    with running(*launch(2, *ENDLESS, "training.save_every=1e-9"), cwd=tmp_path) as process:
        wait_for_rows(tmp_path / "results" / "smoke", process)
        os.kill(workers(process)[rank], signal.SIGKILL)
        code, _, stderr = finish(process)
    assert code == 1
    assert len(errors_of(stderr)) == 1
    assert f"process {rank} of 2 has ended or does not answer" in errors_of(stderr)[0]
    newest = max((tmp_path / "results" / "smoke" / "checkpoints").glob("model_0*.pt"))
    assert read_checkpoint(newest)["meta"]["iteration"] >= 1


def test_with_restarts_a_run_survives_kill_9_and_ends_as_if_nothing_had_been(launch, tmp_path, run_program):
    keys = (*BARE, "training.save_every=1e-9", "training.max_iterations=30")
    run = tmp_path / "killed" / "results" / "smoke"
    (tmp_path / "killed").mkdir()
    with running(*launch(2, *keys, options=("--max-restarts=3",)), cwd=tmp_path / "killed") as process:
        wait_for_rows(run, process, 5)
        os.kill(workers(process)[1], signal.SIGKILL)
        code, stdout, stderr = finish(process, 2 * A_MINUTE)
    assert code == 0, stderr
    assert "resuming from" in stdout
    assert [row["iteration"] for row in rows_of(run)] == list(range(1, 31))
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    with running(*launch(2, *keys), cwd=undisturbed) as process:
        assert finish(process, 2 * A_MINUTE)[0] == 0
    expected = weights_of(undisturbed / "results" / "smoke", 30)
    for name, value in weights_of(run, 30).items():
        assert torch.equal(value, expected[name]), name


def test_sigterm_to_torchrun_saves_once_and_leaves_nobody(launch, tmp_path):
    run = tmp_path / "results" / "smoke"
    with running(*launch(2, *ENDLESS), cwd=tmp_path) as process:
        wait_for_rows(run, process)
        os.kill(process.pid, signal.SIGTERM)
        _, stdout, stderr = finish(process)
    assert stderr.count("SIGTERM: finishing iteration") + stderr.count("SIGTERM: saving") == 1
    assert stdout.count("resume with:") == 1
    assert errors_of(stderr) == []
    (saved,) = (run / "checkpoints").glob("model_0*.pt")
    assert read_checkpoint(saved)["meta"]["iteration"] == rows_of(run)[-1]["iteration"]


def test_a_process_that_hangs_is_named_and_ends_with_the_others(launch, tmp_path):
    with running(*launch(2, *ENDLESS, "training.process_timeout=4"), cwd=tmp_path) as process:
        wait_for_rows(tmp_path / "results" / "smoke", process)
        os.kill(workers(process)[1], signal.SIGSTOP)
        code, _, stderr = finish(process)
    assert code == 1
    assert [error[:51] for error in errors_of(stderr)] == ["error: process 1 of 2 has ended or does not answer "]


def test_a_failure_of_the_second_process_alone_is_told_once_and_by_its_cause(launch, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from graf.data.datasets import PhotoDataset\n"
        "from graf.data.errors import DataError\n"
        "def broken(*_):\n    raise DataError('duck.png: is not there any more')\n"
        "if os.environ['RANK'] == '1':\n    PhotoDataset.__getitem__ = broken\n"
        "from graf.app.train_command import main\n"
        "sys.exit(main(sys.argv[1:], program='python train.py'))\n"
    )
    keys = (*ENDLESS, "data.cache_mib=0")  # photographs are read as they are needed
    command = [script if argument == ROOT / "train.py" else argument for argument in launch(2, *keys)]
    with running(*command, cwd=tmp_path) as process:
        code, _, stderr = finish(process)
    assert code == 1
    assert errors_of(stderr) == ["error: duck.png: is not there any more"]


def can_mount() -> bool:
    """Whether a process here may have a file system of its own."""
    if shutil.which("unshare") is None:
        return False
    script = "mount -t tmpfs -o size=1m tmpfs /mnt"
    return subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs a file system of its own")
def test_a_full_disk_of_the_first_process_ends_all_and_the_same_command_goes_on(launch, tmp_path):
    keys = (*BARE, "training.save_every=1e-9", "training.keep_checkpoints=9", "training.max_iterations=8")
    script = """
        mkdir -p results && mount -t tmpfs -o size=700000 tmpfs results
        "$@"; echo "first $?"
        mount -o remount,size=100m results
        "$@"; echo "second $?"
        ls results/smoke/checkpoints
    """
    with running("unshare", "-rm", "sh", "-c", script, "sh", *launch(2, *keys), cwd=tmp_path) as process:
        _, stdout, stderr = finish(process, 3 * A_MINUTE)
    assert "first 1\n" in stdout, stderr
    assert len(errors_of(stderr)) == 1
    assert "No space left on device" in errors_of(stderr)[0]
    assert "resuming from" in stdout
    assert "second 0\n" in stdout
    assert "model_00000008.pt" in stdout


def test_two_machines_find_each_other(launch, tmp_path):
    port = 29500 + os.getpid() % 500
    keys = (*BARE, "--max_iterations", 2)
    options = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=two")
    command = launch(1, *keys, options=options)
    with running(*command, cwd=tmp_path) as first, running(*command, cwd=tmp_path) as second:
        ends = [finish(first), finish(second)]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert sorted(stdout.count("2 processes share every batch of 4 images: 2 each") for _, stdout, _ in ends) == [0, 1]


def test_more_processes_than_images_and_other_configurations_are_one_line(launch, tmp_path):
    with running(*launch(3, *BARE, "training.batch_size=2"), cwd=tmp_path) as process:
        code, _, stderr = finish(process)
    assert code == 1
    assert len(errors_of(stderr)) == 1
    assert "training.batch_size=2 for 3 processes: it is the whole batch" in errors_of(stderr)[0]
