"""`graf check` in worlds where something is missing, too small or broken: a line each, and never a traceback."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from graf.app import machine_check
from graf.app.command_line import main
from graf.app.machine_check import NEEDED, PROBES, Finding, Machine, Verdict, check_machine, run_probe
from graf.base.extras import EXTRAS, REQUIRED, name_install_command
from graf.runtime import logs

ROOT = Path(__file__).resolve().parents[2]
OK, NOTE, PROBLEM = Verdict
GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine("smoke", ["training.device=cpu", f"training.outdir={tmp_path / 'results'}"])


def ask(name: str, machine: Machine) -> Finding:
    return run_probe(name, PROBES[name], machine)


def forget(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Packages that are not installed."""
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


# ---------------------------------------------------------------------------------------------------- the command


def test_this_machine_can_train_and_every_probe_has_an_answer(restored_process, tmp_path, capsys):
    assert main(["check", "--config", "smoke", "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert printed.err == ""
    assert answer["can_train"] is True
    findings = {finding["name"]: finding for finding in answer["findings"]}
    assert list(findings) == [*PROBES, *(f"extra {name}" for name in EXTRAS)]
    for name, finding in findings.items():
        assert finding["verdict"] in ("ok", "note"), finding
        assert finding["found"], name
        assert "could not be found out" not in finding["found"], finding
    assert findings["torch"]["found"].startswith(torch.__version__)
    assert findings["device"]["found"].startswith("cpu (")
    assert "gloo" in findings["processes"]["found"]
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


def test_a_device_that_is_not_there_is_a_problem_and_an_exit_code(restored_process, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["check", "--config", "smoke", "--device", "cuda"]) == 1
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line[9:].partition("  ")[0].strip(): line.split()[0] for line in lines[:-1] if "->" not in line}
    assert [name for name, verdict in verdicts.items() if verdict == "problem"] == ["device"]
    assert lines[-1] == "training could not start here: device"
    assert sum("not known without a device" in line for line in lines) >= 4


def test_a_misspelt_key_is_one_line(restored_process, capsys):
    assert main(["check", "--config", "smoke", "training.batchsize=4"]) == 1
    assert capsys.readouterr().err.startswith("error: training.batchsize=4: unknown key")


def test_without_torch_it_still_answers(tmp_path):
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv[1:] = ['check', '--config', 'smoke', '--json']"
    code = f"{code}; runpy.run_module('graf', run_name='__main__')"
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert (result.returncode, result.stderr) == (1, "")
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert findings["torch"] | {"name": ""} == {
        "name": "",
        "verdict": "problem",
        "found": "not installed",
        "hint": "pip install torch torchvision",
    }
    assert findings["packages"]["verdict"] == "ok"
    assert findings["dtype"]["verdict"] == "note"


# ---------------------------------------------------------------------------------------------------- worlds


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_that_fails_is_a_line(monkeypatch, machine, name):
    def fail(_: Machine) -> None:
        raise RuntimeError("the driver is gone\nand here is its stack")

    monkeypatch.setattr(machine_check, "PROBES", {name: fail})
    found = check_machine(machine)[0]
    assert found.verdict is (PROBLEM if name in NEEDED else NOTE)
    assert found.found == "could not be found out: RuntimeError: the driver is gone"


def test_what_is_warned_of_and_logged_meanwhile_is_a_hint_and_is_not_printed(machine, capsys):
    def grumble(_: Machine) -> tuple[Verdict, str, str]:
        warnings.warn("CUDA initialization: the driver is too old\nsee there", stacklevel=1)
        logging.getLogger("graf").warning("mixed precision is off")
        return NOTE, "something", "do this"

    hint = "CUDA initialization: the driver is too old; mixed precision is off; do this"
    assert run_probe("x", grumble, machine) == Finding("x", NOTE, "something", hint)
    assert capsys.readouterr() == ("", "")


def test_no_torchvision(monkeypatch, machine):
    forget(monkeypatch, "torchvision")
    assert ask("torchvision", machine) == Finding("torchvision", PROBLEM, "not installed", "pip install torchvision")


@pytest.mark.parametrize(
    ("version", "requirement", "verdict"),
    [
        ("2.1.2+cu121", "torch (==2.1.2)", OK),
        ("2.6.0", "torch==2.6.0", OK),
        ("2.6.0", "torch==2.1.2", PROBLEM),
        ("2.15.0", "torch (>=2.14.0)", OK),
        ("2.10.0.dev20250915+cu128", "torch (==2.10.0.dev20250915)", OK),
        ("2.15.0", "torchmetrics==1.0", OK),
    ],
)
def test_torchvision_belongs_to_its_torch(monkeypatch, machine, version, requirement, verdict):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(machine_check.metadata, "requires", lambda package: ["numpy", requirement])
    found = ask("torchvision", machine)
    assert found.verdict is verdict
    assert ("--force-reinstall torch torchvision" in found.hint) is (verdict is PROBLEM)


def test_a_torchvision_that_cannot_be_loaded(monkeypatch, machine, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    found = ask("torchvision", machine)
    assert found.verdict is PROBLEM
    assert "operator torchvision::nms does not exist" in found.found


@pytest.mark.parametrize(
    ("version", "verdict"), [("1.13.1", PROBLEM), ("2.0.1", PROBLEM), ("2.1.0", NOTE), ("2.10.0", OK)]
)
def test_an_old_torch(monkeypatch, machine, version, verdict):
    monkeypatch.setattr(torch, "__version__", version)
    found = ask("torch", machine)
    assert found.verdict is verdict
    assert ("--trust" in found.hint) is (verdict is NOTE)


@pytest.mark.parametrize(("version", "verdict"), [((3, 9), PROBLEM), ((3, 10), OK), ((3, 13), OK), ((3, 15), NOTE)])
def test_pythons(monkeypatch, machine, version, verdict):
    monkeypatch.setattr(sys, "version_info", version)
    assert ask("python", machine).verdict is verdict


@pytest.mark.parametrize(
    ("missing", "verdict"), [(("yaml",), PROBLEM), (("tensorboard",), NOTE), (("PIL", "tensorboard"), PROBLEM)]
)
def test_packages_that_are_missing_are_named(monkeypatch, machine, missing, verdict):
    names = {module: name for name, module in REQUIRED.items()}
    forget(monkeypatch, *missing)
    found = ask("packages", machine)
    assert found.verdict is verdict
    assert set(found.hint.split()[2:]) == {names[module] for module in missing}


def test_cuda_that_is_there_but_cannot_be_used(monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("CUDA can be used here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = ask("device", Machine("smoke", [f"training.outdir={tmp_path}"]))
    assert found.verdict is PROBLEM
    assert found.found.startswith("cuda:0 is there but does not compute: ")
    assert "--device cpu" in found.hint


def test_without_a_compiler(monkeypatch, machine, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert ask("compile", machine).verdict is NOTE
    compiler = tmp_path / "clang++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert ask("compile", machine).found == f"torch.compile with {compiler}"
    monkeypatch.setenv("CXX", "my-compiler")
    assert "my-compiler" in ask("compile", machine).found
    assert ask("compile", machine).verdict is NOTE


@pytest.mark.parametrize(("checkpoints", "verdict"), [(0, PROBLEM), (1.9, PROBLEM), (4.9, NOTE), (5.1, OK)])
def test_a_full_disk(monkeypatch, machine, checkpoints, verdict):
    state = next(iter(machine.plan.phases.values()))
    size = state.weights + state.optimizer + state.average
    usage = shutil.disk_usage(machine.results)._replace(free=int(checkpoints * size))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = ask("disk", machine)
    assert found.verdict is verdict, "two are written before one goes; three timed ones, the best and the next are kept"


def test_a_checkpoint_takes_what_is_said_of_it(smoke_run, tmp_path):
    machine = Machine(str(smoke_run.folder / "config.yaml"), ["training.device=cpu", f"training.outdir={tmp_path}"])
    state = next(iter(machine.plan.phases.values()))
    said = state.weights + state.optimizer + state.average
    files = list((smoke_run.folder / "checkpoints").glob("*.pt"))
    assert files
    assert max(file.stat().st_size for file in files) == pytest.approx(said, rel=0.35)  # small networks, many names


def test_results_that_cannot_be_written(monkeypatch, machine, tmp_path):
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    found = ask("results", machine)
    assert (found.verdict, found.found) == (PROBLEM, f"{tmp_path}: Permission denied")
    monkeypatch.undo()
    (tmp_path / "results").write_text("a file")
    found = ask("results", Machine("smoke", [f"training.outdir={tmp_path / 'results'}"]))
    assert (found.verdict, found.found) == (PROBLEM, f"{tmp_path / 'results'} is a file")


def test_too_little_memory(monkeypatch, tmp_path):
    machine = Machine("smoke", ["training.device=cpu", "training.batch_size=8", "training.fid_every=0"])

    def verdict(free: float | None) -> Finding:
        monkeypatch.setattr("graf.runtime.memory.read_usable_memory", lambda device: free)
        return ask("memory", machine)

    peak = machine.plan.peak
    assert verdict(2 * peak).verdict is OK
    assert verdict(0.9 * peak).verdict is NOTE
    assert verdict(0.01 * peak).verdict is PROBLEM
    assert verdict(None).verdict is NOTE
    monkeypatch.setattr(Machine, "plan", property(lambda self: 1 / 0))
    found = verdict(GIB)
    assert found.verdict is NOTE, "without the estimator nothing is known, and nothing wrong"
    assert "1,024 MiB free" in found.found


def test_weights_of_inception(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    kinds = {"auto": NOTE, "inception": PROBLEM, "offline": OK}
    for kind, verdict in kinds.items():
        keys = [f"evaluation.feature_extractor={kind}", "evaluation.download=false", "training.fid_every=10"]
        assert ask("FID weights", Machine("smoke", keys)).verdict is verdict


@pytest.mark.parametrize(
    ("kind", "download", "every", "hint"),
    [
        ("inception", "true", 10, "they are downloaded before the first step; where that fails, training cannot start"),
        (
            "inception",
            "true",
            0,
            "they are downloaded by graf eval --fid_kid; where that fails, graf eval ",
        ),
        ("inception", "false", 10, "without them training cannot start; set evaluation.inception_weights, or "),
        (
            "auto",
            "true",
            10,
            "they are downloaded before the first step; where that fails, scores are fid_offline",
        ),
        ("auto", "false", 10, "without them scores are fid_offline and kid_offline; set evaluation.inception_weights"),
    ],
)
def test_weights_of_inception_that_are_not_here_are_told_with_what_becomes_of_scores(
    monkeypatch, tmp_path, kind, download, every, hint
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    keys = [f"evaluation.feature_extractor={kind}", f"evaluation.download={download}", f"training.fid_every={every}"]
    assert ask("FID weights", Machine("smoke", keys)).hint.startswith(hint)


def test_no_ffmpeg(monkeypatch, machine):
    forget(monkeypatch, "imageio_ffmpeg")
    found = ask("ffmpeg", machine)
    assert found.verdict is NOTE
    assert "imageio[ffmpeg]" in found.hint


@pytest.mark.parametrize(("backends", "verdict"), [([], NOTE), (["gloo"], OK), (["gloo", "nccl"], OK)])
def test_backends(monkeypatch, machine, backends, verdict):
    monkeypatch.setattr("graf.runtime.distributed.list_backends", lambda: backends)
    assert ask("processes", machine).verdict is verdict


def test_mixed_precision_that_is_off_says_why(monkeypatch, machine):
    monkeypatch.setattr(logs, "_said", set())
    monkeypatch.setattr("graf.runtime.amp.has_native_bfloat16", lambda device: False)
    found = ask("dtype", machine)
    assert (found.verdict, found.found) == (NOTE, "float32 with training.use_amp")
    assert "no native bfloat16" in found.hint
    assert ask("native bfloat16", machine).verdict is NOTE


@pytest.mark.parametrize("name", EXTRAS)
def test_a_missing_extra_is_a_note_with_its_command(monkeypatch, machine, name):
    package, module = next(iter(EXTRAS[name].items()))
    forget(monkeypatch, module)
    probe = machine_check._extras()[f"extra {name}"]
    found = run_probe(f"extra {name}", probe, machine)
    assert found.verdict is NOTE
    assert package in found.found
    assert found.hint == name_install_command(name)


def test_the_packages_are_those_of_pyproject():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {
        extra: {re.split(r"[\[<>=]", requirement)[0] for requirement in requirements}
        for extra, requirements in {**project["optional-dependencies"], "": project["dependencies"]}.items()
    }
    assert names.pop("") == {*REQUIRED, "torch", "torchvision"}
    del names["all"]  # the others together
    assert names == {extra: set(packages) for extra, packages in EXTRAS.items()}
