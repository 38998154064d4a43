"""Positional encoding of points and directions: waves of doubling frequency (NeRF, Mildenhall et al. 2020, eq. 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graf.runtime.amp import at_least_float32, float32_region


def positional_encoding(x: Tensor, octaves: int, base_frequency: float, dtype: torch.dtype | None = None) -> Tensor:
    """[x, sin(2^k w x), cos(2^k w x)] for k < octaves, w = base_frequency (NeRF, eq. 4).

    (..., D) -> (..., D (1 + 2 octaves)), in a dtype or as computed.
    Computed in float32 (or x's own float64) outside autocast: at 2^9 pi, half precision has no correct digit left. Only
    every fifth octave calls sin and cos; the others follow from the double-angle formulas, which lose about 1.3 bits an
    octave. Whole periods are taken off before the product with w is rounded (the period in two parts, as Cody & Waite
    do), so the error stays below 1e-5 in each of 10 octaves.
    """
    period = 2 * math.pi / base_frequency
    mantissa, exponent = math.frexp(period)
    coarse = math.ldexp(round(256 * mantissa) / 256, exponent)  # 8 bits: exact when multiplied by up to 2^16 periods
    with float32_region(x.device.type):
        x = at_least_float32(x)
        dtype = x.dtype if dtype is None else dtype
        parts = [x.to(dtype)]
        for octave in range(octaves):
            if octave % 5 == 0:
                scaled = 2**octave * x
                periods = torch.round(scaled / period)
                angle = base_frequency * (scaled - periods * coarse - periods * (period - coarse))
                sin, cos = torch.sin(angle), torch.cos(angle)
            else:
                twice = 2 * sin
                sin, cos = twice * cos, 1 - twice * sin
            parts += [sin.to(dtype), cos.to(dtype)]
        return torch.cat(parts, dim=-1)


def encoding_size(octaves: int) -> int:
    """Channels of :func:`positional_encoding` of a 3-vector."""
    return 3 * (1 + 2 * octaves)
