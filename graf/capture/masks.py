"""Masks of the object: a person's own, or found by GrabCut from what stands at the border and what at the centre.

A mask is uint8 (H, W), 255 on the object and 0 elsewhere. GrabCut: Rother, Kolmogorov & Blake (SIGGRAPH 2004).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from graf.base.extras import import_optional
from graf.capture.errors import CaptureError
from graf.capture.frames import Frame, Picture, fit_within
from graf.capture.photographs import read_photograph

WORK_SIDE = 320  # pixels of the longer side of what GrabCut sees: its cost grows with their number
BORDER = 0.03  # of the shorter side: what is nearer to the edge of a picture is background
BORDER_COLOURS = 6  # in which a background is summed up
DISTINCT = 18.0  # in CIE Lab: farther from every colour of the border is object, to begin with
CENTRE = 0.35  # of the sides: half-axes of the ellipse in which an object is looked for first
ITERATIONS = 4
SMALL_HOLE = 0.01  # of the object: a highlight, not the hole of a handle
MOVED = 0.15  # of the strongest change of a pixel over time: what changes more belongs to where the object moves
LOOKS = 8  # pictures in which an object is looked for first
PLAIN = 8.0  # CIE Lab: standard deviation of a background of one colour, unevenly lit
PLATE_SHARE = 0.4  # of the frames in which a pixel has to be background, so that its colour behind the object is known
PLATE_SPREAD = 5.0  # grey levels: a background that stands still varies less
SAME, OTHER = 8.0, 40.0  # grey levels from the background behind: less is background, more is object
ODD = 0.75  # of the area of the opposite side's outline, which is its mirror image but for perspective and elevation
OPPOSITE = 20.0  # degrees that the opposite side may be off
SHEET_COLUMNS, SHEET_TILE = 8, 160


def masks_of(frames: Sequence[Frame], mode: str, still: bool = False) -> list[Picture]:
    """A mask (H, W) for each frame. mode: none (everything), auto, or a folder of mask files.

    auto takes the transparency that a photograph has itself, else GrabCut's; still: the camera stands still, so that
    what moves is the object and what is behind it can be seen at other times. Raises CaptureError.
    """
    if mode == "none":
        return [np.full(frame.image.shape[:2], 255, np.uint8) for frame in frames]
    if mode != "auto":
        return [read_mask(Path(mode), frame) for frame in frames]
    if all(frame.alpha is not None and frame.alpha.min() < 128 for frame in frames):
        return [_binary(np.asarray(frame.alpha)) for frame in frames]
    images = [frame.image for frame in frames]
    masks = still_masks(images) if still else [mask_of(image) for image in images]
    lost = [frame.source for frame, mask in zip(frames, masks, strict=True) if not mask.any()]
    if lost:
        raise CaptureError(
            f"--mask auto: no object found in {len(lost)} of {len(frames)} frames ({', '.join(lost[:3])}); put a plain "
            "background of another colour behind it, or give masks of your own: --mask FOLDER"
        )
    return masks


def read_mask(folder: Path, frame: Frame) -> Picture:
    """The mask file of a photograph, of the same name whatever its suffix is (a.jpg: a.png or a.jpg.png).

    The object is white, or opaque where the file has transparency. Raises CaptureError.
    """
    if not folder.is_dir():
        raise CaptureError(f"--mask {folder}: no such folder; expected none, auto or a folder of mask files")
    if "#" in frame.source:
        raise CaptureError(
            f"--mask {folder}: the frames of a video have no names by which masks could be found; write them as "
            "photographs first (ffmpeg -i VIDEO photographs/%04d.png) and capture that folder"
        )
    names = [f"{Path(frame.source).stem}.png", f"{frame.source}.png", frame.source]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise CaptureError(f"--mask {folder}: no mask for {frame.source}; expected {names[0]} there")
    mask = read_photograph(file, max(frame.image.shape))
    values = mask.image.max(axis=2) if mask.alpha is None or mask.alpha.min() >= 128 else mask.alpha
    if abs(values.shape[0] * frame.image.shape[1] - values.shape[1] * frame.image.shape[0]) > max(values.shape):
        raise CaptureError(f"{file} is {values.shape[1]}x{values.shape[0]}, not of the shape of {frame.source}")
    return _binary(_resize(values, frame.image.shape[:2]))


def mask_of(image: Picture) -> Picture:
    """The mask of the object in the middle of one picture (H, W, 3), whose border shows background; may be empty."""
    small = fit_within(image, WORK_SIDE)
    return _binary(_resize(cut_by_colour(small, _seed_from_border(small)), image.shape[:2]))


def still_masks(images: Sequence[Picture]) -> list[Picture]:
    """Masks of pictures (H, W, 3) that a camera took that stood still.

    Before a background of one colour each is cut out by itself. Before any other one, background is what never changes
    around the moving object, and what looks as at the times when the object was not before it.
    """
    coarse = [fit_within(image, WORK_SIDE) for image in images]
    is_plain = _is_plain(coarse[0])
    place = moving_region(coarse)
    if is_plain:  # a vase moves only where it is painted
        some = coarse[:: max(1, len(coarse) // LOOKS)]
        place = place | np.any([cut_by_colour(image, _seed_from_border(image)) > 0 for image in some], axis=0)
    height, width = images[0].shape[:2]
    box = bounding_box(place)
    top, bottom, left, right = (
        round(share * side) for share, side in zip(box, (height, height, width, width), strict=True)
    )
    small = [fit_within(image[top:bottom, left:right], WORK_SIDE) for image in images]
    if is_plain:
        cuts = [cut_by_colour(image, _seed_from_border(image)) for image in small]
    else:
        region = moving_region(small)
        cuts = [cut_by_colour(image, _seed_from_border(image, region)) for image in small]
        plate, known = _background_plate(np.stack(small), np.stack(cuts))
        seeds = [_seed_from_plate(image, mask, plate, known, region) for image, mask in zip(small, cuts, strict=True)]
        cuts = [cut_by_colour(image, seed) for image, seed in zip(small, seeds, strict=True)]
    masks = np.zeros((len(images), height, width), np.uint8)
    for mask, cut_out in zip(masks, cuts, strict=True):
        mask[top:bottom, left:right] = _binary(_resize(cut_out, (bottom - top, right - left)))
    return list(masks)


def moving_region(images: Sequence[Picture]) -> np.ndarray:
    """Where anything moves in pictures (H, W, 3) of one place, bool (H, W): the convex hull, a little enlarged."""
    cv2 = import_optional("cv2", "capture")
    grey = np.stack([cv2.GaussianBlur(image, (0, 0), 1.0) for image in images]).astype(np.float32)
    change = grey.std(axis=0).max(axis=-1)
    moved = (change > max(MOVED * np.percentile(change, 99.5), 2.0)).astype(np.uint8)
    moved = cv2.morphologyEx(moved, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    moved = _largest_component(cv2.morphologyEx(moved, cv2.MORPH_CLOSE, np.ones((15, 15), np.uint8)))
    if not moved.any():
        return np.ones(moved.shape, bool)
    hull = cv2.convexHull(cv2.findNonZero(moved))
    reach = max(3, round(0.03 * max(moved.shape)))
    return cv2.dilate(cv2.fillConvexPoly(moved, hull, 1), np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)) > 0


def bounding_box(place: np.ndarray) -> tuple[float, float, float, float]:
    """(top, bottom, left, right) of what is True in (H, W), with some background around it, as shares of the sides."""
    shares = []
    for axis in (1, 0):
        places, side = np.nonzero(place.any(axis=axis))[0], place.shape[1 - axis]
        margin = 0.15 * (places[-1] - places[0] + 1)
        shares += [max(0.0, (places[0] - margin) / side), min(1.0, (places[-1] + 1 + margin) / side)]
    return shares[0], shares[1], shares[2], shares[3]


def _seed_from_border(image: Picture, region: np.ndarray | None = None) -> np.ndarray:
    """GrabCut's first guess: background outside of the region (or at the border), likely so where it looks as there."""
    cv2 = import_optional("cv2", "capture")
    height, width = image.shape[:2]
    if region is None:
        margin = max(2, round(BORDER * min(height, width)))
        region = np.zeros((height, width), bool)
        region[margin:-margin, margin:-margin] = True
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    outside = lab[~region]
    if len(outside) < BORDER_COLOURS:
        outside = np.concatenate([lab[0], lab[-1]])
    cv2.setRNGSeed(0)
    criteria = (cv2.TERM_CRITERIA_MAX_ITER, 10, 1.0)
    _, _, colours = cv2.kmeans(outside, BORDER_COLOURS, None, criteria, 1, cv2.KMEANS_PP_CENTERS)
    distance = np.min([np.linalg.norm(lab - colour, axis=-1) for colour in colours], axis=0)
    y, x = np.mgrid[:height, :width]
    rows, columns = np.nonzero(region)
    central = ((y - rows.mean()) / (CENTRE * np.ptp(rows) + 1)) ** 2 + (
        (x - columns.mean()) / (CENTRE * np.ptp(columns) + 1)
    ) ** 2 < 1
    likely = (distance > DISTINCT) | (central & (distance > DISTINCT / 3))
    return np.where(region, np.where(likely, cv2.GC_PR_FGD, cv2.GC_PR_BGD), cv2.GC_BGD).astype(np.uint8)


