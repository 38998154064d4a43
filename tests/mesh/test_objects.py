"""Whole meshes: of true toys made into density fields, of fields with known colours, and of a trained run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("skimage")

import graf
from benchmarks.meshes import measure_accuracy
from graf.app import mesh_command
from graf.app.mesh_command import main
from graf.base.errors import UserError
from graf.data.shapes import build_toy
from graf.geometry.cameras import Intrinsics, pose_from_angles
from graf.geometry.rays import RayCaster
from graf.geometry.volume_rendering import RayNoise, RaySampling, render_rays
from graf.mesh import ColouredMesh, MeshOptions, extract_mesh
from graf.mesh.colouring import colour_along_normals, colour_from_views, estimate_normals
from graf.mesh.extraction import Grid, extract_surface
from graf.mesh.field_of_object import FieldOfObject
from graf.mesh.level import choose_level
from graf.mesh.point_cloud import collect_points, write_depth_maps
from graf.mesh.rasteriser import draw_mesh


class TrueToy:
    """A toy as a field: dense inside of its distance function, coloured by the place."""

    radius = 1.0

    def __init__(self, class_idx):
        self.toy = build_toy(class_idx)

    def density(self, points):
        return 1000 * torch.sigmoid(-500 * self.toy.distance(points.T))

    def radiance(self, points, directions):
        return 0.8 * torch.sin(2 * points), self.density(points)


class TwoSides:
    """A ball that is red for who looks from +x and green for who looks from -x."""

    radius = 1.0

    def density(self, points):
        return 400 * torch.sigmoid(150 * (0.6 - points.norm(dim=1)))

    def radiance(self, points, directions):
        red = (directions[:, :1] < 0).float() * 2 - 1
        return torch.cat([red, -red, -torch.ones_like(red)], dim=1), self.density(points)


def around(resolution, views=6):
    u = torch.arange(views) / views
    poses = pose_from_angles(u, torch.full_like(u, 0.35), 3.5)
    return poses, RayCaster(Intrinsics.from_fov(resolution, 30), 2.5, 4.5, 1.0).cast_images(poses, resolution)


def mesh_of(shape, resolution=64):
    grid = Grid(1.0, resolution)
    level = choose_level(shape.density, around(96)[1]).density
    vertices, faces = extract_surface(shape.density, level, grid)
    normals = estimate_normals(shape.density, vertices, faces, grid.cell / 2)
    return ColouredMesh(vertices, faces, normals, colour_along_normals(shape.radiance, vertices, normals, 1.0))


@pytest.fixture(scope="module", params=[1, 3], ids=["duck", "mug"])
def toy_and_mesh(request):
    return TrueToy(request.param), mesh_of(TrueToy(request.param)), request.param


def test_a_mesh_of_the_true_toy_lies_on_the_true_toy(toy_and_mesh):
    shape, mesh, class_idx = toy_and_mesh
    found = measure_accuracy(mesh, class_idx, shape.toy)
    assert found.chamfer < 0.02  # less than a cell, 0.031
    assert found.normal_angle < 13  # the field is a step, much steeper than a cell
    assert found.iou > 0.95  # of 64 cells across, against masks that are not blurred


def test_a_drawing_of_the_mesh_is_the_render_of_its_field(toy_and_mesh):
    shape, mesh, _ = toy_and_mesh
    poses, rays = around(64, views=2)

    def field(points, directions, noise):
        rgb, density = shape.radiance(points.reshape(-1, 3), None)
        return rgb.view(points.shape), density.view(points.shape[:-1])

    render = render_rays(field, rays, RaySampling(96, 32), RayNoise(), torch.ones(3)).as_images()
    for number, pose in enumerate(poses):
        drawing = draw_mesh(mesh, pose, Intrinsics.from_fov(64, 30))
        mask = render.opacity[number, 0].numpy() > 0.5
        assert (mask & drawing.mask).sum() / (mask | drawing.mask).sum() > 0.95
        solid = (render.opacity[number, 0].numpy() > 0.99) & drawing.mask
        expected = (render.rgb[number].permute(1, 2, 0).numpy() + 1) / 2
        assert np.abs(drawing.colours - expected)[solid].mean() < 0.02
        assert np.median(np.abs(drawing.depth - render.depth[number, 0].numpy())[solid]) < 0.03
        assert (drawing.colours[~drawing.mask] == 1).all()


def test_vertices_have_the_colour_of_the_field_there(toy_and_mesh):
    shape, mesh, _ = toy_and_mesh
    rgb, _ = shape.radiance(torch.from_numpy(mesh.vertices), None)
    error = np.abs(mesh.colours - ((rgb + 1) / 2).numpy())
    assert error.mean() < 0.02  # a little of it lies behind the surface, as in a picture
    np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=1), 1, atol=1e-5)


def test_cameras_colour_what_they_see_and_nothing_else():
    shape = TwoSides()
    mesh = mesh_of(shape, 32)
    pose = pose_from_angles(torch.tensor([0.0]), torch.tensor([0.5]), 3.5)  # on +x
    rays = RayCaster(Intrinsics.from_fov(64, 30), 2.5, 4.5, 1.0).cast_images(pose, 64)
    unseen = np.full_like(mesh.vertices, 0.25)
    colours = colour_from_views(shape, mesh.vertices, mesh.normals, unseen, pose, rays)
    front, behind = mesh.vertices[:, 0] > 0.45, mesh.vertices[:, 0] < 0.1
    np.testing.assert_allclose(colours[front], [[1, 0, 0]] * int(front.sum()), atol=1e-5)
    np.testing.assert_allclose(colours[behind], 0.25)
    both = torch.cat([pose, pose_from_angles(torch.tensor([0.5]), torch.tensor([0.5]), 3.5)])
    rays = RayCaster(Intrinsics.from_fov(64, 30), 2.5, 4.5, 1.0).cast_images(both, 64)
    colours = colour_from_views(shape, mesh.vertices, mesh.normals, unseen, both, rays)
    assert colours[mesh.vertices[:, 0] < -0.45][:, 1].min() > 0.99


def test_a_triangle_is_drawn_where_it_is_and_the_nearer_one_hides_the_other():
    pose = torch.eye(4)
    pose[2, 3] = 2.0  # looking down -z
    near = [[-0.5, -0.5, 0.5], [0.5, -0.5, 0.5], [-0.5, 0.5, 0.5]]
    far = [[-1, -1, 0], [1, -1, 0], [-1, 1, 0]]
    vertices = np.array(near + far, np.float32)
    colours = np.repeat(np.array([[1, 0, 0], [0, 0, 1]], np.float32), 3, axis=0)
    for order in ([[0, 1, 2], [3, 4, 5]], [[3, 4, 5], [0, 1, 2]]):
        mesh = ColouredMesh(vertices, np.array(order, np.int32), vertices, colours)
        drawing = draw_mesh(mesh, pose, Intrinsics(8, 8, 8.0))
        assert drawing.colours[5, 2].tolist() == [1, 0, 0]
        assert drawing.depth[5, 2] == pytest.approx(1.5)
        assert drawing.colours[7, 0].tolist() == [0, 0, 1]
        assert drawing.depth[7, 0] == pytest.approx(2)
        assert not drawing.mask[0, 7]


# ---------------------------------------------------------------- a trained run


class Denser(FieldOfObject):
    """An object of the smoke run, whose two iterations make nothing solid, made solid."""

    def density(self, points):
        return 200 * super().density(points)


def test_the_command_writes_every_format_and_depth_maps(smoke_run, tmp_path, restored_process, capsys, monkeypatch):
    trimesh = pytest.importorskip("trimesh")
    monkeypatch.setattr(mesh_command, "AZIMUTHS", 2)
    monkeypatch.setattr(mesh_command, "RESOLUTION", 16)
    renderer = graf.load(smoke_run.folder, device="cpu")
    densities = FieldOfObject(renderer, renderer.codes(0, range(1))[0], "duck").density(torch.rand(4000, 3) - 0.5)
    level = f"{float(densities.median()):.3g}"
    files = [str(tmp_path / name) for name in ("m.glb", "m.ply", "m.obj", "m.stl")]
    arguments = [str(smoke_run.folder), "--class", "duck", "--resolution", "24", "--depth", "--level", level]
    assert main([*arguments, "--triangles", "600", "--device", "cpu", "--out", *files]) == 0
    said = capsys.readouterr().out
    assert "(as given)" in said
    assert ", watertight, " in said
    for file in files:
        assert f"wrote {file}" in said
        assert trimesh.load(file, force="mesh").is_watertight
    cameras = json.loads((tmp_path / "m_depth" / "cameras.json").read_text())
    assert all((tmp_path / "m_depth" / frame["file"]).is_file() for frame in cameras["frames"])


def test_points_and_depth_maps_show_the_surface_of_the_field(smoke_run, tmp_path):
    renderer = graf.load(smoke_run.folder, device="cpu")
    shape = Denser(renderer, renderer.codes(0, range(1))[0], "mug")
    cloud = collect_points(shape, azimuths=2, resolution=12)
    places = torch.from_numpy(cloud.places)
    before = shape.density(places + 0.05 * torch.from_numpy(cloud.normals))
    assert (shape.density(places) >= before).float().mean() > 0.9
    assert 0 <= cloud.colours.min() <= cloud.colours.max() <= 1
    *files, cameras = write_depth_maps(shape, 2, 12, tmp_path)
    scene = json.loads(cameras.read_text())
    found = []
    for file, frame in zip(files, scene["frames"], strict=True):
        depth = torch.from_numpy(np.array(Image.open(file)).astype(np.float32)) * scene["max_depth"] / 65535
        row, column = torch.nonzero(depth, as_tuple=True)
        z = depth[row, column]
        x, y = (column + 0.5 - 6) * z / scene["focal"], -(row + 0.5 - 6) * z / scene["focal"]
        pose = torch.tensor(frame["camera_to_world"])
        found.append(torch.stack([x, y, -z], dim=1) @ pose[:3, :3].T + pose[:3, 3])
    np.testing.assert_allclose(torch.cat(found).numpy(), cloud.places, atol=1e-3)


def test_what_cannot_be_made_is_told_before_it_is_computed(smoke_run, capsys, restored_process, monkeypatch):
    folder = str(smoke_run.folder)
    assert main([folder, "--out", "m.fbx"]) == 1
    assert "m.fbx: has the suffix '.fbx'; expected one of .ply" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(FieldOfObject, "density", lambda *_: pytest.fail("the field was asked"))
        assert main([folder, "--resolution", "1"]) == 1
        assert "resolution=1: expected 2 to" in capsys.readouterr().err
        assert main([folder, "--triangles", "3"]) == 1
        assert "triangles=3: expected at least 4" in capsys.readouterr().err
    assert main([folder, "--level", "-1"]) == 1
    assert "level=-1.0: expected a density above 0" in capsys.readouterr().err
    renderer = graf.load(folder, device="cpu")
    with pytest.raises(UserError, match="colours='best': expected normal or views"):
        extract_mesh(renderer, renderer.codes(0, range(1))[0], 0, MeshOptions(colours="best"))
