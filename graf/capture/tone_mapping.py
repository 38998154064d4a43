"""HDR code values to sRGB: what a phone's HLG or PQ video looks like on an ordinary screen."""

from __future__ import annotations

from functools import cache

import numpy as np

#: HDR transfer functions as ffmpeg names them
HLG, PQ = "arib-std-b67", "smpte2084"
BT2020_TO_BT709 = np.array(  # ITU-R BT.2087
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
REFERENCE_WHITE = 203.0  # cd/m2 of paper white, ITU-R BT.2408
PEAK = 1000.0  # cd/m2 that become pure white
KNEE = 0.6  # of paper white: what is darker keeps its brightness


def tone_map(image: np.ndarray, transfer: str) -> np.ndarray:
    """HDR code values uint16 (H, W, 3), BT.2020 with a transfer of HLG or PQ, as sRGB uint8.

    To light (ITU-R BT.2100), which is scaled by what happens to its luminance, and to BT.709's primaries (BT.2087).
    Paper white (203 cd/m2, BT.2408) counts as 1. Up to KNEE luminance stays; what is brighter is bent by the extended
    curve of Reinhard et al. (2002, eq. 4), so that PEAK becomes pure white and paper white 0.8.
    """
    # 16 bits are more than such a curve needs: a table of 4096 values costs a tenth of the powers.
    light = _light_table(transfer)[image >> 4]
    luminance = np.maximum(light @ np.array([0.2627, 0.6780, 0.0593], np.float32), 1e-6)
    if transfer == HLG:  # scene light to a display of 1000 cd/m2, BT.2100's system gamma
        light = light * (PEAK / REFERENCE_WHITE * luminance**0.2)[..., None]
        luminance = PEAK / REFERENCE_WHITE * luminance**1.2
    white = (PEAK / REFERENCE_WHITE - KNEE) / (1 - KNEE)
    above = np.maximum(luminance - KNEE, 0) / (1 - KNEE)
    mapped = np.minimum(luminance, KNEE) + (1 - KNEE) * above * (1 + above / white**2) / (1 + above)
    linear = np.clip((light * (mapped / luminance)[..., None]) @ BT2020_TO_BT709.T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray((255 * encoded + 0.5).astype(np.uint8))


@cache
def _light_table(transfer: str) -> np.ndarray:
    """Light (4096,) of code values 0..1: for HLG of the scene in 0..1, for PQ of the display, paper white is 1."""
    code = np.arange(4096, dtype=np.float64) / 4095
    if transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    else:
        power = code ** (1 / 78.84375)
        light = (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
        light *= 10000 / REFERENCE_WHITE
    return light.astype(np.float32)
