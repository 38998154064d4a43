"""The small network behind a tri-plane's features, with weights of each image's own, as one operation of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graf.runtime.amp import product_dtype
from graf.runtime.torch_release import is_exporting


def decode(features: Tensor, weight: Tensor, bias: Tensor, head: Tensor, head_bias: Tensor) -> Tensor:
    """relu(f W^T + b) H^T + c (B, P, O), in autocast's dtype, of features f (B, P, C) at P points of each image.

    weight W (B, width, C), bias b (B, 1, width), head H (B, O, width), head_bias c (B, 1, O). There is no second
    derivative.
    """
    parts = (features, weight, bias, head, head_bias)
    if torch.is_grad_enabled() and not is_exporting():
        outputs: Tensor = _Decode.apply(*parts)
        return outputs
    return _compute(*parts)[0]


def _compute(*parts: Tensor) -> tuple[Tensor, ...]:
    """The outputs, and what their gradients are made of: features, weight, hidden layer and head in one dtype."""
    dtype = product_dtype(parts[0])
    features, weight, bias, head, head_bias = (part.to(dtype) for part in parts)
    hidden = torch.relu_(torch.bmm(features, weight.mT).add_(bias))  # baddbmm would write the bias everywhere before
    return torch.baddbmm(head_bias, hidden, head.mT), features, weight, hidden, head


class _Decode(torch.autograd.Function):
    """autograd's own layers would turn the hidden one over for the gradient of the head,
    which is a quarter of their backward pass.
    """

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        outputs, *kept = _compute(*parts)
        ctx.save_for_backward(*kept)
        ctx.dtypes = [part.dtype for part in parts]
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        features, weight, hidden, head = ctx.saved_tensors
        ones = gradient.new_ones(len(gradient), 1, gradient.shape[1])  # sums over points are products with them
        of_head, of_head_bias = gradient.mT @ hidden, ones @ gradient
        inner = torch.ops.aten.threshold_backward(gradient @ head, hidden, 0)
        of_weight, of_bias = inner.mT @ features, ones @ inner
        found = (inner @ weight, of_weight, of_bias, of_head, of_head_bias)
        return tuple(part.to(dtype) for part, dtype in zip(found, ctx.dtypes, strict=True))
