"""Run folders: where a run goes on, which run and checkpoint are the newest, and what changed in a configuration."""

import errno
import os
from pathlib import Path

import pytest
import torch

from graf.app.runs import RunFolder, choose_run_folder, describe_changes, newest_run, read_first
from graf.config import Config, ConfigError
from graf.runtime import sealed_archive
from graf.runtime.checkpoint import CheckpointError, ReadError, save_checkpoint


def make_run(folder: Path, *checkpoints: str, age: float = 0) -> RunFolder:
    """A run folder with the resolved configuration and empty checkpoint files, `age` seconds old."""
    run = RunFolder(folder)
    run.checkpoints.mkdir(parents=True)
    run.config_file.write_text(Config(expname=folder.name).to_yaml())
    for name in checkpoints:
        file = run.checkpoints / name
        file.write_bytes(b"")
        os.utime(file, (1e9 - age, 1e9 - age))
    return run


def save_best(run: RunFolder, iteration: int) -> None:
    save_checkpoint(run.checkpoints / "model_best.pt", {}, {"iteration": iteration})


@pytest.fixture
def config(tmp_path) -> Config:
    return Config.model_validate({"expname": "toys", "training": {"outdir": str(tmp_path)}})


@pytest.mark.parametrize(
    ("model", "backup", "best"), [(1000, 200, 100), (800, 1000, 200), (800, 200, 1000), (10**8, 200, 100)]
)
def test_auto_continues_from_the_highest_iteration_whatever_a_copy_did_to_the_times(
    config, tmp_path, model, backup, best
):
    assert choose_run_folder(config, "auto") == (RunFolder(tmp_path / "toys"), [])
    names = [f"model_{model:08d}.pt", f"backup_{backup:08d}.pt", "model_best.pt"]
    run = make_run(tmp_path / "toys", "model_00000007.pt", *names[:2], "someone elses.pt")
    save_best(run, best)
    os.utime(run.checkpoints / "model_00000007.pt", (2e9, 2e9))
    newest = [names[index] for index in sorted(range(3), key=(model, backup, best).__getitem__, reverse=True)]
    names = [*newest, "model_00000007.pt"]
    assert choose_run_folder(config, "auto") == (run, [run.checkpoints / name for name in names])


def test_a_best_checkpoint_that_cannot_be_read_stands_back_and_says_so(config, tmp_path, caplog):
    run = make_run(tmp_path / "toys", "model_00000007.pt", "model_best.pt")
    files = [run.checkpoints / "model_00000007.pt", run.checkpoints / "model_best.pt"]
    assert choose_run_folder(config, "auto") == (run, files)
    assert "model_best.pt: cannot be read" in caplog.text


def test_the_newest_checkpoint_that_can_be_read_is_used_and_the_others_are_reported(tmp_path, caplog):
    run = make_run(tmp_path / "toys")
    for iteration in (100, 200, 300, 400):
        save_checkpoint(run.checkpoints / f"model_{iteration:08d}.pt", {}, {"iteration": iteration})
    flipped, cut = (run.checkpoints / f"model_00000{number}00.pt" for number in (4, 3))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    file, contents = read_first(run.newest_first())
    assert (file.name, contents["meta"]) == ("model_00000200.pt", {"iteration": 200})
    assert f"{flipped}: cannot be read" in caplog.text
    assert f"{cut}: has lost its seal" in caplog.text
    assert f"{file} is used instead" in caplog.text
    for whole in ("model_00000100.pt", "model_00000200.pt"):
        (run.checkpoints / whole).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none .* \(model_00000400\.pt, .*--resume none"):
        read_first(run.newest_first())


@pytest.mark.parametrize("newest", ["model_00000300.pt", "model_best.pt"])
def test_the_newest_checkpoint_is_not_stepped_over_while_the_system_cannot_read_it(tmp_path, monkeypatch, newest):
    run = make_run(tmp_path / "toys")
    save_checkpoint(run.checkpoints / "model_00000200.pt", {}, {"iteration": 200})
    save_checkpoint(run.checkpoints / newest, {}, {"iteration": 300})

    def stale(file, *arguments):
        if Path(file).name == newest:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(file))
        return open(file, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sealed_archive, "open", stale, raising=False)
        with pytest.raises(ReadError, match=f"{newest}: could not be read"):
            read_first(run.newest_first())
    assert read_first(run.newest_first())[1]["meta"] == {"iteration": 300}


