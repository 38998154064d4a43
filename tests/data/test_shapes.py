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
@pytest.mark.parametrize("instance", [0, 3, 5, 10, 16])
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
def test_toys_lie_inside_the_bounding_sphere_and_fill_most_of_it(class_idx):
    shell = torch.nn.functional.normalize(torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)), dim=0)
    for instance in range(100):
        distance = build_toy(class_idx, instance).distance
        assert distance(0.65 * shell).min() < 0
        for radius in (BOUNDING_RADIUS - 0.01, 0.97, 1.0, 1.05):
            assert distance(radius * shell).min() > 0


@pytest.mark.parametrize("class_idx", CLASSES)
def test_every_part_of_an_individual_shows_and_hangs_together_with_the_rest(class_idx):
    points = grid(56, 0.95)
    for instance in range(1, 13):
        toy = build_toy(class_idx, instance)
        distances = torch.stack([part.distance(points / torch.tensor(toy.stretch)[:, None]) for part in toy.parts])
        spacing = 2 * 0.95 / 55
        for number, own in enumerate(distances):
            others = torch.cat([distances[:number], distances[number + 1 :]]).min(dim=0).values
            assert ((own < spacing / 2) & (others > 0)).any(), f"{toy.name} {instance}: part {number} is hidden"
            assert ((own < spacing) & (others < spacing)).any(), f"{toy.name} {instance}: part {number} floats"


@pytest.mark.parametrize("class_idx", CLASSES)
def test_individuals_differ_in_shape_colour_and_features(class_idx):
    toys = [build_toy(class_idx, instance) for instance in range(1, 25)]
    assert len({len(toy.parts) for toy in toys}) > 1
    assert len({len(toy.decals) for toy in toys}) > 1
    colours = torch.tensor([toy.parts[0].colour for toy in toys])
    assert colours.std(dim=0).norm() > 0.2
    assert 0 <= colours.min() <= colours.max() <= 1
    points = grid(30, 0.9)
    solid = torch.stack([toy.distance(points) < 0 for toy in toys]).float()
    overlap = (solid @ solid.T) / (solid.sum(dim=1) + solid.sum(dim=1)[:, None] - solid @ solid.T)
    assert overlap[overlap < 1].max() < 0.97
    assert 0.4 < overlap.min() < 0.75  # the same kind of thing, of another make


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
