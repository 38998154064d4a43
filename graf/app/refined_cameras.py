"""Learned cameras in people's words: data.refined_cameras -> the weights of a CameraRefinement, and back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from graf.config import ConfigError, DataConfig, RefinedCameras
from graf.geometry.cameras import elevation_from_height
from graf.models.camera_refinement import STORED_FACTOR, CameraRefinement

if TYPE_CHECKING:
    from graf.app.builders import DatasetInfo

#: series of FramingConfig, as CameraRefinement orders them
SERIES = ("log_scale", "right", "down")


def build_camera_refinement(data: DataConfig, dataset_info: DatasetInfo) -> CameraRefinement | None:
    """What is learned, or known by data.refined_cameras, of the photographs' cameras; None where they are as given.

    Raises ConfigError where what is known belongs to other photographs.
    """
    known, classes, heights = data.refined_cameras, dataset_info.class_names, dataset_info.v_list
    if known is None and not data.refine_cameras:
        return None
    cameras = CameraRefinement(len(classes), len(heights)).requires_grad_(data.refine_cameras)
    if known is None:
        return cameras
    if missing := [name for name in classes if name not in known.framing]:
        raise ConfigError(
            f"data.refined_cameras: knows the classes {', '.join(known.framing)}, not {', '.join(missing)}; name those "
            "that it knows in data.classes, or leave it out"
        )
    if len(known.elevations) != len(heights):
        raise ConfigError(
            f"data.refined_cameras: has {len(known.elevations)} elevations for the {len(heights)} heights of the "
            "photographs (data.v_list); leave it out"
        )
    elevations = zip(known.elevations, heights, strict=True)
    state = {
        "lens": math.log(_half_width(dataset_info.fov) / _half_width(known.fov)),
        "elevation": [math.radians(degrees - elevation_from_height(v)) for degrees, v in elevations],
        "framing": [[getattr(known.framing[name], series) for series in SERIES] for name in classes],
    }
    cameras.load_state_dict({name: STORED_FACTOR * torch.tensor(values) for name, values in state.items()})
    return cameras


def read_refined_cameras(cameras: CameraRefinement, dataset_info: DatasetInfo) -> RefinedCameras:
    """What has been learned of the photographs' cameras, as data.refined_cameras takes it."""
    state = {name: (weights.cpu().double() / STORED_FACTOR).tolist() for name, weights in cameras.state_dict().items()}
    elevations = zip(dataset_info.v_list, state["elevation"], strict=True)
    half_width = _half_width(dataset_info.fov) / math.exp(state["lens"])
    framing = {
        name: {series: [round(term, 6) for term in terms] for series, terms in zip(SERIES, values, strict=True)}
        for name, values in zip(dataset_info.class_names, state["framing"], strict=True)
    }
    return RefinedCameras.model_validate(
        {
            "fov": round(2 * math.degrees(math.atan(half_width)), 4),
            "elevations": [round(elevation_from_height(v) + math.degrees(angle), 4) for v, angle in elevations],
            "framing": framing,
        }
    )


def describe_refined_cameras(cameras: CameraRefinement, dataset_info: DatasetInfo) -> str:
    """The same in a few lines."""
    found, given = read_refined_cameras(cameras, dataset_info), map(elevation_from_height, dataset_info.v_list)
    elevations = zip(found.elevations, given, strict=True)
    lines = [
        f"cameras that fit the photographs: field of view {found.fov:.2f} degrees (given: {dataset_info.fov:.2f}), "
        f"elevation {', '.join(f'{degrees:.2f} ({v:.2f})' for degrees, v in elevations)}"
    ]
    device = cameras.framing.device
    for number, name in enumerate(dataset_info.class_names):
        class_idx, u = torch.full((360,), number, device=device), torch.arange(360, device=device) / 360
        with torch.no_grad():
            log_scale, *shifts = cameras.framing_at(class_idx, u).unbind(1)
        low, high = (100 * float(end.exp()) for end in log_scale.aminmax())
        right, down = (50 * float(shift.abs().max()) for shift in shifts)
        lines.append(
            f"  {name}: scale {low:.1f}% to {high:.1f}% over the turn, shifted by up to {right:.1f}% of the image "
            f"sideways and {down:.1f}% up or down"
        )
    return "\n".join(lines)


def _half_width(fov: float) -> float:
    """Half the image's width at distance 1."""
    return math.tan(math.radians(fov) / 2)
