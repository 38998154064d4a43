"""Learned cameras: right gradients, what they correct of which views, and that they find a distortion that is known."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from graf.config import FRAMING_TERMS
from graf.geometry.cameras import Intrinsics, height_from_elevation, pose_from_angles
from graf.geometry.rays import Patches, RayCaster, patch_grid
from graf.geometry.views import Cameras, Views
from graf.geometry.volume_rendering import NO_NOISE, RaySampling, render_rays
from graf.models.camera_refinement import NUM_HARMONICS, STORED_FACTOR, CameraRefinement
from graf.models.density import DensityLaw
from graf.models.generator import Generator
from graf.models.triplane_field import TriplaneField, TriplaneShape

HEIGHTS = (0.4, 0.2)
CAMERAS = Cameras(3.5, HEIGHTS, "cw")
CASTER = RayCaster(Intrinsics.from_fov(8, 30.0), 2.5, 4.5)
PLANES = TriplaneShape(
    planes="table", synthesis_width=4, plane_resolution=6, plane_channels=4, decoder_width=8, colour_components=2,
    extent=1.2, multires_views=1, base_frequency=1.0, use_viewdirs=True, dim_shape=3, dim_appearance=2, num_classes=3,
    density=DensityLaw("softplus", 1.0, 0.0, 0.0, 0.6, None),
)  # fmt: skip
#: two classes, both heights, anywhere on the turn
LABELS = torch.tensor([[0, 0, 0, -1], [2, 1, 40, -1], [0, 1, 200, -1], [2, 0, 333, -1]])


def views_of(labels: Tensor, dtype: torch.dtype = torch.float64) -> Views:
    """As Cameras.views_of_labels, rounded to dtype."""
    u = torch.remainder(-labels[:, 2].to(dtype) / 360, 1.0)
    v = torch.tensor(HEIGHTS, dtype=dtype)[labels[:, 1]]
    return replace(CAMERAS.views_of_labels(labels), u=u, v=v, poses=pose_from_angles(u, v, 3.5))


def some_patches(count: int) -> Patches:
    return Patches(0.3 + 0.5 * torch.rand(count, dtype=torch.float64), 0.4 * torch.rand(count, 2).double() - 0.2)


def draw_refinement(std: float = 0.05) -> CameraRefinement:
    """Corrections of about 5% and 3 degrees."""
    refinement = CameraRefinement(3, 2).double()
    for parameter in refinement.parameters():
        torch.nn.init.normal_(parameter, std=std * STORED_FACTOR)
    return refinement


def test_a_new_refinement_changes_nothing():
    views, patches = views_of(LABELS), some_patches(4)
    refinement = CameraRefinement(3, 2).double()
    poses, places = refinement(views, patches)
    assert_close(poses, views.poses, atol=1e-12, rtol=0)
    assert torch.equal(places.scale, patches.scale)
    assert torch.equal(places.centre, patches.centre)
    assert refinement.penalty().item() == 0


def test_what_a_photograph_shows_at_a_place_is_what_the_camera_sees_through_lens_scale_and_shift():
    """Against rays that are cast through the fitting field of view at (x - shift) / scale, and elevated poses."""
    refinement, views, patches = draw_refinement(), views_of(LABELS), some_patches(4)
    rays = CASTER.cast_patches(*refinement(views, patches), 8)
    values = {name: value.detach() / STORED_FACTOR for name, value in refinement.named_parameters()}
    fov = 2 * math.degrees(math.atan(math.tan(math.radians(15)) / math.exp(float(values["lens"]))))
    for number, (class_idx, height_idx, angle, _) in enumerate(LABELS.tolist()):
        turn = math.radians(-angle)
        waves = [1, *(math.cos(k * turn) for k in (1, 2, 3)), *(math.sin(k * turn) for k in (1, 2, 3))]
        log_scale, right, down = values["framing"][class_idx] @ torch.tensor(waves, dtype=torch.float64)
        elevation = math.degrees(math.asin(1 - 2 * HEIGHTS[height_idx]) + float(values["elevation"][height_idx]))
        height = torch.tensor([height_from_elevation(elevation)], dtype=torch.float64)
        pose = pose_from_angles(views.u[number : number + 1], height, 3.5)
        grid = (patch_grid(patches[number : number + 1], 8) - torch.stack([right, down])) / log_scale.exp()
        expected = RayCaster(Intrinsics.from_fov(8, fov), 2.5, 4.5).cast(pose, grid)
        assert_close(rays.directions[number], expected.directions[0], atol=1e-9, rtol=0)
        assert_close(rays.origins[number], expected.origins[0], atol=1e-9, rtol=0)


def test_cameras_that_someone_places_get_the_lens_alone():
    refinement, patches = draw_refinement(), some_patches(4)
    named = views_of(LABELS)
    placed = CAMERAS.views_at(named.class_idx, named.u, named.v)
    poses, places = refinement(placed, patches)
    factor = torch.exp(refinement.lens / STORED_FACTOR)
    assert torch.equal(poses, placed.poses)
    assert_close(places.scale, patches.scale / factor)
    assert_close(places.centre, patches.centre / factor)
    for views in (named, named[1:3], named.turn(20.0), named.mirror()):
        assert views.photographed


def test_the_penalty_grows_with_squares_and_harmonics():
    refinement = CameraRefinement(2, 1)
    sizes = {}
    for name, index in (("lens", ()), ("elevation", (0,)), *(("framing", (1, 2, k)) for k in range(7))):
        with torch.no_grad():
            refinement.get_parameter(name)[index] = 0.2 * STORED_FACTOR
            sizes[name, index] = float(refinement.penalty())
            refinement.get_parameter(name)[index] = 0
    base = sizes["lens", ()]
    assert base > 0
    assert sizes["elevation", (0,)] == pytest.approx(base)
    orders = (0, 1, 2, 3, 1, 2, 3)
    for k, order in enumerate(orders):
        assert sizes["framing", (1, 2, k)] == pytest.approx((1 + order**2) * base)


def test_a_configuration_holds_as_many_terms_as_are_learned():
    assert FRAMING_TERMS == 1 + 2 * NUM_HARMONICS


@pytest.mark.parametrize("strategy", ["dense", "checkpoint", "deferred"])
def test_the_gradient_of_rendered_colours_is_that_of_finite_differences(strategy):
    refinement = draw_refinement(0.01)
    generator = Generator(TriplaneField(PLANES), RaySampling(8), chunk=50, cameras=refinement).double()
    with torch.no_grad():
        generator.field.planes.stored *= 10  # with something to see in it
    generator.strategy = strategy
    views, patches, z = views_of(LABELS), some_patches(4), torch.randn(4, 5, dtype=torch.float64)
    target = torch.randn(4, 16, 3, dtype=torch.float64)

    def loss() -> Tensor:
        rays = CASTER.cast_patches(*generator.aim(views, patches), 4)
        return (generator(z, views.class_idx, rays).rgb * target).sum()

    parameters = list(refinement.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    assert all(float(gradient.abs().max()) > 1e-4 for gradient in gradients)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        numbers, step = parameter.data.view(-1), 1e-6
        for index in range(len(numbers)):
            before, ends = float(numbers[index]), []
            for side in (-1, 1):
                numbers[index] = before + side * step
                with torch.no_grad():
                    ends.append(float(loss()))
            numbers[index] = before
            difference = (ends[1] - ends[0]) / (2 * step)
            assert float(gradient.view(-1)[index]) == pytest.approx(difference, abs=1e-6, rel=1e-4)


def test_rays_that_graze_the_bounding_sphere_give_finite_gradients():
    """There the square root in near and far has no derivative: where rays are sampled counts as given."""
    refinement = draw_refinement(0.0)
    pose = pose_from_angles(torch.zeros(1).double(), torch.full((1,), 0.5).double(), 2.0)
    views = replace(views_of(LABELS[:1]), poses=pose)
    caster = RayCaster(Intrinsics.from_fov(8, 90.0), 0.5, 4.5, bounding_radius=math.sqrt(2))
    patches = Patches(torch.ones(1).double(), torch.tensor([[1.0, 0.0]]).double())  # its first row of rays touches
    rays = caster.cast(*refinement(views, patches)[:1], torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]).double())
    assert_close(rays.near[0, 0], rays.far[0, 0], atol=1e-6, rtol=0)
    total = rays.near.sum() + rays.far.sum() + rays.directions.sum() + rays.origins.sum()
    total.backward()
    assert bool(torch.isfinite(refinement.elevation.grad).all())


# ---------------------------------------------------------------- a known distortion


def blobs(points: Tensor, directions: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Five soft coloured balls in various places."""
    numbers = torch.arange(5, dtype=points.dtype)
    places = torch.stack([torch.cos(2.5 * numbers), torch.sin(2.5 * numbers), (numbers - 2) / 2.5], dim=-1) * 0.5
    shares = torch.exp(-(points[..., None, :] - places).square().sum(-1) / 0.05)
    colours = torch.cos(torch.outer(numbers, torch.tensor([1.0, 2.0, 3.0], dtype=points.dtype)))
    density = shares.sum(-1)
    return (shares @ colours) / density.clamp(min=1e-9)[..., None], 20 * density


