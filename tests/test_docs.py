"""The pages of docs/: every command has one, and what their command lines say is what the commands take."""

import pkgutil
import re
from pathlib import Path

import pytest

from graf.app.command_line import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
#: a command line, in a block or in backticks: its command and what follows
COMMAND_LINE = re.compile(r"(?:^|`)(?:\$ )?graf ([a-z]+)((?: [^`\n#]*)?)", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z_-]*")


@pytest.fixture(scope="module")
def help_texts() -> dict[str, str]:
    """What each command says of itself."""
    return {}


def options_of(command: str, known: dict[str, str], capsys: pytest.CaptureFixture[str]) -> set[str]:
    if command not in known:
        with pytest.raises(SystemExit):
            pkgutil.resolve_name(COMMANDS[command][0])(["--help"])
        known[command] = capsys.readouterr().out
    return set(OPTION.findall(known[command]))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_page_that_shows_how_it_is_called(command):
    page = DOCS / f"{command}.md"
    assert page.is_file()
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# graf {command}\n")
    assert command in [name for name, _ in COMMAND_LINE.findall(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_option_that_a_page_shows_exists(page, help_texts, capsys):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for command, rest in COMMAND_LINE.findall(text):
        if command in COMMANDS:
            unknown = set(OPTION.findall(rest)) - options_of(command, help_texts, capsys) - {"--help", "--version"}
            assert not unknown, f"graf {command}{rest}"
    if page.stem in COMMANDS:  # in its own page also options in tables and sentences
        alone = {option for option in re.findall(r"`(--[a-z_-]+)(?: [^`]*)?`", text)}
        named = {page.stem, *(command for command, _ in COMMAND_LINE.findall(text) if command in COMMANDS)}
        assert alone <= set().union(*(options_of(command, help_texts, capsys) for command in named))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_to_files_that_are_there(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        assert path.exists(), f"{page.name}: {target}"
        assert path.is_relative_to(DOCS), f"{page.name}: {target} is not part of the site"


def test_the_site_has_every_page_once():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    nav = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    listed = [
        page for group in nav for entry in group.values() for page in ([entry] if isinstance(entry, str) else entry)
    ]
    assert len(listed) == len(set(listed))
    assert {page.name for page in PAGES} <= set(listed)
