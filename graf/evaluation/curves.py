"""Plots of curves over a logarithmic axis, drawn without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from graf.evaluation.pictures import Picture

COLOURS = ("#9ec3e6", "#1f4e9c", "#c0392b", "#1e8449")
WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 44, 40


@dataclass(frozen=True)
class Panel:
    """Curves by name, each a list of points (x, y) with x above 0, and vertical lines at some x by name: four in all.

    bottom: smaller y are drawn there; None: all are shown.
    """

    title: str
    curves: Mapping[str, Sequence[tuple[float, float]]]
    marks: Mapping[str, float] = field(default_factory=dict)
    bottom: float | None = None


def draw_panels(panels: Sequence[Panel]) -> Picture:
    """The panels below each other: x on a logarithmic axis, y on a linear one."""
    return np.concatenate([_draw_panel(panel) for panel in panels])


def _draw_panel(panel: Panel) -> Picture:
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    points = [point for curve in panel.curves.values() for point in curve]
    powers = [math.log10(x) for x, _ in points]
    first, last = math.floor(min(powers)), max(math.ceil(max(powers)), math.floor(min(powers)) + 1)
    highest, lowest = max(y for _, y in points), min(y for _, y in points)
    lowest = lowest if panel.bottom is None else max(lowest, panel.bottom)
    span = (highest - lowest) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - first) / (last - first)
        up = (max(y, lowest) - lowest) / span
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    for power in range(first, last + 1):
        x, base = place(10.0**power, lowest)
        draw.line([(x, base), place(10.0**power, highest)], fill="#dddddd")
        draw.text((x - 12, base + 6), f"{10.0**power:g}", fill="black", font=font)
    for step in range(5):
        level = lowest + span * step / 4
        x, y = place(10.0**first, level)
        draw.line([(x, y), place(10.0**last, level)], fill="#eeeeee")
        draw.text((6, y - 6), f"{level:.3g}", fill="black", font=font)
    draw.text((LEFT, 6), panel.title, fill="black", font=font)
    across = float(LEFT)
    for name, colour in zip([*panel.curves, *panel.marks], COLOURS, strict=False):
        draw.line([(across, 30), (across + 18, 30)], fill=colour, width=2)
        draw.text((across + 22, 24), name, fill="black", font=font)
        across += 40 + font.getlength(name)
        if name in panel.curves:
            draw.line([place(x, y) for x, y in panel.curves[name]], fill=colour, width=2)
        else:
            draw.line([place(panel.marks[name], lowest), place(panel.marks[name], highest)], fill=colour, width=2)
    return np.array(image)
