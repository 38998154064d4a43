"""A player's turn: fresh learning rate and gradients, one applied update, and a name for whatever is not finite."""

import math

import pytest
import torch
from torch import nn

from graf.runtime.amp import NoOpScaler, Scaler, scale_of
from graf.training import players
from graf.training.optim import LearningRateSchedule
from graf.training.players import DivergenceError, Player


def make_player(lr: float = 0.1, schedule: LearningRateSchedule | None = None, scale: float | None = None) -> Player:
    """Two weights under plain gradient descent: an update is -lr times the gradient."""
    network = nn.Module()
    network.first, network.second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    scaler: Scaler = NoOpScaler()
    if scale is not None:
        scaler = pytest.importorskip("torch.amp.grad_scaler").GradScaler("cpu", init_scale=scale)  # torch 2.3
    optimizer = torch.optim.SGD(network.parameters(), lr=123.0)
    return Player("ccsr", "sr", network, optimizer, scaler, lr, schedule or LearningRateSchedule(), (0.0, 0.9))


def give_loss(player: Player, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """Back-propagate 3 sum(first) + 4 sum(second), times factor."""
    loss = factor * (3 * player.network.first.sum() + 4 * player.network.second.sum())
    player.backward(loss)
    return {"loss_sr": loss.detach()}


def test_a_turn_begins_with_its_learning_rate_and_without_old_gradients():
    player = make_player(0.5, LearningRateSchedule("multistep", 0.1, (10,), warmup=4))
    for iteration, expected in ((0, 0.125), (3, 0.5), (9, 0.5), (10, 0.05)):
        give_loss(player)
        player.begin(iteration)
        assert [group["lr"] for group in player.optimizer.param_groups] == pytest.approx([expected])
        assert player.lr_at(iteration) == pytest.approx(expected)
        assert scale_of(player.scaler, torch.device("cpu")) == 1.0
        assert all(parameter.grad is None for parameter in player.network.parameters())


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_an_update_is_a_step_along_the_summed_gradients_and_reports_their_norm(scale):
    player = make_player(scale=scale)
    player.begin(0)
    give_loss(player)
    terms = player.apply(give_loss(player), 0, "none", 1.0)
    torch.testing.assert_close(player.network.first.detach(), torch.full((2,), 1 - 0.1 * 2 * 3))
    torch.testing.assert_close(player.network.second.detach(), torch.full((3,), 1 - 0.1 * 2 * 4))
    assert set(terms) == {"loss_sr", "grad_norm_sr"}
    assert float(terms["grad_norm_sr"]) == pytest.approx(2 * math.sqrt(2 * 9 + 3 * 16))
    assert player.skipped == 0


def test_the_layers_norms_are_told_on_request_as_they_were_before_clipping():
    player = make_player(scale=1024.0)
    player.layer_norms = True
    player.begin(0)
    terms = player.apply(give_loss(player), 0, "norm", 0.1)
    assert float(terms["grad_norm_sr/first"]) == pytest.approx(math.sqrt(2 * 9))
    assert float(terms["grad_norm_sr/second"]) == pytest.approx(math.sqrt(3 * 16))


def test_gradients_are_clipped_after_they_are_unscaled_and_measured_before():
    player = make_player(lr=1.0, scale=1024.0)
    player.begin(0)
    terms = player.apply(give_loss(player), 0, "value", 0.25)
    assert float(terms["grad_norm_sr"]) == pytest.approx(math.sqrt(66))
    torch.testing.assert_close(player.network.first.detach(), torch.full((2,), 0.75))


def test_a_term_that_is_not_finite_is_named_and_nothing_moves():
    player = make_player()
    player.begin(7)
    terms = give_loss(player) | {"loss_sr_agreement": torch.tensor(math.nan)}
    with pytest.raises(DivergenceError, match=r"iteration 7: loss_sr_agreement is not finite.*resume.*learning rate"):
        player.apply(terms, 7, "none", 1.0)
    assert torch.equal(player.network.first.detach(), torch.ones(2))
    assert torch.equal(player.network.second.detach(), torch.ones(3))


def test_a_gradient_that_is_not_finite_is_named_with_its_network():
    player = make_player()
    player.begin(0)
    player.network.second.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DivergenceError, match=r"the gradient of ccsr\.second is not finite"):
        player.apply(give_loss(player), 0, "none", 1.0)


