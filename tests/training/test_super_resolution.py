"""Training CCSR: which losses it learns from, whose weights move, what D and G learn from it, schedules and resume."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from graf.app import builders
from graf.geometry.rays import Patches, crop_images, patch_grid
from graf.geometry.views import PoseSampler
from graf.geometry.volume_rendering import Render
from graf.geometry.warping import SurfaceView, warp_between
from graf.models.ccsr import BoxProjection, upsample
from graf.models.rrdb import RRDBTrunk
from graf.runtime.amp import Precision
from graf.runtime.checkpoint import read_checkpoint, restore, save_checkpoint
from graf.runtime.randomness import Draws
from graf.training import trainer as trainer_module
from graf.training.inputs import FakeInputs, RealInputs, StepSettings, SuperResolutionInputs
from graf.training.perceptual import PerceptualDistance, load_perceptual_distance
from graf.training.trainer import Trainer

#: 16 -> 32 pixels; a field opaque enough that neighbouring views see one surface
TINY = (
    *("data.imsize=16", "ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1", "nerf.density_bias=30"),
    *("nerf.raw_noise_std=0", "nerf.jitter=false", "training.lr_d=5e-4"),
    *("ccsr.agreement=0.3", "ccsr.photographs=0"),  # the latter is tested on its own
)
#: renders that show what the photographs show
MATCHED = ("training.match_views=true", "training.photometric=20")
SIDE, SCALE = 16, 2


@pytest.fixture(scope="module")
def photographs(smoke_config):
    """Photographs at the resolution of super-resolution."""
    return builders.open_photographs(smoke_config(*TINY))


@pytest.fixture
def make_trainer(make_trainer) -> Callable[..., Trainer]:
    """Build a trainer with CCSR."""
    return partial(make_trainer, *TINY)


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def moved(module: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]


def gradients_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in module.named_parameters()}


def views_around(*angles: int) -> set[int]:
    """The one or two of 8 views that a label angle lies between."""
    return {view % 8 for angle in angles for view in (angle % 360 // 45, -(-(angle % 360) // 45))}


def generate_from(trainer: Trainer, *angles: int) -> None:
    """Generated images take these label angles alone."""
    labels = torch.tensor([[0, 0, angle, -1] for angle in angles])
    trainer.inputs = replace(trainer.inputs, pose_sampler=PoseSampler(labels, trainer.inputs.pose_sampler.cameras))


def fakes_of(trainer: Trainer, count: int = 3, purpose: str = "g") -> FakeInputs:
    """The inputs that the trainer draws at its iteration."""
    iteration = trainer.progress.iteration
    return trainer.inputs.draw_fakes(
        Draws(trainer.config.seed, iteration, range(count)), purpose, trainer.settings_at(iteration)
    )


def reals_of(trainer: Trainer, images: torch.Tensor, labels: torch.Tensor) -> RealInputs:
    """The inputs of photographs that the trainer draws at its iteration."""
    iteration = trainer.progress.iteration
    draws = Draws(trainer.config.seed, iteration, range(len(images)))
    reals = trainer.inputs.draw_reals(draws, labels, trainer.settings_at(iteration))
    return trainer.inputs.cut_photographs(reals, images)


def corners_of(inputs: SuperResolutionInputs) -> list[tuple[int, int]]:
    """The first pixels (x, y) of crops of D's size."""
    return [(first % (SCALE * SIDE), first // (SCALE * SIDE)) for first in inputs.pixels[:, 0, 0].tolist()]


def render(trainer: Trainer, fakes: FakeInputs) -> Render:
    with torch.no_grad():
        return trainer.objective.render_patches(fakes)


def super_resolution_statistics(trainer: Trainer, fakes: FakeInputs, low: Render) -> dict[str, torch.Tensor]:
    """CCSR's terms on renders alone."""
    return trainer.objective.super_resolution_loss(fakes, low, None, None, len(fakes), 0)[1]


# ---------------------------------------------------------------- whose weights move


class Watch:
    """Keeps every network's gradients as they are just before CCSR is updated, and the weights of G and D at that time.

    The gradients of G and D are dropped right after G's update: what is there later comes from CCSR's.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.gradients: dict[str, dict[str, torch.Tensor | None]] = {}
        self.weights: dict[str, dict[str, torch.Tensor]] = {}
        networks = {"g": trainer.generator, "d": trainer.discriminator, "sr": trainer.ccsr}

        def drop(*_):
            for parameter in [*trainer.generator.parameters(), *trainer.discriminator.parameters()]:
                parameter.grad = None

        def keep(*_):
            self.gradients = {name: gradients_of(network) for name, network in networks.items()}
            self.weights = {name: weights_of(networks[name]) for name in ("g", "d")}

        trainer.g.optimizer.register_step_post_hook(drop)
        trainer.sr.optimizer.register_step_pre_hook(keep)

    def used_latents(self) -> set[int]:
        """The views whose latents have a gradient that is not zero."""
        prefix = "latents.views."
        return {
            int(name.removeprefix(prefix))
            for name, gradient in self.gradients["sr"].items()
            if name.startswith(prefix) and gradient is not None and bool((gradient != 0).any())
        }


@pytest.mark.parametrize(
    "overrides",
    [
        ("ccsr.agreement=0",),
        ("ccsr.agreement=1",),
        ("ccsr.agreement=0", "ccsr.photographs=1"),
        ("ccsr.agreement=0", "ccsr.adversarial=0"),
        ("ccsr.agreement=0", "ccsr.alpha_init=0", "ccsr.alpha_min=0"),
        ("ccsr.agreement=0", "ccsr.trunk=rrdb"),
        ("ccsr.agreement=0", "ccsr.kernel=[0.125,0.375,0.375,0.125]", "training.share_fakes=true"),
    ],
    ids=" ".join,
)
def test_one_step_teaches_every_parameter_of_ccsr_and_exactly_the_used_latents(
    make_trainer, batches, photographs, overrides
):
    trainer = make_trainer(*overrides)
    generate_from(trainer, 20, 170, 181)
    ((images, labels),) = batches(1, size=3, data=photographs)
    labels[:, 2] = torch.tensor([90, 100, 100])  # of the photographs
    watch, fakes = Watch(trainer), fakes_of(trainer)
    trainer.step(images, labels)
    angles = fakes.views.labels[:, 2]
    if "ccsr.agreement=1" in overrides:
        angles = torch.cat([angles, fakes.super_resolution.neighbours.labels[:, 2]])
    if "ccsr.photographs=1" in overrides:
        angles = torch.cat([angles, labels[:, 2]])
    used = views_around(*angles.tolist())
    assert 0 < len(used) < 8
    assert watch.used_latents() == used
    for name, gradient in watch.gradients["sr"].items():
        if name.startswith("latents") and int(name.rpartition(".")[2]) not in used:
            assert gradient is None, name
        else:
            assert gradient is not None, name
            assert gradient.abs().max() > 0, name
    assert all(gradient is None for name in ("g", "d") for gradient in watch.gradients[name].values())
    assert moved(trainer.generator, watch.weights["g"]) == moved(trainer.discriminator, watch.weights["d"]) == []
    assert all(parameter.requires_grad for parameter in trainer.discriminator.parameters())


def test_photographs_are_restored_from_their_own_reductions(make_trainer, batches, photographs):
    ((images, labels),) = batches(1, size=3, data=photographs)
    trainer = make_trainer("ccsr.photographs=1", "ccsr.agreement=0")
    assert trainer.ccsr is not None
    reals = reals_of(trainer, images, labels)
    truth = crop_images(images, reals.patches, SCALE * SIDE)
    with torch.no_grad():
        found = trainer.ccsr(functional.avg_pool2d(truth, SCALE), labels[:, 2], reals.patches).image
    expected = (found - truth).abs().mean()
    assert 0 < float(expected) < 1
    assert_close(trainer.step(images, labels)["loss_sr_photographs"], expected, rtol=1e-5, atol=1e-6)
    for _ in range(40):
        loss = trainer.step(images, labels)["loss_sr_photographs"]
    assert loss < 0.95 * expected


def test_super_resolved_renders_learn_from_the_photographs_of_their_objects(smoke_config, make_trainer):
    """Those of known instances alone, at the places where the photographs' patches lie."""
    some_known = ("data.synthetic.instances=3", "data.synthetic.known_instances=2", "ccsr.photometric=1", *MATCHED)
    data = builders.open_photographs(smoke_config(*TINY, *some_known))
    trainer = make_trainer(*some_known, "ccsr.agreement=0", "ray_sampler.snap=true", data=data)
    images, labels = map(torch.stack, zip(*(data[index] for index in range(0, len(data), 5)), strict=True))
    inputs = trainer.inputs.draw(Draws(0, 0, range(len(labels))), images, labels, trainer.settings_at(0))
    fakes, low = inputs.fakes_g, render(trainer, inputs.fakes_g)
    known = fakes.instance >= 0
    assert 0 < int(known.sum()) < len(known)
    _, terms = trainer.objective.super_resolution_loss(fakes, low, None, inputs.reals, len(labels), 0)

    latents = fakes.super_resolution.latents
    with torch.no_grad():
        found = trainer.ccsr(low.rgb, latents, fakes.patches).image
    distances = []
    for row in known.nonzero()[:, 0].tolist():
        truth = crop_images(images[row : row + 1], inputs.reals.patches[row : row + 1], SCALE * SIDE)
        distances.append((found[row] - truth[0]).square().mean())
    assert_close(
        terms["loss_sr_photometric"].detach(), torch.stack(distances).sum() / len(labels), atol=1e-5, rtol=1e-4
    )


def test_unused_latents_stand_still_under_adam_with_momentum(make_trainer, batches, photographs):
    trainer = make_trainer("training.optimizer=adam", "ccsr.agreement=0")
    assert trainer.ccsr is not None
    assert trainer.sr is not None
    first, second, third, fourth = batches(4, size=3, data=photographs)
    assert trainer.sr.betas == (0.9, 0.99)
    assert trainer.g.betas == (0.0, 0.99)
    views = trainer.ccsr.latents.views
    for angle, batch in ((45, first), (95, second)):
        generate_from(trainer, angle)
        trainer.step(*batch)
    assert all(bool(trainer.sr.optimizer.state[views[view]]["exp_avg"].any()) for view in (1, 2, 3))
    before = weights_of(trainer.ccsr)
    generate_from(trainer, 45)
    for batch in (third, fourth):
        trainer.step(*batch)
    names = [name for name in moved(trainer.ccsr, before) if name.startswith("latents")]
    assert names == ["latents.views.1"]
    assert [trainer.sr.optimizer.state[views[view]]["step"].item() for view in (1, 2, 3)] == [3, 1, 1]


def test_a_frozen_trunk_stands_still_while_the_latents_learn(make_trainer, batches, photographs, tmp_path):
    torch.save(RRDBTrunk(2, 4, 2, 1).state_dict(), tmp_path / "esrgan.pth")
    trainer = make_trainer("ccsr.trunk=rrdb", f"ccsr.weights={tmp_path / 'esrgan.pth'}", "ccsr.freeze_trunk=true")
    assert trainer.ccsr is not None
    before = weights_of(trainer.ccsr)
    loaded = torch.load(tmp_path / "esrgan.pth", weights_only=True)
    assert torch.equal(trainer.ccsr.state_dict()["trunk.trunk.conv_first.weight"], loaded["conv_first.weight"])
    for batch in batches(2, size=3, data=photographs):
        trainer.step(*batch)
    changed = moved(trainer.ccsr, before)
    assert changed
    assert all(name.startswith("latents") for name in changed)
    assert all(parameter.grad is None for parameter in trainer.ccsr.trunk.parameters())
    assert not any(parameter.requires_grad for parameter in trainer.ccsr.trunk.parameters())
    assert trainer.sr is not None
    assert {id(parameter) for parameter in trainer.sr.parameters} == {id(view) for view in trainer.ccsr.latents.views}


def test_the_steps_of_g_and_d_leave_ccsr_alone(make_trainer, batches, photographs):
    trainer = make_trainer("ccsr.supervise_generator=1")
    assert trainer.ccsr is not None
    before = weights_of(trainer.ccsr)
    seen = []

    def look(*_):
        seen.append(
            (moved(trainer.ccsr, before), [name for name, g in gradients_of(trainer.ccsr).items() if g is not None])
        )

    trainer.d.optimizer.register_step_post_hook(look)
    trainer.g.optimizer.register_step_post_hook(look)
    for batch in batches(1, data=photographs):
        trainer.step(*batch)
    assert seen == [([], []), ([], [])]
    assert moved(trainer.ccsr, before)


# ---------------------------------------------------------------- supervision of the generator


def test_supervision_renders_the_crop_finely_and_compares_it_with_the_super_resolved_one(
    make_trainer, batches, photographs
):
    trainer = make_trainer("ccsr.supervise_generator=1", "nerf.density_bias=2")
    assert trainer.ccsr is not None
    fakes = fakes_of(trainer)
    ((images, labels),) = batches(1, size=3, data=photographs)
    reals = reals_of(trainer, images, labels)
    rendered = render(trainer, fakes)
    low = rendered.rgb
    with torch.no_grad():
        fine = trainer.ccsr(low, fakes.views.labels[:, 2], fakes.patches).image
    corner = corners_of(fakes.super_resolution)
    grid = patch_grid(fakes.patches, SCALE * SIDE)
    crops = torch.stack([fine[i, :, y : y + SIDE, x : x + SIDE] for i, (x, y) in enumerate(corner)])
    grids = torch.stack([grid[i, y : y + SIDE, x : x + SIDE] for i, (x, y) in enumerate(corner)])
    rays = trainer.objective.caster.cast(fakes.views.poses, grids)
    finer = trainer.generator(fakes.z, fakes.views.class_idx, rays, fakes.noise).as_images().rgb
    found = trainer.objective.generator_loss(fakes, rendered, reals, 3, 0)[1]["loss_g_supervision"]
    assert_close(found, (finer - crops).square().mean(), rtol=1e-4, atol=1e-7)
    assert found > 1e-3
    of_g = torch.autograd.grad(found, list(trainer.generator.parameters()), retain_graph=True)
    assert all(bool((gradient != 0).any()) for gradient in of_g)
    of_ccsr = torch.autograd.grad(found, list(trainer.ccsr.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in of_ccsr)


def test_only_with_supervision_does_the_generator_learn_from_super_resolution(make_trainer, batches, photographs):
    ((images, labels),) = batches(1, data=photographs)

    def g_gradients(weight: float, spoil: float) -> tuple[dict[str, torch.Tensor | None], set[str]]:
        trainer = make_trainer(f"ccsr.supervise_generator={weight}", "ccsr.start_iteration=0")
        assert trainer.ccsr is not None
        for view in trainer.ccsr.latents.views:
            nn.init.normal_(view, std=spoil)
        # D must not carry the difference over to G
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.d.optimizer, "step", lambda: None)
            kept: dict[str, torch.Tensor | None] = {}
            trainer.g.optimizer.register_step_pre_hook(lambda *_: kept.update(gradients_of(trainer.generator)))
            statistics = trainer.step(images, labels)
        return kept, set(statistics)

    alone, names = g_gradients(0, 0.1)
    spoiled, _ = g_gradients(0, 1.0)
    assert "loss_g_supervision" not in names
    assert all(torch.equal(alone[name], spoiled[name]) for name in alone)
    supervised, names = g_gradients(3, 0.1)
    otherwise, _ = g_gradients(3, 1.0)
    assert "loss_g_supervision" in names
    assert not all(torch.equal(alone[name], supervised[name]) for name in alone)
    assert not all(torch.equal(otherwise[name], supervised[name]) for name in alone)


# ---------------------------------------------------------------- consistency


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_consistency_is_taken_before_the_projection_after_which_it_would_be_zero(make_trainer, dtype):
    trainer = make_trainer(precision=Precision("cpu", dtype))
    fakes = fakes_of(trainer)
    low = render(trainer, fakes)
    with torch.no_grad():
        image, unprojected = trainer.objective.super_resolve(low.rgb, fakes.super_resolution.latents, fakes.patches)
        found = super_resolution_statistics(trainer, fakes, low)["loss_sr_consistency"]
    assert image.dtype == unprojected.dtype == found.dtype == torch.float32
    expected = (functional.avg_pool2d(unprojected, SCALE) - low.rgb).square().mean()
    assert_close(found, expected)
    assert found > 1e-4
    limit = 1e-6 * max(1.0, float(unprojected.abs().max()))
    assert (functional.avg_pool2d(image, SCALE) - low.rgb).abs().max() <= limit


def consistency_weight(make_trainer, iteration: int, initial: float, smallest: float, decay: float) -> float:
    keys = (f"ccsr.alpha_init={initial}", f"ccsr.alpha_min={smallest}", f"ccsr.alpha_decay={decay}")
    return make_trainer(*keys).objective.settings.super_resolution.consistency_weight(iteration)


def test_the_consistency_weight_decays_to_its_floor(make_trainer):
    for iteration, expected in ((0, 10.0), (1000, 10 / math.e), (2000, 10 / math.e**2), (3000, 1.0), (10**6, 1.0)):
        assert consistency_weight(make_trainer, iteration, 10.0, 1.0, 1e-3) == pytest.approx(expected)
    assert consistency_weight(make_trainer, 5000, 3.0, 0.0, 0.0) == 3.0
    assert consistency_weight(make_trainer, 0, 1.0, 2.0, 0.1) == 2.0


def test_the_step_weighs_consistency_with_the_schedule_at_its_iteration(make_trainer, batches, photographs):
    ((images, labels),) = batches(1, data=photographs)

    def norm(iteration: int, initial: float, smallest: float, decay: float) -> float:
        keys = (f"ccsr.alpha_init={initial}", f"ccsr.alpha_min={smallest}", f"ccsr.alpha_decay={decay}")
        trainer = make_trainer("ccsr.adversarial=0", "ccsr.agreement=0", *keys)
        trainer.progress.iteration = iteration
        return float(trainer.step(images, labels)["grad_norm_sr"])

    one = norm(100, 1, 0, 0)
    assert one > 0
    assert norm(100, 10, 0.1, 0.02) == pytest.approx(10 * math.exp(-2) * one, rel=1e-4)
    assert norm(100, 10, 0.5, 1) == pytest.approx(0.5 * one, rel=1e-4)


@pytest.mark.parametrize("key", ["ccsr.adversarial", "ccsr.agreement", "ccsr.photographs"])
def test_the_weights_of_the_other_terms_scale_their_gradients(make_trainer, batches, photographs, key):
    ((images, labels),) = batches(1, data=photographs)

    def norm(weight: float) -> float:
        others = [f"{other}=0" for other in ("ccsr.adversarial", "ccsr.agreement", "ccsr.alpha_init", "ccsr.alpha_min")]
        trainer = make_trainer(*others, f"{key}={weight}")
        generate_from(trainer, 20, 200)
        return float(trainer.step(images, labels)["grad_norm_sr"])

    assert norm(1) > 0
    assert norm(3) == pytest.approx(3 * norm(1), rel=1e-4)


# ---------------------------------------------------------------- crops


@pytest.mark.parametrize("factor", [2, 4])
def test_super_resolved_crops_are_slices_that_lie_where_they_say(make_trainer, factor):
    """An image of its own places in the image plane is cropped to the places that D is told."""
    trainer, count, width = make_trainer(f"ccsr.scale={factor}"), 200, factor * SIDE
    fakes = fakes_of(trainer, count)
    x, y = patch_grid(fakes.patches, width).unbind(-1)
    image = torch.stack([x, y, torch.rand_like(x)], 1)
    inputs = fakes.super_resolution
    crops = trainer.objective._label_crops(image, inputs, inputs.augment)
    found = crops.images
    corner = [(first % width, first // width) for first in inputs.pixels[:, 0, 0].tolist()]
    for axis in range(2):
        assert {place[axis] for place in corner} == set(range((factor - 1) * SIDE + 1))
    for i, (left, top) in enumerate(corner):
        assert torch.equal(found[i], image[i, :, top : top + SIDE, left : left + SIDE])
    assert_close(found[:, :2].permute(0, 2, 3, 1), patch_grid(inputs.crop, SIDE), atol=1e-6, rtol=0)
    assert_close(inputs.crop.scale, fakes.patches.scale / factor)
    said = trainer.discriminator.shape.describe(fakes.views, inputs.crop)
    assert torch.equal(crops.condition.features, said.features)
    assert torch.equal(crops.condition.class_idx, fakes.views.class_idx)


def test_real_crops_show_the_photographs_where_they_say(make_trainer):
    trainer = make_trainer()
    rows = torch.arange(SCALE * SIDE) * 2.0 / (SCALE * SIDE) - 1 + 1 / (SCALE * SIDE)
    photograph = torch.stack([rows.expand(32, -1), rows[:, None].expand(-1, 32), torch.zeros(32, 32)])
    settings = StepSettings(0.4, 0.9, 0, super_resolve=True)
    reals = trainer.inputs.draw_reals(Draws(0, 0, range(4)), torch.tensor([[0, 0, 10, -1]] * 4), settings)
    reals = trainer.inputs.cut_photographs(reals, photograph.repeat(4, 1, 1, 1))
    _, crops = trainer.objective.cut_reals(reals)
    found, place = crops.images, reals.super_resolution.crop
    assert found.shape == (4, 3, SIDE, SIDE)
    assert_close(place.scale, reals.patches.scale / SCALE)
    inner = place.centre.abs() + place.scale[:, None] < 1 - 1 / (SCALE * SIDE)  # the outermost half pixel is the edge's
    expected = patch_grid(place, SIDE).permute(0, 3, 1, 2)
    assert bool(inner.all(1).any())
    assert_close(found[:, :2][inner], expected[inner], atol=1e-5, rtol=0)
    assert bool(((place.centre - reals.patches.centre).abs() <= 0.5 * reals.patches.scale[:, None] + 1e-6).all())
    assert torch.equal(crops.condition.features, trainer.discriminator.shape.describe(reals.views, place).features)


def test_real_low_resolution_patches_are_block_means_of_the_photographs(make_trainer, batches, photographs):
    trainer = make_trainer()
    ((images, labels),) = batches(1, size=4, data=photographs)
    assert images.shape == (4, 3, 32, 32)
    reals = trainer.inputs.draw_reals(Draws(0, 0, range(4)), labels, StepSettings(0.5, 1.0, 0))
    cut = trainer.inputs.cut_photographs
    (patches,) = trainer.objective.cut_reals(cut(reals, images))
    assert_close(
        patches.images, crop_images(functional.avg_pool2d(images, SCALE), reals.patches, SIDE), atol=1e-6, rtol=0
    )
    assert patches.condition is reals.condition
    (whole,) = trainer.objective.cut_reals(cut(replace(reals, patches=Patches.whole(4)), images))
    assert_close(whole.images, functional.avg_pool2d(images, SCALE), atol=1e-6, rtol=0)


# ---------------------------------------------------------------- what D learns


def test_the_discriminators_loss_is_that_of_both_resolutions(make_trainer, batches, photographs, monkeypatch):
    trainer = make_trainer("discriminator.class_loss=1")
    assert trainer.ccsr is not None
    ((images, labels),) = batches(1, size=3, data=photographs)
    reals = reals_of(trainer, images, labels)
    fakes = fakes_of(trainer, purpose="d")
    low = render(trainer, fakes).rgb
    calls, forward = [], trainer.discriminator.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            trainer.discriminator,
            "forward",
            lambda patches, said: calls.append((patches, said)) or forward(patches, said),
        )
        cut = trainer.objective.cut_reals(reals)
        loss, terms = trainer.objective.discriminator_loss(cut, trainer.objective.cut_fakes(fakes, low), reals.views, 3)
    ((patches, said),) = calls  # all at once
    assert patches.shape == (12, 3, SIDE, SIDE)
    calls = [(patches[first : first + 3], said[first : first + 3]) for first in range(0, 12, 3)]
    _, (_, said_real), (fake, said_low), (fine_fake, said_fine) = calls
    with torch.no_grad():
        image = trainer.ccsr(low, fakes.views.labels[:, 2], fakes.patches).image
    corner = corners_of(fakes.super_resolution)
    assert torch.equal(fine_fake, torch.stack([image[i, :, y : y + 16, x : x + 16] for i, (x, y) in enumerate(corner)]))
    assert torch.equal(fake, low)
    for fine, low_condition in (
        (said_fine, said_low),
        (said_real, reals.condition),
    ):  # the scale's logarithm comes first
        assert_close(fine.features[:, 0], low_condition.features[:, 0] - math.log2(SCALE))

    with torch.no_grad():
        on_real, on_fine_real, on_fake, on_fine_fake = (forward(*call) for call in calls)
    low_loss = functional.softplus(-on_real[0]).mean() + functional.softplus(on_fake[0]).mean()
    fine_loss = functional.softplus(-on_fine_real[0]).mean() + functional.softplus(on_fine_fake[0]).mean()
    assert_close(terms["loss_d"].detach(), low_loss + fine_loss)
    assert_close(terms["d_real"], torch.sigmoid(on_real[0]).mean())
    assert_close(terms["d_real_sr"], torch.sigmoid(on_fine_real[0]).mean())
    assert_close(terms["d_fake_sr"], torch.sigmoid(on_fine_fake[0]).mean())
    class_loss = sum(trainer.objective._class_loss(on[1], labels).mean() for on in (on_real, on_fine_real))
    assert_close(terms["loss_d_class"].detach(), class_loss)
    assert_close(loss.detach(), low_loss + fine_loss + class_loss)
    loss.backward()
    assert all(parameter.grad is None for parameter in trainer.ccsr.parameters())
    assert all(parameter.grad is None for parameter in trainer.generator.parameters())

    def r1(patches, said):
        point = patches.detach().clone().requires_grad_(True)
        return torch.autograd.grad(forward(point, said)[0].sum(), point)[0].square().sum() / 3

    expected = r1(*calls[0]) + r1(*calls[1])
    loss, terms = trainer.objective.penalty_loss(cut, reals, low, 3, trainer.d.scaler)
    assert_close(terms["penalty"].detach(), expected, rtol=1e-4, atol=1e-7)
    training = trainer.config.training
    assert_close(loss.detach(), training.reg_param * training.reg_every * expected, rtol=1e-4, atol=1e-7)


def test_ccsr_is_told_by_d_how_real_its_crops_look(make_trainer):
    trainer = make_trainer()
    fakes = fakes_of(trainer)
    low = render(trainer, fakes)
    with torch.no_grad():
        image, _ = trainer.objective.super_resolve(low.rgb, fakes.super_resolution.latents, fakes.patches)
        inputs = fakes.super_resolution
        crops = trainer.objective._label_crops(image, inputs, inputs.augment)
        logits, _ = trainer.discriminator(crops.images, crops.condition)
    found = super_resolution_statistics(trainer, fakes, low)["loss_sr"]
    assert_close(found.detach(), functional.softplus(-logits).mean())


@pytest.mark.parametrize("iteration", [0, 700])
def test_ccsrs_loss_is_the_weighted_sum_of_its_terms(make_trainer, batches, photographs, iteration):
    keys = ("ccsr.adversarial=0.3", "ccsr.agreement=0.7", "ccsr.photographs=11", "ccsr.photometric=7")
    trainer = make_trainer(*keys, "ccsr.alpha_init=5", *MATCHED)
    trainer.progress.iteration = iteration
    ((images, labels),) = batches(1, size=3, data=photographs)
    fakes, objective = fakes_of(trainer), trainer.objective
    low, neighbours = render(trainer, fakes), objective.render_neighbours(fakes)
    loss, terms = objective.super_resolution_loss(
        fakes, low, neighbours, reals_of(trainer, images, labels), 3, iteration
    )
    weights = {
        "loss_sr_consistency": max(1.0, 5 * math.exp(-1e-3 * iteration)),
        "loss_sr": 0.3,
        "loss_sr_agreement": 0.7,
        "loss_sr_photographs": 11.0,
        "loss_sr_photometric": 7.0,
    }
    assert terms.keys() == weights.keys()
    assert_close(loss, sum(weight * terms[name] for name, weight in weights.items()))


def test_a_bfloat16_step_stays_near_the_float32_one(make_trainer, batches, photographs):
    exact, half = make_trainer(), make_trainer(precision=Precision("cpu", torch.bfloat16))
    ((images, labels),) = batches(1, data=photographs)
    expected, found = exact.step(images, labels), half.step(images, labels)
    for name in ("loss_d", "loss_sr", "loss_sr_consistency"):
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=0.05), name
        assert found[name].dtype == torch.float32


# ---------------------------------------------------------------- agreement of neighbouring views


class Ball(nn.Module):
    """An opaque ball around the origin, painted by place; beside it is nothing, in the paint at the origin."""

    def __init__(self, paint: Callable[[torch.Tensor], torch.Tensor], radius: float = 0.75) -> None:
        super().__init__()
        self.paint, self.radius = paint, radius

    def aim(self, views, patches):
        return views.poses, patches

    def codes(self, z, instance):
        return z

    def forward(self, z, class_idx, rays, *noise, **options):
        middle = -(rays.origins * rays.directions).sum(-1, keepdim=True)
        inside = self.radius**2 - rays.origins.square().sum(-1, keepdim=True) + middle.square()
        opacity = (inside > 0).float()
        distance = torch.where(inside > 0, middle - inside.clamp(min=0).sqrt(), rays.far)
        points = (rays.origins + distance * rays.directions) * opacity
        return Render(self.paint(points), distance * rays.axis_cosine, opacity)


def marble(points: torch.Tensor) -> torch.Tensor:
    return 0.7 * torch.sin(4 * points + 1)


def grey(points: torch.Tensor) -> torch.Tensor:
    return torch.full_like(points, 0.3)


@pytest.fixture
def make_scene(make_trainer):
    """An objective whose generator is a ball, seen whole from label angle 0, neighbours at 45 degrees, and inputs."""

    def make(paint, radius: float = 0.75, turn: float = 1.0):
        trainer = make_trainer("ccsr.agreement=1", "ccsr.agreement_degrees=45", "data.imsize=16")
        generate_from(trainer, 0)
        fakes = replace(fakes_of(trainer, 2), patches=Patches.whole(2))
        return replace(trainer.objective, generator=Ball(paint, radius)), turn_neighbours(trainer.ccsr, fakes, turn)

    return make


def turn_neighbours(ccsr, fakes: FakeInputs, turn: float) -> FakeInputs:
    """The same inputs with neighbours 45 degrees times `turn` further."""
    neighbours = fakes.views.turn(45 * torch.full((len(fakes),), turn))
    latents = ccsr.latents.mix(neighbours.labels[:, 2])
    inputs = replace(fakes.super_resolution, neighbours=neighbours, neighbour_latents=latents)
    return replace(fakes, super_resolution=inputs)


def agreement(objective, fakes: FakeInputs) -> torch.Tensor:
    neighbours = objective.render_neighbours(fakes)
    _, terms = objective.super_resolution_loss(fakes, objective.render_patches(fakes), neighbours, None, 2, 0)
    return terms["loss_sr_agreement"]


def make_bicubic(ccsr) -> None:
    """CCSR that adds nothing to bicubic upsampling."""
    for parameter in [*ccsr.trunk.last.parameters(), *ccsr.latents.parameters()]:
        nn.init.zeros_(parameter)


def test_views_of_one_colour_agree_until_their_latents_differ(make_scene):
    objective, fakes = make_scene(grey)
    make_bicubic(objective.ccsr)
    assert agreement(objective, fakes) < 1e-6
    nn.init.normal_(objective.ccsr.latents.views[1])
    assert agreement(objective, fakes) > 0.05
    nn.init.zeros_(objective.ccsr.latents.views[1])
    nn.init.normal_(objective.ccsr.latents.views[4])  # not in sight
    assert agreement(objective, fakes) < 1e-6


class KeepFree(BoxProjection):
    """A projection that leaves the trunk's output as it is."""

    def forward(self, images, target):
        return images


def test_what_the_renders_themselves_disagree_by_is_not_asked_of_super_resolution(make_scene):
    objective, fakes = make_scene(marble)
    make_bicubic(objective.ccsr)
    objective.ccsr.projection = KeepFree(SCALE)
    here, there = objective.render_patches(fakes), objective.render_neighbours(fakes)
    views = fakes.super_resolution.neighbours

    def disagreement(images, others) -> torch.Tensor:
        surfaces = (
            SurfaceView.from_render(low, seen.poses, fakes.patches, objective.caster, image)
            for image, low, seen in ((images, here, fakes.views), (others, there, views))
        )
        warped, mask = warp_between(*surfaces, objective.caster.intrinsics)
        return ((images - warped).abs() * mask).sum((1, 2, 3)) / (3 * mask.sum((1, 2, 3)))

    bicubic = [upsample(low.rgb, SCALE) for low in (here, there)]
    assert (disagreement(*bicubic) > 0.005).all()
    assert agreement(objective, fakes) == 0
    # Detail in one view alone counts; where it happens to make the views agree, nothing is credited.
    image = bicubic[0] + 0.3 * torch.randn_like(bicubic[0])
    added = objective._disagreement(fakes, here, image, there, bicubic[1])
    assert (added >= disagreement(image, bicubic[1]) - disagreement(*bicubic) - 1e-6).all()
    assert (added > 0.1).all()


def test_a_view_agrees_with_itself_whatever_ccsr_makes_of_it(make_scene):
    objective, fakes = make_scene(marble, turn=0.0)
    assert agreement(objective, fakes) < 1e-3
    assert agreement(objective, turn_neighbours(objective.ccsr, fakes, 1.0)) > 0.02


@pytest.mark.parametrize("turn", [1.0, -1.0])
def test_disagreement_teaches_the_latents_of_both_views(make_scene, turn):
    objective, fakes = make_scene(marble, turn=turn)
    agreement(objective, fakes).backward()
    gradients = {number: view.grad for number, view in enumerate(objective.ccsr.latents.views) if view.grad is not None}
    assert set(gradients) == {0, 1 if turn > 0 else 7}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_what_only_one_view_sees_is_not_compared(make_scene):
    objective, fakes = make_scene(marble)
    low = objective.render_patches(fakes)
    there, inputs = objective.render_neighbours(fakes), fakes.super_resolution
    image, _ = objective.super_resolve(low.rgb, inputs.latents, fakes.patches)
    other, _ = objective.super_resolve(there.rgb, inputs.neighbour_latents, fakes.patches)
    image = image.detach().requires_grad_(True)
    objective._disagreement(fakes, low, image, there, other).sum().backward()
    compared = (image.grad != 0).any(1)
    assert compared.flatten(1).any(dim=1).all()
    seen = functional.interpolate(low.opacity, scale_factor=SCALE, mode="nearest")[:, 0] > 0
    assert not bool((compared & ~seen).any())
    # The neighbour stands 45 degrees further: of the ball's visible half it cannot see the far side.
    left, right = compared[..., : SIDE // 2].sum(), compared[..., -SIDE // 2 :].sum()
    assert right > 2 * left


def test_views_without_a_surface_neither_agree_nor_disagree(make_scene):
    objective, fakes = make_scene(marble, radius=0.0)
    loss = agreement(objective, fakes)
    assert loss == 0
    loss.backward()
    assert all(view.grad is None or not view.grad.any() for view in objective.ccsr.latents.views)


# ---------------------------------------------------------------- the perceptual term


def test_the_perceptual_term_compares_with_the_upsampled_render(make_trainer, batches, photographs, monkeypatch):
    class Squares(nn.Module):
        def forward(self, a, b):
            return (a - b).square().mean((1, 2, 3), keepdim=True)

    distance = PerceptualDistance(Squares())
    images, low = torch.rand(3, 3, 32, 32), torch.rand(3, 3, 16, 16)
    bicubic = functional.interpolate(low, scale_factor=2, mode="bicubic", align_corners=False)
    assert_close(distance(images, low), (images - bicubic).square().mean((1, 2, 3)))

    monkeypatch.setattr(trainer_module, "load_perceptual_distance", lambda device: distance)
    ((images, labels),) = batches(1, data=photographs)
    norms = []
    for weight in (0, 0.5, 1.5):
        keys = ("ccsr.adversarial=0", "ccsr.agreement=0", "ccsr.alpha_init=0", "ccsr.alpha_min=0")
        statistics = make_trainer(*keys, f"ccsr.perceptual={weight}").step(images, labels)
        assert ("loss_sr_perceptual" in statistics) == (weight > 0)
        norms.append(float(statistics["grad_norm_sr"]))
    assert norms[0] == 0
    assert norms[2] == pytest.approx(3 * norms[1], rel=1e-4)
    assert norms[1] > 0


def test_without_lpips_training_goes_on_and_says_so(monkeypatch):
    said = []
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr("graf.training.perceptual.warn_once", said.append)
    assert load_perceptual_distance(torch.device("cpu")) is None
    (message,) = said
    assert "ccsr.perceptual" in message
    assert "pip install lpips" in message


# ---------------------------------------------------------------- schedules, average, resume, scalers


def test_ccsr_starts_late_and_moves_at_every_nth_iteration(make_trainer, batches, photographs):
    trainer = make_trainer("ccsr.start_iteration=2", "ccsr.every=3")
    assert trainer.ccsr is not None
    when = []
    for iteration, batch in enumerate(batches(7, data=photographs)):
        before = weights_of(trainer.ccsr)
        statistics = trainer.step(*batch)
        assert ("loss_sr" in statistics) == ("grad_norm_sr" in statistics) == bool(moved(trainer.ccsr, before))
        if moved(trainer.ccsr, before):
            when.append(iteration)
    assert when == [3, 6]


def test_the_average_follows_ccsr_once_a_step(make_trainer, batches, photographs):
    trainer = make_trainer("training.model_average_beta=0.5")
    assert trainer.ccsr is not None
    assert trainer.sr_average is not None
    expected = weights_of(trainer.ccsr)
    for number, batch in enumerate(batches(3, data=photographs)):
        trainer.step(*batch)
        beta = min(0.5, (1 + number) / (10 + number))
        current = weights_of(trainer.ccsr)
        expected = {name: beta * value + (1 - beta) * current[name] for name, value in expected.items()}
    averaged = trainer.averaged_networks[1]
    assert averaged is trainer.sr_average.module
    for name, value in averaged.state_dict().items():
        assert_close(value, expected[name])
    assert moved(averaged, weights_of(trainer.ccsr))


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(make_trainer, batches, photographs, tmp_path):
    options = ("training.optimizer=adam", "ccsr.betas=[0.5,0.99]", "ccsr.start_iteration=1", "ccsr.every=2")
    unbroken, first, resumed = (make_trainer(*options) for _ in range(3))
    assert set(unbroken.state) >= {"ccsr", "optimizer_sr", "scaler_sr", "ccsr_average", "averages"}
    for batch in batches(4, data=photographs):
        unbroken.step(*batch)
    for batch in batches(2, data=photographs):
        first.step(*batch)
    save_checkpoint(tmp_path / "model.pt", first.state, {})
    for parameter in resumed.ccsr.parameters():
        nn.init.normal_(parameter)
    restore(read_checkpoint(tmp_path / "model.pt"), resumed.state, "model.pt")
    for batch in batches(2, start=2, data=photographs):
        resumed.step(*batch)

    def compare(a: object, b: object, where: str) -> None:
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), where
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                compare(a[key], b[key], f"{where}.{key}")
        elif where not in ("progress.seconds",):
            assert a == b, where

    for name, stateful in unbroken.state.items():
        compare(stateful.state_dict(), resumed.state[name].state_dict(), name)


def with_scalers(trainer: Trainer) -> Trainer:
    """The trainer with an enabled scaler for each player, as float16 has on CUDA; its own arithmetic stays float32."""
    scalers = pytest.importorskip("torch.amp.grad_scaler")  # torch 2.3
    for player in trainer.players:
        player.scaler = scalers.GradScaler("cpu", init_scale=1024.0)
    return trainer


@pytest.mark.parametrize("victim", ["d", "g", "sr"])
def test_an_inf_skips_and_rescales_its_own_player_of_three(make_trainer, batches, photographs, victim):
    trainer = with_scalers(make_trainer())
    first, second = batches(2, data=photographs)
    trainer.step(*first)
    before = {player.suffix: weights_of(player.network) for player in trainer.players}
    (hurt,) = (player for player in trainer.players if player.suffix == victim)
    handle = next(hurt.network.parameters()).register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    trainer.step(*second)
    handle.remove()
    for player in trainer.players:
        assert bool(moved(player.network, before[player.suffix])) == (player is not hurt), player.name
        assert player.scaler.get_scale() == (512.0 if player is hurt else 1024.0), player.name
        assert player.skipped == (1 if player is hurt else 0), player.name


def test_scaling_changes_neither_losses_nor_gradients_of_ccsr(make_trainer, batches, photographs):
    plain, scaled = make_trainer(), with_scalers(make_trainer())
    ((images, labels),) = batches(1, data=photographs)
    expected, found = plain.step(images, labels), scaled.step(images, labels)
    for name in ("loss_sr", "loss_sr_consistency", "loss_sr_agreement", "grad_norm_sr"):
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-3, abs=1e-6), name


def test_the_log_has_ccsrs_learning_rate_and_loss_scale(make_trainer, batches, photographs):
    trainer = make_trainer("ccsr.lr=0.003", "training.lr_schedule=multistep", "training.lr_anneal_every=[1]")
    rows = [trainer.scalars_of(trainer.step(*batch)) for batch in batches(2, data=photographs)]
    assert [row["lr_sr"] for row in rows] == pytest.approx([0.003, 0.0015])
    assert rows[1]["scale_sr"] == 1
    assert {"loss_sr", "loss_sr_consistency", "loss_sr_agreement", "grad_norm_sr", "d_fake_sr"} <= set(rows[0])
