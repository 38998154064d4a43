"""Claims about files from outside a run folder: refused by every command with a torch that cannot read them safely."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graf
from graf.app import eval_tasks, loading, viewing
from graf.app.command_line import main
from graf.app.runs import choose_run_folder, find_run, require_origin
from graf.base.errors import UserError
from graf.config import load_config
from graf.models.rrdb import RRDBTrunk, load_esrgan_weights
from graf.runtime.checkpoint import CheckpointError
from graf.runtime.torch_release import UntrustedFile

SMOKE = str(Path(__file__).resolve().parents[2] / "configs" / "smoke.yaml")
REASON = "can run code when it is loaded (CVE-2025-32434); update torch to 2.10 or newer"

#: what reads a checkpoint that a person names: its command line around the file
COMMANDS = {
    "eval": ["eval", "--checkpoint", "FILE"],
    "eval_run": ["eval", "--run", "FILE"],
    "view": ["view", "FILE"],
    "view_page": ["view", "FILE", "--html", "page.html"],
    "mesh": ["mesh", "FILE"],
    "export": ["export", "FILE", "--to", "onnx"],
    "card": ["card", "FILE", "--out", "card"],
    "invert": ["invert", "FILE", "photo.png"],
}


@pytest.fixture
def old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")


@pytest.fixture
def foreign(smoke_run: Any, tmp_path: Path) -> Path:
    """A checkpoint that has left its run folder."""
    file = tmp_path / "downloads" / "model_best.pt"
    file.parent.mkdir()
    shutil.copy(smoke_run.folder / "checkpoints" / "model_best.pt", file)
    return file


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that would have been opened; nothing is computed."""
    files: list[Path] = []

    def stop(given: list[Path], device: object) -> None:
        files.extend(given)
        raise UserError("it would be opened here")

    for module in (loading, eval_tasks, viewing):  # imported above, so that none keeps what is put in here
        monkeypatch.setattr(module, "open_checkpoint", stop)
    return files


