"""The objective: every player's loss is the sum of its statistics with the weights of the configuration.

CCSR's is tested in test_super_resolution.py, the formulas of the terms in test_trainer.py.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from graf.app import builders
from graf.geometry.rays import crop_images
from graf.models.camera_refinement import PENALTY, STORED_FACTOR
from graf.models.generator import STORED_SHARE
from graf.runtime.amp import Precision
from graf.runtime.randomness import Draws
from graf.training.inputs import StepInputs
from graf.training.trainer import Trainer

OFF = Precision("cpu", None).make_scaler()
WEIGHTS = ("discriminator.class_loss=2.5", "training.reg_param=7", "training.reg_every=3")
LEARNED_WEIGHTS = {"loss_g": 1.0, "loss_g_class": 2.5, "loss_g_photometric": 20.0, "loss_g_supervision": 0.4}
SUPER_RESOLUTION = (
    *("data.imsize=16", "ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1", "ccsr.supervise_generator=0.4"),
    *("ccsr.start_iteration=0", "ccsr.every=1", "ccsr.agreement=0.3"),
)


@pytest.fixture(params=[(), SUPER_RESOLUTION], ids=["renders alone", "super-resolution"])
def case(request, smoke_config, make_trainer) -> tuple[Callable[..., Trainer], tuple[torch.Tensor, torch.Tensor]]:
    """What builds a trainer without and with super-resolution, and three photographs for it."""
    data = builders.open_photographs(smoke_config(*request.param))
    images, labels = zip(*(data[index] for index in (0, 7, 19)), strict=True)
    return partial(make_trainer, *request.param, *WEIGHTS, data=data), (torch.stack(images), torch.stack(labels))


def draw(trainer: Trainer, batch: tuple[torch.Tensor, torch.Tensor], iteration: int) -> StepInputs:
    """The inputs of an iteration."""
    draws = Draws(trainer.config.seed, iteration, range(len(batch[0])))
    return trainer.inputs.draw(draws, *batch, trainer.settings_at(iteration))


@pytest.mark.parametrize("iteration", [0, 600])
@pytest.mark.parametrize("gan_type", ["standard", "hinge"])
def test_the_losses_of_the_discriminator_are_its_weighted_statistics(case, iteration, gan_type):
    make_trainer, batch = case
    trainer = make_trainer(f"training.gan_type={gan_type}")
    inputs, objective = draw(trainer, batch, iteration), trainer.objective
    with torch.no_grad():
        render = objective.render_patches(inputs.fakes_of_d).rgb
    reals, fakes = objective.cut_reals(inputs.reals), objective.cut_fakes(inputs.fakes_of_d, render)
    assert len(reals) == len(fakes) == (1 if trainer.ccsr is None else 2)

    loss, terms = objective.discriminator_loss(reals, fakes, inputs.reals.views, 3)
    assert all(terms[name] > 1e-3 for name in ("loss_d", "loss_d_class"))
    assert_close(loss, terms["loss_d"] + 2.5 * terms["loss_d_class"])
    assert objective.penalty_is_due(iteration)
    assert not objective.penalty_is_due(iteration + 1)
    loss, terms = objective.penalty_loss(reals, inputs.reals, render, 3, OFF)
    assert terms.keys() == {"penalty"}
    assert terms["penalty"] > 0
    assert_close(loss, 7 * 3 * terms["penalty"])


@pytest.mark.parametrize("iteration", [0, 600])
def test_the_loss_of_the_generator_is_its_weighted_statistics(case, iteration):
    make_trainer, batch = case
    trainer = make_trainer("training.opacity=0.3")
    inputs, objective = draw(trainer, batch, iteration), trainer.objective
    render = objective.render_patches(inputs.fakes_g)
    loss, terms = objective.generator_loss(inputs.fakes_g, render, inputs.reals, 3, iteration)
    assert_close(terms["loss_g_opacity"], render.opacity.mean())
    weights = {"loss_g": 1.0, "loss_g_class": 2.5, "loss_g_opacity": 0.3}
    weights |= {} if trainer.ccsr is None else {"loss_g_supervision": 0.4}
    assert terms.keys() == weights.keys()
    assert all(value > 1e-4 for value in terms.values())
    assert_close(loss, sum(weight * terms[name] for name, weight in weights.items()))


@pytest.mark.parametrize("iteration", [0, 600])
def test_the_photometric_term_compares_renders_with_photographs_of_their_views(case, iteration):
    make_trainer, batch = case
    keys = ("training.photometric=20", "training.photometric_min=3", "training.photometric_decay=0.01")
    trainer = make_trainer("training.match_views=true", *keys, "ray_sampler.snap=true")
    inputs, objective = draw(trainer, batch, iteration), trainer.objective
    render = objective.render_patches(inputs.fakes_g)
    loss, terms = objective.generator_loss(inputs.fakes_g, render, inputs.reals, 3, iteration)
    photographs = batch[0] if trainer.ccsr is None else torch.nn.functional.avg_pool2d(batch[0], trainer.ccsr.scale)
    assert torch.equal(inputs.fakes_g.views.poses, inputs.reals.views.poses)
    size, width, squares = 16, photographs.shape[-1], []
    for row, photograph in enumerate(photographs):
        patch = inputs.reals.patches[row : row + 1]
        step = round(float(patch.scale) * width / size)
        x, y = (round(float((c - patch.scale + 1) * width - 1 + step) / 2) for c in patch.centre[0])
        seen = photograph[:, y : y + step * size : step, x : x + step * size : step]
        squares.append((render.rgb[row] - seen).square().mean())
    assert_close(terms["loss_g_photometric"], torch.stack(squares).mean(), atol=1e-6, rtol=1e-5)
    weight = max(3.0, 20 * math.exp(-0.01 * iteration))
    others = terms["loss_g"] + 2.5 * terms["loss_g_class"]
    others = others + 0.4 * terms.get("loss_g_supervision", torch.zeros(()))
    assert_close(loss, others + weight * terms["loss_g_photometric"])


def test_without_the_photometric_term_its_floor_weighs_nothing(case):
    """Generated patches then have views of their own."""
    make_trainer, batch = case
    trainer = make_trainer("training.photometric=0", "training.photometric_min=1")
    inputs = draw(trainer, batch, 0)
    render = trainer.objective.render_patches(inputs.fakes_g)
    assert "loss_g_photometric" not in trainer.objective.generator_loss(inputs.fakes_g, render, inputs.reals, 3, 0)[1]


def test_learned_cameras_are_drawn_to_the_given_ones_and_act_on_every_patch(case):
    make_trainer, batch = case
    keys = ("training.match_views=true", "training.photometric=20")
    given, learned = (make_trainer(*keys, f"data.refine_cameras={on}") for on in ("false", "true"))
    inputs, losses = draw(given, batch, 0), {}
    learned.generator.load_state_dict(given.generator.state_dict(), strict=False)
    for angle in (0.0, 0.1):
        torch.nn.init.constant_(learned.generator.cameras.elevation, angle * STORED_FACTOR)
        for trainer in (given, learned):
            render = trainer.objective.render_patches(inputs.fakes_g)
            losses[trainer, angle] = trainer.objective.generator_loss(inputs.fakes_g, render, inputs.reals, 3, 0)
    loss, terms = losses[learned, 0.0]
    assert terms["loss_g_cameras"].item() == 0
    assert_close(loss, losses[given, 0.0][0])
    loss, terms = losses[learned, 0.1]
    heights = len(learned.generator.cameras.elevation)
    assert terms["loss_g_cameras"].item() == pytest.approx(PENALTY * heights * 0.1**2)
    assert not torch.allclose(terms["loss_g_photometric"], losses[given, 0.1][1]["loss_g_photometric"])
    rest = sum(weight * terms.get(name, torch.zeros(())) for name, weight in LEARNED_WEIGHTS.items())
    assert_close(loss, rest + terms["loss_g_cameras"])


@pytest.mark.parametrize(("every", "reg_every"), [(2, 8), (1, 8), (3, 2), (4, 6)])
def test_a_lazy_penalty_on_crops_weighs_as_much_as_one_in_every_step_that_has_crops(make_trainer, every, reg_every):
    keys = [f"ccsr.every={every}", f"training.reg_every={reg_every}", "data.imsize=16", "ccsr.enabled=true"]
    objective = make_trainer(*SUPER_RESOLUTION[:4], *keys).objective
    period = range(24)
    with_crops = sum(objective.super_resolution_is_due(step) for step in period)
    met = sum(objective.super_resolution_is_due(step) and objective.penalty_is_due(step) for step in period)
    assert met * reg_every * objective._share_of_crops == pytest.approx(with_crops)


def test_terms_of_parts_add_up_to_those_of_the_batch(case):
    make_trainer, batch = case
    trainer = make_trainer()
    inputs, objective = draw(trainer, batch, 0), trainer.objective

    def terms_of(part: StepInputs) -> dict[str, torch.Tensor]:
        fakes, reals = part.fakes_g, objective.cut_reals(part.reals)
        render = objective.render_patches(fakes)
        _, found = objective.discriminator_loss(reals, objective.cut_fakes(fakes, render.rgb), part.reals.views, 3)
        found |= objective.penalty_loss(reals, part.reals, render.rgb, 3, OFF)[1]
        found |= objective.generator_loss(fakes, render, part.reals, 3, 0)[1]
        if trainer.ccsr is not None:
            neighbours = objective.render_neighbours(fakes)
            found |= objective.super_resolution_loss(fakes, render, neighbours, part.reals, 3, 0)[1]
        return {name: value.detach() for name, value in found.items()}

    whole, parts = terms_of(inputs), [terms_of(inputs[:1]), terms_of(inputs[1:])]
    for name, value in whole.items():
        assert_close(
            parts[0][name] + parts[1][name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_where_nothing_is_asked_of_super_resolution_no_player_has_its_terms(case):
    make_trainer, batch = case
    trainer = make_trainer("ccsr.start_iteration=5")
    inputs, objective = draw(trainer, batch, 0), trainer.objective
    render = objective.render_patches(inputs.fakes_g)
    reals, fakes = objective.cut_reals(inputs.reals), objective.cut_fakes(inputs.fakes_g, render.rgb)
    assert len(reals) == len(fakes) == 1
    _, of_d = objective.discriminator_loss(reals, fakes, inputs.reals.views, 3)
    _, of_g = objective.generator_loss(inputs.fakes_g, render, inputs.reals, 3, 0)
    assert set(of_d) == {"loss_d", "d_real", "d_fake", "loss_d_class"}
    assert set(of_g) == {"loss_g", "loss_g_class"}
    assert objective.render_neighbours(inputs.fakes_g) is None


def test_known_instances_alone_learn_from_their_photographs_and_keep_short_codes(smoke_config, make_trainer):
    overrides = (
        "data.synthetic.instances=3",
        "data.synthetic.known_instances=2",
        "nerf.field=triplane",
        "training.lr_g=1e-2",
    )
    overrides += ("training.match_views=true", "training.photometric=20", "training.instance_prior=0.7")
    overrides += ("training.opacity=0.3",)
    data = builders.open_photographs(smoke_config(*overrides))
    trainer = make_trainer(*overrides, data=data)
    images, labels = zip(*(data[index] for index in range(0, len(data), 5)), strict=True)
    batch = torch.stack(images), torch.stack(labels)
    codes = trainer.generator.instances
    assert len(codes) == len(data.instance_names) == 8  # two of three instances in each of four classes
    torch.nn.init.normal_(codes)
    inputs, objective = draw(trainer, batch, 0), trainer.objective
    instance = inputs.fakes_g.instance
    assert bool((instance >= 0).any())
    assert bool((instance < 0).any())
    render = objective.render_patches(inputs.fakes_g)
    loss, terms = objective.generator_loss(inputs.fakes_g, render, inputs.reals, len(labels), 0)

    chosen = instance[instance >= 0]
    lengths = (codes[chosen] / STORED_SHARE).square().mean(1)
    assert_close(terms["loss_g_prior"], lengths.sum() / len(labels))
    seen = crop_images(batch[0], inputs.reals.patches, 16)[instance >= 0]
    distances = (render.rgb[instance >= 0] - seen).square().mean((1, 2, 3))
    assert_close(terms["loss_g_photometric"], distances.sum() / len(labels))
    assert_close(terms["loss_g_opacity"], render.opacity[instance >= 0].mean((1, 2, 3)).sum() / len(labels))
    others = 0.7 * terms["loss_g_prior"] + 0.3 * terms["loss_g_opacity"]
    assert_close(loss, terms["loss_g"] + 20 * terms["loss_g_photometric"] + others)

    same = objective.render_patches(replace(inputs.fakes_g, z=inputs.fakes_g.z + 9))
    assert torch.equal(same.rgb[instance >= 0], render.rgb[instance >= 0])
    loss.backward()
    moved = codes.grad.abs().sum(1) > 0
    assert torch.equal(torch.nonzero(moved)[:, 0], chosen.unique())
