"""Surfaces: a ball is a ball, slabs change nothing, everything is closed, and memory keeps to its budget."""

import math
import tracemalloc

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")

from graf.base.errors import UserError
from graf.geometry.cameras import Intrinsics, pose_from_angles
from graf.geometry.rays import RayCaster
from graf.mesh.cleaning import drop_floaters, enclosed_volumes, label_components
from graf.mesh.coloured_mesh import face_normals, is_watertight
from graf.mesh.extraction import BYTES_PER_POINT, EmptySurface, Grid, extract_surface
from graf.mesh.level import choose_level
from graf.mesh.rays_around import meet_rays


def ball(radius=0.6, centre=(0.0, 0.0, 0.0), scale=1.0, sharpness=40.0):
    """A density that falls off smoothly around the surface of a ball: half of `scale` * 100 on it."""
    return lambda p: 100 * scale * torch.sigmoid(sharpness * (radius - (p - torch.tensor(centre)).norm(dim=1)))


def is_manifold(faces):
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    return bool((np.unique(edges, axis=0, return_counts=True)[1] == 2).all())


def area(vertices, faces):
    return np.linalg.norm(face_normals(vertices, faces), axis=1).sum() / 2


def budget_of(layers, resolution):
    return (layers + 1.5) * BYTES_PER_POINT * (resolution + 3) ** 2 / 2**20


def rays_around(resolution=32, views=8):
    u = torch.arange(views) / views
    caster = RayCaster(Intrinsics.from_fov(resolution, 30), 2.5, 4.5, 1.0)
    return caster.cast_images(pose_from_angles(u, torch.full_like(u, 0.3), 3.5), resolution)


@pytest.mark.parametrize("layers", [1, 5, 47, 100])
def test_a_ball_is_a_closed_sphere_of_its_radius_across_all_seams(layers):
    grid = Grid(1.0, 47, budget_of(layers, 47))
    assert grid.slab_layers == min(layers, 49)
    vertices, faces = extract_surface(ball(), 50.0, grid)
    assert np.abs(np.linalg.norm(vertices, axis=1) - 0.6).max() < 0.006
    assert area(vertices, faces) == pytest.approx(4 * np.pi * 0.36, rel=0.01)
    assert is_watertight(faces)
    assert is_manifold(faces)
    assert len(vertices) - 3 * len(faces) / 2 + len(faces) == 2  # Euler's characteristic of a sphere
    assert enclosed_volumes(vertices, faces, np.zeros(len(vertices), np.int32))[0] == pytest.approx(
        4 / 3 * np.pi * 0.216, rel=0.015
    )
    assert vertices.dtype == np.float32
    assert faces.dtype == np.int32


def test_slabs_give_the_surface_of_one_block_up_to_the_order_of_vertices():
    def bumpy(p):  # a surface with holes and several pieces, ambiguous cells among them
        return 50 * (1 + torch.sin(9 * p[:, 0]) * torch.sin(8 * p[:, 1]) + torch.sin(11 * p[:, 2]))

    found = []
    for layers in (100, 7, 1):
        vertices, faces = extract_surface(bumpy, 60.0, Grid(1.0, 40, budget_of(layers, 40)))
        assert is_watertight(faces)
        assert is_manifold(faces)
        corners = vertices[faces]  # each triangle by its corners, the smallest first, which keeps the orientation
        first = np.lexsort(corners.transpose(2, 0, 1)[::-1], axis=1)[:, :1]
        turned = np.take_along_axis(corners, ((first + np.arange(3)) % 3)[..., None], axis=1).reshape(-1, 9)
        found.append((len(vertices), turned[np.lexsort(turned.T)]))
    for count, triangles in found[1:]:
        assert count == found[0][0]
        np.testing.assert_allclose(triangles, found[0][1], rtol=0, atol=1e-5)


def test_a_surface_through_grid_points_is_closed_too():
    grid = Grid(1.0, 16)
    for level in (0.5, 0.25, 1 / 8):  # on planes and edges of the grid, where the density is exactly the level
        vertices, faces = extract_surface(lambda p: (1 - p.abs().sum(dim=1)).clamp(min=0), level, grid)
        assert is_watertight(faces)
        assert np.abs(np.abs(vertices).sum(1) - (1 - level)).max() < 0.6 * grid.cell


def test_a_density_that_reaches_the_end_of_the_grid_is_closed_there():
    vertices, faces = extract_surface(lambda p: torch.ones(len(p)), 0.5, Grid(1.0, 12))
    assert is_watertight(faces)
    assert np.abs(vertices).max() == pytest.approx(1 + 1 / 12, abs=0.1)


