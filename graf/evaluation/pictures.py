"""Images for people: uint8 conversion, grids, depth and opacity as colour, PNG files and video.

Images are float (N, 3, H, W) in [-1, 1] until `to_uint8`; pictures are uint8 (H, W, 3) numpy arrays, as files want.
"""

import math
import secrets
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from imageio.v2 import get_writer
from imageio.v3 import imwrite
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from graf.base.errors import UserError
from graf.base.files import write_atomically
from graf.runtime.logs import warn_once

Picture = np.ndarray[Any, np.dtype[np.uint8]]

#: pixels along a side of a video that x264 encodes
LARGEST_VIDEO = 16384

# From far to near: dark violet, blue, green, yellow. Brightness rises all the way, so it reads in greyscale too.
DEPTH_COLOURS = ((0.14, 0.06, 0.26), (0.22, 0.28, 0.56), (0.13, 0.57, 0.55), (0.48, 0.82, 0.32), (0.99, 0.91, 0.24))


def to_uint8(images: Tensor) -> Tensor:
    """float (..., 3, H, W) in [-1, 1] -> uint8, rounded and clipped. Raises ValueError for NaN or infinity."""
    if not torch.isfinite(images).all():
        raise ValueError("images hold NaN or infinity: the generator that made them has diverged")
    return ((images.detach().float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def tile_grid(images: Tensor, columns: int, padding: int = 2, background: float = 1.0) -> Picture:
    """Tile (N, 3, H, W) row by row into one picture, with `padding` pixels around each image.

    `images` are float in [-1, 1], or uint8; `background` in [-1, 1] fills the padding and the end of the last row.
    """
    if images.dim() != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"tile_grid: expected (N, 3, H, W) with N >= 1, found {tuple(images.shape)}")
    if columns < 1 or padding < 0:
        raise ValueError(f"tile_grid: columns={columns}, padding={padding}: expected columns >= 1 and padding >= 0")
    if images.dtype != torch.uint8:
        images = to_uint8(images)
    fill = int(to_uint8(torch.tensor(background)))
    rows = math.ceil(len(images) / columns)
    height, width = images.shape[2] + padding, images.shape[3] + padding
    sides = tiled_side(rows, images.shape[2], padding), tiled_side(columns, images.shape[3], padding)
    grid = images.new_full((3, *sides), fill)
    for number, image in enumerate(images):
        top, left = number // columns * height + padding, number % columns * width + padding
        grid[:, top : top + images.shape[2], left : left + images.shape[3]] = image
    return grid.permute(1, 2, 0).cpu().numpy()


def tiled_side(count: int, side: int, padding: int = 2) -> int:
    """Pixels along `count` images of `side` pixels as :func:`tile_grid` places them."""
    return count * (side + padding) + padding


def label_grid(grid: Picture, row_labels: Sequence[str] = (), column_labels: Sequence[str] = ()) -> Picture:
    """Write a caption left of each row and above each column of an evenly tiled picture, on a white margin."""
    font = ImageFont.load_default()
    row_labels, column_labels = ([_plain_letters(text) for text in labels] for labels in (row_labels, column_labels))
    margin_left = 8 + math.ceil(max(font.getlength(text) for text in row_labels)) if row_labels else 0
    margin_top = 18 if column_labels else 0
    canvas = Image.new("RGB", (grid.shape[1] + margin_left, grid.shape[0] + margin_top), "white")
    canvas.paste(Image.fromarray(grid), (margin_left, margin_top))
    draw = ImageDraw.Draw(canvas)
    for row, text in enumerate(row_labels):
        centre = margin_top + (row + 0.5) * grid.shape[0] / len(row_labels)
        draw.text((4, centre - 6), text, fill="black", font=font)
    for column, text in enumerate(column_labels):
        centre = margin_left + (column + 0.5) * grid.shape[1] / len(column_labels)
        draw.text((centre - font.getlength(text) / 2, 3), text, fill="black", font=font)
    return np.array(canvas)


def _plain_letters(text: str) -> str:
    """A text whose accented Latin letters have lost their marks, which Pillow's own font lacks; the rest stays."""
    stripped = (
        "".join(part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part))
        for letter in text
    )
    return "".join(plain if plain.isascii() else letter for letter, plain in zip(text, stripped, strict=True))


