"""A killed and resumed run is the unbroken one, bit for bit, wherever it was killed and whatever was switched on.

`pytest -m long tests/test_exact_resume.py` adds sixty kills at random moments of one run.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graf.app import hooks
from graf.models.generator import Generator
from graf.runtime.checkpoint import read_checkpoint
from graf.training.players import Player
from graf.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"

#: everything that has a state or an order of its own
EVERYTHING = (
    *(
        "training.nworkers=1",
        "data.cache_mib=0",
        "training.use_amp=true",
        "training.amp_dtype=bfloat16",
        "training.micro_batch_size=1",
        "training.optimizer=adam",
    ),
    *("training.max_iterations=8", "training.sample_every=3", "training.fid_every=4", "training.backup_every=2"),
    *("training.lr_schedule=points", "training.lr_points=[[0, 0.2], [5, 1], [8, 0.5]]", "training.scale_lr=sqrt"),
    *("training.lr_batch_size=1", "training.layer_norms=true"),
    *("training.reg_every=3", "training.match_views=true", "training.photometric=20", "training.save_every=1e9"),
    *("nerf.field=triplane", "nerf.plane_resolution=8", "nerf.N_importance=4", "data.refine_cameras=true"),
    *("ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1", "ccsr.agreement=1", "ccsr.photometric=10"),
    *("ccsr.start_iteration=3", "ccsr.every=2", "discriminator.spectral_norm=true"),
    # of one instance the truth would be drawn for minutes
    *("data.synthetic.instances=2", "data.synthetic.count=48", "data.classes=[car,duck]"),
    *("training.sample_objects=2", "training.empty_cache=never"),
)
#: what measures time, or the machine
TIMES = ("time", "images_per_second", "seconds", "memory_", "iterations_per")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Where the photographs of these runs are kept."""
    return tmp_path_factory.mktemp("photographs")


@pytest.fixture
def train(run_program, data) -> Callable[..., int]:
    return lambda *keys: run_program("train.py", "--config", SMOKE, f"data.datadir={data}", *EVERYTHING, *keys)


def state_of(folder: Path, iteration: int = 8) -> dict[str, Any]:
    """Everything that a run has at its end but times: objects, rows of metrics and scores."""
    objects = read_checkpoint(folder / "checkpoints" / f"model_{iteration:08d}.pt")["objects"]
    del objects["progress"]["seconds"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]
    scores = (folder / "scores.jsonl").read_text().splitlines() if (folder / "scores.jsonl").is_file() else []
    return {"objects": objects, "metrics": rows, "scores": [json.loads(line) for line in scores]}


def assert_equal(first: Any, second: Any, where: str) -> int:
    """Nested dicts and lists with bit for bit equal tensors; returns how many values were compared."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
        return 1
    if isinstance(first, dict):
        assert first.keys() == second.keys(), f"{where}: {first.keys() ^ second.keys()}"
        return sum(assert_equal(first[key], second[key], f"{where}.{key}") for key in first)
    if isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        return sum(assert_equal(a, b, f"{where}.{n}") for n, (a, b) in enumerate(zip(first, second, strict=True)))
    assert first == second, where
    return 1


def kill_in(patch: pytest.MonkeyPatch, place: Any, name: str, when: Callable[..., bool], after: bool) -> None:
    """Kill the program before, or after, a call that `when` chooses."""
    original = getattr(place, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        chosen = when(*arguments)
        if chosen and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **keywords)
        if chosen:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    patch.setattr(place, name, call)


def train_until_killed(train: Callable[..., int], *keys: str) -> None:
    """Train in a process of its own, which dies by kill -9: none of its files is tidied up, its workers are left."""
    pid = os.fork()
    if pid == 0:
        try:
            train(*keys)
        finally:
            os._exit(3)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status), os.waitstatus_to_exitcode(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


#: moment -> (class, method, which call of it, killed after it)
MOMENTS = {
    "in the middle of an epoch": (Trainer, "step", lambda t, *_: t.progress.iteration == 2, False),
    "after sampling": (hooks.SampleHook, "write", lambda _, iteration, *__: iteration == 6, True),
    "after scoring": (hooks.ScoreHook, "_score", lambda _, t: t.progress.iteration == 4, True),
    "after a checkpoint": (hooks.CheckpointHook, "save", lambda _, t, name: t.progress.iteration == 4, True),
    "between D and G of the first step of super-resolution": (
        *(Player, "apply", lambda player, terms, iteration, *_: player.suffix == "g" and iteration == 3),
        False,
    ),
    "after the last step": (hooks.SampleHook, "write", lambda _, iteration, *__: iteration == 8, False),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data) -> dict[str, Any]:
    """The unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    command = [sys.executable, ROOT / "train.py", "--config", SMOKE, f"data.datadir={data}", *EVERYTHING]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return state_of(folder / "results" / "smoke")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_anywhere_ends_as_the_unbroken_one(train, whole, tmp_path, monkeypatch, moment):
    with monkeypatch.context() as patch:
        kill_in(patch, *MOMENTS[moment])
        train_until_killed(train)
    assert train() == 0
    assert assert_equal(state_of(tmp_path / "results" / "smoke"), whole, "run") > 500


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_sizes_learned_from_a_full_memory_are_resumed_bit_for_bit(train, tmp_path, monkeypatch):
    """Parts of a batch are rounded otherwise than the whole; the resumed run has to split as the first one did."""
    original = Generator.forward

    def fail(generator, z, *arguments, **keywords):
        if torch.is_grad_enabled() and len(z) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(generator, z, *arguments, **keywords)

    keys = ("training.micro_batch_size=2", "training.batch_size=2")
    with monkeypatch.context() as patch:
        patch.setattr(Generator, "forward", fail)
        assert train(*keys, "--outdir", "whole") == 0
        kill_in(patch, *MOMENTS["after a checkpoint"])
        train_until_killed(train, *keys)
    assert train(*keys) == 0
    found, expected = (state_of(tmp_path / name / "smoke") for name in ("results", "whole"))
    assert_equal(found, expected, "run")


