"""Claims about the console, the one-time messages and the records of a run."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from graf.base.extras import name_install_command
from graf.runtime import logs
from graf.runtime.logs import RunLog, drop_rows_after, info_once, setup_console, warn_once

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logs, "_said", set())
    handlers, level = list(logs.logger.handlers), logs.logger.level
    yield
    logs.logger.handlers[:] = handlers
    logs.logger.setLevel(level)


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def make_log(folder: Path, start: int = 0, **options: Any) -> RunLog:
    return RunLog(folder, total=1000, start=start, **{"monitoring": (), "progress": False, **options})


# --- console --------------------------------------------------------------------------------------------------------


def test_each_line_is_shown_once_however_often_the_console_is_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    setup_console()
    setup_console()
    logging.getLogger("graf").info("hello")
    logging.getLogger("graf.data").warning("3 files skipped")
    logging.getLogger("graf").debug("detail")
    captured = capsys.readouterr()
    assert captured.out == "hello\n"
    assert captured.err == "warning: 3 files skipped\n"


def test_all_but_the_first_process_say_their_number_in_warnings_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "_silent_bars", set())
    setup_console(1)
    for name in ("graf", "graf.base"):  # rooms below this one use its children
        logging.getLogger(name).info("hello")
        logging.getLogger(name).warning("of %s", name)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "warning: process 1: of graf\nwarning: process 1: of graf.base\n"


def test_lines_without_a_reader_are_dropped_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as pipe:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, write_through=True))
        setup_console()
        for line in ("one", "two"):
            logging.getLogger("graf").info(line)
        logging.getLogger("graf").warning("three")
    assert capsys.readouterr().err == "warning: three\n"


def test_a_line_leaves_the_progress_bar_in_one_piece(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_console()
    with make_log(tmp_path, progress=True) as log:
        log.progress(10, "loss 1")
        logging.getLogger("graf").info("sampled")
    captured = capsys.readouterr()
    assert captured.out.strip() == "sampled"
    assert "10/1000" in captured.err.splitlines()[-1]


def test_a_progress_bar_that_is_not_wanted_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(logs.progress_bar(range(3), disable=True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(logs.progress_bar(range(3))) == [0, 1, 2]
    assert "0/3" in capsys.readouterr().err


def test_a_broken_log_call_is_reported_and_does_not_stop_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("graf", logging.INFO, __file__, 1, "%d", ("not a number",), None)
    logs.ConsoleHandler().handle(record)
    assert "Logging error" in capsys.readouterr().err


@pytest.mark.parametrize(("say", "level"), [(warn_once, logging.WARNING), (info_once, logging.INFO)])
def test_a_message_is_said_once_per_key(say: Any, level: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "graf"):
        for _ in range(2):
            say("100% float32")
            say("chunk 512", key="chunk")
            say("chunk 256", key="chunk")
    assert caplog.messages == ["100% float32", "chunk 512"]
    assert {record.levelno for record in caplog.records} == {level}


# --- metrics.jsonl --------------------------------------------------------------------------------------------------


def test_scalars_are_on_disk_as_one_json_object_a_line_before_the_log_closes(tmp_path: Path) -> None:
    started = time.time()
    with make_log(tmp_path / "run") as log:
        log.scalars(10, {"loss/g": 0.5, "count": 3})
        log.scalars(20, {"loss/g": np.float32(0.25)})
        lines = read_lines(tmp_path / "run")
    assert [{key: line[key] for key in line if key != "time"} for line in lines] == [
        {"iteration": 10, "loss/g": 0.5, "count": 3.0},
        {"iteration": 20, "loss/g": 0.25},
    ]
    assert all(started - 1 <= line["time"] <= time.time() + 1 for line in lines)


def test_numbers_that_are_not_finite_are_strings_in_strict_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    with make_log(tmp_path) as log:
        log.scalars(1, {"a": float("nan"), "b": float("inf"), "c": float("-inf")})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["a"], line["b"], line["c"]) == ("nan", "inf", "-inf")


@pytest.mark.parametrize("name", ["iteration", "time"])
def test_a_scalar_may_not_take_a_reserved_name(tmp_path: Path, name: str) -> None:
    with make_log(tmp_path) as log, pytest.raises(ValueError, match=name):
        log.scalars(1, {name: 2.0})


def test_a_resumed_run_continues_where_its_checkpoint_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with make_log(tmp_path) as log:
        for iteration in (10, 20, 30, 40):
            log.scalars(iteration, {"attempt": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 15, "ti')  # a kill in the middle of a line
    with caplog.at_level(logging.INFO, "graf"), make_log(tmp_path, start=20) as log:
        log.scalars(30, {"attempt": 2.0})
    lines = [(line["iteration"], line["attempt"]) for line in read_lines(tmp_path)]
    assert lines == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert "3 lines past iteration 20 dropped" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_with_nothing_to_drop_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n')
    before = path.stat().st_ino, path.stat().st_mtime_ns
    drop_rows_after(path, 1)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before
    drop_rows_after(tmp_path / "absent.jsonl", 1)
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics\.jsonl") as caught:
        log.scalars(1, {"a": 1.0})
    assert caught.value.errno == errno.ENOSPC
    log.close()


# --- progress bar ---------------------------------------------------------------------------------------------------


def test_the_bar_shows_iteration_of_total_time_left_and_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with make_log(tmp_path, start=500, progress=True) as log:
        log.progress(510, {"loss": 0.123456, "kid": 1e-5})
    last = capsys.readouterr().err.splitlines()[-1]
    assert "510/1000" in last
    assert "loss 0.1235  kid 1e-05" in last
    assert "<" in last, "elapsed<remaining"


def test_without_progress_nothing_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with make_log(tmp_path) as log:
        log.progress(10, "text")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


# --- TensorBoard and W&B --------------------------------------------------------------------------------------------


def read_events(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    if tag in events.Tags()["images"]:
        return [(event.step, event.width) for event in events.Images(tag)]
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_gets_scalars_and_images_and_hides_what_a_resume_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with make_log(tmp_path, monitoring=["tensorboard", "jsonl"]) as log:
        for iteration in (10, 20, 30):
            log.scalars(iteration, {"loss/g": 1.0})
        log.image(20, "samples", np.zeros((4, 6, 3), np.uint8))
    with make_log(tmp_path, start=20, monitoring=["tensorboard"]) as log:
        log.scalars(30, {"loss/g": 2.0})
    assert read_events(tmp_path, "loss/g") == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert read_events(tmp_path, "samples") == [(20, 6)]


def test_tensorboard_has_every_step_once_where_a_kill_came_before_the_first_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for value in (1.0, 2.0):
        with make_log(tmp_path, monitoring=["tensorboard"]) as log:
            log.scalars(1, {"loss/g": value})
    assert read_events(tmp_path, "loss/g") == [(1, 2.0)]


def test_tensorboard_has_every_step_once_where_a_kill_came_between_a_line_and_its_scores(tmp_path: Path) -> None:
    """The scores of the iteration that was reached had been written, but not saved: they are measured again."""
    pytest.importorskip("tensorboard")
    with make_log(tmp_path, monitoring=["tensorboard"]) as log:
        for iteration in (10, 20):
            log.scalars(iteration, {"loss/g": iteration})
            log.scores(iteration, {"fid": iteration})
            log.image(iteration, "samples/rgb", np.zeros((4, 6, 3), np.uint8))
        log.scalars(30, {"loss/g": 30})
    Image.new("RGB", (6, 4)).save(tmp_path / "rgb.png")
    pictures = {"samples/rgb": tmp_path / "rgb.png", "samples/depth": tmp_path / "removed.png"}
    with make_log(tmp_path, start=20, scored=10, pictures=pictures, monitoring=["tensorboard"]) as log:
        log.scores(20, {"fid": 20})
        log.scalars(30, {"loss/g": 30})
    assert read_events(tmp_path, "loss/g") == [(10, 10), (20, 20), (30, 30)]
    assert read_events(tmp_path, "fid") == [(10, 10), (20, 20)]
    assert read_events(tmp_path, "samples/rgb") == [(10, 6), (20, 6)]
    rows = [(row["iteration"], row.get("kind")) for row in read_lines(tmp_path)]
    assert rows == [(10, None), (10, "scores"), (20, None), (20, "scores"), (30, None)]


def test_a_tensorboard_that_cannot_write_is_said_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with make_log(tmp_path, monitoring=["tensorboard"]) as log:
        log.scalars(1, {"loss": 1.0})
        log.flush()
        monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
        for iteration in (2, 3):
            log.scalars(iteration, {"loss": 1.0})
        log.flush()
    assert caplog.text.count("TensorBoard cannot write (No space left on device)") == 1
    assert [row["iteration"] for row in read_lines(tmp_path)] == [1, 2, 3]


class FakeWandb(types.ModuleType):
    """Records what a run sends."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **options: Any) -> FakeWandb:
        self.started.append(options)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    def Image(self, pixels: np.ndarray) -> tuple[str, tuple[int, ...]]:
        return ("picture", pixels.shape)


