"""What is repeated of fake tensors' answers is what operations on real tensors return."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from graf.app.fake_tensors import CONTROL_ELEMENTS, FakeTensor, FakeTensorMeter, FakeTensorModes

SHAPE = (2, 3, 32, 48)
GRID = torch.linspace(-1, 1, 2 * 40 * 56 * 2).view(2, 40, 56, 2)
WEIGHT = torch.ones(5, 3, 3, 3)
#: name -> what is done to a tensor of SHAPE; returns a tensor, or several
OPERATIONS = {
    "a view": lambda x: x[:, 1:, ::2].transpose(1, 3),
    "a view of a view": lambda x: x.flatten(2).unsqueeze(1).expand(-1, 4, -1, -1),
    "in place": lambda x: x.mul_(2).add_(1),
    "of another type": lambda x: (x > 0, x.to(torch.bfloat16), x.argmax(1)),
    "parts": lambda x: x.split(1, dim=1),
    "pairs": lambda x: tuple(x.max(dim=2)),
    "joined": lambda x: torch.cat([x, x[:, :1]], dim=1),
    "numbers": lambda x: (x + 1, x + 1.5, x * True, torch.where(x > 0, x, 0)),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last).relu(),
    "convolution": lambda x: functional.conv2d(x, WEIGHT, padding=1),
    "resampling": lambda x: (
        functional.grid_sample(x, GRID, align_corners=False),
        functional.interpolate(x, scale_factor=2, mode="bicubic"),
        functional.interpolate(x, size=(24, 40), mode="bilinear"),
    ),
    "of a list": lambda x: torch._foreach_mul([x, x[0]], 2.0),
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
def test_asked_again_an_operation_returns_what_it_returns_of_real_tensors(name, monkeypatch):
    real = torch.ones(SHAPE)
    expected = describe(real, OPERATIONS[name](real))
    assert real.numel() > CONTROL_ELEMENTS
    with FakeTensorModes().running():
        OPERATIONS[name](torch.ones(SHAPE))
        monkeypatch.setattr(FakeTensorMeter, "_ask", None)  # nothing may be asked any more
        fake = torch.ones(SHAPE)
        found = OPERATIONS[name](fake)
        assert isinstance(fake, FakeTensor)
        assert describe(fake, found) == expected


def test_gradients_and_casts_are_those_of_real_tensors():
    def run() -> list[tuple[torch.Size, torch.dtype]]:
        x, weight = torch.ones(64, 128).requires_grad_(), torch.ones(96, 128).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = functional.linear(x, weight)
        y.float().square().mean().backward()
        return [(tensor.shape, tensor.dtype) for tensor in (y, x.grad, weight.grad)]

    expected = run()
    with FakeTensorModes().running():
        assert [run(), run()] == [expected, expected]


def test_what_is_small_is_computed():
    with FakeTensorModes().running():
        assert (torch.arange(4) * 2).tolist() == [0, 2, 4, 6]
        assert bool(torch.isfinite(torch.ones(SHAPE).sum()))
