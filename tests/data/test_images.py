"""Every kind of image file ends as the same 8-bit RGB square."""

import contextlib
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from graf.data.images import UnreadableImage, quiet_decoders, read_image, read_image_size, turn_upright

RNG = np.random.default_rng(0)


def save(tmp_path, array, name="x.png", mode=None, **options):
    image = Image.fromarray(array)
    path = tmp_path / name
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def as_tensor(array):
    return torch.from_numpy(array).permute(2, 0, 1)


def test_rgb_of_the_right_size_is_unchanged(tmp_path):
    array = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert torch.equal(read_image(save(tmp_path, array), 16, True), as_tensor(array))


@pytest.mark.parametrize("white", [True, False])
def test_alpha_is_composited_over_the_background(tmp_path, white):
    array = RNG.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    alpha = array[..., 3:] / 255
    expected = np.round(array[..., :3] * alpha + (255 if white else 0) * (1 - alpha))
    found = read_image(save(tmp_path, array), 16, white)
    assert (found - as_tensor(expected)).abs().max() <= 1


@pytest.mark.parametrize("white", [True, False])
def test_transparent_palette_entries_show_the_background(tmp_path, white):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((3, 2), 1)
    image.save(tmp_path / "x.png", transparency=0)
    with quiet_decoders():
        found = read_image(tmp_path / "x.png", 8, white)
    assert found[:, 2, 3].tolist() == [200, 100, 50]
    assert found[:, 0, 0].tolist() == [255 if white else 0] * 3


def test_palette_without_transparency_gives_its_colours(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "x.gif")
    assert read_image(tmp_path / "x.gif", 8, True)[:, 4, 4].tolist() == [200, 100, 50]


def test_greyscale_becomes_three_equal_channels(tmp_path):
    array = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
    assert torch.equal(read_image(save(tmp_path, array), 8, True), torch.from_numpy(array).expand(3, -1, -1))


def test_16_bit_is_scaled_to_8_bit(tmp_path):
    array = RNG.integers(0, 65536, (8, 8), dtype=np.uint16)
    array[0, :2] = 0, 65535
    found = read_image(save(tmp_path, array), 8, True)
    assert torch.equal(found, torch.from_numpy(np.round(array / 257).astype(np.uint8)).expand(3, -1, -1))


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    path = save(tmp_path, np.full((8, 8, 3), (250, 20, 20), np.uint8), "x.jpg", "CMYK", quality=100)
    assert (read_image(path, 8, True)[:, 4, 4].float() - torch.tensor([250.0, 20, 20])).abs().max() < 8


def test_exif_orientation_is_applied_before_the_crop(tmp_path):
    array = np.zeros((8, 24, 3), np.uint8)
    array[:, 8:16] = 255  # the middle third survives the crop, turned by a quarter
    array[0, 8:16] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show the picture a quarter clockwise
    path = save(tmp_path, array, exif=exif)
    assert read_image_size(path) == (8, 24)
    found = read_image(path, 8, True)
    assert found[:, 3, 7].tolist() == [255, 0, 0]
    assert found[:, 3, 0].tolist() == [255, 255, 255]


DATE_AS_NUMBER = (0x0132, 11, 1, struct.pack("<f", 1.5))
WIDTH_AS_TEXT = (0x0100, 2, 4, b"abc\0")


@pytest.mark.parametrize("odd", [DATE_AS_NUMBER, WIDTH_AS_TEXT])
def test_odd_exif_beside_an_intact_picture_turns_it_as_it_says(tmp_path, odd):
    """Tags that Pillow reads and cannot write again."""
    tags = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in (odd, (0x0112, 3, 1, struct.pack("<HH", 6, 0))))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    array = np.zeros((8, 16, 3), np.uint8)
    array[:, :8] = 255
    path = save(tmp_path, array, "x.jpg", exif=exif, quality=95)
    assert read_image_size(path) == (8, 16)
    found = read_image(path, 8, True)
    assert found[:, 0].min() > 240  # what was left is above
    assert found[:, 7].max() < 15


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["exif.png", "xmp.png", "exif.jpg", "exif.tif"])
def test_the_size_that_is_told_is_that_of_the_upright_picture(tmp_path, kind, orientation):
    exif, info = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = orientation
    info.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="{orientation}"/>')
    options = {"pnginfo": info} if kind.startswith("xmp") else {"exif": exif}
    array = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
    path = save(tmp_path, array, kind, **options)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        assert read_image_size(path) == upright.size
        np.testing.assert_array_equal(turn_upright(image), upright)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK"])