def render(poses: Tensor, grid: Tensor, fov: float | None = None) -> Tensor:
    caster = CASTER if fov is None else RayCaster(Intrinsics.from_fov(8, fov), 2.5, 4.5)
    return render_rays(blobs, caster.cast(poses, grid), RaySampling(32), NO_NOISE, -torch.ones(3)).rgb


def test_a_known_distortion_is_found():
    """Elevations 3 degrees and -2 off, a field of view of 27 instead of 30, 6% of scale and a moving axis."""
    angles = torch.arange(0, 360, 30)
    ones = torch.ones(12).long()
    labels = torch.cat([torch.stack([ones, h * ones, angles, -ones], dim=1) for h in (0, 1)])
    views, whole = views_of(labels, torch.float32), patch_grid(Patches.whole(24), 16)
    turn = 2 * math.pi * views.u
    log_scale = 0.06 * torch.cos(turn) - 0.03 * torch.sin(2 * turn)
    shift = torch.stack([0.03 + 0.02 * torch.sin(turn), -0.02 * torch.cos(2 * turn)], dim=-1)
    elevations = [math.degrees(math.asin(1 - 2 * v)) + off for v, off in zip(HEIGHTS, (3.0, -2.0), strict=True)]
    heights = torch.tensor([height_from_elevation(degrees) for degrees in elevations])[labels[:, 1]]
    seen = (whole - shift[:, None, None]) / log_scale.exp()[:, None, None, None]
    with torch.no_grad():
        photographs = render(pose_from_angles(views.u, heights, 3.5), seen, fov=27.0)

    refinement = CameraRefinement(3, 2)
    optimizer = torch.optim.Adam(refinement.parameters(), lr=0.005 * STORED_FACTOR, betas=(0.8, 0.99))
    for iteration in range(80):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - iteration / 80)
        poses, patches = refinement(views, Patches.whole(24))
        loss = (render(poses, patch_grid(patches, 16)) - photographs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert loss.item() < 1e-4
    with torch.no_grad():
        found = refinement.framing_at(views.class_idx, views.u)
        # that photographs are larger on average may also be the lens, as far as perspective does not tell
        focal = math.log(math.tan(math.radians(15)) / math.tan(math.radians(13.5)))
        zoom = found[:, 0] + refinement.lens / STORED_FACTOR
        assert_close(zoom, log_scale + focal, atol=5e-3, rtol=0)
        assert_close(found[:, 1:], shift, atol=5e-3, rtol=0)
        raised = torch.rad2deg(refinement.elevation / STORED_FACTOR)
        assert_close(raised, torch.tensor([3.0, -2.0]), atol=0.3, rtol=0)
    assert torch.equal(refinement.framing[[0, 2]], torch.zeros(2, 3, 7))  # classes that have no photographs
