"""The marker sheet in true size, and cameras from renders of it: within a degree and two hundredths of the distance."""

import re

import numpy as np
import pytest

from benchmarks.sheets import photograph_sheet, walk_around_sheet
from graf.capture.cameras import Lens
from graf.capture.errors import CaptureError
from graf.capture.marker_sheet import (
    BAR,
    MARKER,
    PAPERS,
    POINT,
    lay_out_markers,
    marker_cells,
    write_marker_sheet,
)
from graf.capture.markers import centre_on_sheet, detect_markers, poses_from_markers

cv2 = pytest.importorskip("cv2")

LENS = Lens.from_fov(480, 360, 52.0)


def walk(count: int) -> np.ndarray:
    return walk_around_sheet(count, (22, 35, 50), (400, 470))


@pytest.fixture(scope="module")
def photographs() -> tuple[list[np.ndarray], np.ndarray]:
    poses = walk(12)
    return [photograph_sheet(pose, LENS) for pose in poses], poses


@pytest.mark.parametrize("paper", PAPERS)
def test_the_page_and_everything_on_it_have_their_true_size(paper, tmp_path):
    sheet = write_marker_sheet(tmp_path / "sheet.pdf", paper)
    pdf = (tmp_path / "sheet.pdf").read_bytes().decode("ascii")
    left, bottom, width, height = map(float, re.search(r"/MediaBox \[(.*?)\]", pdf)[1].split())
    assert (left, bottom) == (0, 0)
    assert (width / POINT, height / POINT) == pytest.approx(PAPERS[paper], abs=0.01)
    (scale,) = {float(found) for found in re.findall(r"^(\S+) 0 0 \1 0 0 cm$", pdf, re.MULTILINE)}
    assert scale == pytest.approx(72 / 25.4, abs=1e-5)  # so that the numbers that follow are millimetres
    rectangles = np.array(
        [list(map(float, line.split()[:4])) for line in re.findall(r"^[-\d. ]+ re", pdf, re.MULTILINE)]
    )
    assert rectangles[:, 2].max() == BAR
    for marker in sheet.markers:
        inside = (np.abs(rectangles[:, 0] + rectangles[:, 2] / 2 - marker.left - MARKER / 2) <= MARKER / 2) & (
            np.abs(rectangles[:, 1] + rectangles[:, 3] / 2 - marker.bottom - MARKER / 2) <= MARKER / 2
        )
        area = (rectangles[inside, 2] * rectangles[inside, 3]).sum()
        assert area == pytest.approx(marker_cells(marker.number).mean() * MARKER**2, rel=1e-4)


def test_every_place_that_the_table_of_the_pdf_names_holds_that_object(tmp_path):
    write_marker_sheet(tmp_path / "sheet.pdf")
    pdf = (tmp_path / "sheet.pdf").read_bytes()
    places = [int(place) for place in re.findall(rb"^(\d{10}) 00000 n $", pdf, re.MULTILINE)]
    assert len(places) == 5
    for number, place in enumerate(places, start=1):
        assert pdf[place:].startswith(b"%d 0 obj" % number)
    start = int(re.search(rb"startxref\n(\d+)", pdf)[1])
    assert pdf[start:].startswith(b"xref")
    length = int(re.search(rb"/Length (\d+)", pdf)[1])
    assert pdf.split(b"stream\n")[1][:length].endswith(b"Tj ET")


@pytest.mark.parametrize("paper", PAPERS)
def test_markers_lie_on_the_page_apart_and_leave_the_middle_free(paper):
    sheet = lay_out_markers(paper)
    boxes = np.array([(m.left, m.bottom, m.left + MARKER, m.bottom + MARKER) for m in sheet.markers])
    assert np.abs(boxes[:, [0, 2]]).max() <= sheet.width / 2 - 9.9
    assert np.abs(boxes[:, [1, 3]]).max() <= sheet.height / 2 - 9.9
    for number, box in enumerate(boxes):
        others = np.delete(boxes, number, axis=0)
        apart = np.maximum.reduce(
            [others[:, 0] - box[2], box[0] - others[:, 2], others[:, 1] - box[3], box[1] - others[:, 3]]
        )
        assert apart.min() >= 7.9
    free_width, free_height = sheet.free
    in_middle = (boxes[:, 0] < free_width / 2 - 1e-6) & (boxes[:, 2] > -free_width / 2 + 1e-6)
    in_middle &= (boxes[:, 1] < free_height / 2 - 1e-6) & (boxes[:, 3] > -free_height / 2 + 1e-6)
    assert not in_middle.any()


