"""`graf train --lr_range_test` as a program: what it prints and writes, where it starts, and that it leaves no run."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from graf.app.learning_rates import describe, find_checkpoints, open_start
from graf.config import load_config
from graf.runtime.checkpoint import CheckpointError
from graf.training.lr_range import RangeTest, RateRange

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "configs" / "smoke.yaml"


@pytest.fixture
def train(run_program, smoke_run):
    """train.py on configs/smoke.yaml in tmp_path, with the photographs of the shared run; returns the exit code."""
    return lambda *arguments: run_program("train.py", "--config", SMOKE, f"data.datadir={smoke_run.data}", *arguments)


def files_below(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_every_player_is_tested_and_no_run_is_left(run_program, smoke_run, tmp_path, capsys):
    keys = ["data.datadir=photographs", "data.synthetic.count=24", "data.imsize=16", "--outdir", "runs"]
    keys += ["ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1", "ccsr.start_iteration=500", "ccsr.every=2"]
    assert run_program("train.py", "--config", SMOKE, *keys, "--lr_range_test", "--range_iterations", "20") == 0
    out = capsys.readouterr().out
    for name, key in (
        ("generator", "training.lr_g"),
        ("discriminator", "training.lr_d"),
        ("super-resolution", "ccsr.lr"),
    ):
        assert re.search(rf"^{name}: (no rate .*|{re.escape(key)}=[0-9.e-]+; rates from .*)$", out, re.MULTILINE), out
    assert sorted(files_below(tmp_path / "runs")) == ["smoke_lr_range.csv", "smoke_lr_range.png"]
    assert [folder for folder in (tmp_path / "runs").iterdir() if folder.is_dir()] == []
    header, *rows = (tmp_path / "runs" / "smoke_lr_range.csv").read_text().splitlines()
    assert header == "player,learning_rate,loss,value,value_at_rest,smoothed_gain"
    judged = {"generator,loss_g", "discriminator,loss_d", "super-resolution,loss_sr_photographs"}
    assert {f"{row.split(',')[0]},{row.split(',')[2]}" for row in rows} == judged
    assert float(rows[0].split(",")[1]) == 1e-5
    with Image.open(tmp_path / "runs" / "smoke_lr_range.png") as picture:
        assert picture.height == 3 * 300


def test_trials_may_start_from_a_run_which_stays_as_it_is(train, smoke_run, tmp_path, capsys):
    before = files_below(smoke_run.folder)
    checkpoint = smoke_run.folder / "checkpoints" / "model_00000006.pt"
    arguments = ["--lr_range_test", "--range_iterations", "20", "--resume", checkpoint, "--outdir", tmp_path / "runs"]
    assert train(*arguments) == 0
    assert f"every trial starts from {checkpoint}" in capsys.readouterr().out
    assert files_below(smoke_run.folder) == before


def test_the_newest_checkpoint_of_the_run_is_taken_where_it_is_asked_for(smoke_run, tmp_path):
    config = load_config(SMOKE, [f"data.datadir={smoke_run.data}", f"training.outdir={smoke_run.folder.parent}"])
    start = open_start(config, find_checkpoints(config, "auto", trust=False), accept_new_data=False, trust=False)
    (first, _), (second, _) = start(), start()
    assert first.progress.iteration == second.progress.iteration == 6
    for one, other in zip(first.generator.parameters(), second.generator.parameters(), strict=True):
        assert one is not other
        assert torch.equal(one, other)
    missing = config.model_copy(update={"expname": "missing"})
    with pytest.raises(CheckpointError, match=r"--resume auto: .*missing has no checkpoint; leave it out"):
        find_checkpoints(missing, "auto", trust=False)


def test_fewer_iterations_than_can_tell_and_several_processes_are_refused(train, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        train("--lr_range_test", "--range_iterations", "9")
    assert "'9': expected a whole number of at least 20" in capsys.readouterr().err
    for name, value in (
        ("WORLD_SIZE", 2),
        ("RANK", 0),
        ("LOCAL_RANK", 0),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", 1),
    ):
        monkeypatch.setenv(name, str(value))
    assert train("--lr_range_test") == 1
    assert "--lr_range_test: its trials are short and run in one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "iteration", "factor"),
    [
        ([], 0, 1.0),
        (["training.scale_lr=sqrt", "training.lr_batch_size=8"], 0, 0.5),
        (["training.lr_points=[[0, 0], [10, 0.25]]", "training.lr_schedule=points"], 0, 1.0),
        (["training.lr_points=[[0, 0], [10, 0.25]]", "training.lr_schedule=points"], 10, 0.25),
        (["training.lr_points=[[0, 1], [10, 0]]", "training.lr_schedule=points"], 10, 1.0),
    ],
)
def test_the_key_that_is_told_gives_the_suggested_rate_where_the_test_began(smoke_run, keys, iteration, factor):
    config = load_config(SMOKE, [f"data.datadir={smoke_run.data}", *keys])
    trainer, _ = open_start(config, [], accept_new_data=False, trust=False)()
    trainer.progress.iteration = iteration
    test = RangeTest("d", "loss_d", RateRange(1e-4, 1e-2, iterations=3), (1.0, 0.0, 1.0), (1.0, 1.0, 1.0))
    assert test.suggestion == pytest.approx(1e-3)
    text = describe(test, trainer.d, trainer)
    key = f"{1e-3 / factor:.2g}"  # one rate of three is useful
    assert text.startswith(f"discriminator: training.lr_d={key}; rates from {key} to {key} have lowered")
    assert text.endswith("; no rate was too high for it")
