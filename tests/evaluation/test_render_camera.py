"""Any pinhole camera: the run's own gives the run's own pictures, others what rays through their pixels see."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from graf.base.errors import UserError
from graf.evaluation.renderer import Renderer
from graf.geometry.cameras import Intrinsics, height_from_elevation, pose_from_angles
from graf.geometry.rays import NEAREST, RayCaster
from graf.geometry.views import Cameras
from graf.geometry.volume_rendering import RaySampling
from graf.models.camera_refinement import STORED_FACTOR, CameraRefinement
from graf.models.ccsr import CCSR, BoxProjection, ConvTrunk, ViewLatents
from graf.models.density import DensityLaw
from graf.models.generator import Generator
from graf.models.mlp_field import MLPField, MLPShape
from graf.runtime.amp import Precision

SIZE = 12


@pytest.fixture(params=[1.0, None], ids=["in a sphere", "between near and far"])
def renderer(request) -> Renderer:
    torch.manual_seed(5)
    shape = MLPShape(
        depth=2, width=16, multires=3, multires_views=1, base_frequency=math.pi, use_viewdirs=True, dim_shape=3,
        dim_appearance=2, num_classes=2, dim_class=32, density=DensityLaw("relu", 20, 0.2, 0, 0.6, None),
    )  # fmt: skip
    caster = RayCaster(Intrinsics.from_fov(SIZE, 30.0), 2.5, 4.5, request.param)
    ccsr = CCSR(ConvTrunk(2, 4, 1), ViewLatents(4, 3, SIZE), BoxProjection(2))
    torch.nn.init.normal_(ccsr.latents.views[0], std=0.3)
    generator, cameras = Generator(MLPField(shape), RaySampling(6), learn_background=True), Cameras(3.5, (0.2, 0.4))
    with torch.no_grad():
        generator.background.copy_(torch.tensor([0.3, -0.2, 0.9]))
    classes, device = ("car", "mug"), torch.device("cpu")
    return Renderer(generator, caster, Precision("cpu", None), device, SIZE, cameras, classes, ccsr=ccsr)


def pose(u: float = 0.1, v: float = 0.3, radius: float = 3.5) -> torch.Tensor:
    return pose_from_angles(torch.tensor(u), torch.tensor(v), radius)


def test_the_runs_own_camera_gives_the_runs_own_picture(renderer):
    z = renderer.codes(0, range(1))
    expected = renderer.render(z, "mug", pose(), super_resolve=True)
    own = Intrinsics.from_vertical_fov(SIZE, SIZE, renderer.fov)
    found = renderer.render_camera(z[0], "mug", pose(), own, super_resolve=True)
    for one, other in zip(found.tensors(), expected.tensors(), strict=True):
        assert_close(one, other)
    assert expected.opacity.max() > 0.1


def test_a_wide_picture_has_the_square_one_in_its_middle(renderer):
    z = renderer.codes(0, range(1))
    square = renderer.render_camera(z, 0, pose(), Intrinsics.from_vertical_fov(10, 10, 25.0), super_resolve=True)
    wide = renderer.render_camera(z, 0, pose(), Intrinsics.from_vertical_fov(10, 30, 25.0), super_resolve=True)
    tall = renderer.render_camera(z, 0, pose(), Intrinsics(30, 10, wide_focal(10, 25.0)))
    assert wide.rgb.shape == (1, 3, 10, 30)
    assert wide.sr.shape == (1, 3, 20, 60)
    for name in ("rgb", "depth", "opacity"):
        assert_close(getattr(wide, name)[..., 10:20], getattr(square, name))
        assert_close(getattr(tall, name)[..., 10:20, :], getattr(square, name))


def wide_focal(height: int, fov: float) -> float:
    return Intrinsics.from_vertical_fov(height, height, fov).focal


def test_vertical_fields_of_view_are_told_back():
    assert Intrinsics.from_vertical_fov(10, 30, 25.0).vertical_fov == pytest.approx(25.0)


def test_rays_that_miss_the_sphere_are_the_background_and_are_not_rendered(renderer):
    if renderer.caster.bounding_radius is None:
        pytest.skip("without a sphere every ray meets the object's box")
    away = pose()
    away[:3, :3] = away[:3, :3] @ torch.diag(torch.tensor([-1.0, 1.0, -1.0]))  # turned round
    seen = []
    generator = renderer.generator
    generator.field.forward = lambda *given: seen.append(given)  # type: ignore[method-assign,assignment]
    found = renderer.render_camera(renderer.codes(0, range(1)), 0, away, Intrinsics.from_vertical_fov(5, 7, 40.0))
    assert not seen
    assert_close(found.rgb, generator.background_colour.detach().view(1, 3, 1, 1).expand(1, 3, 5, 7))
    assert found.opacity.max() == 0


@pytest.mark.parametrize("distance", [0.3, 1.5, 6.0])
def test_every_distance_sees_what_rays_through_the_pixels_see(renderer, distance):
    z, lens = renderer.codes(1, range(1)), Intrinsics.from_vertical_fov(6, 9, 60.0)
    found = renderer.render_camera(z, 1, pose(radius=distance), lens)
    near, far = max(2.5 + distance - 3.5, NEAREST), max(4.5 + distance - 3.5, 2 * NEAREST)
    caster = RayCaster(lens, near, far, renderer.caster.bounding_radius)
    rays = caster.cast_pictures(pose(radius=distance)[None])
    with torch.no_grad():
        expected = renderer.generator(z, torch.tensor([1]), rays)
    assert_close(found.rgb.flatten(2).mT, expected.rgb)
    assert_close(found.opacity.flatten(2).mT, expected.opacity)
    met = rays.far > rays.near
    assert_close(found.depth.flatten(2).mT[met], expected.depth[met])


@pytest.mark.parametrize("distance", [0.5, 2.0, 8.0])
def test_samples_from_nearer_and_farther_see_all_of_the_object(renderer, distance):
    """As rays do that are sampled in the whole sphere; training's range, 2.5 to 4.5 from its camera, would cut it."""
    z = renderer.codes(1, range(1))
    found = renderer.sample(z=z, class_name=1, azimuth=36.0, elevation=20.0, radius=distance)
    height = height_from_elevation(20.0)
    from_there = pose(0.1, height, distance)
    sphere = renderer.caster.bounding_radius
    near, far = max(distance - 1, NEAREST), distance + 1
    caster = RayCaster(renderer.caster.intrinsics, near, far, sphere)
    with torch.no_grad():
        expected = renderer.generator(z, torch.tensor([1]), caster.cast_images(from_there[None], SIZE))
    assert_close(found.rgb.flatten(2).mT, expected.rgb)
    assert_close(found.opacity.flatten(2).mT, expected.opacity)
    for name, value in zip(("rgb", "opacity"), renderer.render(z, 1, from_there).tensors()[::2], strict=False):
        assert_close(getattr(found, name), value, atol=1e-4, rtol=1e-4)


