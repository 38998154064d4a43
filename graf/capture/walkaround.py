"""Cameras of a walk around an object, found by structure from motion (COLMAP) from the photographs alone.

The library works in a process of its own (graf/capture/colmap_worker.py): where it aborts or hangs, that is an error
with its last words. What is found is handed on as graf/capture/posed.py takes it.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from graf.base.extras import import_optional
from graf.capture.cameras import Lens, Picture, PosedPhotographs, find_floor
from graf.capture.colmap_worker import IMAGES, MASKS, RESULT_FILE, TEMPORARY, Job, write_job
from graf.capture.errors import CaptureError
from graf.runtime.logs import progress_bar
from graf.runtime.threads import count_usable_cpus

EXHAUSTIVE_BELOW = 80  # photographs; comparing all with all costs their square
FEWEST = 8
SMALL_SIDE = 200  # pixels: smaller photographs are enlarged twice, or hardly any of their features would be found
FEW_FEATURES = 40  # on a photograph that can hardly be matched
MOSTLY_STILL = 0.5  # of the matches: the background stands still, and the camera with it
STILL_SPREAD = 3.0  # degrees between the directions of cameras that all stand at one place
LAST_WORDS = 4  # lines of a library that died
STAGES = {"features": "looking for features", "matches": "comparing photographs", "cameras": "placing cameras"}
ADVICE = (
    "take them 15-20 degrees apart at most, all around and at two or three heights, sharp, with something textured "
    "(a newspaper, a patterned cloth) under the object, and do not move the object"
)


@dataclass(frozen=True)
class WalkaroundSettings:
    """How cameras are looked for.

    features: "scene" uses everything in the pictures, "object" only what is inside the masks, for an object that moved
    against what is behind it; ordered: taken one after the other, as a video's frames; fov: degrees across the width
    where it is known; patience: seconds without any sign of progress after which the library is taken for hung;
    threads: 0 takes the processors that may be used, at most 4. With one a run repeats itself exactly, with more to
    about a ten-thousandth of a degree.
    """

    features: str = "scene"
    ordered: bool = True
    fov: float | None = None
    patience: float = 600.0
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.features not in ("scene", "object"):
            raise ValueError(f"features={self.features!r}: expected scene or object")


@dataclass(frozen=True)
class Walkaround:
    """Photographs with the cameras that were found, in COLMAP's world, names of those that were `lost`, and how good.

    error: mean reprojection error in pixels; points: in space; other_models: sizes of further groups of photographs
    that fit together but not to these.
    """

    photographs: PosedPhotographs
    lost: list[str]
    error: float
    points: int
    other_models: list[int]

    def report(self) -> list[str]:
        """Lines for a person: what was placed and lost, and what to do about it."""
        found, total = len(self.photographs), len(self.photographs) + len(self.lost)
        lines = [
            f"placed {found} of {total} photographs from {self.points} points, reprojection error "
            f"{self.error:.2f} pixels, field of view {self.photographs.lens.fov:.1f} degrees"
        ]
        if self.photographs.floor is None:
            lines.append("no table found below the object: up is as the phone was held")
        if self.lost:
            lines.append(f"lost: {list_names(self.lost)}")
        if self.other_models:
            sizes = ", ".join(map(str, self.other_models))
            lines.append(f"other groups of photographs that do not connect to these: {sizes} (the largest is used)")
        if self.lost:
            lines.append(f"to lose fewer: {ADVICE}")
        return lines


def reconstruct(
    images: Sequence[Picture],
    masks: Sequence[Picture] | None = None,
    names: Sequence[str] | None = None,
    settings: WalkaroundSettings | None = None,
) -> Walkaround:
    """Find the cameras of photographs uint8 (H, W, 3) of one size, taken by one camera around a resting object.

    masks: uint8 (H, W), 255 on the object; names: for messages. Fewer than 80 photographs, or ones in no order, are
    compared each with each, more with their neighbours in time. The largest of several models is taken. Raises
    CaptureError where the photographs cannot be connected or show a standing background, where the library fails, and
    MissingExtra without it.
    """
    settings = settings or WalkaroundSettings()
    names = list(names or [f"photograph {number}" for number in range(len(images))])
    check_photographs(images, masks, names, settings)
    if find_spec("pycolmap") is None:  # not imported where it is there: it would take this process's signals over
        import_optional("pycolmap", "capture")  # says how to get it
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as temporary:
        folder = Path(temporary)
        files = write_photographs(folder, images, masks if settings.features == "object" else None)
        threads = settings.threads or min(4, count_usable_cpus())
        job = Job(
            names=files,
            sequential=settings.ordered and len(files) >= EXHAUSTIVE_BELOW,
            use_masks=settings.features == "object",
            focal_factor=_focal_factor(images[0], settings.fov),
            threads=threads,
            seed=settings.seed,
        )
        write_job(folder, job)
        command = [sys.executable, "-m", "graf.capture.colmap_worker", str(folder)]
        run_worker(command, threads, settings.patience)
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    return read_result(result, images, masks, names, files)


def check_photographs(
    images: Sequence[Picture], masks: Sequence[Picture] | None, names: Sequence[str], settings: WalkaroundSettings
) -> None:
    """Raises CaptureError for too few photographs, several sizes, and masks that are needed and not there."""
    if len(images) < FEWEST:
        raise CaptureError(f"{len(images)} photographs: a walk-around needs at least {FEWEST}, better 40; {ADVICE}")
    shape = images[0].shape
    for name, image in zip(names, images, strict=True):
        if image.shape != shape:
            raise CaptureError(
                f"{name} is {image.shape[1]}x{image.shape[0]}, {names[0]} is {shape[1]}x{shape[0]}; a walk-around "
                "needs photographs of one camera with one zoom, all upright or all on their side"
            )
    if masks is None and settings.features == "object":
        raise CaptureError("features on the object alone need masks: use --mask auto or --mask FOLDER")


def write_photographs(folder: Path, images: Sequence[Picture], masks: Sequence[Picture] | None) -> list[str]:
    """Write images/0000.png, ... and masks/0000.png.png, ...; returns the images' names."""
    files = [f"{number:04d}.png" for number in range(len(images))]
    for name in (IMAGES, MASKS):
        (folder / name).mkdir()
    for number, file in enumerate(files):
        _enlarge(images[number]).save(folder / IMAGES / file, compress_level=1)
        if masks is not None:
            _enlarge(masks[number]).point(lambda value: 255 if value > 127 else 0).save(folder / MASKS / f"{file}.png")
    return files