def test_a_grid_within_its_budget_is_marched_within_its_budget():
    tracemalloc.start()
    try:
        grid = Grid(1.0, 160, budget_mib=8)
        vertices, faces = extract_surface(ball(sharpness=100), 50.0, grid)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert peak - 2 * (vertices.nbytes + faces.nbytes) / 2**20 < 8 + 4
    assert grid.slab_layers < 15
    with pytest.raises(UserError, match=r"a budget of 0.5 MiB is less than one layer .* expected at least"):
        Grid(1.0, 160, budget_mib=0.5)
    with pytest.raises(UserError, match="resolution=1: expected 2 to"):
        Grid(1.0, 1)


@pytest.mark.parametrize("resolution", [160, 163, 512, 2048])
def test_the_budget_that_is_asked_for_is_enough(resolution):
    with pytest.raises(UserError, match="expected at least") as caught:
        Grid(1.0, resolution, budget_mib=0.0)
    least = int(str(caught.value).split()[-2])
    assert Grid(1.0, resolution, budget_mib=least).slab_layers >= 1


@pytest.mark.parametrize("budget", [math.inf, -math.inf, math.nan])
def test_a_budget_without_bound_is_told(budget):
    with pytest.raises(UserError, match=f"a budget of {budget} MiB: expected a finite number"):
        Grid(1.0, 160, budget_mib=budget)


def test_no_surface_is_told():
    with pytest.raises(EmptySurface, match=r"no surface at level 200: .* try a lower --level"):
        extract_surface(ball(), 200.0, Grid(1.0, 8))


def test_rays_meet_a_uniform_ball_where_half_of_their_light_is_lost():
    met = meet_rays(lambda p: 10.0 * (p.norm(dim=1) < 0.8), rays_around(33), 400)
    middle = 33 * 33 // 2
    assert met.distance[:, middle].numpy() == pytest.approx(3.5 - 0.8 + np.log(2) / 10, abs=0.005)
    assert float(met.reached.max()) == 10
    assert not met.hit[:, 0].any()


def test_rays_are_followed_image_by_image_so_that_many_images_take_no_more_memory():
    asked = []

    def density(p):
        asked.append(len(p))
        return ball()(p)

    rays = rays_around(8, views=3)
    together = meet_rays(density, rays, 16)
    assert max(asked) == 8 * 8 * 16
    for number in range(3):
        alone = meet_rays(ball(), rays[number : number + 1], 16)
        assert torch.equal(together.distance[number], alone.distance[0])
        assert torch.equal(together.reached[number], alone.reached[0])


def test_denser_fields_have_the_same_surface_as_rays_meet_it():
    radii = []
    for scale in (1.0, 2.0, 4.0):
        density = ball(scale=scale, sharpness=200)
        vertices, _ = extract_surface(density, choose_level(density, rays_around(96)).density, Grid(1.0, 64))
        radii.append(np.linalg.norm(vertices, axis=1).mean())
    assert radii[0] == pytest.approx(0.6, abs=0.02)
    # where half of the light is lost moves outwards by log(2) / sharpness, as the density falls off
    assert np.diff(radii) == pytest.approx(np.log(2) / 200, abs=0.004)


def test_haze_around_an_object_does_not_become_its_surface():
    def hazy(p):
        return ball(sharpness=60)(p) + 0.25

    vertices, _ = extract_surface(hazy, choose_level(hazy, rays_around()).density, Grid(1.0, 48))
    assert np.linalg.norm(vertices, axis=1).max() < 0.68
    with pytest.raises(UserError, match=r"no ray loses half of its light .* 0.1"):
        choose_level(lambda p: torch.full((len(p),), 0.1), rays_around())


def test_cleaning_takes_little_memory_besides_the_mesh():
    vertices, faces = extract_surface(ball(0.9, sharpness=100), 50.0, Grid(1.0, 96))
    drop_floaters(vertices, faces)  # imports
    tracemalloc.start()
    try:
        drop_floaters(vertices, faces)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 2 million triangles at 512^3: 150 MiB of 300, of which the mesh and its slabs have 143
    assert peak < 84 * len(faces)  # NumPy 1 needs 82, 2 needs less than 80


def test_floaters_and_cavities_go_and_the_object_stays():
    def scene(p):
        shell = ball(0.6)(p) * (p.norm(dim=1) > 0.3)
        return shell + ball(0.08, (0.8, 0.4, 0.0), sharpness=200)(p)

    vertices, faces = extract_surface(scene, 50.0, Grid(1.0, 64))
    assert label_components(faces, len(vertices)).max() == 2
    kept, triangles, dropped = drop_floaters(vertices, faces)
    assert dropped == 2
    assert is_watertight(triangles)
    np.testing.assert_allclose(np.linalg.norm(kept, axis=1), 0.6, atol=0.006)
    assert drop_floaters(kept, triangles)[2] == 0
