"""CCSR, consistency-controlled super-resolution: a render in, the same view s times as fine out.

One learnable latent image per view steers how details are filled in (Super-NeRF, Han et al. 2023, arXiv 2304.13518),
and a projection makes the result agree exactly with the render that it came from (consistency-enforcing module, CEM;
Bahat & Michaeli, CVPR 2020): down(output) = render. Nothing may clamp, squash or resize the output after the
projection, or the equality is lost.

The module is fully convolutional and works on whole images and on patches of them alike; the latent is cropped on the
patch's own continuous grid (graf.geometry.rays), so a latent pixel belongs to a place in its view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor, nn
from torch.nn import functional

from graf.base.tensors import TensorBatch
from graf.geometry.rays import Patches, crop_images
from graf.models.rrdb import RRDBTrunk
from graf.runtime.amp import float32_region
from graf.runtime.device import for_convolution


@dataclass(frozen=True)
class LatentMixture(TensorBatch):
    """How much each view's latent counts, (B, num_views), and the views that count for any image of the batch."""

    weights: Tensor
    used: tuple[int, ...]

    @classmethod
    def cat(cls, parts: Sequence[LatentMixture]) -> LatentMixture:
        """All rows of several mixtures, which use what any of them does."""
        used = tuple(sorted({view for part in parts for view in part.used}))
        return cls(torch.cat([part.weights for part in parts]), used)


class ViewLatents(nn.Module):
    """Learnable latent images, one per view on a ring around the object: `num_views` times (channels, size, size).

    The angle of a label blends the two neighbouring views ("blend") or takes the nearest ("nearest"). Every view is a
    Parameter of its own, and only those that a batch uses enter its graph: the others get no gradient, not even a zero
    one, so that no optimiser's momentum moves them. One view is a latent shared by all angles.
    """

    def __init__(self, num_views: int, channels: int, size: int, mode: str = "blend") -> None:
        super().__init__()
        if mode not in ("blend", "nearest"):
            raise ValueError(f"mode={mode!r}: expected 'blend' or 'nearest'")
        self.mode = mode
        self.views = nn.ParameterList(nn.Parameter(torch.zeros(channels, size, size)) for _ in range(num_views))

    def mix(self, angles: Tensor) -> LatentMixture:
        """Which views the label angles (B,) use: computed on the CPU, once for all that a step does with them."""
        weights = self.mixing_weights(angles.cpu())
        return LatentMixture(weights.to(angles.device), tuple(weights.sum(0).nonzero()[:, 0].tolist()))

    def mixing_weights(self, angles: Tensor) -> Tensor:
        """How much each view counts for label angles (B,) in [0, 360) degrees: (B, num_views), rows sum to 1."""
        if angles.numel() and (bool((angles < 0).any()) or bool((angles >= 360).any())):
            bad = angles[(angles < 0) | (angles >= 360)][0]
            raise ValueError(f"label angle {float(bad):g}: views are chosen by angles in [0, 360) degrees")
        count = len(self.views)
        position = angles.to(torch.float32) * count / 360
        if self.mode == "nearest":
            position = torch.floor(position + 0.5)
        low = torch.floor(position)
        share = position - low
        weights = torch.zeros(len(angles), count, device=angles.device)
        rows = torch.arange(len(angles), device=angles.device)
        weights[rows, low.long() % count] += 1 - share
        weights[rows, (low.long() + 1) % count] += share
        return weights

    def forward(self, angles: Tensor | LatentMixture) -> Tensor:
        """Latent images (B, channels, size, size) of label angles (B,), or of what :meth:`mix` made of them."""
        mixture = angles if isinstance(angles, LatentMixture) else self.mix(angles)
        weights = mixture.weights
        # A matrix product would be as short, and rounded to 10 bits where TF32 is on.
        parts = (weights[:, view, None, None, None].to(self.views[view]) * self.views[view] for view in mixture.used)
        return reduce(torch.add, parts)