def test_wandb_gets_scalars_and_images_and_a_resume_continues_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with make_log(tmp_path, monitoring=["wandb"]) as log:
        log.scalars(10, {"loss": 1.0})
        log.image(10, "samples", np.zeros((4, 6, 3), np.uint8))
    make_log(tmp_path, start=10, monitoring=["wandb"]).close()
    assert wandb.logged == [(10, {"loss": 1.0}), (10, {"samples": ("picture", (4, 6, 3))})]
    assert wandb.finished == 2
    assert wandb.started[0]["id"] == wandb.started[1]["id"]
    assert wandb.started[0]["resume"] == "allow"


def test_a_wandb_that_cannot_start_is_said_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def refuse(**_: Any) -> None:
        raise RuntimeError("no login")

    monkeypatch.setattr(wandb, "init", refuse)
    for start in (0, 1):
        with make_log(tmp_path, start=start, monitoring=["wandb"]) as log:
            log.scalars(start + 1, {"a": 1.0})
    assert caplog.messages == ["monitoring: W&B could not start (no login); the run goes on without it"]
    assert len(read_lines(tmp_path)) == 2


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("tensorboard", "torch.utils.tensorboard", "pip install tensorboard"),
        ("wandb", "wandb", name_install_command("track")),
        ("trackio", "trackio", name_install_command("track")),
    ],
)
def test_a_monitor_that_is_not_installed_is_said_once_and_the_run_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    module: str,
    command: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for _ in range(2):
        with make_log(tmp_path, monitoring=[name]) as log:
            log.scalars(1, {"a": 1.0})
            log.image(1, "samples", np.zeros((2, 2, 3), np.uint8))
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert "is not installed" in caplog.text
    assert command in caplog.text


