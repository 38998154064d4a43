"""What must never lose work: signals to a whole group, dead workers, a second copy, rotten files, changed photographs.

Programs run as a scheduler runs them, in a group of their own, and are ended as schedulers end them.
"""

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
from typing import Any

import pytest
import torch
from PIL import Image

from graf.app import hooks, training_run
from graf.config import Config
from graf.evaluation.fidelity import read_scores
from graf.evaluation.renderer import Renderer
from graf.models.generator import Generator
from graf.runtime import interrupt, trackers
from graf.runtime.checkpoint import SaveError, read_checkpoint
from graf.runtime.memory_settings import MemorySettings
from graf.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"
BARE = ("training.fid_every=0", "training.sample_every=0", "training.monitoring=[]")
ENDLESS = (*BARE, "training.max_iterations=1000000")

pytestmark = pytest.mark.usefixtures("signals_as_in_a_terminal")


@pytest.fixture
def train(run_program, smoke_run):
    """train.py on configs/smoke.yaml in tmp_path, with the photographs of the shared run; returns the exit code."""
    return lambda *arguments: run_program("train.py", "--config", SMOKE, f"data.datadir={smoke_run.data}", *arguments)


@pytest.fixture
def run_in_group(smoke_run, tmp_path) -> Callable[..., contextmanager]:
    """Starts the real program in a process group of its own, which is gone at the end."""

    @contextmanager
    def run(*arguments: str) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(SMOKE), f"data.datadir={smoke_run.data}"]
        process = subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    return run


