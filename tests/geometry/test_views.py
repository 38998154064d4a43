"""Views: which cameras labels mean, and where generated images take theirs from."""

import pytest
import torch
from torch.testing import assert_close

from graf.geometry.cameras import angles_from_pose, pose_from_angles
from graf.geometry.views import NUM_UNIFORMS, Cameras, PoseRanges, PoseSampler, Views

CAMERAS = Cameras(3.5, (0.2, 0.4), "ccw")
LABELS = torch.tensor([[0, 0, 0, 0], [1, 1, 90, 3], [2, 0, 359, -1], [1, 0, 180, 2]])


@pytest.mark.parametrize(("direction", "u"), [("ccw", [0, 0.25, 359 / 360, 0.5]), ("cw", [0, 0.75, 1 / 360, 0.5])])
def test_a_label_means_its_camera(direction, u):
    views = Cameras(3.5, (0.2, 0.4), direction).views_of_labels(LABELS)
    assert_close(views.u, torch.tensor(u, dtype=torch.float32))
    assert_close(views.v, torch.tensor([0.2, 0.4, 0.2, 0.2]))
    assert_close(views.poses, pose_from_angles(views.u, views.v, 3.5))
    assert torch.equal(views.class_idx, LABELS[:, 0])
    assert torch.equal(views.labels, LABELS)


@pytest.mark.parametrize("direction", ["ccw", "cw"])
def test_the_label_of_a_labels_camera_is_the_label(direction):
    cameras = Cameras(3.5, (0.2, 0.4), direction)
    angles = torch.arange(360)
    labels = torch.stack([angles % 3, angles % 2, angles, torch.full_like(angles, -1)], 1)
    views = cameras.views_of_labels(labels)
    assert torch.equal(cameras.views_at(views.class_idx, views.u, views.v).labels, labels)


def test_a_view_between_heights_is_labelled_with_the_nearest_and_rendered_where_it_is():
    views = CAMERAS.views_at(torch.tensor([2, 0]), torch.tensor([0.1, 0.9999]), torch.tensor([0.29, 0.9]))
    assert views.labels.tolist() == [[2, 0, 36, -1], [0, 1, 0, -1]]
    assert_close(angles_from_pose(views.poses)[1], torch.tensor([0.29, 0.9]))


def test_a_labelled_pool_gives_its_own_views_each_equally_often():
    pose_sampler = PoseSampler(LABELS, CAMERAS)
    uniforms = torch.stack([torch.arange(400) / 400, torch.rand(400), torch.rand(400), torch.rand(400)], 1)
    views = pose_sampler.pick(uniforms)
    own = CAMERAS.views_of_labels(LABELS)
    index = torch.arange(400) // 100
    assert torch.equal(views.labels, LABELS[index])
    assert torch.equal(views.poses, own.poses[index])
    assert torch.equal(views.u, own.u[index])


def test_the_largest_uniform_still_picks_a_view():
    assert PoseSampler(LABELS, CAMERAS).pick(torch.full((1, NUM_UNIFORMS), 1.0)).labels.tolist() == [[1, 0, 180, 2]]


def test_a_pool_with_true_poses_renders_at_them_and_keeps_the_labels():
    u, v = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.15, 0.25, 0.35, 0.45])
    poses = pose_from_angles(u, v, 4.2)
    views = PoseSampler(LABELS, CAMERAS, poses=poses).select([3, 1])
    assert torch.equal(views.poses, poses[[3, 1]])
    assert torch.equal(views.labels, LABELS[[3, 1]])
    assert torch.equal(views.class_idx, LABELS[[3, 1], 0])


