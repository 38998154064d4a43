"""Consistency numbers equal what closed forms, constructed errors and slow direct implementations say."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from graf.evaluation.consistency import (
    ConsistencyError,
    ConsistencyReport,
    depth_error,
    low_resolution_consistency,
    measure_consistency,
    reprojection_error,
)
from graf.evaluation.metrics import psnr, ssim
from graf.evaluation.rings import Ring
from graf.geometry.cameras import Intrinsics, pose_from_angles, ring
from graf.geometry.rays import Patches, RayCaster, pixel_grid
from graf.geometry.volume_rendering import Render
from graf.geometry.warping import SurfaceView, Visibility, warp_between

INTRINSICS = Intrinsics.from_fov(32, 30.0)


def look_at_ball(size: int, views: int = 8, frequency: float = 5.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """image, z-depth, opacity and poses of a textured ball on a ring of views, in closed form, one ray per pixel."""
    poses = pose_from_angles(*ring(views, 0.35), 3.5)
    rays = RayCaster(INTRINSICS, 0.0, 100.0).cast(poses, pixel_grid(views, size, size))
    middle = -(rays.origins * rays.directions).sum(-1, keepdim=True)
    half_squared = 0.8**2 - rays.origins.square().sum(-1, keepdim=True) + middle.square()
    hit = half_squared > 0
    distance = torch.where(hit, middle - half_squared.clamp(min=0).sqrt(), 0.0)
    colours = 0.8 * torch.sin(frequency * (rays.origins + distance * rays.directions))
    parts = torch.where(hit, colours, 1.0), distance * rays.axis_cosine, hit.float()
    image, depth, opacity = (part.mT.reshape(views, -1, size, size) for part in parts)
    return image, depth, opacity, poses


def ball_ring(views: int = 8, scale: int = 2, with_truth: bool = True) -> Ring:
    """Perfect renders of the ball at 32 pixels and perfect SR; the render is the mean of the SR."""
    fine, _, _, _ = look_at_ball(32 * scale, views)
    _, depth, opacity, poses = look_at_ball(32, views)
    surface = SurfaceView(functional.avg_pool2d(fine, scale), depth, opacity, poses, Patches.whole(views))
    return Ring(surface, fine, Render(fine, depth, opacity) if with_truth else None)


def test_nearest_upsampling_is_exactly_consistent():
    lr = torch.rand(2, 3, 5, 7) * 2 - 1
    found = low_resolution_consistency(functional.interpolate(lr, scale_factor=4, mode="nearest"), lr)
    assert found.low_resolution_max == found.low_resolution_mean == found.clipped == 0


@pytest.mark.parametrize("scale", [2, 4])
def test_files_of_unclipped_images_are_off_by_at_most_half_a_grey_level(scale):
    sr = torch.rand(2, 3, 8 * scale, 8 * scale, dtype=torch.float64) * 2 - 1
    lr = functional.avg_pool2d(sr, scale)
    found = low_resolution_consistency(sr, lr)
    assert found.low_resolution_max < 1e-14
    assert 0 < found.file_mean < found.file_max <= 1 / 255
    assert found.clipped == 0


def test_clipping_shows_in_the_files_alone():
    lr = torch.zeros(1, 1, 2, 2)
    lr[0, 0, 0, 0] = 1.0
    sr = functional.interpolate(lr, scale_factor=2, mode="nearest") + torch.tensor([[0.5, -0.5], [0.5, -0.5]]).repeat(
        2, 2
    )
    found = low_resolution_consistency(sr, lr)
    assert found.low_resolution_max == found.low_resolution_mean == 0
    assert found.clipped == 2 / 16
    assert found.file_max == pytest.approx(0.25, abs=1 / 255)  # (1 + 0.5) / 2 instead of 1


def test_known_differences_are_measured():
    lr = torch.zeros(1, 3, 4, 4)
    sr = torch.zeros(1, 3, 8, 8)
    sr[0, 1, 2:4, 4:6] = 0.25
    sr[0, 1, 0, 0] = -0.4
    found = low_resolution_consistency(sr, lr)
    assert found.low_resolution_max == pytest.approx(0.25)
    assert found.low_resolution_mean == pytest.approx((0.25 + 0.1) / 48)


def test_another_way_down_may_be_given():
    sr = torch.rand(1, 3, 8, 8)
    found = low_resolution_consistency(sr, sr[..., ::2, ::2], lambda images: images[..., ::2, ::2])
    assert found.low_resolution_max == 0


@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (1, 3, 8, 8), (2, 3, 2, 2), (3, 8, 8)])
def test_sizes_without_a_whole_factor_are_named(shape):
    with pytest.raises(ConsistencyError, match=r"SR is .* and the render"):
        low_resolution_consistency(torch.zeros(shape), torch.zeros(2, 3, 4, 4))


def test_perfect_views_agree_up_to_interpolation_and_finer_ones_agree_better():
    errors = []
    for size in (32, 64, 128):
        image, depth, opacity, poses = look_at_ball(size)
        found = reprojection_error(SurfaceView(image, depth, opacity, poses, Patches.whole(8)), INTRINSICS)
        assert 0.5 < found.coverage < 0.95
        errors.append(found.error)
    assert errors[0] < 0.02
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


@pytest.mark.parametrize("views", [2, 6])
def test_views_that_alternate_in_colour_disagree_by_exactly_that(views):
    image, depth, opacity, poses = look_at_ball(32, 12)
    alternating = 0.1 * (-1.0) ** torch.arange(views).view(-1, 1, 1, 1)
    surface = SurfaceView(image, depth, opacity, poses, Patches.whole(12))[:views]
    found = reprojection_error(replace(surface, image=alternating.expand(-1, 3, 32, 32)), INTRINSICS)
    assert found.error == pytest.approx(0.2, rel=1e-5)


def test_every_neighbouring_pair_counts_both_ways_pixel_by_pixel():
    image, depth, opacity, poses = look_at_ball(32, 5)
    views = SurfaceView(image + 0.3 * torch.randn_like(image), depth, opacity, poses, Patches.whole(5))
    difference, shared = 0.0, 0.0
    for i in range(5):
        for j in ((i + 1) % 5, (i - 1) % 5):
            a, b = views[i : i + 1], views[j : j + 1]
            warped, mask = warp_between(a, b, INTRINSICS)
            for y, x in mask[0, 0].nonzero().tolist():
                difference += (a.image - warped)[0, :, y, x].abs().mean().item()
                shared += 1
    found = reprojection_error(views, INTRINSICS)
    assert found.error == pytest.approx(difference / shared, rel=1e-4)
    assert found.coverage == pytest.approx(shared / (2 * opacity.sum().item()), rel=1e-6)


def test_views_that_share_nothing_have_no_error_to_report():
    image, depth, opacity, poses = look_at_ball(32, 2)  # from opposite sides
    views = SurfaceView(image, depth, torch.zeros_like(opacity), poses, Patches.whole(2))
    found = reprojection_error(views, INTRINSICS)
    assert math.isnan(found.error)
    assert math.isnan(found.coverage)
    opaque = SurfaceView(image, depth, opacity, poses, Patches.whole(2))
    assert reprojection_error(opaque, INTRINSICS, Visibility(tolerance=1e-6)).coverage < 0.05


def test_one_view_has_no_neighbour():
    image, depth, opacity, poses = look_at_ball(32, 1)
    with pytest.raises(ConsistencyError, match="1 view"):
        reprojection_error(SurfaceView(image, depth, opacity, poses, Patches.whole(1)), INTRINSICS)


def test_depth_error_is_the_mean_over_the_true_mask():
    truth = Render(torch.zeros(1, 3, 4, 4), torch.full((1, 1, 2, 2), 3.0), torch.tensor([[[[1.0, 0.6], [0.4, 0.0]]]]))
    depth = torch.tensor([[[[3.5, 2.9], [9.0, 9.0]]]])
    assert depth_error(depth, truth) == pytest.approx((0.5 + 0.1) / 2)
    nothing = Render(truth.rgb, truth.depth, torch.zeros_like(truth.opacity))
    assert math.isnan(depth_error(depth, nothing))
    with pytest.raises(ConsistencyError, match="depth is"):
        depth_error(torch.zeros(1, 1, 4, 4), truth)


def test_a_perfect_super_resolution_beats_bicubic_everywhere():
    report = measure_consistency([ball_ring()], INTRINSICS)
    assert report.objects == 1
    assert report.low_resolution_max < 1e-6
    assert report.file_max <= 1 / 255 + 1e-6
    assert report.depth_error == 0
    assert report.ssim == pytest.approx(1)
    assert report.psnr == math.inf
    assert report.ssim_bicubic < 0.995
    assert report.reprojection_added == pytest.approx(report.reprojection_sr - report.reprojection_render)
    assert report.reprojection_sr < 0.03


def test_details_that_do_not_stick_to_the_surface_add_reprojection_error_and_those_that_do_add_none():
    perfect = ball_ring(with_truth=False)
    noise = functional.interpolate(torch.randn(8, 3, 32, 32), scale_factor=2) * torch.tensor(
        [[1.0, -1], [-1, 1]]
    ).repeat(32, 32)
    loose = Ring(perfect.views, perfect.sr + 0.2 * noise)
    assert low_resolution_consistency(loose.sr, loose.views.image).low_resolution_max < 1e-6
    sticking, moving = (measure_consistency([ring], INTRINSICS) for ring in (perfect, loose))
    assert sticking.reprojection_render == moving.reprojection_render
    assert sticking.coverage == moving.coverage
    assert -0.03 < sticking.reprojection_added < 0  # blurred edges disagree more than sharp ones
    assert moving.reprojection_added > 0.1


def test_the_render_is_measured_as_its_bicubic_upsampling():
    ball = ball_ring(scale=4)
    bicubic = functional.interpolate(ball.views.image, scale_factor=4, mode="bicubic", align_corners=False).clamp(-1, 1)
    report = measure_consistency([Ring(ball.views, bicubic, ball.truth)], INTRINSICS)
    assert report.reprojection_added == 0
    assert report.psnr == report.psnr_bicubic == pytest.approx(psnr(bicubic, ball.sr).mean().item())
    assert report.ssim == report.ssim_bicubic == pytest.approx(ssim(bicubic, ball.sr).mean().item())
    assert report.low_resolution_mean > 1e-3


def test_views_and_truth_are_compared_as_shown_but_the_render_with_what_came_out():
    ball = ball_ring()
    loud = Ring(ball.views, 3 * ball.sr, ball.truth)
    found = measure_consistency([loud], INTRINSICS)
    shown = measure_consistency([Ring(ball.views, loud.sr.clamp(-1, 1), ball.truth)], INTRINSICS)
    for name in ("reprojection_sr", "psnr", "ssim"):
        assert getattr(found, name) == getattr(shown, name)
    assert found.low_resolution_max == pytest.approx(2, rel=0.01)
    assert shown.low_resolution_max < 0.9
    assert found.clipped > 0.1


def test_objects_count_alike_and_the_largest_error_wins():
    ball = ball_ring()
    shifted = Ring(SurfaceView(ball.views.image, ball.views.depth + 0.1, *_rest(ball.views)), ball.sr + 0.1, ball.truth)
    one, other = (measure_consistency([ring], INTRINSICS) for ring in (ball, shifted))
    both = measure_consistency(iter([ball, shifted]), INTRINSICS)
    assert both.objects == 2
    assert both.low_resolution_max == other.low_resolution_max == pytest.approx(0.1, abs=1e-6)
    assert both.low_resolution_mean == pytest.approx(0.05, abs=1e-6)
    assert both.file_max == max(one.file_max, other.file_max)
    assert both.depth_error == pytest.approx(0.05, abs=1e-6)
    assert both.ssim == pytest.approx((one.ssim + other.ssim) / 2)


def _rest(view: SurfaceView) -> tuple[Tensor, Tensor, Patches]:
    return view.opacity, view.poses, view.patches


def test_what_cannot_be_measured_is_left_out_of_means_and_files():
    ball = ball_ring()
    report = measure_consistency([Ring(ball.views, ball.sr), ball], INTRINSICS)
    assert report.depth_error == 0
    without = measure_consistency([Ring(ball.views, ball.sr)], INTRINSICS)
    assert math.isnan(without.ssim)
    assert not {"psnr", "psnr_bicubic", "ssim", "ssim_bicubic", "depth_error"} & without.as_dict().keys()
    assert "PSNR" not in without.text()


def test_a_report_reads_as_text_and_survives_strict_json():
    report = measure_consistency([ball_ring()], INTRINSICS)
    row = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert row["psnr"] == "inf"
    assert row["reprojection_added"] == report.reprojection_added
    assert set(row) == {*ConsistencyReport.__dataclass_fields__, "reprojection_added"}
    for text in ("1 object,", "8-bit files", "added ", "depth error", "PSNR", "SSIM"):
        assert text in report.text()


def test_nothing_to_measure_and_truth_of_another_size_are_named():
    with pytest.raises(ConsistencyError, match="at least one ring"):
        measure_consistency([], INTRINSICS)
    ball = ball_ring()
    wrong = Render(ball.views.image, ball.views.depth, ball.views.opacity)
    with pytest.raises(ConsistencyError, match="the true images"):
        measure_consistency([Ring(ball.views, ball.sr, wrong)], INTRINSICS)
