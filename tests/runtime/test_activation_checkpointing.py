"""What chunk-by-chunk evaluation keeps; that its gradients are right is tested where a generator uses it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from graf.runtime.activation_checkpointing import ChunkFunction, evaluate_chunks
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
    assert (many - few) / 32 <= 4 * outputs  # a thirty-second of one number per sample


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


@pytest.mark.parametrize("strategy", ["dense", "checkpoint", "deferred"])
def test_the_runner_sees_every_chunk_forwards_and_again_where_it_is_recomputed(strategy: str) -> None:
    seen: list[tuple[int, bool]] = []
    shared = torch.linspace(0, 1, 12, dtype=torch.float64).reshape(1, 4, 3).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def render(number: int, shared: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (shared[0].square() * scale * (number + 1),)

    def run(
        function: ChunkFunction, number: int, shared: tuple[Tensor, ...], parameters: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        assert list(parameters) == [scale]
        seen.append((number, torch.is_grad_enabled()))
        return function(number, shared)

    (output,) = evaluate_chunks(render, 4, (shared,), [scale], strategy, run)
    assert seen == [(number, strategy != "deferred") for number in range(4)]
    seen.clear()
    output.sum().backward()
    assert sorted(seen) == ([] if strategy == "dense" else [(number, True) for number in range(4)])
    torch.testing.assert_close(shared.grad, 60 * shared.detach())
    torch.testing.assert_close(scale.grad, 10 * shared.detach().square().sum())


@pytest.mark.parametrize("strategy", ["dense", "checkpoint", "deferred"])
def test_what_the_runner_returns_is_the_chunks_output_and_its_gradient(strategy: str) -> None:
    shared = torch.ones(1, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(
        function: ChunkFunction, number: int, shared: tuple[Tensor, ...], parameters: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        return tuple(10 * part for part in function(number, shared))

    (output,) = evaluate_chunks(lambda number, shared: (shared[0] * number,), 3, (shared,), [], strategy, run)
    torch.testing.assert_close(output, torch.tensor([0, 0, 10, 10, 20, 20]).double()[None, :, None].expand(1, 6, 3))
    output.sum().backward()
    torch.testing.assert_close(shared.grad, torch.full_like(shared, 30))


@pytest.mark.parametrize("strategy", ["dense", "checkpoint", "deferred"])
def test_inputs_that_autograd_gives_one_gradient_tensor_get_their_own_sums(strategy: str) -> None:
    """a + b gives both its gradient, x + ... the one that came in, and a sum one number, expanded."""
    a, b, summed = (torch.zeros(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    shared = torch.zeros(1, 2, 3, dtype=torch.float64, requires_grad=True)

    def render(number: int, shared: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (shared[0] + (number + 1) * (a + b) + summed.sum(),)

    (output,) = evaluate_chunks(render, 3, (shared,), [a, b, summed], strategy)
    output.retain_grad()
    (2 * output).sum().backward()
    for leaf, expected in ((a, 12), (b, 12), (shared, 6), (summed, 36)):
        torch.testing.assert_close(leaf.grad, torch.full_like(leaf, expected))
    torch.testing.assert_close(output.grad, torch.full_like(output, 2))


@pytest.mark.parametrize("strategy", ["dense", "checkpoint", "deferred"])
def test_without_gradients_the_runner_sees_every_chunk_once(strategy: str) -> None:
    seen: list[int] = []

    def run(
        function: ChunkFunction, number: int, shared: tuple[Tensor, ...], parameters: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        seen.append(number)
        return function(number, shared)

    shared = torch.ones(1, 2, 3, requires_grad=True)
    with torch.no_grad():
        evaluate_chunks(lambda number, shared: (shared[0] * number,), 3, (shared,), [], strategy, run)
    assert seen == [0, 1, 2]