@pytest.mark.parametrize("direction", ["ccw", "cw"])
def test_a_render_at_a_true_pose_is_described_as_its_photograph_is(direction):
    """Photographs reach the discriminator with their labels' u and v; other ones on renders would give these away."""
    cameras = Cameras(3.5, (0.2, 0.4), direction)
    poses = pose_from_angles(torch.rand(4), torch.rand(4), 3.5)
    pose_sampler, labelled = PoseSampler(LABELS, cameras, poses=poses), cameras.views_of_labels(LABELS)
    for views in (pose_sampler.select(range(4)), pose_sampler.views_of_photographs(LABELS, torch.rand(4, 4), poses)):
        assert torch.equal(views.poses, poses)
        assert torch.equal(views.u, labelled.u)
        assert torch.equal(views.v, labelled.v)


def test_photographs_come_with_poses_where_their_collection_has_some_and_nowhere_else():
    """Labels are rounded: a render at their pose would be compared with a photograph from a few degrees beside it."""
    poses, uniforms = pose_from_angles(torch.rand(4), torch.rand(4), 3.5), torch.rand(4, NUM_UNIFORMS)
    with pytest.raises(ValueError, match="missing"):
        PoseSampler(LABELS, CAMERAS, poses=poses).views_of_photographs(LABELS, uniforms)
    with pytest.raises(ValueError, match="without any"):
        PoseSampler(LABELS, CAMERAS).views_of_photographs(LABELS, uniforms, poses)


def test_a_pool_without_poses_draws_them_from_its_ranges_and_classes_from_its_images():
    ranges = PoseRanges(0.25, 0.5, 0.1, 0.3, 3.0, 4.0)
    pose_sampler = PoseSampler(LABELS, CAMERAS, ranges=ranges)
    views = pose_sampler.pick(torch.rand(4000, NUM_UNIFORMS))
    assert 0.25 <= views.u.min() < 0.26
    assert 0.49 < views.u.max() <= 0.5
    assert 0.1 <= views.v.min() < 0.11
    assert 0.29 < views.v.max() <= 0.3
    assert_close(views.class_idx.bincount() / 4000, torch.tensor([0.25, 0.5, 0.25]), atol=0.03, rtol=0)
    radius = views.poses[:, :3, 3].norm(dim=1)
    assert 3.0 <= radius.min() < 3.01
    assert 3.99 < radius.max() <= 4.001
    assert_close(views.poses, pose_from_angles(views.u, views.v, radius))
    assert torch.equal(views.labels[:, 0], views.class_idx)
    assert_close(views.u.mean().item(), 0.375, atol=0.01, rtol=0)


def test_ranges_that_end_at_a_full_turn_stay_below_it():
    pose_sampler = PoseSampler(LABELS, CAMERAS, ranges=PoseRanges(0.0, 1.0, 0.0, 1.0, 3.5, 3.5))
    views = pose_sampler.pick(torch.tensor([[0.0, 1.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.5]]))
    assert views.u.tolist() == [0.0, 0.0]
    assert views.v.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("indices", [[2, 0, 2], torch.tensor([2, 0, 2])])
def test_select_takes_views_in_order_and_with_repetition(indices):
    views = PoseSampler(LABELS, CAMERAS).select(indices)
    assert len(views) == 3
    assert torch.equal(views.labels, LABELS[[2, 0, 2]])


def test_slices_take_the_same_part_of_everything():
    views = CAMERAS.views_of_labels(LABELS)
    part = views[1:3].to("cpu")
    for name in ("class_idx", "u", "v", "poses", "labels"):
        assert torch.equal(getattr(part, name), getattr(views, name)[1:3])
    assert isinstance(part, Views)


def test_the_pool_says_where_its_poses_come_from():
    assert PoseSampler(LABELS, CAMERAS).describe() == "the 4 views of the data set, equally likely"
    ranges = PoseRanges(0.0, 0.5, 0.1, 0.3, 3.0, 4.0)
    expected = "u in [0.0, 0.5], v in [0.1, 0.3] (elevation 24 to 53 degrees), radius in [3.0, 4.0], uniform"
    assert PoseSampler(LABELS, CAMERAS, ranges=ranges).describe() == expected


