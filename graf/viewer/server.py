"""The page: a viser server whose background image is the field, drawn for each client at its own camera.

Only this file imports viser. Drawing happens in one thread of its own and files are made in another, so that the
websocket's event loop is free to answer.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from graf.base.errors import UserError
from graf.base.extras import import_optional
from graf.evaluation.camera_paths import path_to_json
from graf.evaluation.renderer import Renderer
from graf.geometry.cameras import height_from_elevation, pose_from_angles
from graf.runtime.logs import logger
from graf.viewer.bounds import BoundsOfObjects
from graf.viewer.drawing import Drawing, Interrupted, Look, draw, interruptible
from graf.viewer.exhibit import Exhibit
from graf.viewer.listening import find_port
from graf.viewer.panel import Actions, Panel, describe_picture
from graf.viewer.products import Files, mesh_file, path_video, picture_file
from graf.viewer.render_loop import Job, RenderLoop
from graf.viewer.scenery import Scenery
from graf.viewer.session import Session
from graf.viewer.viewpoints import Viewpoint

FPS = 24
JPEG_QUALITY = {True: 80, False: 92}  # of pictures in motion, and of those that stand still
#: seconds between two updates of the line that tells size and rate
STATUS_EVERY = 0.5


def import_viser() -> Any:
    """The package that makes the page. Raises MissingExtra where it is not installed."""
    return import_optional("viser", "viewer")


@dataclass(frozen=True)
class Asked:
    """One picture that a client wants."""

    look: Look
    viewpoint: Viewpoint
    full_height: int
    moving_height: int | None


class Client:
    """A browser: its session, its controls, and its scenery."""

    def __init__(self, handle: Any, server: ViewerServer) -> None:
        self.handle, self._server, exhibit = handle, server, server.exhibit
        self.session = Session(exhibit.renderer, exhibit.instances, exhibit.seed)
        self.scenery = Scenery(handle.scene, exhibit.photographs, exhibit.renderer.fov)
        actions = Actions(
            redraw=self.redraw,
            show=lambda name, is_seen: self.scenery.show(name, is_seen, self.session.look.class_name),
            arrange=lambda: self.scenery.arrange(self.session.look.class_name),
            move=self.move,
            zoom=self.zoom,
            add_keyframe=self.add_keyframe,
            save_picture=self.save_picture,
            save_path=self.save_path,
            export_mesh=self.export_mesh,
            complain=self.complain,
        )
        self.panel = Panel(handle.gui, self.session, actions, exhibit.full_height)
        self._told, self._last = 0.0, 0.0

    @property
    def viewpoint(self) -> Viewpoint:
        """Where the browser looks from."""
        camera = self.handle.camera
        return Viewpoint.from_viser(camera.wxyz, camera.position, camera.fov, camera.aspect)

    def redraw(self) -> None:
        """Have the session drawn as it is now.

        In the event loop, where the browser's camera changes too: so poses are whole, and the newest is asked for last.
        """
        self._server.soon(self._ask)

    def _ask(self) -> None:
        camera = self.handle.camera
        if not (camera.image_width and camera.image_height):
            return  # a window without any area
        asked = Asked(self.session.look, self.viewpoint, self.panel.full_height, self.panel.moving_height)
        self._server.loop.ask(self.handle.client_id, asked)

    def deliver(self, drawing: Drawing, quick: bool, now: float) -> None:
        """Send a picture and, now and then, what it took."""
        self.handle.scene.set_background_image(
            drawing.picture, format="jpeg", jpeg_quality=JPEG_QUALITY[quick], depth=drawing.depth
        )
        rate = 1 / (now - self._last) if 0 < now - self._last < 1 else None
        self._last = now
        if not quick or now - self._told > STATUS_EVERY:
            self._told = now
            self.panel.status.content = describe_picture(drawing.picture.shape, rate, quick)

    # ------------------------------------------------------------------------------------------------ the camera

    def move(self, azimuth: float | None, elevation: float | None) -> None:
        """Look at the origin from an azimuth and an elevation, degrees (None: as now), as far away as photographs."""
        camera, cameras = self.handle.camera, self._server.exhibit.renderer.cameras
        if azimuth is None:
            azimuth = math.degrees(math.atan2(camera.position[1], camera.position[0]))
        if elevation is None:
            elevation = math.degrees(math.atan2(camera.position[2], math.hypot(*camera.position[:2])))
        pose = pose_from_angles(
            torch.tensor(azimuth % 360 / 360), torch.tensor(height_from_elevation(elevation)), cameras.radius
        )
        with self.handle.atomic():
            camera.position = pose[:3, 3].double().numpy()
            camera.look_at = (0.0, 0.0, 0.0)
            camera.up_direction = (0.0, 0.0, 1.0)
        self.redraw()

    def zoom(self, fov: float) -> None:
        """A vertical field of view in degrees."""
        self.handle.camera.fov = math.radians(fov)
        self.redraw()

    def add_keyframe(self) -> None:
        """A keyframe here."""
        self.session.add_keyframe(self.viewpoint)
        self.panel.count_keyframes()

    # ------------------------------------------------------------------------------------------------ files

    def save_picture(self) -> None:
        """Hand the picture that is seen to the browser."""
        look, viewpoint, height = self.session.look, self.viewpoint, self.panel.full_height
        self._server.make(self, "picture", lambda renderer, _: picture_file(renderer, look, viewpoint, height))

    def save_path(self) -> None:
        """Hand the camera path and its video to the browser. Raises UserError with fewer than two keyframes."""
        look, height = self.session.look, self.panel.full_height
        path = self.session.path(self.panel.seconds, self.panel.closed, round(self.viewpoint.aspect, 3))
        self.send({"camera_path.json": path_to_json(path).encode()})

        def make(renderer: Renderer, progress: Callable[[float], None]) -> Files:
            return path_video(renderer, path, look, height, FPS, progress)

        self._server.make(self, "video", make)

    def export_mesh(self) -> None:
        """Hand the object's mesh to the browser."""
        look, resolution = self.session.look, self.panel.mesh_resolution
        self._server.make(self, "mesh", lambda renderer, _: mesh_file(renderer, look, resolution))

    def send(self, files: Files) -> None:
        """Let the browser save files."""
        for name, content in files.items():
            self.handle.send_file_download(name, content, save_immediately=True)

    def complain(self, text: str) -> None:
        """Tell what went wrong."""
        self.handle.add_notification("graf view", text, color="red", auto_close_seconds=10.0)


