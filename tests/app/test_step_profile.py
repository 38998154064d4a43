"""`graf train --profile N`: its trace and what it says, and that the run is the one that nobody watched."""

import json
from pathlib import Path

import pytest

SMOKE = Path(__file__).resolve().parents[2] / "configs" / "smoke.yaml"
#: iterations and their lines alone
BARE = ("training.fid_every=0", "training.sample_every=0", "training.monitoring=[]", "training.backup_every=100")


@pytest.fixture
def train(run_program, smoke_run):
    """train.py on configs/smoke.yaml in tmp_path, with the photographs of the shared run; returns the exit code."""
    return lambda *arguments: run_program(
        "train.py", "--config", SMOKE, f"data.datadir={smoke_run.data}", *BARE, *arguments
    )


def read_losses(folder: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss_d"], row["loss_g"]) for row in rows if "loss_d" in row]


def test_a_trace_and_the_shares_of_phases_and_classes_come_out_and_training_goes_on(train, smoke_run, tmp_path, capsys):
    assert train("--profile", "2", "--max_iterations", "10") == 0
    folder = tmp_path / "results" / "smoke"
    [trace] = folder.glob("trace_*.json")
    assert trace.name == "trace_00000007.json"  # five steps before it
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {f"graf: {phase}" for phase in ("d", "r1", "g", "ema", "data", "log", "random numbers")} <= names
    text = capsys.readouterr().out
    assert "the mean of 2" in text
    assert all(name in text for name in ("matrix product", "optimiser", "aten::", trace.name))
    losses = read_losses(folder)
    assert len(losses) == 10
    assert losses[:6] == read_losses(smoke_run.folder)


def test_a_run_that_ends_before_its_profile_says_so(train, tmp_path, capsys):
    assert train("--profile", "3", "--max_iterations", "4") == 0
    assert "--profile 3: the run has ended before a step was recorded" in capsys.readouterr().err
    assert not list((tmp_path / "results" / "smoke").glob("trace_*"))


@pytest.mark.parametrize("steps", ["0", "-1", "some"])
def test_a_profile_of_no_step_is_refused(train, capsys, steps):
    with pytest.raises(SystemExit) as refused:
        train(f"--profile={steps}")
    assert refused.value.code == 2
    assert f"--profile: '{steps}': expected a whole number of at least 1" in capsys.readouterr().err
