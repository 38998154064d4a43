"""Pictures of looks: their depth is that of a ball by geometry, their modes and backgrounds are what they say."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from graf.geometry.cameras import pose_from_angles
from graf.viewer.bounds import CELLS, KEPT, BoundsOfObjects, find_bounds
from graf.viewer.drawing import (
    CHUNK,
    MODES,
    NOTHING,
    QUICK_SAMPLES,
    Interrupted,
    Look,
    draw,
    interruptible,
    normals_from_depth,
)
from graf.viewer.viewpoints import Viewpoint

VIEWPOINT = Viewpoint(pose_from_angles(torch.tensor(0.1), torch.tensor(0.3), 3.5), 30.0, 1.25)


@pytest.fixture
def look(renderer) -> Look:
    return Look("mug", renderer.codes(0, range(1))[0])


@pytest.mark.parametrize("distance", [1.2, 3.5, 9.0], ids=["zoomed in", "as photographs", "zoomed out"])
@pytest.mark.parametrize("in_box", [False, True], ids=["in the sphere", "in its box"])
def test_depth_is_where_a_ball_is_and_nothing_elsewhere(ball, distance, in_box):
    """z-depth in world units, by intersecting each pixel's ray with the sphere."""
    radius, height, width = 0.5, 40, 50
    fov = math.degrees(2.8 * math.asin(radius / distance))
    renderer = ball((0.0, 0.0, 0.0), radius)
    pose = pose_from_angles(torch.tensor(0.1), torch.tensor(0.3), distance)
    viewpoint = Viewpoint(pose, fov, width / height)
    look = Look("car", torch.zeros(5), num_samples=400)
    bounds = find_bounds(renderer, look.z, "car") if in_box else None
    depth = draw(renderer, look, viewpoint, height, bounds=bounds).depth
    focal = height / 2 / math.tan(math.radians(fov) / 2)
    x = (np.arange(width) + 0.5 - width / 2) / focal
    y = (np.arange(height) + 0.5 - height / 2) / focal
    length = np.sqrt(1 + x[None, :] ** 2 + y[:, None] ** 2)
    middle = distance / length
    half_squared = radius**2 - (distance**2 - middle**2)
    expected = (middle - np.sqrt(half_squared.clip(0))) / length
    inside, outside = half_squared > 0.01, half_squared < -0.01
    assert np.abs(depth - expected)[inside].max() < 0.01
    assert (depth[outside] == np.float32(NOTHING)).all()
    assert inside.sum() > 100


def test_normals_of_a_ball_point_away_from_its_centre(ball):
    renderer = ball((0.0, 0.0, 0.0), 0.6)
    lens = VIEWPOINT.intrinsics(48)
    rays = renderer.camera_rays(VIEWPOINT.camera_to_world, lens)
    middle = -(rays.origins * rays.directions).sum(-1, keepdim=True)
    half = (0.6**2 - (3.5**2 - middle**2)).clamp(min=0).sqrt()
    distance = torch.where(half > 0, middle - half, NOTHING)
    depth = (distance * rays.axis_cosine).mT.reshape(1, 1, 48, 60)
    normals = normals_from_depth(depth, rays).flatten(2).mT
    surface = (half[0, :, 0] > 0.25).nonzero()[:, 0]
    expected = (rays.origins + distance * rays.directions)[0, surface] / 0.6
    cosine = (normals[0, surface] * expected).sum(-1)
    assert cosine.min() > 0.985
    assert cosine.mean() > 0.995


def test_every_mode_is_another_picture_of_the_same_size(renderer, look):
    pictures = {mode: draw(renderer, replace(look, mode=mode), VIEWPOINT, 24).picture for mode in MODES}
    assert pictures.pop("super-resolved").shape == (48, 60, 3)
    assert {picture.shape for picture in pictures.values()} == {(24, 30, 3)}
    assert len({picture.tobytes() for picture in pictures.values()}) == len(pictures)
    assert all(picture.dtype == np.uint8 and picture.std() > 1 for picture in pictures.values())


def test_opacity_is_grey_and_as_rendered(renderer, look):
    lens = VIEWPOINT.intrinsics(24)
    opacity = renderer.render_camera(look.z, "mug", VIEWPOINT.camera_to_world, lens).opacity[0, 0]
    picture = draw(renderer, replace(look, mode="opacity"), VIEWPOINT, 24).picture
    assert_close(torch.from_numpy(picture[..., 1]).float() / 255, opacity, atol=0.003, rtol=0)


def test_another_background_is_that_of_a_generator_with_that_background(renderer, look):
    grey = draw(renderer, replace(look, background="grey"), VIEWPOINT, 24).picture
    renderer.generator.background.zero_()
    expected = draw(renderer, look, VIEWPOINT, 24).picture
    assert np.abs(grey.astype(int) - expected.astype(int)).max() <= 1