def depth_to_rgb(depth: Tensor, near: float, far: float, opacity: Tensor | None = None) -> Tensor:
    """z-depth (N, 1, H, W) in world units -> float (N, 3, H, W) in [-1, 1], near bright and far dark.

    Depths outside [near, far] are clipped. With `opacity` (N, 1, H, W) in [0, 1] the background fades to white, where
    depth has no meaning.
    """
    if not near < far:
        raise ValueError(f"depth_to_rgb: near={near}, far={far}: expected near < far")
    nearness = ((far - depth) / (far - near)).clamp(0.0, 1.0)
    colours = torch.tensor(DEPTH_COLOURS, device=depth.device, dtype=depth.dtype)
    position = nearness * (len(colours) - 1)
    lower = position.floor().clamp(max=len(colours) - 2)
    blend = position - lower
    index = lower.long().squeeze(1)
    below, above = colours[index].permute(0, 3, 1, 2), colours[index + 1].permute(0, 3, 1, 2)
    rgb = below + (above - below) * blend
    if opacity is not None:
        rgb = 1.0 + (rgb - 1.0) * opacity.clamp(0.0, 1.0)
    return rgb * 2.0 - 1.0


def opacity_to_rgb(opacity: Tensor) -> Tensor:
    """Opacity (N, 1, H, W) in [0, 1] -> grey float (N, 3, H, W) in [-1, 1]: white is opaque."""
    return opacity.clamp(0.0, 1.0).expand(-1, 3, -1, -1) * 2.0 - 1.0


def save_png(path: str | Path, picture: Picture) -> Path:
    """Write a picture as PNG, with the folders it needs; returns the path."""
    write_atomically(path, imwrite("<bytes>", picture, extension=".png"))
    return Path(path)


def check_video_size(width: int, height: int, advice: str) -> None:
    """Raise UserError, which ends in `advice`, for frames that are too large for a video."""
    if max(width, height) > LARGEST_VIDEO:
        raise UserError(
            f"a video of {width} x {height} pixels: H.264 takes at most {LARGEST_VIDEO} along a side; {advice}"
        )


def write_video(path: str | Path, frames: Iterable[Picture], fps: int = 25) -> Path:
    """Write pictures of one size as an H.264 video while they come; returns the path that was written.

    Odd sizes are padded by repeating the last row or column, since H.264 needs even ones. Without ffmpeg an animated
    GIF of the same name is written instead, and reported once. Frames go to a file beside it, which takes its name when
    they are all there: what could not be finished is removed, and a former video stays. Raises ValueError for no frames
    or for frames of two sizes, and OSError where not all of them could be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prepared = _pad_to_even(frames)
    first = next(prepared, None)
    if first is None:
        raise ValueError(f"{path}: no frames to write")
    options: dict[str, Any] = {"format": "FFMPEG", "fps": fps, "quality": 8, "macro_block_size": 2}
    options["ffmpeg_log_level"] = "error"
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        warn_once(
            f"no ffmpeg ({str(error).splitlines()[0]}): writing GIF instead of video; `pip install imageio[ffmpeg]`"
        )
        path, options = path.with_suffix(".gif"), {"duration": 1000 / fps, "loop": 0}
    making = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.saving{path.suffix}")
    try:
        writer: Any = get_writer(making, **options)
        with closing(writer):  # its own `with` leaves ffmpeg running after an error
            count = 0
            for frame in chain([first], prepared):
                writer.append_data(frame)
                count += 1
        if path.suffix != ".gif":
            _check_video(making, count, path)
        making.replace(path)
    except BaseException:
        making.unlink(missing_ok=True)
        raise
    return path


def _check_video(file: Path, count: int, path: Path) -> None:
    """Raise OSError, which names `path`, unless `count` frames can be read: nobody else asks how ffmpeg has ended."""
    from imageio_ffmpeg import count_frames_and_secs

    try:
        found, _ = count_frames_and_secs(file)
    except RuntimeError:  # it cannot even be opened
        found = 0
    if found != count:
        raise OSError(
            f"{path}: ffmpeg has left {found} of {count} frames that can be read; its own message stands above; make "
            "room where the disk is full, and start again"
        )


def _pad_to_even(frames: Iterable[Picture]) -> Iterator[Picture]:
    shape = None
    for number, frame in enumerate(frames):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"frame {number}: expected uint8 (H, W, 3), found {frame.dtype} {frame.shape}")
        shape = shape or frame.shape
        if frame.shape != shape:
            raise ValueError(f"frame {number} is {frame.shape}, the first one {shape}: a video has one size")
        yield np.pad(frame, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge")
