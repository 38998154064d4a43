"""The controls of one client: what viser shows of a session, and what the session is told.

Everything that takes longer than an instant is handed to the server: pictures to its render loop, files to its worker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from graf.base.errors import UserError
from graf.geometry.cameras import elevation_from_height
from graf.runtime.logs import logger
from graf.viewer.drawing import AS_TRAINED, BACKGROUNDS
from graf.viewer.session import DRAWN, MAX_SEED, Session

MIN_SAMPLES, MAX_SAMPLES = 4, 128
HEIGHTS = (64, 128, 192, 256, 384, 512, 768, 1024)
ADAPTIVE = "adaptive"
MOVING_HEIGHTS = (ADAPTIVE, "64", "96", "128", "192", "256")
AZIMUTHS = ("0°", "90°", "180°", "270°")
MESH_RESOLUTIONS = ("64", "128", "192", "256")
PATH_SECONDS = 2.0
#: things in the scene besides the object -> whether they are seen at first
SCENERY = {"axes": False, "unit sphere": False, "training cameras": False}


@dataclass(frozen=True)
class Actions:
    """What the server does when a client asks for it.

    redraw: draw the session as it is now; show: (thing of SCENERY, whether it is seen); arrange: after what may be
    another class was chosen; move: camera to (azimuth, elevation), degrees, None to keep one; zoom: to a vertical field
    of view. The other ones make files, or a keyframe.
    """

    redraw: Callable[[], None]
    show: Callable[[str, bool], None]
    arrange: Callable[[], None]
    move: Callable[[float | None, float | None], None]
    zoom: Callable[[float], None]
    add_keyframe: Callable[[], None]
    save_picture: Callable[[], None]
    save_path: Callable[[], None]
    export_mesh: Callable[[], None]
    complain: Callable[[str], None]


class Panel:
    """Builds the controls in a client's `gui`; the values of those that the server asks about are attributes."""

    def __init__(self, gui: Any, session: Session, actions: Actions, full_height: int) -> None:
        self._gui, self._session, self._actions = gui, session, actions
        self.lock = threading.Lock()  # controls are answered in threads, and a session is not made for two at once
        self.status = gui.add_markdown("connecting ...")
        self._build_object()
        self._build_picture(full_height)
        self._build_camera()
        self._build_path()
        self._build_files()

    @property
    def full_height(self) -> int:
        """Rows of a picture that stands still."""
        return int(self._height.value)

    @property
    def moving_height(self) -> int | None:
        """Rows of a picture that moves; None: as many as keep the rate."""
        return None if self._moving_height.value == ADAPTIVE else int(self._moving_height.value)

    @property
    def seconds(self) -> float:
        """Seconds from keyframe to keyframe."""
        return float(self._seconds.value)

    @property
    def closed(self) -> bool:
        """Whether the path returns to its first keyframe."""
        return bool(self._closed.value)

    @property
    def mesh_resolution(self) -> int:
        """Cells of a mesh's grid along each axis."""
        return int(self._mesh_resolution.value)

    def count_keyframes(self) -> None:
        """Tell how many keyframes there are."""
        self._keyframes.content = f"keyframes: {len(self._session.keyframes)}"

    # ------------------------------------------------------------------------------------------------ its folders

    def _build_object(self) -> None:
        gui, session = self._gui, self._session
        with gui.add_folder("Object"):
            classes = gui.add_dropdown("class", session.renderer.classes, initial_value=session.look.class_name)
            instance = None
            if session.known_instances():
                instance = gui.add_dropdown(
                    "known object", (DRAWN, *session.known_instances()), hint="objects that training knows by name"
                )
            seed = gui.add_number("seed", session.seed, min=0, max=MAX_SEED, step=1, hint="names a drawn object")
            shape = gui.add_button_group("shape", ("random", "step"), hint="draw another shape code, or one nearby")
            appearance = gui.add_button_group("appearance", ("random", "step"), hint="the same of the colours")
            other = gui.add_number("second seed", session.other_seed, min=0, max=MAX_SEED, step=1)
            share = gui.add_slider("interpolation", 0.0, 1.0, 0.01, 0.0, hint="from the object to the second one")

        def answer(control: Any, choose: Callable[[], None]) -> None:
            """A choice of one control may be one of others too, which then show it."""

            def act() -> None:
                choose()
                classes.value = session.look.class_name
                if instance is not None:
                    instance.value = session.instance
                self._actions.arrange()

            self._answer(control, act)

        answer(classes, lambda: session.choose_class(classes.value))
        if instance is not None:
            answer(instance, lambda: session.choose_instance(instance.value))
        answer(seed, lambda: session.choose_seed(int(seed.value)))
        answer(shape, lambda: session.draw_part("shape", shape.value == "step"))
        answer(appearance, lambda: session.draw_part("appearance", appearance.value == "step"))
        self._answer(other, lambda: session.choose_other(int(other.value)))
        self._answer(share, lambda: session.interpolate(share.value))

    def _build_picture(self, full_height: int) -> None:
        gui, session = self._gui, self._session
        heights = tuple(str(height) for height in sorted({*HEIGHTS, full_height}))
        with gui.add_folder("Picture"):
            mode = gui.add_dropdown("show", session.modes(), initial_value=session.look.mode)
            samples = gui.add_slider(
                "samples per ray", MIN_SAMPLES, MAX_SAMPLES, 1, min(max(session.num_samples, MIN_SAMPLES), MAX_SAMPLES)
            )
            background = gui.add_dropdown("background", (AS_TRAINED, *BACKGROUNDS))
            self._height = gui.add_dropdown(
                "rows", heights, initial_value=str(full_height), hint="height of the picture when nothing moves"
            )
            self._moving_height = gui.add_dropdown(
                "rows in motion", MOVING_HEIGHTS, hint="adaptive: as many as keep a steady rate"
            )
        self._answer(mode, lambda: session.choose_mode(mode.value))
        self._answer(samples, lambda: session.choose_samples(int(samples.value)))
        self._answer(background, lambda: session.choose_background(background.value))
        self._answer(self._height, lambda: None)
        self._answer(self._moving_height, lambda: None)

    def _build_camera(self) -> None:
        gui, cameras, actions = self._gui, self._session.renderer.cameras, self._actions
        heights = sorted(map(elevation_from_height, cameras.v_list))
        elevations = {_name_elevation(height): height for height in heights}
        with gui.add_folder("Camera"):
            default = _name_elevation(self._session.renderer.default_elevation)
            elevation = gui.add_dropdown(
                "elevation", tuple(elevations), initial_value=default, hint="the heights of the photographs"
            )
            azimuth = gui.add_button_group("azimuth", AZIMUTHS)
            fov = gui.add_slider("field of view", 5.0, 90.0, 0.5, min(max(self._session.renderer.fov, 5.0), 90.0))
            scenery = {name: gui.add_checkbox(name, seen) for name, seen in SCENERY.items()}
        self._answer(elevation, lambda: actions.move(None, elevations[elevation.value]), draws=False)
        self._answer(
            azimuth, lambda: actions.move(float(azimuth.value.rstrip("°")), elevations[elevation.value]), draws=False
        )
        self._answer(fov, lambda: actions.zoom(fov.value), draws=False)
        for name, box in scenery.items():
            self._answer(box, partial(self._show_scenery, name, box), draws=False)

    def _show_scenery(self, name: str, box: Any) -> None:
        self._actions.show(name, box.value)

    def _build_path(self) -> None:
        gui, session = self._gui, self._session
        with gui.add_folder("Camera path"):
            add, clear = gui.add_button("add keyframe"), gui.add_button("clear")
            self._keyframes = gui.add_markdown("keyframes: 0")
            self._seconds = gui.add_number("seconds each", PATH_SECONDS, min=0.1, max=60.0, step=0.1)
            self._closed = gui.add_checkbox("closed", False, hint="from the last keyframe back to the first")
            save = gui.add_button("save path", hint="as JSON, for graf eval --path, and as a video")

        def clear_keyframes() -> None:
            session.keyframes.clear()
            self.count_keyframes()

        self._answer(add, self._actions.add_keyframe, draws=False)
        self._answer(clear, clear_keyframes, draws=False)
        self._answer(save, self._actions.save_path, draws=False)

    def _build_files(self) -> None:
        gui, actions = self._gui, self._actions
        with gui.add_folder("Save"):
            picture = gui.add_button("save picture")
            mesh = gui.add_button("export mesh")
            self._mesh_resolution = gui.add_dropdown("mesh resolution", MESH_RESOLUTIONS, initial_value="128")
        self._answer(picture, actions.save_picture, draws=False)
        self._answer(mesh, actions.export_mesh, draws=False)

    def _answer(self, control: Any, act: Callable[[], None], draws: bool = True) -> None:
        """Do something when a control changes, then draw; what a person can put right is told on the page."""

        def answer(event: Any) -> None:
            if event.client_id is None:
                return  # set by this program itself, whoever did that has done the rest
            try:
                with self.lock:
                    act()
                if draws:
                    self._actions.redraw()
            except UserError as error:
                self._actions.complain(str(error))
            except Exception:  # a defect of one control must not be silent, nor end the viewer
                logger.exception("a control of the viewer failed")
                self._actions.complain("this failed; the terminal of graf view shows why")

        register = getattr(control, "on_click", None) or control.on_update
        register(answer)


def _name_elevation(degrees: float) -> str:
    return f"{round(degrees, 1) + 0.0:g}°"  # no -0


def describe_picture(size: Sequence[int], rate: float | None, quick: bool) -> str:
    """One line: pixels, and pictures per second while something moves."""
    line = f"{size[1]} x {size[0]}"
    return f"{line}, {rate:.1f} pictures/s" if quick and rate is not None else line
