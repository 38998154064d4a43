"""Evaluating something chunk by chunk without keeping every chunk's activations for the backward pass.

* "dense" keeps them all: nothing is computed twice, and memory grows with the number of chunks.
* "checkpoint" keeps each chunk's inputs and computes its activations again when its gradient is due
  (Chen et al. 2016, arXiv 1604.06174).
* "deferred" runs all chunks without a graph, and each again with one when the gradient of the whole output is known
  (deferred back-propagation, ARF, Zhang et al., ECCV 2022): not even the chunks' graphs coexist with what follows; and
  what is known of a chunk by then may make its second run shorter, as long as the gradients are the same.

All three give the same gradients, provided that the function draws no random numbers of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from graf.runtime.amp import capture_autocast

STRATEGIES = ("dense", "checkpoint", "deferred")

#: (number of the chunk, tensors shared by all chunks) -> outputs (rows, rays of the chunk, ...)
ChunkFunction = Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...]]
#: executes one chunk: (function, number of the chunk, tensors shared by all chunks, parameters) -> its outputs
ChunkRunner = Callable[[ChunkFunction, int, tuple[Tensor, ...], Sequence[Tensor]], tuple[Tensor, ...]]


def call_chunk(
    function: ChunkFunction, number: int, shared: tuple[Tensor, ...], parameters: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The runner that computes every chunk."""
    return function(number, shared)


def evaluate_chunks(
    function: ChunkFunction,
    num_chunks: int,
    shared: tuple[Tensor, ...],
    parameters: Sequence[Tensor],
    strategy: str = "dense",
    run: ChunkRunner = call_chunk,
) -> tuple[Tensor, ...]:
    """The outputs of all chunks, concatenated along dimension 1.

    shared: tensors that every chunk uses, through which gradients flow; parameters: the leaves that `function` uses
    besides them, which only "deferred" needs to know. run: executes each chunk, in the forward pass and again where it
    is recomputed. Without gradients every strategy is a plain loop.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"memory strategy {strategy!r}: expected one of {', '.join(STRATEGIES)}")

    def execute(number: int, shared: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return run(function, number, shared, parameters)

    if strategy == "deferred" and torch.is_grad_enabled():
        outputs: tuple[Tensor, ...] = _Deferred.apply(execute, num_chunks, len(shared), *shared, *parameters)
        return outputs
    if strategy == "checkpoint" and torch.is_grad_enabled():
        chunks = [
            checkpoint(execute, number, shared, use_reentrant=False, preserve_rng_state=False)
            for number in range(num_chunks)
        ]
        return _ZeroForNone.apply(*_concatenate(chunks))  # type: ignore[no-any-return]
    return _concatenate([execute(number, shared) for number in range(num_chunks)])


def _concatenate(chunks: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    if len(chunks) == 1:
        return chunks[0]
    return tuple(torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))


class _ZeroForNone(torch.autograd.Function):
    """The tensors themselves; in the backward pass unused ones get zeros instead of no gradient.

    Without it what such an output was made from is recomputed with its chunk, never asked for, and kept until the
    backward pass of all chunks has ended: one number per sample for an unused depth.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Any:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients


class _Deferred(torch.autograd.Function):
    """Forward: every chunk without a graph. Backward: every chunk again with one, its gradients added up at once."""

    @staticmethod
    def forward(ctx: Any, function: ChunkFunction, num_chunks: int, num_shared: int, *tensors: Tensor) -> Any:
        ctx.function, ctx.num_chunks, ctx.num_shared = function, num_chunks, num_shared
        ctx.autocast = capture_autocast(tensors[0].device.type)
        ctx.save_for_backward(*tensors)
        return _concatenate([function(number, tensors[:num_shared]) for number in range(num_chunks)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        # Shared tensors become leaves, so that each chunk's backward stops there; parameters are leaves already.
        leaves = [
            tensor.detach().requires_grad_(need) if index < ctx.num_shared else tensor
            for index, (tensor, need) in enumerate(zip(tensors, needed, strict=True))
        ]
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        totals = [_Total() for _ in wanted]
        start = 0
        for number in range(ctx.num_chunks):
            with torch.enable_grad(), ctx.autocast():
                outputs = ctx.function(number, tuple(leaves[: ctx.num_shared]))
            stop = start + outputs[0].shape[1]
            attached = [
                (output, gradient[:, start:stop])
                for output, gradient in zip(outputs, gradients, strict=True)
                if output.requires_grad
            ]
            ends, given = zip(*attached, strict=True)
            parts = torch.autograd.grad(ends, wanted, given, allow_unused=True)
            del outputs, attached, ends, given
            for total, part in zip(totals, parts, strict=True):
                total.add(part)
            start = stop
        remaining = iter(totals)
        return None, None, None, *(next(remaining).value if need else None for need in needed)


class _Total:
    """Gradients of one input, added up; None where there was none.

    Only in memory of its own: autograd may return one tensor as the gradient of several inputs, a view of the gradient
    that came in, or one number expanded.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self._own = False

    def add(self, part: Tensor | None) -> None:
        if part is None:
            return
        if self.value is None:
            self.value = part
        elif self._own:
            self.value.add_(part)
        else:
            self.value, self._own = self.value + part, True
