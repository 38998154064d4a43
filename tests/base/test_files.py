"""Files are replaced as a whole or not at all."""

import pytest

from graf.base.files import replace_file, write_atomically


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