def test_super_resolution_takes_the_background_too(renderer, look):
    look = replace(look, mode="super-resolved", background="black")
    corner = draw(renderer, look, replace(VIEWPOINT, fov=60.0), 24).picture[0, 0]
    assert corner.max() <= 2


def test_quick_pictures_have_fewer_samples_and_no_super_resolution(renderer, look):
    seen = []
    field, forward = renderer.generator.field, renderer.generator.field.forward_visible
    field.forward_visible = lambda points, *rest: seen.append(points.shape[2]) or forward(points, *rest)
    look = replace(look, mode="super-resolved", num_samples=60)
    assert draw(renderer, look, VIEWPOINT, 24, quick=True).picture.shape == (24, 30, 3)
    assert max(seen) == QUICK_SAMPLES
    seen.clear()
    assert draw(renderer, look, VIEWPOINT, 24).picture.shape == (48, 60, 3)
    assert max(seen) == 60


def test_more_samples_change_the_picture(renderer, look):
    few, many = (draw(renderer, replace(look, num_samples=count), VIEWPOINT, 24).picture for count in (4, 64))
    assert not np.array_equal(few, many)


def test_a_picture_is_left_before_the_chunk_in_which_it_is_interrupted(renderer, look):
    calls = []

    def check() -> None:
        calls.append(None)
        if len(calls) == 3:
            raise Interrupted

    watched = interruptible(renderer, check)
    watched.generator.chunk = 100
    with pytest.raises(Interrupted):
        draw(watched, look, VIEWPOINT, 48)
    assert len(calls) == 3


def test_a_mesh_is_left_in_the_middle_of_its_grid(renderer):
    """Else Ctrl-C would wait for all of it."""
    calls = []

    def check() -> None:
        calls.append(None)
        if len(calls) == 3:
            raise Interrupted

    points = torch.zeros(4 * CHUNK * renderer.generator.sampling.total, 3)
    with pytest.raises(Interrupted):
        interruptible(renderer, check).density(points)
    assert len(calls) == 3


def test_watching_leaves_the_renderer_as_it_was_and_its_pictures_equal(renderer, look):
    chunk, expected = renderer.generator.chunk, draw(renderer, look, VIEWPOINT, 24)
    renderer.generator.chunk = chunk = 64
    watched = interruptible(renderer, lambda: pytest.fail("this is the other one's"))
    again = draw(renderer, look, VIEWPOINT, 24)
    assert renderer.generator.chunk == chunk
    assert watched.generator.chunk == CHUNK
    assert watched.generator.field is renderer.generator.field
    assert np.abs(again.picture.astype(int) - expected.picture.astype(int)).max() <= 1


def test_the_box_of_a_ball_holds_it_and_little_more(ball):
    renderer = ball((0.3, -0.2, 0.1), 0.4)
    bounds = find_bounds(renderer, torch.zeros(5), "car")
    centre, cell = torch.tensor([0.3, -0.2, 0.1]), 2 / CELLS
    assert (bounds.low <= centre - 0.4).all()
    assert (bounds.high >= centre + 0.4).all()
    assert (bounds.low >= centre - 0.4 - 2.5 * cell).all()
    assert (bounds.high <= centre + 0.4 + 2.5 * cell).all()


def test_an_object_of_haze_has_the_whole_sphere(ball):
    bounds = find_bounds(ball((9.0, 9.0, 9.0), 0.1), torch.zeros(5), "car")
    assert bounds.low.tolist() == [-1, -1, -1]
    assert bounds.high.tolist() == [1, 1, 1]


def test_inside_its_box_an_object_is_the_same_picture_with_fewer_rays(ball):
    renderer = ball((0.3, -0.2, 0.1), 0.4)
    look = Look("car", torch.zeros(5), num_samples=400)
    bounds = find_bounds(renderer, look.z, "car")
    whole, inside = (draw(renderer, look, VIEWPOINT, 40, bounds=box) for box in (None, bounds))
    assert (np.abs(whole.picture.astype(int) - inside.picture).max(-1) > 0).mean() < 0.02  # at its edge, by the samples
    both = (whole.depth < 100) & (inside.depth < 100)
    assert np.abs(whole.depth - inside.depth)[both].max() < 0.02
    assert both.sum() > 100


def test_boxes_are_found_once_for_each_object_and_the_oldest_are_given_up(renderer):
    kept = BoundsOfObjects(renderer)
    codes = renderer.codes(0, range(KEPT + 1))
    first = kept.of(codes[0], "car")
    assert kept.of(codes[0], "car") is first
    assert kept.of(codes[0], "mug") is not first
    for z in codes[1:]:
        kept.of(z, "car")
    assert kept.of(codes[0], "car") is not first
