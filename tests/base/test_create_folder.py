"""A folder that appears when it is whole, or not at all."""

import os

import pytest

from graf.base.errors import UserError
from graf.base.files import create_folder


def test_it_appears_with_all_that_was_written_and_the_usual_permissions(tmp_path):
    target = tmp_path / "deep" / "folder"
    with create_folder(target) as making:
        (making / "a.txt").write_text("a")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a.txt"]
    assert [path.name for path in target.parent.iterdir()] == ["folder"]
    (tmp_path / "usual").mkdir()
    assert target.stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, error):
    def fail():
        with create_folder(tmp_path / "folder") as making:
            (making / "a.txt").write_text("a")
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == []


def test_an_empty_folder_is_taken_over_and_any_other_is_not(tmp_path):
    (tmp_path / "folder").mkdir()
    with create_folder(tmp_path / "folder") as making:
        (making / "a.txt").write_text("a")
    with pytest.raises(UserError, match="exists already"), create_folder(tmp_path / "folder"):
        pass
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="exists already"), create_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
