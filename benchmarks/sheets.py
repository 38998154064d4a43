"""Photographs of the marker sheet from known cameras: for tests and benchmarks of what finds those cameras."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graf.base.extras import import_optional
from graf.capture.cameras import Lens, look_at_origin
from graf.capture.marker_sheet import draw_marker_sheet, lay_out_markers

DOTS = 5.0  # per millimetre of the sheet's picture
FINE = 3  # rays along each side of a pixel


def walk_around_sheet(count: int, elevations: Sequence[float], distances: tuple[float, float]) -> np.ndarray:
    """Poses (count, 4, 4) around the sheet by an unsteady hand; elevations in degrees take turns, distances in mm."""
    cv2 = import_optional("cv2", "capture")
    random = np.random.default_rng(0)
    poses = []
    for number in range(count):
        azimuth, elevation = 2 * np.pi * number / count, np.radians(elevations[number % len(elevations)])
        place = [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)]
        pose = look_at_origin(random.uniform(*distances) * np.array(place))
        pose[:3, :3] = pose[:3, :3] @ cv2.Rodrigues(random.normal(0, 0.03, 3))[0]
        poses.append(pose)
    return np.stack(poses)


def photograph_sheet(pose: np.ndarray, lens: Lens, paper: str = "a4", noise: float = 3.0, seed: int = 1) -> np.ndarray:
    """What a pinhole camera sees of the sheet, uint8 (H, W, 3): a homography of it, and noise of some grey levels."""
    cv2 = import_optional("cv2", "capture")
    sheet = lay_out_markers(paper)
    to_millimetres = np.array(
        [[1 / DOTS, 0, 0.5 / DOTS - sheet.width / 2], [0, -1 / DOTS, sheet.height / 2 - 0.5 / DOTS], [0, 0, 1]]
    )
    focal, width, height = lens.focal * FINE, lens.width * FINE, lens.height * FINE
    project = np.array([[focal, 0, width / 2 - 0.5], [0, focal, height / 2 - 0.5], [0, 0, 1]])
    rotation = (pose[:3, :3] @ np.diag([1.0, -1.0, -1.0])).T
    plane = np.column_stack([rotation[:, 0], rotation[:, 1], -rotation @ pose[:3, 3]])
    picture = draw_marker_sheet(sheet, DOTS)
    seen = cv2.warpPerspective(picture, project @ plane @ to_millimetres, (width, height), borderValue=150)
    small = cv2.resize(seen, (lens.width, lens.height), interpolation=cv2.INTER_AREA)
    noisy = 20 + 0.8 * small + np.random.default_rng(seed).normal(0, noise, small.shape)
    return np.dstack([noisy.clip(0, 255).astype(np.uint8)] * 3)
