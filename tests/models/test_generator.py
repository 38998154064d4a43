"""The generator: chunks, memory settings, backgrounds and depth."""

import math

import pytest
import torch
from torch.testing import assert_close

from graf.geometry.cameras import Intrinsics, pose_from_angles
from graf.geometry.rays import Patches, RayCaster
from graf.geometry.views import Cameras
from graf.geometry.volume_rendering import (
    RayNoise,
    RaySampling,
    points_along,
    render_rays,
    stratified_distances,
)
from graf.models.density import DensityLaw
from graf.models.generator import Generator
from graf.models.mlp_field import MLPField, MLPShape
from graf.models.siren_field import SirenField, SirenShape
from graf.models.triplane_field import TriplaneField, TriplaneShape
from graf.runtime.memory_settings import MemorySettings

SHAPE = MLPShape(
    depth=4, width=16, multires=3, multires_views=2, base_frequency=math.pi, use_viewdirs=True, dim_shape=5,
    dim_appearance=3, num_classes=2, dim_class=4, density=DensityLaw("softplus", 1.0, 0.0, 0.0, 0.6, None),
)  # fmt: skip
PLANES = TriplaneShape(
    planes="synthesis", plane_resolution=8, plane_channels=4, synthesis_width=4, decoder_width=8, colour_components=2,
    extent=0.9, multires_views=2, base_frequency=math.pi, use_viewdirs=True, dim_shape=5, dim_appearance=3,
    num_classes=2, density=SHAPE.density,
)  # fmt: skip
SINES = SirenShape(
    depth=3, width=16, multires_views=2, base_frequency=math.pi, use_viewdirs=True, dim_shape=5, dim_appearance=3,
    num_classes=2, dim_class=4, density=SHAPE.density,
)  # fmt: skip
FIELDS = [lambda: MLPField(SHAPE), lambda: SirenField(SINES), lambda: TriplaneField(PLANES)]
SAMPLING = RaySampling(6, 3)
CASTER = RayCaster(Intrinsics.from_fov(4, 30.0), 2.5, 4.5, 0.7)


def draw_inputs(dtype: torch.dtype = torch.float64, batch: int = 2):
    poses = pose_from_angles(torch.rand(batch, dtype=dtype), 0.2 + 0.4 * torch.rand(batch, dtype=dtype), 3.5)
    rays = CASTER.cast_images(poses, 4)
    count = rays.per_image
    noise = RayNoise(
        torch.rand(batch, count, 6, dtype=dtype),
        torch.rand(batch, count, 3, dtype=dtype),
        torch.randn(batch, count, 9, dtype=dtype),
    )
    return torch.randn(batch, 8, dtype=dtype), torch.arange(batch) % 2, rays, noise


@pytest.mark.parametrize("chunk", [1, 7, 10, 16, 31])
def test_chunks_change_neither_outputs_nor_gradients(chunk):
    generator = Generator(MLPField(SHAPE), SAMPLING, learn_background=True).double()
    z, class_idx, rays, noise = draw_inputs()
    target = torch.randn(2, 16, 3, dtype=torch.float64)
    runs = []
    for size in (4096, chunk):
        generator.chunk = size
        found = generator(z, class_idx, rays, noise)
        loss = (found.rgb * target).sum() + found.depth.sum() + found.opacity.square().sum()
        runs.append((found, torch.autograd.grad(loss, list(generator.parameters()))))
    (whole, whole_gradients), (parts, part_gradients) = runs
    for name in ("rgb", "depth", "opacity"):
        assert_close(getattr(parts, name), getattr(whole, name), atol=1e-12, rtol=0)
    assert_close(part_gradients, whole_gradients, atol=1e-10, rtol=1e-10)


def test_without_learned_cameras_views_and_patches_are_as_given_and_whole_images_have_the_same_rays():
    generator, patches = Generator(MLPField(SHAPE), SAMPLING), Patches.whole(1)
    assert not [name for name in generator.state_dict() if "cameras" in name]
    views = Cameras(3.5, (0.3,)).views_of_labels(torch.tensor([[0, 0, 70]]))
    poses, places = generator.aim(views, patches)
    assert poses is views.poses
    assert places is patches
    for found, expected in zip(
        CASTER.cast_patches(poses, places, 7).tensors(), CASTER.cast_images(poses, 7).tensors(), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [(8, [(1, 8)] * 6), (10, [(1, 10), (1, 6)] * 3), (16, [(1, 16)] * 3), (40, [(2, 16), (1, 16)]), (99, [(3, 16)])],
)
def test_a_chunk_is_a_part_of_one_image_or_whole_images(monkeypatch, chunk, expected):
    generator = Generator(MLPField(SHAPE), RaySampling(6), chunk=chunk)
    evaluate, sizes = generator.field.forward_visible, []
    monkeypatch.setattr(
        generator.field,
        "forward_visible",
        lambda points, *others: sizes.append(tuple(points.shape[:2])) or evaluate(points, *others),
    )
    z, class_idx, rays, _ = draw_inputs(torch.float32, batch=3)
    generator(z, class_idx, rays)
    assert sizes == expected


