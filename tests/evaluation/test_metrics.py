"""PSNR and SSIM equal their definitions."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from graf.evaluation.metrics import psnr, ssim


def test_psnr_is_ten_log_ten_of_peak_over_error() -> None:
    a = torch.zeros(3, 3, 4, 4)
    b = a + torch.tensor([2.0, 0.2, 0.0]).view(3, 1, 1, 1)
    assert psnr(a, b).tolist() == pytest.approx([0.0, 20.0, math.inf])


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13, one window at a time with its weighted moments, on (C, H, W) in [-1, 1]."""
    offsets = np.arange(11) - 5.0
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values = []
    for channel in range(a.shape[0]):
        for y in range(a.shape[1] - 10):
            for x in range(a.shape[2] - 10):
                p, q = a[channel, y : y + 11, x : x + 11], b[channel, y : y + 11, x : x + 11]
                mean_p, mean_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
                cov = (window * (p - mean_p) * (q - mean_q)).sum()
                top = (2 * mean_p * mean_q + c1) * (2 * cov + c2)
                values.append(top / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_ssim_equals_a_slow_direct_implementation(dtype, tolerance):
    a = torch.rand(3, 2, 14, 16, dtype=torch.float64) * 2 - 1
    b = (a + torch.tensor([0.05, 0.3, 1.0], dtype=torch.float64).view(3, 1, 1, 1) * torch.randn_like(a)).clamp(-1, 1)
    found = ssim(a.to(dtype), b.to(dtype)).double()
    expected = torch.tensor([slow_ssim(p.numpy(), q.numpy()) for p, q in zip(a, b, strict=True)], dtype=torch.float64)
    assert_close(found, expected, atol=tolerance, rtol=0)
    assert found[0] > found[1] > found[2]


def test_ssim_of_equal_images_is_one_and_small_ones_are_refused():
    image = torch.rand(2, 3, 11, 11) * 2 - 1
    assert_close(ssim(image, image), torch.ones(2))
    with pytest.raises(ValueError, match="SSIM of"):
        ssim(image[..., :10], image[..., :10])
