"""What an optional dependency that is not installed says, and that one that is broken is not taken for missing."""

import sys
from types import ModuleType

import pytest

from graf.base.extras import MissingExtra, import_optional


def test_a_missing_package_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(MissingExtra) as caught:
        import_optional("viser", "viewer")
    assert str(caught.value) == 'viser is not installed; run: pip install "graf-ccsr[viewer]"'


def test_an_installed_package_is_given():
    assert isinstance(import_optional("json", "mesh"), ModuleType)


def test_a_package_that_fails_for_another_reason_says_its_own(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        import_optional("broken_package", "mesh")
