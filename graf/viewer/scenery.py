"""What stands around the object: axes, the unit sphere, and the cameras of training with what they saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from graf.viewer.exhibit import Photograph
from graf.viewer.viewpoints import viser_rotation

SPHERE_SEGMENTS = 96
GREY, ORANGE = (130, 130, 130), (240, 140, 20)
FRUSTUM_SIZE, LINE_WIDTH = 0.25, 0.006


def great_circles() -> np.ndarray[Any, np.dtype[np.float32]]:
    """The unit sphere's circles in the three coordinate planes: line segments (N, 2, 3)."""
    turn = torch.linspace(0, 2 * math.pi, SPHERE_SEGMENTS + 1)
    zero = torch.zeros_like(turn)
    circles = [
        torch.stack(axes, dim=1)
        for axes in (
            (turn.cos(), turn.sin(), zero),
            (turn.cos(), zero, turn.sin()),
            (zero, turn.cos(), turn.sin()),
        )
    ]
    return torch.cat([torch.stack([points[:-1], points[1:]], dim=1) for points in circles]).float().numpy()


class Scenery:
    """The nodes of one client's scene; fov: of the photographs, degrees."""

    def __init__(self, scene: Any, photographs: Sequence[Photograph], fov: float) -> None:
        self._scene, self._photographs, self._fov = scene, photographs, fov
        self._axes = scene.add_frame("/axes", axes_length=1.0, axes_radius=0.008, visible=False)
        self._sphere = scene.add_line_segments(
            "/unit sphere", great_circles(), GREY, thickness=LINE_WIDTH, thickness_units="world", visible=False
        )
        self._frustums: list[Any] = []
        self._cameras_shown = False
        self._class_name: str | None = None

    def show(self, name: str, is_seen: bool, class_name: str) -> None:
        """Show or hide the axes, the unit sphere or the training cameras, those of a class."""
        if name == "axes":
            self._axes.visible = is_seen
        elif name == "unit sphere":
            self._sphere.visible = is_seen
        else:
            self._cameras_shown = is_seen
            self.arrange(class_name)

    def arrange(self, class_name: str) -> None:
        """Put up the cameras of a class, where cameras are shown, instead of those of another."""
        wanted = class_name if self._cameras_shown else None
        if wanted == self._class_name:
            return
        self._class_name = wanted
        for frustum in self._frustums:
            frustum.remove()
        self._frustums = [
            self._scene.add_camera_frustum(
                f"/training cameras/{number}",
                fov=math.radians(self._fov),
                aspect=1.0,
                scale=FRUSTUM_SIZE,
                thickness=LINE_WIDTH,
                color=ORANGE,
                image=photograph.thumbnail,
                wxyz=viser_rotation(photograph.camera_to_world),
                position=tuple(photograph.camera_to_world[:3, 3].tolist()),
            )
            for number, photograph in enumerate(self._photographs)
            if photograph.class_name == wanted
        ]
