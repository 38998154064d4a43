"""A linear layer with its ReLU as one operation of autograd, which passes over activations as seldom as it can."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graf.runtime.amp import product_dtype
from graf.runtime.torch_release import is_exporting, torch_release

#: oneDNN's product that adds the bias and takes the ReLU before it writes; private to torch, whose compiler calls it
_LINEAR_POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
#: what it is asked for instead of its ReLU, which would make zeros out of NaN and hide that training has diverged;
#: -inf stays too, which a ReLU makes 0
_ACTIVATION = ("leaky_relu", [1e-30])
#: lays a weight out as that product reads it, which it would do in each call
_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


class PackedWeights:
    """Weights as oneDNN's product reads them, which saves up to an eighth of its time; each is packed at its first use.

    They hold for weights as they are then, as a rendering's codes do: later changes are not noticed. A copy is empty.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __reduce__(self) -> Any:
        return PackedWeights, ()

    def pack(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """A weight (out, in) in a dtype, for oneDNN's product alone."""
        key = id(weight), dtype
        if key not in self._found:
            packed: Tensor = _PACK(weight.detach().to(dtype))  # type: ignore[misc]
            self._found[key] = weight, packed  # the weight too, so that no other one gets its id
        return self._found[key][1]


def linear_relu(
    x: Tensor,
    weight: Tensor,
    shares: Tensor,
    again: tuple[Tensor, Tensor] | None = None,
    packed: PackedWeights | None = None,
) -> Tensor:
    """relu(x W^T + shares), (..., out), of x (..., in) and W = weight (out, in), in autocast's dtype.

    shares: as many dimensions as x, the last one out, the others those of x or 1: a bias, or what an image or a ray
    adds. again: (y, V), a second input (..., in') and weight (out, in'), whose y V^T is added. packed: keeps what can
    be used again in calls with the same weight. There is no second derivative.
    """
    y, second = (None, None) if again is None else again
    if torch.is_grad_enabled():
        output: Tensor = _LinearReLU.apply(x, weight, shares, y, second, packed)
        return output
    return _compute(x, weight, shares, y, second, packed)


def _compute(
    x: Tensor, weight: Tensor, shares: Tensor, y: Tensor | None, second: Tensor | None, packed: PackedWeights | None
) -> Tensor:
    dtype = product_dtype(x)
    x, shares = x.to(dtype), shares.to(dtype)
    is_exported = is_exporting()
    # to ask an exported program would fix the number of its shares
    is_bias = not is_exported and shares.numel() == shares.shape[-1]
    bias = shares.flatten() if is_bias else None
    if x.device.type == "cpu" and not is_exported and _is_fused(dtype):
        own = weight.to(dtype) if packed is None else packed.pack(weight, dtype)
        is_whole = is_bias and y is None
        activation = _ACTIVATION if is_whole else ("none", [])
        output: Tensor = _LINEAR_POINTWISE(x, own, bias, *activation, "")  # type: ignore[misc]
        if is_whole:
            return output
    else:
        output = functional.linear(x, weight.to(dtype), bias)
    if not is_bias:
        output.add_(shares)
    if y is not None and second is not None:
        rows = output.flatten(0, -2)
        torch.addmm(rows, y.to(dtype).flatten(0, -2), second.to(dtype).T, out=rows)
    return torch.relu_(output)


@cache
def _is_fused(dtype: torch.dtype) -> bool:
    """Whether this processor and torch have oneDNN's product for a dtype.

    It is tried on torch 2.14 and newer; with torch 2.1.2 a long run of it has corrupted memory.
    """
    if torch_release() < (2, 14) or None in (_LINEAR_POINTWISE, _PACK) or not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


class _LinearReLU(torch.autograd.Function):
    """Keeps inputs and output. autograd's own layers, their ReLU in place, clear and copy each gradient besides."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        shares: Tensor,
        y: Tensor | None,
        second: Tensor | None,
        packed: PackedWeights | None,
    ) -> Tensor:
        output = _compute(x, weight, shares, y, second, packed)
        ctx.save_for_backward(output, x, weight, y, second)
        ctx.shape_of_shares, ctx.dtype_of_shares = shares.shape, shares.dtype
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        output, x, weight, y, second = ctx.saved_tensors
        needs_x, needs_weight, needs_shares, needs_y, needs_second, _ = ctx.needs_input_grad
        gradient = torch.ops.aten.threshold_backward(gradient, output, 0)
        of_x, of_weight = _backward_of_product(gradient, x, weight, needs_x, needs_weight)
        of_y, of_second = None, None
        if y is not None:
            of_y, of_second = _backward_of_product(gradient, y, second, needs_y, needs_second)
        of_shares = gradient.sum_to_size(ctx.shape_of_shares).to(ctx.dtype_of_shares) if needs_shares else None
        return of_x, of_weight, of_shares, of_y, of_second, None


def _backward_of_product(
    gradient: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients to x and to weight of x W^T, each in its own dtype, where they are needed."""
    of_x = (gradient @ weight.to(gradient.dtype)).to(x.dtype) if needs_x else None
    of_weight = None
    if needs_weight:
        rows = gradient.flatten(0, -2)
        of_weight = (rows.T @ x.to(gradient.dtype).flatten(0, -2)).to(weight.dtype)
    return of_x, of_weight
