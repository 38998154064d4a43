"""Capturing an object that turns before a camera that stands still: from the frames to labels.csv and capture.yaml."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from graf.app.capture_configuration import SetCamera, compose_set_configuration, next_steps, read_set_camera
from graf.base.files import replace_file
from graf.capture.errors import CaptureError
from graf.capture.frames import DEFAULT_FRAMES, Frame, Picture, choose_frames, read_frames, scan
from graf.capture.framing import PHONE_FOV, Camera, Framing, cut, frame_masks, frame_whole, picture_side
from graf.capture.masks import draw_masks, find_odd_masks, masks_of
from graf.capture.photo_set import (
    Subject,
    add_photographs,
    check_subject,
    has_masks,
    height_index,
    read_rows,
    widest_extent,
    work_in,
)
from graf.capture.photographs import Photographs
from graf.capture.posed import TRANSFORMS_FILE
from graf.capture.sources import open_source
from graf.capture.turntable import Turn, find_turn
from graf.data.labels import CAPTURE_FILE, CAPTURE_FOLDER, LABELS_FILE, LabelRow, natural_key, wrap_angle
from graf.geometry.cameras import height_from_elevation

DEFAULT_ELEVATION = 20.0
NEAREST = 1.1  # radii of the object from its middle to a camera, at least
UNLIKE = 1.2  # ratio of two distances from which perspective differs visibly


@dataclass(frozen=True)
class TurntableOptions:
    """What `graf capture` was asked for; angles in degrees, None where it is to be found or a default is to be used."""

    source: Path
    out: Path
    class_name: str
    instance: str
    replace: bool
    frames: int | None
    mask: str
    size: int
    fov: float | None
    elevation: float | None
    turns: float | None
    counter_clockwise: bool | None
    first_angle: float


def capture_turntable(options: TurntableOptions) -> list[str]:
    """Add an object to the set of `options.out`; returns lines for the person. Raises UserError."""
    with work_in(options.out):
        return _capture(options)


def _capture(options: TurntableOptions) -> list[str]:
    rows = read_rows(options.out)
    config_file = options.out / CAPTURE_FILE
    known = _read_cameras(options, rows)
    elevation = DEFAULT_ELEVATION if options.elevation is None else options.elevation
    height, v_list = height_index(known.v_list if known else (), height_from_elevation(elevation))
    subject = Subject(options.class_name, options.instance, height)
    check_subject(rows, subject, options.replace)

    turn, frames, angles = _look(options)
    masks = masks_of(frames, options.mask, still=True)
    framing = _frame(options, rows, subject, frames, masks)
    fov = options.fov or _fov_of(frames[0]) or PHONE_FOV
    camera = framing.camera(frames[0].image.shape[:2], fov)
    if camera.radius <= NEAREST:
        raise CaptureError(
            f"--fov {fov:g}: through such a lens the camera would stand {camera.radius:.2f} radii from the middle of "
            "the object, almost inside it; expected the field of view across the longer side of the frames"
        )
    side = picture_side(framing, options.size)
    is_masked = options.mask != "none"
    pictures = (
        (angle, cut(frame, mask if is_masked else None, framing, side))
        for angle, frame, mask in zip(angles, frames, masks, strict=True)
    )
    drawn = draw_masks(frames, masks, [f"{angle} degrees" for angle in angles])
    first = known or camera
    set_camera = SetCamera(first.radius, first.fov, v_list, is_masked)
    configuration = compose_set_configuration(config_file, set_camera, many_objects=bool(options.instance))
    all_rows = add_photographs(options.out, rows, subject, pictures, configuration)
    sheet = options.out / CAPTURE_FOLDER / f"{subject.name}.png"
    with replace_file(sheet) as stream:
        drawn.save(stream, format="PNG")

    classes = sorted({row.class_name for row in all_rows}, key=natural_key)
    return [
        *_describe_turn(turn, options),
        f"{subject.name}: {len(frames)} pictures of {side}x{side}, elevation {elevation:g} degrees",
        *_warn_of_guesses(options, frames[0], camera, set_camera),
        *_warn_of_masks(masks, angles),
        f"wrote {sheet}: the object should be bright in it and everything else dark red",
        f"{options.out} holds {len(all_rows)} photographs of {len(classes)} classes: {', '.join(classes)}",
        *next_steps(config_file),
    ]


def _read_cameras(options: TurntableOptions, rows: Sequence[LabelRow]) -> SetCamera | None:
    """The cameras of the set that is there, None where there is none. Raises UserError where it cannot be added to."""
    if (options.out / TRANSFORMS_FILE).exists():
        raise CaptureError(
            f"--out {options.out} has photographs with poses of their own ({TRANSFORMS_FILE}); a turntable's need "
            "another folder"
        )
    known = read_set_camera(options.out / CAPTURE_FILE)
    if rows and known is None:
        raise CaptureError(
            f"--out {options.out} has a {LABELS_FILE}, but no {CAPTURE_FILE} that says how its cameras stood; put it "
            "back, or choose another folder"
        )
    is_masked = options.mask != "none"
    masked = has_masks(options.out, rows)
    if masked is None and known is not None:
        masked = known.masked
    if masked not in (None, is_masked):
        have = "transparent around their objects" if masked else "not transparent around their objects"
        want = "leave out --mask none" if masked else "use --mask none"
        raise CaptureError(
            f"--mask {options.mask}: the pictures of {options.out} are {have}, and all of a set have to be alike; "
            f"{want}, or choose another folder"
        )
    return known


def _look(options: TurntableOptions) -> tuple[Turn, list[Frame], list[int]]:
    """The turn, the frames that are chosen from it and their label angles in whole degrees."""
    source = open_source(options.source)
    seen = scan(source)
    turn = find_turn(seen, options.turns, options.counter_clockwise)
    count = options.frames
    if count is None:
        is_folder = isinstance(source, Photographs)
        available = round(min(turn.length, len(seen) - turn.start))
        count = available if is_folder else min(DEFAULT_FRAMES, available)
    numbers = choose_frames(seen, count, turn.start, turn.length)
    frames = read_frames(source, numbers)
    angles = [wrap_angle(options.first_angle + turn.angle(number)) for number in numbers]
    return turn, frames, angles


def _frame(
    options: TurntableOptions,
    rows: Sequence[LabelRow],
    subject: Subject,
    frames: Sequence[Frame],
    masks: Sequence[Picture],
) -> Framing:
    """One framing for the turn; an object that the set has from another height keeps its scale."""
    if options.mask == "none":
        return frame_whole(frames[0].image.shape[:2])
    others = [row for row in rows if subject.shows(replace(row, height=subject.height)) and not subject.shows(row)]
    same_height = [row for row in others if row.height == others[0].height]
    return frame_masks(masks, widest_extent(options.out, same_height))


def _fov_of(frame: Frame) -> float | None:
    """Degrees across the longer side of a photograph, from EXIF; None where it does not tell."""
    if frame.diagonal_fov is None:
        return None
    height, width = frame.image.shape[:2]
    share = max(height, width) / math.hypot(height, width)
    return math.degrees(2 * math.atan(share * math.tan(math.radians(frame.diagonal_fov) / 2)))


def _describe_turn(turn: Turn, options: TurntableOptions) -> list[str]:
    sense = "counter-clockwise" if turn.counter_clockwise else "clockwise"
    how = "as given" if options.counter_clockwise is not None else "by optical flow"
    found = "found" if options.turns is None else "by --turns"
    lines = [f"one turn is {turn.length:.1f} frames ({found}); seen from above the table turns {sense} ({how})"]
    if turn.rival is not None and options.turns is None:
        lines.append(
            f"note: after {turn.rival:.0f} degrees the object looks much alike; if that is a whole turn, give --turns"
        )
    return lines


def _warn_of_masks(masks: Sequence[Picture], angles: Sequence[int]) -> list[str]:
    odd = find_odd_masks(masks, angles)
    if not odd:
        return []
    places = ", ".join(str(angles[number]) for number in odd[:6])
    return [
        f"note: {len(odd)} masks (at {places} degrees) lack what the opposite side has; where the object has the "
        "colours of what is behind it, hang a plain cloth there"
    ]


def _warn_of_guesses(options: TurntableOptions, frame: Frame, camera: Camera, set_camera: SetCamera) -> list[str]:
    guessed = [] if options.fov or _fov_of(frame) else [f"--fov ({PHONE_FOV:g})"]
    guessed += [] if options.elevation is not None else [f"--elevation ({DEFAULT_ELEVATION:g})"]
    lines = []
    if guessed:
        lines.append(
            f"note: {' and '.join(guessed)} guessed; training corrects that (data.refine_cameras), within reason"
        )
    if max(camera.radius / set_camera.radius, set_camera.radius / camera.radius) > UNLIKE:
        lines.append(
            f"note: filmed from {camera.radius:.1f} times the unit sphere's radius, the set's first object from "
            f"{set_camera.radius:.1f}: their perspective differs; let all objects fill the picture alike"
        )
    return lines
