"""The patch discriminator: is this patch of this scale and place a photograph of that class from that side?

A convolutional network halves the patch down to 4 x 4 and on to one feature vector h. The decision is
psi(h) + <e(condition), h> / sqrt(dim h): conditioning by projection (Miyato & Koyama, ICLR 2018). The condition is the
class and, where poses are known, azimuth and height as Fourier features, and always the patch's scale and centre
(GRAF, Schwarz et al. 2020, uses scale and place only through the sampling). It may enter as constant input channels
too. An auxiliary head can classify the label (see MCE_Loss).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from graf.base.tensors import TensorBatch
from graf.geometry.rays import Patches
from graf.geometry.views import Views
from graf.runtime.amp import at_least_float32, float32_region

PATCH_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class DiscriminatorShape:
    """Sizes and options of :class:`PatchDiscriminator`.

    size: patch side, a power of two from 16 to 256; ndf: channels after the first layer, doubled up to max_channels.
    norm: "none" | "instance"; spectral: spectral normalisation of every layer.
    condition_pose: condition on azimuth and height (poses known); azimuth_harmonics: Fourier features of the azimuth.
    condition_maps: constant input channels made from the condition, so that every layer can look for what it expects;
    they would tell an auxiliary class head the answer. label_groups: sizes of the groups of that head, () for none.
    """

    size: int = 32
    ndf: int = 64
    max_channels: int = 512
    norm: str = "instance"
    spectral: bool = False
    num_classes: int = 1
    condition_pose: bool = True
    azimuth_harmonics: int = 6
    condition_maps: int = 0
    label_groups: Sequence[int] = ()

    @property
    def num_features(self) -> int:
        """How many numbers a condition has besides the class."""
        return 3 + (2 * self.azimuth_harmonics + 4 if self.condition_pose else 0)

    def describe(self, views: Views, patches: Patches) -> PatchCondition:
        """What the discriminator is told of patches of views."""
        parts = [torch.log2(patches.scale)[:, None], patches.centre]
        if self.condition_pose:
            harmonics = torch.arange(1, self.azimuth_harmonics + 1, device=views.u.device)
            azimuth = 2 * math.pi * views.u[:, None] * harmonics
            polar = math.pi * views.v[:, None] * torch.arange(1, 3, device=views.v.device)
            parts += [azimuth.sin(), azimuth.cos(), polar.sin(), polar.cos()]
        return PatchCondition(views.class_idx, torch.cat(parts, dim=-1))


@dataclass(frozen=True)
class PatchCondition(TensorBatch):
    """What the discriminator is told of patches: class_idx (B,) int64, and features (B, num_features) of azimuth and
    height, where poses are known, and of the patches' scale and centre.
    """

    class_idx: Tensor
    features: Tensor


class SpectralNorm(nn.Module):
    """Divides a weight by its largest singular value, estimated by power iteration (Miyato et al., ICLR 2018).

    The iteration advances only in :meth:`advance`, which the training loop calls once per update, never in a forward
    pass: R1, the generator's step, recomputation and micro-batches all see one and the same weight.
    """

    left: Tensor
    right: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)
        self.register_buffer("left", functional.normalize(torch.ones(matrix.shape[0]), dim=0))
        self.register_buffer("right", functional.normalize(torch.ones(matrix.shape[1]), dim=0))
        for _ in range(15):
            self.advance(weight)

    @torch.no_grad()
    def advance(self, weight: Tensor) -> None:
        """One power iteration on the unnormalised `weight`."""
        matrix = weight.flatten(1).to(self.left.dtype)
        self.right.copy_(functional.normalize(matrix.t() @ self.left, dim=0))
        self.left.copy_(functional.normalize(matrix @ self.right, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        with float32_region(weight.device.type):
            # cloned: the buffers move at the next `advance`, possibly before this graph is back-propagated
            sigma = torch.dot(self.left.clone(), weight.flatten(1) @ self.right.clone())
            return weight / sigma


class Collapse(nn.Conv2d):
    """A convolution as large as its input (B, C, size, size): one number a channel, (B, out).

    Computed as the matrix product that it is, which takes half the time of a convolution of a few such images.
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.flatten(1), self.weight.flatten(1), self.bias)