def test_a_batch_of_distances_is_what_each_of_them_gives_alone(renderer):
    distances = [2.0, 3.5, 6.0]
    together = renderer.sample(radius=distances)
    for row, distance in enumerate(distances):
        assert torch.equal(together.rgb[row : row + 1], renderer.sample(radius=distance).rgb)


def test_where_the_radius_says_nothing_of_true_poses_the_middle_of_the_range_is_their_distance(renderer):
    """data.radius=3.5 of cameras that stand 8 from the origin, which are sampled from 7 to 9."""
    far_away = replace(renderer, caster=replace(renderer.caster, near=7.0, far=9.0))
    z = renderer.codes(1, range(1))
    for distance in (3.5, 8.0, 10.0):
        found = far_away.render(z, 1, pose(radius=distance)).opacity
        assert_close(found, renderer.render(z, 1, pose(radius=distance)).opacity, atol=1e-4, rtol=1e-4)
        assert found.max() > 0.01


def test_the_lens_that_was_learned_is_in_the_field_of_view(renderer):
    generator = renderer.generator
    generator.cameras = CameraRefinement(2, 2)
    with torch.no_grad():
        generator.cameras.lens.fill_(STORED_FACTOR * math.log(1.25))
    assert renderer.fov == pytest.approx(math.degrees(2 * math.atan(math.tan(math.radians(15)) / 1.25)))
    z = renderer.codes(0, range(1))
    expected = renderer.render(z, 0, pose()).rgb
    found = renderer.render_camera(z, 0, pose(), Intrinsics.from_vertical_fov(SIZE, SIZE, renderer.fov)).rgb
    assert_close(found, expected)


def test_what_cannot_be_rendered_is_refused(renderer):
    z, lens = renderer.codes(0, range(1)), Intrinsics.from_vertical_fov(4, 4, 30.0)
    with pytest.raises(UserError, match=r"camera_to_world has shape \(3, 4\)"):
        renderer.render_camera(z, 0, torch.eye(4)[:3], lens)
    with pytest.raises(UserError, match="class 'boat'"):
        renderer.render_camera(z, "boat", pose(), lens)
    with pytest.raises(UserError, match="z has 4 numbers"):
        renderer.render_camera(z[:, :4], 0, pose(), lens)
    with pytest.raises(UserError, match="no super-resolution"):
        replace(renderer, ccsr=None).render_camera(z, 0, pose(), lens, super_resolve=True)