@pytest.mark.parametrize("strategy", ["checkpoint", "deferred"])
@pytest.mark.parametrize("importance", [0, 4])
@pytest.mark.parametrize("make_field", FIELDS, ids=["mlp", "siren", "triplane"])
def test_recomputed_chunks_give_the_dense_gradients(strategy, importance, make_field):
    generator = Generator(make_field(), RaySampling(6, importance), learn_background=True, chunk=6).double()
    z, class_idx, rays, noise = draw_inputs(batch=2)
    noise = RayNoise(
        torch.rand(2, rays.per_image, 6, dtype=torch.float64),
        torch.rand(2, rays.per_image, importance, dtype=torch.float64) if importance else None,
        torch.randn(2, rays.per_image, 6 + importance, dtype=torch.float64),
    )
    z.requires_grad_(True)
    gradients = {}
    for name in ("dense", strategy):
        generator.strategy = name
        found = generator(z, class_idx, rays, noise)
        loss = found.rgb.sin().sum() + found.depth.square().sum() + (found.opacity * found.rgb[..., :1]).sum()
        wanted = [z, *(parameter for parameter in generator.parameters())]
        gradients[name] = torch.autograd.grad(loss, wanted)
    assert_close(gradients[strategy], gradients["dense"], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("strategy", ["checkpoint", "deferred"])
def test_recomputation_repeats_the_autocast_of_the_forward_pass(strategy):
    generator = Generator(MLPField(SHAPE), SAMPLING, chunk=6)
    z, class_idx, rays, noise = draw_inputs(torch.float32)
    gradients = {}
    for name in ("dense", strategy):
        generator.strategy = name
        with torch.autocast("cpu", torch.bfloat16):
            found = generator(z, class_idx, rays, noise)
        gradients[name] = torch.autograd.grad(found.rgb.square().sum(), list(generator.field.parameters()))
    # bfloat16 sums differ with the order of addition; float32 instead of it would differ by percents
    for mine, dense in zip(gradients[strategy], gradients["dense"], strict=True):
        assert_close(mine, dense, atol=2e-2 * float(dense.abs().max()) + 1e-6, rtol=0)


def test_a_learned_background_stays_a_colour_and_can_return():
    generator = Generator(MLPField(SHAPE), SAMPLING, "white", learn_background=True)
    with torch.no_grad():
        generator.background.copy_(torch.tensor([1.5, -3.0, 0.25]))
    colour = generator.background_colour
    assert_close(colour, torch.tensor([1.0, -1.0, 0.25]))
    assert torch.equal(torch.autograd.grad(colour.sum(), generator.background)[0], torch.ones(3))


def test_images_of_a_batch_do_not_touch_each_other():
    generator = Generator(MLPField(SHAPE), SAMPLING).double()
    z, class_idx, rays, noise = draw_inputs(batch=3)
    whole = generator(z, class_idx, rays, noise)
    alone = generator(z[1:2], class_idx[1:2], rays[1:2], noise[1:2])
    assert_close(alone.rgb, whole.rgb[1:2], atol=1e-12, rtol=0)


def test_without_noise_rendering_is_deterministic_and_samples_sit_mid_bin():
    generator = Generator(MLPField(SHAPE), RaySampling(6)).double()
    z, class_idx, rays, _ = draw_inputs()
    found = generator(z, class_idx, rays)
    assert torch.equal(found.rgb, generator(z, class_idx, rays).rgb)
    middle = RayNoise(jitter=torch.full((2, 16, 6), 0.5, dtype=torch.float64))
    assert_close(found.rgb, generator(z, class_idx, rays, middle).rgb)


@pytest.mark.parametrize(("background", "value"), [("white", 1.0), ("black", -1.0)])
@pytest.mark.parametrize("learned", [True, False])
def test_rays_that_meet_nothing_show_the_background(background, value, learned):
    generator = Generator(MLPField(SHAPE), SAMPLING, background, learned)
    z, class_idx, rays, _ = draw_inputs(torch.float32)
    missed = (rays.near == rays.far)[..., 0]
    assert bool(missed.any())
    found = generator(z, class_idx, rays)
    assert torch.equal(found.rgb[missed], torch.full_like(found.rgb[missed], value))
    assert found.opacity[missed].abs().max() == 0


def test_only_a_learned_background_is_trained_by_what_the_rays_let_through():
    assert "background" not in dict(Generator(MLPField(SHAPE), SAMPLING, "white").named_parameters())
    generator = Generator(MLPField(SHAPE), SAMPLING, "black", learn_background=True)
    z, class_idx, rays, _ = draw_inputs(torch.float32)
    found = generator(z, class_idx, rays)
    found.rgb.sum().backward()
    expected = (1 - found.opacity.detach()).sum().expand(3)
    assert_close(generator.background.grad, expected, rtol=1e-4, atol=0)


def test_an_unknown_background_is_named():
    with pytest.raises(ValueError, match=r"background='grey'.*white, black"):
        Generator(MLPField(SHAPE), SAMPLING, "grey")


def test_depth_is_z_depth_along_the_optical_axis():
    """An opaque wall across the optical axis has the same z-depth in every pixel, though not the same distance."""
    pose = pose_from_angles(torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64), 3.5)
    rays = RayCaster(Intrinsics.from_fov(8, 60.0), 1.0, 6.0).cast_images(pose, 8)

    def wall(points, directions, noise):
        z = ((pose[0, :3, 3] - points) * pose[0, :3, 2]).sum(-1)
        return torch.zeros_like(points), torch.where(z > 3.0, 1e4, 0.0).to(points)

    depth = render_rays(wall, rays, RaySampling(4000), RayNoise()).depth
    assert_close(depth, torch.full_like(depth, 3.0), atol=2e-3, rtol=0)
    distance = depth / rays.axis_cosine
    assert distance.max() - distance.min() > 0.5