# ---------------------------------------------------------------- kills at random moments


def run_until_killed(
    command: list[Any], cwd: Path, number: int, moment: random.Random, when: str
) -> tuple[int | None, bool]:
    """Start a program in its own group and kill the group at a random moment.

    when: "starting", "training", or "saving", which waits for a save to be under way. Returns its exit code, None where
    it was killed by -9, and whether a save was.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    checkpoints, metrics = cwd / "results/smoke/checkpoints", cwd / "results/smoke/metrics.jsonl"
    size = metrics.stat().st_size if metrics.is_file() else 0
    while when != "starting" and process.poll() is None:
        now = metrics.stat().st_size if metrics.is_file() else 0
        if now > size:
            break  # the first step of this start
        size = now  # a resumed run first drops the lines after its checkpoint
        time.sleep(0.01)
    deadline = time.monotonic() + moment.uniform(0, 6 if when == "starting" else 2)
    in_a_save = False
    while process.poll() is None and time.monotonic() < deadline and not in_a_save:
        in_a_save = when == "saving" and any(checkpoints.glob(".*.saving"))
        if not in_a_save:
            time.sleep(0.0005 if when == "saving" else 0.01)
    if process.poll() is None:
        os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr, stderr
    return None if process.returncode == -signal.SIGKILL else process.returncode, in_a_save


@pytest.mark.parametrize(
    ("kills", "iterations"), [(2, 30), pytest.param(30, 900, marks=pytest.mark.long)], ids=["few", "many"]
)
def test_after_kills_at_random_moments_the_same_command_ends_as_the_undisturbed_run(
    tmp_path, data, kills, iterations, capsys
):
    keys = (*EVERYTHING, "training.save_every=0.3", f"training.max_iterations={iterations}")
    keys += (f"training.backup_every={iterations // 5}", f"training.sample_every={iterations // 3}")
    keys += (f"training.fid_every={iterations // 3}",)
    command = [sys.executable, ROOT / "train.py", "--config", SMOKE, f"data.datadir={data}", *keys]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed.mkdir()
    killed.mkdir()
    subprocess.run(command, cwd=undisturbed, check=True, capture_output=True)
    moment, survived = random.Random(0), {"SIGKILL": 0, "SIGTERM": 0, "starting": 0, "training": 0, "saving": 0}
    for attempt in range(2 * kills):
        number = (signal.SIGKILL, signal.SIGTERM)[attempt % 2]
        when = ("saving", "training", "training", "starting", "saving")[attempt % 5]
        code, in_a_save = run_until_killed(command, killed, number, moment, when)
        before_it_listened = when == "starting" and code == -signal.SIGTERM
        assert code in (None, 75, 0) or before_it_listened, code
        if code == 0:
            break  # the run is over
        survived[number.name] += 1
        survived["training" if when == "saving" and not in_a_save else when] += 1
    done = subprocess.run(command, cwd=killed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    states = [state_of(folder / "results" / "smoke", iterations) for folder in (killed, undisturbed)]
    folders = [folder / "results" / "smoke" / "checkpoints" for folder in (killed, undisturbed)]
    backups = [sorted(file.name for file in folder.glob("backup_*")) for folder in folders]
    assert len(backups[0]) == 5
    assert backups[0] == backups[1]
    compared = assert_equal(*states, "run")
    with capsys.disabled():
        print(f"\nsurvived {survived}; {compared} values equal")
    assert survived["SIGKILL"] + survived["SIGTERM"] == 2 * kills
