"""What stands in a configuration: defaults and descriptions, and what stops the program before anything is built."""

import pytest
from pydantic import ValidationError

from graf.config import CONFIG_FOLDER, PATCH_SIZES, Config, ConfigError, build_config, load_config
from graf.config.loading import RETIRED_KEYS, _all_keys
from graf.models import discriminator

PHOTOMETRIC = {"photometric": 20, "match_views": True}
SERIES = {name: [0.1, 0, 0, 0.02, 0, 0, 0] for name in ("log_scale", "right", "down")}
KNOWN = {"fov": 29, "elevations": [20], "framing": {"car": SERIES}}


def nested(key: str, value: object) -> dict:
    """{"a": {"b": value}} of "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def error_of(values: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config(values)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------- definition


def test_the_defaults_are_valid_and_published_ones():
    config = Config()
    assert config.nerf.N_samples == 64
    assert (config.nerf.netdepth, config.nerf.netwidth) == (8, 256)
    assert (config.training.lr_g, config.training.lr_d) == (5e-4, 1e-4)
    assert config.training.lr_anneal_every == (50_000, 100_000, 200_000)
    assert config.ray_sampler.patch_size == 32


def test_every_key_is_described():
    keys = _all_keys()
    assert len(keys) > 90
    assert [key for key, description in keys.items() if not description.strip()] == []


def test_the_configuration_is_frozen_at_every_depth():
    config = Config()
    for section, name in ((config, "seed"), (config.data, "near"), (config.discriminator.augment, "colour")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1)


def test_the_patch_sizes_are_those_of_the_discriminator():
    assert PATCH_SIZES == discriminator.PATCH_SIZES


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_loads_and_survives_the_round_trip(path, write):
    config = load_config(path)
    assert load_config(write("again.yaml", config.to_yaml())) == config


def test_there_is_a_default_file():
    assert (CONFIG_FOLDER / "default.yaml").is_file()


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("training.batchsize", "training.batch_size"),
        ("training.bath_size", "training.batch_size"),
        ("nerf.net_depth", "nerf.netdepth"),
        ("data.synthetic.cout", "data.synthetic.count"),
        ("discriminator.augment.color", "discriminator.augment.colour"),
        ("trainig", "training"),
        ("sed", "seed"),
        ("max_minutes", "training.max_minutes"),  # right but for its section
        ("nerf.imsize", "data.imsize"),
    ],
)
def test_an_unknown_key_is_named_with_its_value_and_the_nearest_key(key, nearest):
    message = error_of(nested(key, 7))
    assert message == f"{key}=7: unknown key; did you mean {nearest}?"


def test_all_unknown_keys_are_named_at_once():
    lines = error_of({"data": {"nea": 1, "fra": 2}, "sed": 3}).splitlines()
    assert [line.partition("=")[0] for line in lines] == ["data.nea", "data.fra", "sed"]


@pytest.mark.parametrize("key", sorted(RETIRED_KEYS))
def test_a_retired_key_says_what_to_use_instead(key):
    assert error_of(nested(key, 1)) == f"{key}=1: {RETIRED_KEYS[key]}"
    assert key not in _all_keys()


@pytest.mark.parametrize("key", sorted(RETIRED_KEYS))
def test_the_hint_of_a_retired_key_names_keys_that_exist(key):
    words = [word.rstrip(",;:)").partition("=")[0] for word in RETIRED_KEYS[key].replace("(", " ").split()]
    sections = {"data", "nerf", "z_dist", "training", "discriminator", "evaluation"}
    named = [word for word in words if word.partition(".")[0] in sections and "." in word]
    valid = {*_all_keys(), "discriminator.augment"}
    assert [word for word in named if word not in valid] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.batch_size", "many"),
        ("training.batch_size", 4.5),
        ("training.batch_size", True),
        ("training.batch_size", None),
        ("training.batch_size", [4]),
        ("training.lr_g", False),
        ("training.use_amp", 3),
        ("training.betas", [0.5]),
        ("training.lr_anneal_every", "50000,soon"),
        ("training.lr_anneal_every", True),
        ("data.v_list", 0.3),
        ("data.datadir", 5),
        ("data.datadir", None),
        ("data.type", "turn"),
        ("data", 5),
        ("expname", 12),
    ],
)
def test_a_wrong_type_is_named_with_key_and_value(key, value):
    first, *_ = error_of(nested(key, value)).splitlines()
    assert first.startswith(key)
    assert repr(value) in first


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.batch_size", 0),
        ("training.micro_batch_size", 0),
        ("training.micro_batch_size", -1),
        ("training.chunk", 0),
        ("training.empty_cache", 0),
        ("data.crop", 0),
        ("training.lr_g", 0.0),
        ("training.lr_g", float("nan")),
        ("training.lr_g", float("inf")),
        ("training.lr_anneal", 1.5),
        ("training.lr_anneal_every", 0),
        ("training.lr_anneal_every", [100, -1]),
        ("training.lr_anneal_every", []),
        ("training.lr_points", []),
        ("training.lr_points", 3),
        ("training.lr_points", [0, 1]),
        ("training.lr_points", [[0, 1], [500]]),
        ("training.lr_points", [[0, 1], [500, -0.1]]),
        ("training.lr_points", [[-1, 1]]),
        ("training.lr_points", [[0.5, 1]]),
        ("training.lr_points", [[0, 1], [500, 0.1], [500, 0.2]]),
        ("training.lr_points", [[0, 0], [500, 0]]),
        ("training.lr_batch_size", 0),
        ("training.scale_lr", "cubic"),
        ("training.betas", [0.5, 1.0]),
        ("training.model_average_beta", 1.0),
        ("training.device", "gpu"),
        ("training.monitoring", ["comet"]),
        ("nerf.multires", 99),
        ("nerf.bounding_radius", -1),
        ("data.fov", 180),
        ("data.radius", 0),
        ("data.radius", [4, 3]),
        ("data.radius", [0, 3]),
        ("data.imsize", 8),
        ("data.v_list", [0.2, 1.2]),
        ("data.v_list", []),
        ("data.num_views", 361),
        ("ray_sampler.min_scale", 0),
        ("discriminator.augment.cutout", 1.0),
        ("evaluation.num_images", 1),
        ("seed", -1),
        ("expname", ""),
        ("expname", "a/b"),
        ("expname", ".."),
    ],
)
def test_a_value_out_of_range_is_named(key, value):
    assert error_of(nested(key, value)).startswith(key)


def test_a_refused_value_comes_with_what_is_allowed_and_what_the_key_means():
    message = error_of({"nerf": {"multires": 99}})
    assert message == (
        "nerf.multires=99: input should be less than or equal to 16 (mlp: octaves of the positional encoding of points)"
    )


@pytest.mark.parametrize(
    ("values", "start", "advice"),
    [
        ({"data": {"near": 4.5, "far": 4.5}}, "data.near=4.5", "data.far=4.5"),
        ({"data": {"umin": 0.6, "umax": 0.5}}, "data.umin=0.6", "data.umax=0.5"),
        ({"data": {"vmin": 0.6, "vmax": 0.5}}, "data.vmin=0.6", "data.vmax=0.5"),
        ({"data": {"radius": [3, 4]}}, "data.radius=[3.0, 4.0]", "needs one number"),
        ({"data": {"heldout_every": 1}}, "data.heldout_every=1", "0 holds nothing out"),
        ({"z_dist": {"dim": 64, "dim_appearance": 64}}, "z_dist.dim_appearance=64", "z_dist.dim=64"),
        ({"ray_sampler": {"N_samples": 1000}}, "ray_sampler.N_samples=1000: is not a perfect square", "try 1024"),
        ({"ray_sampler": {"N_samples": 2304}}, "ray_sampler.N_samples=2304: is a patch of side 48", "try 1024"),
        ({"ray_sampler": {"N_samples": 16384}}, "ray_sampler.N_samples=16384", "data.imsize=64"),
        ({"ray_sampler": {"min_scale": 0.9, "max_scale": 0.5}}, "ray_sampler.min_scale=0.9", "max_scale=0.5"),
        ({"training": {"reg_type": "wgangp"}}, "training.reg_type=wgangp", "training.gan_type=wgan"),
        ({"discriminator": {"hflip": True}}, "discriminator.hflip=true", "image_folder"),
        ({"data": {"crop": 32}}, "data.crop=32", "set data.imsize"),
        (
            {"data": {"synthetic": {"count": 10}}, "training": {"batch_size": 11}},
            "training.batch_size=11: the data set has 10 images",
            "try training.batch_size=10",
        ),
        ({"training": {"photometric": 5}}, "training.photometric=5", "training.match_views=true"),
        ({"ccsr": {"enabled": True, "photometric": 5}}, "ccsr.photometric=5", "set training.photometric=20"),
        ({"nerf": {"field": "triplane"}}, "nerf.field=triplane", "nerf.bounding_radius"),
        ({"data": {"refine_cameras": True}}, "data.refine_cameras=true", "set training.photometric=20"),
        (
            {"data": {"refine_cameras": True, "type": "transforms"}, "training": PHOTOMETRIC},
            "data.refine_cameras: corrects cameras that follow from labels",
            "data.type=transforms has its own, so leave it out",
        ),
        ({"data": {"refined_cameras": KNOWN, "type": "image_folder"}}, "data.refined_cameras: ", "leave it out"),
        ({"training": {"lr_schedule": "points"}}, "training.lr_schedule=points", "needs training.lr_points"),
        (
            {"training": {"lr_schedule": "cosine", "lr_points": [[0, 1]]}},
            "training.lr_points: are followed by training.lr_schedule=points, found lr_schedule=cosine",
            "set it to points",
        ),
        (
            {"training": {"lr_points": [[0, 1], [9, 0]], "lr_interpolation": "log"}},
            "training.lr_points: the factor at iteration 9 is 0",
            "use lr_interpolation=linear",
        ),
        ({"training": {"scale_lr": "sqrt"}}, "training.scale_lr=sqrt: needs training.lr_batch_size", "to 8"),
        (
            {"training": {"save_best": "psnr"}, "data": {"type": "image_folder"}},
            "training.save_best=psnr: compares with photographs whose views are known",
            "use save_best=kid",
        ),
    ],
)
def test_a_contradiction_names_both_sides(values, start, advice):
    message = error_of(values)
    assert len(message.splitlines()) == 1
    assert message.startswith(start)
    assert advice in message


@pytest.mark.parametrize(
    "values",
    [
        {"data": {"umin": 0.5, "umax": 0.5}},
        {"data": {"heldout_every": 2}},
        {"data": {"refine_cameras": True, "type": "turntable"}, "training": PHOTOMETRIC},
        {"data": {"refined_cameras": KNOWN, "type": "synthetic"}},
        {"data": {"radius": [3, 4], "type": "image_folder"}},
        {"z_dist": {"dim": 64, "dim_appearance": 0}},
        {"ray_sampler": {"N_samples": 4096}},
        {"ray_sampler": {"min_scale": 1, "max_scale": 1}},
        {"training": {"reg_type": "wgangp", "gan_type": "wgan"}},
        {"discriminator": {"hflip": True}, "data": {"type": "image_folder"}},
        {"data": {"synthetic": {"count": 10}}, "training": {"batch_size": 10}},
        {"data": {"synthetic": {"count": 10}}, "training": {"batch_size": 11, "drop_last": False}},
        *({"ray_sampler": {"N_samples": size**2}, "data": {"imsize": 256}} for size in PATCH_SIZES),
    ],
)
def test_what_only_looks_like_a_contradiction_passes(values):
    found = build_config(values).model_dump(mode="json")
    for section, keys in values.items():
        for key, value in keys.items():
            taken = found[section][key]
            assert taken == value if not isinstance(value, dict) else value.items() <= taken.items()


def test_learned_cameras_survive_the_round_trip_and_what_is_no_series_is_named(write):
    config = build_config({"data": {"refined_cameras": KNOWN}})
    assert load_config(write("again.yaml", config.to_yaml())) == config
    short = KNOWN | {"framing": {"car": SERIES | {"right": [0.1, 0.2]}}}
    message = error_of({"data": {"refined_cameras": short}})
    assert message.startswith("data.refined_cameras")
    assert "at least 7 items" in message


def test_all_contradictions_are_named_at_once():
    lines = error_of({"data": {"near": 5}, "z_dist": {"dim": 8}, "ray_sampler": {"N_samples": 300}}).splitlines()
    assert [line.partition("=")[0] for line in lines] == [
        "data.near",
        "z_dist.dim_appearance",
        "ray_sampler.N_samples",
    ]


def test_grafs_comma_list_of_milestones_is_read():
    for value in ("50000,100000", [50_000, 100_000]):
        config = build_config({"training": {"lr_anneal_every": value}})
        assert config.training.lr_anneal_every == (50_000, 100_000)
    assert build_config({"training": {"lr_anneal_every": 100}}).training.lr_anneal_every == (100,)


def test_grafs_period_of_a_step_schedule_is_read(write):
    training = build_config({"training": {"lr_anneal_every": 50_000}}).training
    assert (training.lr_schedule, training.lr_anneal_every) == ("step", (50_000,))
    chosen = {"training": {"lr_anneal_every": 50_000, "lr_schedule": "multistep"}}
    assert build_config(chosen).training.lr_schedule == "multistep"


def test_points_alone_are_a_schedule_which_survives_the_round_trip(write):
    config = build_config({"training": {"lr_points": [[0, 0], [500, 1], [20_000, 0.1]]}})
    assert config.training.lr_schedule == "points"
    assert config.training.lr_points == ((0, 0.0), (500, 1.0), (20_000, 0.1))
    assert load_config(write("again.yaml", config.to_yaml())) == config
    assert load_config(write("none.yaml", ""), ["training.lr_points=[[0, 1]]"]).training.lr_schedule == "points"


def test_iterations_of_points_that_do_not_increase_are_named():
    message = error_of({"training": {"lr_points": [[0, 1], [500, 0.5], [400, 0.1]]}})
    assert "iteration 400 comes after 500" in message


@pytest.mark.parametrize("file", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_rates_of_a_shipped_configuration_are_written_for_its_own_batch(file):
    training = load_config(file, ["training.scale_lr=sqrt"]).training
    assert training.lr_batch_size == training.batch_size


def test_grafs_own_default_file_needs_no_more_than_what_its_errors_say(write):
    file = write(
        "graf.yaml",
        """
        data: {datadir: data/carla, type: image_folder, imsize: 64, white_bkgd: True, near: 1., far: 6., radius: 3.4,
               fov: 90., umin: 0., umax: 1., vmin: 0., vmax: 0.45642212862617093}
        nerf: {use_viewdirs: True, multires: 10, multires_views: 4, N_samples: 64, N_importance: 0, netdepth: 8,
               netwidth: 256, raw_noise_std: 1., decrease_noise: True}
        z_dist: {type: gauss, dim: 256, dim_appearance: 128}
        ray_sampler: {min_scale: 0.25, max_scale: 1., scale_anneal: 0.0025, N_samples: 1024}
        discriminator: {ndf: 64, hflip: False}
        training: {outdir: ./results, monitoring: tensorboard, nworkers: 6, batch_size: 8, chunk: 32768, lr_g: 0.0005,
                   lr_d: 0.0001, lr_anneal: 0.5, lr_anneal_every: "50000,100000,200000", gan_type: standard,
                   reg_type: real, reg_param: 10., optimizer: rmsprop, model_average_beta: 0.999, save_best: fid,
                   fid_every: 5000, print_every: 10, sample_every: 500, save_every: 900, backup_every: 50000}
        """,
    )
    training = load_config(file).training
    assert training.monitoring == ("tensorboard",)
    assert training.lr_anneal_every == (50_000, 100_000, 200_000)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.chunk", 0, "training.chunk=0: input should be 'auto', or input should be greater than 0 (most rays"),
        ("data.radius", "far", "data.radius='far': input should be a valid number, unable to parse"),
        ("training.betas", [0.5, 1.0], "training.betas.1=1.0: input should be less than 1"),
    ],
)
def test_what_several_kinds_of_value_would_allow_is_one_line_under_the_keys_own_name(key, value, message):
    line, *others = error_of(nested(key, value)).splitlines()
    assert others == []
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("ccsr", "start", "advice"),
    [
        ({"kernel": [0.25, 0.5, 0.25]}, "ccsr.kernel: 3 weights", "even number"),
        ({"kernel": [0.5, 0.6]}, "ccsr.kernel: the weights sum to 1.1", "make it 1"),
        ({"weights": "x.pth"}, "ccsr.weights='x.pth'", "ccsr.trunk=conv"),
        ({"freeze_trunk": True}, "ccsr.freeze_trunk=true", "set ccsr.weights"),
    ],
)
def test_contradictions_of_super_resolution_name_their_keys(ccsr, start, advice):
    message = error_of({"ccsr": ccsr})
    assert message.startswith(start)
    assert advice in message


def test_grafs_comma_range_of_distances_is_read():
    for value in ("9.5,10.5", [9.5, 10.5]):
        config = build_config({"data": {"type": "image_folder", "radius": value}})
        assert config.data.radius_range == (9.5, 10.5)
    assert Config().data.radius_range == (3.5, 3.5)
