"""The synthetic set: true geometry, light that stays with the world, a cache that is whole or absent."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from graf.config import Config
from graf.data import synthetic
from graf.data.datasets import DataError, DataSettings, open_dataset
from graf.data.shapes import CLASS_NAMES, Painted, Toy, build_toy, sphere
from graf.data.synthetic import SyntheticSettings, choose_views, ensure_synthetic, render_views
from graf.geometry.cameras import Intrinsics, label_angles, pose_from_angles, project_points
from graf.geometry.rays import RayCaster, pixel_grid

SMALL = SyntheticSettings(
    imsize=16,
    count=8,
    seed=0,
    instances=1,
    known_instances=None,
    heldout_instances=0,
    radius=3.5,
    fov=30.0,
    v_list=(0.3, 0.4),
    white_bkgd=True,
)
MANY = replace(SMALL, count=45, instances=5, known_instances=2, heldout_instances=2)
THREE_HEIGHTS = replace(SMALL, count=1000, v_list=synthetic.DEFAULT_V_LIST)
DEFAULTS = DataSettings.from_mapping(Config().data.model_dump())
INTRINSICS = Intrinsics.from_fov(48, 30.0)


def poses_at(*degrees, v=0.27, radius=3.5):
    u = torch.tensor(degrees) / 360
    return pose_from_angles(u, torch.full_like(u, v), radius)


def surface_points(pose, depth, mask, intrinsics):
    """World points (P, 3) of the covered pixels of a picture without supersampling, and their pixel numbers."""
    rays = RayCaster(intrinsics, 0.0, 9.0).cast(pose[None], pixel_grid(1, intrinsics.height, intrinsics.width))
    distance = depth.flatten() / rays.axis_cosine[0, :, 0]
    pixels = torch.nonzero(mask.flatten() > 0)[:, 0]
    return (rays.origins[0] + rays.directions[0] * distance[:, None])[pixels], pixels


def test_ball_has_the_depth_and_outline_of_its_closed_form(monkeypatch):
    ball = Toy("ball", [Painted(sphere((0, 0, 0), 0.5), (1.0, 0.0, 0.0))])
    monkeypatch.setattr(synthetic, "build_toy", lambda *_: ball)
    intrinsics = Intrinsics.from_fov(65, 30.0)
    rgb, depth, mask = render_views(0, poses_at(40.0), intrinsics)
    assert depth[0, 0, 32, 32].item() == pytest.approx(3.0, abs=2e-3)
    outline = intrinsics.focal * math.tan(math.asin(0.5 / 3.5))  # radius of the silhouette in pixels
    assert mask.sum().item() == pytest.approx(math.pi * outline**2, rel=0.01)
    assert ((rgb[0, 1:] == 1) | (mask[0] > 0)).all()  # white around the ball
    assert rgb[0, 1, 32, 32] == -1  # and no green on it


@pytest.mark.parametrize("class_idx", range(len(CLASS_NAMES)))
def test_depth_leads_to_the_surface(class_idx):
    poses = poses_at(0.0, 130.0)
    _, depth, mask = render_views(class_idx, poses, INTRINSICS, supersampling=1)
    for view in range(2):
        points, _ = surface_points(poses[view], depth[view], mask[view], INTRINSICS)
        assert len(points) > 200
        assert build_toy(class_idx).distance(points.T).abs().max() < 3e-3


@pytest.mark.parametrize("class_idx", range(len(CLASS_NAMES)))
def test_a_surface_point_has_one_colour_from_all_cameras(class_idx):
    poses = poses_at(20.0, 45.0)
    intrinsics = Intrinsics.from_fov(128, 30.0)
    rgb, depth, mask = render_views(class_idx, poses, intrinsics, supersampling=1)
    points, pixels = surface_points(poses[0], depth[0], mask[0], intrinsics)
    where, expected_depth = project_points(points, poses[1], intrinsics)
    column, row = where.floor().long().unbind(1)
    visible = (depth[1, 0, row, column] - expected_depth).abs() < 0.01
    assert visible.float().mean() > 0.5
    there = rgb[1, :, row, column][:, visible]
    here = rgb[0].flatten(1)[:, pixels[visible]]
    assert (there - here).abs().median() < 0.02


def test_light_stays_with_the_world_so_front_is_brighter_than_back():
    rgb, _, mask = render_views(1, poses_at(35.0, 215.0), INTRINSICS)  # the light shines from about 37 degrees
    front, back = (rgb * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
    assert front > back + 0.1


@pytest.mark.parametrize("class_idx", range(len(CLASS_NAMES)))
def test_sides_and_mirrored_sides_can_be_told_apart(class_idx):
    front, left, back, right = render_views(class_idx, poses_at(0.0, 90.0, 180.0, 270.0), INTRINSICS)[0]
    views = {"front": front, "left": left, "back": back, "right": right, "mirrored left": left.flip(-1)}
    names = list(views)
    for first in names:
        for second in names[names.index(first) + 1 :]:
            assert (views[first] - views[second]).square().mean() > 0.015, f"{first} looks like {second}"


def test_classes_have_different_colours():
    means = []
    for class_idx in range(len(CLASS_NAMES)):
        rgb, _, mask = render_views(class_idx, poses_at(0.0, 90.0, 180.0, 270.0), INTRINSICS)
        means.append((rgb * mask).sum(dim=(0, 2, 3)) / mask.sum())
    distances = torch.cdist(torch.stack(means), torch.stack(means)) + 9 * torch.eye(len(means))
    assert distances.min() > 0.4


def test_background_is_white_or_black_as_asked():
    white = render_views(0, poses_at(0.0), INTRINSICS)
    black = render_views(0, poses_at(0.0), INTRINSICS, white_bkgd=False)
    assert white[0][0, :, 0, 0].tolist() == [1, 1, 1]
    assert black[0][0, :, 0, 0].tolist() == [-1, -1, -1]
    torch.testing.assert_close(white[0] - black[0], 2 * (1 - white[2]).expand(-1, 3, -1, -1), atol=1e-5, rtol=0)


def test_pictures_do_not_depend_on_how_views_are_grouped(monkeypatch):
    together = render_views(2, poses_at(0.0, 50.0, 100.0), INTRINSICS)
    monkeypatch.setattr(synthetic, "RAYS_AT_ONCE", 1000)
    apart = render_views(2, poses_at(0.0, 50.0, 100.0), INTRINSICS)
    for image, other in zip(together, apart, strict=True):
        torch.testing.assert_close(image, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("class_idx", range(len(CLASS_NAMES)))
def test_no_ray_meets_the_toy_before_the_end_of_its_cone(class_idx):
    toy, poses, intrinsics = build_toy(class_idx, 4), poses_at(20.0, 170.0), Intrinsics(45, 61, 100.0)
    free = synthetic._march_cones(toy, poses, intrinsics)
    rays = RayCaster(intrinsics, 0.0, 9.0).cast(poses, pixel_grid(2, 45, 61))
    for share in torch.linspace(0, 1, 60):
        points = rays.origins + share * free.reshape(2, -1, 1) * rays.directions
        assert toy.distance(points.reshape(-1, 3).T).min() > 0
    _, depth, mask = render_views(class_idx, poses, intrinsics, instance=4, supersampling=1)
    left = (depth / rays.axis_cosine.view_as(depth) - free[:, None])[mask > 0]
    assert left.median() < 3.5 * synthetic.CONE / intrinsics.focal  # the width of a cone there


@pytest.mark.parametrize(("side", "rays"), [(64, 3), (65, 2)])
def test_outlines_of_small_pictures_are_smoother(side, rays):
    intrinsics = Intrinsics.from_fov(side, 30.0)
    found, expected = (render_views(0, poses_at(30.0), intrinsics, supersampling=n) for n in (None, rays))
    assert all(torch.equal(image, other) for image, other in zip(found, expected, strict=True))


def test_rendering_restores_the_number_of_threads():
    before = torch.get_num_threads()
    render_views(0, poses_at(0.0), Intrinsics.from_fov(8, 30.0))
    assert torch.get_num_threads() == before


# choice of views


@pytest.mark.parametrize(("count", "instances"), [(8, 1), (1000, 1), (37, 3), (2000, 2)])
def test_views_are_distinct_and_shared_equally_by_the_classes(count, instances):
    views = choose_views(replace(THREE_HEIGHTS, count=count, instances=instances))
    assert len(set(views)) == len(views) == count
    shares = np.bincount([view[0] for view in views], minlength=len(CLASS_NAMES))
    assert shares.max() - shares.min() <= 1
    assert max(view[1] for view in views) < instances
    assert {view[2] for view in views} <= {0, 1, 2}
    assert all(0 <= view[3] < 360 for view in views)


def test_full_grid_has_72_angles():
    settings = replace(THREE_HEIGHTS, count=72 * 3 * len(CLASS_NAMES))
    assert {view[3] for view in choose_views(settings)} == set(range(0, 360, 5))


def test_views_depend_on_the_seed_alone():
    settings = replace(THREE_HEIGHTS, count=100)
    assert choose_views(settings) == choose_views(settings)
    assert choose_views(settings) != choose_views(replace(settings, seed=1))


@pytest.mark.parametrize(("count", "instances"), [(37, 3), (384, 24), (2000, 2), (4 * 2 * 3 * 72, 2), (7000, 2)])
def test_every_instance_is_seen_equally_often_from_evenly_spread_angles_and_heights(count, instances):
    views = choose_views(replace(THREE_HEIGHTS, count=count, instances=instances))
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for class_idx, instance, height, angle in views:
        groups.setdefault((class_idx, instance), []).append((angle, height))
    assert len(groups) == 4 * instances
    for places in groups.values():
        assert abs(len(places) - count / (4 * instances)) < 1
        shares = np.bincount([height for _, height in places], minlength=3)
        assert shares.max() - shares.min() <= 1
        angles = sorted(angle for angle, _ in places)
        gaps = np.diff([*angles, angles[0] + 360])
        assert gaps.max() < 2 * 360 / len(places) + 5  # one in each equal part of the circle, on a grid of 5 degrees


def test_known_instances_have_half_of_the_photographs_of_their_class():
    views = choose_views(replace(THREE_HEIGHTS, count=480, instances=22, known_instances=2, heldout_instances=5))
    shares = np.bincount([view[1] for view in views if view[0] == 0], minlength=22)
    assert shares.tolist() == [30, 30] + [3] * 20


def test_instances_are_not_all_seen_from_the_same_places():
    views = choose_views(replace(THREE_HEIGHTS, count=384, instances=24))
    starts = {(class_idx, instance): (height, angle) for class_idx, instance, height, angle in reversed(views)}
    assert len(set(starts.values())) > 20


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"count": 3}, "count=3"),
        ({"count": 9999}, "count=9999"),
        ({"count": 11, "instances": 3}, "count=11: expected 12"),
        ({"radius": 0.9}, "radius=0.9"),
        ({"heldout_instances": 1}, "heldout_instances=1: expected fewer than data.synthetic.instances=1"),
        ({"known_instances": 2}, "known_instances=2: expected at most the 1 instances"),
    ],
)
def test_impossible_settings_name_the_key(changes, key):
    with pytest.raises(DataError, match=key):
        replace(SMALL, **changes)


# the stored set


def test_stored_pictures_are_the_renders_of_their_labels(tmp_path):
    folder = ensure_synthetic(tmp_path, SMALL)
    dataset = open_dataset(
        replace(DEFAULTS, type="turntable", datadir=folder, imsize=16, v_list=SMALL.v_list, strict=True)
    )
    assert dataset.class_names == list(CLASS_NAMES)
    assert len(dataset) == SMALL.count
    assert not dataset.report.lines()
    max_depth = json.loads((folder / "depth" / "scene.json").read_text())["max_depth"]
    for (image, label), path in zip(dataset, dataset.paths, strict=True):
        pose = pose_from_angles(*label_angles(label[None], SMALL.v_list), SMALL.radius)
        rgb, depth, mask = render_views(label[0].item(), pose, Intrinsics.from_fov(16, SMALL.fov))
        assert (image - rgb[0]).abs().max() < 1.01 / 127.5
        levels = np.asarray(Image.open(folder / "depth" / path.name)).astype(np.float32)
        assert np.abs(levels / 65535 * max_depth - depth[0, 0].numpy()).max() < 1e-3
        coverage = np.asarray(Image.open(folder / "mask" / path.name)).astype(np.float32)
        assert np.abs(coverage / 255 - mask[0, 0].numpy()).max() < 0.01


def test_labels_csv_is_in_the_turntable_format(tmp_path):
    folder = ensure_synthetic(tmp_path, SMALL)
    with (folder / "labels.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["file", "class", "height", "angle", "instance", "split"]
    assert {(row["instance"], row["split"]) for row in rows} == {("", "")}  # one object of a class needs no name
    assert sorted(row["file"] for row in rows) == sorted(path.name for path in folder.glob("*.png"))


def open_many(folder, **changes):
    return open_dataset(
        replace(
            DEFAULTS,
            datadir=folder,
            imsize=16,
            v_list=MANY.v_list,
            synthetic_count=MANY.count,
            synthetic_instances=MANY.instances,
            synthetic_known_instances=MANY.known_instances,
            synthetic_heldout_instances=MANY.heldout_instances,
            **changes,
        )
    )


def test_known_unknown_and_heldout_instances(tmp_path):
    """Of five objects the first two are named, the third is not, the fourth is for test, the fifth for validation."""
    splits = {subset: open_many(tmp_path, subset=subset) for subset in ("train", "validation", "test")}
    shown = {
        subset: {
            (path.name.split("_")[1], label[3].item()) for path, label in zip(data.paths, data.labels, strict=True)
        }
        for subset, data in splits.items()
    }
    assert shown["validation"] == {("i4", -1)}
    assert shown["test"] == {("i3", -1)}
    assert shown["train"] == {("i2", -1)} | {(f"i{number % 2}", number) for number in range(8)}
    assert splits["test"].instance_names == [f"{name}/{number}" for name in CLASS_NAMES for number in (0, 1)]
    assert sum(map(len, splits.values())) == MANY.count


def test_angles_are_held_out_of_known_instances_alone(tmp_path):
    splits = {subset: open_many(tmp_path, subset=subset, heldout_every=3) for subset in ("train", "validation", "test")}
    names = {subset: {path.name.split("_")[1] for path in data.paths} for subset, data in splits.items()}
    assert names["train"] == {"i0", "i1", "i2"}
    assert names["test"] - {"i3"} <= {"i0", "i1"} >= names["validation"] - {"i4"}
    known = {subset: set(data.labels[data.labels[:, 3] >= 0, 2].tolist()) for subset, data in splits.items()}
    assert min(map(len, known.values())) > 0
    assert not known["train"] & (known["test"] | known["validation"])


def test_second_opening_renders_nothing(tmp_path, monkeypatch):
    folder = ensure_synthetic(tmp_path, SMALL)

    def refuse(*_, **__):
        raise AssertionError("rendered again")

    monkeypatch.setattr(synthetic, "render_views", refuse)
    assert ensure_synthetic(tmp_path, SMALL) == folder
    (folder / "labels.csv").unlink()
    with pytest.raises(DataError, match=r"labels\.csv is missing; put it back, or remove the folder"):
        ensure_synthetic(tmp_path, SMALL)


@pytest.mark.parametrize(
    "change",
    [
        {"imsize": 32},
        {"count": 9},
        {"seed": 1},
        {"instances": 2},
        {"instances": 2, "known_instances": 1},
        {"instances": 2, "heldout_instances": 1},
        {"radius": 3.0},
        {"fov": 31.0},
        {"v_list": (0.3, 0.41)},
        {"white_bkgd": False},
    ],
)
def test_everything_that_changes_the_pictures_is_in_the_cache_key(change):
    assert replace(SMALL, **change).folder_name != SMALL.folder_name


def test_equal_settings_write_equal_files(tmp_path):
    first, second = (ensure_synthetic(tmp_path / name, SMALL) for name in "ab")
    for path in sorted(first.rglob("*.*")):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def test_interrupted_rendering_leaves_nothing_behind(tmp_path, monkeypatch):
    calls = []

    def interrupt(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return render_views(*arguments, **options)

    monkeypatch.setattr(synthetic, "render_views", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure_synthetic(tmp_path, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_render_the_same_set(tmp_path, monkeypatch):
    finished = ensure_synthetic(tmp_path / "other", SMALL)
    write_set = synthetic._write_set

    def be_slower(folder, settings):
        write_set(folder, settings)
        finished.rename(tmp_path / SMALL.folder_name)

    monkeypatch.setattr(synthetic, "_write_set", be_slower)
    folder = ensure_synthetic(tmp_path, SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["other", folder.name])


def test_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/data cannot be written"):
        ensure_synthetic(tmp_path / "file" / "data", SMALL)


def test_full_disk_is_an_error_that_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "_write_view", fail)
    with pytest.raises(DataError, match=r"No space left on device.*free space"):
        ensure_synthetic(tmp_path, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_open_dataset_makes_the_set_at_the_configured_resolution(tmp_path):
    settings = replace(DEFAULTS, datadir=tmp_path, imsize=24, synthetic_count=8, synthetic_instances=2)
    dataset = open_dataset(settings)
    assert len(dataset) == 8
    assert dataset[0][0].shape == (3, 24, 24)
    assert dataset.v_list == synthetic.DEFAULT_V_LIST
    assert dict(dataset.report.sizes) == {(24, 24): 8}
