"""Files of meshes, read back by trimesh and by hand."""

import json
import struct

import numpy as np
import pytest

from graf.base.errors import UserError
from graf.mesh.coloured_mesh import ColouredMesh, face_normals
from graf.mesh.formats import PointCloud, linear_from_srgb, save_mesh, save_points

trimesh = pytest.importorskip("trimesh")


@pytest.fixture
def mesh():
    """A tetrahedron with the front corner red, the left one green, the top one blue."""
    vertices = np.array([[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5], [-0.1, -0.2, -0.3]], np.float32)
    faces = np.array([[0, 1, 2], [0, 3, 1], [1, 3, 2], [2, 3, 0]], np.int32)
    normals = vertices / np.linalg.norm(vertices, axis=1, keepdims=True)
    colours = np.array([[0.8, 0, 0], [0, 0.5, 0], [0, 0, 0.02], [0.2, 0.4, 1]], np.float32)
    return ColouredMesh(vertices, faces, normals, colours)


def read_glb(path):
    """The JSON of a GLB and its arrays by accessor, by hand."""
    content = path.read_bytes()
    magic, version, length, size, kind = struct.unpack_from("<4sIII4s", content)
    assert (magic, version, length, kind) == (b"glTF", 2, len(content), b"JSON")
    scene = json.loads(content[20 : 20 + size])
    data_size, data_kind = struct.unpack_from("<I4s", content, 20 + size)
    data = content[28 + size :]
    assert (data_size, data_kind) == (len(data), b"BIN\0")
    assert scene["buffers"] == [{"byteLength": len(data)}]
    arrays = []
    for accessor in scene["accessors"]:
        view = scene["bufferViews"][accessor["bufferView"]]
        assert view["byteOffset"] % 4 == 0
        dtype = {5126: "<f4", 5125: "<u4", 5123: "<u2"}[accessor["componentType"]]
        width = {"VEC3": 3, "VEC4": 4, "SCALAR": 1}[accessor["type"]]
        part = data[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]
        arrays.append(np.frombuffer(part, dtype).reshape(accessor["count"], width))
    return scene, arrays


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".glb", ".stl"])
def test_trimesh_reads_the_mesh_back(mesh, tmp_path, suffix):
    save_mesh(tmp_path / f"m{suffix}", mesh)
    found = trimesh.load(tmp_path / f"m{suffix}", force="mesh", process=suffix == ".stl")
    assert found.is_watertight
    assert found.volume == pytest.approx(trimesh.Trimesh(mesh.vertices, mesh.faces).volume, rel=1e-5)
    assert found.volume > 0
    if suffix == ".stl":
        return
    order = [1, 2, 0] if suffix == ".glb" else [0, 1, 2]
    np.testing.assert_allclose(found.vertices, mesh.vertices[:, order], atol=1e-6)
    if suffix != ".glb":  # trimesh hands on the linear numbers of a GLB as bytes
        np.testing.assert_allclose(found.visual.vertex_colors[:, :3] / 255, mesh.colours, atol=0.5 / 255 + 1e-4)


def test_a_glb_has_linear_colours_of_16_bits_and_y_up(mesh, tmp_path):
    save_mesh(tmp_path / "m.glb", mesh)
    scene, (places, normals, colours, indices) = read_glb(tmp_path / "m.glb")
    primitive = scene["meshes"][0]["primitives"][0]
    assert primitive["attributes"] == {"POSITION": 0, "NORMAL": 1, "COLOR_0": 2}
    assert scene["accessors"][2]["normalized"] is True
    linear = colours[:, :3] / 65535
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(srgb, mesh.colours, atol=2e-4)
    assert linear[0, 0] == pytest.approx(0.604, abs=0.001)  # of 0.8, by any table of sRGB
    assert (colours[:, 3] == 65535).all()
    assert np.argmax(places[2]) == 1  # our top is glTF's +y
    assert np.argmax(places[0]) == 2  # our front is its +z
    np.testing.assert_allclose(normals, mesh.normals[:, [1, 2, 0]])
    triangles = indices.reshape(-1, 3)
    outward = face_normals(places, triangles)
    assert (np.einsum("ij,ij->i", outward, places[triangles].mean(1) - places.mean(0)) > 0).all()
    assert scene["accessors"][0]["max"] == places.max(0).tolist()
    assert "y up" in scene["asset"]["extras"]["axes"]
    assert scene["extensionsUsed"] == ["KHR_materials_unlit"]
    save_mesh(tmp_path / "lit.glb", mesh, unlit=False)
    assert "extensionsUsed" not in read_glb(tmp_path / "lit.glb")[0]


def test_unit_and_up_axis_stand_in_the_comments(mesh, tmp_path):
    save_mesh(tmp_path / "m.ply", mesh)
    save_mesh(tmp_path / "m.obj", mesh)
    save_mesh(tmp_path / "m.stl", mesh)
    for name in ("m.ply", "m.obj", "m.stl"):
        assert b"z up, front towards +x" in (tmp_path / name).read_bytes()
    assert b"unit: one world unit" in (tmp_path / "m.ply").read_bytes()
    assert not (tmp_path / "m.stl").read_bytes().startswith(b"solid")


def test_srgb_numbers_become_linear_by_the_standard():
    assert linear_from_srgb(np.array([0, 0.02, 0.5, 1])) == pytest.approx([0, 0.02 / 12.92, 0.21404, 1], abs=1e-5)


def test_an_open_mesh_is_no_stl_and_leaves_the_file_that_was_there(mesh, tmp_path):
    (tmp_path / "m.stl").write_text("mine")
    with pytest.raises(UserError, match="not watertight"):
        save_mesh(tmp_path / "m.stl", ColouredMesh(mesh.vertices, mesh.faces[1:], mesh.normals, mesh.colours))
    assert (tmp_path / "m.stl").read_text() == "mine"
    with pytest.raises(UserError, match=r"'\.fbx'; expected one of \.ply, \.glb, \.obj, \.stl"):
        save_mesh(tmp_path / "m.fbx", mesh)


def test_a_point_cloud_is_a_ply_without_faces(mesh, tmp_path):
    save_points(tmp_path / "p.ply", PointCloud(mesh.vertices, mesh.normals, mesh.colours))
    found = trimesh.load(tmp_path / "p.ply")
    np.testing.assert_allclose(found.vertices, mesh.vertices)
    np.testing.assert_allclose(found.colors[:, :3] / 255, mesh.colours, atol=0.5 / 255 + 1e-6)
    with pytest.raises(UserError, match=r"written as \.ply"):
        save_points(tmp_path / "p.glb", PointCloud(mesh.vertices, mesh.normals, mesh.colours))
