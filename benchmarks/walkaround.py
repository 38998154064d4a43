"""How well cameras are found: walks around toys and a posed data set by structure from motion, and marker sheets.

Found cameras are compared with the true ones after the similarity that fits their places best (Umeyama, PAMI 1991).
Distances are in radii of the object.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

from benchmarks.results import RESULTS, format_table, hardware, write_section
from benchmarks.sheets import photograph_sheet, walk_around_sheet
from benchmarks.videos import (
    FPS,
    Footage,
    Shot,
    Walk,
    film_posed_photographs,
    film_turntable,
    film_walkaround,
)
from graf.base.extras import import_optional
from graf.capture.cameras import Lens
from graf.capture.errors import CaptureError
from graf.capture.markers import poses_from_markers
from graf.capture.posed import centre_on_object
from graf.capture.walkaround import Walkaround, WalkaroundSettings, reconstruct
from graf.evaluation.pictures import write_video

GOOD_ROTATION, GOOD_CENTRE = 2.0, 0.03  # degrees, and radii of the object
LEGO_GROUND = -0.55  # where a table would stand under the bulldozer


@dataclass(frozen=True)
class Similarity:
    """true = scale * rotation @ found + shift."""

    scale: float
    rotation: np.ndarray
    shift: np.ndarray


def fit_similarity(found: np.ndarray, true: np.ndarray) -> Similarity:
    """The similarity of least squares from points (N, 3) to points (N, 3); Umeyama, equations 40-43."""
    found_mean, true_mean = found.mean(axis=0), true.mean(axis=0)
    u, singular, v = np.linalg.svd((true - true_mean).T @ (found - found_mean) / len(found))
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(v))])
    rotation = (u * signs) @ v
    scale = float((singular * signs).sum() / ((found - found_mean) ** 2).sum(axis=1).mean())
    return Similarity(scale, rotation, true_mean - scale * rotation @ found_mean)


def compare_cameras(found: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, Similarity]:
    """Degrees between directions (N,) and distances of centres (N,) of poses (N, 4, 4), after the similarity."""
    similarity = fit_similarity(found[:, :3, 3], true[:, :3, 3].astype(np.float64))
    turned = similarity.rotation @ found[:, :3, :3]
    cosines = (np.einsum("nij,nij->n", turned, true[:, :3, :3]) - 1) / 2
    centres = similarity.scale * found[:, :3, 3] @ similarity.rotation.T + similarity.shift
    return (
        np.degrees(np.arccos(np.clip(cosines, -1, 1))),
        np.linalg.norm(centres - true[:, :3, 3], axis=1),
        similarity,
    )


def as_video(footage: Footage) -> Footage:
    """The same after a video's compression."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder) / "walk.mp4", footage.frames, FPS)
        return replace(footage, frames=imageio.imread(path))


def measure(name: str, footage: Footage, settings: WalkaroundSettings) -> list[str]:
    """A row of the table."""
    started = time.perf_counter()
    names = [str(number) for number in range(len(footage.frames))]
    found = reconstruct(list(footage.frames), list(footage.masks), names, settings)
    seconds = time.perf_counter() - started
    return [name, *describe(found, footage), f"{seconds:.0f}"]


def describe(found: Walkaround, footage: Footage) -> list[str]:
    """Cells: placed, good, rotation and centre (median, nine tenths), field of view, up, middle of the object."""
    total, numbers = len(footage.frames), [int(name) for name in found.photographs.names]
    true = footage.poses.numpy()[numbers]
    rotations, centres, _ = compare_cameras(found.photographs.poses, true)
    _, _, similarity = compare_cameras(centre_on_object(found.photographs).poses, true)
    centres = centres / similarity.scale  # the radius of the object in the true world
    good = int(((rotations < GOOD_ROTATION) & (centres < GOOD_CENTRE)).sum())
    up = np.degrees(np.arccos(min(1.0, similarity.rotation[2, 2])))
    return [
        f"{len(numbers)} of {total}",
        f"{good / total:.0%}",
        f"{np.median(rotations):.2f} / {np.quantile(rotations, 0.9):.2f}",
        f"{np.median(centres):.3f} / {np.quantile(centres, 0.9):.3f}",
        f"{found.photographs.lens.fov:.1f} ({footage.fov:.1f})",
        f"{up:.1f}",
        f"{similarity.scale:.2f}",
    ]