def _enlarge(picture: Picture) -> Image.Image:
    image = Image.fromarray(picture)
    if max(image.size) >= SMALL_SIDE:
        return image
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC)


def run_worker(command: Sequence[str], threads: int, patience: float) -> None:
    """Run the worker and show how far it is. Raises CaptureError where it fails, or shows no progress for `patience`
    seconds, with its last words.
    """
    places = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=os.pathsep.join(places))
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # by whose end the worker knows that this process is gone
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
    )
    said: list[str] = []
    lines: queue.Queue[tuple[str, str | None]] = queue.Queue()
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    readers = [
        threading.Thread(target=_forward, args=(stream, kind, lines), daemon=True)
        for stream, kind in ((process.stdout, "out"), (process.stderr, "err"))
    ]
    for reader in readers:
        reader.start()
    try:
        _follow(lines, said, patience)
        code = process.wait()
    finally:
        process.kill()  # Ctrl-C, or a hang; one that has ended does not mind
        process.wait()
        for reader in readers:
            reader.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()
    if code:
        signal_name = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        raise CaptureError(
            f"structure from motion (pycolmap) ended {signal_name}; its last words: {_last_words(said)}. Run it again "
            "with fewer photographs (--frames), or take the cameras from markers (graf capture --marker-sheet)"
        )


def _forward(stream: IO[str], kind: str, lines: queue.Queue[tuple[str, str | None]]) -> None:
    for line in stream:
        lines.put((kind, line.rstrip()))
    lines.put((kind, None))


def _follow(lines: queue.Queue[tuple[str, str | None]], said: list[str], patience: float) -> None:
    """Show progress until both streams end; what the library says goes to `said`."""
    bar, total, open_streams, last_sign = None, 0, 2, time.monotonic()
    try:
        while open_streams:
            try:
                kind, line = lines.get(timeout=max(0.0, last_sign + patience - time.monotonic()))
            except queue.Empty:
                raise CaptureError(
                    f"structure from motion (pycolmap) showed no progress for {patience:.0f} seconds and was stopped; "
                    f"its last words: {_last_words(said)}. Run it again with fewer photographs (--frames)"
                ) from None
            last_sign = time.monotonic()
            if line is None:
                open_streams -= 1
            elif kind == "err":
                said.append(line)
                done = _share_done(line)
                if bar is not None and done is not None:
                    bar.update(max(0, round(done * total) - bar.n))
            elif line.startswith("stage "):
                _, stage, number = line.split()
                if bar is not None:
                    bar.close()
                total = int(number)
                bar = progress_bar(desc=STAGES[stage], total=total)
            elif line == "next" and bar is not None:
                bar.update(1)
    finally:
        if bar is not None:
            bar.close()