def _refuse_to_publish(verbose: bool = True) -> None:
    """In the place of viser's answer to a page that asks to be published through a relay on the internet."""
    logger.warning("a page asked to be shared on the internet, which graf view does not do")


class ViewerServer:
    """Shows an exhibit at http://host:port until `stop`.

    Where the port is taken the next free one is used: `port` tells which. Raises MissingExtra without viser, and
    UserError where nothing can be listened at.
    """

    def __init__(self, exhibit: Exhibit, host: str = "127.0.0.1", port: int = 8080) -> None:
        viser = import_viser()
        self.exhibit = exhibit
        self._clients: dict[int, Client] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="graf-view-file")
        self.loop: RenderLoop[Asked] = RenderLoop(self._draw, self._deliver)
        self._bounds = BoundsOfObjects(interruptible(exhibit.renderer, self.loop.check))
        self._server = viser.ViserServer(host, find_port(host, port), label=exhibit.title, verbose=False)
        self._arrange_page()
        self.loop.start()
        self._server.on_client_connect(self._connect)
        self._server.on_client_disconnect(self._disconnect)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.get_port())

    def stop(self) -> None:
        """Close the page and end every thread."""
        self._stopping.set()
        self._server.stop()
        self.loop.stop()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def take(self, renderer: Renderer, title: str) -> None:
        """Show newer weights of the same run from now on; what clients have chosen stays."""
        self.exhibit = replace(self.exhibit, renderer=renderer, title=title)
        self._bounds = BoundsOfObjects(interruptible(renderer, self.loop.check))
        self._server.gui.set_panel_label(title)
        for client in self.clients():
            with client.panel.lock:
                client.session.take(renderer)
            client.redraw()

    def soon(self, call: Callable[[], None]) -> None:
        """Call it in the event loop, after whatever is waiting there; not at all after the end."""
        try:
            self._server.get_event_loop().call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed
            if not self._stopping.is_set():
                raise

    def clients(self) -> list[Client]:
        """Those that are connected."""
        with self._lock:
            return list(self._clients.values())

    def make(self, client: Client, what: str, make: Callable[[Renderer, Callable[[float], None]], Files]) -> None:
        """Make files for a client in the worker's thread, one after the other, and tell how it goes."""
        note = client.handle.add_notification(
            what, "waiting ...", loading=True, with_close_button=False, auto_close_seconds=None
        )
        renderer = interruptible(self.exhibit.renderer, lambda: self._check_worker(client))

        def work() -> None:
            try:
                self._check_worker(client)  # what has waited until the end is not begun
                note.body = "is being made ..."
                client.send(make(renderer, lambda share: setattr(note, "body", f"{100 * share:.0f}%")))
            except Interrupted:
                pass  # nobody is there to have it
            except UserError as error:
                client.complain(str(error))
            except Exception:  # a defect, which must not be silent, nor end the viewer
                logger.exception("the %s could not be made", what)
                client.complain(f"the {what} could not be made; the terminal of graf view shows why")
            finally:
                note.remove()

        self._worker.submit(work)

    # ------------------------------------------------------------------------------------------------ its threads

    def _arrange_page(self) -> None:
        """A camera as the photographs', z up, and nothing in the scene yet."""
        server, renderer = self._server, self.exhibit.renderer
        server.scene.set_up_direction("+z")
        server.gui.configure_theme(show_logo=False, show_share_button=False)
        server.request_share_url = _refuse_to_publish
        pose = pose_from_angles(torch.tensor(0.125), torch.tensor(renderer.default_height), renderer.cameras.radius)
        server.initial_camera.position = tuple(pose[:3, 3].tolist())
        server.initial_camera.look_at = (0.0, 0.0, 0.0)
        server.initial_camera.up = (0.0, 0.0, 1.0)
        server.initial_camera.fov = math.radians(renderer.fov)

    def _connect(self, handle: Any) -> None:
        client = Client(handle, self)
        with self._lock:
            if handle.client_id not in self._server.get_clients():
                return  # it has gone, and viser told so in another thread, while its controls were being built
            self._clients[handle.client_id] = client
        with client.panel.lock:
            client.session.take(self.exhibit.renderer)  # a newer one may have come since it was given one

        async def moved(_: Any) -> None:
            client.redraw()

        handle.camera.on_update(moved)
        client.redraw()

    def _disconnect(self, handle: Any) -> None:
        with self._lock:
            self._clients.pop(handle.client_id, None)
        self.loop.forget(handle.client_id)

    def _draw(self, job: Job[Asked]) -> Drawing:
        asked, of_objects = job.request, self._bounds
        renderer, look, viewpoint, full = of_objects.renderer, asked.look, asked.viewpoint, asked.full_height
        if not job.quick:
            return draw(renderer, look, viewpoint, full)
        bounds = of_objects.of(look.z, look.class_name)
        height = min(asked.moving_height or job.pacer.height(viewpoint.aspect, full), full)
        started = time.perf_counter()
        drawing = draw(renderer, look, viewpoint, height, quick=True, bounds=bounds)
        job.pacer.note(drawing.depth.size, time.perf_counter() - started)
        return drawing

    def _deliver(self, job: Job[Asked], drawing: Drawing) -> None:
        with self._lock:
            client = self._clients.get(job.client)  # type: ignore[call-overload]
        if client is not None:
            client.deliver(drawing, job.quick, time.monotonic())

    def _check_worker(self, client: Client) -> None:
        with self._lock:
            if self._stopping.is_set() or client.handle.client_id not in self._clients:
                raise Interrupted
