"""One photograph as inversion sees it: a square of colours as in training, and where the object is, if that is known.

It renders nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from graf.base.errors import UserError
from graf.base.tensors import TensorBatch
from graf.data.images import UnreadableImage, quiet_decoders, read_alpha, read_image, read_image_size, square_side
from graf.runtime.logs import logger

#: pixels along the side of the used square below which there is nothing to fit
SMALLEST_SIDE = 16
#: share of the square that an object has to cover
LEAST_COVERED = 0.005
#: of 255: how far noise and compression move a colour of the background
BACKGROUND_TOLERANCE = 20
#: share of the border that has to show the background for it to be told from the object
LEAST_BORDER = 0.6
MASK_SOURCES = ("auto", "none")


class PhotographError(UserError):
    """A photograph that cannot be inverted; the message names the file, what is wrong and what to do."""


@dataclass(frozen=True)
class PhotographSettings:
    """How a photograph is read, as the run's own were: data.imsize, data.crop, data.white_bkgd, data.max_megapixels.

    background: colour (3,) in [-1, 1] behind the generator's objects; mask: "auto", or "none" to use colours alone.
    """

    resolution: int
    white_bkgd: bool
    background: Tensor
    crop: int | None = None
    max_megapixels: float = 100.0
    mask: str = "auto"


@dataclass(frozen=True)
class Photograph(TensorBatch):
    """colours (1, 3, S, S) in [-1, 1]; mask (1, 1, S, S), the covered share of each pixel in [0, 1], or None.

    is_grey: it tells brightness alone, so that only brightness is compared.
    """

    colours: Tensor
    mask: Tensor | None = None
    is_grey: bool = False

    def reduce(self, size: int) -> Photograph:
        """The same photograph of size x size pixels, each the mean of what it covers."""
        return self.map(lambda part: functional.interpolate(part, (size, size), mode="area"))

    def sample(self, places: Tensor) -> Photograph:
        """What it shows at places (1, H, W, 2) of the image plane, (x, y) in [-1, 1]: bilinear between its pixels."""
        return self.map(
            lambda part: functional.grid_sample(
                part, places.to(part.dtype), padding_mode="border", align_corners=False, mode="bilinear"
            )
        )


def read_photograph(path: Path, settings: PhotographSettings) -> Photograph:
    """The central square of a file, over the generator's background.

    The mask is the file's own transparency, else what differs from the background and is not connected with the border
    by it. Raises PhotographError for a file that cannot be read, is too small or shows no object.
    """
    if not path.is_file():
        raise PhotographError(f"{path}: no such file; expected a photograph")
    size, alpha = settings.resolution, None
    try:
        with quiet_decoders():
            side = square_side(read_image_size(path, settings.max_megapixels), settings.crop)
            if side >= SMALLEST_SIDE:
                pixels = read_image(path, size, settings.white_bkgd, settings.crop)
                alpha = read_alpha(path, size, settings.crop)
    except UnreadableImage as error:
        raise PhotographError(f"{path}: cannot be read as a photograph ({error}); expected PNG, JPEG, ...") from error
    if side < SMALLEST_SIDE:
        where = "" if settings.crop is None else f" after --crop {settings.crop}"
        raise PhotographError(
            f"{path}: is {side} pixels wide{where}: expected at least {SMALLEST_SIDE}, better {size} or more"
        )
    if side < size:
        logger.warning("%s: %d pixels are enlarged to %d: details are guesses", path, side, size)
    photograph = _compose(path, pixels, alpha, settings)
    if photograph.is_grey:
        logger.warning("%s: has no colours; brightness alone is compared, and the object's colours are guesses", path)
    return photograph


def _compose(path: Path, pixels: Tensor, alpha: Tensor | None, settings: PhotographSettings) -> Photograph:
    """The photograph of uint8 pixels (3, S, S) and their opacity (1, S, S) where the file has one."""
    colours = pixels[None].float() / 127.5 - 1
    is_grey = int((pixels.amax(0).int() - pixels.amin(0).int()).max()) <= 1
    background = settings.background.detach().cpu().float()[:, None, None]
    transparent = alpha is not None and int(alpha.min()) < 255
    if transparent and alpha is not None:
        mask = alpha[None].float() / 255
        # Files are read over white or black; a learned background differs from it.
        colours = colours + (1 - mask) * (background - (1.0 if settings.white_bkgd else -1.0))
    else:
        found = find_object(pixels, ((background + 1) * 127.5).round().to(torch.uint8))
        if found is None:
            if settings.mask != "none":
                logger.warning(
                    "%s: its border is not the background of the training photographs, so that colours alone are "
                    "compared, background included; a PNG whose background is transparent is found far better",
                    path,
                )
            return Photograph(colours, None, is_grey)
        mask = found[None].float()
    if float(mask.mean()) < LEAST_COVERED:
        raise PhotographError(
            f"{path}: shows no object: {100 * (1 - float(mask.mean())):.1f}% of it is background; expected the object "
            "in the middle of the photograph"
        )
    photograph = Photograph(colours, mask, is_grey)
    return replace(photograph, mask=None) if settings.mask == "none" else photograph


def find_object(pixels: Tensor, background: Tensor) -> Tensor | None:
    """Where uint8 pixels (3, S, S) are not the background (3, 1, 1) that is connected with the border: (1, S, S).

    None where most of the border shows something else.
    """
    border = torch.cat([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], dim=1).int()
    near = (border - background[:, :, 0].int()).abs().amax(0) <= BACKGROUND_TOLERANCE
    if float(near.float().mean()) < LEAST_BORDER:
        return None
    differs = (pixels.int() - background.int()).abs().amax(0) > BACKGROUND_TOLERANCE
    canvas = functional.pad(differs, (1, 1, 1, 1)).byte() * 255  # a rim of background joins all of the border
    image = Image.fromarray(canvas.numpy()).copy()  # which can be painted on
    ImageDraw.floodfill(image, (0, 0), 128)
    return torch.from_numpy(np.array(image) != 128)[None, 1:-1, 1:-1]
