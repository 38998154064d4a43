"""Every failure: one last line that starts with "error: ", an exit code, and nothing lost."""

import errno
import hashlib
import importlib
import io
import os
import pkgutil
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import graf
from graf.app import builders, training_run
from graf.app.command_line import main
from graf.app.failures import ErrorLog, explain_failure, run_command
from graf.base.errors import UserError
from graf.base.files import create_folder
from graf.models.generator import Generator
from graf.runtime import logs
from graf.runtime.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"
BARE = ("training.fid_every=0", "training.sample_every=0", "training.monitoring=[]")


@pytest.fixture
def train(run_program, smoke_run):
    """train.py on configs/smoke.yaml in tmp_path, with the photographs of the shared run; returns the exit code."""
    return lambda *arguments: run_program("train.py", "--config", SMOKE, f"data.datadir={smoke_run.data}", *arguments)


@pytest.fixture
def read_error(capsys) -> Callable[[], str]:
    """What a failed program said after "error: ", which must be all there is besides progress bars and warnings."""

    def read() -> str:
        stderr = capsys.readouterr().err
        assert "Traceback" not in stderr
        said = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(said) == 1, stderr
        assert stderr.splitlines()[-1] == said[0]
        return said[0]

    return read


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def save_photographs(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


# ---------------------------------------------------------------- the table of the README


def test_a_batch_too_big_for_the_data_set_is_a_config_error_before_anything_is_built(run_program, read_error, tmp_path):
    assert run_program("train.py", "--config", SMOKE, "training.batch_size=64") == 1
    error = read_error()
    assert "training.batch_size=64: the data set has 48 images" in error
    assert "training.batch_size=48 or training.drop_last=false" in error
    assert list(tmp_path.iterdir()) == []


def test_a_batch_too_big_for_a_folder_is_found_before_the_networks_are_built(train, read_error, tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "build_generator", lambda *_: pytest.fail("built"))
    assert train("training.batch_size=45") == 1  # 48 photographs, of which 6 are held out
    assert "training.batch_size=45: the data set has 42 images" in read_error()
    assert not (tmp_path / "results").exists()


OUT_OF_MEMORY = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nlong advice"),
    "cpu": RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
}


@pytest.mark.parametrize("device", OUT_OF_MEMORY)
@pytest.mark.parametrize(
    ("place", "name", "start", "keys"),
    [
        (Generator, "forward", "even at the smallest size; lower ray_sampler.N_samples", ["nerf.netwidth"]),
        (
            builders,
            "build_generator",
            "where nothing can be halved; in training lower",
            ["nerf.netwidth", "batch_size"],
        ),
    ],
    ids=["a phase with nothing left to shrink", "networks"],
)
def test_out_of_memory_names_the_keys_to_lower(train, read_error, monkeypatch, device, place, name, start, keys):
    def fail(*_):
        raise OUT_OF_MEMORY[device]

    monkeypatch.setattr(place, name, fail)
    assert train(*BARE) == 1
    line = read_error()
    assert line.startswith(f"error: out of memory {start}")
    assert all(key in line for key in keys)
    assert "long advice" not in line


