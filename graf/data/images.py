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
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"))
#: the decoders that files may reach, whatever their names are: some of Pillow's others start programs
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")

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
    """Width and height after EXIF orientation, from the header alone.

    Raises UnreadableImage, also for an image of more pixels than allowed.
    """
    with _open_image(path) as image:
        megapixels = image.width * image.height / 1e6
        if megapixels > max_megapixels:
            raise UnreadableImage(f"{megapixels:.4g} megapixels, more than data.max_megapixels={max_megapixels:g}")
        # Where a PNG's header has no EXIF, getexif() would decode the whole file to look behind the pixels.
        exif = image.getexif() if image.format != "PNG" or "exif" in image.info else Image.Exif()
        sideways = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        width, height = image.size
    return (height, width) if sideways else (width, height)


def square_side(size: tuple[int, int], crop: int | None) -> int:
    """Side in pixels of the central square of a photograph (width, height) that is used: `crop` where it is given."""
    return min(size) if crop is None else min(*size, crop)


def read_image(path: Path, imsize: int, white_bkgd: bool, crop: int | None = None) -> Tensor:
    """The central square (of `crop` pixels, else the largest) as uint8 (3, imsize, imsize). Raises UnreadableImage."""
    with _open_image(path) as image:
        rgb = _convert_to_rgb(ImageOps.exif_transpose(image), white_bkgd)
        square = _resize_to_square(rgb, imsize, crop)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def read_alpha(path: Path, imsize: int, crop: int | None = None) -> Tensor | None:
    """The opacity of the same square as uint8 (1, imsize, imsize), None without any. Raises UnreadableImage."""
    with _open_image(path) as image:
        if not _has_alpha(image):
            return None
        alpha = _resize_to_square(ImageOps.exif_transpose(image).convert("RGBA").getchannel("A"), imsize, crop)
    return torch.from_numpy(np.array(alpha))[None]


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _convert_to_rgb(image: Image.Image, white_bkgd: bool) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greyscale: "I;16" and its byte orders; "I" in older versions of Pillow
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"integer values {values.min()}..{values.max()}; expected 16 bit")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; expected 8 or 16 bit")
    if _has_alpha(image):
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (255, 255, 255, 255) if white_bkgd else (0, 0, 0, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


def _resize_to_square(image: Image.Image, imsize: int, crop: int | None) -> Image.Image:
    side = square_side(image.size, crop)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if side % imsize == 0:
        # Averaged in one step, so that a small image is avg_pool of the large one (super-resolution relies on it).
        return image.reduce(side // imsize, box)
    # Pillow's bicubic widens its kernel when it shrinks, so it does not alias.
    return image.resize((imsize, imsize), Image.Resampling.BICUBIC, box=box)