def _share_done(line: str) -> float | None:
    """How far the library is by what it says: "Processed file [3/40]", or "Processing block [1/4, 3/4]"."""
    if (counted := re.search(r"\[(\d+)/(\d+)(?:, (\d+)/(\d+))?\]", line)) is None:
        return None
    outer, outer_total, inner, inner_total = (int(part) for part in counted.groups(default="1"))
    return (outer - 1 + inner / inner_total) / outer_total


def _last_words(said: Sequence[str]) -> str:
    """The last lines that a library said, without its remarks on how well it goes."""
    words = [line for line in said if line.strip()]
    bad = [line for line in words if not re.match(r"I\d{4,8} ", line)]
    return " | ".join((bad or words)[-LAST_WORDS:]) or "none"


def read_result(
    result: dict[str, Any],
    images: Sequence[Picture],
    masks: Sequence[Picture] | None,
    names: Sequence[str],
    files: Sequence[str],
) -> Walkaround:
    """The largest model of the worker's answer. Raises CaptureError where there is none, or all cameras are one."""
    total, models = len(images), result["models"]
    still = result["still"] / max(result["matches"], 1)
    if not models:
        if still > MOSTLY_STILL:
            raise CaptureError(_explain_standing_background(f"{still:.0%} of all matches stand still"))
        poor = [name for name, file in zip(names, files, strict=True) if result["features"].get(file, 0) < FEW_FEATURES]
        if len(poor) > total / 2:
            raise CaptureError(
                f"{len(poor)} of {total} photographs have fewer than {FEW_FEATURES} features ({list_names(poor)}): "
                f"there is too little to see in them; {ADVICE}"
            )
        raise CaptureError(
            f"the {total} photographs could not be connected ({result['pairs']} pairs of them have something in "
            f"common); {ADVICE}"
        )
    model, *others = models
    chosen = [number for number, file in enumerate(files) if file in model["poses"]]
    poses = np.stack([to_camera_to_world(np.array(model["poses"][files[number]])) for number in chosen])
    spread = spread_of_directions(poses)
    if spread < STILL_SPREAD or (still > MOSTLY_STILL and len(chosen) > 0.9 * total and spread < 2 * STILL_SPREAD):
        raise CaptureError(_explain_standing_background(f"the cameras found differ by {spread:.1f} degrees"))
    height, width = images[0].shape[:2]
    camera = model["camera"]
    pixel = width / camera["width"]  # of the photographs, in pixels of what was looked at
    centre_x, centre_y = camera["centre"]
    lens = Lens(width, height, camera["focal"] * pixel, (centre_x * pixel, centre_y * pixel), camera["radial"])
    photographs = PosedPhotographs(
        [images[number] for number in chosen],
        None if masks is None else [masks[number] for number in chosen],
        poses,
        lens,
        [names[number] for number in chosen],
        find_floor(np.array(model["some_points"]).reshape(-1, 3), poses),
    )
    lost = [name for name, file in zip(names, files, strict=True) if file not in model["poses"]]
    return Walkaround(
        photographs, lost, model["error"] * pixel, model["points"], [len(other["poses"]) for other in others]
    )


def to_camera_to_world(camera_from_world: np.ndarray) -> np.ndarray:
    """The pose (4, 4) of the project's convention of COLMAP's camera-from-world (3, 4), x right, y down, z ahead."""
    rotation, shift = camera_from_world[:, :3], camera_from_world[:, 3]
    pose = np.eye(4)
    pose[:3, :3] = rotation.T @ np.diag([1.0, -1.0, -1.0])
    pose[:3, 3] = -rotation.T @ shift
    return pose


def spread_of_directions(poses: np.ndarray) -> float:
    """The median angle in degrees between what cameras look at and their mean direction."""
    ahead = -poses[:, :3, 2]
    mean = ahead.mean(axis=0)
    if np.linalg.norm(mean) < 0.05:
        return 90.0  # all around
    return float(np.degrees(np.median(np.arccos(np.clip(ahead @ mean / np.linalg.norm(mean), -1, 1)))))


def _explain_standing_background(found: str) -> str:
    return (
        f"{found}: the background stands still against the camera, so this is not a walk around the object. If the "
        "object turned (a turntable), leave out --walkaround; or hide the background: features on the object alone "
        "(--features object with masks), or a plain cloth behind it"
    )


def _focal_factor(image: Picture, fov: float | None) -> float:
    """Focal length in longer sides to begin with; 1.2 is COLMAP's guess, about 45 degrees."""
    height, width = image.shape[:2]
    return 1.2 if fov is None else width / 2 / math.tan(math.radians(fov) / 2) / max(height, width)


def list_names(names: Sequence[str], shown: int = 8) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
