"""Features of three planes at the points that project onto them: the lookup that tri-plane fields spend their time in.

Where channels of a place lie side by side, a CPU fetches one corner of a cell by reading one row. `grid_sample`, which
a GPU is good at, reads every channel of every corner by itself. Both give the same features and gradients (tested).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graf.runtime.amp import float32_region
from graf.runtime.torch_release import is_exporting

_stand_in: ContextVar[str | None] = ContextVar("stand_in", default=None)
#: the coordinates that the three planes are spanned by: (x, y), (x, z), (y, z)
PLANE_AXES = ((0, 1), (0, 2), (1, 2))


@contextmanager
def look_up_as_on(device_type: str) -> Iterator[None]:
    """Inside, planes on a CPU are looked up as on another device: a plan for that one is made on a CPU."""
    before = _stand_in.set(device_type)
    try:
        yield
    finally:
        _stand_in.reset(before)


def arrange_planes(planes: Tensor) -> Tensor:
    """The same planes (B, 3, C, R, R), in memory as :func:`sample_planes` reads them fastest on their device."""
    if not _reads_rows(planes):
        return planes.contiguous()
    return planes.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)


def sample_planes(planes: Tensor, places: Tensor) -> Tensor:
    """The sum of the three planes' features (B, P, C), each bilinear between its grid points, at places (B, P, 3).

    planes: (B, 3, C, R, R), over the square [-1, 1] x [-1, 1] of two axes each, second axis first as in images;
    outside, the nearest edge counts. In float32, or places' own float64: half precision would round places to a
    quarter of a cell.
    """
    with float32_region(planes.device.type):
        # learned cameras and normals ask for gradients of places, exported programs for operators that others know
        if not _reads_rows(planes) or places.requires_grad or is_exporting():
            return _sample_by_channel(planes, places)
        batch, _, channels, resolution, _ = planes.shape
        rows = planes.permute(0, 3, 4, 1, 2).reshape(-1, channels)
        features: Tensor = _SampleByRow.apply(rows, places, resolution)
        return features.view(batch, -1, channels)


def _reads_rows(planes: Tensor) -> bool:
    return (_stand_in.get() or planes.device.type) == "cpu"


def _sample_by_channel(planes: Tensor, places: Tensor) -> Tensor:
    batch, _, channels, resolution, _ = planes.shape
    # (B, 3, P, 2), by slices: a list of axes would be copied to the device, which waits for it, in every chunk; and
    # contiguous: read through strides, as one image's would be, it takes four times as long
    grid = torch.stack([places[..., low : high + 1 : high - low] for low, high in PLANE_AXES], dim=1)
    features = functional.grid_sample(
        planes.reshape(batch * 3, channels, resolution, resolution),
        grid.reshape(batch * 3, -1, 1, 2),
        padding_mode="border",
        align_corners=False,
    )
    return features.view(batch, 3, channels, -1).sum(1).mT


class _SampleByRow(torch.autograd.Function):
    """Features (B P, C) of rows (B R R 3, C), one for each batch element, place y, place x and plane.

    Places alone are kept for the backward pass: to find cells and weights again costs less than to read them back.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, resolution: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.resolution, ctx.num_rows = resolution, len(rows)
        cells, across, down = _find_cells(places, resolution)
        first = cells.mul_(3).add_(torch.arange(3, dtype=torch.int32)[:, None])  # rows of a place's planes follow it
        indices = _by_point([first + 3 * step for step in _corner_steps(resolution)])
        weights = _by_point(_corner_weights(across, down))
        # detached: else torch would also prepare its own backward pass, which the one below replaces
        return functional.embedding_bag(indices, rows.detach(), mode="sum", per_sample_weights=weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Each row's gradient is a weighted sum over the points whose cells it is a corner of: rows are fetched again.

        Points are sorted by cell once, which serves all four corners: a corner's rows are the cells, shifted. Every
        plane is sorted by itself, so that 16 bits hold the cells of more images; one plane's come after another's.
        """
        (places,) = ctx.saved_tensors
        cells, across, down = _find_cells(places, ctx.resolution)
        points = torch.stack([_sort(of_plane, ctx.num_rows // 3) for of_plane in cells])
        counts = torch.zeros(3, ctx.num_rows // 3, dtype=torch.int64)
        counts = counts.scatter_add_(1, cells.long(), torch.ones_like(points)).flatten()
        starts = torch.cumsum(counts, 0) - counts
        across, down = across.gather(1, points).flatten(), down.gather(1, points).flatten()
        points, gradient = points.flatten(), gradient.contiguous()
        steps = _corner_steps(ctx.resolution)
        total = gradient.new_zeros(ctx.num_rows + steps[-1], gradient.shape[1])
        for step, weights in zip(steps, _corner_weights(across, down), strict=True):
            total[step : step + ctx.num_rows] += functional.embedding_bag(
                points, gradient, starts, mode="sum", per_sample_weights=weights
            )
        by_plane = total[: ctx.num_rows].view(3, -1, gradient.shape[1])
        return by_plane.transpose(0, 1).reshape(ctx.num_rows, -1), None, None


def _find_cells(places: Tensor, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """The cell of each point on each plane, by the grid point at its lower corner, batch element, row and column
    counted through; and how far the point is across and down it, in [0, 1]: (3, B P) each, int32 and twice float.
    """
    batch, count, _ = places.shape
    position = places.permute(2, 0, 1).reshape(3, batch * count) * (resolution / 2)
    position = position.add_((resolution - 1) / 2).clamp_(0, resolution - 1)
    low = position.floor().clamp_(max=resolution - 2).nan_to_num_(0)  # NaN is in no cell, and stays in the shares
    share = position.sub_(low)
    low = low.int()
    first = torch.arange(batch, dtype=torch.int32).mul_(resolution**2).repeat_interleave(count)
    cells = [torch.add(low[x], low[y], alpha=resolution).add_(first) for x, y in PLANE_AXES]
    x, y = zip(*PLANE_AXES, strict=True)
    return torch.stack(cells), share[list(x)], share[list(y)]


def _sort(cells: Tensor, num_cells: int) -> Tensor:
    """The order in which cells, numbers below num_cells, ascend: found in two thirds of the time where 16 bits do."""
    if num_cells <= 2**16:
        cells = cells.sub(2**15).to(torch.int16)  # which has a sign
    return torch.sort(cells).indices


def _corner_steps(resolution: int) -> tuple[int, int, int, int]:
    """How many grid points behind the first corner of a cell the four corners are."""
    return 0, 1, resolution, resolution + 1


def _corner_weights(across: Tensor, down: Tensor) -> list[Tensor]:
    """The bilinear weights of the corners, in the order of their steps."""
    left, above = 1 - across, 1 - down
    return [left * above, across * above, left * down, across * down]


def _by_point(corners: list[Tensor]) -> Tensor:
    """What four corners (3, B P) have for each plane and point, (B P, 12).

    Written corner by corner: to stack them along a last dimension of four takes eight times as long.
    """
    found = corners[0].new_empty(corners[0].shape[1], 3, len(corners))
    for number, corner in enumerate(corners):
        found[:, :, number].copy_(corner.t())
    return found.flatten(1)