def _is_plain(image: Picture) -> bool:
    """Whether the border of a picture has one colour."""
    cv2 = import_optional("cv2", "capture")
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    margin = max(2, round(BORDER * min(image.shape[:2])))
    sides = (lab[:margin], lab[-margin:], lab[:, :margin], lab[:, -margin:])
    return float(np.concatenate([side.reshape(-1, 3) for side in sides]).std(axis=0).max()) < PLAIN


def _background_plate(images: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is behind the object, float32 (H, W, 3), and where that is known (H, W): of pixels that are background in
    enough of the pictures (N, H, W, 3), whose first masks are (N, H, W), and look alike in all of these.
    """
    cv2 = import_optional("cv2", "capture")
    free = np.stack([cv2.dilate(mask, np.ones((5, 5), np.uint8)) == 0 for mask in masks])
    pictures = np.where(free[..., None], images.astype(np.float32), np.nan)
    known = free.mean(axis=0) >= PLATE_SHARE
    plate = np.zeros(images.shape[1:], np.float32)
    plate[known] = np.nanmedian(pictures[:, known], axis=0)
    spread = np.zeros(known.shape, np.float32)
    spread[known] = np.nanmedian(np.abs(pictures[:, known] - plate[known]), axis=0).max(axis=-1)
    return plate, known & (spread < PLATE_SPREAD)


def _seed_from_plate(
    image: Picture, mask: np.ndarray, plate: np.ndarray, known: np.ndarray, region: np.ndarray
) -> np.ndarray:
    """GrabCut's second guess, of the first mask and the difference from what is behind."""
    cv2 = import_optional("cv2", "capture")
    difference = np.abs(cv2.GaussianBlur(image, (0, 0), 0.7).astype(np.float32) - plate).max(axis=-1)
    seeds = np.where(mask > 0, cv2.GC_PR_FGD, cv2.GC_PR_BGD)
    seeds = np.where(known & (difference > SAME), cv2.GC_PR_FGD, seeds)
    seeds = np.where(known & (difference > OTHER), cv2.GC_FGD, seeds)
    seeds = np.where(known & (difference < SAME), cv2.GC_BGD, seeds)
    return np.where(region, seeds, cv2.GC_BGD).astype(np.uint8)


def cut_by_colour(image: Picture, seeds: np.ndarray) -> Picture:
    """GrabCut from seeds; the largest component, with small holes filled. Empty where the seeds hold no object."""
    cv2 = import_optional("cv2", "capture")
    mask = seeds.copy()
    is_object = (mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)
    if is_object.sum() < 16 or (~is_object).sum() < 16:  # too few for its mixtures of five Gaussians
        return np.zeros(mask.shape, np.uint8)
    cv2.setRNGSeed(0)
    bgr = np.ascontiguousarray(image[..., ::-1])
    cv2.grabCut(bgr, mask, None, np.zeros((1, 65)), np.zeros((1, 65)), ITERATIONS, cv2.GC_INIT_WITH_MASK)
    found = ((mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)).astype(np.uint8)
    return _fill_small_holes(_largest_component(found)) * np.uint8(255)


def _largest_component(mask: Picture) -> Picture:
    """The connected part of a mask of 0 and 1 with the most pixels, those near the centre counting more."""
    cv2 = import_optional("cv2", "capture")
    count, parts = cv2.connectedComponents(mask)
    if count < 3:
        return mask
    height, width = mask.shape
    y, x = np.mgrid[:height, :width]
    nearness = np.exp(-8 * ((y / height - 0.5) ** 2 + (x / width - 0.5) ** 2))
    weights = np.bincount(parts.ravel(), weights=nearness.ravel())
    return (parts == 1 + weights[1:].argmax()).astype(np.uint8)


def _fill_small_holes(mask: Picture) -> Picture:
    cv2 = import_optional("cv2", "capture")
    _, parts, statistics, _ = cv2.connectedComponentsWithStats(1 - mask, connectivity=4)
    is_small = statistics[:, cv2.CC_STAT_AREA] < SMALL_HOLE * mask.sum()
    return np.where(is_small[parts], np.uint8(1), mask)


def _binary(values: Picture) -> Picture:
    return np.where(values >= 128, np.uint8(255), np.uint8(0))


def _resize(values: Picture, shape: tuple[int, int]) -> Picture:
    cv2 = import_optional("cv2", "capture")
    return np.asarray(cv2.resize(values, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR))


def find_odd_masks(masks: Sequence[Picture], angles: Sequence[float]) -> list[int]:
    """Numbers of masks of a turn that hold much less than those from the opposite side, whose outlines are alike.

    angles: in degrees, of each mask. One that has no other opposite of it is none of them.
    """
    areas = np.array([(mask > 127).sum() for mask in masks], float)
    places = np.asarray(angles, float)
    beside = np.abs((places[:, None] - places) % 360 - 180)  # degrees between one and the opposite of another
    is_odd = (areas < ODD * areas[beside.argmin(axis=1)]) & (beside.min(axis=1) <= OPPOSITE)
    return np.nonzero(is_odd)[0].tolist()


def draw_masks(frames: Sequence[Frame], masks: Sequence[Picture], captions: Sequence[str]) -> Image.Image:
    """A contact sheet: every frame with its background darkened to red, and a caption each."""
    rows = -(-len(frames) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * SHEET_TILE, rows * (SHEET_TILE + 14)), "white")
    for place, (frame, mask, caption) in enumerate(zip(frames, masks, captions, strict=True)):
        share = _resize(mask, frame.image.shape[:2])[..., None] / 255.0
        behind = 0.35 * frame.image + np.array([90, 0, 0])
        tile = Image.fromarray((share * frame.image + (1 - share) * behind).clip(0, 255).astype(np.uint8))
        tile.thumbnail((SHEET_TILE, SHEET_TILE))
        left, top = place % SHEET_COLUMNS * SHEET_TILE, place // SHEET_COLUMNS * (SHEET_TILE + 14)
        sheet.paste(tile, (left, top))
        ImageDraw.Draw(sheet).text((left + 2, top + SHEET_TILE + 1), caption, fill="black")
    return sheet
