"""Losses as pure functions of logits, one value per image, so that any split of a batch adds up to the same sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from graf.runtime.amp import Scaler, scale_of


def discriminator_real_loss(gan_type: str, logits: Tensor) -> Tensor:
    """D's loss on real images (B,): non-saturating, hinge or Wasserstein."""
    if gan_type == "standard":
        return functional.softplus(-logits)
    return torch.relu(1 - logits) if gan_type == "hinge" else -logits


def discriminator_fake_loss(gan_type: str, logits: Tensor) -> Tensor:
    """D's loss on generated images (B,)."""
    if gan_type == "standard":
        return functional.softplus(logits)
    return torch.relu(1 + logits) if gan_type == "hinge" else logits


def generator_loss(gan_type: str, logits: Tensor) -> Tensor:
    """G's loss (B,): -log sigmoid(D(fake)), the non-saturating one, or -D(fake) for hinge and Wasserstein."""
    return functional.softplus(-logits) if gan_type == "standard" else -logits


def input_gradient_norms(logits: Tensor, images: Tensor, scaler: Scaler) -> Tensor:
    """||gradient of D at each image||^2 (B,), itself differentiable.

    The inner gradient is scaled as well, else it could underflow in half precision, and unscaled before it is squared.
    """
    (gradient,) = torch.autograd.grad(scaler.scale(logits.sum()), images, create_graph=True)
    if scaler.is_enabled():
        gradient = gradient / scale_of(scaler, gradient.device)
    return gradient.square().flatten(1).sum(1)


def r1_penalty(logits: Tensor, real: Tensor, scaler: Scaler) -> Tensor:
    """R1 (Mescheder et al., ICML 2018) without the 1/2: ||grad_x D(x_real)||^2 per image (B,)."""
    return input_gradient_norms(logits, real, scaler)


def gradient_penalty(logits: Tensor, mixed: Tensor, scaler: Scaler) -> Tensor:
    """WGAN-GP (Gulrajani et al., NeurIPS 2017): (||grad_x D(x)|| - 1)^2 per image (B,), x between real and fake."""
    return (torch.sqrt(input_gradient_norms(logits, mixed, scaler) + 1e-12) - 1).square()


def squared_distance(images: Tensor, others: Tensor) -> Tensor:
    """The mean squared difference of images (B, C, H, W): (B,)."""
    return functional.mse_loss(images, others, reduction="none").mean((1, 2, 3))


def add_up(terms: Mapping[str, tuple[float, Tensor]], batch_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of terms, and each of them without its weight.

    terms: weight and values of the images (B,) by name, which are added up and divided by the size of the whole batch.
    """
    sums = torch.stack([values for _, values in terms.values()]).sum(1) / batch_size  # one reduction for all
    statistics = dict(zip(terms, sums.unbind(), strict=True))
    loss = torch.zeros(())
    for name, (weight, _) in terms.items():
        loss = torch.add(loss, statistics[name], alpha=weight)
    return loss, statistics


class MCE_Loss(nn.Module):
    """Multi-task class loss: the sum over label groups of the cross-entropy, one value per image (B,).

    groups: the number of values of each group; logits (B, sum(groups)); targets (B, len(groups)), int64.
    """

    def __init__(self, groups: Sequence[int]) -> None:
        super().__init__()
        self.groups = tuple(groups)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        parts = torch.split(logits, list(self.groups), dim=1)
        losses = [functional.cross_entropy(part, targets[:, i], reduction="none") for i, part in enumerate(parts)]
        return torch.stack(losses).sum(0)
