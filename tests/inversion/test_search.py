"""The search finds the object and camera of renders that are known, and says how sure it is."""

import random
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from graf.evaluation.metrics import psnr
from graf.geometry.rays import pixel_grid
from graf.geometry.volume_rendering import Render
from graf.inversion.candidates import Candidates, render_candidates
from graf.inversion.distance import PhotoDistance, multi_scale_error
from graf.inversion.photograph import Photograph
from graf.inversion.search import (
    Hypothesis,
    Search,
    SearchSettings,
    angle_between,
    best_of_each_class,
    best_other_view,
    jittered_places,
    pick_leaders,
)

QUICK = SearchSettings(
    elevations=(10.0, 30.0),
    azimuths=8,
    screen_size=12,
    leaders=4,
    finalists=2,
    follow_steps=25,
    follow_size=12,
    finish_steps=60,
    finish_size=16,
)
#: where it does not matter how near the answer is
SHORT = replace(QUICK, leaders=2, finalists=1, follow_steps=15, finish_steps=30)
STARTS = {0: torch.zeros(1, 3), 1: torch.zeros(1, 3)}


def take_photograph(renderer, z, **camera) -> Photograph:
    renders = renderer.sample(z=z, **camera)
    return Photograph(renders.rgb, renders.opacity)


def invert(renderer, photograph, settings=QUICK, starts=STARTS) -> list[Hypothesis]:
    return Search(renderer, photograph, PhotoDistance(), settings).run(starts)


@pytest.mark.parametrize(("class_name", "azimuth", "elevation"), [("red", 77, 14), ("yellow", 203, 26)])
def test_code_class_and_camera_of_a_render_are_found(ball_renderer, class_name, azimuth, elevation):
    z = torch.tensor([0.8, -0.5, 0.4])
    camera = {"azimuth": azimuth, "elevation": elevation, "radius": 3.4}
    found, *others = invert(ball_renderer, take_photograph(ball_renderer, z, class_name=class_name, **camera))
    assert ball_renderer.classes[found.class_idx] == class_name
    assert angle_between(found.azimuth, azimuth) < 2
    assert found.elevation == pytest.approx(elevation, abs=4)
    assert found.radius == pytest.approx(3.4, abs=0.12)
    assert found.psnr > 28
    assert all(other.error > found.error for other in others)
    around = {"class_name": class_name, "azimuth": [10, 130, 250], "elevation": 20}
    truth, shown = ball_renderer.sample(z=z, **around), ball_renderer.sample(z=found.z, **around)
    assert float(psnr(shown.rgb, truth.rgb).mean()) > 24  # what the photograph does not show


