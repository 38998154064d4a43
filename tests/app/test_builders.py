"""From a configuration to objects: weights follow the seed alone, and each key arrives where it acts."""

from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from graf.app import builders
from graf.app.builders import DatasetInfo
from graf.config import Config, ConfigError, build_config
from graf.data.loader import DecodedBatches
from graf.geometry.cameras import pose_from_angles
from graf.models.rrdb import WeightsError

SCENE = DatasetInfo(("car", "mug"), (0.2, 0.4), 30.0, True)
SMALL = {
    "nerf": {"netdepth": 2, "netwidth": 16, "N_samples": 4, "multires": 2, "multires_views": 1},
    "z_dist": {"dim": 8, "dim_appearance": 3},
    "ray_sampler": {"N_samples": 256},
    "discriminator": {"ndf": 4},
}


def configure(**sections: dict[str, object] | int) -> Config:
    merged: dict[str, object] = {name: dict(values) for name, values in SMALL.items()}
    for name, values in sections.items():
        merged[name] = {**merged.get(name, {}), **values} if isinstance(values, dict) else values  # type: ignore[dict-item]
    return build_config(merged)


def weights_of(config: Config) -> list[torch.Tensor]:
    networks = builders.build_generator(config, SCENE), builders.build_discriminator(config, SCENE)
    return [parameter.detach() for network in networks for parameter in network.parameters()]


def test_weights_depend_on_the_seed_alone_and_no_global_number_is_drawn():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = weights_of(configure(seed=5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, weights_of(configure(seed=5)), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, weights_of(configure(seed=6)), strict=True))


def test_the_generators_weights_do_not_depend_on_the_discriminators_keys():
    first = builders.build_generator(configure(), SCENE).state_dict()
    other = builders.build_generator(configure(discriminator={"ndf": 8}), SCENE).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("poses_known", "class_loss", "groups"), [(True, 1, (2, 2, 8)), (False, 1, (2,)), (True, 0, ()), (False, 0, ())]
)
def test_the_label_head_covers_what_is_known(poses_known, class_loss, groups):
    dataset_info = DatasetInfo(("car", "mug"), (0.2, 0.4), 30.0, poses_known)
    discriminator = builders.build_discriminator(configure(discriminator={"class_loss": class_loss}), dataset_info)
    assert tuple(discriminator.shape.label_groups) == groups
    assert discriminator.shape.condition_pose is poses_known


@pytest.mark.parametrize(
    ("background", "white", "expected"), [("auto", True, 1.0), ("auto", False, -1.0), ("black", True, -1.0)]
)
def test_what_a_ray_that_meets_nothing_sees(background, white, expected):
    config = configure(nerf={"background": background, "bounding_radius": 0.1}, data={"white_bkgd": white})
    generator = builders.build_generator(config, SCENE)
    views = builders.build_cameras(config, SCENE).views_of_labels(torch.tensor([[1, 0, 30, -1]]))
    rays = builders.build_caster(config, SCENE).cast_images(views.poses, 16)
    with torch.no_grad():
        colours = generator(torch.zeros(1, 8), views.class_idx, rays)
    corner = colours.rgb[0, 0]
    assert torch.equal(corner, torch.full((3,), expected))
    assert float(colours.opacity[0, 0]) == 0


def test_codes_split_into_shape_and_appearance():
    generator = builders.build_generator(configure(), SCENE)
    assert generator.dim_z == 8
    assert (generator.field.shape.dim_shape, generator.field.shape.dim_appearance) == (5, 3)


def test_a_scene_survives_the_checkpoint():
    meta = asdict(SCENE)
    assert DatasetInfo(**meta) == SCENE


def test_the_data_sets_own_field_of_view_wins(caplog):
    class Photographs:
        fov, class_names, instance_names, v_list, poses_known = 41.5, ["a"], ["a/1", "a/2"], (0.3,), True
        poses = None

    with caplog.at_level("INFO", "graf"):
        dataset_info = builders.describe_dataset(configure(), Photographs())  # type: ignore[arg-type]
    assert dataset_info == DatasetInfo(("a",), (0.3,), 41.5, True, ("a/1", "a/2"))
    assert (
        builders.build_caster(configure(), dataset_info).intrinsics.focal
        != builders.build_caster(configure(), SCENE).intrinsics.focal
    )


