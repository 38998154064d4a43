"""Pivotal tuning fits the photograph, keeps its neighbours, and leaves the generator that it starts from."""

import math
from dataclasses import replace

import pytest
import torch

from graf.evaluation.metrics import psnr
from graf.inversion.distance import PhotoDistance
from graf.inversion.photograph import Photograph
from graf.inversion.search import Hypothesis, SearchSettings
from graf.inversion.tuning import TuningSettings, candidates_of, draw_neighbours, measure_psnr, tune_generator

SEARCH = SearchSettings(elevations=(10.0, 30.0))
PIVOT = Hypothesis(0, torch.tensor([0.2, 0.0, -0.3]), 40.0, 20.0, 3.5, 0.0, 0.0)
SETTINGS = TuningSettings(steps=60, learning_rate=0.06, size=12, locality=0.0, neighbour_size=8)


@pytest.fixture
def photograph(ball_renderer) -> Photograph:
    """The pivot's object with another colour, which no code has."""
    render = ball_renderer.sample(z=PIVOT.z, class_name=0, **PIVOT.camera)
    return Photograph(render.rgb.flip(1), render.opacity)


def tune(renderer, photograph, settings):
    return tune_generator(renderer, photograph, PIVOT, PhotoDistance(), SEARCH, settings)


def test_the_photograph_is_learned_and_the_given_generator_stays(ball_renderer, photograph):
    before = {name: value.clone() for name, value in ball_renderer.generator.state_dict().items()}
    tuned = tune(ball_renderer, photograph, SETTINGS)
    assert measure_psnr(tuned, photograph, PIVOT) > measure_psnr(ball_renderer, photograph, PIVOT) + 5
    for name, value in ball_renderer.generator.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(parameter.requires_grad for parameter in tuned.generator.parameters())
    assert torch.equal(tuned.generator.background, ball_renderer.generator.background)


def test_locality_keeps_what_neighbours_look_like(ball_renderer, photograph):
    def change(locality: float) -> float:
        tuned = tune(ball_renderer, photograph, replace(SETTINGS, locality=locality))
        views = {"z": PIVOT.z + 0.5, "class_name": 0, "azimuth": [0, 120, 240]}
        return float(psnr(tuned.sample(**views).rgb, ball_renderer.sample(**views).rgb).mean())

    assert change(10.0) > change(0.0) + 3


def test_the_same_seed_gives_the_same_weights_whatever_the_global_state(ball_renderer, photograph):
    settings = replace(SETTINGS, steps=3, locality=0.5)
    first = tune(ball_renderer, photograph, settings).generator.state_dict()
    torch.manual_seed(77)
    second = tune(ball_renderer, photograph, settings).generator.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_neighbours_lie_at_the_reach_from_the_pivot_and_are_seen_from_likely_cameras(ball_renderer):
    settings = TuningSettings(neighbours=50, reach=0.7)
    near = draw_neighbours(ball_renderer, candidates_of(ball_renderer, PIVOT), SEARCH, settings, 0)
    distances = (near.code - PIVOT.z).square().mean(1).sqrt()
    torch.testing.assert_close(distances, torch.full((50,), 0.7))
    degrees = torch.rad2deg(near.elevation)
    assert 10 <= float(degrees.min()) < 12
    assert 28 < float(degrees.max()) <= 30
    assert float(near.u.max() - near.u.min()) > 0.9


def test_neighbours_of_uniform_codes_are_codes_that_the_run_may_draw(ball_renderer):
    uniform = replace(ball_renderer, uniform_z=True)
    settings = TuningSettings(neighbours=200, reach=0.7)
    near = draw_neighbours(uniform, candidates_of(uniform, PIVOT), SEARCH, settings, 0)
    assert float(near.code.abs().max()) <= 1
    distances = (near.code - PIVOT.z).square().mean(1).sqrt()
    assert float(distances.max()) <= 0.7 / math.sqrt(3) + 1e-6
    assert float(distances.median()) == pytest.approx(0.7 / math.sqrt(3))
