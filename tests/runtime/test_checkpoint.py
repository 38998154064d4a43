"""Claims about checkpoints: they come back equal, survive failing writes, and say what is wrong with a file."""

from __future__ import annotations

import errno
import io
import os
import pickle
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graf.base import files
from graf.runtime import logs, sealed_archive
from graf.runtime.amp import NoOpScaler, Precision
from graf.runtime.checkpoint import (
    CheckpointError,
    ReadError,
    checkpoint_name,
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    read_iteration,
    restore,
    save_checkpoint,
)

REPOSITORY = Path(__file__).parents[2]
FORMAT_1 = REPOSITORY / "tests" / "files" / "format_1" / "checkpoints" / "model_00000006.pt"


@pytest.fixture(autouse=True)
def fresh_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_said", set())


class MovingAverage:
    """A stateful object that is no module: plain values beside nested tensors."""

    def __init__(self, size: int = 3) -> None:
        self.decay, self.weights = 0.9, {"mlp.0.weight": torch.zeros(size)}

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.decay, self.weights = state_dict["decay"], state_dict["weights"]


#: torch 2.3
HAS_CPU_SCALER = hasattr(torch.amp, "GradScaler")


def make_objects(seed: int, width: int = 4, optimizer: type = torch.optim.Adam) -> dict[str, Any]:
    """A module with buffers, its optimiser after one step, an enabled scaler and a moving average."""
    generator = torch.Generator().manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.BatchNorm1d(width))
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    objects = {
        "generator": module,
        "optimizer_g": optimizer(module.parameters(), lr=0.1 * seed),
        "scaler_g": torch.amp.GradScaler("cpu", init_scale=2.0**seed) if HAS_CPU_SCALER else NoOpScaler(),
        "ema": MovingAverage(),
    }
    objects["ema"].weights["mlp.0.weight"].fill_(seed)
    loss = module(torch.randn(5, 3, generator=generator)).pow(2).sum()
    objects["scaler_g"].scale(loss).backward()
    objects["scaler_g"].step(objects["optimizer_g"])
    objects["scaler_g"].update()
    return objects


