"""The consistency measurement of generated objects: which views it looks at, and what it says of known scenes."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from graf.evaluation.consistency import ConsistencyTask
from graf.evaluation.renderer import Renderer
from graf.geometry.cameras import Intrinsics, angles_from_pose
from graf.geometry.rays import Patches, RayCaster
from graf.geometry.views import Cameras
from graf.geometry.volume_rendering import Render
from graf.models.ccsr import CCSR, BoxProjection, ConvTrunk, KernelProjection, ViewLatents
from graf.runtime.amp import Precision

CAMERAS = Cameras(3.5, (0.3, 0.4), "ccw")
CASTER = RayCaster(Intrinsics.from_fov(16, 30.0), 2.0, 5.0, 1.0)
CPU = torch.device("cpu")
SIDE, NUM_VIEWS = 16, 12


class Ball(nn.Module):
    """An opaque ball, painted by place; keeps what it was asked for. zoom: a factor on the focal length."""

    dim_z = 2

    def __init__(self, paint: Callable[[torch.Tensor], torch.Tensor], zoom: float = 1.0) -> None:
        super().__init__()
        self.paint, self.zoom = paint, zoom
        self.asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, z, class_idx, rays, **options):
        self.asked.append((z, class_idx))
        middle = -(rays.origins * rays.directions).sum(-1, keepdim=True)
        inside = 0.75**2 - rays.origins.square().sum(-1, keepdim=True) + middle.square()
        opacity = (inside > 0).float()
        distance = torch.where(inside > 0, middle - inside.clamp(min=0).sqrt(), rays.far)
        points = (rays.origins + distance * rays.directions) * opacity
        return Render(self.paint(points), distance * rays.axis_cosine, opacity)

    def aim(self, views, patches):
        return views.poses, Patches(patches.scale / self.zoom, patches.centre / self.zoom)

    def halve_chunk(self) -> None:
        """It has no chunks: none to halve."""


def marble(points: torch.Tensor) -> torch.Tensor:
    return 0.6 * torch.sin(3 * points + 1)


def grey(points: torch.Tensor) -> torch.Tensor:
    return torch.full_like(points, 0.3)


def make_bicubic(projection: nn.Module | None = None) -> CCSR:
    """CCSR whose trunk is bicubic upsampling and whose latents are zero."""
    trunk = ConvTrunk(2, 4, 1)
    for parameter in trunk.last.parameters():
        nn.init.zeros_(parameter)
    return CCSR(trunk, ViewLatents(8, 3, SIDE), projection or BoxProjection(2))


def make_task(
    paint, ccsr: CCSR | None = None, classes=(0, 2), zoom: float = 1.0, **options
) -> tuple[ConsistencyTask, Ball]:
    ball = Ball(paint, zoom)
    networks = {"generator": ball, "ccsr": ccsr or make_bicubic()}
    renderer = Renderer(
        caster=CASTER,
        precision=Precision("cpu", None),
        device=CPU,
        resolution=SIDE,
        cameras=CAMERAS,
        classes=("car", "duck", "mug"),
        **networks,
    )
    return ConsistencyTask(renderer, classes, 0.4, NUM_VIEWS, **options), ball


def test_super_resolution_that_only_upsamples_adds_no_disagreement():
    report = make_task(grey)[0].measure()
    assert report.reprojection_sr == pytest.approx(0, abs=1e-6)
    assert report.reprojection_added == pytest.approx(0, abs=1e-6)
    assert report.coverage > 0.3
    painted = make_task(marble)[0].measure()
    assert 0 < painted.reprojection_render < 0.02
    # Not zero: the projection takes the render, a point sample per pixel, for a mean over it.
    assert abs(painted.reprojection_added) < 0.005
    assert painted.low_resolution_max < 1e-5
    assert painted.objects == 2


def test_a_lens_that_was_learned_is_measured_as_one_that_was_given():
    learned, given = make_task(marble, zoom=1.2)[0], make_task(marble)[0]
    fov = 2 * math.degrees(math.atan(math.tan(math.radians(15)) / 1.2))
    caster = replace(CASTER, intrinsics=Intrinsics.from_fov(16, fov))
    expected = replace(given, renderer=replace(given.renderer, caster=caster)).measure()
    found = learned.measure()
    for name in ("reprojection_render", "reprojection_sr", "coverage"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4)
    assert found.coverage > 1.1 * given.measure().coverage  # the ball is larger in its images


def test_latents_of_their_own_make_views_disagree():
    apart = make_bicubic()
    for view in apart.latents.views:
        nn.init.normal_(view, std=0.3)
    report = make_task(marble, apart)[0].measure()
    assert report.reprojection_added > 0.02
    assert report.low_resolution_max < 1e-5  # the projection hides nothing of it at low resolution


def test_one_object_of_each_class_is_seen_from_a_full_ring():
    task, ball = make_task(marble, classes=(2, 0, 1), seed=5)
    rings = list(task.render_rings())
    assert len(rings) == 3
    assert [int(class_idx) for _, class_idx in ball.asked] == [2] * NUM_VIEWS + [0] * NUM_VIEWS + [1] * NUM_VIEWS
    code = task.renderer.codes(5, range(1))[0]
    assert all(torch.equal(z[0], code) for z, _ in ball.asked)
    for ring in rings:
        u, v = angles_from_pose(ring.views.poses)
        torch.testing.assert_close(u, torch.arange(NUM_VIEWS) / NUM_VIEWS, atol=1e-6, rtol=0)
        torch.testing.assert_close(v, torch.full((NUM_VIEWS,), 0.4), atol=1e-6, rtol=0)
        assert ring.sr.shape == (NUM_VIEWS, 3, 2 * SIDE, 2 * SIDE)
        assert ring.views.image.shape == (NUM_VIEWS, 3, SIDE, SIDE)
    assert ConsistencyTask(task.renderer, (0,), 0.4).num_views == 24


def test_the_seed_chooses_the_object():
    (first, ball), (second, other), (again, same) = (make_task(marble, classes=(0,), seed=seed) for seed in (0, 1, 0))
    for task in (first, second, again):
        next(task.render_rings())
    assert torch.equal(ball.asked[0][0], same.asked[0][0])
    assert not torch.equal(ball.asked[0][0], other.asked[0][0])


def test_the_truth_is_asked_for_at_both_resolutions_and_a_perfect_render_has_its_depth():
    asked = []

    def truth(class_idx, views, low, high):
        asked.append((class_idx, len(views), low, high))
        ball = Ball(marble)
        fine = ball(None, None, CASTER.cast_images(views.poses, high))
        coarse = ball(None, None, CASTER.cast_images(views.poses, low))
        return replace(coarse.as_images(), rgb=fine.as_images().rgb)

    report = make_task(marble, truth=truth)[0].measure()
    assert asked == [(0, NUM_VIEWS, SIDE, 2 * SIDE), (2, NUM_VIEWS, SIDE, 2 * SIDE)]
    assert report.depth_error == pytest.approx(0, abs=1e-4)
    assert report.psnr > 20
    assert report.psnr == pytest.approx(report.psnr_bicubic, abs=2.0)
    assert 0.8 < report.ssim <= 1


def test_a_report_is_finite_where_it_was_measured_and_leaves_out_what_was_not():
    values = make_task(marble)[0].measure().as_dict()
    assert "psnr" not in values
    assert "depth_error" not in values
    assert {"reprojection_sr", "reprojection_render", "reprojection_added", "coverage", "clipped"} <= set(values)
    assert all(math.isfinite(float(value)) for value in values.values())


def test_the_reduction_is_ccsrs_own():
    kernel = KernelProjection(2, (0.125, 0.375, 0.375, 0.125))
    assert make_task(marble, make_bicubic(kernel))[0].measure().low_resolution_max < 1e-5
