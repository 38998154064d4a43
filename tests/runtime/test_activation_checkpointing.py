"""What chunk-by-chunk evaluation keeps; that its gradients are right is tested where a generator uses it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graf.runtime.activation_checkpointing import evaluate_chunks
from graf.runtime.live_tensors import LiveTensorMeter

RAYS, SAMPLES = 64, 256


def peak_of(strategy: str, num_chunks: int) -> int:
    """Bytes at the peak of a forward and backward pass in which nobody uses the second output."""
    with LiveTensorMeter() as meter:
        weight = torch.ones(1, RAYS, SAMPLES, requires_grad=True)

        def render(number: int, shared: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            weights = torch.sigmoid(shared[0] + number)
            distances = torch.rand(1, RAYS, SAMPLES)
            return weights.square().sum(-1, keepdim=True), (weights * distances).sum(-1, keepdim=True)

        colour, _ = evaluate_chunks(render, num_chunks, (weight,), [], strategy)
        colour.sum().backward()
        assert weight.grad is not None
        return int(meter.peak)


@pytest.mark.parametrize("strategy", ["checkpoint", "deferred"])
def test_a_chunk_leaves_nothing_but_its_outputs_even_where_one_of_them_is_unused(strategy: str) -> None:
    few, many = peak_of(strategy, 8), peak_of(strategy, 40)
    outputs = 4 * RAYS * 2  # bytes per chunk; beside them their parts before they are joined, and gradients
    assert (many - few) / 32 <= 4 * outputs
    assert 4 * outputs < 4 * RAYS * SAMPLES / 8  # far less than one number per sample


def test_an_unused_output_gets_no_say_in_the_gradient() -> None:
    gradients = []
    for strategy in ("dense", "checkpoint", "deferred"):
        weight = torch.linspace(0, 1, 12, dtype=torch.float64).reshape(1, 4, 3).requires_grad_()
        used, _ = evaluate_chunks(
            lambda number, shared: (shared[0].square() * (number + 1), shared[0] * 7), 3, (weight,), [], strategy
        )
        used.sum().backward()
        gradients.append(weight.grad)
    for gradient in gradients:
        torch.testing.assert_close(gradient, 12 * torch.linspace(0, 1, 12, dtype=torch.float64).reshape(1, 4, 3))
