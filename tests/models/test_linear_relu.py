"""A linear layer and its ReLU in one operation, against the same formula left to autograd."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from graf.models import linear_relu as module
from graf.models.linear_relu import PackedWeights, linear_relu

#: dimensions of the shares of 4 images of 6 rays with 5 samples: a bias, what images add, what rays add
SHARES = [(1, 1, 1), (4, 1, 1), (4, 6, 1)]


def draw(shares: tuple[int, ...], dtype: torch.dtype = torch.float64, has_second: bool = True) -> list[Tensor]:
    """x, weight, shares and, with a second input, that and its weight; 3 and 2 numbers in, 8 out."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(4, 6, 5, 3), (8, 3), (*shares, 8), *([(4, 6, 5, 2), (8, 2)] if has_second else [])]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def call(x: Tensor, weight: Tensor, shares: Tensor, *again: Tensor) -> Tensor:
    return linear_relu(x, weight, shares, again or None)


def compute_plainly(x: Tensor, weight: Tensor, shares: Tensor, *again: Tensor) -> Tensor:
    return torch.relu(functional.linear(x, weight) + shares + (functional.linear(*again) if again else 0))


@pytest.mark.parametrize("has_second", [False, True])
@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_all_gradients_are_those_of_the_formula(dtype, tolerance, shares, has_second):
    inputs = draw(shares, dtype, has_second)
    exact = [part.detach().double().requires_grad_() for part in inputs]
    found, expected = call(*inputs), compute_plainly(*exact)
    assert found.dtype == dtype
    assert 0.2 < float((expected == 0).double().mean()) < 0.8
    assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for mine, plain in zip(gradients, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        assert mine.dtype == dtype
        assert_close(mine.double(), plain, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("packed", [None, PackedWeights()], ids=["", "packed"])
def test_known_values_are_given_the_gradients_of_computed_ones(monkeypatch, packed, shares):
    x, weight, own_shares, *again = inputs = draw(shares, torch.float32)
    expected = call(*inputs)
    monkeypatch.setattr(module, "_compute", None)  # so that a call of it fails
    found = linear_relu(x, weight, own_shares, tuple(again), packed, expected.detach())
    assert torch.equal(found, expected)
    weights = torch.randn(expected.shape)
    plain = torch.autograd.grad((expected * weights).sum(), inputs)
    assert_close(torch.autograd.grad((found * weights).sum(), inputs), plain, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert linear_relu(x, weight, own_shares, tuple(again), packed, found) is found


@pytest.mark.parametrize("blocks", [1, 7, 120])
def test_into_how_many_blocks_rows_are_cut_changes_no_gradient(monkeypatch, blocks):
    inputs = draw((4, 6, 1))  # 120 rows, which 7 does not divide
    expected = torch.autograd.grad(call(*inputs).sin().sum(), inputs)
    monkeypatch.setattr(module, "ROW_BLOCKS", blocks)
    assert_close(torch.autograd.grad(call(*inputs).sin().sum(), inputs), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("has_second", [False, True])
def test_without_onednns_layer_the_numbers_are_the_same(monkeypatch, has_second):
    inputs = draw((1, 1, 1), torch.float32, has_second)
    fused = call(*inputs)
    monkeypatch.setattr(module, "_is_fused", lambda dtype: False)
    assert_close(call(*inputs), fused, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("has_second", [False, True])
@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_change_no_number(dtype, shares, has_second):
    inputs = draw(shares, torch.float32, has_second)
    x, weight, own_shares, *again = inputs
    packed, weights = PackedWeights(), torch.randn(4, 6, 5, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        expected = call(*inputs)
        found = [linear_relu(x, weight, own_shares, again or None, packed) for _ in range(2)]
    for values in found:
        assert torch.equal(values, expected)
        gradients = torch.autograd.grad((values * weights).sum(), inputs)
        plain = torch.autograd.grad((expected * weights).sum(), inputs, retain_graph=True)
        assert_close(gradients, plain, atol=1e-5, rtol=1e-5 if dtype is torch.float32 else 0.01)


@pytest.mark.skipif(not module._is_fused(torch.float32), reason="this torch's products are not oneDNN's")
def test_a_weight_is_packed_once_for_each_dtype(monkeypatch):
    calls = []
    pack = module._PACK
    monkeypatch.setattr(module, "_PACK", lambda weight: calls.append(weight.dtype) or pack(weight))
    x, weight, shares = (part.detach() for part in draw((1, 1, 1), torch.float32, False))
    packed = PackedWeights()
    for _ in range(3):
        linear_relu(x, weight, shares, None, packed)
        with torch.autocast("cpu", torch.bfloat16):
            linear_relu(x, weight, shares, None, packed)
    assert calls == [torch.float32, *([torch.bfloat16] if module._is_fused(torch.bfloat16) else [])]
    other = weight + 1
    assert_close(linear_relu(x, other, shares, None, packed), compute_plainly(x, other, shares))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_second", [False, True])
def test_what_is_not_a_number_stays_so(has_second, dtype):
    inputs = [part.detach() for part in draw((1, 1, 1), dtype, has_second)]
    inputs[0][1, 2, 3, 0] = torch.nan
    found = call(*inputs).isnan()
    assert found[1, 2, 3].all()
    assert found.sum() == 8


@pytest.mark.parametrize("shares", SHARES)
def test_without_a_graph_the_numbers_are_the_same(shares):
    inputs = draw(shares, torch.float32)
    with torch.no_grad():
        found = call(*inputs)
    assert torch.equal(found, call(*inputs).detach())


@pytest.mark.parametrize("shares", SHARES)
def test_autocast_rounds_products_and_nothing_that_is_learned(shares):
    inputs = draw(shares, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(*inputs)
    assert found.dtype == torch.bfloat16
    exact = call(*inputs)
    assert_close(found.float(), exact, atol=0.1, rtol=0.02)
    weights = torch.randn(exact.shape)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for mine, plain in zip(gradients, torch.autograd.grad((exact * weights).sum(), inputs), strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - plain).norm() / plain.norm()) < 0.1  # points beside the bend are counted differently


def test_only_inputs_and_output_are_kept_and_only_gradients_that_are_needed_are_computed():
    kept: list[Tensor] = []
    x, weight, shares, y, second = draw((1, 1, 1))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = call(x.detach(), weight, shares.detach(), y.detach(), second)
    assert {tensor.shape for tensor in kept} == {x.shape, weight.shape, y.shape, second.shape, found.shape}
    with torch.profiler.profile() as profiler:
        found.sum().backward()
    products = [event.name for event in profiler.events() if event.name in ("aten::mm", "aten::bmm")]
    assert len(products) == 2
    assert weight.grad is not None
    assert second.grad is not None


def test_a_second_derivative_is_refused():
    inputs = draw((1, 1, 1))
    (first,) = torch.autograd.grad(call(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
