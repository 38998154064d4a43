"""Image metrics of tensors against tensors, in torch alone; FID and KID stand in fidelity.py."""

import torch
from torch import Tensor
from torch.nn import functional

SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (N, C, H, W) in [-1, 1] twice -> (N,); infinite where equal.

    10 log10(2^2 / MSE): the peak is the width of the range.
    """
    error = (a.float() - b.float()).square().mean(dim=(1, 2, 3))
    return 10.0 * torch.log10(4.0 / error)


@torch.no_grad()
def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each image, (N, C, H, W) in [-1, 1] twice -> (N,), 1 where equal.

    Wang et al., IEEE TIP 2004, eq. 13: Gaussian window of 11 x 11 with sigma 1.5, K = (0.01, 0.03), range 2, mean over
    the windows that lie inside the image and over the channels. Raises ValueError for smaller images.
    """
    if a.shape != b.shape or a.dim() != 4 or min(a.shape[2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM of {tuple(a.shape)} and {tuple(b.shape)}: expected two equal (N, C, H, W) of {SSIM_WINDOW} or more"
        )
    mean_a, mean_b = _smooth(a), _smooth(b)
    variance_a = _smooth(a.square()) - mean_a.square()
    variance_b = _smooth(b.square()) - mean_b.square()
    covariance = _smooth(a * b) - mean_a * mean_b
    c1, c2 = (2 * SSIM_K1) ** 2, (2 * SSIM_K2) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _smooth(images: Tensor) -> Tensor:
    """The Gaussian window's mean around every pixel that has a whole window."""
    place = torch.arange(SSIM_WINDOW, device=images.device, dtype=images.dtype) - SSIM_WINDOW // 2
    taps = torch.exp(-place.square() / (2 * SSIM_SIGMA**2))
    taps = (taps / taps.sum()).expand(images.shape[1], 1, 1, SSIM_WINDOW)
    rows = functional.conv2d(images, taps, groups=images.shape[1])
    return functional.conv2d(rows, taps.transpose(2, 3), groups=images.shape[1])
