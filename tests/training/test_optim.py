"""Optimisers, schedules at hand-computed iterations, clipping, and the search for gradients that are not finite."""

import math
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from graf.runtime.torch_release import torch_release
from graf.training.optim import (
    LearningRateSchedule,
    batch_factor,
    build_optimizer,
    clip_gradients,
    gradient_norms,
    parameter_norms,
    refit_fused,
)


def parameters_with_gradients(*gradients: list[float]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(gradient))) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return parameters


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (LearningRateSchedule("constant"), {0: 1.0, 10**6: 1.0}),
        (
            LearningRateSchedule("multistep", 0.5, (50_000, 100_000, 200_000)),
            {0: 1.0, 49_999: 1.0, 50_000: 0.5, 99_999: 0.5, 100_000: 0.25, 200_000: 0.125, 10**6: 0.125},
        ),
        (LearningRateSchedule("step", 0.1, (100,)), {0: 1.0, 99: 1.0, 100: 0.1, 199: 0.1, 200: 0.01, 350: 0.001}),
        (LearningRateSchedule("exponential", 0.25, (100,)), {0: 1.0, 50: 0.5, 100: 0.25, 150: 0.125}),
        (
            LearningRateSchedule("cosine", 0.2, horizon=1000, decay_start=0.5),
            {0: 1.0, 500: 1.0, 625: 0.6 + 0.4 * math.sqrt(0.5), 750: 0.6, 1000: 0.2, 5000: 0.2},
        ),
        (LearningRateSchedule("cosine", 0.0, horizon=1000), {0: 1.0, 500: 0.5, 1000: 0.0}),
        (
            LearningRateSchedule("points", points=((10, 0.0), (20, 1.0), (40, 0.25))),
            {0: 0.0, 10: 0.0, 11: 0.1, 20: 1.0, 30: 0.625, 40: 0.25, 10**6: 0.25},
        ),
        (
            LearningRateSchedule("points", points=((0, 1.0), (10, 0.01), (20, 4.0)), logarithmic=True),
            {0: 1.0, 5: 0.1, 10: 0.01, 15: 0.2, 20: 4.0, 21: 4.0},
        ),
        (LearningRateSchedule("points", points=((0, 0.5),), warmup=2), {0: 0.25, 1: 0.5, 100: 0.5}),
        (LearningRateSchedule("constant", warmup=4), {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 100: 1.0}),
        (LearningRateSchedule("step", 0.5, (2,), warmup=4), {0: 0.25, 1: 0.5, 2: 0.375, 3: 0.5, 4: 0.25}),
    ],
)
def test_schedules_at_hand_computed_iterations(schedule, values):
    for iteration, expected in values.items():
        assert schedule(iteration) == pytest.approx(expected, abs=1e-12), iteration


@pytest.mark.parametrize("kind", ["constant", "multistep", "step", "exponential", "cosine"])
def test_every_schedule_starts_with_its_warm_up_and_never_rises_after_it(kind):
    schedule = LearningRateSchedule(kind, 0.5, (300, 600), horizon=1000, warmup=100)
    values = [schedule(iteration) for iteration in range(1200)]
    assert values[0] == pytest.approx(0.01)
    assert all(later <= earlier for earlier, later in pairwise(values[100:]))
    assert all(0 < value <= 1 for value in values)


@pytest.mark.parametrize(
    ("rule", "batch_size", "factor"), [("none", 16, 1.0), ("linear", 16, 4.0), ("linear", 1, 0.25), ("sqrt", 16, 2.0)]
)
def test_rates_written_for_batches_of_four_follow_another_batch(rule, batch_size, factor):
    assert batch_factor(rule, batch_size, 4) == factor


def test_rmsprop_takes_the_published_step():
    (parameter,) = parameters_with_gradients([2.0])
    build_optimizer("rmsprop", [parameter], 5e-4, (0.9, 0.9)).step()
    assert parameter.item() == pytest.approx(-5e-4 * 2 / (math.sqrt(0.01 * 4) + 1e-8))


