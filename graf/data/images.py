"""One photograph file -> one square uint8 RGB image.

Whatever the file holds ends as 8-bit RGB: EXIF orientation applied, alpha composited over the background, greyscale and
palette expanded, 16 bit scaled by 1/257, centre-cropped to a square and resized with antialiasing.
"""

import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"))
#: the decoders that files may reach, whatever their names are: some of Pillow's others start programs
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")

# EXIF's orientation -> what turns such an image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow raises for damaged files, depending on the format and on where the damage is.
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


class UnreadableImage(Exception):
    """A file with an image's suffix does not hold a readable image; the message is the decoder's reason."""


def scale_pixels(pixels: Tensor) -> Tensor:
    """uint8 pixels as networks take them: float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Silence Pillow's warnings: broken EXIF beside an intact image, palettes with byte transparency; both are handled.

    Python's warning filters belong to the process, so this wraps a whole pool of threads, not the work of one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except DECODER_ERRORS as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def read_image_size(path: Path, max_megapixels: float = math.inf) -> tuple[int, int]:
    """Width and height after EXIF orientation, from what stands in a file before its pixels.

    Raises UnreadableImage, also for an image of more pixels than allowed.
    """
    with _open_image(path) as image:
        megapixels = image.width * image.height / 1e6
        if megapixels > max_megapixels:
            raise UnreadableImage(f"{megapixels:.4g} megapixels, more than data.max_megapixels={max_megapixels:g}")
        # Without any of these before its pixels, a PNG would be decoded as a whole to look for them behind.
        told = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"} & image.info.keys()
        sideways = (image.format != "PNG" or bool(told)) and _orientation(image) in (5, 6, 7, 8)
        width, height = image.size
        if isinstance(image, TiffImageFile):  # some versions of Pillow have swapped its sides by now, some have not
            width, height = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
    return (height, width) if sideways else (width, height)


def turn_upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF wants it shown; the same object, decoded, where that is how it is stored."""
    image.load()
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """EXIF's number for how an image is stored; 1, upright, where it tells none."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DECODER_ERRORS:  # EXIF may be damaged beside an intact image
        return 1


def square_side(size: tuple[int, int], crop: int | None) -> int:
    """Side in pixels of the central square of a photograph (width, height) that is used: `crop` where it is given."""
    return min(size) if crop is None else min(*size, crop)


def read_image(path: Path, imsize: int, white_bkgd: bool, crop: int | None = None) -> Tensor:
    """The central square (of `crop` pixels, else the largest) as uint8 (3, imsize, imsize). Raises UnreadableImage."""
    with _open_image(path) as image:
        rgb = _convert_to_rgb(turn_upright(image), white_bkgd)
        square = _resize_to_square(rgb, imsize, crop)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def read_alpha(path: Path, imsize: int, crop: int | None = None) -> Tensor | None:
    """The opacity of the same square as uint8 (1, imsize, imsize), None without any. Raises UnreadableImage."""
    with _open_image(path) as image:
        if not has_alpha(image):
            return None
        alpha = _resize_to_square(turn_upright(image).convert("RGBA").getchannel("A"), imsize, crop)
    return torch.from_numpy(np.array(alpha))[None]


def has_alpha(image: Image.Image) -> bool:
    """Whether pixels of an image may be transparent."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def to_8_bit(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel. Raises ValueError for pixels whose range is not known."""
    if image.mode.startswith("I"):  # 16-bit greyscale: "I;16" and its byte orders; "I" in older versions of Pillow
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"integer values {values.min()}..{values.max()}; expected 16 bit")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; expected 8 or 16 bit")
    return image


def _convert_to_rgb(image: Image.Image, white_bkgd: bool) -> Image.Image:
    """8-bit RGB; the same object where it is that already, for a large photograph's copies fill the memory."""
    image = to_8_bit(image)
    if has_alpha(image):
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        colour = (255, 255, 255, 255) if white_bkgd else (0, 0, 0, 255)
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, colour), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def _resize_to_square(image: Image.Image, imsize: int, crop: int | None) -> Image.Image:
    side = square_side(image.size, crop)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if side % imsize == 0:
        # Averaged in one step, so that a small image is avg_pool of the large one (super-resolution relies on it).
        return image.reduce(side // imsize, box)
    # Pillow's bicubic widens its kernel when it shrinks, so it does not alias.
    return image.resize((imsize, imsize), Image.Resampling.BICUBIC, box=box)
