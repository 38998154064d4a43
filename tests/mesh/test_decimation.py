"""Fewer triangles: the same shape, and as closed as before, also where the object is thinner than a triangle."""

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("fast_simplification")

from graf.base.errors import UserError
from graf.mesh import ColouredMesh, save_mesh
from graf.mesh.cleaning import enclosed_volumes
from graf.mesh.coloured_mesh import is_watertight
from graf.mesh.decimation import decimate, drop_flaps, separate_walls
from graf.mesh.extraction import Grid, extract_surface


def ball(points):
    return 100 * torch.sigmoid(40 * (0.6 - points.norm(dim=1)))


def cup(points):
    """A thin wall around the z axis with a thin bottom."""
    across, up = points[:, :2].norm(dim=1), points[:, 2]
    wall = torch.maximum((across - 0.5).abs() - 0.012, up.abs() - 0.5)
    bottom = torch.maximum((up + 0.5).abs() - 0.012, across - 0.5)
    return 100 * torch.sigmoid(-200 * torch.minimum(wall, bottom))


def volume(vertices, faces):
    return enclosed_volumes(vertices, faces, np.zeros(len(vertices), np.int32))[0]


def fan_of_tetrahedra(count):
    """Tetrahedra that stand around one edge and share nothing else."""
    vertices, faces = [[0, 0, -0.5], [0, 0, 0.5]], []
    for number in range(count):
        for turn in (-0.3, 0.3):
            angle = 2 * np.pi * number / count + turn
            vertices.append([np.cos(angle), np.sin(angle), 0])
        a, b = 2 + 2 * number, 3 + 2 * number
        faces += [[1, 0, a], [0, 1, b], [0, b, a], [1, a, b]]
    return np.array(vertices, np.float32), np.array(faces, np.int32)


def test_decimation_keeps_the_shape():
    vertices, faces = extract_surface(ball, 50.0, Grid(1.0, 48))
    fewer, triangles = decimate(vertices, faces, 2000)
    assert len(triangles) == pytest.approx(2000, abs=10)
    assert is_watertight(triangles)
    assert np.abs(np.linalg.norm(fewer, axis=1) - 0.6).max() < 0.01
    assert decimate(fewer, triangles, 3000)[1] is triangles
    with pytest.raises(UserError, match="triangles=3: expected at least 4"):
        decimate(vertices, faces, 3)


def test_a_shape_of_which_nothing_is_left_is_told(monkeypatch):
    vertices, faces = fan_of_tetrahedra(5)
    flat = np.array([[0, 1, 2], [2, 1, 0]])
    monkeypatch.setattr("fast_simplification.simplify", lambda *_, **__: (vertices, flat))
    with pytest.raises(UserError, match="triangles=4: nothing of this shape is left"):
        decimate(vertices, faces, 4)


@pytest.mark.parametrize("triangles", [3000, 300])
def test_thin_walls_stay_watertight_in_indices_and_in_a_file_of_places(tmp_path, triangles):
    trimesh = pytest.importorskip("trimesh")
    vertices, faces = extract_surface(cup, 50.0, Grid(0.7, 48))
    assert is_watertight(faces)
    fewer, corners = decimate(vertices, faces, triangles)
    assert is_watertight(corners)
    assert len(corners) == pytest.approx(triangles, rel=0.2)
    save_mesh(tmp_path / "cup.stl", ColouredMesh(fewer, corners, fewer, fewer))
    assert trimesh.load(tmp_path / "cup.stl").is_watertight  # which merges equal places


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("inside_out", [False, True])
def test_walls_that_meet_in_one_edge_get_an_edge_each(count, inside_out):
    vertices, faces = fan_of_tetrahedra(count)
    if inside_out:
        faces = faces[:, ::-1]
    assert not is_watertight(faces)
    placed, separate = separate_walls(vertices, faces)
    assert is_watertight(separate)
    assert len(placed) == len(vertices) + count
    assert len(separate) == len(faces) + 2 * count
    assert volume(placed, separate) == pytest.approx(volume(vertices, faces), rel=0.05)
    middles = placed[len(vertices) :]
    assert np.linalg.norm(middles, axis=1) == pytest.approx(0.01)  # apart, each in the middle of its wall
    if not inside_out:
        angles = np.sort(np.degrees(np.arctan2(middles[:, 1], middles[:, 0])) % 360)
        assert np.minimum(angles % (360 / count), -angles % (360 / count)) == pytest.approx(0, abs=0.1)


def test_a_surface_without_such_edges_stays_as_it_is():
    vertices, faces = fan_of_tetrahedra(1)
    same = separate_walls(vertices, faces)
    assert np.array_equal(same[0], vertices)
    assert np.array_equal(same[1], faces)


def test_triangles_back_to_back_go_in_pairs_and_lines_go():
    once, back, other, line = [0, 1, 2], [2, 1, 0], [0, 1, 3], [4, 4, 5]
    found = drop_flaps(np.array([once, back, other, [1, 2, 0], line, [3, 1, 0], [5, 6, 7]], np.int32))
    assert sorted(map(tuple, np.sort(found, axis=1).tolist())) == [(0, 1, 2), (5, 6, 7)]
    assert [0, 1, 2] in found.tolist() or [1, 2, 0] in found.tolist()  # and not its back