@pytest.mark.parametrize("imsize", [8, 9])
def test_what_is_right_already_is_not_copied_and_nothing_else_changes(tmp_path, mode, imsize):
    pixels = RNG.integers(0, 256, (24, 40, 4), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("RGB" if mode in ("P", "CMYK") else mode).convert(mode)
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(path)
    with Image.open(path) as image:
        copied = image.copy().convert("RGBA" if "A" in mode else "RGB")
    if "A" in mode:
        copied = Image.alpha_composite(Image.new("RGBA", copied.size, "white"), copied).convert("RGB")
    box = (8, 0, 32, 24)
    square = copied.reduce(3, box) if imsize == 8 else copied.resize((9, 9), Image.Resampling.BICUBIC, box=box)
    assert torch.equal(read_image(path, imsize, True), as_tensor(np.array(square)))
    with Image.open(path) as image:
        assert turn_upright(image) is image


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (9, 8)])
def test_other_shapes_are_cropped_to_their_central_square(tmp_path, shape):
    array = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    top, left = (shape[0] - 8) // 2, (shape[1] - 8) // 2
    assert torch.equal(read_image(save(tmp_path, array), 8, True), as_tensor(array[top : top + 8, left : left + 8]))


def test_shrinking_by_a_whole_factor_is_average_pooling(tmp_path):
    array = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = torch.nn.functional.avg_pool2d(as_tensor(array).float(), 4)
    assert (read_image(save(tmp_path, array), 8, True) - expected).abs().max() <= 0.5 + 1e-3


def test_shrinking_by_another_factor_does_not_alias(tmp_path):
    stripes = np.zeros((100, 100, 3), np.uint8)
    stripes[:, ::2] = 255
    found = read_image(save(tmp_path, stripes), 16, True).float()
    assert (found[:, 2:-2, 2:-2] - 127.5).abs().max() < 12  # point sampling would give 0 and 255


def test_small_photographs_are_enlarged(tmp_path):
    assert read_image(save(tmp_path, np.full((5, 5, 3), 77, np.uint8)), 16, True).unique().tolist() == [77]


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7])
def test_truncated_files_are_unreadable(tmp_path, suffix, keep):
    path = save(tmp_path, RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), f"x.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with quiet_decoders(), pytest.raises(UnreadableImage):
        read_image(path, 16, True)


def test_text_named_png_is_unreadable(tmp_path):
    (tmp_path / "x.png").write_text("not a picture")
    with pytest.raises(UnreadableImage):
        read_image_size(tmp_path / "x.png")


def test_floating_point_pixels_are_unreadable(tmp_path):
    with pytest.raises(UnreadableImage, match="floating-point"):
        read_image(save(tmp_path, RNG.random((8, 8)).astype(np.float32), "x.tif"), 8, True)


@pytest.mark.parametrize("suffix", ["gif", "jpg", "bmp"])
def test_damage_gives_an_image_or_unreadable_and_nothing_else(tmp_path, suffix):
    path = save(tmp_path, RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8), f"x.{suffix}")
    content = path.read_bytes()
    for _ in range(25):
        damaged = bytearray(content)
        for place in RNG.integers(0, len(content), 8):
            damaged[place] = RNG.integers(256)
        path.write_bytes(damaged)
        with quiet_decoders(), contextlib.suppress(UnreadableImage):
            assert read_image(path, 8, True).shape == (3, 8, 8)


def test_quiet_decoders_silence_pillow_alone():
    with quiet_decoders(), pytest.raises(UserWarning, match="ours"):
        warnings.warn("ours", UserWarning, stacklevel=1)
