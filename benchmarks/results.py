"""Writing measured figures into benchmarks/RESULTS.md: one section per benchmark, replaced when it is run again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from graf.base.files import write_atomically
from graf.runtime.device import describe_device, pick_device

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"
TITLE = (
    "# Results\n\nMeasured figures. Every section names the command that writes it and the machine that it ran on.\n"
)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped, as it would end the cell."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def hardware(device: torch.device | None = None) -> str:
    """A device, by default the one that this process would train on, and torch's version."""
    return f"{describe_device(pick_device('auto') if device is None else device)}, torch {torch.__version__}"


def write_section(title: str, command: str, text: str, path: Path = RESULTS) -> None:
    """Replace the section `## title` of RESULTS.md where it stands, or append it."""
    introduction, *sections = (path.read_text() if path.exists() else TITLE).split("\n## ")
    places = {section.split("\n", 1)[0]: section for section in sections}
    places[title] = f"{title}\n\n`{command}`\n\n{text}"
    write_atomically(path, "\n## ".join(part.rstrip() + "\n" for part in [introduction, *places.values()]))
