"""Losses against textbook formulas, penalties against discriminators with known gradients."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from graf.runtime.amp import Precision
from graf.training.losses import (
    MCE_Loss,
    discriminator_fake_loss,
    discriminator_real_loss,
    generator_loss,
    gradient_penalty,
    input_gradient_norms,
    r1_penalty,
)

OFF = Precision("cpu", None).make_scaler()
LOGITS = torch.tensor([-30.0, -1.5, -1.0, 0.0, 0.4, 1.0, 2.5, 30.0], dtype=torch.float64)


def binary_cross_entropy(logits: torch.Tensor, target: float) -> torch.Tensor:
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target), reduction="none")


def test_the_standard_game_is_binary_cross_entropy_and_the_generator_does_not_saturate():
    assert_close(discriminator_real_loss("standard", LOGITS), binary_cross_entropy(LOGITS, 1.0))
    assert_close(discriminator_fake_loss("standard", LOGITS), binary_cross_entropy(LOGITS, 0.0))
    assert_close(generator_loss("standard", LOGITS), binary_cross_entropy(LOGITS, 1.0))


def test_the_hinge_game_by_hand():
    assert discriminator_real_loss("hinge", LOGITS).tolist() == [31, 2.5, 2, 1, 0.6, 0, 0, 0]
    assert discriminator_fake_loss("hinge", LOGITS).tolist() == [0, 0, 0, 1, 1.4, 2, 3.5, 31]
    assert torch.equal(generator_loss("hinge", LOGITS), -LOGITS)


def test_the_wasserstein_game_is_the_difference_of_means():
    assert torch.equal(discriminator_real_loss("wgan", LOGITS), -LOGITS)
    assert torch.equal(discriminator_fake_loss("wgan", LOGITS), LOGITS)
    assert torch.equal(generator_loss("wgan", LOGITS), -LOGITS)


def test_extreme_logits_stay_finite_in_float32():
    logits = torch.tensor([-1e4, 1e4])
    for loss in (discriminator_real_loss, discriminator_fake_loss, generator_loss):
        assert bool(torch.isfinite(loss("standard", logits)).all())


# ------------------------------------------------------------------------------------------------------------ penalties


def draw_images(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 4, 4, dtype=torch.float64, requires_grad=True)


def test_r1_of_a_linear_discriminator_is_the_squared_norm_of_its_weight():
    weight, images = torch.randn(3, 4, 4, dtype=torch.float64), draw_images()
    penalty = r1_penalty((images * weight).sum((1, 2, 3)), images, OFF)
    assert_close(penalty, weight.square().sum().expand(3))


def test_r1_of_a_quadratic_discriminator_and_its_own_gradient_have_closed_forms():
    """D(x) = a |x|^2 / 2: R1 = a^2 |x|^2, dR1/da = 2 a |x|^2."""
    a, images = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), draw_images()
    squared = images.detach().square().sum((1, 2, 3))
    penalty = r1_penalty(a * images.square().sum((1, 2, 3)) / 2, images, OFF)
    assert_close(penalty.detach(), 0.49 * squared)
    (gradient,) = torch.autograd.grad(penalty.sum(), a)
    assert_close(gradient, 1.4 * squared.sum())


def test_input_gradient_norms_agree_with_finite_differences():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
    network.double()
    images = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    found = input_gradient_norms(network(images)[:, 0], images, OFF)
    step = 1e-5
    offsets = step * torch.eye(12, dtype=torch.float64).view(12, 3, 2, 2)
    for index, image in enumerate(images.detach()):
        slopes = (network(image + offsets) - network(image - offsets))[:, 0] / (2 * step)
        assert found[index].item() == pytest.approx(slopes.square().sum().item(), rel=1e-6)


@pytest.mark.parametrize(("length", "expected"), [(1.0, 0.0), (3.0, 4.0), (0.25, 0.5625)])
def test_the_gradient_penalty_measures_the_distance_from_slope_one(length, expected):
    weight = functional.normalize(torch.randn(48, dtype=torch.float64), dim=0).view(3, 4, 4) * length
    images = draw_images()
    penalty = gradient_penalty((images * weight).sum((1, 2, 3)), images, OFF)
    assert_close(penalty, torch.full((3,), expected, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_gradient_penalty_of_a_flat_discriminator_has_a_finite_gradient():
    weight = torch.zeros(3, 4, 4, requires_grad=True)
    images = torch.randn(2, 3, 4, 4, requires_grad=True)
    penalty = gradient_penalty((images * weight).sum((1, 2, 3)), images, OFF)
    penalty.sum().backward()
    assert_close(penalty, torch.ones(2), atol=1e-5, rtol=0)
    assert bool(torch.isfinite(weight.grad).all())


@pytest.mark.parametrize("penalise", [r1_penalty, gradient_penalty])
def test_an_enabled_gradient_scaler_changes_neither_a_penalty_nor_its_gradient(penalise):
    weight, images = torch.randn(3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4, requires_grad=True)
    scaler = pytest.importorskip("torch.amp.grad_scaler").GradScaler("cpu", init_scale=2.0**14)  # torch 2.3
    values = []
    for chosen in (OFF, scaler):
        penalty = penalise(torch.tanh((images * weight).sum((1, 2, 3)) / 10), images, chosen)
        values.append((penalty, torch.autograd.grad(penalty.sum(), weight)[0]))
    assert scaler.get_scale() == 2.0**14
    assert values[0][0].abs().max() > 0
    assert_close(values[1], values[0])


def test_penalties_are_per_image_so_that_micro_batches_add_up():
    images = draw_images(4)

    def discriminate(batch: torch.Tensor) -> torch.Tensor:
        return torch.sin(batch).prod(1).sum((1, 2))

    whole = r1_penalty(discriminate(images), images, OFF)
    parts = [r1_penalty(discriminate(part), part, OFF) for part in (images[:1], images[1:])]
    assert_close(torch.cat(parts), whole)


# ----------------------------------------------------------------------------------------------------------- class loss


def test_the_class_loss_equals_a_loop_over_groups_and_images():
    groups = (3, 2, 8)
    logits = torch.randn(5, 13, dtype=torch.float64)
    targets = torch.stack([torch.randint(0, size, (5,)) for size in groups], 1)
    found = MCE_Loss(groups)(logits, targets)
    for i in range(5):
        expected, start = 0.0, 0
        for group, size in enumerate(groups):
            part = logits[i, start : start + size]
            expected += (part.exp().sum().log() - part[targets[i, group]]).item()
            start += size
        assert found[i].item() == pytest.approx(expected)


def test_the_class_loss_refuses_logits_of_another_width():
    with pytest.raises(RuntimeError):
        MCE_Loss((3, 2))(torch.randn(2, 6), torch.zeros(2, 2, dtype=torch.int64))
