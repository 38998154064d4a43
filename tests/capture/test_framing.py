"""One square for a whole turn, and the camera that it is of."""

import math

import numpy as np
import pytest

pytest.importorskip("cv2")

from graf.capture.errors import CaptureError
from graf.capture.frames import Frame
from graf.capture.framing import MARGIN, REACH, cut, frame_masks, frame_whole, picture_side


def disc(centre, radius, shape=(120, 200)):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.where(np.hypot(x + 0.5 - centre[0], y + 0.5 - centre[1]) < radius, 255, 0).astype(np.uint8)


def test_the_axis_of_a_turn_is_the_middle_of_all_outlines():
    """A ball that goes around an axis at x = 90."""
    masks = [disc((90 + 30 * math.cos(t), 60 + 8 * math.sin(t)), 15) for t in np.linspace(0, 2 * math.pi, 24)]
    framing = frame_masks(masks)
    assert framing.centre == pytest.approx((90, 60), abs=1)
    assert framing.half == pytest.approx(MARGIN * 45, abs=1.5)
    assert framing.width == pytest.approx(1 / MARGIN, abs=0.02)


def test_one_wrong_mask_does_not_change_the_scale():
    masks = [disc((90, 60), 30)] * 39 + [disc((150, 60), 40)]
    assert frame_masks(masks) == frame_masks([disc((90, 60), 30)] * 40)


def test_an_object_from_another_height_keeps_its_width():
    flat = [np.where((np.arange(120) < 70)[:, None], disc((90, 60), 40), 0).astype(np.uint8)]
    framing = frame_masks(flat, width=0.5)
    assert 2 * framing.half * 0.5 == pytest.approx(80, abs=1.5)


def test_the_camera_sees_the_object_at_its_reach_of_the_unit_sphere():
    """A ball of radius 0.3 at a distance of 2 through a camera of 50 degrees."""
    fov, shape = 50.0, (120, 200)
    focal = 100 / math.tan(math.radians(fov / 2))
    outline = focal * math.tan(math.asin(0.3 / 2))
    camera = frame_masks([disc((100, 60), outline)]).camera(shape, fov)
    assert camera.radius == pytest.approx(2 / 0.3 * REACH, rel=0.03)
    assert camera.fov == pytest.approx(2 * math.degrees(math.atan(MARGIN * outline / focal)), rel=0.03)


def test_cut_pictures_show_the_square_with_white_behind_the_mask():
    mask = disc((40, 60), 38)  # the square reaches beyond the left edge
    image = np.full((120, 200, 3), (10, 80, 160), np.uint8)
    framing = frame_masks([mask])
    picture = cut(Frame(image, 0, "a"), mask, framing, 64)
    assert (picture.mode, picture.size) == ("RGBA", (64, 64))
    values = np.asarray(picture)
    np.testing.assert_allclose(values[32, 32], [10, 80, 160, 255], atol=1)
    np.testing.assert_array_equal(values[1, 1], [255, 255, 255, 0])
    share = (values[..., 3] / 255).mean() * (2 * framing.half) ** 2
    assert share == pytest.approx(math.pi * 38**2, rel=0.02)
    edge = (values[..., 3] > 30) & (values[..., 3] < 220)
    np.testing.assert_allclose(values[edge][:, 2], 160, atol=8)  # no white and no black bleeds into the edge


def test_pictures_without_masks_are_the_middle_of_the_frame():
    image = np.zeros((120, 200, 3), np.uint8)
    image[:, 40:160] = 255
    framing = frame_whole((120, 200))
    picture = cut(Frame(image, 0, "a"), None, framing, 60)
    assert picture.mode == "RGB"
    assert np.asarray(picture)[:, 2:-2].min() == 255  # the outermost pixels are interpolated with their neighbours


def test_pictures_are_never_enlarged():
    assert picture_side(frame_whole((1000, 1000)), 512) == 512
    assert picture_side(frame_whole((400, 700)), 512) == 256
    assert picture_side(frame_whole((400, 700)), 128) == 128


def test_an_object_of_a_few_pixels_is_an_error():
    with pytest.raises(CaptureError, match="pixels large"):
        frame_masks([disc((90, 60), 6)])
    with pytest.raises(CaptureError, match="empty"):
        frame_masks([np.zeros((50, 50), np.uint8)])
