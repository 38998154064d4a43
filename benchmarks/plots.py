"""Plots of the benchmarks, drawn without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw


def draw_curves(lines: Mapping[str, Sequence[tuple[float, float]]], path: Path, title: str, x_label: str) -> None:
    """A plot of lines by name with logarithmic axes, as a PNG."""
    width, height, left, bottom = 720, 440, 80, 50
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    points = [point for line in lines.values() for point in line]
    spans = [
        (math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))))
        for values in zip(*points, strict=True)
    ]

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (
            (math.log10(value) - low) / max(high - low, 1) for value, (low, high) in zip((x, y), spans, strict=True)
        )
        return left + across * (width - left - 150), height - bottom - up * (height - bottom - 30)

    for axis, (low, high) in enumerate(spans):
        for power in range(low, high + 1):
            start = place(10**power, 10 ** spans[1][0]) if axis == 0 else place(10 ** spans[0][0], 10**power)
            end = place(10**power, 10 ** spans[1][1]) if axis == 0 else place(10 ** spans[0][1], 10**power)
            draw.line([start, end], fill="#dddddd")
            offset = (-15, 6) if axis == 0 else (-60, -6)
            draw.text(
                (start[0] + offset[0], start[1] + offset[1]),
                f"{10**power:,}" if power >= 0 else f"{10.0**power:g}",
                fill="black",
            )
    colours = ("#444444", "#c0392b", "#2471a3", "#1e8449", "#8e44ad")
    for index, (name, line) in enumerate(lines.items()):
        places, colour = [place(*point) for point in line], colours[index % len(colours)]
        draw.line(places, fill=colour, width=2)
        for x, y in places:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        draw.text((width - 135, 40 + 18 * index), name, fill=colour)
    draw.text((left, 8), title, fill="black")
    draw.text((width // 2 - 60, height - 20), x_label, fill="black")
    image.save(path)


@dataclass(frozen=True)
class Bar:
    """A bar of parts one behind the other, 1 long if they are the whole; title above it, note at its end."""

    title: str
    note: str
    parts: Mapping[str, float]


#: for parts of bars, in their order
PALETTE = (
    *("#2471a3", "#c0392b", "#f1c40f", "#1e8449", "#8e44ad", "#e67e22", "#17a589", "#e91e63"),
    *("#7dcea0", "#5d6d7e", "#a04000", "#000000", "#bdc3c7", "#ecf0f1", "#d7bde2"),
)


def draw_bars(bars: Sequence[Bar], names: Sequence[str], path: Path, title: str) -> None:
    """Horizontal bars and a legend of the names that appear in them, as a PNG; up to as many names as PALETTE has."""
    left, length, thick, legend = 20, 620, 18, 180
    shown = [name for name in names if any(bar.parts.get(name) for bar in bars)]
    colours = dict(zip(names, PALETTE, strict=False))
    longest = max([1.0, *(sum(bar.parts.values()) for bar in bars)])
    height = 60 + sum(thick + (30 if bar.title else 6) for bar in bars)
    image = Image.new("RGB", (left + length + 110 + legend, max(height, 60 + 20 * len(shown))), "white")
    draw = ImageDraw.Draw(image)
    draw.text((left, 8), title, fill="black")
    top = 30.0
    for bar in bars:
        if bar.title:
            draw.text((left, top + 6), bar.title, fill="black")
            top += 24
        at = float(left)
        for name in shown:
            wide = bar.parts.get(name, 0.0) * length / longest
            draw.rectangle([at, top, at + wide, top + thick], fill=colours[name])
            at += wide
        draw.text((at + 6, top + 3), bar.note, fill="black")
        top += thick + 6
    for place, name in enumerate(shown):
        x, y = left + length + 110, 34 + 20 * place
        draw.rectangle([x, y, x + 12, y + 12], fill=colours[name], outline="#888888")
        draw.text((x + 18, y), name, fill="black")
    image.save(path)
