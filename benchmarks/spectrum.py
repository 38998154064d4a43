"""Could D tell photographs from perfect renders by their sharpness? `python -m benchmarks.spectrum` writes its section.

The toys are rendered with many rays a pixel. Their means over a pixel are photographs, the rays through the middle of
a patch's cells a render of perfectly sharp objects, and means around these rays one of objects that a field has learned
from photographs. Compared are the energies of both in the finer half of the frequencies: where photographs are read so
that they have less, D learns to call sharpness false.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.results import RESULTS, format_table, write_section
from graf.data.synthetic import CLASS_NAMES, render_views
from graf.geometry.cameras import Intrinsics, pose_from_angles
from graf.geometry.rays import Patches, crop_images, patch_grid, place_patches, place_pixel_patches

#: pixels of a photograph and of a patch, and rays along each side of a pixel
IMAGE, PATCH, RAYS = 64, 32, 9
#: how photographs are read -> the side of a patch's cells in pixels, how patches are placed, and the interpolation
READINGS: dict[str, tuple[int, Callable[[Tensor, float, float], Patches], str]] = {
    "cells of 1 pixel, on whole pixels": (1, partial(place_pixel_patches, size=PATCH, resolution=IMAGE), "bilinear"),
    "cells of 1 pixel, anywhere, bilinear": (1, place_patches, "bilinear"),
    "cells of 1 pixel, anywhere, bicubic": (1, place_patches, "bicubic"),
    "cells of 2 pixels, on whole pixels": (2, partial(place_pixel_patches, size=PATCH, resolution=IMAGE), "bilinear"),
    "cells of 2 pixels, between pixels, bilinear": (2, place_patches, "bilinear"),
    "cells of 2 pixels, between pixels, bicubic": (2, place_patches, "bicubic"),
}


@dataclass(frozen=True)
class Sharpness:
    """Energy of read photographs in the finer half of the frequencies, as a share of that of perfect renders.

    points: renders of one ray through the middle of each cell, as the program makes them; areas: renders of many rays
    in the area of a pixel there.
    """

    points: float
    areas: float


def fine_energy(images: Tensor) -> float:
    """Mean energy of images (N, C, K, K) at frequencies of which one coordinate is above half of the finest."""
    window = torch.hann_window(images.shape[-1], periodic=False)
    centred = (images - images.mean((2, 3), keepdim=True)) * window[:, None] * window
    power = torch.fft.fft2(centred).abs().square()
    frequency = torch.fft.fftfreq(images.shape[-1]).abs()
    return float(power[..., torch.maximum(frequency[:, None], frequency) > 0.25].mean())


def measure(num_views: int) -> dict[str, Sharpness]:
    """The sharpness of every reading, over `num_views` views of each toy."""
    u = torch.arange(num_views) / num_views
    poses = pose_from_angles(u, torch.full_like(u, 0.35), 3.5)
    intrinsics = Intrinsics.from_fov(RAYS * IMAGE, 30.0)
    fine = torch.cat([render_views(toy, poses, intrinsics, supersampling=1)[0] for toy in range(len(CLASS_NAMES))])
    photographs = functional.avg_pool2d(fine, RAYS)
    areas = functional.avg_pool2d(fine, RAYS, stride=1, padding=RAYS // 2, count_include_pad=False)
    uniforms = torch.rand(len(fine), 3, generator=torch.Generator().manual_seed(0))
    image, found = torch.arange(len(fine))[:, None, None], {}
    for name, (cell, place, interpolation) in READINGS.items():
        patches = place(uniforms, cell * PATCH / IMAGE, cell * PATCH / IMAGE)
        places = (patch_grid(patches, PATCH) + 1) / 2 * RAYS * IMAGE - 0.5
        column, row = places.round().long().clamp(0, RAYS * IMAGE - 1).unbind(-1)
        real = fine_energy(crop_images(photographs, patches, PATCH, interpolation))
        energies = [fine_energy(renders[image, :, row, column].permute(0, 3, 1, 2)) for renders in (fine, areas)]
        found[name] = Sharpness(*(real / energy for energy in energies))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--views", type=int, default=24, help="of each toy")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rows = [
        [name, f"{sharpness.points:.3f}", f"{sharpness.areas:.3f}"]
        for name, sharpness in measure(options.views).items()
    ]
    header = ["patches of photographs", "beside renders of one ray a cell", "beside renders of a pixel's area"]
    text = (
        f"{options.views} views of each toy, photographs of {IMAGE} x {IMAGE} with {RAYS} x {RAYS} rays a pixel, "
        f"patches of {PATCH} x {PATCH}. Energy in the finer half of the frequencies as a share of that of perfect "
        f"renders of the same patches. Photographs are means over pixels, which a field learns to show with one ray; "
        f"so the last column is what D can go by: nothing where patches lie on whole pixels.\n\n"
        f"{format_table(header, rows)}"
    )
    write_section("Are photographs as sharp as renders?", "python -m benchmarks.spectrum", text, options.results)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