def test_the_newest_checkpoint_is_found_without_loading_any(tmp_path, monkeypatch):
    run = make_run(tmp_path / "toys")
    for iteration in (100, 200):
        save_checkpoint(run.checkpoints / f"model_{iteration:08d}.pt", {}, {"iteration": iteration})
    save_best(run, 150)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a whole file was loaded")

    monkeypatch.setattr(torch, "load", refuse)
    names = ["model_00000200.pt", "model_best.pt", "model_00000100.pt"]
    assert [file.name for file in run.newest_first()] == names


def test_what_follows_an_earlier_or_foreign_checkpoint_leaves_the_run_alone(config, tmp_path):
    run = make_run(tmp_path / "toys", "model_00000300.pt", "backup_00000100.pt")
    newest, earlier = run.checkpoints / "model_00000300.pt", run.checkpoints / "backup_00000100.pt"
    foreign = make_run(tmp_path / "other", "model_00000900.pt").checkpoints / "model_00000900.pt"
    assert choose_run_folder(config, str(newest)) == (run, [newest])
    assert choose_run_folder(config, str(earlier)) == (RunFolder(tmp_path / "toys-2"), [earlier])
    assert choose_run_folder(config, str(foreign)) == (RunFolder(tmp_path / "toys-2"), [foreign])


@pytest.mark.parametrize("checkpoint", ["model_00000200.pt", "model_best.pt", "backup_00000100.pt"])
def test_none_never_enters_a_folder_that_has_a_checkpoint(config, tmp_path, checkpoint):
    assert choose_run_folder(config, "none") == (RunFolder(tmp_path / "toys"), [])
    make_run(tmp_path / "toys", checkpoint)
    assert choose_run_folder(config, "none") == (RunFolder(tmp_path / "toys-2"), [])
    make_run(tmp_path / "toys-2", checkpoint)
    assert choose_run_folder(config, "none") == (RunFolder(tmp_path / "toys-3"), [])


def test_a_path_continues_from_that_checkpoint_in_the_configs_folder(config, tmp_path):
    other = make_run(tmp_path / "other", "model_00000007.pt")
    file = other.checkpoints / "model_00000007.pt"
    assert choose_run_folder(config, str(file)) == (RunFolder(tmp_path / "toys"), [file])
    with pytest.raises(CheckpointError, match=r"gone\.pt: no such checkpoint; expected auto, none or the path"):
        choose_run_folder(config, "gone.pt")


def test_the_best_checkpoint_is_shown_before_the_newest(tmp_path):
    run = make_run(tmp_path / "a", "model_00000200.pt", "model_00001000.pt")
    newest, oldest = run.checkpoints / "model_00001000.pt", run.checkpoints / "model_00000200.pt"
    assert run.best_first() == [newest, oldest]
    save_best(run, 400)
    assert run.best_first() == [run.checkpoints / "model_best.pt", newest, oldest]


def test_a_run_without_checkpoint_says_what_to_wait_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"young: the run has no checkpoint yet; .*training\.save_every"):
        make_run(tmp_path / "young").best_first()


def test_the_newest_run_saved_last_whatever_it_saved(tmp_path):
    make_run(tmp_path / "a", "model_00009000.pt", age=50)
    newest = make_run(tmp_path / "b", "model_best.pt", age=10)
    make_run(tmp_path / "c", "model_00000001.pt", age=90)
    make_run(tmp_path / "d")
    assert newest_run(tmp_path) == newest


def test_without_any_run_the_command_that_makes_one_is_named(tmp_path):
    (tmp_path / "not a run").mkdir()
    with pytest.raises(ConfigError, match=r"no run found; train one with train\.py"):
        newest_run(tmp_path)
    with pytest.raises(ConfigError, match=r"not a run: no run is there \(no config\.yaml\)"):
        RunFolder(tmp_path / "not a run").best_first()


def test_changes_are_listed_by_key():
    old = {"seed": 0, "nerf": {"a": 1, "b": {"c": 2}}, "gone": 5}
    new = {"seed": 0, "nerf": {"a": 3, "b": {"c": 4}}, "added": [1]}
    assert describe_changes(old, new) == ["added: None -> [1]", "gone: 5 -> None", "nerf.a: 1 -> 3", "nerf.b.c: 2 -> 4"]
    assert describe_changes(old, old) == []
