"""Renders as a data set: this program's own `transforms` type reads the pictures and cameras that were rendered."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from graf.app import builders
from graf.base.errors import UserError
from graf.config import load_config
from graf.geometry.cameras import Intrinsics, elevation_from_height
from graf.models.camera_refinement import STORED_FACTOR, CameraRefinement
from graf.sharing.transforms import cut_out, turntable_views, write_transforms

#: a difference of two levels of 255, in [-1, 1]: colour and opacity are rounded apart
TWO_LEVELS = 4 / 255


def read_back(folder, white: bool, imsize: int = 16):
    keys = ["data.type=transforms", f"data.datadir={folder}", f"data.imsize={imsize}", f"data.white_bkgd={white}"]
    return builders.open_photographs(load_config("smoke", keys), "all")


@pytest.mark.parametrize("white", [True, False], ids=["white", "black"])
def test_the_own_reader_sees_the_renders_from_their_cameras(any_renderer, make_renderer, tmp_path, white):
    renderer = any_renderer if white else make_renderer("data.white_bkgd=false")
    z = renderer.codes(4, range(1))[0]
    views = turntable_views(renderer, 1, 5)
    written = write_transforms(tmp_path / "set", renderer, z, views)
    assert [path.name for path in written] == ["transforms.json", *(f"{number:04d}.png" for number in range(5))]
    photographs = read_back(tmp_path / "set", white)
    assert_close(photographs.poses, views.poses, rtol=0, atol=1e-6)
    assert photographs.fov == pytest.approx(30.0, abs=1e-4)
    images = torch.stack([photographs[number][0] for number in range(5)])
    renders = renderer.render(z, 1, photographs.poses)
    assert 0.05 < float(renders.opacity.max()) <= 1
    assert_close(images, renders.rgb, rtol=0, atol=TWO_LEVELS)


def test_a_lens_that_was_learned_is_the_one_that_is_written(make_renderer, tmp_path):
    renderer = make_renderer()
    z = renderer.codes(4, range(1))[0]
    renderer.generator.cameras = cameras = CameraRefinement(3, 2)
    with torch.no_grad():
        cameras.lens.fill_(STORED_FACTOR * math.log(1.25))  # a focal length a quarter longer
        cameras.framing.fill_(1.0)  # the photographs' own, which a placed camera has not
    views = turntable_views(renderer, 0, 3)
    write_transforms(tmp_path / "set", renderer, z, views)
    photographs = read_back(tmp_path / "set", white=True)
    degrees = 2 * math.degrees(math.atan(math.tan(math.radians(15)) / 1.25))
    assert photographs.fov == pytest.approx(degrees, abs=1e-4)
    renderer.generator.cameras = None
    caster = replace(renderer.caster, intrinsics=Intrinsics.from_fov(16, photographs.fov))
    plain = replace(renderer, caster=caster)
    images = torch.stack([photographs[number][0] for number in range(3)])
    assert_close(images, plain.render(z, 0, photographs.poses).rgb, rtol=0, atol=TWO_LEVELS)


def test_the_file_has_what_nerfstudio_asks_for(make_renderer, tmp_path):
    renderer = make_renderer("data.imsize=24")
    write_transforms(
        tmp_path / "set", renderer, renderer.codes(0, range(1))[0], turntable_views(renderer, 0, 2), {"a": 1}
    )
    found = json.loads((tmp_path / "set" / "transforms.json").read_text())
    # nerfstudio's data parser of its own format: fl_x, fl_y, cx, cy, w, h, distortion, camera_model, frames
    assert found["camera_model"] == "OPENCV"
    assert (found["w"], found["h"], found["cx"], found["cy"]) == (24, 24, 12, 12)
    assert found["fl_x"] == found["fl_y"] == pytest.approx(12 / math.tan(found["camera_angle_x"] / 2))
    assert {found[name] for name in ("k1", "k2", "p1", "p2")} == {0}
    assert found["graf"] == {"a": 1}
    for frame in found["frames"]:
        with Image.open(tmp_path / "set" / frame["file_path"]) as picture:
            assert (picture.mode, picture.size) == ("RGBA", (24, 24))
        assert np.array(frame["transform_matrix"]).shape == (4, 4)


def test_cameras_stand_around_the_object_at_each_elevation_in_turn(make_renderer):
    renderer = make_renderer()
    own = turntable_views(renderer, 2, 4)
    assert_close(own.u, torch.tensor([0, 0.25, 0.5, 0.75]))
    assert_close(own.v, torch.tensor([0.3, 0.4, 0.3, 0.4]))
    assert own.class_idx.tolist() == [2] * 4
    chosen = turntable_views(renderer, 0, 3, [-10, 60])
    assert [elevation_from_height(v) for v in chosen.v.tolist()] == pytest.approx([-10, 60, -10], abs=1e-4)
    with pytest.raises(UserError, match="--elevations 91"):
        turntable_views(renderer, 0, 3, [91])
    with pytest.raises(UserError, match="--transforms 1: expected at least 2"):
        turntable_views(renderer, 0, 1)


def test_cutting_out_is_the_inverse_of_laying_over_a_background():
    generator = torch.Generator().manual_seed(0)
    colour, opacity = torch.rand(3, 9, 9, generator=generator) * 2 - 1, torch.rand(1, 9, 9, generator=generator)
    opacity[0, 0], opacity[0, 1] = 0, 1
    background = torch.tensor([0.5, -1.0, 1.0])
    rgb = colour * opacity + background[:, None, None] * (1 - opacity)
    found = torch.from_numpy(cut_out(rgb, opacity, background)).permute(2, 0, 1) / 255
    again = (2 * found[:3] - 1) * found[3:] + background[:, None, None] * (1 - found[3:])
    assert_close(again, rgb, rtol=0, atol=TWO_LEVELS)
    assert_close(2 * found[:3, 1] - 1, colour[:, 1], rtol=0, atol=1.01 / 255)


def test_a_folder_that_exists_is_left_alone_and_a_failure_leaves_none(make_renderer, tmp_path, monkeypatch):
    renderer = make_renderer()
    z, views = renderer.codes(0, range(1))[0], turntable_views(renderer, 0, 2)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").touch()
    with pytest.raises(UserError, match="exists already"):
        write_transforms(tmp_path / "set", renderer, z, views)
    monkeypatch.setattr("graf.sharing.transforms.save_png", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_transforms(tmp_path / "other", renderer, z, views)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
