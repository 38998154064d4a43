"""The command `graf`: what it offers, that it is quick to say so, and that its commands are those of the scripts."""

import subprocess
import sys
from pathlib import Path

import pytest

from graf import __version__
from graf.app.command_line import COMMANDS, main
from graf.app.train_command import collect_overrides, parse_arguments
from graf.config import load_config

KEYS = ("training.fid_every=0", "training.sample_every=0", "training.monitoring=[]", "--max_iterations", "1")


def exit_code(*arguments: str) -> int:
    """The exit code of a command line that argparse ends."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code)


def test_help_lists_the_commands_with_a_line_each_and_loads_no_torch():
    code = "import sys, runpy; sys.argv[1:] = ['--help']; sys.modules['torch'] = None; runpy.run_module('graf')"
    code = code.replace("run_module('graf')", "run_module('graf', run_name='__main__')")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for name, (_, purpose) in COMMANDS.items():
        assert any(line.split() == [name, *purpose.split()] for line in lines), name


def test_a_run_is_opened_and_begun_without_the_packages_that_scores_need():
    """They take as long to import as torch itself."""
    code = "import sys, graf.app.loading, graf.app.training_run; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch_fidelity", "torchvision"} & set(done.stdout.split())


def test_the_version_is_that_of_the_package(capsys):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"graf {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_under_its_own_name(command, capsys):
    assert exit_code(command, "--help") == 0
    usage = capsys.readouterr().out
    assert usage.startswith(f"usage: graf {command} ")
    assert "--debug" in usage


@pytest.mark.parametrize("arguments", [(), ("tran",), ("--config", "smoke")])
def test_what_is_no_command_is_answered_with_the_commands(arguments, capsys):
    assert exit_code(*arguments) == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    "outdir", ["runs", "runs #2", "2024", "null", "no", "1e5", "a: b", "'quoted'", "ordner für 🦆"]
)
def test_a_flag_of_train_is_taken_as_it_was_typed(outdir):
    arguments = ["--outdir", outdir, "--device", "cuda:1", "--memory_budget", "8GiB", "--use_amp", "--seed", "3"]
    config = load_config(
        "smoke", collect_overrides(parse_arguments([*arguments, "--max_minutes", "1e-6"], "graf train"))
    )
    training = config.training
    assert (training.outdir, training.device, training.memory_budget) == (outdir, "cuda:1", "8GiB")
    assert (training.use_amp, training.max_minutes, config.seed) == (True, 1e-6, 3)


@pytest.mark.parametrize(
    "options", [("--plan", "--profile", "3"), ("--lr_range_test", "--memory_snapshot"), ("--lr_range_test", "--plan")]
)
def test_who_waits_for_what_will_not_be_written_is_told(options, capsys):
    assert exit_code("train", *options) == 2
    assert "which trains no run" in capsys.readouterr().err


def test_a_shipped_configuration_is_trained_and_evaluated_by_its_name(restored_process, smoke_run, capsys):
    data = f"data.datadir={smoke_run.data}"
    assert main(["train", "--config", "smoke", data, *KEYS, "--max_minutes", "1e-6", "training.max_iterations=2"]) == 75
    assert f"resume with: graf train --config {Path('results', 'smoke', 'config.yaml')}" in capsys.readouterr().out
    assert main(["eval", "--grid", "--views", "2"]) == 0
    assert Path("results", "smoke", "eval", "grid_car_rgb.png").is_file()
    assert main(["doctor", "--config", "smoke", data]) == 0
    assert Path("doctor", "overlay.png").is_file()


def test_plan_is_what_train_prints_with_its_flag(restored_process, run_program, capsys):
    keys = ("--config", "smoke", "training.fid_every=0", "training.sample_every=0")
    assert main(["plan", *keys]) == 0
    plan = capsys.readouterr().out
    assert plan.startswith("Predicted peak")
    assert run_program("train.py", "--plan", *keys) == 0
    assert capsys.readouterr().out == plan


def test_a_failing_command_is_one_line_and_an_exit_code(restored_process, capsys):
    for command in ("train", "plan", "doctor"):
        assert main([command, "--config", "smoke", "training.batchsize=4"]) == 1
        error = "error: training.batchsize=4: unknown key; did you mean training.batch_size?\n"
        assert capsys.readouterr().err == error
    assert main(["eval", "--run", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("error: nowhere: no run is there")