@pytest.mark.parametrize("direction", ["ccw", "cw"])
@pytest.mark.parametrize("degrees", [15.0, -15.0, 90.0, 350.0])
def test_turned_views_are_those_of_the_turned_labels(direction, degrees):
    """A camera that moves counter-clockwise sees growing label angles where these run ccw, falling ones where cw."""
    cameras = Cameras(3.5, (0.2, 0.4), direction)
    sign = 1 if direction == "ccw" else -1
    labels = LABELS.clone()
    labels[:, 2] = (labels[:, 2] + sign * int(degrees)) % 360
    turned, expected = cameras.views_of_labels(LABELS).turn(degrees), cameras.views_of_labels(labels)
    assert torch.equal(turned.labels, expected.labels)
    assert_close(turned.poses, expected.poses, atol=2e-6, rtol=0)
    assert_close(turned.u, expected.u)
    assert_close(turned.v, expected.v)
    assert torch.equal(turned.class_idx, LABELS[:, 0])


def test_each_view_can_turn_by_its_own_angle_and_back():
    views = CAMERAS.views_of_labels(LABELS)
    degrees = torch.tensor([15.0, -15.0, 0.0, 180.0])
    turned = views.turn(degrees)
    assert turned.labels[:, 2].tolist() == [15, 75, 359, 0]
    assert_close(turned.poses[2], views.poses[2])
    back = turned.turn(-degrees)
    assert torch.equal(back.labels, views.labels)
    assert_close(back.poses, views.poses, atol=2e-6, rtol=0)
    assert torch.equal(views.labels, LABELS)  # turning makes new views


def test_turning_moves_true_poses_around_the_z_axis_wherever_they_look():
    poses = torch.linalg.qr(torch.randn(4, 4, 4)).Q
    views = PoseSampler(LABELS, CAMERAS, poses=poses).select(range(4))
    turned = views.turn(90.0)
    assert_close(turned.poses[:, 0], -poses[:, 1], atol=1e-6, rtol=0)
    assert_close(turned.poses[:, 1], poses[:, 0], atol=1e-6, rtol=0)
    assert_close(turned.poses[:, 2:], poses[:, 2:])
    assert torch.equal(turned.labels[:, 2], (LABELS[:, 2] + 90) % 360)


@pytest.mark.parametrize("direction", ["ccw", "cw"])
def test_turned_selected_and_sliced_views_keep_the_sense_of_their_angles(direction):
    views = Cameras(3.5, (0.2, 0.4), direction).views_of_labels(LABELS)
    for part in (views.turn(10.0), views[torch.tensor([3, 1])], views[1:3], views.to("cpu")):
        assert part.angle_sign == (1 if direction == "ccw" else -1)


def test_views_are_selected_in_order_and_with_repetition():
    views = CAMERAS.views_of_labels(LABELS)
    indices = torch.tensor([3, 0, 3])
    chosen = views[indices]
    for name in ("class_idx", "u", "v", "poses", "labels"):
        assert torch.equal(getattr(chosen, name), getattr(views, name)[indices])


def test_photographs_take_their_labels_views_and_without_poses_drawn_ones():
    uniforms = torch.rand(4, NUM_UNIFORMS, generator=torch.Generator().manual_seed(0))
    known = PoseSampler(LABELS[:2], CAMERAS).views_of_photographs(LABELS, uniforms)
    assert torch.equal(known.labels, LABELS)
    ranges = PoseRanges(0.25, 0.5, 0.1, 0.3, 3.0, 4.0)
    unknown = PoseSampler(LABELS[:2], CAMERAS, ranges=ranges).views_of_photographs(LABELS, uniforms)
    assert torch.equal(unknown.class_idx, LABELS[:, 0])
    assert_close(unknown.u, 0.25 + 0.25 * uniforms[:, 1])
    assert len(unknown.labels[:, 2].unique()) > 1  # else one view's latent would restore every photograph
