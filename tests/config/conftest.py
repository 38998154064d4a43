"""Configuration files that a test writes."""

from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write_file
