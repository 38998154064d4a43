"""The videos that captures are measured on tell the truth about themselves."""

import json

import numpy as np
import pytest
import torch

from benchmarks.videos import Shot, Walk, film_turntable, film_walkaround, main, render_table, walk_poses
from graf.geometry.cameras import Intrinsics, project_points

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")


def test_the_command_writes_a_video_of_each_toy_with_the_camera_of_every_frame(tmp_path):
    assert main(["--out", str(tmp_path), "--size", "48", "--frames", "10", "--direction", "cw"]) == 0
    truth = json.loads((tmp_path / "truth.json").read_text())
    assert sorted(truth) == ["duck.mp4", "mug.mp4"]
    for name, entry in truth.items():
        frames, _ = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / name))
        assert frames == len(entry["frames"]) == 11  # a turn and a tenth
        azimuths = np.array([frame["azimuth"] for frame in entry["frames"]])
        np.testing.assert_allclose(np.diff(azimuths) % 360, 324, atol=0.01)
        assert {round(frame["elevation"]) for frame in entry["frames"]} == {22}
        for frame in entry["frames"]:
            azimuth, elevation = np.radians(frame["azimuth"]), np.radians(frame["elevation"])
            place = [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)]
            np.testing.assert_allclose(np.array(frame["pose"])[:3, 3] / 4.2, place, atol=1e-4)


def test_a_second_video_keeps_the_truth_of_the_first(tmp_path):
    main(["--out", str(tmp_path), "--size", "32", "--frames", "8", "--toys", "car"])
    main(["--out", str(tmp_path), "--size", "32", "--frames", "8", "--toys", "car", "--walkaround"])
    assert sorted(json.loads((tmp_path / "truth.json").read_text())) == ["car.mp4", "car_walkaround.mp4"]


def test_a_place_on_the_table_has_its_colour_from_wherever_it_is_seen():
    poses, intrinsics = walk_poses(Walk(frames=6, elevations=(40.0, 60.0))), Intrinsics.from_fov(96, 40.0)
    pictures = render_table(poses, intrinsics, ground=-0.5)
    places = torch.cat([(torch.rand(200, 2) - 0.5) * 1.5, torch.full((200, 1), -0.5)], dim=1)
    seen = []
    for picture, pose in zip(pictures, poses, strict=True):
        pixels, _ = project_points(places, pose, intrinsics)
        grid = (2 * pixels / 96 - 1)[None, None]
        seen.append(torch.nn.functional.grid_sample(picture[None], grid, align_corners=False)[0, :, 0])
    colours = torch.stack(seen)  # (6, 3, 200)
    between_views, between_places = colours.std(dim=0).mean(), colours.mean(dim=0).std(dim=1).mean()
    assert between_views < 0.5 * between_places  # what is left is how finely each view sees the pattern


def test_a_textured_wall_stands_still_and_the_toy_is_in_front_of_it():
    footage = film_turntable("duck", Shot(size=48, frames=6, turns=1.0, textured=True))
    alone = (footage.masks == 0).all(axis=0)
    assert alone.any()
    assert (footage.frames[:, alone] == footage.frames[0, alone]).all()
    assert footage.frames[0, alone].std() > 20


@pytest.mark.parametrize("toy", ["duck", "house"])
def test_a_walk_keeps_the_toy_in_the_picture(toy):
    footage = film_walkaround(toy, Walk(size=48, frames=6))
    masks = footage.masks > 0
    assert masks.any(axis=(1, 2)).all()
    assert not masks[:, [0, -1]].any()
    assert not masks[:, :, [0, -1]].any()
