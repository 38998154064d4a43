"""The viewer in a real browser, headless: what a person does there, and what they then see.

Pictures are taken from the page as the browser received them, and compared with those that `draw` makes of the choice
that a control stands for.
"""

import base64
import io
import json
import math
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from graf.evaluation.camera_paths import path_from_json
from graf.evaluation.renderer import Renderer
from graf.viewer.drawing import Look, draw
from graf.viewer.exhibit import Exhibit, Photograph
from graf.viewer.session import DRAWN, Session

pytest.importorskip("viser")
playwright_api = pytest.importorskip("playwright.sync_api")

from graf.viewer.server import ViewerServer  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

ARGUMENTS = ["--headless=new", "--no-sandbox", "--enable-unsafe-swiftshader"]
FULL_HEIGHT = 48
INSTANCES = ("car/0", "car/1", "duck/0", "mug/0")
SECONDS = 20.0
#: mean difference in grey levels that two encoders of JPEG make of one picture at most
CLOSE = 1.5
#: keeps every picture that the page is handed, with the page's own clock
KEEP_PICTURES = """
window.pictures = [];
const make = URL.createObjectURL;
URL.createObjectURL = function (thing) {
  if (thing instanceof Blob && thing.type.startsWith("image/")) window.pictures.push(thing);
  return make.call(URL, thing);
};
"""
#: the newest of them that is a JPEG; depth is a PNG
LAST_PICTURE = """async () => {
  for (const blob of [...window.pictures].reverse()) {
    const bytes = new Uint8Array(await blob.arrayBuffer());
    if (bytes[0] === 0xff && bytes[1] === 0xd8) return btoa(String.fromCharCode(...bytes));
  }
  return null;
}"""


@pytest.fixture(scope="module")
def server(lasting_renderer: Renderer) -> Iterator[ViewerServer]:
    poses = [lasting_renderer.cameras.views_at(torch.tensor([0]), torch.tensor([0.4]), torch.tensor([0.3])).poses[0]]
    photographs = [Photograph(poses[0], "car", np.full((8, 8, 3), 200, np.uint8))]
    exhibit = Exhibit(lasting_renderer, "toys, iteration 7", INSTANCES, photographs, FULL_HEIGHT)
    server = ViewerServer(exhibit, port=18080)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        # One for all pages, so that the program of the page is compiled once. A tall window, so that every control can
        # be reached; a small canvas would be hidden by the panel. Of few pixels, since a browser without a GPU takes a
        # processor from the viewer for each of them.
        yield browser.new_context(
            viewport={"width": 640, "height": 1180}, device_scale_factor=0.5, accept_downloads=True
        )
        browser.close()


@pytest.fixture
def page(server: ViewerServer, browser) -> Iterator["Visitor"]:
    visitor = Visitor(server, browser)
    yield visitor
    visitor.leave()