class ConvTrunk(nn.Module):
    """Residual convolutions and a PixelShuffle (Shi et al., CVPR 2016) on top of bicubic upsampling.

    (B, 3, h, w) -> (B, 3, s h, s w).
    """

    def __init__(self, scale: int, features: int = 32, blocks: int = 4) -> None:
        super().__init__()
        self.scale = scale
        # Zeros around a white photograph would be an edge, whose ringing becomes a frame.
        convolution = partial(nn.Conv2d, kernel_size=3, padding=1, padding_mode="replicate")
        self.first = convolution(3, features)
        self.blocks = nn.ModuleList(
            nn.Sequential(convolution(features, features), nn.LeakyReLU(0.2), convolution(features, features))
            for _ in range(blocks)
        )
        self.last = convolution(features, 3 * scale**2)
        with torch.no_grad():
            self.last.weight.mul_(0.1)  # begin close to bicubic, but not so close that nothing behind it learns

    @property
    def receptive_radius(self) -> int:
        """How many low-resolution pixels away an input pixel can still matter."""
        return 2 + 2 * len(self.blocks)

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.leaky_relu(self.first(images), 0.2)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        details = functional.pixel_shuffle(self.last(hidden), self.scale)
        return upsample(images, self.scale) + details.to(images.dtype)


class UnitRange(nn.Module):
    """A trunk that is made for images in [0, 1], as ESRGAN's is, on images in [-1, 1]."""

    def __init__(self, trunk: RRDBTrunk) -> None:
        super().__init__()
        self.trunk = trunk
        self.scale, self.receptive_radius = trunk.scale, trunk.receptive_radius

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.trunk((images + 1) / 2)
        return 2 * found.to(images.dtype) - 1


def upsample(images: Tensor, scale: int) -> Tensor:
    """Bicubic upsampling on pixel areas, the baseline that super-resolution has to beat."""
    return functional.interpolate(images, scale_factor=scale, mode="bicubic", align_corners=False)


class BoxProjection(nn.Module):
    """CEM for H = s x s mean, whose H^T (H H^T)^-1 is nearest upsampling: x + up(y - down(x)) is the nearest image
    with down = y.
    """

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def down(self, images: Tensor) -> Tensor:
        """H: (B, C, s h, s w) -> (B, C, h, w)."""
        return functional.avg_pool2d(images, self.scale)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """The image nearest to `images` whose `down` equals `target`."""
        return images + functional.interpolate(target - self.down(images), scale_factor=self.scale, mode="nearest")