def read_rows(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [row for row in map(json.loads, lines) if "loss_d" in row]


def wait_for_rows(process: subprocess.Popen[str], folder: Path, count: int = 3) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").read_text().count("\n") >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail("the program has not begun to train")


def children_of(pid: int) -> list[int]:
    """The processes of a process, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def newest_iteration(folder: Path) -> int:
    return max(int(file.stem.split("_")[1]) for file in (folder / "checkpoints").glob("model_0*.pt"))


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_group_saves_and_leaves_nothing_behind(run_in_group, tmp_path, number):
    run = tmp_path / "results" / "smoke"
    before = set(os.listdir("/dev/shm"))
    with run_in_group(*ENDLESS, "training.nworkers=2", "data.cache_mib=0") as process:
        wait_for_rows(process, run)
        workers = children_of(process.pid)
        assert len(workers) >= 2
        os.killpg(process.pid, number)
        time.sleep(0.5)
        if process.poll() is None:
            os.killpg(process.pid, number)  # some send it twice
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr
    assert f"{number.name}: " in stderr
    assert "saving; again to stop without" in stderr
    iteration = read_rows(run)[-1]["iteration"]
    assert f"stopped after iteration {iteration} ({number.name}); resume with: " in stdout
    assert read_checkpoint(run / "checkpoints" / f"model_{iteration:08d}.pt")["meta"]["iteration"] == iteration
    assert not [pid for pid in workers if is_running(pid)]
    assert set(os.listdir("/dev/shm")) <= before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_though_nobody_reads_the_answer_any_more(smoke_run, tmp_path, number):
    """A terminal that closes takes the other end of the output with it, and Ctrl-C the `tee` behind a pipe."""
    run, (reader, writer) = tmp_path / "results" / "smoke", os.pipe()
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(SMOKE), f"data.datadir={smoke_run.data}"]
    process = subprocess.Popen([*command, *ENDLESS], cwd=tmp_path, stdout=writer, stderr=writer, start_new_session=True)
    os.close(writer)
    try:
        deadline = time.monotonic() + 60
        while not read_rows(run) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.close(reader)
        process.send_signal(number)
        assert process.wait(60) == 75
    finally:
        process.kill()
    assert newest_iteration(run) == read_rows(run)[-1]["iteration"]


@pytest.mark.skipif(shutil.which("nohup") is None, reason="needs nohup")
def test_under_nohup_a_closed_terminal_changes_nothing(smoke_run, tmp_path):
    run = tmp_path / "results" / "smoke"
    command = ["nohup", sys.executable, str(ROOT / "train.py"), "--config", str(SMOKE)]
    command += [f"data.datadir={smoke_run.data}", *BARE, "training.max_iterations=40"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not read_rows(run) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert newest_iteration(run) == 40


def test_a_later_second_signal_stops_at_once(run_in_group, tmp_path):
    run = tmp_path / "results" / "smoke"
    # a step that takes long: the first signal waits for it, the second one does not
    slow = ("training.batch_size=40", "nerf.N_samples=96", "nerf.netwidth=128", "nerf.netdepth=8", "training.chunk=256")
    before = set(os.listdir("/dev/shm"))
    with run_in_group(*ENDLESS, *slow, "training.nworkers=1", "data.cache_mib=0") as process:
        deadline = time.monotonic() + 60
        while not (run / "config.yaml").is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(3)
        workers = children_of(process.pid)
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(3.5)
        os.killpg(process.pid, signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert workers
    assert not [pid for pid in workers if is_running(pid)]
    assert set(os.listdir("/dev/shm")) <= before
    assert stderr.splitlines()[-1].startswith("error: interrupted before the step was finished")


@pytest.mark.parametrize(("flags", "code"), [((), 0), (("--max_minutes", "1e-9"), 75)])
def test_once_all_is_saved_signals_leave_the_trackers_alone_and_the_run_ends_as_it_would(
    train, monkeypatch, capfd, flags, code
):
    closed: list[str] = []

    class Slow(trackers.TensorBoard):
        """Takes as long to finish as W&B where the network is slow."""

        def close(self) -> None:
            closed.append("begun")
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            closed.append("ended")

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", ("TensorBoard", Slow))
    monkeypatch.setattr(interrupt, "SAME_REQUEST", -1.0)  # the second one comes later
    keys = ("training.fid_every=0", "training.sample_every=0", "training.monitoring=[tensorboard]")
    assert train(*keys, *flags) == code
    assert closed == ["begun"]
    printed = capfd.readouterr()
    assert "SIGINT: all is saved, closing the records; again to stop without" in printed.err
    assert "the trackers were left before they had finished" in printed.err
    assert "nothing was saved" not in printed.err
    assert "run folder: " in printed.out


@pytest.mark.parametrize(("flags", "code"), [((), 75), (("--exit_zero_when_stopped",), 0)])
def test_a_stopped_run_has_an_exit_code_of_its_own(train, flags, code):
    assert train(*BARE, *flags, "--max_minutes", "1e-6") == code
    assert train(*BARE, *flags, "--max_iterations", "3") == 0


@pytest.mark.parametrize("iteration", [3, 6], ids=["in between", "at the end"])
def test_a_signal_during_scoring_is_heeded_between_images_and_the_score_is_made_up_for(
    train, tmp_path, monkeypatch, iteration
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rendered: list[int] = []
    original = Renderer._render_one

    def watch(renderer, *arguments):
        images = original(renderer, *arguments)
        if renderer.before_image is not None and (tmp_path / "results/smoke/metrics.jsonl").is_file():
            rendered.append(int(read_rows(tmp_path / "results" / "smoke")[-1]["iteration"]))
            if rendered.count(iteration) == 20:  # two rows of eight views, and then images to score
                os.kill(os.getpid(), signal.SIGTERM)
        return images

    run = tmp_path / "results" / "smoke"
    with monkeypatch.context() as patch:
        patch.setattr(Renderer, "_render_one", watch)
        assert train() == 75
    assert rendered.count(iteration) == 20
    stopped = read_checkpoint(run / "checkpoints" / f"model_{iteration:08d}.pt")["objects"]["progress"]
    assert (stopped["iteration"], stopped["scored"]) == (iteration, 3 if iteration == 6 else -1)
    assert train() == 0
    assert [row["iteration"] for row in read_scores(run / "scores.jsonl")] == [3, 6]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if row.get("kind") == "scores"] == [3, 6]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for kind in ("rgb", "depth", "opacity"):
        assert [event.step for event in events.Images(f"samples/{kind}")] == [1, 3, 6]
    assert train() == 0  # and now nothing is left
    assert [row["iteration"] for row in read_scores(run / "scores.jsonl")] == [3, 6]


def ask_to_stop(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail(*_: Any) -> None:
    raise OSError(5, "Input/output error", "photographs")


@pytest.mark.parametrize(
    ("place", "name", "happens", "code"),
    [(hooks, "fixed_showcase", ask_to_stop, 75), (Trainer, "run", fail, 1)],
    ids=["stop", "failure"],
)
def test_what_ends_before_the_first_step_binds_the_next_start_to_nothing(
    train, tmp_path, monkeypatch, capfd, place, name, happens, code
):
    run, keys = tmp_path / "results" / "smoke", (*BARE, "training.backup_every=1", "--max_iterations", "1")
    with monkeypatch.context() as patch:
        patch.setattr(place, name, happens)
        assert train(*keys) == code
    assert not list(run.glob("checkpoints/*"))
    assert "sav" not in "".join(capfd.readouterr())
    assert train(*keys, "nerf.netwidth=24", "data.classes=[car, mug]") == 0  # other networks, other photographs
    assert newest_iteration(run) == 1


# ---------------------------------------------------------------- processes


def test_a_worker_that_dies_leads_to_a_save_and_one_message(run_in_group, tmp_path):
    run = tmp_path / "results" / "smoke"
    before = set(os.listdir("/dev/shm"))
    with run_in_group(*ENDLESS, "training.nworkers=2", "data.cache_mib=0") as process:
        wait_for_rows(process, run)
        workers = children_of(process.pid)
        os.kill([pid for pid in workers if len(children_of(pid)) == 0][-1], signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert not [pid for pid in workers if is_running(pid)]
    assert set(os.listdir("/dev/shm")) <= before
    assert stderr.splitlines()[-1].startswith("error: a process that loads photographs was killed by SIGKILL")
    assert "training.nworkers" in stderr
    assert newest_iteration(run) == read_rows(run)[-1]["iteration"]
    assert "was saved before the program ended" in stdout


def test_after_kill_9_of_the_program_alone_its_workers_go_too(run_in_group, tmp_path):
    """They ask every five seconds whether their parent lives; the next start does not wait for that."""
    run, before = tmp_path / "results" / "smoke", set(os.listdir("/dev/shm"))
    with run_in_group(*ENDLESS, "training.nworkers=2", "data.cache_mib=0") as process:
        wait_for_rows(process, run)
        workers = children_of(process.pid)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while any(map(is_running, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [pid for pid in workers if is_running(pid)]
    assert set(os.listdir("/dev/shm")) <= before


def test_a_second_copy_stops_at_once_and_says_who_is_there(run_in_group, train, tmp_path, capsys):
    run = tmp_path / "results" / "smoke"
    with run_in_group(*ENDLESS) as process:
        wait_for_rows(process, run)
        assert train(*BARE) == 1
        assert f"another process trains there (process {process.pid} on " in capsys.readouterr().err
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert train(*BARE, "--max_iterations", "1") == 0  # released by kill -9


def test_an_environment_of_several_processes_that_is_not_whole_is_refused(train, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert train(*BARE) == 1
    assert "WORLD_SIZE=2, but RANK is not set: start with torchrun" in capsys.readouterr().err


# ---------------------------------------------------------------- checkpoints


def test_after_a_damaged_checkpoint_the_same_command_goes_on_and_ends_as_if_nothing_had_been(train, tmp_path, capsys):
    keys = (*BARE, "training.save_every=1e-9")
    assert train(*keys, "--outdir", "whole", "--max_iterations", "4") == 0
    assert train(*keys, "--max_iterations", "3") == 0
    checkpoints = tmp_path / "results" / "smoke" / "checkpoints"
    newest = checkpoints / "model_00000003.pt"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    assert train(*keys, "--max_iterations", "4") == 0
    printed = capsys.readouterr()
    assert "model_00000003.pt: cannot be read" in printed.err
    assert "model_00000002.pt is used instead" in printed.err
    found, expected = (
        read_checkpoint(folder / "model_00000004.pt")["objects"]
        for folder in (checkpoints, tmp_path / "whole" / "smoke" / "checkpoints")
    )
    for name, weights in expected["generator"].items():
        assert torch.equal(found["generator"][name], weights), name


def test_a_damaged_checkpoint_is_not_kept_in_the_place_of_a_good_one(train, tmp_path):
    keys = (*BARE, "training.save_every=1e-9", "training.backup_every=0", "training.keep_checkpoints=2")
    assert train(*keys, "--max_iterations", "4") == 0
    folder = tmp_path / "results" / "smoke" / "checkpoints"
    damaged = folder / "model_00000004.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    (folder / "model_00000009.pt").write_bytes(b"")
    keys = (*keys, "training.keep_checkpoints=1", "training.save_every=1e9", "training.max_minutes=1e-6")
    assert train(*keys, "--max_iterations", "20") == 75
    refused = ["model_00000004.pt.refused", "model_00000009.pt.refused"]
    assert sorted(file.name for file in folder.iterdir()) == ["model_00000004.pt", *refused]
    assert read_checkpoint(damaged)["meta"]["iteration"] == 4


def test_a_stop_in_the_last_step_leaves_grids_and_a_backup_for_the_next_start(train, tmp_path, monkeypatch, capsys):
    keys = ("training.fid_every=0", "training.backup_every=3", "training.max_iterations=3", "training.sample_every=3")
    step = Trainer.step

    def stop_in_the_last(trainer, *batch):
        statistics = step(trainer, *batch)
        if trainer.progress.iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return statistics

    run = tmp_path / "results" / "smoke"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stop_in_the_last)
        assert train(*keys) == 75
    assert (run / "checkpoints" / "backup_00000003.pt").is_file()
    assert not list(run.glob("samples/*_00000003.png"))
    assert train(*keys) == 0
    assert len(list(run.glob("samples/*_00000003.png"))) == 3
    capsys.readouterr()
    assert train(*keys) == 0
    assert "has already run its 3 iterations" in capsys.readouterr().out


def test_a_checkpoint_without_its_description_is_refused(train, tmp_path, capsys):
    assert train(*BARE, "--max_iterations", "1") == 0
    file = tmp_path / "results" / "smoke" / "checkpoints" / "model_00000001.pt"
    contents = torch.load(file, weights_only=True)
    del contents["meta"]["config"]
    torch.save(contents | {"format": 2}, file)
    assert train(*BARE, "--max_iterations", "2") == 1
    assert "has no description of its run (config, dataset)" in capsys.readouterr().err


def test_into_another_folder_the_best_checkpoint_comes_with_its_score(train, tmp_path, smoke_run, capsys):
    newest = smoke_run.folder / "checkpoints" / "model_00000006.pt"
    best = smoke_run.folder / "checkpoints" / "model_best.pt"
    keys = ("--max_iterations", "7", "training.sample_every=0", "training.fid_every=100", "training.monitoring=[]")
    assert train("--resume", str(newest), "--outdir", "elsewhere", *keys) == 0
    brought = tmp_path / "elsewhere" / "smoke" / "checkpoints" / "model_best.pt"
    expected, found = read_checkpoint(best)["objects"]["progress"]["best"], read_checkpoint(newest)
    assert found["objects"]["progress"]["best"] == expected
    assert brought.is_file()
    alone = tmp_path / "alone.pt"
    shutil.copy(newest, alone)
    assert train("--resume", str(alone), "--trust", "--outdir", "bare", *keys, "training.fid_every=0") == 0
    assert "the best score so far starts over" in capsys.readouterr().out
    final = tmp_path / "bare" / "smoke" / "checkpoints" / "model_00000007.pt"
    assert read_checkpoint(final)["objects"]["progress"]["best"] == {}


def test_a_save_that_fails_is_tried_again(train, tmp_path, monkeypatch, caplog):
    original, failures = hooks.save_checkpoint, [SaveError("first"), SaveError("second")]

    def fail(*arguments):
        if failures:
            raise failures.pop(0)
        return original(*arguments)

    waits: list[float] = []
    monkeypatch.setattr(hooks, "save_checkpoint", fail)
    monkeypatch.setattr(hooks.time, "sleep", waits.append)
    assert train(*BARE, "--max_iterations", "1") == 0
    assert waits == list(hooks.RETRY_AFTER)
    assert "first; trying again in 1 s" in caplog.text
    failures += [SaveError(f"number {number}") for number in range(3)]
    waits.clear()
    assert train(*BARE, "--max_iterations", "2") == 1
    assert waits == list(hooks.RETRY_AFTER)
    saved = tmp_path.glob("results/smoke/checkpoints/model_*")
    assert [file.name for file in saved] == ["model_00000001.pt"]  # nor is it tried once more after that failure


def test_an_iteration_whose_best_checkpoint_is_refused_is_saved_all_the_same(train, tmp_path, monkeypatch):
    original = hooks.save_checkpoint

    def fail(path, *arguments):
        if path.name == "model_best.pt":
            raise SaveError("in use")
        return original(path, *arguments)

    monkeypatch.setattr(hooks, "save_checkpoint", fail)
    monkeypatch.setattr(hooks, "RETRY_AFTER", (0.0, 0.0))
    assert train("training.monitoring=[]", "training.backup_every=0") == 1
    saved = tmp_path.glob("results/smoke/checkpoints/*.pt")
    assert [file.name for file in saved] == ["model_00000003.pt"]


def test_learned_cameras_that_a_disk_refuses_are_written_again(train, tmp_path, monkeypatch, caplog):
    original, failures = hooks.write_atomically, [OSError(28, "No space left on device", "config.yaml")]

    def fail(path, content):
        if failures:
            raise failures.pop()
        original(path, content)

    monkeypatch.setattr(hooks, "write_atomically", fail)
    monkeypatch.setattr(hooks, "RETRY_AFTER", (0.0, 0.0))
    keys = ("data.refine_cameras=true", "training.photometric=20", "training.match_views=true")
    assert train(*BARE, *keys, "--max_iterations", "1") == 0
    assert "No space left on device: 'config.yaml'; trying again in 0 s" in caplog.text
    assert "refined_cameras:\n" in (tmp_path / "results" / "smoke" / "config.yaml").read_text()


# ---------------------------------------------------------------- what a run has learned


def test_sizes_that_memory_has_room_for_and_skipped_updates_survive(train, tmp_path, monkeypatch, capsys):
    original, failures = Generator.forward, [2]

    def fail(generator, *arguments, **keywords):
        if generator.training and torch.is_grad_enabled() and failures:
            failures.pop()
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(generator, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "forward", fail)
        assert train(*BARE, "--max_iterations", "1") == 0
    run, seen = tmp_path / "results" / "smoke", []
    saved = read_checkpoint(run / "checkpoints" / "model_00000001.pt")["objects"]["limits"]
    assert saved["memory"]["micro_batch_size"] == 1
    assert saved["skipped"] == {"d": 0, "g": 0}
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, *batch: seen.append(self.memory) or step(self, *batch))
    assert train(*BARE, "--max_iterations", "2") == 0
    assert seen.pop().micro_batch_size == 1
    assert train(*BARE, "--max_iterations", "3", "training.chunk=100") == 0  # who sets sizes gets them
    assert (seen[-1].micro_batch_size, seen[-1].chunk) == (2, 100)


def test_a_checkpoint_of_an_older_format_lets_the_budget_decide(train, tmp_path, monkeypatch):
    keys = (*BARE, "training.memory_budget=2GiB")
    assert train(*keys, "--max_iterations", "1") == 0
    file = tmp_path / "results" / "smoke" / "checkpoints" / "model_00000001.pt"
    contents = torch.load(file, weights_only=True)
    for name in ("limits", "statistics"):
        del contents["objects"][name]
    torch.save(contents | {"format": 2}, file)
    asked: list[str] = []

    def note(config: Config, trainer: Trainer, *_: Any) -> MemorySettings:
        asked.append(config.expname)
        return trainer.memory

    monkeypatch.setattr(training_run, "choose_for_budget", note)
    assert train(*keys, "--max_iterations", "2") == 0
    assert asked == ["smoke"]


def test_a_budget_is_decided_once_and_again_where_it_is_another_one(train, monkeypatch, capsys):
    """The same command goes on with the sizes that a full memory has taught it, however it names the budget."""
    assert train(*BARE, "training.memory_budget=2GiB", "--max_iterations", "1") == 0
    assert "the fastest that fits training.memory_budget=2GiB" in capsys.readouterr().out
    monkeypatch.setattr(training_run, "choose_for_budget", lambda *_, **__: pytest.fail("decided again"))
    assert train(*BARE, "--memory_budget", "2GiB", "--max_iterations", "2") == 0
    assert "the fastest that fits" not in capsys.readouterr().out
    asked: list[str] = []

    def note(config: Config, trainer: Trainer, *_: Any) -> MemorySettings:
        asked.append(config.expname)
        return trainer.memory

    monkeypatch.setattr(training_run, "choose_for_budget", note)
    assert train(*BARE, "--memory_budget", "1GiB", "--max_iterations", "3") == 0
    assert asked == ["smoke"]


def test_after_a_resume_every_line_has_every_statistic(train, tmp_path):
    keys = (*BARE, "training.reg_every=4")
    assert train(*keys, "--outdir", "whole", "--max_iterations", "4") == 0
    assert train(*keys, "--max_iterations", "2") == 0
    assert train(*keys, "--max_iterations", "4") == 0
    whole, parts = (read_rows(tmp_path / folder / "smoke") for folder in ("whole", "results"))
    for row, resumed in zip(whole, parts, strict=True):
        assert row["penalty"] == resumed["penalty"]
        assert not [name for name in row.keys() - resumed.keys() if not name.startswith(("memory_", "seconds_"))]


def test_a_line_that_a_kill_has_cut_is_repaired(train, tmp_path):
    assert train(*BARE, "--max_iterations", "2") == 0
    metrics = tmp_path / "results" / "smoke" / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + b'{"iteration": 3, "loss')
    assert train(*BARE, "--max_iterations", "3") == 0
    assert [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()] == [1, 2, 3]
    metrics.write_bytes(metrics.read_bytes()[:-1])  # the last newline alone is missing
    assert train(*BARE, "--max_iterations", "4") == 0
    assert [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4]


# ---------------------------------------------------------------- photographs


def save_photographs(folder: Path, classes: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for photograph in range(count):
            colour = (40 * number, 20 * photograph, 90)
            Image.new("RGB", (32, 32), colour).save(folder / name / f"{photograph}.png")
    return folder


@pytest.fixture
def train_folder(run_program, tmp_path):
    """train.py on photographs in class folders."""
    keys = (f"data.datadir={tmp_path / 'photos'}", "data.type=image_folder", "data.heldout_every=0", *BARE)
    return lambda *arguments: run_program("train.py", "--config", SMOKE, *keys, *arguments)


def test_photographs_of_one_class_may_move(run_program, tmp_path):
    """Their class is named after their folder: a job may find them in another place each time."""
    keys = ("data.type=image_folder", "data.heldout_every=0", *BARE)
    run = tmp_path / "results" / "smoke" / "checkpoints"
    for number, place in enumerate(("first", "second"), start=1):
        for name in ("a", "b", "c", "d"):
            file = tmp_path / place / f"{name}.png"
            file.parent.mkdir(exist_ok=True)
            Image.new("RGB", (32, 32), (40, 90, 30)).save(file)
        where = f"data.datadir={tmp_path / place}"
        assert run_program("train.py", "--config", SMOKE, where, *keys, "--max_iterations", number) == 0
        names = read_checkpoint(run / f"model_{number:08d}.pt")["meta"]["dataset"]["class_names"]
        assert list(names) == [place]


@pytest.mark.parametrize("key", ["data.cache_mib=0", "data.near=2.4"])
def test_a_key_that_chooses_no_photographs_accepts_none(train_folder, tmp_path, capsys, key):
    folder = save_photographs(tmp_path / "photos", {"cat": 4, "dog": 4})
    assert train_folder("--max_iterations", "1") == 0
    (folder / "cat" / "0.png").unlink()
    assert train_folder("--max_iterations", "2", key) == 1
    assert "--accept_new_data" in capsys.readouterr().err


def test_renamed_classes_never_inherit_what_another_has_learned(train_folder, tmp_path, capsys):
    photos = save_photographs(tmp_path / "photos", {"cat": 4, "dog": 4})
    assert train_folder("--max_iterations", "1") == 0
    (photos / "cat").rename(photos / "zebra")
    for flags in ((), ("--accept_new_data",)):
        assert train_folder("--max_iterations", "2", *flags) == 1
        error = capsys.readouterr().err
        assert "cat is missing and zebra is new" in error
        assert "--resume none" in error
    (photos / "zebra").rename(photos / "cat")
    assert train_folder("--max_iterations", "2") == 0


def test_changed_photographs_are_accepted_when_asked(train_folder, tmp_path, capsys):
    photos = save_photographs(tmp_path / "photos", {"cat": 4, "dog": 4})
    assert train_folder("--max_iterations", "1") == 0
    (photos / "cat" / "0.png").unlink()
    assert train_folder("--max_iterations", "2") == 1
    assert "8 photographs then, 7 now" in (error := capsys.readouterr().err)
    assert "--accept_new_data" in error
    assert train_folder("--max_iterations", "2", "--accept_new_data") == 0
    printed = capsys.readouterr().out
    assert "accepted from the next checkpoint on. Training may have seen some of those that are held out" in printed
    assert train_folder("--max_iterations", "3") == 0  # said once: the checkpoint knows them now
    assert "accepted" not in capsys.readouterr().out
    assert train_folder("--max_iterations", "4", "data.heldout_every=4") == 0  # another split, asked for
    assert "7 photographs then, 5 now" in (printed := capsys.readouterr().out)
    assert "Training may have seen some of those that are held out from now on" in printed
    checkpoints = tmp_path / "results" / "smoke" / "checkpoints"
    assert read_checkpoint(checkpoints / "model_00000004.pt")["meta"]["photographs"]["exchanged"]


def test_a_photograph_that_vanishes_in_mid_run_costs_no_iteration(train_folder, tmp_path, monkeypatch, capsys):
    photos = save_photographs(tmp_path / "photos", {"cat": 4})
    original = Trainer.step

    def step(trainer, *batch):
        if trainer.progress.iteration == 1:
            for file in (photos / "cat").iterdir():
                file.unlink()
        return original(trainer, *batch)

    monkeypatch.setattr(Trainer, "step", step)
    assert train_folder("data.cache_mib=0", "--max_iterations", "9") == 1
    assert newest_iteration(tmp_path / "results" / "smoke") == 2
    assert "none of its 4 photographs can be read any more" in capsys.readouterr().err.splitlines()[-1]


def test_a_disk_that_fails_while_drawing_costs_no_iteration(train, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device", "rgb.png")

    monkeypatch.setattr(hooks, "save_png", fail)
    assert train("training.fid_every=0", "training.monitoring=[]", "training.sample_every=2") == 1
    assert newest_iteration(tmp_path / "results" / "smoke") == 1
    assert "No space left on device" in capsys.readouterr().err