class Visitor:
    """A person at a page: what they do, what they see, and their client on the server's side."""

    def __init__(self, server: ViewerServer, browser) -> None:
        before = {client.handle.client_id for client in server.clients()}
        self.server = server
        self.page = browser.new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.page.add_init_script(KEEP_PICTURES)
        self.page.goto(f"http://localhost:{server.port}")
        wait_for(lambda: len(server.clients()) > len(before), "the client to connect")
        (self.client,) = [client for client in server.clients() if client.handle.client_id not in before]
        self.wait_for_look(self.client.session.look)

    def leave(self) -> None:
        self.page.close()
        wait_for(lambda: self.client not in self.server.clients(), "the client to go")

    def row(self, label: str):
        return self.page.locator(f'xpath=//label[normalize-space(text())="{label}"]/ancestor::div[2]')

    def choose(self, label: str, option: str) -> None:
        self.row(label).locator("input[role=combobox]").click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def enter(self, label: str, value: float) -> None:
        box = self.row(label).locator("input[type=text]")
        box.fill(str(value))
        box.press("Enter")

    def value(self, label: str) -> str:
        return self.row(label).locator("input[role=combobox]").input_value()

    def press(self, label: str, option: str) -> None:
        self.row(label).get_by_role("button", name=option, exact=True).click()

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def drag(self, columns: int, rows: int, steps: int = 4) -> None:
        self.page.mouse.move(150, 600)
        self.page.mouse.down()
        self.page.mouse.move(150 + columns, 600 + rows, steps=steps)
        self.page.mouse.up()

    def picture(self) -> np.ndarray | None:
        data = self.page.evaluate(LAST_PICTURE)
        return None if data is None else np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))

    def expected(self, look: Look, height: int = FULL_HEIGHT) -> np.ndarray:
        """As JPEG too, whose noise is then nearly the same."""
        stream = io.BytesIO()
        picture = draw(self.server.exhibit.renderer, look, self.client.viewpoint, height).picture
        Image.fromarray(picture).save(stream, "JPEG", quality=92)
        return np.asarray(Image.open(stream))

    def wait_for_look(self, look: Look, height: int = FULL_HEIGHT, closer_than: float = CLOSE) -> None:
        wait_for(lambda: contrast(self.picture(), self.expected(look, height)) < closer_than, f"the picture of {look}")


def contrast(one: np.ndarray | None, other: np.ndarray) -> float:
    """Mean difference of two pictures in grey levels; infinite where sizes differ."""
    if one is None or one.shape != other.shape:
        return math.inf
    return float(np.abs(one.astype(float) - other).mean())


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def test_the_page_shows_the_object_from_the_default_camera_and_a_drag_shows_it_from_the_new_one(page, monkeypatch):
    assert page.page.get_by_text("toys, iteration 7").is_visible()
    camera, renderer = page.client.handle.camera, page.server.exhibit.renderer
    assert np.linalg.norm(camera.position) == pytest.approx(3.5, abs=1e-3)
    assert math.degrees(camera.fov) == pytest.approx(renderer.fov, abs=0.01)
    assert camera.position[2] == pytest.approx(3.5 * math.sin(math.radians(renderer.default_elevation)), abs=1e-3)

    before, position = page.picture(), page.client.handle.camera.position
    asked, ask = [], page.server.loop.ask
    monkeypatch.setattr(page.server.loop, "ask", lambda *given: asked.append(threading.get_ident()) or ask(*given))
    page.choose("class", "mug")
    page.drag(120, 30)
    wait_for(lambda: not np.allclose(page.client.handle.camera.position, position, atol=0.1), "the camera to move")
    time.sleep(0.5)
    page.wait_for_look(page.client.session.look)
    after = page.picture()
    assert before.shape != after.shape or np.abs(before.astype(int) - after).mean() > 1
    assert len(asked) > 2
    assert len(set(asked)) == 1  # by one thread, so that the newest camera and choice are asked for last


CHOICES = {
    "class": (lambda page: page.choose("class", "duck"), lambda session: session.choose_class("duck")),
    "known object": (
        lambda page: page.choose("known object", "duck/0"),
        lambda session: session.choose_instance("duck/0"),
    ),
    "seed": (lambda page: page.enter("seed", 5), lambda session: session.choose_seed(5)),
    "shape": (lambda page: page.press("shape", "random"), lambda session: session.draw_part("shape")),
    "shape step": (lambda page: page.press("shape", "step"), lambda session: session.draw_part("shape", step=True)),
    "appearance": (lambda page: page.press("appearance", "random"), lambda session: session.draw_part("appearance")),
    "appearance step": (
        lambda page: page.press("appearance", "step"),
        lambda session: session.draw_part("appearance", step=True),
    ),
    "interpolation": (lambda page: page.enter("interpolation", 0.7), lambda session: session.interpolate(0.7)),
    "depth": (lambda page: page.choose("show", "depth"), lambda session: session.choose_mode("depth")),
    "opacity": (lambda page: page.choose("show", "opacity"), lambda session: session.choose_mode("opacity")),
    "normals": (lambda page: page.choose("show", "normals"), lambda session: session.choose_mode("normals")),
    "super-resolved": (
        lambda page: page.choose("show", "super-resolved"),
        lambda session: session.choose_mode("super-resolved"),
    ),
    "samples": (lambda page: page.enter("samples per ray", 4), lambda session: session.choose_samples(4)),
    "background": (
        lambda page: page.choose("background", "black"),
        lambda session: session.choose_background("black"),
    ),
}


