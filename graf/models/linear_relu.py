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
_ACTIVATION = ("leaky_relu", [1e-30], "")
_NO_ACTIVATION: tuple[str, list[float], str] = ("none", [], "")
#: on a CPU the gradient of a weight is added up from so many blocks of rows, which takes threads an eighth less time
ROW_BLOCKS = 4
#: lays a weight out as that product reads it, which it would do in each call
_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


class PackedWeights:
    """Weights as oneDNN's product reads them, which saves up to an eighth of its time; each is packed at its first use.

    They hold for weights as they are then, as a rendering's codes do: later changes are not noticed. A copy is empty.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, torch.dtype, bool], tuple[Tensor, Tensor]] = {}

    def __reduce__(self) -> Any:
        return PackedWeights, ()

    def pack(self, weight: Tensor, dtype: torch.dtype, is_transposed: bool = False) -> Tensor:
        """A weight (out, in), or its transpose, in a dtype, for oneDNN's product alone."""
        key = id(weight), dtype, is_transposed
        if key not in self._found:
            own = weight.detach().to(dtype)
            packed: Tensor = _PACK(own.T.contiguous() if is_transposed else own)  # type: ignore[misc]
            self._found[key] = weight, packed  # the weight too, so that no other one gets its id
        return self._found[key][1]


def linear_relu(
    x: Tensor,
    weight: Tensor,
    shares: Tensor,
    again: tuple[Tensor, Tensor] | None = None,
    packed: PackedWeights | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """relu(x W^T + shares), (..., out), of x (..., in) and W = weight (out, in), in autocast's dtype.

    shares: as many dimensions as x, the last one out, the others those of x or 1: a bias, or what an image or a ray
    adds. again: (y, V), a second input (..., in') and weight (out, in'), whose y V^T is added. packed: keeps what can
    be used again in calls with the same weight. known: the values, computed before, which get a graph here. There is no
    second derivative.
    """
    y, second = (None, None) if again is None else again
    if torch.is_grad_enabled():
        output: Tensor = _LinearReLU.apply(x, weight, shares, y, second, packed, (known,))
        return output
    return _compute(x, weight, shares, y, second, packed) if known is None else known


def _compute(
    x: Tensor, weight: Tensor, shares: Tensor, y: Tensor | None, second: Tensor | None, packed: PackedWeights | None
) -> Tensor:
    dtype = product_dtype(x)
    x, shares = x.to(dtype), shares.to(dtype)
    # to ask an exported program would fix the number of its shares
    is_bias = not is_exporting() and shares.numel() == shares.shape[-1]
    bias = shares.flatten() if is_bias else None
    if _is_fused_for(x):
        own = weight.to(dtype) if packed is None else packed.pack(weight, dtype)
        is_whole = is_bias and y is None
        activation = _ACTIVATION if is_whole else _NO_ACTIVATION
        output: Tensor = _LINEAR_POINTWISE(x, own, bias, *activation)  # type: ignore[misc]
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


def _is_fused_for(x: Tensor) -> bool:
    """Whether oneDNN's product is there for factors like these."""
    return x.device.type == "cpu" and not is_exporting() and _is_fused(x.dtype)


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
        known: tuple[Tensor | None],  # a tuple, which autograd does not look into
    ) -> Tensor:
        output = _compute(x, weight, shares, y, second, packed) if known[0] is None else known[0]
        ctx.save_for_backward(output, x, weight, y, second)
        ctx.shape_of_shares, ctx.dtype_of_shares = shares.shape, shares.dtype
        ctx.transposed = None
        if packed is not None and ctx.needs_input_grad[0] and _is_fused_for(output):
            # now: in the backward pass this weight may be another object
            ctx.transposed = packed.pack(weight, output.dtype, is_transposed=True)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        output, x, weight, y, second = ctx.saved_tensors
        needs_x, needs_weight, needs_shares, needs_y, needs_second, *_ = ctx.needs_input_grad
        gradient = torch.ops.aten.threshold_backward(gradient, output, 0)
        of_x = _gradient_to_input(gradient, x, weight, ctx.transposed) if needs_x else None
        of_weight = _gradient_to_weight(gradient, x, weight) if needs_weight else None
        of_y = _gradient_to_input(gradient, y, second) if needs_y else None
        of_second = _gradient_to_weight(gradient, y, second) if needs_second else None
        of_shares = gradient.sum_to_size(ctx.shape_of_shares).to(ctx.dtype_of_shares) if needs_shares else None
        return of_x, of_weight, of_shares, of_y, of_second, None, None


def _gradient_to_input(gradient: Tensor, x: Tensor, weight: Tensor, transposed: Tensor | None = None) -> Tensor:
    """The gradient to x of x W^T, in x's dtype; transposed: W^T, packed."""
    if transposed is None:
        return (gradient @ weight.to(gradient.dtype)).to(x.dtype)
    found: Tensor = _LINEAR_POINTWISE(gradient, transposed, None, *_NO_ACTIVATION)  # type: ignore[misc]
    return found.to(x.dtype)


def _gradient_to_weight(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient to W of x W^T, in W's dtype."""
    rows, inputs = gradient.flatten(0, -2), x.to(gradient.dtype).flatten(0, -2)
    if gradient.device.type != "cpu" or len(rows) % ROW_BLOCKS:
        return (rows.T @ inputs).to(weight.dtype)
    blocks = torch.bmm(rows.unflatten(0, (ROW_BLOCKS, -1)).mT, inputs.unflatten(0, (ROW_BLOCKS, -1)))
    return blocks.sum(0, dtype=weight.dtype)
