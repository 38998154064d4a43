"""Operations on fake tensors return the layouts that they return of real ones, asked for the first time or again."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from graf.app import fake_tensors
from graf.app.fake_tensors import CONTROL_ELEMENTS, FakeTensor, FakeTensorMeter, PredictionError, build_fake

SHAPE = (2, 3, 32, 48)
GRID = torch.linspace(-1, 1, 2 * 40 * 56 * 2).view(2, 40, 56, 2)
WEIGHT = torch.ones(5, 3, 3, 3)
PLANE, PLACES, BAGS = torch.ones(7, 16), torch.zeros(6 * 1024, dtype=torch.long), torch.arange(0, 6 * 1024, 4)


def transpose_backward(x: Tensor) -> Tensor:
    """The gradient of the bias of a transposed convolution."""
    bias = torch.ones(5).requires_grad_()
    functional.conv_transpose2d(x, WEIGHT.transpose(0, 1), bias, stride=2).sum().backward()
    assert bias.grad is not None
    return bias.grad


def convolve_backward(x: Tensor, weight: Tensor, needs_x: bool) -> tuple[Tensor, ...]:
    y = functional.conv2d(x, weight, stride=2, padding=1)
    sizes, pairs = [len(weight)], ([2, 2], [1, 1], [1, 1])
    found = torch.ops.aten.convolution_backward(y, x, weight, sizes, *pairs, False, [0, 0], 1, [needs_x, True, True])
    return tuple(gradient for gradient in found if gradient is not None)


#: name -> what is done to a tensor of SHAPE; returns a tensor, or several
OPERATIONS = {
    "a view": lambda x: x[:, 1:, ::2].transpose(1, 3),
    "a view of a view": lambda x: x.flatten(2).unsqueeze(1).expand(-1, 4, -1, -1),
    "bitwise": lambda x: ((x > 0) & (x[:1, :1] > 0), torch.ops.aten.__and__.Tensor(x[:1] > 0, x > 0)),
    "in place": lambda x: x.mul_(2).add_(1),
    "of another type": lambda x: (x > 0, x.to(torch.bfloat16), x.argmax(1)),
    "parts": lambda x: x.split(1, dim=1),
    "pairs": lambda x: tuple(x.max(dim=2)),
    "joined": lambda x: torch.cat([x, x[:, :1]], dim=1),
    "numbers": lambda x: (x + 1, x + 1.5, x * True, torch.where(x > 0, x, 0)),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last).relu(),
    "convolution": lambda x: functional.conv2d(x, WEIGHT, padding=1),
    "convolution, channels last": lambda x: functional.conv2d(
        x.contiguous(memory_format=torch.channels_last), WEIGHT, stride=2, dilation=2
    ),
    "convolution with such weights": lambda x: functional.conv2d(
        x, WEIGHT.contiguous(memory_format=torch.channels_last)
    ),
    "convolution, transposed": lambda x: functional.conv_transpose2d(x, WEIGHT.transpose(0, 1), stride=2),
    "gradient of its bias": transpose_backward,
    "gradients of a convolution": lambda x: convolve_backward(x, WEIGHT, True),
    "gradients of its weights": lambda x: convolve_backward(x, WEIGHT, False),
    "gradients, channels last": lambda x: convolve_backward(
        x.contiguous(memory_format=torch.channels_last), WEIGHT, True
    ),
    "sums of rows": lambda x: torch.ops.aten._embedding_bag_forward_only(
        PLANE, PLACES, BAGS, False, 0, False, x.flatten()[: len(PLACES)]
    ),
    "sums of rows in bfloat16": lambda x: torch.ops.aten._embedding_bag_forward_only(
        PLANE.bfloat16(), PLACES, BAGS, False, 0, False, x.bfloat16().flatten()[: len(PLACES)]
    ),
    "resampling": lambda x: (
        functional.grid_sample(x, GRID, align_corners=False),
        functional.interpolate(x, scale_factor=2, mode="bicubic"),
        functional.interpolate(x, size=(24, 40), mode="bilinear"),
    ),
    "of a list": lambda x: (*torch._foreach_mul([x, x[0]], 2.0), *torch._foreach_norm([x, x[0]])),
    "a list, in place": lambda x: torch._foreach_add_([x], 1.0) or x,
}


def describe(x: Tensor, found: Tensor | tuple[Tensor, ...]) -> list[tuple[object, ...]]:
    outputs = [found] if isinstance(found, Tensor) else list(found)
    return [
        (
            output.shape,
            output.stride(),
            output.storage_offset(),
            output.dtype,
            output.untyped_storage().nbytes(),
            output.untyped_storage()._cdata == x.untyped_storage()._cdata,
        )
        for output in outputs
    ]


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_returns_what_it_returns_of_real_tensors(name, monkeypatch):
    real = torch.ones(SHAPE)
    expected = describe(real, OPERATIONS[name](real))
    assert real.numel() > CONTROL_ELEMENTS
    with FakeTensorMeter():
        fake = torch.ones(SHAPE)
        assert isinstance(fake, FakeTensor)
        assert describe(fake, OPERATIONS[name](fake)) == expected
        monkeypatch.setattr(fake_tensors, "_ask", None)  # nothing may be asked any more
        fake = torch.ones(SHAPE)
        assert describe(fake, OPERATIONS[name](fake)) == expected


def test_gradients_and_casts_are_those_of_real_tensors():
    def run() -> list[tuple[torch.Size, torch.dtype]]:
        x, weight = torch.ones(64, 128).requires_grad_(), torch.ones(96, 128).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = functional.linear(x, weight)
        y.float().square().mean().backward()
        return [(tensor.shape, tensor.dtype) for tensor in (y, x.grad, weight.grad)]

    expected = run()
    with FakeTensorMeter():
        assert [run(), run()] == [expected, expected]


def test_what_is_small_is_computed():
    with FakeTensorMeter():
        assert (torch.arange(4) * 2).tolist() == [0, 2, 4, 6]
        assert bool(torch.isfinite(torch.ones(SHAPE).sum()))


def test_views_of_a_real_tensor_share_one_storage_and_leave_it_alone():
    real = torch.ones(SHAPE)
    with FakeTensorMeter() as meter:
        first, second = real.flatten(), real[:, 1:]
        assert isinstance(first, FakeTensor)
        assert first.untyped_storage()._cdata == second.untyped_storage()._cdata
        assert meter.current == real.numel() * 4
        first.zero_()
    assert bool((real == 1).all())


def test_networks_are_fake_however_small_and_copied_as_such():
    with build_fake():
        network = torch.nn.Linear(3, 2)
        network.register_buffer("scale", torch.tensor([1.0, 2.0]))
        twin = copy.deepcopy(network)
    for tensor in (*network.parameters(), *network.buffers(), *twin.parameters(), *twin.buffers()):
        assert isinstance(tensor, FakeTensor)
    assert isinstance(twin.weight, torch.nn.Parameter)
    assert repr(twin.scale) == "FakeTensor((2,), dtype=torch.float32)"
    with pytest.raises(RuntimeError, match="outside of a FakeTensorMeter"):
        network.weight + 1


def test_what_cannot_be_told_is_an_error_that_names_the_operation():
    with FakeTensorMeter(), pytest.raises(PredictionError, match=r"torch .* aten.nonzero"):
        torch.ones(SHAPE).nonzero()
    with FakeTensorMeter(), pytest.raises(PredictionError, match=r"changes the layout .* aten.unsqueeze_"):
        torch.ones(SHAPE).unsqueeze_(0)