def test_true_poses_say_how_far_the_cameras_stand_and_data_radius_elsewhere(caplog):
    poses = pose_from_angles(torch.zeros(2), torch.full((2,), 0.3), torch.tensor([5.8, 6.4]))
    names = {"class_names": ["a"], "instance_names": []}
    photographs = SimpleNamespace(**names, v_list=(0.3,), fov=None, poses=poses, poses_known=True)
    config = configure(data={"type": "transforms", "near": 5.0, "far": 7.0})
    with caplog.at_level("INFO", "graf"):
        dataset_info = builders.describe_dataset(config, photographs)
    assert "data.radius=3.5: the poses' mean is 6.100, which is used instead" in caplog.messages
    assert builders.build_cameras(config, dataset_info).radius == pytest.approx(6.1)
    assert builders.build_cameras(config, SCENE).radius == 3.5  # as a checkpoint of an earlier version opens


def test_without_poses_or_named_heights_grids_stand_in_the_middle_of_the_range():
    names = {"class_names": ["face"], "instance_names": []}
    photographs = SimpleNamespace(**names, v_list=(0.5,), fov=None, poses=None, poses_known=False)
    config = Config.model_validate({"data": {"type": "image_folder", "vmin": 0.1, "vmax": 0.3}})
    assert builders.describe_dataset(config, photographs).v_list == pytest.approx((0.2,))
    named = Config.model_validate({"data": {"type": "image_folder", "v_list": [0.4]}})
    assert builders.describe_dataset(named, photographs).v_list == (0.5,)


@pytest.mark.parametrize(("sizes", "message"), [({(64, 80): 3}, "3 of 3"), ({(64, 64): 1, (128, 128): 4}, "1 of 5")])
def test_photographs_smaller_than_super_resolved_images_are_counted_and_refused_if_all_are(
    sizes, message, monkeypatch, caplog
):
    photographs = SimpleNamespace(report=SimpleNamespace(sizes=Counter(sizes)), poses=None)
    monkeypatch.setattr(builders, "open_dataset", lambda settings: photographs)
    config = configure(data={"imsize": 32}, ccsr={"enabled": True, "scale": 4})
    if len(sizes) == 1:
        with pytest.raises(ConfigError, match=rf"{message} photographs are smaller .* data\.imsize to at most 16"):
            builders.open_photographs(config)
        photographs.report.sizes = Counter({(40, 60): 2})  # 10 pixels would be less than any patch
        with pytest.raises(
            ConfigError, match=r"the largest square is 40; lower ccsr\.scale, or set ccsr\.enabled=false"
        ):
            builders.open_photographs(config)
        photographs.report.sizes = Counter(sizes)
    else:
        assert builders.open_photographs(config) is photographs
        assert f"{message} photographs are smaller" in caplog.text
    builders.open_photographs(configure(data={"imsize": 32}, ccsr={"enabled": True, "scale": 2}))
    builders.open_photographs(configure(data={"imsize": 128}))  # without super-resolution any size goes


def test_a_module_that_is_restored_from_a_checkpoint_needs_no_file_of_weights():
    config = configure(ccsr={"enabled": True, "trunk": "rrdb", "features": 8, "blocks": 1, "weights": "gone.pth"})
    assert builders.build_ccsr(config, pretrained=False) is not None
    with pytest.raises(WeightsError, match=r"gone\.pth"):
        builders.build_ccsr(config)


def test_an_unknown_field_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"nerf\.field='triplan': expected one of mlp"):
        builders.build_generator(build_config({"nerf": {"field": "triplan"}}), SCENE)


@pytest.mark.parametrize(
    ("usable", "budget", "place"),
    [(20 * 7 * 48, None, "meta"), (20 * 7 * 48 - 1, None, "cpu"), (None, None, "cpu"), (10**9, "1GiB", "cpu")],
)
def test_decoded_photographs_are_on_the_device_where_they_take_a_twentieth_of_it(monkeypatch, usable, budget, place):
    monkeypatch.setattr(builders, "read_usable_memory", lambda device: usable)
    photographs = PhotosInMemory(torch.zeros(7, 3, 4, 4, dtype=torch.uint8), torch.zeros(7, 4, dtype=torch.int64))
    config = configure(training={"memory_budget": budget, "batch_size": 2})
    batches = builders.open_batches(config, photographs, 0, torch.device("meta"))
    assert isinstance(batches, DecodedBatches)
    assert batches.pixels.device.type == place


class PhotosInMemory(SimpleNamespace):
    """What batches of decoded photographs are made of."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__(pixels=pixels, labels=labels, poses=None)

    def __len__(self) -> int:
        return len(self.pixels)
