"""The space that lies inside the masks of photographs with known cameras: where the object is, and what is not of it.

A smooth object has hardly any points that are found again from elsewhere, but an outline in every picture. Laurentini,
"The visual hull concept for silhouette-based image understanding" (PAMI 1994).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from graf.base.extras import import_optional
from graf.capture.cameras import LEVEL_ROUNDS, Lens, Picture, PosedPhotographs
from graf.capture.errors import CaptureError
from graf.capture.masks import cut_by_colour

GRID = 56  # cells along the side of the cube in which the object is looked for
FINE_GRID = 100  # in which its outline is drawn
AGREEING = 0.95  # of the masks a part of the object has to lie in: one or the other may be wrong
CENTRAL_DISC = 0.9  # of the shorter side: what is taken for the object's outline where there are no masks
KEPT = 0.65  # of a mask that is cut again, at least
POOR_MASK = 0.6  # of the hull's outline: a mask that covers less has missed the object


def find_sphere(photographs: PosedPhotographs) -> tuple[np.ndarray, float]:
    """Centre (3,) and radius of the object: of its visual hull, the space that lies inside (nearly) all of the masks.

    The hull encloses the object and exceeds it only where no camera looks along its surface. Masks that take in too
    much do not matter while others do not. Raises CaptureError where the masks enclose nothing together.
    """
    masks = photographs.masks or [_central_disc(photographs.lens)] * len(photographs)
    centre, half = _surround(photographs, masks)
    points = _carve(photographs, masks, centre, half, GRID)
    if len(points):  # again, with finer cells
        low, high = points.min(axis=0), points.max(axis=0)
        centre, half = (low + high) / 2, 0.55 * (high - low).max() + 2 * half / GRID
        points = _carve(photographs, masks, centre, half, GRID)
    if not len(points):
        raise CaptureError(
            f"the masks of the {len(photographs)} photographs have no place in common, so that the object cannot be "
            "found; look at the masks (one wrong mask in twenty is allowed), or leave them out with --mask none"
        )
    centre = enclosing_centre(points)
    return centre, float(np.linalg.norm(points - centre, axis=1).max() + half / GRID)


def enclosing_centre(points: np.ndarray) -> np.ndarray:
    """The centre (3,) of the smallest ball around points (N, 3), to about a hundredth of its radius.

    Badoiu & Clarkson, "Smaller core-sets for balls" (SODA 2003): again and again a smaller step to the farthest point.
    """
    centre = (points.min(axis=0) + points.max(axis=0)) / 2
    for step in range(1, 100):
        farthest = points[((points - centre) ** 2).sum(axis=1).argmax()]
        centre = centre + (farthest - centre) / (step + 1)
    return centre


def _central_disc(lens: Lens) -> Picture:
    y, x = np.mgrid[: lens.height, : lens.width]
    distance = np.hypot(x + 0.5 - lens.width / 2, y + 0.5 - lens.height / 2)
    return np.where(distance < CENTRAL_DISC * min(lens.width, lens.height) / 2, 255, 0).astype(np.uint8)


def _surround(photographs: PosedPhotographs, masks: Sequence[Picture]) -> tuple[np.ndarray, float]:
    """Centre (3,) and half side of a cube around the object: where the rays through the masks' middles meet, and how
    far around it the masks reach.
    """
    used = [number for number, mask in enumerate(masks) if (mask > 127).any()]
    if len(used) < max(2, AGREEING * len(masks)):
        raise CaptureError(
            f"{len(masks) - len(used)} of {len(masks)} masks are empty; look at them, or use --mask none"
        )
    outlines = [np.argwhere(masks[number] > 127)[:, ::-1] + 0.5 for number in used]  # (x, y) of its pixels
    rotations, centres = photographs.poses[used, :3, :3], photographs.poses[used, :3, 3]
    middles = np.stack([(outline.min(axis=0) + outline.max(axis=0)) / 2 for outline in outlines])
    directions = np.einsum("nij,nj->ni", rotations, photographs.lens.ray(middles))
    # The point nearest to all rays: sum of (1 - d d^T) (p - c) is zero.
    across = np.eye(3) - directions[:, :, None] * directions[:, None]
    weights = np.ones(len(used))
    for _ in range(LEVEL_ROUNDS):
        weighted = across * weights[:, None, None]
        centre = np.linalg.lstsq(weighted.sum(axis=0), np.einsum("nij,nj->i", weighted, centres), rcond=None)[0]
        misses = np.linalg.norm(np.einsum("nij,nj->ni", across, centre - centres), axis=1)
        weights = 1 / np.maximum(misses, np.median(misses) + 1e-9)
    distances = np.linalg.norm(centres - centre, axis=1)
    extents = [
        np.linalg.norm(outline - middle, axis=1).max() for outline, middle in zip(outlines, middles, strict=True)
    ]
    radii = np.array(extents) / photographs.lens.focal * distances
    return centre, 1.5 * float(np.quantile(radii, 0.75))


def _carve(
    photographs: PosedPhotographs, masks: Sequence[Picture], centre: np.ndarray, half: float, cells: int
) -> np.ndarray:
    """Points (M, 3) of a grid in the cube centre +- half that lie inside the masks of the pictures they fall in.

    cells: along each side. A point that falls outside of half of the pictures is no part of the object, nor is one
    below the floor, where an object that is seen from above hides a cone.
    """
    axis = (2 * np.arange(cells) + 1) / cells - 1
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3) * half + centre
    if photographs.floor is not None:
        points = points[points @ photographs.floor[:3] + photographs.floor[3] > -half / cells]
    outside, unseen = np.zeros(len(points), np.int32), np.zeros(len(points), np.int32)
    for number in np.random.default_rng(0).permutation(len(masks)):  # neighbours hardly tell anything new
        mask, pose = masks[number], photographs.poses[number]
        with np.errstate(invalid="ignore"):
            pixels = np.floor(photographs.lens.project((points - pose[:3, 3]) @ pose[:3, :3]))
            x, y = pixels.T
            seen = (x >= 0) & (y >= 0) & (x < mask.shape[1]) & (y < mask.shape[0])
        unseen += ~seen
        inside = mask[np.where(seen, y, 0).astype(np.int64), np.where(seen, x, 0).astype(np.int64)] > 127
        outside += seen & ~inside
        kept = (outside <= (1 - AGREEING) * len(masks)) & (unseen <= len(masks) // 2)
        points, outside, unseen = points[kept], outside[kept], unseen[kept]
    return points


def tighten_masks(photographs: PosedPhotographs) -> tuple[PosedPhotographs, int]:
    """The photographs, whose object fills the unit sphere, with masks that agree; and how many were replaced.

    A mask that takes in the table is cut to the outline of what all masks enclose, since from elsewhere the table shows
    beside the object; one that has missed the object becomes that outline.
    """
    if photographs.masks is None:
        return photographs, 0
    cv2 = import_optional("cv2", "capture")
    half = 1.1
    points = _carve(photographs, photographs.masks, np.zeros(3), half, FINE_GRID)
    cell, lens = 2 * half / FINE_GRID, photographs.lens
    masks, replaced = [], 0
    for mask, pose in zip(photographs.masks, photographs.poses, strict=True):
        local = (points - pose[:3, 3]) @ pose[:3, :3]
        x, y = np.floor(np.nan_to_num(lens.project(local), nan=-1)).astype(np.int64).T
        seen = (x >= 0) & (y >= 0) & (x < lens.width) & (y < lens.height)
        outline = np.zeros_like(mask)
        outline[y[seen], x[seen]] = 255
        # Middles of cells in the nearest distance: no gaps between them, and the outermost half cell is covered.
        size = 2 * math.ceil(0.87 * cell * lens.focal / max(1e-6, float(-local[:, 2].max()))) + 1
        outline = cv2.dilate(outline, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))
        tight = np.minimum(mask, outline)
        if (tight > 127).sum() < POOR_MASK * (outline > 127).sum():
            tight, replaced = outline, replaced + 1
        masks.append(tight)
    return replace(photographs, masks=masks), replaced


def recut_masks(photographs: PosedPhotographs) -> PosedPhotographs:
    """Masks that were found automatically, cut once more by colour: what surrounds them is known not to be the object.

    A fringe of the table, of the width of the hull's cells, is like what lies beside it. A mask that would lose more
    than a third stays as it is.
    """
    if photographs.masks is None:
        return photographs
    cv2 = import_optional("cv2", "capture")
    masks = []
    for image, mask in zip(photographs.images, photographs.masks, strict=True):
        seeds = np.where(mask > 127, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
        cut = np.minimum(mask, cut_by_colour(image, seeds))
        masks.append(cut if (cut > 127).sum() > KEPT * (mask > 127).sum() else mask)
    return replace(photographs, masks=masks)