def test_adam_takes_the_betas():
    optimizer = build_optimizer("adam", parameters_with_gradients([1.0]), 1e-3, (0.0, 0.99))
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["betas"] == (0.0, 0.99)


def test_adam_is_fused_where_torch_can_and_else_says_so_once(monkeypatch, caplog):
    caplog.set_level("INFO")
    parameters = parameters_with_gradients([1.0])
    is_fused = bool(build_optimizer("adam", parameters, 1e-3, (0.0, 0.99)).defaults["fused"])
    assert is_fused is (torch_release() >= (2, 4))
    caplog.clear()
    adam = torch.optim.Adam

    def refuse(*arguments, fused=False, **options):
        if fused:
            raise RuntimeError("`fused=True` requires CUDA")
        return adam(*arguments, **options)

    monkeypatch.setattr(torch.optim, "Adam", refuse)
    for _ in range(2):
        assert not build_optimizer("adam", parameters, 1e-3, (0.0, 0.99)).defaults["fused"]
    assert [record.message for record in caplog.records] == ["Adam runs unfused: `fused=True` requires CUDA"]


@pytest.mark.skipif(torch_release() < (2, 4), reason="Adam is not fused on the CPU")
@pytest.mark.parametrize("fused", [True, False])
def test_a_loaded_state_is_fused_where_the_optimiser_is(fused):
    """What comes from a machine of the other kind steps here as a state of one's own, and counts on from there."""
    parameters = [parameters_with_gradients([1.0, -2.0]) for _ in range(2)]
    own = torch.optim.Adam(parameters[0], lr=0.1, fused=fused)
    other = torch.optim.Adam(parameters[1], lr=0.1, fused=not fused)
    for optimizer in (own, other):
        optimizer.step()
    own.load_state_dict(deepcopy(other.state_dict()))
    refit_fused(own)
    assert bool(own.param_groups[0]["fused"]) is fused
    for optimizer in (own, other):
        optimizer.step()
    assert_close(parameters[0], parameters[1])
    assert float(own.state[parameters[0][0]]["step"]) == 2


def test_parameter_norms_are_those_of_each_parameter_that_has_a_gradient():
    parameters = [*parameters_with_gradients([3.0, 0.0], [-4.0, 3.0]), nn.Parameter(torch.ones(5))]
    assert parameter_norms(iter(parameters), parameters[0].device).tolist() == [3, 5]
    assert parameter_norms(parameters[-1:], parameters[0].device).shape == (0,)


def test_layers_go_by_the_first_two_parts_of_their_names_and_leave_out_what_is_not_trained():
    network = nn.Module()
    network.own = nn.Parameter(torch.zeros(1))
    network.trunk = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))
    network.fixed = nn.Linear(1, 1).requires_grad_(False)
    for number, parameter in enumerate(network.parameters()):
        parameter.grad = torch.full_like(parameter, float(number))
    network.trunk[1][1].bias.grad = None
    norms = {layer: float(norm) for layer, norm in gradient_norms(network).items()}
    assert norms == pytest.approx({"own": 0, "trunk.0": math.hypot(1, 2), "trunk.1": math.hypot(3, 4, 5)})


@pytest.mark.parametrize(
    ("how", "limit", "expected"),
    [
        ("norm", 1.0, [[0.6, 0.0], [-0.8]]),
        ("norm", 10.0, [[3.0, 0.0], [-4.0]]),
        ("value", 3.5, [[3.0, 0.0], [-3.5]]),
        ("none", 0.1, [[3.0, 0.0], [-4.0]]),
    ],
)
def test_clipping_by_norm_by_value_and_not_at_all(how, limit, expected):
    parameters = parameters_with_gradients([3.0, 0.0], [-4.0])
    clip_gradients(parameters, how, limit)
    assert_close([parameter.grad for parameter in parameters], [torch.tensor(row) for row in expected])