def test_the_generator_renders_its_own_field():
    generator = Generator(MLPField(SHAPE), RaySampling(6), "black").double()
    z, class_idx, rays, _ = draw_inputs()
    codes = generator.field.prepare(z, class_idx)
    distances = stratified_distances(rays.near, rays.far, 6)
    rgb, density = generator.field(points_along(rays, distances), rays.directions, codes)
    found = render_rays(
        lambda *_: (rgb, density), rays, RaySampling(6), RayNoise(), torch.full((3,), -1.0, dtype=torch.float64)
    )
    assert_close(generator(z, class_idx, rays).rgb, found.rgb)


def test_outputs_are_float32_under_bfloat16_autocast_and_float64_in_double():
    z, class_idx, rays, noise = draw_inputs(torch.float32)
    generator = Generator(MLPField(SHAPE), SAMPLING, learn_background=True)
    exact = generator(z, class_idx, rays, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = generator(z, class_idx, rays, noise)
    assert found.rgb.dtype == found.depth.dtype == found.opacity.dtype == torch.float32
    assert_close(found.rgb, exact.rgb, atol=0.05, rtol=0)
    assert generator.double()(*draw_inputs()[:3]).rgb.dtype == torch.float64


def test_dim_z_is_shape_and_appearance():
    assert Generator(MLPField(SHAPE), SAMPLING).dim_z == 8


@pytest.mark.parametrize("strategy", ["dense", "checkpoint", "deferred"])
def test_it_renders_in_the_settings_that_it_is_told_to_use(strategy):
    generator = Generator(MLPField(SHAPE), RaySampling(6), chunk=4096)
    z, class_idx, rays, _ = draw_inputs(torch.float32)
    counts = []
    make_runner = generator.make_runner
    generator.make_runner = lambda sizes: (counts.append(sizes), make_runner(sizes))[1]
    expected = generator(z, class_idx, rays)
    generator.use(MemorySettings(1, strategy, 8))
    assert (generator.strategy, generator.chunk) == (strategy, 8)
    assert_close(generator(z, class_idx, rays).rgb, expected.rgb)
    assert counts == [[32], [8, 8, 8, 8]]  # 16 rays of 2 images


def test_a_chunk_is_halved_until_it_is_as_small_as_helps():
    generator = Generator(MLPField(SHAPE), SAMPLING, chunk=200)
    assert generator.halve_chunk() == "training.chunk 200 -> 100"
    assert generator.halve_chunk() == "training.chunk 100 -> 64"
    assert generator.halve_chunk() is None
    assert generator.chunk == 64
