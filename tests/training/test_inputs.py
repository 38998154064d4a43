"""Random inputs of a step: row i belongs to sample i of the iteration, whatever batch it is drawn in."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from graf.data.labels import balance_instances
from graf.geometry.rays import Patches
from graf.geometry.views import Cameras, PoseRanges, PoseSampler
from graf.geometry.volume_rendering import RayNoise, RaySampling
from graf.models.ccsr import CCSR, BoxProjection, ConvTrunk, ViewLatents
from graf.models.discriminator import DiscriminatorShape
from graf.runtime.randomness import Draws
from graf.training.inputs import FakeInputs, InputSampler, StepSettings

CAMERAS = Cameras(3.5, (0.2, 0.4))
LABELS = torch.tensor([[0, 0, 0, 0], [1, 1, 90, 1], [2, 0, 359, -1], [1, 0, 180, 2], [0, 1, 7, -1]])
SETTINGS = StepSettings(0.3, 0.8, 0.5, super_resolve=True)
SAMPLING = RaySampling(5, 3)
SAMPLER = InputSampler(
    pose_sampler=PoseSampler(LABELS, CAMERAS),
    dim_z=6,
    patch_size=4,
    describe=DiscriminatorShape().describe,
    uniform_z=False,
    jitter=True,
    importance=True,
    hflip=False,
    share_fakes=False,
    device=torch.device("cpu"),
    ccsr=CCSR(ConvTrunk(2, 4, 1), ViewLatents(8, 3, 4), BoxProjection(2)),
    agreement_degrees=15.0,
)


def draws(*indices: int, seed: int = 0, iteration: int = 7) -> Draws:
    return Draws(seed, iteration, tuple(indices))


def drawn(fakes: FakeInputs) -> RayNoise:
    """The random numbers of 16 rays of each image."""
    return fakes.noise.of_rays(0, 16, SAMPLING)


def tensors_of(value: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested dataclasses, by its dotted name."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif is_dataclass(value):
        for item in fields(value):
            yield from tensors_of(getattr(value, item.name), f"{name}.{item.name}")


@pytest.mark.parametrize("split", [[(0, 1, 2, 3, 4)], [(0,), (1,), (2,), (3,), (4,)], [(0, 1), (2, 3, 4)]])
@pytest.mark.parametrize("ranges", [None, PoseRanges(0, 1, 0.1, 0.4, 3, 4)])
def test_a_fake_does_not_depend_on_the_batch_it_is_drawn_in(split, ranges):
    sampler = replace(SAMPLER, pose_sampler=PoseSampler(LABELS, CAMERAS, ranges=ranges))
    whole = dict(tensors_of(sampler.draw_fakes(draws(0, 1, 2, 3, 4), "g", SETTINGS)))
    parts = [dict(tensors_of(sampler.draw_fakes(draws(*part), "g", SETTINGS))) for part in split]
    assert len(whole) >= 12
    for name, value in whole.items():
        assert len(value) == 5, name
        assert torch.equal(value, torch.cat([part[name] for part in parts])), name


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("share_fakes", [False, True])
def test_a_part_of_a_step_is_what_its_samples_alone_draw(hflip, share_fakes):
    sampler, images = replace(SAMPLER, hflip=hflip, share_fakes=share_fakes), torch.rand(5, 3, 8, 8)
    whole = sampler.draw(draws(0, 1, 2, 3, 4), images, LABELS, SETTINGS)
    assert len(whole) == 5
    assert (whole.fakes_of_d is whole.fakes_g) is share_fakes
    for a, b in ((0, 2), (2, 5)):
        alone = sampler.draw(draws(*range(a, b)), images[a:b], LABELS[a:b], SETTINGS)
        for (name, part), (_, own) in zip(tensors_of(whole[a:b]), tensors_of(alone), strict=True):
            assert torch.equal(part, own), name


@pytest.mark.parametrize("change", [{"seed": 1}, {"iteration": 8}, {"purpose": "d"}])
def test_other_seeds_iterations_and_purposes_draw_other_numbers(change):
    purpose = change.pop("purpose", "g")
    first = SAMPLER.draw_fakes(draws(*range(5)), "g", SETTINGS)
    second = SAMPLER.draw_fakes(draws(*range(5), **change), purpose, SETTINGS)
    noises = [drawn(inputs) for inputs in (first, second)]
    for part in ("jitter", "importance_jitter", "density"):
        assert not torch.isclose(*(getattr(noise, part) for noise in noises), atol=1e-4).all(-1).any(), part
    for part in ("z", "patches.scale", "patches.centre", "super_resolution.crop.centre"):
        one, other = (dict(tensors_of(inputs))["." + part] for inputs in (first, second))
        assert not torch.isclose(one, other, atol=1e-4).any(dim=-1).all(), part


def test_no_two_random_parts_of_a_sample_share_their_numbers():
    inputs = SAMPLER.draw_fakes(draws(0), "g", SETTINGS)
    numbers = torch.cat([getattr(inputs, item.name)[0] for item in fields(inputs) if item.name.startswith("augment")])
    noise = drawn(inputs)
    numbers = torch.cat([numbers, noise.jitter.flatten(), noise.importance_jitter.flatten()])
    assert len(numbers.unique()) == len(numbers)


def test_fakes_take_their_views_from_the_pool_alone():
    inputs = SAMPLER.draw_fakes(draws(*range(300)), "g", SETTINGS)
    own = {tuple(label) for label in LABELS.tolist()}
    assert {tuple(label) for label in inputs.views.labels.tolist()} == own
    named = CAMERAS.views_of_labels(inputs.views.labels)
    assert torch.equal(inputs.views.poses, named.poses)
    said = SAMPLER.describe(named, inputs.patches)
    assert torch.equal(inputs.condition.features, said.features)
    assert torch.equal(inputs.condition.class_idx, inputs.views.labels[:, 0])


@pytest.mark.parametrize(("unknown", "share"), [([], 0.5), ([1], 0.5), ([0, 1, 2, 3], 0.5), ([0, 1, 2, 3, 4], 0)])
def test_half_of_the_matched_fakes_take_codes_of_known_instances_however_few_there_are(unknown, share):
    named = torch.cat([LABELS[:, :3], torch.arange(5)[:, None]], dim=1)
    named[unknown, 3] = -1
    shown = named.repeat_interleave(torch.tensor(balance_instances(named)), dim=0)
    labels = shown[torch.arange(400) % len(shown)]
    sampler = replace(SAMPLER, match_views=True, pose_sampler=PoseSampler(named, CAMERAS))
    matched = sampler.draw(draws(*range(400)), torch.rand(400, 3, 8, 8), labels, SETTINGS)
    instance, known = matched.fakes_g.instance, labels[:, 3]
    assert torch.equal(matched.fakes_g.views.labels, labels)
    assert bool(((instance == known) | (instance == -1)).all())
    assert float((instance >= 0).float().mean()) == pytest.approx(share, abs=0.06)


def test_fakes_of_drawn_views_take_drawn_codes():
    assert bool((SAMPLER.draw_fakes(draws(*range(400)), "g", SETTINGS).instance == -1).all())


def test_patches_keep_to_their_scales_and_lie_inside_the_image():
    reals = SAMPLER.draw_reals(draws(*range(400)), LABELS[torch.arange(400) % 5], SETTINGS)
    for patches in (SAMPLER.draw_fakes(draws(*range(400)), "g", SETTINGS).patches, reals.patches):
        assert 0.3 <= patches.scale.min() < 0.32
        assert 0.78 < patches.scale.max() <= 0.8
        edge = patches.centre.abs() + patches.scale[:, None]
        assert 0.97 < edge.max() <= 1 + 1e-6
        assert patches.centre.mean(0).abs().max() < 0.05


@pytest.mark.parametrize("uniform_z", [False, True])
def test_codes_follow_their_law(uniform_z):
    z = replace(SAMPLER, uniform_z=uniform_z, dim_z=64).draw_fakes(draws(*range(200)), "g", SETTINGS).z
    assert z.shape == (200, 64)
    assert abs(float(z.mean())) < 0.03
    assert float(z.std()) == pytest.approx(3**-0.5 if uniform_z else 1, rel=0.03)
    assert bool((z.abs() <= 1).all()) is uniform_z


def test_ray_noise_has_a_place_for_every_sample_and_the_scheduled_strength():
    noise = drawn(SAMPLER.draw_fakes(draws(*range(50)), "g", SETTINGS))
    assert noise.jitter.shape == (50, 16, 5)
    assert noise.importance_jitter.shape == (50, 16, 3)
    assert noise.density.shape == (50, 16, 8)
    assert 0 <= noise.jitter.min() < 0.01 < 0.99 < noise.jitter.max() < 1
    assert float(noise.density.std()) == pytest.approx(0.5, rel=0.05)


def test_what_is_switched_off_is_not_drawn():
    quiet = replace(SETTINGS, density_noise=0.0, super_resolve=False)
    fakes = replace(SAMPLER, jitter=False).draw_fakes(draws(0), "g", quiet)
    noise = drawn(fakes)
    assert (noise.jitter, noise.importance_jitter, noise.density) == (None, None, None)
    assert fakes.super_resolution is None
    assert drawn(SAMPLER.draw_fakes(draws(0), "g", quiet)).density is None
    assert drawn(replace(SAMPLER, importance=False).draw_fakes(draws(0), "g", quiet)).importance_jitter is None
    assert (
        replace(SAMPLER, agreement_degrees=None).draw_fakes(draws(0), "g", SETTINGS).super_resolution.neighbours is None
    )


def test_neighbours_stand_beside_their_views_on_either_side():
    inputs = SAMPLER.draw_fakes(draws(*range(100)), "g", SETTINGS)
    turned = (inputs.super_resolution.neighbours.labels[:, 2] - inputs.views.labels[:, 2]) % 360
    assert set(turned.tolist()) == {15, 345}
    assert 30 < int((turned == 15).sum()) < 70
    expected = SAMPLER.ccsr.latents.mix(inputs.super_resolution.neighbours.labels[:, 2])
    assert torch.equal(inputs.super_resolution.neighbour_latents.weights, expected.weights)


def cut_whole(uniforms: torch.Tensor, *_: float) -> Patches:
    """Places a patch on the whole image."""
    return Patches.whole(len(uniforms))


def test_photographs_keep_their_pixels_and_the_cameras_of_their_labels():
    images = torch.rand(5, 3, 8, 8)
    reals = replace(SAMPLER, place=cut_whole).draw(draws(*range(5)), images, LABELS, SETTINGS).reals
    assert_close(reals.fine, images, atol=1e-6, rtol=0)
    assert_close(reals.images, functional.avg_pool2d(images, 2), atol=1e-6, rtol=0)
    assert torch.equal(reals.views.labels, LABELS)
    assert torch.equal(reals.views.poses, CAMERAS.views_of_labels(LABELS).poses)
    said = SAMPLER.describe(CAMERAS.views_of_labels(LABELS), reals.patches)
    assert torch.equal(reals.condition.features, said.features)


def test_hflip_mirrors_about_half_of_the_photographs_left_to_right_and_no_label():
    images, labels = torch.rand(200, 3, 4, 4), LABELS[torch.arange(200) % 5]
    sampler = replace(SAMPLER, hflip=True, place=cut_whole, ccsr=None)
    reals = sampler.draw(draws(*range(200)), images, labels, SETTINGS).reals
    kept = torch.isclose(reals.images, images, atol=1e-6).flatten(1).all(1)
    mirrored = torch.isclose(reals.images, images.flip(3), atol=1e-6).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert 70 < int(mirrored.sum()) < 130
    assert torch.equal(reals.views.labels, labels)


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    SAMPLER.draw(draws(0, 1), torch.zeros(2, 3, 4, 4), LABELS[:2], SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
