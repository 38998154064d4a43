"""What an optional dependency that is not installed says, and that one that is broken is not taken for missing."""

import sys
from types import ModuleType

import pytest

from benchmarks import viewer
from graf.base import extras
from graf.base.extras import MissingExtra, import_optional, name_install_command


def test_a_missing_package_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(MissingExtra) as caught:
        import_optional("viser", "viewer")
    assert str(caught.value) == f"viser is not installed; run: {name_install_command('viewer')}"


def test_a_package_of_a_benchmark_alone_comes_with_the_requirements_of_development(monkeypatch):
    monkeypatch.setitem(sys.modules, "playwright", None)
    with pytest.raises(SystemExit, match=r"pip install -r requirements-dev\.txt"), viewer.open_page(0):
        pass


@pytest.mark.parametrize("is_checkout", [True, False])
def test_the_command_installs_from_the_checkout_or_by_name(tmp_path, monkeypatch, is_checkout):
    monkeypatch.setattr(extras, "_CHECKOUT", tmp_path)
    if is_checkout:
        (tmp_path / "pyproject.toml").touch()
    source = f'-e "{tmp_path}' if is_checkout else '"graf-ccsr'
    assert name_install_command("mesh") == f'pip install {source}[mesh]"'


def test_an_installed_package_is_given():
    assert isinstance(import_optional("json", "mesh"), ModuleType)


def test_a_package_that_fails_for_another_reason_says_its_own(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        import_optional("broken_package", "mesh")