def test_each_control_changes_what_it_says(page):
    """One after another on one page, as a person does: each picture is that of all choices so far."""
    renderer = page.server.exhibit.renderer
    expected = Session(renderer, INSTANCES)
    for name, (operate, choose) in CHOICES.items():
        before = page.expected(expected.look)
        choose(expected)
        change = contrast(before, page.expected(expected.look))
        assert change > 0.8, f"{name} can be seen"
        operate(page)
        page.wait_for_look(expected.look, closer_than=min(0.5 * change, CLOSE))
    page.enter("second seed", 9)
    expected.choose_other(9)
    page.wait_for_look(expected.look)
    page.choose("rows", "64")
    page.wait_for_look(expected.look, 64)
    assert page.value("known object") == DRAWN  # since a seed was chosen: so the known one can be chosen again
    page.choose("known object", "duck/0")
    expected.choose_instance("duck/0")
    page.wait_for_look(expected.look, 64)


def test_cameras_stand_where_presets_say_and_scenery_is_shown(page):
    camera = page.client.handle.camera
    page.press("azimuth", "180°")
    wait_for(lambda: np.allclose(camera.position[:2] / abs(camera.position[0]), [-1, 0], atol=1e-3), "azimuth 180")
    low = max(page.server.exhibit.renderer.cameras.v_list)
    page.choose("elevation", f"{math.degrees(math.asin(1 - 2 * low)):.1f}°")
    wait_for(lambda: abs(camera.position[2] - 3.5 * (1 - 2 * low)) < 1e-3, "the lower height")
    page.enter("field of view", 45)
    wait_for(lambda: math.degrees(camera.fov) == pytest.approx(45, abs=0.1), "the field of view")
    page.wait_for_look(page.client.session.look)
    before = page.page.screenshot()
    for name in ("axes", "unit sphere", "training cameras"):
        page.page.get_by_role("checkbox", name=name).check()
        wait_for(lambda before=before: page.page.screenshot() != before, name)
        before = page.page.screenshot()
    assert len(page.client.scenery._frustums) == 1
    page.choose("known object", "duck/0")  # and with it another class, which other cameras saw
    wait_for(lambda: page.client.scenery._frustums == [], "the other class's cameras")
    wait_for(lambda: page.value("class") == "duck", "the other class")


def test_two_clients_do_not_disturb_each_other(page, server, browser):
    other = Visitor(server, browser)
    try:
        own = page.client.session.look
        other.choose("class", "duck")
        other.choose("show", "depth")
        other.drag(100, 0)
        other.wait_for_look(replace(own, class_name="duck", mode="depth"))
        assert page.client.session.look is own
        page.wait_for_look(own)
        assert not np.allclose(page.client.handle.camera.position, other.client.handle.camera.position, atol=0.05)
    finally:
        other.leave()
    page.choose("class", "mug")
    page.wait_for_look(replace(own, class_name="mug"))


