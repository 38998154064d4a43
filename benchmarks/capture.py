"""How well a turntable's video is read: angles, direction and masks of toys against the truth, COIL-100's angles.

Videos are rendered by benchmarks/videos.py, before a plain wall and before a patterned one, and compressed as a phone
would. Photographs of COIL-100 are only read, where they lie beside the checkout.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.results import RESULTS, format_table, hardware, write_section
from benchmarks.videos import Shot, film_turntable
from graf.capture.frames import FULL_SIDE, Source, choose_frames, scan
from graf.capture.masks import masks_of
from graf.capture.sources import open_source
from graf.capture.turntable import Turn, find_turn
from graf.data.shapes import CLASS_NAMES
from graf.evaluation.pictures import write_video

COIL = Path(__file__).resolve().parents[2] / "shared" / "data" / "coil100"
FRAMES, TURNS, CHOSEN, SIZE = 100, 1.3, 48, 192


def angle_errors(turn: Turn, numbers: Sequence[int], azimuths: np.ndarray) -> np.ndarray:
    """Degrees (n,) between the angles of frames and the truth, both counted from where the turn starts."""
    found = np.array([turn.angle(number) for number in numbers])
    true = azimuths[list(numbers)] - azimuths[int(turn.start)]
    return np.abs((found - true + 180) % 360 - 180)


def overlaps(masks: Sequence[np.ndarray], true: np.ndarray) -> np.ndarray:
    """Intersection over union (n,) of masks."""
    pairs = [(mask > 127, truth > 127) for mask, truth in zip(masks, true, strict=True)]
    return np.array([(mask & truth).sum() / (mask | truth).sum() for mask, truth in pairs])


def measure_toy(toy: str, textured: bool, direction: str, folder: Path) -> list[str]:
    """A row: a toy before a wall, the turn that was found, its angles' and masks' errors, seconds for both."""
    shot = Shot(size=SIZE, frames=FRAMES, turns=TURNS, direction=direction, textured=textured)
    footage = film_turntable(toy, shot)
    source = open_source(write_video(folder / f"{toy}_{textured}_{direction}.mp4", footage.frames, 30))
    started = time.perf_counter()
    turn, numbers, errors = _read_angles(source, footage.azimuths.numpy())
    looked = time.perf_counter()
    masks = masks_of(list(source.read(FULL_SIDE, numbers)), "auto", still=True)
    cut = time.perf_counter()
    shares = overlaps(masks, footage.masks[numbers])
    sense = "right" if turn.counter_clockwise == (direction == "cw") else "wrong"
    wall = "patterned" if textured else "plain"
    angles, areas = f"{errors.mean():.2f} / {errors.max():.2f}", f"{shares.mean():.3f} / {shares.min():.3f}"
    seconds = f"{looked - started:.1f} + {cut - looked:.1f}"
    return [toy, wall, sense, f"{turn.length:.2f}", angles, areas, seconds]


def _read_angles(source: Source, azimuths: np.ndarray) -> tuple[Turn, list[int], np.ndarray]:
    seen = scan(source)
    turn = find_turn(seen, None, None)
    count = min(CHOSEN, round(turn.length))
    numbers = choose_frames(seen, count, turn.start, turn.length)
    return turn, numbers, angle_errors(turn, numbers, azimuths)


def measure_coil(name: str, direction: int, again: int, folder: Path) -> list[str]:
    """A row: photographs of COIL-100 in order or backwards, `again` of them once more, of which nothing is told."""
    angles = [angle * direction % 360 for angle in [*range(0, 360, 5), *range(0, 5 * again, 5)]]
    place = folder / f"{name}_{direction}_{again}"
    place.mkdir()
    for number, angle in enumerate(angles):
        (place / f"{number}.png").symlink_to(COIL / f"{name}__{angle}.png")
    turn, _, errors = _read_angles(open_source(place), np.array(angles, float))
    sense = "right" if turn.counter_clockwise == (direction < 0) else "wrong"
    return [
        name,
        "ccw" if direction > 0 else "cw",
        str(len(angles)),
        sense,
        f"{turn.length:.2f}",
        f"{errors.mean():.2f}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        toys = [
            measure_toy(toy, textured, direction, folder)
            for textured in (False, True)
            for toy, direction in zip(CLASS_NAMES, ("cw", "ccw", "ccw", "cw"), strict=True)
        ]
        coil = []
        if COIL.is_dir():
            names = sorted({file.name.split("__")[0] for file in COIL.glob("*.png")})
            cases = [(1, 0), (-1, 18)]
            coil = [measure_coil(name, *case, folder) for name in names for case in cases]
    header = [
        "toy",
        "wall",
        "direction",
        "frames of a turn",
        "angle: mean / largest error",
        "IoU: mean / least",
        "seconds",
    ]
    text = (
        f"{hardware()}. Videos of {TURNS} turns of {FRAMES} frames, {SIZE} x {SIZE} pixels, of which {CHOSEN} frames "
        f"are chosen; degrees; seconds for the angles and for the masks.\n\n{format_table(header, toys)}"
    )
    if coil:
        header = ["COIL-100", "order", "photographs", "direction", "photographs of a turn", "mean error, degrees"]
        text += (
            f"\n\nPhotographs in steps of 5 degrees, as if nothing were known of them:\n\n{format_table(header, coil)}"
        )
    write_section("Turntables read by graf capture", "python -m benchmarks.capture", text, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