@pytest.mark.parametrize("device", ["cuda", "cuda:97", "mps"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(train, read_error, tmp_path, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has MPS")
    assert train("--device", device) == 1
    error = read_error()
    assert f"device '{device}' is not available; this machine offers " in error
    assert "auto" in error
    assert not (tmp_path / "results").exists()


def test_missing_inception_weights_are_found_out_before_the_first_step(train, read_error, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert train("evaluation.feature_extractor=inception", "evaluation.download=false") == 1
    error = read_error()
    assert "no Inception weights" in error
    assert "evaluation.feature_extractor=offline" in error
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["data.type=image_folder"], "no photographs"),
        (["data.type=turntable", "data.v_list=[0.3]"], "expected"),
        (["data.type=transforms"], "transforms_train.json"),
    ],
)
@pytest.mark.parametrize("exists", [True, False], ids=["empty", "missing"])
def test_an_empty_or_missing_folder_is_named(run_program, read_error, tmp_path, keys, expected, exists):
    if exists:
        (tmp_path / "photos").mkdir()
    assert run_program("train.py", "--config", SMOKE, "data.datadir=photos", *keys) == 1
    error = read_error()
    assert "photos" in error
    assert expected in error if exists else "does not exist" in error
    assert not (tmp_path / "results").exists()


def test_a_corrupt_image_is_an_error_when_strict_and_else_reported(run_program, read_error, capsys, tmp_path):
    folder = save_photographs(tmp_path / "photos", 8)
    broken = folder / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    keys = ["data.datadir=photos", "data.type=image_folder", *BARE, "--max_iterations", "1"]
    assert run_program("train.py", "--config", SMOKE, *keys, "data.strict=true") == 1
    error = read_error()
    assert "3.png" in error
    assert "data.strict=true" in error
    assert not (tmp_path / "results").exists()
    assert run_program("train.py", "--config", SMOKE, *keys) == 0
    assert "1 unreadable photographs: 3.png" in capsys.readouterr().err


def test_an_interrupted_run_without_a_checkpoint_cannot_be_looked_at_yet(run_program, read_error, tmp_path, smoke_run):
    run = tmp_path / "results" / "young"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text((smoke_run.folder / "config.yaml").read_text())
    assert run_program("eval.py") == 1
    error = read_error()
    assert "young" in error
    assert "no checkpoint yet" in error


def test_an_interrupt_before_the_first_step_says_that_nothing_was_saved(train, read_error, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(builders, "open_photographs", interrupt)
    assert train() == 130
    assert "interrupted before" in read_error()


def test_a_full_disk_leaves_the_last_checkpoint_which_resumes(train, read_error, tmp_path):
    assert train(*BARE, "--max_iterations", "1") == 0
    checkpoints = tmp_path / "results" / "smoke" / "checkpoints"
    before = digests(checkpoints)
    size = (checkpoints / "model_00000001.pt").stat().st_size
    with files_limited_to(size // 2):
        assert train(*BARE, "--max_iterations", "3") == 1
    error = read_error()
    assert "model_00000003.pt: the checkpoint could not be written" in error
    assert "the previous checkpoint is intact" in error
    assert digests(checkpoints) == before
    assert read_checkpoint(checkpoints / "model_00000001.pt")["meta"]["iteration"] == 1
    assert train(*BARE, "--max_iterations", "3") == 0
    assert set(digests(checkpoints)) == {"model_00000001.pt", "model_00000003.pt"}


# ---------------------------------------------------------------- divergence


def test_a_diverged_run_stops_with_the_tensors_name_and_saves_nothing(train, read_error, tmp_path):
    assert train(*BARE, "--max_iterations", "2") == 0
    checkpoints = tmp_path / "results" / "smoke" / "checkpoints"
    before = digests(checkpoints)
    assert train(*BARE, "--max_iterations", "9", "training.lr_d=1e30") == 1
    error = read_error()
    assert "is not finite; the last checkpoint is untouched" in error
    assert "iteration 3: loss_d" in error or "iteration 2: loss_g" in error
    assert "training.lr_d" in error
    assert digests(checkpoints) == before


# ---------------------------------------------------------------- config, checkpoints, files


def test_a_misspelt_key_ends_the_real_program_with_one_line(run_command_line, tmp_path):
    process = run_command_line("train.py", "--config", str(SMOKE), "training.batchsize=4", cwd=tmp_path)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stdout == ""
    assert stderr == "error: training.batchsize=4: unknown key; did you mean training.batch_size?\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--max_iterations", "0"], "training.max_iterations=0"),
        (["--device", "tpu"], "training.device='tpu'"),
        (["nerf.field=foo", "data.type=turntable", "data.datadir=nowhere"], "nerf.field='foo': expected one of mlp, "),
        (["nerf.N_samples"], "expected section.key=value"),
        (["ray_sampler.N_samples=1000"], "try 1024"),
        (["--resume", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
    ],
)
def test_a_wrong_command_line_is_one_line(train, read_error, arguments, expected):
    assert train(*arguments) == 1
    assert expected in read_error()


def test_a_missing_config_names_the_nearest_one(run_program, read_error):
    assert run_program("train.py", "--config", "configs/smok.yaml") == 1
    assert "did you mean" in (error := read_error())
    assert "smoke.yaml" in error


def test_a_checkpoint_of_another_network_is_refused_before_it_is_loaded(train, read_error, tmp_path):
    assert train(*BARE, "--max_iterations", "1") == 0
    checkpoints = tmp_path / "results" / "smoke" / "checkpoints"
    config = (tmp_path / "results" / "smoke" / "config.yaml").read_text()
    before = digests(checkpoints)
    assert train(*BARE, "--max_iterations", "2", "nerf.netwidth=48") == 1
    assert "a checkpoint of another config" in read_error()
    assert digests(checkpoints) == before
    assert (tmp_path / "results" / "smoke" / "config.yaml").read_text() == config


def test_checkpoints_that_are_all_cut_short_are_one_line(train, read_error, tmp_path):
    assert train(*BARE, "training.save_every=1e-9", "--max_iterations", "2") == 0
    for file in (tmp_path / "results" / "smoke" / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:5000])
    assert train(*BARE, "--max_iterations", "3") == 1
    error = read_error()
    assert "none of its checkpoints can be read (model_00000002.pt, model_00000001.pt)" in error
    assert error.endswith("train anew with --resume none")


