"""The average of the weights against the recursion written out, its warm-up, its state and its isolation."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from graf.training.ema import ModelAverage, UpdateCounts


class Counter(nn.Module):
    """A parameter and a buffer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.register_buffer("moments", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
            self.moments.fill_(value)
            self.count.fill_(int(value))


def test_the_average_follows_the_warm_up_recursion():
    module = Counter()
    module.set(5.0)
    average = ModelAverage(module, beta=0.6)
    expected = 5.0
    for t, value in enumerate(torch.linspace(-3, 7, 40).tolist()):
        module.set(value)
        average.update(module)
        beta = min(0.6, (1 + t) / (10 + t))
        expected = beta * expected + (1 - beta) * value
        assert average.module.weight[0].item() == pytest.approx(expected, abs=1e-12)
    assert average.updates == 40


@pytest.mark.parametrize(("t", "beta"), [(0, 0.1), (1, 2 / 11), (8, 0.5), (90, 0.9), (1000, 0.9)])
def test_the_warm_up_reaches_beta(t, beta):
    module = Counter()
    average = ModelAverage(module, beta=0.9)
    average.updates = t
    module.set(1.0)
    average.update(module)
    assert average.module.weight[0].item() == pytest.approx(1 - min(beta, 0.91), abs=1e-12)


def test_beta_zero_copies():
    module = Counter()
    average = ModelAverage(module, beta=0.0)
    module.set(3.0)
    average.update(module)
    assert torch.equal(average.module.weight, module.weight)


def test_buffers_are_copied_whatever_their_type():
    module = Counter()
    average = ModelAverage(module, beta=0.999)
    module.set(7.0)
    average.update(module)
    assert average.module.count.item() == 7
    assert torch.equal(average.module.moments, module.moments)


def test_the_average_is_a_frozen_copy_in_eval_mode_that_leaves_the_module_alone():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = ModelAverage(module, beta=0.9)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    average.update(module)
    assert module.training
    assert not average.module.training
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_state_round_trip_continues_as_if_nothing_had_happened():
    module = Counter()
    first, second = ModelAverage(module, beta=0.99), ModelAverage(module, beta=0.99)
    for value in (1.0, 4.0, -2.0):
        module.set(value)
        first.update(module)
    second.module.load_state_dict(first.module.state_dict())
    UpdateCounts({"module": second}).load_state_dict(UpdateCounts({"module": first}).state_dict())
    module.set(10.0)
    for average in (first, second):
        average.update(module)
    assert second.updates == first.updates == 4
    assert_close(dict(second.module.state_dict()), dict(first.module.state_dict()), rtol=0, atol=0)