def measure_markers() -> list[list[str]]:
    """Renders of the marker sheet from known cameras: with the field of view known, and measured."""
    cv2 = import_optional("cv2", "capture")
    fov = 55.0
    lens, poses = Lens.from_fov(960, 720, fov), walk_around_sheet(36, (20, 35, 55), (380, 480))
    images = [photograph_sheet(pose, lens, noise=4.0, seed=number) for number, pose in enumerate(poses)]
    for image in images:  # an object that hides the middle and what is behind
        cv2.ellipse(image, (lens.width // 2, lens.height // 2), (90, 110), 0, 0, 360, (116, 116, 116), -1)
    rows = []
    for known in (fov, None):
        started = time.perf_counter()
        marked = poses_from_markers(images, names=[str(number) for number in range(len(images))], fov=known)
        seconds = time.perf_counter() - started
        true = poses[[int(name) for name in marked.photographs.names]]
        found = marked.photographs.poses
        cosines = (np.einsum("nij,nij->n", found[:, :3, :3], true[:, :3, :3]) - 1) / 2
        rotations = np.degrees(np.arccos(np.clip(cosines, -1, 1)))
        places = np.linalg.norm(found[:, :3, 3] - true[:, :3, 3], axis=1) / np.linalg.norm(true[:, :3, 3], axis=1)
        rows.append(
            [
                "known" if known else "measured",
                f"{len(marked.photographs)} of {len(images)}",
                f"{rotations.mean():.3f} / {rotations.max():.3f}",
                f"{places.mean():.2%} / {places.max():.2%}",
                f"{marked.photographs.lens.fov:.2f} ({fov:.2f})",
                f"{seconds:.1f}",
            ]
        )
    return rows


def refusal(work: Callable[[], object]) -> str:
    """What is said where something cannot work."""
    try:
        work()
    except CaptureError as error:
        return str(error)
    return "nothing: it was taken for good"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lego", type=Path, help="transforms_train.json of posed RGBA photographs of the bulldozer")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    settings = WalkaroundSettings(threads=options.threads)
    rows = [
        measure(f"{toy}, 72 frames of a video, 320 px", as_video(film_walkaround(toy, Walk())), settings)
        for toy in ("duck", "mug")
    ]
    if options.lego:
        unordered = replace(settings, ordered=False)
        on_table = film_posed_photographs(options.lego, LEGO_GROUND)
        size = f"{len(on_table.frames)} views in no order, {on_table.frames.shape[2]} px"
        rows.append(measure(f"lego on a patterned table, {size}", on_table, unordered))
        alone = film_posed_photographs(options.lego, None)
        rows.append(measure(f"lego alone, on grey, {size}", alone, replace(unordered, features="object")))

    first = film_walkaround("duck", Walk(elevations=(30.0,), frames=24))
    second = film_walkaround("mug", Walk(elevations=(30.0,), frames=16, seed=1))
    mixed = [*first.frames, *second.frames]
    two = reconstruct(mixed, [*first.masks, *second.masks], [str(number) for number in range(len(mixed))], settings)
    standing = film_turntable("house", Shot(frames=36, turns=1.0, textured=True))
    said = refusal(lambda: reconstruct(list(standing.frames), list(standing.masks), None, settings))
    cells = [
        "",
        "placed",
        "good",
        "rotation, degrees",
        "centre, radii",
        "field of view (true)",
        "up, degrees",
        "radius",
    ]
    markers = ["field of view", "placed", "rotation, degrees (mean / most)", "place (mean / most)", "found (true)"]
    text = (
        f"{hardware()}. Median / nine tenths of the placed photographs, after the best similarity; good: within "
        f"{GOOD_ROTATION:.0f} degrees and {GOOD_CENTRE:.0%} of the object's radius, of all photographs. Up and radius: "
        "of the world that is centred on the object's masks, against the true one, whose toys lie inside a sphere of "
        f"radius 0.95.\n\n{format_table([*cells, 's'], rows)}\n\n"
        f"Two walks on two tables in one (24 and 16 frames): {'; '.join(two.report()[:3])}.\n\n"
        f'A turntable in front of a wall that stands still: "{said}"\n\n'
        f"Marker sheet (A4, 960 x 720 pixels, an object on it):\n\n{format_table([*markers, 's'], measure_markers())}"
    )
    write_section(
        "Cameras of one's own photographs", "python -m benchmarks.walkaround --lego FILE", text, options.results
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