def test_a_folder_that_cannot_be_written_is_one_line(train, read_error, tmp_path):
    (tmp_path / "taken").write_text("")
    assert train(*BARE, "--outdir", "taken") == 1
    assert read_error().startswith("error: taken/smoke: cannot be written (Not a directory); choose another folder")


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--run", "run"],
        ["mesh", "run"],
        ["invert", "run", "photo.png"],
        ["card", "run"],
        ["export", "run", "--transforms", "2"],
    ],
    ids=lambda command: command[0],
)
def test_results_that_cannot_be_written_are_told_before_they_are_computed(
    smoke_run, tmp_path, monkeypatch, read_error, command
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(smoke_run.folder, "run", ignore=shutil.ignore_patterns("eval"))
    Path("run", "eval").touch()
    Image.new("RGB", (32, 32)).save("photo.png")
    monkeypatch.setattr(Generator, "forward", lambda *_: 1 / 0)
    assert main(command) == 1
    error = read_error()
    assert error.startswith("error: run/eval")
    assert "cannot be written (" in error


# ---------------------------------------------------------------- what nobody foresaw


def test_what_nobody_foresaw_is_one_line_and_keeps_its_traceback_in_the_run_folder(train, read_error, monkeypatch):
    monkeypatch.setattr(builders, "build_pose_sampler", lambda *_: 1 / 0)
    assert train() == 1
    file = Path("results", "smoke", "error.log")
    assert read_error() == f"error: unexpected ZeroDivisionError: division by zero (its traceback is in {file})"
    traceback = file.read_text()
    assert traceback.startswith("Traceback (most recent call last):\n")
    assert "1 / 0" in traceback
    assert traceback.endswith("ZeroDivisionError: division by zero\n")


def test_before_the_run_folder_is_known_debug_shows_the_traceback(train, read_error, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(training_run, "pick_device", lambda *_: 1 / 0)
    assert train() == 1
    assert read_error().endswith("division by zero (run again with --debug for its traceback)")
    assert train("--debug") == 1
    *traceback, line = capsys.readouterr().err.splitlines()
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[-1] == "ZeroDivisionError: division by zero"
    assert line == "error: unexpected ZeroDivisionError: division by zero (its traceback is above)"
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_a_foreseen_failure_was_noticed_too(train, capsys):
    assert train("--debug", "nerf.netwidth=0") == 1
    *traceback, line = capsys.readouterr().err.splitlines()
    assert "Traceback (most recent call last):" in traceback
    assert line.startswith("error: nerf.netwidth=0: ")


def test_a_full_disk_under_the_logs_is_one_line_and_no_defect(train, read_error, monkeypatch):
    def fail(path: Path, _: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(logs, "_append_line", fail)
    assert train(*BARE) == 1
    file = Path("results", "smoke", "metrics.jsonl")
    assert read_error().startswith(f"error: {file}: No space left on device; free some space, or ")
    assert not file.with_name("error.log").exists()


def test_a_traceback_that_cannot_be_written_either_is_still_one_line(train, read_error, monkeypatch, tmp_path):
    (tmp_path / "results" / "smoke" / "error.log").mkdir(parents=True)
    monkeypatch.setattr(builders, "build_pose_sampler", lambda *_: 1 / 0)
    assert train() == 1
    error = read_error()
    assert error.startswith("error: unexpected ZeroDivisionError: division by zero (")
    assert "error.log cannot be written" in error
    assert "--debug" in error


def test_a_long_message_that_nobody_foresaw_is_cut_to_its_first_line(read_error):
    def command(_: ErrorLog) -> None:
        raise RuntimeError("first\nsecond")

    assert run_command(command, debug=False, interrupted="") == 1
    assert read_error() == "error: unexpected RuntimeError: first (run again with --debug for its traceback)"


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_request_to_stop_does_not_cut_the_message_short(read_error, in_thread):
    """As a launcher sends it to those that are left, while they wait for each other's words."""

    def command(errors: ErrorLog) -> int:
        errors.tells = lambda _: in_thread or os.kill(os.getpid(), signal.SIGTERM) is None
        raise UserError("process 1 of 2 has ended")

    run = partial(run_command, command, debug=False, interrupted="")
    if in_thread:  # where signals are not heard
        with ThreadPoolExecutor() as pool:
            assert pool.submit(run).result() == 1
    else:
        assert run() == 1
    assert read_error() == "error: process 1 of 2 has ended"


def test_sigterm_ends_a_command_as_ctrl_c_does_with_the_code_that_shells_expect(read_error, tmp_path):
    def command(_: ErrorLog) -> None:
        with create_folder(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    former = signal.getsignal(signal.SIGTERM)
    assert run_command(command, debug=False, interrupted="interrupted; nothing was written") == 143
    assert read_error() == "error: interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is former


class LostReader(io.StringIO):
    """Standard error of a program whose terminal has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (UserError("no"), 1), (ValueError("bug"), 1)])
@pytest.mark.parametrize("debug", [False, True])
def test_last_words_that_nobody_reads_change_no_exit_code_and_no_error_log(tmp_path, monkeypatch, error, code, debug):
    def command(log: ErrorLog) -> int:
        log.folder = tmp_path
        raise error

    monkeypatch.setattr(sys, "stderr", LostReader())
    assert run_command(command, debug=debug, interrupted="interrupted") == code
    assert (tmp_path / "error.log").is_file() == isinstance(error, ValueError)


def test_a_program_without_readers_exits_with_the_code_of_its_failure():
    """Python itself tries at its end to write what is left, and exits with 120 where it cannot."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", "nowhere"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(command, stdout=writer, stderr=writer, env=buffered) as process:
        os.close(writer)
        assert process.wait(30) == 1


PRINTING = """
import os, sys
from graf.app.failures import run_command
def command(_):
    if sys.argv[1] == "own":
        reader, writer = os.pipe()
        os.close(reader)
        os.write(writer, b"a process that has died")
    for _ in range(5000):
        print("what a command has to say")
    return 0
sys.exit(run_command(command, debug=False, interrupted=""))
"""


@pytest.mark.parametrize(
    ("broken", "code", "said"), [("output", 141, ""), ("own", 1, "error: unexpected BrokenPipeError")]
)
def test_output_that_nobody_reads_any_more_ends_a_command_without_a_word(broken, code, said):
    command = [sys.executable, "-c", PRINTING, broken]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        if broken == "output":
            assert process.stdout.readline() == "what a command has to say\n"
            process.stdout.close()
        stderr = process.stderr.read()
        assert stderr.startswith(said) if said else stderr == ""
        assert process.wait(30) == code


def test_only_failures_that_a_person_can_put_right_are_foreseen():
    assert explain_failure(ZeroDivisionError("a bug")) is None
    assert explain_failure(OSError(errno.ENOSPC, "No space left on device")) is None  # of which nobody knows the place
    assert explain_failure(OSError(errno.EIO, "Input/output error", "a")) is None
    for number in (errno.EACCES, errno.EROFS):
        said = explain_failure(OSError(number, "why", "a"))
        assert said == "a: why; allow it, or choose another place, and run the same command again"
    assert explain_failure(UserError("one line")) == "one line"


def test_every_error_of_the_project_is_a_user_error_but_those_that_never_leave_their_module():
    errors = {}
    for module in pkgutil.walk_packages(graf.__path__, "graf."):
        for name, kind in vars(importlib.import_module(module.name)).items():
            if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__.startswith("graf."):
                errors[name] = kind
    assert len(errors) > 10
    stay_inside = {"BrokenSeal", "Interrupted", "NoDevice", "PeerOutOfMemory", "UnreadableImage", "YamlProblem"}
    assert {name for name, kind in errors.items() if not issubclass(kind, UserError)} == stay_inside


@pytest.mark.parametrize("nworkers", [0, 1])
def test_a_damaged_photograph_of_a_strict_set_is_one_line_whoever_reads_it(run_program, read_error, tmp_path, nworkers):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    content = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(content[: len(content) // 2])
    keys = [
        "data.type=image_folder",
        f"data.datadir={folder}",
        "data.imsize=16",
        "data.strict=true",
        "data.cache_mib=0",
    ]
    keys += ["data.heldout_every=0", "training.fid_every=0", f"training.nworkers={nworkers}"]
    assert run_program("train.py", "--config", SMOKE, "--device", "cpu", *keys) == 1
    error = read_error()
    assert error.startswith(f"error: {folder}/2.png cannot be read")
    assert "data.strict=true" in error
