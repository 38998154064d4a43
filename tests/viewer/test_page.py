"""The page of meshes: what is in the file is the mesh, and nothing of it comes from elsewhere."""

import base64
import json
import re
import shutil

import numpy as np
import pytest

from graf.mesh import ColouredMesh
from graf.viewer.page import PageCamera, build_page

CAMERA = PageCamera(30.0, 3.5, 20.0, (1.0, 1.0, 1.0))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def tetrahedron(colour: tuple[float, float, float], size: float = 0.5) -> ColouredMesh:
    vertices = size * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], np.float32)
    faces = np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]], np.int32)
    colours = np.tile(np.array(colour, np.float32), (4, 1))
    return ColouredMesh(vertices, faces, vertices / np.linalg.norm(vertices, axis=1, keepdims=True), colours)


def read_objects(page: str) -> list[dict[str, object]]:
    return json.loads(re.search(r"^const OBJECTS = (.*);$", page, re.MULTILINE)[1])


def test_the_page_holds_the_meshes_to_the_last_bit_that_a_screen_shows():
    rng = np.random.default_rng(0)
    normals = rng.standard_normal((50, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    vertices = rng.standard_normal((50, 3)).astype(np.float32)
    faces = rng.integers(0, 50, (80, 3)).astype(np.int32)
    colours = rng.random((50, 3)).astype(np.float32)
    (found,) = read_objects(build_page("toys", {"duck": ColouredMesh(vertices, faces, normals, colours)}, CAMERA))

    def array(key: str, kind: str, columns: int) -> np.ndarray:
        return np.frombuffer(base64.b64decode(found[key]), kind).reshape(-1, columns)[:, :3]

    assert found["name"] == "duck"
    assert np.abs(array("vertices", "<i2", 4) / 32767 * found["scale"] - vertices).max() < 1e-4
    assert np.abs(array("normals", "<i1", 4) / 127 - normals).max() < 0.005
    assert np.abs(array("colours", "<u1", 4) / 255 - colours).max() < 0.002
    assert np.array_equal(array("faces", "<u4", 3), faces)


def test_names_are_shown_and_not_run():
    page = build_page("<b>toys</b>", {"</script><script>alert(1)": tetrahedron((1, 0, 0))}, CAMERA)
    assert "<b>" not in page
    assert page.count("<script>") == page.count("</script>") == 1
    assert read_objects(page)[0]["name"] == "</script><script>alert(1)"


def test_nothing_is_loaded_from_elsewhere_and_everything_is_filled_in():
    page = build_page("toys", {"duck": tetrahedron((1, 0, 0))}, CAMERA)
    assert not re.search(r"https?:|//cdn|src=|href=|import\(|fetch\(", page)
    assert "{{" not in page.replace("const OBJECTS", "")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_opens_from_a_disk_without_a_network_and_shows_each_mesh_in_its_colour(tmp_path):
    playwright_api = pytest.importorskip("playwright.sync_api")
    meshes = {"red": tetrahedron((0.8, 0.2, 0.1)), "blue": tetrahedron((0.1, 0.2, 0.8), 0.3)}
    file = tmp_path / "toys.html"
    file.write_text(build_page("toys", meshes, CAMERA), encoding="utf-8")
    requests, errors = [], []
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--headless=new", "--no-sandbox", "--enable-unsafe-swiftshader"]
        )
        context = browser.new_context(offline=True, viewport={"width": 300, "height": 300})
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(file.as_uri())
        shares = {}
        for name, colour in (("red", (204, 51, 26)), ("blue", (26, 51, 204))):
            page.get_by_role("button", name=name, exact=True).click()
            page.wait_for_timeout(300)
            shares[name] = share_of(page, colour)
        before = page.screenshot()
        page.mouse.move(150, 150)
        page.mouse.down()
        page.mouse.move(220, 170, steps=3)
        page.mouse.up()
        page.wait_for_timeout(300)
        turned = page.screenshot() != before
        browser.close()
    assert requests == [file.as_uri()]
    assert errors == []
    assert 0.05 < shares["blue"] < 0.5 * shares["red"] < 0.4  # smaller, and as large as 30 degrees show it
    assert turned


def share_of(page, colour: tuple[int, int, int]) -> float:
    """The share of the page's pixels that have exactly this colour, or a rounding beside it."""
    import io

    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)
    return float((np.abs(pixels - colour).max(-1) <= 1).mean())