def assert_equal_states(left: Any, right: Any) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal_states(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal_states(one, other)
    else:
        assert left == right


META = {"iteration": 500, "best": None, "config": {"lr": 0.1, "v_list": [0.3, 0.4], "name": "a"}, "done": False}


# --- round trip -----------------------------------------------------------------------------------------------------


def test_objects_and_meta_come_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / checkpoint_name(500)
    saved, fresh = make_objects(seed=2), make_objects(seed=7)
    save_checkpoint(path, saved, META)
    contents = read_checkpoint(path)
    assert contents["format"] == 3
    assert contents["meta"] == META
    restore(contents, fresh, path)
    for name in saved:
        assert_equal_states(fresh[name].state_dict(), saved[name].state_dict())
    assert os.listdir(path.parent) == [path.name], "no temporary file stays"


def test_an_optimiser_that_has_not_stepped_yet_takes_a_saved_state(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", make_objects(seed=2), {})
    fresh = make_objects(seed=7)
    fresh["optimizer_g"] = torch.optim.Adam(fresh["generator"].parameters())
    restore(read_checkpoint(tmp_path / "a.pt"), fresh, "a.pt")
    assert fresh["optimizer_g"].state_dict()["param_groups"][0]["lr"] == 0.2
    assert len(fresh["optimizer_g"].state_dict()["state"]) == 4


def test_a_saved_file_is_readable_by_others_as_the_umask_says(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", {}, {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.pt").stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- what may be stored ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("meta", "where"),
    [
        ({"lr": np.float64(0.1)}, "meta['lr'] is a numpy.float64"),
        ({"config": {"v_list": [0.1, np.float32(0.2)]}}, "meta['config']['v_list'][1] is a numpy.float32"),
        ({"path": Path("a")}, "meta['path'] is a pathlib"),
        ({"z": torch.zeros(2)}, "meta['z'] is a torch.Tensor"),
        ({np.int64(1): 2}, "a key of meta is a numpy.int64"),
    ],
)
def test_a_value_that_is_not_plain_is_named_before_anything_is_written(
    tmp_path: Path, meta: dict[str, Any], where: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path / "a.pt", {}, meta)
    assert where in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_object_whose_state_could_not_be_read_back_is_named(tmp_path: Path) -> None:
    average = MovingAverage()
    average.decay = np.float64(0.5)
    with pytest.raises(CheckpointError, match=r"objects\['ema'\]\['decay'\] is a numpy.float64"):
        save_checkpoint(tmp_path / "a.pt", {"ema": average}, {})


# --- failing writes -------------------------------------------------------------------------------------------------


class FullDisk(io.FileIO):
    """A real file on a disk that is full after 1,000 bytes."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 1000:
            super().write(bytes(data)[: max(0, 1000 - self.tell())])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_keeps_the_old_file_and_removes_the_new_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / checkpoint_name(1)
    save_checkpoint(path, make_objects(seed=2), {"iteration": 1})
    before = path.read_bytes()

    monkeypatch.setattr(files, "open", lambda file, mode: FullDisk(file, mode), raising=False)
    for target in (path, tmp_path / checkpoint_name(2)):
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(target, make_objects(seed=3, width=500), {"iteration": 2})
        message = str(caught.value)
        assert str(target) in message
        assert "No space left on device" in message
        assert "MiB free" in message
        assert "previous checkpoint is intact" in message
        assert "\n" not in message
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_file_size_limit_in_a_real_process_keeps_the_old_file(tmp_path: Path) -> None:
    program = """
        import resource, sys, torch
        from graf.runtime.checkpoint import CheckpointError, save_checkpoint
        path = sys.argv[1]
        save_checkpoint(path, {"layer": torch.nn.Linear(4, 4)}, {"iteration": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_checkpoint(path, {"layer": torch.nn.Linear(1000, 1000)}, {"iteration": 2})
        except CheckpointError as error:
            sys.exit(f"refused: {error}")
    """
    path = tmp_path / checkpoint_name(1)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), str(path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"refused: {path}: the checkpoint could not be written (File too large")
    assert len(done.stderr.splitlines()) == 1
    assert read_checkpoint(path)["meta"] == {"iteration": 1}
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_at_any_later_stage_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, {}, {"iteration": 1})

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_checkpoint(path, {}, {"iteration": 2})
    assert read_checkpoint(path)["meta"] == {"iteration": 1}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_an_interrupt_while_writing_passes_through_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "a.pt", {}, {})
    assert not list(tmp_path.iterdir())


def test_what_killed_saves_leave_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # as if killed: nothing is cleaned up
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        for _ in range(2):
            with pytest.raises(CheckpointError):
                save_checkpoint(tmp_path / checkpoint_name(1), {}, {})
    save_checkpoint(tmp_path / checkpoint_name(2), {}, {})
    assert len(list(tmp_path.iterdir())) == 3, "two processes never share a temporary file"
    assert len(files.remove_leftovers(tmp_path)) == 2
    assert [file.name for file in tmp_path.iterdir()] == [checkpoint_name(2)]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        save_checkpoint(tmp_path / "file" / "deeper" / "a.pt", {}, {})


def test_data_reaches_the_disk_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        events.append(f"sync {kind}")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save_checkpoint(tmp_path / "a.pt", {}, {})
    if Path("/proc/self/fd").exists():
        assert events == ["sync file", "rename", "sync folder"]


def test_a_file_system_that_cannot_sync_folders_is_said_and_the_checkpoint_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_open = os.open

    def refuse_folders(target: Any, flags: int, *rest: Any) -> int:
        if os.path.isdir(target):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_open(target, flags, *rest)

    monkeypatch.setattr(os, "open", refuse_folders)
    save_checkpoint(tmp_path / "a.pt", {}, {"iteration": 3})
    assert "does not sync folders" in caplog.text
    assert read_checkpoint(tmp_path / "a.pt")["meta"] == {"iteration": 3}


# --- reading --------------------------------------------------------------------------------------------------------


def foreign_files() -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save({"format": 1, "meta": {}, "objects": {"layer": {"weight": torch.zeros(10000)}}}, buffer)
    good = buffer.getvalue()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", "b")
    code = io.BytesIO()
    torch.save({"format": 1, "meta": {}, "objects": Path("a")}, code)
    plain = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, plain)
    return {
        "half": good[: len(good) // 2],
        "last bytes missing": good[:-10],
        "one byte": good[:1],
        "empty": b"",
        "text": b"hello world",
        "picture": b"\x89PNG\r\n" + bytes(100),
        "zip": archive.getvalue(),
        "pickle": pickle.dumps({"format": 1}),
        "pickled code": code.getvalue(),
        "another program's tensors": plain.getvalue(),
        "random": np.random.default_rng(0).bytes(5000),
    }


@pytest.mark.parametrize("kind", foreign_files())
def test_a_truncated_or_foreign_file_is_one_line_that_names_it_and_the_next_step(tmp_path: Path, kind: str) -> None:
    path = tmp_path / checkpoint_name(900)
    path.write_bytes(foreign_files()[kind])
    with pytest.raises(CheckpointError) as alone:
        read_checkpoint(path)
    assert str(path) in str(alone.value)
    assert "start a new run" in str(alone.value)
    assert "\n" not in str(alone.value)

    save_checkpoint(tmp_path / checkpoint_name(800), {}, {})
    with pytest.raises(CheckpointError, match=r"try .*model_00000800\.pt"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("others", "newest"),
    [
        ({"backup_00000800.pt": 800, "model_best.pt": 850}, "model_best.pt"),
        ({"backup_00000800.pt": 800, "model_best.pt": 300}, "backup_00000800.pt"),
        ({"model_00000500.pt": 500, "model_best.pt": 300, "backup_00000800.pt": 800}, "backup_00000800.pt"),
    ],
)
def test_a_damaged_file_names_the_newest_other_one_of_any_kind(
    tmp_path: Path, others: dict[str, int], newest: str
) -> None:
    for name, iteration in others.items():
        save_checkpoint(tmp_path / name, {}, {"iteration": iteration})
    damaged = tmp_path / checkpoint_name(900)
    damaged.write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"try .*{newest}$"):
        read_checkpoint(damaged)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EMFILE, errno.EACCES])
@pytest.mark.parametrize("stage", ["open", "torch.load"])
def test_what_the_system_cannot_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, code: int
) -> None:
    path = tmp_path / checkpoint_name(900)
    save_checkpoint(path, {}, {})

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    target = (sealed_archive, "open") if stage == "open" else (torch, "load")
    monkeypatch.setattr(*target, fail, raising=False)
    with pytest.raises(ReadError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: could not be read ({os.strerror(code)}), and may be whole: try again")


def test_every_truncation_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"layer": torch.nn.Linear(2, 2)}, {})
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(path)
        assert not isinstance(caught.value, ReadError)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "absent" / "a.pt")


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    torch.save({"format": 4, "meta": {}, "objects": {}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="has format 4, this version reads 1 to 3"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_file_of_format_2_which_has_no_seal_is_read(tmp_path: Path) -> None:
    torch.save({"format": 2, "meta": {"iteration": 5}, "objects": {}}, tmp_path / "a.pt")
    objects = {"limits": {}, "statistics": {}}  # new in format 3; empty states stand for those of a new run
    assert read_checkpoint(tmp_path / "a.pt") == {"format": 3, "meta": {"iteration": 5}, "objects": objects}
    assert read_iteration(tmp_path / "a.pt") is None


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"layer": torch.nn.Linear(2, 2)}, {"iteration": 5})
    assert read_iteration(path) == 5
    whole = path.read_bytes()
    for position in range(0, len(whole), 13):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"cannot be read|lost its seal"):
            read_checkpoint(path)


def test_a_device_that_fails_while_saving_is_not_blamed_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="CUDA error") as caught:
        save_checkpoint(tmp_path / "a.pt", {}, {})
    assert not isinstance(caught.value, CheckpointError)
    assert not list(tmp_path.iterdir())


def test_a_file_of_format_1_is_read_as_one_of_today() -> None:
    """FORMAT_1 was written by the version before format 2, without a seal."""
    raw, contents = torch.load(FORMAT_1, weights_only=True), read_checkpoint(FORMAT_1)
    assert (raw["format"], contents["format"]) == (1, 3)
    old, new = raw["objects"], contents["objects"]
    assert new["averages"] == {"generator": 6, "ccsr": 6}
    today = {"field.density.weight": "field.raw_density.weight", "field.density.bias": "field.raw_density.bias"}
    for weights in (old["average"]["module"], old["generator"]):
        assert today.keys() <= weights.keys()
        for former, name in today.items():
            weights[name] = weights.pop(former)
    assert_equal_states(new["generator_average"], dict(old["average"]["module"]))
    assert_equal_states(new["ccsr_average"], old["average_ccsr"]["module"])
    kept = old.keys() - {"average", "average_ccsr"}
    assert new.keys() == kept | {"generator_average", "ccsr_average", "averages", "limits", "statistics"}
    for name in kept:
        assert_equal_states(new[name], old[name])
    assert contents["meta"]["dataset"] == raw["meta"]["scene"]
    assert {name: contents["meta"][name] for name in ("config", "iteration")} == {
        name: raw["meta"][name] for name in ("config", "iteration")
    }
    assert contents["meta"].keys() == {"config", "iteration", "dataset"}


def test_running_out_of_memory_while_reading_does_not_blame_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "a.pt", {}, {})

    def fail(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        read_checkpoint(tmp_path / "a.pt")


# --- another config -------------------------------------------------------------------------------------------------


def saved_contents(tmp_path: Path, objects: dict[str, Any]) -> dict[str, Any]:
    save_checkpoint(tmp_path / "a.pt", objects, {})
    return read_checkpoint(tmp_path / "a.pt")


def message_of_restore(contents: dict[str, Any], objects: dict[str, Any]) -> str:
    before = {name: pickle.dumps(stateful.state_dict()) for name, stateful in objects.items()}
    with pytest.raises(CheckpointError) as caught:
        restore(contents, objects, "run/a.pt")
    after = {name: pickle.dumps(stateful.state_dict()) for name, stateful in objects.items()}
    assert after == before, "nothing was loaded"
    message = str(caught.value)
    assert message.startswith("run/a.pt: object ")
    assert "a checkpoint of another config" in message
    assert "\n" not in message
    return message


def test_another_width_names_the_object_and_its_first_differing_key(tmp_path: Path) -> None:
    message = message_of_restore(saved_contents(tmp_path, make_objects(2, width=4)), make_objects(2, width=5))
    assert "'generator': '0.weight' is of shape (4, 3) in the checkpoint and of shape (5, 3) here" in message


def test_another_depth_names_the_key_that_one_side_lacks(tmp_path: Path) -> None:
    shallow, deep = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Sequential(*[torch.nn.Linear(2, 2)] * 2)
    contents = saved_contents(tmp_path, {"generator": shallow})
    assert "'1.weight' is missing in the checkpoint" in message_of_restore(contents, {"generator": deep})
    contents = saved_contents(tmp_path, {"generator": deep})
    message = message_of_restore(contents, {"generator": shallow})
    assert "'1.weight' is of shape (2, 2) in the checkpoint and missing here" in message


def test_an_ema_of_another_size_is_named_by_its_nested_key(tmp_path: Path) -> None:
    contents = saved_contents(tmp_path, {"ema": MovingAverage(3)})
    assert "'ema': 'weights.mlp.0.weight'" in message_of_restore(contents, {"ema": MovingAverage(4)})


def test_a_missing_and_an_unexpected_object_are_named(tmp_path: Path) -> None:
    both = {"generator": torch.nn.Linear(2, 2), "ccsr": torch.nn.Linear(2, 2)}
    one = {"generator": torch.nn.Linear(2, 2)}
    assert "'ccsr': this run has it" in message_of_restore(saved_contents(tmp_path, one), both)
    assert "'ccsr': the checkpoint alone has it" in message_of_restore(saved_contents(tmp_path, both), one)


def test_some_objects_can_be_restored_without_the_others(tmp_path: Path) -> None:
    saved, fresh = make_objects(seed=2), make_objects(seed=7)
    contents = saved_contents(tmp_path, saved)
    before = fresh["ema"].state_dict()["weights"]["mlp.0.weight"].clone()
    restore(contents, {"generator": fresh["generator"]}, "a.pt", partial=True)
    assert_equal_states(fresh["generator"].state_dict(), saved["generator"].state_dict())
    assert torch.equal(fresh["ema"].weights["mlp.0.weight"], before)
    with pytest.raises(CheckpointError, match="'ccsr': this run has it, the checkpoint does not"):
        restore(contents, {"ccsr": torch.nn.Linear(2, 2)}, "a.pt", partial=True)
    with pytest.raises(CheckpointError, match=r"'generator': '0\.weight' is of shape"):
        restore(contents, {"generator": make_objects(2, width=5)["generator"]}, "a.pt", partial=True)


def test_another_kind_of_optimiser_is_noticed(tmp_path: Path) -> None:
    contents = saved_contents(tmp_path, make_objects(2, optimizer=torch.optim.Adam))
    message = message_of_restore(contents, make_objects(2, optimizer=torch.optim.RMSprop))
    assert "'optimizer_g'" in message
    assert "amsgrad" in message
    assert "alpha" in message


def test_another_number_of_parameters_or_groups_in_the_optimiser_is_noticed(tmp_path: Path) -> None:
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    contents = saved_contents(tmp_path, {"optimizer_g": torch.optim.Adam([first])})
    message = message_of_restore(contents, {"optimizer_g": torch.optim.Adam([first, second])})
    assert "'param_groups.0.params' has 1 entries in the checkpoint and 2 here" in message
    message = message_of_restore(
        contents, {"optimizer_g": torch.optim.Adam([{"params": [first]}, {"params": [second]}])}
    )
    assert "'param_groups' has 1 entries in the checkpoint and 2 here" in message


def test_an_options_key_of_another_torch_version_is_accepted(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    contents = saved_contents(tmp_path, {"optimizer_g": torch.optim.Adam([weight], lr=0.3)})
    del contents["objects"]["optimizer_g"]["param_groups"][0]["maximize"]
    optimizer = torch.optim.Adam([weight], lr=0.1)
    restore(contents, {"optimizer_g": optimizer}, "a.pt")
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_a_state_that_its_object_refuses_is_the_same_one_line(tmp_path: Path) -> None:
    class Refusing(MovingAverage):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise ValueError("decay out of range\nsecond line")

    contents = saved_contents(tmp_path, {"ema": MovingAverage()})
    assert "'ema': decay out of range:" in message_of_restore(contents, {"ema": Refusing()})


@pytest.mark.skipif(not HAS_CPU_SCALER, reason="this torch scales gradients on CUDA alone")
@pytest.mark.parametrize("saved_enabled", [True, False])
def test_a_scaler_of_another_precision_starts_fresh_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, saved_enabled: bool
) -> None:
    real, off = torch.amp.GradScaler("cpu", init_scale=8.0), Precision("cpu", None).make_scaler()
    saved, current = (real, off) if saved_enabled else (off, real)
    contents = saved_contents(tmp_path, {"scaler_g": saved})
    with caplog.at_level("INFO", "graf"):
        restore(contents, {"scaler_g": current}, "a.pt")
    assert "saved under another precision" in caplog.text
    assert real.get_scale() == 8.0


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_are_fixed_width() -> None:
    assert checkpoint_name(500) == "model_00000500.pt"


def touch_run(folder: Path) -> None:
    for name in (
        *(checkpoint_name(iteration) for iteration in (1000, 20, 99_999_999, 100_000_000, 500)),
        "model_best.pt",
        "backup_00000100.pt",
        "model_1.pt",
        ".checkpoint.saving",
        "model_00000700.pt.tmp",
    ):
        (folder / name).touch()


def test_checkpoints_are_listed_by_iteration_without_best_backups_and_temporaries(tmp_path: Path) -> None:
    touch_run(tmp_path)
    iterations = (20, 500, 1000, 99_999_999, 100_000_000)
    assert list_checkpoints(tmp_path) == [tmp_path / checkpoint_name(iteration) for iteration in iterations]


def test_an_empty_or_absent_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path) == []
    assert list_checkpoints(tmp_path / "absent") == []


def test_pruning_removes_the_oldest_numbered_ones_only(tmp_path: Path) -> None:
    touch_run(tmp_path)
    others = {path for path in tmp_path.iterdir() if path not in list_checkpoints(tmp_path)}
    prune_checkpoints(tmp_path, keep=2)
    assert list_checkpoints(tmp_path) == [tmp_path / checkpoint_name(i) for i in (99_999_999, 100_000_000)]
    assert others <= set(tmp_path.iterdir())
    prune_checkpoints(tmp_path, keep=5)
    assert len(list_checkpoints(tmp_path)) == 2


def test_pruning_everything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0"):
        prune_checkpoints(tmp_path, keep=0)