def test_a_norm_that_overflows_alone_is_named_as_the_norm():
    player = make_player()
    player.begin(0)
    give_loss(player, 2.4e18)  # norms of 1e19 and 1.7e19, and the square of 2e19 is too large for float32
    with pytest.raises(DivergenceError, match=r"grad_norm_sr is not finite"):
        player.apply({"loss_sr": torch.tensor(0.0)}, 0, "none", 1.0)


def test_the_error_names_the_learning_rate_of_the_player_that_diverged():
    player = make_player()
    player.begin(0)
    with pytest.raises(DivergenceError, match=r"ccsr\.lr"):
        player.apply({"loss_sr": torch.tensor(math.inf)}, 0, "none", 1.0)


def test_a_scaler_skips_an_inf_halves_its_scale_and_goes_on():
    player = make_player(scale=1024.0)
    player.begin(0)
    handle = player.network.first.register_hook(lambda gradient: gradient * math.inf)
    player.apply(give_loss(player), 0, "norm", 1.0)
    handle.remove()
    assert player.skipped == 1
    assert scale_of(player.scaler, torch.device("cpu")) == 512.0
    assert torch.equal(player.network.first.detach(), torch.ones(2))
    assert torch.equal(player.network.second.detach(), torch.ones(3))
    player.begin(1)
    player.apply(give_loss(player), 1, "none", 1.0)
    assert player.skipped == 0
    torch.testing.assert_close(player.network.first.detach(), torch.full((2,), 0.7))


def test_too_many_skips_in_a_row_end_the_run_by_name(monkeypatch):
    monkeypatch.setattr(players, "MAX_SKIPPED_UPDATES", 3)
    player = make_player(scale=1024.0)
    player.network.second.register_hook(lambda gradient: gradient * math.nan)
    for iteration in range(3):
        player.begin(iteration)
        player.apply(give_loss(player), iteration, "none", 1.0)
    player.begin(3)
    with pytest.raises(DivergenceError, match=r"4 updates in a row.*iteration 3: the norm of.* ccsr\.second"):
        player.apply(give_loss(player), 3, "none", 1.0)


def test_a_player_owns_what_its_optimiser_was_given():
    player = make_player()
    player.optimizer = torch.optim.SGD([player.network.second], lr=1.0)
    assert [parameter is player.network.second for parameter in player.parameters] == [True]
    player.begin(0)
    terms = player.apply(give_loss(player), 0, "none", 1.0)
    assert float(terms["grad_norm_sr"]) == pytest.approx(math.sqrt(48))
    assert torch.equal(player.network.first.detach(), torch.ones(2))


def test_an_update_without_gradients_has_norm_zero_and_moves_nothing():
    player = make_player()
    player.begin(0)
    assert float(player.apply({"loss_sr": torch.tensor(1.0)}, 0, "norm", 1.0)["grad_norm_sr"]) == 0
    assert torch.equal(player.network.first.detach(), torch.ones(2))


def test_an_infinite_loss_whose_gradients_are_finite_stops_the_run_with_a_scaler_too():
    player = make_player(scale=1024.0)
    player.begin(7)
    terms = give_loss(player) | {"loss_sr_agreement": torch.tensor(math.inf)}
    with pytest.raises(DivergenceError, match=r"iteration 7: loss_sr_agreement is not finite"):
        player.apply(terms, 7, "none", 1.0)


def test_adams_decay_rates_are_the_configurations_after_a_resume():
    player = make_player()
    player.optimizer = torch.optim.Adam(player.network.parameters(), betas=(0.5, 0.999))
    before = torch.optim.Adam(player.network.parameters(), betas=(0.1, 0.2)).state_dict()
    player.optimizer.load_state_dict(before)
    player.begin(0)
    assert player.optimizer.param_groups[0]["betas"] == player.betas == (0.0, 0.9)