class KernelProjection(nn.Module):
    """CEM for H = blur with a separable kernel, then every s-th pixel; edges repeat (replicate padding).

    H acts on rows and columns by one matrix each, D of (n / s, n), so H^T (H H^T)^-1 is the same Kronecker product of
    P = D^T (D D^T)^-1. P is computed once per size in float64; two small matrix products then project exactly, border
    included, where the convolutional approximation of CEM is exact only far from it.

    taps: the kernel's 1D weights, which sum to 1; their number has the parity of the scale, so that the grids line up.
    """

    def __init__(self, scale: int, taps: Sequence[float]) -> None:
        super().__init__()
        if (len(taps) - scale) % 2:
            raise ValueError(f"{len(taps)} taps with scale {scale}: an even scale needs an even number of taps")
        if abs(sum(taps) - 1) > 1e-6:
            raise ValueError(f"the taps sum to {sum(taps)}: a kernel that keeps brightness sums to 1")
        self.scale = scale
        self.taps = tuple(taps)
        self._matrices: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def matrices(self, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(D, P) for rows of `size` pixels: (size / s, size) and (size, size / s), kept on a device.

        In float64 where the device has it: CUDA may round float32 products to ten bits (TF32).
        """
        if (size, device) not in self._matrices:
            rows = torch.arange(size // self.scale)[:, None]
            first = self.scale * rows + (self.scale - len(self.taps)) // 2
            columns = (first + torch.arange(len(self.taps))).clamp(0, size - 1)
            taps = torch.tensor(self.taps, dtype=torch.float64).expand(len(rows), -1)
            down = torch.zeros(size // self.scale, size, dtype=torch.float64).scatter_add_(1, columns, taps)
            exact = torch.float64 if device.type != "mps" else torch.float32
            self._matrices[size, device] = down.to(device, exact), torch.linalg.pinv(down).to(device, exact)
        return self._matrices[size, device]

    def down(self, images: Tensor) -> Tensor:
        """H: (B, C, s h, s w) -> (B, C, h, w)."""
        return self._multiply(0, images)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """The image nearest to `images` whose `down` equals `target`."""
        return images + self._multiply(1, target - self.down(images), self.scale)

    def _multiply(self, which: int, images: Tensor, factor: int = 1) -> Tensor:
        """D or P on both axes of images, whose sides are `factor` times smaller than the fine ones."""
        vertical, horizontal = (self.matrices(size * factor, images.device)[which] for size in images.shape[-2:])
        return (vertical @ images.to(vertical.dtype) @ horizontal.t()).to(images.dtype)


@dataclass(frozen=True)
class SuperResolved:
    """`image` (B, 3, s h, s w) agrees exactly with the render; `unprojected`: the output before the projection."""

    image: Tensor
    unprojected: Tensor


class CCSR(nn.Module):
    """Trunk, view latents and projection. Images in [-1, 1], though nothing clamps the output to that range."""

    def __init__(self, trunk: nn.Module, latents: ViewLatents, projection: BoxProjection | KernelProjection) -> None:
        super().__init__()
        self.trunk, self.latents, self.projection = trunk, latents, projection
        #: low-resolution rows that the trunk works on at once, besides a border; None: the whole image
        self.rows: int | None = None

    @property
    def scale(self) -> int:
        """s: how many times finer the output is."""
        return self.projection.scale

    def down(self, images: Tensor) -> Tensor:
        """The reduction H that makes low-resolution photographs, and that the output satisfies."""
        with float32_region(images.device.type):
            return self.projection.down(images)

    def forward(self, render: Tensor, angles: Tensor | LatentMixture, patches: Patches) -> SuperResolved:
        """Super-resolve patches (or whole images: Patches.whole) of renders.

        render: (B, 3, h, h); angles: (B,), the labels' angles in degrees, or the mixture of latents that they stand for
        (:meth:`ViewLatents.mix`); patches: where the renders lie in their views. The trunk runs under the caller's
        autocast; latent addition and projection run in float32.
        """
        device_type = render.device.type
        with float32_region(device_type):
            render = render if render.dtype == torch.float64 else render.float()
            latent = crop_images(self.latents(angles), patches, render.shape[-1])
            steered = render + latent.to(render.dtype)
        unprojected = self._run_trunk(for_convolution(steered, steered.dtype))
        with float32_region(device_type):
            unprojected = unprojected if unprojected.dtype == torch.float64 else unprojected.float()
            return SuperResolved(self.projection(unprojected, render), unprojected)

    def halve_rows(self, height: int) -> str | None:
        """Let the trunk see half as many rows of images of this height at once; says what changed, None at one row."""
        before = min(self.rows or height, height)
        if before <= 1:
            return None
        self.rows = before // 2
        return f"rows super-resolved at once {before} -> {self.rows}"

    def _run_trunk(self, images: Tensor) -> Tensor:
        """The trunk's output; strip by strip it is the same, since every strip brings along what it can depend on."""
        height, scale = images.shape[-2], self.scale
        if self.rows is None or self.rows >= height:
            output: Tensor = self.trunk(images)
            return output
        border, strips = int(self.trunk.receptive_radius), []  # type: ignore[arg-type]
        for top in range(0, height, self.rows):
            bottom = min(top + self.rows, height)
            first = max(0, top - border)
            strip = self.trunk(images[..., first : bottom + border, :])
            strips.append(strip[..., scale * (top - first) : scale * (bottom - first), :])
        return torch.cat(strips, dim=-2)