def test_pictures_camera_paths_and_meshes_are_saved_as_files(page):
    page.choose("show", "opacity")
    page.wait_for_look(replace(page.client.session.look, mode="opacity"))
    with page.page.expect_download() as download:
        page.click("save picture")
    assert download.value.suggested_filename == "car_opacity.png"
    saved = np.asarray(Image.open(download.value.path()))
    assert np.array_equal(
        saved, draw(page.server.exhibit.renderer, page.client.session.look, page.client.viewpoint, FULL_HEIGHT).picture
    )

    page.click("save path")
    page.page.get_by_text("at least two keyframes").wait_for()
    page.enter("seconds each", 0.2)
    page.click("add keyframe")
    page.press("azimuth", "90°")
    wait_for(lambda: abs(page.client.handle.camera.position[0]) < 1e-3, "azimuth 90")
    page.click("add keyframe")
    page.page.get_by_text("keyframes: 2").wait_for()
    downloads = []
    page.page.on("download", lambda download: downloads.append(download))
    page.click("save path")
    wait_for(lambda: page.page.wait_for_timeout(50) or len(downloads) == 2, "the path and its video")
    files = {download.suggested_filename: download.path() for download in downloads}
    path = path_from_json(files["camera_path.json"].read_text())
    assert len(path.keyframes) == 2
    assert path.duration == pytest.approx(0.2)
    assert path.keyframes[1].camera_to_world[0, 3] == pytest.approx(0, abs=1e-3)
    assert json.loads(files["camera_path.json"].read_text())["keyframes"][0]["class"] == "car"
    assert imageio_ffmpeg.count_frames_and_secs(str(files["camera_path.mp4"]))[0] == len(path.frames(24))
    page.click("clear")
    page.page.get_by_text("keyframes: 0").wait_for()

    pytest.importorskip("skimage")
    page.choose("mesh resolution", "64")
    with page.page.expect_download() as download:
        page.click("export mesh")
    assert download.value.suggested_filename == "car.glb"
    assert download.value.path().read_bytes()[:4] == b"glTF"


def test_newer_weights_are_shown_to_whoever_is_connected(page, server, ball):
    former, title = server.exhibit.renderer, server.exhibit.title
    changed = replace(former, cameras=replace(former.cameras))
    page.choose("class", "mug")
    page.wait_for_look(replace(page.client.session.look, class_name="mug"))
    count = len(page.page.evaluate("window.pictures"))
    server.take(changed, "toys, iteration 8")
    try:
        page.page.get_by_text("toys, iteration 8").wait_for()
        wait_for(lambda: len(page.page.evaluate("window.pictures")) > count, "a new picture")
        assert page.client.session.renderer is changed
        page.wait_for_look(page.client.session.look)
        assert page.client.session.look.class_name == "mug"

        page.page.get_by_role("checkbox", name="axes").check()
        server.take(ball((0.0, 0.0, 0.0), 0.05), "a small ball")
        wait_for(lambda: count_axes(page) > 50, "the axes outside of a small ball")
        server.take(ball((0.0, 0.0, 0.0), 0.9), "a large ball")
        wait_for(lambda: count_axes(page) < 12, "the large ball to hide them")  # all but the blue one's tip
    finally:
        server.take(former, title)


def count_axes(page: Visitor) -> int:
    """The pixels of the green and the blue axis that are seen beside a red object; a white page has none either."""
    # the page's picture covers 65 of these columns, the rest is nothing
    picture = page.client.handle.get_render(120, 160, transport_format="png")[:, 50:110, :3].astype(int)
    return int(((picture.max(-1) - picture[..., 0]) > 30).sum())  # thin lines may be drawn faintly


def test_a_killed_browser_leaves_no_thread_and_no_client(lasting_renderer, tmp_path):
    """What a visit adds goes with it: viser keeps a pool of threads for its callbacks, this program none."""
    before = own_threads()
    server = ViewerServer(Exhibit(lasting_renderer, "toys", (), (), FULL_HEIGHT), port=18180)
    url, profile = f"http://localhost:{server.port}", f"--user-data-dir={tmp_path}"
    with subprocess.Popen(
        [CHROMIUM, *ARGUMENTS, profile, url], start_new_session=True, stderr=subprocess.DEVNULL
    ) as browser:
        try:
            wait_for(lambda: server.clients(), "the client to connect")
            (client,) = server.clients()
            client.export_mesh()  # work that it will not be there to receive
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
    wait_for(lambda: not server.clients(), "the client to be forgotten")
    server.stop()
    assert own_threads() == before


def own_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("graf-view")}
