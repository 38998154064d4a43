"""Plots of the benchmarks, drawn without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