def test_the_answer_depends_on_the_seed_alone_and_leaves_the_generator_as_it_was(ball_renderer):
    photograph = take_photograph(ball_renderer, torch.zeros(3), azimuth=50)
    generator = ball_renderer.generator.train()
    weight = generator.field.centres.requires_grad_(True)
    before = weight.detach().clone()
    first = invert(ball_renderer, photograph, SHORT)
    torch.manual_seed(1234)
    random.seed(5)
    state = torch.get_rng_state()
    second = invert(ball_renderer, photograph, SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    assert [item.error for item in first] == [item.error for item in second]
    assert torch.equal(first[0].z, second[0].z)
    other = invert(ball_renderer, photograph, replace(SHORT, seed=1))
    assert other[0].error != first[0].error
    assert angle_between(other[0].azimuth, first[0].azimuth) < 2
    assert generator.training
    assert weight.requires_grad
    assert weight.grad is None
    assert torch.equal(weight, before)


def test_without_colours_or_mask_the_rest_still_finds_the_camera(ball_renderer):
    photograph = take_photograph(ball_renderer, torch.zeros(3), azimuth=290)
    grey = photograph.colours.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    for poorer in (replace(photograph, mask=None), Photograph(grey, photograph.mask, is_grey=True)):
        found = invert(ball_renderer, poorer, starts={0: torch.zeros(1, 3)})[0]
        assert angle_between(found.azimuth, 290) < 5
        assert found.psnr > 25  # of brightness, where there are no colours


def test_truncation_keeps_codes_near_the_mean(ball_renderer):
    photograph = take_photograph(ball_renderer, torch.tensor([2.0, -2.0, 2.0]), azimuth=100)
    starts = {0: torch.zeros(1, 3)}
    assert torch.equal(invert(ball_renderer, photograph, replace(SHORT, truncation=0.0), starts)[0].z, torch.zeros(3))
    strict = replace(SHORT, truncation=0.3, code_prior=0.02)
    free = replace(SHORT, code_prior=0.02)
    found = [invert(ball_renderer, photograph, settings, starts)[0] for settings in (strict, free)]
    assert float(found[0].z.norm()) < 0.8 * float(found[1].z.norm())
    uniform = replace(ball_renderer, uniform_z=True)
    assert float(invert(uniform, photograph, replace(SHORT, truncation=0.5), starts)[0].z.abs().max()) <= 0.5


@pytest.mark.parametrize("log_distance", [0.05, -0.4], ids=["a little farther", "much nearer"])
def test_a_candidate_is_rendered_as_sample_renders_it(ball_renderer, log_distance):
    z = torch.tensor([0.3, 0.1, -0.4])
    one = Candidates(
        torch.tensor([1]),
        2 * z[None],
        torch.tensor([0.2]),
        torch.deg2rad(torch.tensor([15.0])),
        torch.tensor([log_distance]),
    )
    found = render_candidates(ball_renderer, one, pixel_grid(1, 24, 24)[0], truncation=0.5)
    radius = 3.5 * float(torch.tensor(log_distance).exp())
    expected = ball_renderer.sample(z=z, class_name=1, azimuth=72, elevation=15, radius=radius)
    assert_close(found.rgb, expected.rgb, rtol=0, atol=2e-5)
    assert_close(found.opacity, expected.opacity, rtol=0, atol=2e-5)


def test_gradients_of_code_and_camera_are_those_of_finite_differences(ball_renderer):
    renderer = replace(ball_renderer, generator=ball_renderer.generator.double())
    places = pixel_grid(1, 6, 6)[0].double()
    one = Candidates(
        torch.tensor([0]),
        torch.tensor([[0.3, 0.1, -0.4]]).double(),
        *(torch.tensor([number]).double() for number in (0.2, 0.3, 0.02)),
    ).leaves()
    target = torch.rand(1, 3, 6, 6).double()

    def error(candidates: Candidates) -> torch.Tensor:
        # rays are sampled inside the sphere, whose place along the ray counts as given (RayCaster): hold it far away
        wide = replace(renderer, caster=replace(renderer.caster, bounding_radius=None))
        return (render_candidates(wide, candidates, places, 1.0).rgb - target).square().sum()

    error(one).backward()
    step = 1e-4
    for name in ("code", "u", "elevation", "log_distance"):
        part = getattr(one, name)
        shift = torch.zeros_like(part)
        shift.view(-1)[0] = step
        ends = [error(replace(one, **{name: part.detach() + sign * shift})) for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / (2 * step)
        assert_close(part.grad.view(-1)[0], expected.detach(), rtol=2e-2, atol=1e-4)


def test_places_are_one_in_each_cell_and_repeat_with_the_seed():
    places = jittered_places(3, 7, 10)
    assert torch.equal(places, jittered_places(3, 7, 10))
    assert not torch.equal(places, jittered_places(3, 8, 10))
    cells = ((places + 1) / 2 * 10).floor()
    y, x = torch.meshgrid(torch.arange(10.0), torch.arange(10.0), indexing="ij")
    assert torch.equal(cells, torch.stack([x, y], dim=-1))


def test_leaders_are_of_several_classes_and_sides():
    azimuth = torch.tensor([10.0, 12.0, 190.0, 14.0, 50.0])
    candidates = Candidates(torch.tensor([0, 0, 0, 0, 1]), torch.zeros(5, 1), azimuth / 360, *torch.zeros(2, 5))
    errors = torch.tensor([0.1, 0.2, 0.4, 0.3, 9.0])
    assert pick_leaders(candidates, errors, 1).tolist() == [0]
    assert pick_leaders(candidates, errors, 3).tolist() == [0, 4, 2]
    assert pick_leaders(candidates, errors, 4).tolist() == [0, 4, 2, 1]
    assert sorted(pick_leaders(candidates, errors, 99).tolist()) == [0, 1, 2, 3, 4]


def test_the_next_class_and_the_next_view_are_told():
    def hypothesis(class_idx: int, azimuth: float) -> Hypothesis:
        return Hypothesis(class_idx, torch.zeros(1), azimuth, 0.0, 3.5, 0.0, 0.0)

    ranked = [hypothesis(0, 350), hypothesis(1, 170), hypothesis(0, 20), hypothesis(0, 175)]
    assert best_of_each_class(ranked) == ranked[:2]
    assert best_other_view(ranked) is ranked[3]
    assert best_other_view(ranked[:3]) is None


def test_the_distance_is_the_weighted_sum_of_its_terms():
    render = Render(torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8))
    photograph = Photograph(torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 8))
    difference = render.rgb - photograph.colours
    expected = sum(torch.nn.functional.avg_pool2d(difference, n).square().mean((1, 2, 3)) for n in (1, 2, 4)) / 3
    colours = multi_scale_error(render.rgb, photograph.colours)
    assert_close(colours, expected)
    silhouette = multi_scale_error(render.opacity, photograph.mask)
    seen = []

    def perceptual(images, photographs):
        seen.append((images.shape, photographs.shape))
        return torch.tensor([1.0, 2.0])

    distance = PhotoDistance(0.5, perceptual, 0.1)
    assert_close(distance(render, photograph), colours + 0.5 * silhouette)  # too small for a perceptual network
    large = render.map(lambda part: part.repeat(1, 1, 4, 4)), photograph.map(lambda part: part.repeat(1, 1, 4, 4))
    without = replace(distance, perceptual=None)(*large)
    assert_close(distance(*large), without + torch.tensor([0.1, 0.2]))
    assert seen == [((2, 3, 32, 32), (2, 3, 32, 32))]
    assert_close(PhotoDistance()(render, replace(photograph, mask=None)), colours)
    # a photograph without colours leaves those of the render free
    grey = replace(photograph, is_grey=True)
    tinted = replace(render, rgb=render.rgb + torch.tensor([0.3, -0.1, -0.2])[:, None, None])
    assert_close(PhotoDistance()(render, grey), PhotoDistance()(tinted, grey))
