"""Rendering for people and scores: an image depends on its code, class and camera alone; training does not notice."""

import logging
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from graf.base.errors import UserError
from graf.evaluation.renderer import Renderer, eval_mode
from graf.geometry.cameras import Intrinsics
from graf.geometry.rays import RayCaster
from graf.geometry.views import Cameras, PoseRanges, PoseSampler
from graf.geometry.volume_rendering import RaySampling
from graf.models.ccsr import CCSR, BoxProjection, ConvTrunk, ViewLatents
from graf.models.density import DensityLaw
from graf.models.generator import Generator
from graf.models.mlp_field import MLPField, MLPShape
from graf.runtime.amp import Precision
from graf.runtime.live_tensors import LiveTensorMeter
from graf.runtime.memory import OutOfMemory

CAMERAS = Cameras(3.5, (0.2, 0.4))
SIZE = 12


@pytest.fixture
def renderer() -> Renderer:
    torch.manual_seed(5)
    shape = MLPShape(
        depth=2, width=16, multires=3, multires_views=1, base_frequency=math.pi, use_viewdirs=True, dim_shape=3,
        dim_appearance=2, num_classes=3, dim_class=32, density=DensityLaw("relu", 20, 0, 0, 0.6, None),
    )  # fmt: skip
    caster = RayCaster(Intrinsics.from_fov(SIZE, 30.0), 2.5, 4.5, 1.0)
    generator, precision = Generator(MLPField(shape), RaySampling(6)), Precision("cpu", None)
    return Renderer(generator, caster, precision, torch.device("cpu"), SIZE, CAMERAS, ("car", "mug", "duck"))


def some_views(count: int):
    number = torch.arange(count)
    return CAMERAS.views_of_labels(torch.stack([number % 3, number % 2, 40 * number, number - 1], 1))


def test_an_image_does_not_depend_on_the_images_beside_it(renderer):
    z, views = renderer.codes(0, range(5)), some_views(5)
    together = renderer.render_views(z, views)
    for i in range(5):
        alone = renderer.render_views(z[i : i + 1], views[i : i + 1])
        for name in ("rgb", "depth", "opacity"):
            assert torch.equal(getattr(together, name)[i], getattr(alone, name)[0])
    assert not torch.allclose(together.rgb[0], together.rgb[1], atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 7, 50, 10**6])
def test_an_image_does_not_depend_on_the_chunk(renderer, chunk):
    z, views = renderer.codes(0, range(2)), some_views(2)
    expected = renderer.render_views(z, views)
    renderer.generator.chunk = chunk
    found = renderer.render_views(z, views)
    for name in ("rgb", "depth", "opacity"):
        assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


def test_renders_have_the_promised_shapes_and_ranges_without_a_graph(renderer):
    renders = renderer.render_views(renderer.codes(0, range(3)), some_views(3))
    assert renders.rgb.shape == (3, 3, SIZE, SIZE)
    assert renders.depth.shape == renders.opacity.shape == (3, 1, SIZE, SIZE)
    assert renders.rgb.abs().max() <= 1
    assert 0 <= renders.opacity.min() < renders.opacity.max() <= 1 + 1e-6
    assert 2 < renders.depth.min() < renders.depth.max() <= 4.6
    assert renders.rgb.dtype == torch.float32
    assert not renders.rgb.requires_grad


def test_pixels_are_those_of_the_generator_itself(renderer):
    z, views = renderer.codes(3, range(1)), some_views(1)
    image = renderer.render_views(z, views).rgb[0]
    rays = renderer.caster.cast_images(views.poses, SIZE)
    number = 5 * SIZE + 7  # row 5, column 7
    with torch.no_grad():
        colour = renderer.generator(z, views.class_idx, rays.slice(number, number + 1)).rgb[0, 0]
    assert_close(image[:, 5, 7], colour)


def test_codes_are_stable_row_by_row_and_differ_between_rows_and_seeds(renderer):
    codes = renderer.codes(0, range(6))
    assert codes.shape == (6, 5)
    assert torch.equal(codes[2:5], renderer.codes(0, range(2, 5)))
    assert not torch.allclose(codes, renderer.codes(1, range(6)))
    assert len(codes.unique(dim=0)) == 6
    uniform = replace(renderer, uniform_z=True)
    many = uniform.codes(0, range(200))
    assert many.abs().max() <= 1
    assert float(many.std()) == pytest.approx(3**-0.5, rel=0.06)


def test_instances_that_a_generator_does_not_know_are_refused(renderer):
    generator = renderer.generator
    known = replace(renderer, generator=Generator(generator.field, generator.sampling, num_instances=4))
    assert known.instance_codes(torch.tensor([-1, 3])).any(dim=1).tolist() == [False, True]
    for number in (-2, 4, 99, 3.7):
        with pytest.raises(UserError, match=f"instance={number}: expected a whole number from -1 to 3"):
            known.instance_codes([0, number])


