"""Masks against the true ones of rendered toys, masks of people's own, and what is said where there are none."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cv2")

from benchmarks.capture import overlaps
from graf.capture.errors import CaptureError
from graf.capture.frames import Frame
from graf.capture.masks import draw_masks, find_odd_masks, mask_of, masks_of


def overlap(mask, truth):
    return overlaps([mask], [truth])[0]


def frames_of(film, every):
    numbers = range(0, 40, every)
    return [Frame(film.frames[n], n / 20, f"photo{n}.jpg") for n in numbers], film.masks[list(numbers)]


def test_an_object_before_a_plain_wall_is_cut_out(mug_film):
    frames, truth = frames_of(mug_film, 4)
    masks = masks_of(frames, "auto", still=True)
    assert masks[0].dtype == np.uint8
    assert set(np.unique(masks)) == {0, 255}
    assert min(overlap(mask, true) for mask, true in zip(masks, truth, strict=True)) > 0.93


def test_a_single_picture_before_a_plain_wall_is_cut_out(mug_film):
    assert overlap(mask_of(mug_film.frames[7]), mug_film.masks[7]) > 0.93


def test_a_textured_wall_that_stands_still_is_told_from_the_object(textured_film):
    frames, truth = frames_of(textured_film, 2)
    masks = masks_of(frames, "auto", still=True)
    assert np.mean([overlap(mask, true) for mask, true in zip(masks, truth, strict=True)]) > 0.85


def test_a_mask_that_lacks_what_the_opposite_side_has_is_found(mug_film):
    masks = list(mug_film.masks[:40])
    angles = 9 * np.arange(40)
    assert find_odd_masks(masks, angles) == []
    masks[3] = np.where(np.arange(96)[:, None] < 48, masks[3], 0).astype(np.uint8)
    assert find_odd_masks(masks, angles) == [3]
    assert find_odd_masks(masks[:15], angles[:15]) == []  # of 126 degrees: nothing has an opposite side


def test_masks_do_not_depend_on_chance(mug_film):
    frames, _ = frames_of(mug_film, 8)
    for one, other in zip(masks_of(frames, "auto", True), masks_of(frames, "auto", True), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_empty_picture_has_an_empty_mask_and_is_named(mug_film):
    plain = np.full((96, 96, 3), 200, np.uint8)
    assert not mask_of(plain).any()
    with pytest.raises(CaptureError, match=r"--mask auto: no object found in 1 of 1 frames \(a\.jpg\)"):
        masks_of([Frame(plain, 0, "a.jpg")], "auto")


def test_none_takes_everything_and_transparency_wins_over_auto(mug_film):
    image, truth = mug_film.frames[0], mug_film.masks[0]
    frame = Frame(image, 0, "a.png", alpha=truth)
    assert masks_of([frame], "none")[0].min() == 255
    np.testing.assert_array_equal(masks_of([frame], "auto")[0] > 0, truth > 127)


@pytest.mark.parametrize("name", ["a.png", "a.jpg.png"])
@pytest.mark.parametrize("mode", ["L", "1", "I;16", "RGBA", "opaque RGBA", "large"])
def test_mask_files_are_found_by_name(tmp_path, mug_film, name, mode):
    truth = mug_film.masks[0]
    mask = Image.fromarray(truth)
    if mode == "RGBA":
        alpha, mask = mask, Image.fromarray(mug_film.frames[0])
        mask.putalpha(alpha)
    elif mode == "large":  # of the photograph's full size, which is read reduced
        mask = mask.resize((192, 192), Image.Resampling.NEAREST)
    elif mode == "I;16":
        mask = Image.fromarray(np.where(truth > 127, np.uint16(65535), np.uint16(20000)))  # 20000 is dark
    else:
        mask = mask.point(lambda value: 255 * (value > 127)).convert(mode.removeprefix("opaque "))
    mask.save(tmp_path / name)
    found = masks_of([Frame(mug_film.frames[0], 0, "a.jpg")], str(tmp_path))[0]
    assert overlap(found, truth) > 0.99


def test_masks_that_are_not_there_are_named(tmp_path, mug_film):
    frame = Frame(mug_film.frames[0], 0, "a.jpg")
    with pytest.raises(CaptureError, match=r"no mask for a\.jpg; expected a\.png"):
        masks_of([frame], str(tmp_path))
    with pytest.raises(CaptureError, match="no such folder"):
        masks_of([frame], str(tmp_path / "nowhere"))
    with pytest.raises(CaptureError, match="frames of a video have no names"):
        masks_of([Frame(mug_film.frames[0], 0, "v.mp4#3")], str(tmp_path))
    Image.new("L", (96, 40)).save(tmp_path / "a.png")
    with pytest.raises(CaptureError, match="not of the shape"):
        masks_of([frame], str(tmp_path))


def test_the_contact_sheet_darkens_what_is_cut_away(mug_film):
    mask = np.zeros((96, 96), np.uint8)
    mask[:, :48] = 255
    frame = Frame(np.full((96, 96, 3), 200, np.uint8), 0, "a.jpg")
    sheet = np.asarray(draw_masks([frame, frame], [mask, mask], ["one", "two"]))
    np.testing.assert_array_equal(sheet[40, 20], [200, 200, 200])
    np.testing.assert_array_equal(sheet[40, 70], [160, 70, 70])