def test_corners_are_found_where_the_camera_sees_them(photographs):
    images, poses = photographs
    seen, known = detect_markers(images[0]), lay_out_markers("a4").corners()
    assert len(seen) >= 12
    places, pixels = np.concatenate([known[number] for number in seen]), np.concatenate(list(seen.values()))
    expected = LENS.project((places - poses[0, :3, 3]) @ poses[0, :3, :3])
    assert np.abs(np.median(pixels - expected, axis=0)).max() < 0.15  # no shift by half a pixel
    assert np.median(np.linalg.norm(pixels - expected, axis=1)) < 0.6


@pytest.mark.parametrize("fov", [52.0, None])
def test_cameras_are_within_a_degree_and_two_hundredths_also_where_the_lens_is_measured(photographs, fov):
    images, poses = photographs
    marked = poses_from_markers(images, fov=fov)
    assert marked.lost == {}
    assert marked.photographs.lens.fov == pytest.approx(52, abs=0.5)
    for found, true in zip(marked.photographs.poses, poses, strict=True):
        angle = np.degrees(np.linalg.norm(cv2.Rodrigues(found[:3, :3].T @ true[:3, :3])[0]))
        assert angle < 0.5
        assert np.linalg.norm(found[:3, 3] - true[:3, 3]) < 0.01 * np.linalg.norm(true[:3, 3])


def test_hidden_markers_and_a_false_one_do_not_matter(photographs):
    images, poses = photographs
    spoilt = [image.copy() for image in images[:5]]
    for image in spoilt:
        image[:, 170:300] = 128  # a large object
    false = np.where(np.kron(marker_cells(2), np.ones((8, 8))) > 0, 0, 255).astype(np.uint8)
    spoilt[0][210:290, 190:270] = 255
    spoilt[0][226:274, 206:254] = false[..., None]  # a marker of the sheet that lies elsewhere
    marked = poses_from_markers(spoilt, fov=52.0)
    for found, true in zip(marked.photographs.poses, poses[:5], strict=True):
        assert np.linalg.norm(found[:3, 3] - true[:3, 3]) < 0.02 * np.linalg.norm(true[:3, 3])


def test_photographs_without_markers_are_lost_by_name_and_all_of_them_are_an_error(photographs):
    images, _ = photographs
    blank = np.full_like(images[0], 200)
    marked = poses_from_markers([*images[:6], blank], names=[*"abcdef", "IMG_7.jpg"], fov=52.0)
    assert list(marked.lost) == ["IMG_7.jpg"]
    assert "IMG_7.jpg: 0 markers seen" in "\n".join(marked.report())
    with pytest.raises(CaptureError, match="seen in 0 of 4 photographs"):
        poses_from_markers([blank] * 4)


def test_the_paper_is_recognised_by_its_markers():
    poses = walk(12)[:4]
    marked = poses_from_markers([photograph_sheet(pose, LENS, paper="letter") for pose in poses], fov=52.0)
    assert marked.sheet is lay_out_markers("letter")
    for found, true in zip(marked.photographs.poses, poses, strict=True):
        assert np.linalg.norm(found[:3, 3] - true[:3, 3]) < 0.02 * np.linalg.norm(true[:3, 3])


def test_a_field_of_view_that_is_not_the_cameras_is_an_error_that_asks_for_it(photographs):
    images, _ = photographs
    with pytest.raises(CaptureError, match="another fov"):
        poses_from_markers(images, fov=85.0)


def test_the_object_stands_on_the_cross_with_the_radius_that_is_told(photographs):
    images, poses = photographs
    marked = poses_from_markers(images, fov=52.0)
    centred = centre_on_sheet(marked, radius=50.0)
    expected = np.linalg.norm(poses[:, :3, 3] - (0, 0, 50), axis=1) / 50
    np.testing.assert_allclose(centred.distances, expected, rtol=0.01)


@pytest.mark.parametrize(("path", "paper", "message"), [("a.png", "a4", "a.pdf"), ("a.pdf", "a5", "a4 or letter")])
def test_what_a_sheet_cannot_be_is_said(path, paper, message, tmp_path):
    with pytest.raises(CaptureError, match=message):
        write_marker_sheet(tmp_path / path, paper)