class ConvolutionWithMaps(nn.Conv2d):
    """A convolution (4 x 4, stride 2) of patches (B, 3, size, size) and of constant maps (B, maps) beside them.

    What becomes of a constant map is the same everywhere but at the rim, where some taps lie outside: nine numbers, of
    the corners, the edges and the inside. To convolve 16 maps would take five times as long as the patches.
    """

    taps: Tensor
    zones: Tensor

    def __init__(self, num_maps: int, out_channels: int, size: int) -> None:
        super().__init__(3 + num_maps, out_channels, 4, stride=2, padding=1)
        inside = torch.tensor([[0.0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])  # which taps are, in each of three zones
        self.register_buffer("taps", torch.kron(inside, inside).T.contiguous(), persistent=False)
        zone = torch.ones(size // 2, dtype=torch.long)
        zone[0], zone[-1] = 0, 2  # of rows as of columns: the first, those between, the last
        zones = functional.one_hot(3 * zone[:, None] + zone, 9).flatten(0, 1)
        self.register_buffer("zones", zones.T.float().contiguous(), persistent=False)

    def forward(self, patches: Tensor, maps: Tensor) -> Tensor:  # type: ignore[override]
        of_patches, of_maps = self.weight.split([3, maps.shape[1]], dim=1)
        found = functional.conv2d(patches, of_patches, self.bias, self.stride, self.padding)
        with float32_region(patches.device.type):
            sums = (of_maps.transpose(0, 1).reshape(-1, 16) @ self.taps).view(maps.shape[1], -1)
            shares = maps @ sums  # (B, out * 9)
        return torch.addmm(found.flatten(0, 1).flatten(1), shares.view(-1, 9), self.zones).view(found.shape)


class PatchDiscriminator(nn.Module):
    """Logits of patches, given the condition."""

    def __init__(self, shape: DiscriminatorShape) -> None:
        super().__init__()
        if shape.size not in PATCH_SIZES:
            raise ValueError(f"patch size {shape.size}: the discriminator takes one of {PATCH_SIZES}")
        if shape.condition_maps and shape.label_groups:
            raise ValueError("condition_maps would tell the label head the label: use one or the other")
        self.shape = shape
        stages = int(math.log2(shape.size)) - 2
        channels = [min(shape.ndf * 2**stage, shape.max_channels) for stage in range(stages)]
        layers: list[nn.Module] = []
        for stage, (inside, outside) in enumerate(zip([3, *channels[:-1]], channels, strict=True)):
            if stage == 0 and shape.condition_maps:
                layers.append(ConvolutionWithMaps(shape.condition_maps, outside, shape.size))
            else:
                layers.append(nn.Conv2d(inside, outside, 4, stride=2, padding=1))
            if shape.norm == "instance" and stage > 0:
                layers.append(nn.InstanceNorm2d(outside))
            layers.append(nn.LeakyReLU(0.2))
        features = channels[-1]
        layers += [Collapse(features, features, 4), nn.LeakyReLU(0.2)]
        self.trunk = nn.Sequential(*layers)
        self.decision = nn.Linear(features, 1)
        self.class_embedding = nn.Embedding(shape.num_classes, 32)
        described = 32 + shape.num_features
        self.condition = nn.Sequential(nn.Linear(described, 128), nn.LeakyReLU(0.2), nn.Linear(128, features))
        self.maps = nn.Linear(described, shape.condition_maps) if shape.condition_maps else None
        self.label_head = nn.Linear(features, sum(shape.label_groups)) if shape.label_groups else None
        if shape.spectral:
            for module in self.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight))

    def forward(self, patches: Tensor, condition: PatchCondition) -> tuple[Tensor, Tensor | None]:
        """Logits (B,), float32, and those of the label head (B, sum of groups), or None without one.

        patches: (B, 3, size, size) in [-1, 1].
        """
        with float32_region(patches.device.type):
            described = torch.cat([self.class_embedding(condition.class_idx), condition.features], dim=1)
            maps = () if self.maps is None else (self.maps(described),)
        first, *others = self.trunk
        found = first(patches, *maps)
        for layer in others:
            found = layer(found)
        features = at_least_float32(found)
        with float32_region(patches.device.type):
            embedding = self.condition(described)
            logits = self.decision(features)[:, 0] + (embedding * features).sum(-1) / math.sqrt(features.shape[1])
            return logits, None if self.label_head is None else self.label_head(features)

    def advance_spectral_norm(self) -> None:
        """One power iteration of every spectral norm: once per update of the discriminator, before its first pass."""
        for module in self.modules() if self.shape.spectral else ():
            if isinstance(module, parametrize.ParametrizationList):
                for parametrization in module:
                    if isinstance(parametrization, SpectralNorm):
                        parametrization.advance(module.original)
