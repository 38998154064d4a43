"""The toys' distance functions can be marched along, and their sides differ."""

import pytest
import torch

from graf.data.shapes import CLASS_NAMES, build_toy, gable, mirror, sphere, torus
from graf.data.synthetic import BOUNDING_RADIUS

CLASSES = range(len(CLASS_NAMES))


def grid(side, extent=1.1):
    line = torch.linspace(-extent, extent, side)
    return torch.stack(torch.meshgrid(line, line, line, indexing="ij")).reshape(3, -1)


@pytest.mark.parametrize("class_idx", CLASSES)
@pytest.mark.parametrize("instance", [0, 3])
def test_distance_is_at_most_the_true_one(class_idx, instance):
    toy = build_toy(class_idx, instance)
    points = grid(64)
    inside = points[:, toy.distance(points) < 0]
    outside = torch.randn(3, 400, generator=torch.Generator().manual_seed(class_idx))
    outside = outside / outside.norm(dim=0) * torch.linspace(0.3, 2.0, 400)
    claimed = toy.distance(outside)
    nearest = torch.cdist(outside.T, inside.T).min(dim=1).values  # at least the true distance to the surface
    assert (claimed - nearest).max() < 0.01


@pytest.mark.parametrize("class_idx", CLASSES)
@pytest.mark.parametrize("instance", [0, 1])
def test_toys_lie_inside_the_bounding_sphere_and_fill_most_of_it(class_idx, instance):
    points = grid(50)
    reach = points[:, build_toy(class_idx, instance).distance(points) < 0].norm(dim=0).max()
    assert 0.65 < reach < BOUNDING_RADIUS - 0.01


def test_instances_differ_and_repeat():
    points = grid(24, 0.8)
    plain, first, again, second, other_seed = (
        build_toy(1, instance, seed) for instance, seed in ((0, 5), (1, 5), (1, 5), (2, 5), (1, 6))
    )
    assert torch.equal(first.distance(points), again.distance(points))
    assert torch.equal(first.colour(points), again.colour(points))
    for other in (plain, second, other_seed):
        assert not torch.allclose(first.distance(points), other.distance(points))
        assert not torch.allclose(first.colour(points), other.colour(points))


def test_torus_is_at_its_closed_form_distance():
    points = torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.3]])
    expected = torch.tensor([0.4, 0.4, 0.2])
    torch.testing.assert_close(torus((0, 0, 0), 0.5, 0.1)(points), expected)


def test_mirror_copies_to_the_negative_side():
    points = grid(8)
    copied = mirror(sphere((0.4, 0.3, 0.1), 0.2), 0, 1)(points)
    balls = [sphere((x, y, 0.1), 0.2)(points) for x in (-0.4, 0.4) for y in (-0.3, 0.3)]
    torch.testing.assert_close(copied, torch.stack(balls).min(dim=0).values)


def test_gable_has_its_ridge_and_eaves_where_asked():
    roof = gable(0.0, 0.6, 0.5, 0.4)
    corners = torch.tensor([[0.0, 0.5, -0.5, 0.0], [0.0, 0.1, -0.4, 0.4], [0.6, 0.0, 0.0, 0.3]])
    torch.testing.assert_close(roof(corners), torch.zeros(4))
    assert roof(torch.tensor([[0.0], [0.0], [0.3]])) < 0
