"""Files are replaced as a whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from graf.base.errors import UserError
from graf.base.files import check_writable, replace_file, write_atomically


def test_a_file_is_written_with_its_folders_and_replaced(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_atomically(path, "one")
    write_atomically(path, "zwei ü")
    assert path.read_text(encoding="utf-8") == "zwei ü"
    assert [file.name for file in path.parent.iterdir()] == ["b.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "b.txt"
    write_atomically(path, b"old")

    def fail() -> None:
        with replace_file(path, "w", encoding="utf-8") as file:
            file.write("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["b.txt"]


def test_a_text_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    write_atomically(tmp_path / "config.yaml", "old")

    def fail(*paths: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "config.yaml", "new")
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "old"


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be synced there")
def test_a_folder_that_cannot_be_synced_is_said_once_and_the_file_counts(tmp_path, monkeypatch, caplog):
    real_open = os.open

    def refuse_folders(target, flags, *rest):
        if os.path.isdir(target):
            raise OSError("Invalid argument")
        return real_open(target, flags, *rest)

    monkeypatch.setattr(os, "open", refuse_folders)
    for text in ("one", "two"):
        write_atomically(tmp_path / "b.txt", text)
    assert (tmp_path / "b.txt").read_text() == "two"
    assert caplog.text.count("does not sync folders (Invalid argument)") == 1


def test_a_temporary_name_of_ones_own_is_used_and_gone_afterwards(tmp_path):
    with replace_file(tmp_path / "b.txt", temporary_name=".saving") as file:
        file.write(b"new")
        assert [file.name for file in tmp_path.iterdir()] == [".saving"]
    assert [file.name for file in tmp_path.iterdir()] == ["b.txt"]


@pytest.mark.parametrize("named", [False, True])
def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path, named):
    """A full disk names none; a folder that cannot be written would name the temporary file."""

    def fail() -> None:
        with replace_file(tmp_path / "a.txt") as file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *[file.name][: int(named)])

    with pytest.raises(OSError, match="No space") as error:
        fail()
    assert error.value.filename == str(tmp_path / "a.txt")


def test_a_folder_that_cannot_be_written_is_told_and_another_is_left_empty(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/nowhere")):
        with pytest.raises(UserError, match=rf"^{folder}: cannot be written \(.*\); choose another folder$"):
            check_writable(folder)