@pytest.mark.usefixtures("old_torch", "restored_process")
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_a_foreign_file_until_it_is_trusted(
    name: str, foreign: Path, opened: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(foreign) if word == "FILE" else word for word in COMMANDS[name]]
    assert main(arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {foreign}: is not from a run folder, and with torch 2.5.1+cpu")
    assert REASON in last
    assert "--trust" in last
    assert opened == []
    assert main([*arguments, "--trust"]) == 1
    said = capsys.readouterr().err
    assert "it would be opened here" in said.splitlines()[-1]
    assert f"{foreign}: trusted as you said" in said
    assert opened == [foreign]


@pytest.mark.usefixtures("old_torch")
def test_both_a_run_and_a_checkpoint_are_looked_at(
    smoke_run: Any, foreign: Path, opened: list[Path], restored_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--run", str(smoke_run.folder), "--checkpoint", str(foreign)]) == 1
    assert "is not from a run folder" in capsys.readouterr().err
    assert opened == []


@pytest.mark.usefixtures("old_torch")
def test_training_refuses_to_resume_from_a_foreign_file(
    foreign: Path,
    run_program: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read: list[list[Path]] = []

    def stop(files: list[Path], processes: object) -> None:
        read.append(files)
        raise UserError("it would be read here")

    monkeypatch.setattr("graf.app.training_run.read_same", stop)
    arguments = ["train.py", "--config", SMOKE, "--resume", str(foreign)]
    assert run_program(*arguments) == 1
    assert f"error: {foreign}: is not from a run folder" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
    assert not read
    assert run_program(*arguments, "--trust") == 1
    assert "it would be read here" in capsys.readouterr().err
    assert read == [[foreign]]


@pytest.mark.usefixtures("old_torch")
def test_training_refuses_foreign_esrgan_weights(
    smoke_run: Any,
    run_program: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object) -> None:
        raise UserError("the weights have been read")

    torch.save(RRDBTrunk(scale=2, features=8, growth=4, blocks=1).state_dict(), tmp_path / "esrgan.pth")
    shutil.copytree(smoke_run.data, tmp_path / "data")
    monkeypatch.setattr("graf.app.builders.build_generator", stop)
    keys = ["ccsr.enabled=true", "ccsr.trunk=rrdb", "ccsr.features=8", "ccsr.blocks=1", "ccsr.weights=esrgan.pth"]
    arguments = ["train.py", "--config", SMOKE, "data.imsize=16", *keys]
    assert run_program(*arguments) == 1
    assert "error: esrgan.pth: is not from a run folder" in capsys.readouterr().err
    assert run_program(*arguments, "--trust") == 1
    assert "the weights have been read" in capsys.readouterr().err


@pytest.mark.usefixtures("old_torch")
def test_python_refuses_too(foreign: Path, smoke_run: Any) -> None:
    with pytest.raises(UntrustedFile, match="CVE-2025-32434"):
        graf.load(foreign, device="cpu")
    assert graf.load(foreign, device="cpu", trust=True).classes
    assert graf.load(smoke_run.folder, device="cpu").classes
    assert graf.load(smoke_run.folder / "checkpoints" / "model_best.pt", device="cpu").classes


@pytest.mark.usefixtures("old_torch")
def test_what_lies_in_a_run_folder_needs_no_trust(
    smoke_run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = smoke_run.folder / "checkpoints" / "model_best.pt"
    assert find_run(str(file))[1] == [file]
    assert find_run(str(smoke_run.folder))[1][0] == file
    monkeypatch.chdir(file.parent)
    assert find_run("model_best.pt")[1] == [Path("model_best.pt")]
    config = load_config(SMOKE, [f"training.outdir={smoke_run.folder.parent}"])
    assert choose_run_folder(config, str(file))[1] == [file]
    assert not caplog.records


@pytest.mark.usefixtures("old_torch")
def test_a_folder_that_is_only_called_so_is_no_run_folder(tmp_path: Path) -> None:
    file = tmp_path / "checkpoints" / "model_best.pt"
    file.parent.mkdir()
    file.write_bytes(b"")
    with pytest.raises(UntrustedFile):
        require_origin(file, trust=False)
    (tmp_path / "config.yaml").write_text("")
    require_origin(file, trust=False)
    (file.parent / "more").mkdir()
    deeper = shutil.copy(file, file.parent / "more" / "model_best.pt")
    with pytest.raises(UntrustedFile):
        require_origin(deeper, trust=False)


@pytest.mark.usefixtures("old_torch")
def test_a_missing_file_is_called_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        graf.load(tmp_path / "gone.pt", device="cpu")


@pytest.mark.usefixtures("old_torch", "restored_process")
def test_safetensors_are_taken_from_anywhere(smoke_run: Any, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    file = tmp_path / "weights.safetensors"
    assert main(["export", str(smoke_run.folder), "--to", "safetensors", "--out", str(file)]) == 0
    assert graf.load(file, device="cpu").classes


@pytest.mark.usefixtures("old_torch")
def test_esrgan_weights_are_foreign_and_may_be_safetensors(tmp_path: Path) -> None:
    source, trunk = (RRDBTrunk(scale=2, features=8, growth=4, blocks=1) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "esrgan.pth")
    with pytest.raises(UntrustedFile, match=r"esrgan\.pth: is not from a run folder"):
        load_esrgan_weights(trunk, tmp_path / "esrgan.pth")
    assert load_esrgan_weights(trunk, tmp_path / "esrgan.pth", trust=True).matched == len(source.state_dict())
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(source.state_dict(), tmp_path / "esrgan.safetensors")
    fresh = RRDBTrunk(scale=2, features=8, growth=4, blocks=1)
    assert load_esrgan_weights(fresh, tmp_path / "esrgan.safetensors").matched == len(source.state_dict())
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in source.state_dict().items())
