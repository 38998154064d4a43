"""The lens of NeRF's transforms.json: cameras here are centred pinholes with square pixels, one for all photographs.

Files may say more of a lens than that, for the whole set and for each frame. What would put the object elsewhere in the
picture is refused; what hardly moves it is passed over, and told.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from graf.data.errors import DataError

#: camera models of COLMAP and nerfstudio that are pinholes where their distortion is 0
PINHOLES = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "SIMPLE_RADIAL", "RADIAL")
SIZES = ("w", "h", "fl_x", "fl_y")
RADIAL, TANGENTIAL = ("k1", "k2", "k3", "k4"), ("p1", "p2")
NUMBERS = ("camera_angle_x", "camera_angle_y", *SIZES, "cx", "cy", *RADIAL, *TANGENTIAL)
#: how far a key may move what the edge of a picture shows, as a share of its width: without a word, and at all
HARMLESS_SHIFT, LARGEST_SHIFT = 0.005, 0.02

_NEXT_STEPS = {
    **dict.fromkeys(("fl_y", "camera_angle_y"), "scale the photographs to square pixels"),
    "cx": "crop the photographs around it",
    "cy": "crop the photographs around it",
    **dict.fromkeys(RADIAL + TANGENTIAL, "undistort the photographs, for example with COLMAP's image_undistorter"),
}
_SAME_LENS = "correct it, or keep only frames of one lens"


def read_lens(
    content: Mapping[str, Any], frames: Mapping[int, Mapping[str, Any]], where: str
) -> tuple[float | None, list[str]]:
    """The angle in radians across the photographs' width, None where the file has none, and what is passed over of it.

    content: the file's object; frames: those that are used, by number; what one says of its own lens counts for it.
    Raises DataError for a lens that is no centred pinhole with square pixels, or not the same in all frames.
    """
    common, lenses = _check(content, where), {}
    for number, frame in frames.items():
        own = _check(frame, f"{where}, frame {number}")
        lenses[f"{where}, frame {number}" if own else where] = common | own
    angle = next(filter(None, map(_angle, lenses.values())), None)
    if angle is None:
        return None, []
    passed_over: dict[str, tuple[float, str]] = {}  # the largest of every key
    for place, lens in lenses.items():
        for key, shift in _shifts(lens, angle):
            if shift > LARGEST_SHIFT:
                raise DataError(
                    f"{place}: {key}={lens[key]:g} moves what the edge of a picture shows by {shift:.1%} of its width; "
                    f"expected at most {LARGEST_SHIFT:.0%}: cameras are pinholes of {math.degrees(angle):.4g} degrees "
                    f"that look through the middle of the picture; {_NEXT_STEPS.get(key, _SAME_LENS)}"
                )
            if shift > HARMLESS_SHIFT:
                passed_over[key] = max(passed_over.get(key, (0.0, "")), (shift, f"{key}={lens[key]:g} ({shift:.1%})"))
    return angle, [text for _, text in passed_over.values()]


def _check(described: Mapping[str, Any], where: str) -> dict[str, float]:
    """The numbers of a lens. Raises DataError for one that is none, and for a camera that is no pinhole."""
    model = described.get("camera_model") or PINHOLES[0]
    if model not in PINHOLES or described.get("is_fisheye"):
        found = f"camera_model={model!r}" if model not in PINHOLES else "is_fisheye"
        raise DataError(
            f"{where}: {found} is not read; expected a pinhole ({', '.join(PINHOLES)}); undistort the photographs, for "
            "example with COLMAP's image_undistorter"
        )
    lens = {key: described[key] for key in NUMBERS if described.get(key) is not None}
    for key, value in lens.items():
        low, high, expected = -1e9, 1e9, "a number"
        if key in SIZES:
            low, expected = 1e-3, "pixels"
        elif key.startswith("camera_angle"):
            low, high, expected = 1e-6, math.pi, "radians (0 to pi)"
        if not isinstance(value, (int, float)) or not low < value < high:
            raise DataError(f"{where}: {key}={value!r}; expected {expected}; correct it")
    return lens


def _angle(lens: Mapping[str, float]) -> float | None:
    """Radians across the width: as they are given, else by the focal length."""
    if "camera_angle_x" in lens:
        return float(lens["camera_angle_x"])
    return 2 * math.atan(lens["w"] / (2 * lens["fl_x"])) if lens.keys() >= {"w", "fl_x"} else None


def _shifts(lens: Mapping[str, float], angle: float) -> Iterator[tuple[str, float]]:
    """How far each key moves what is seen at the edge, half a width from the middle, as a share of the width.

    Distortion counts as a whole, under the key that has most of it. Pixels say nothing where w and h are missing.
    """
    edge = math.tan(angle / 2)  # on the plane at distance 1
    if "camera_angle_x" in lens:
        yield "camera_angle_x", abs(edge / math.tan(lens["camera_angle_x"] / 2) - 1) / 2
    for key, size, scale in (("fl_x", "w", edge), ("fl_y", "w", edge), ("cx", "w", 1.0), ("cy", "h", 1.0)):
        if lens.keys() >= {key, "w", size}:
            yield key, abs(scale * lens[key] - lens[size] / 2) / lens["w"]
    if lens.keys() >= {"camera_angle_y", "w", "h"}:
        yield "camera_angle_y", abs(edge * lens["h"] / lens["w"] / math.tan(lens["camera_angle_y"] / 2) - 1) / 2
    shares = {key: abs(lens[key]) * edge ** (2 * power) / 2 for power, key in enumerate(RADIAL, 1) if key in lens}
    shares |= {key: abs(lens[key]) * 1.5 * edge for key in TANGENTIAL if key in lens}
    if shares:
        radial = max(_distort(lens, edge * step / 8) for step in range(9)) / (2 * edge)
        tangential = math.hypot(*(shares[key] for key in TANGENTIAL if key in shares))
        yield max(shares, key=lambda key: shares[key]), radial + tangential


def _distort(lens: Mapping[str, float], radius: float) -> float:
    """How far radial distortion moves a point of that radius on the plane at distance 1."""
    return radius * abs(sum(lens.get(key, 0.0) * radius ** (2 * power) for power, key in enumerate(RADIAL, 1)))
