"""Writing measured figures into benchmarks/RESULTS.md: one section per benchmark, replaced when it is run again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from graf.runtime.device import describe_device, pick_device

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"
TITLE = (
    "# Results\n\nMeasured figures. Every section names the command that writes it and the machine that it ran on.\n"
)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def hardware(device: torch.device | None = None) -> str:
    """A device, by default the one that this process would train on, and torch's version."""
    return f"{describe_device(pick_device('auto') if device is None else device)}, torch {torch.__version__}"


def write_section(title: str, command: str, text: str, path: Path = RESULTS) -> None:
    """Replace the section `## title` of RESULTS.md, or append it."""
    content = path.read_text() if path.exists() else TITLE
    section = f"## {title}\n\n`{command}`\n\n{text.strip()}\n"
    parts = content.split("\n## ")
    kept = [parts[0], *(part for part in parts[1:] if part.split("\n", 1)[0] != title)]
    path.write_text("\n## ".join(part.rstrip() + "\n" for part in kept) + "\n" + section)