@pytest.mark.parametrize("ranges", [None, PoseRanges(0, 1, 0.1, 0.4, 3.5, 3.5)])
def test_random_renders_are_stable_image_by_image(renderer, ranges):
    pose_sampler = PoseSampler(torch.tensor([[0, 0, 0, 0], [1, 1, 90, -1], [2, 0, 200, 1]]), CAMERAS, ranges=ranges)
    together = renderer.render_random(pose_sampler, 4, range(6)).rgb
    assert torch.equal(together[4:], renderer.render_random(pose_sampler, 4, range(4, 6)).rgb)
    assert not torch.equal(together, renderer.render_random(pose_sampler, 5, range(6)).rgb)
    assert len(together.flatten(1).unique(dim=0)) == 6


def test_rendering_advances_no_global_generator_and_leaves_the_training_modes(renderer):
    renderer.generator.train()
    renderer.generator.field.eval()  # a part that training keeps in eval mode stays there
    modes = {part: part.training for part in renderer.generator.modules()}
    seen = []
    forward = renderer.generator.forward

    def watch(*arguments, **options):
        seen.append((renderer.generator.training, torch.is_grad_enabled()))
        return forward(*arguments, **options)

    renderer.generator.forward = watch
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    renderer.render_views(renderer.codes(0, range(2)), some_views(2))
    assert seen == [(False, False)] * 2
    assert {part: part.training for part in renderer.generator.modules()} == modes
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_super_resolution_that_the_run_does_not_have_is_refused(renderer):
    with pytest.raises(UserError, match="no super-resolution"):
        renderer.render_views(renderer.codes(0, range(1)), some_views(1), super_resolve=True)
    assert renderer.render_views(renderer.codes(0, range(1)), some_views(1)).sr is None


# ---------------------------------------------------------------- running out of memory


def with_ccsr(renderer: Renderer) -> Renderer:
    latents = ViewLatents(8, 3, SIZE)
    for view in latents.views:
        nn.init.normal_(view)
    return replace(renderer, ccsr=CCSR(ConvTrunk(2, features=64, blocks=1), latents, BoxProjection(2)))


def test_a_device_too_small_for_a_whole_image_renders_it_in_smaller_chunks_from_then_on(renderer, small_device, caplog):
    z, views = renderer.codes(0, range(2)), some_views(2)
    expected = renderer.render_views(z, views)
    renderer.generator.chunk = 128
    with LiveTensorMeter() as meter:
        renderer.render_views(z, views)
    with caplog.at_level(logging.WARNING, "graf"), small_device(0.75 * meter.peak):
        found = renderer.render_views(z, views)
    assert renderer.generator.chunk == 64
    for name in ("rgb", "depth", "opacity"):
        assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert len(caplog.records) == 1
    assert "training.chunk 128 -> 64" in caplog.text


def test_a_device_too_small_to_sharpen_a_whole_image_does_it_strip_by_strip(renderer, small_device, caplog):
    renderer = with_ccsr(renderer)
    z, views = renderer.codes(0, range(2)), some_views(2)
    expected = renderer.render_views(z, views, super_resolve=True)
    renderer.generator.chunk = 64
    with LiveTensorMeter() as meter:
        renderer.render_views(z, views, super_resolve=True)
    with caplog.at_level(logging.WARNING, "graf"), small_device(0.9 * meter.peak):
        found = renderer.render_views(z, views, super_resolve=True)
    assert renderer.ccsr.rows in (6, 3, 1)
    assert_close(found.sr, expected.sr, rtol=1e-5, atol=1e-5)
    assert "rows super-resolved at once 12 -> 6" in caplog.text
    assert len(caplog.records) <= 3  # the second image needs no further try


@pytest.mark.parametrize("super_resolve", [False, True])
def test_a_device_too_small_for_anything_ends_with_what_to_lower(renderer, monkeypatch, super_resolve):
    renderer = with_ccsr(renderer)

    def fail(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    failing = (renderer.ccsr.trunk, "forward") if super_resolve else (renderer.generator.field, "forward_visible")
    monkeypatch.setattr(*failing, fail)
    with pytest.raises(OutOfMemory, match="smallest size; lower --resolution"):
        renderer.render_views(renderer.codes(0, range(1)), some_views(1), super_resolve=super_resolve)


def test_eval_mode_ends_with_an_error_too():
    module = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    module[1].eval()
    seen = []

    def fail() -> None:
        with eval_mode(module):
            seen.append((module.training, module[0].training, torch.is_grad_enabled()))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert seen == [(False, False, False)]
    assert (module.training, module[0].training, module[1].training) == (True, True, False)
    assert torch.is_grad_enabled()