def test_an_unknown_monitor_is_an_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'comet' is unknown; expected some of tensorboard, wandb, trackio, jsonl"):
        make_log(tmp_path, monitoring=["comet"])


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 3), np.float32), np.zeros((3, 4, 4), np.uint8), np.zeros((4, 4))])
def test_an_image_of_another_type_or_layout_is_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    with make_log(tmp_path) as log, pytest.raises(ValueError, match="expected uint8"):
        log.image(1, "samples", pixels)


def test_closing_twice_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log = make_log(tmp_path, monitoring=["tensorboard"])
    log.scalars(1, {"a": 1.0})
    log.close()
    written = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert len(written) == 2  # metrics.jsonl and TensorBoard's events
    log.close()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == written


def test_importing_this_room_imports_no_monitor_and_opening_one_adds_no_root_handler(tmp_path: Path) -> None:
    program = (
        "import logging, sys, pathlib\n"
        "import graf.runtime.logs as logs\n"
        "assert not {'tensorboard', 'wandb', 'trackio', 'torch'} & set(sys.modules), 'slow import'\n"
        "logs.RunLog(pathlib.Path(sys.argv[1]), total=1, start=0, monitoring=['tensorboard'], progress=False).close()\n"
        "assert not logging.root.handlers, 'every line would be shown twice'\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
