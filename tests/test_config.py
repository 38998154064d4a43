"""The configuration: what stops the program before anything is built, inheritance, overrides, and the round trip."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from graf.config import (
    CONFIG_FOLDER,
    PATCH_SIZES,
    RETIRED_KEYS,
    Config,
    ConfigError,
    _all_keys,
    build_config,
    load_config,
)
from graf.models import discriminator


def nested(key: str, value: object) -> dict:
    """{"a": {"b": value}} of "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def error_of(values: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config(values)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write_file


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
        "nerf.multires=99: input should be less than or equal to 16 (octaves of the positional encoding of points)"
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
        ("training.chunk", 0, "training.chunk=0: input should be 'auto', or input should be greater than 0 (rays"),
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


# --------------------------------------------------------------------------------------------------------- inherit_from


def test_a_file_lies_over_the_chain_it_inherits_from_key_by_key(write):
    write("first.yaml", "seed: 1\ndata: {near: 1.0, synthetic: {count: 20, seed: 5}}\ntraining: {batch_size: 3}")
    write("second.yaml", "inherit_from: first.yaml\nseed: 2\ndata: {synthetic: {count: 30}}")
    config = load_config(write("third.yaml", "inherit_from: second.yaml\nexpname: third\ndata: {far: 9}"))
    assert (config.expname, config.seed, config.training.batch_size) == ("third", 2, 3)
    assert (config.data.near, config.data.far) == (1.0, 9.0)
    assert (config.data.synthetic.count, config.data.synthetic.seed) == (30, 5)


def test_a_list_replaces_the_inherited_list(write):
    write("parent.yaml", "data: {v_list: [0.1, 0.2, 0.3]}")
    assert load_config(write("child.yaml", "inherit_from: parent.yaml\ndata: {v_list: [0.4]}")).data.v_list == (0.4,)


def test_a_parent_is_found_from_the_working_directory_too(write, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    write("parent.yaml", "seed: 7")
    child = write("runs/child.yaml", "inherit_from: parent.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_config(child).seed == 7


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_circle_is_named(write, length):
    for i in range(length):
        write(f"c{i}.yaml", f"inherit_from: c{(i + 1) % length}.yaml")
    with pytest.raises(ConfigError, match=r"inherit_from goes in a circle: .*c0.yaml -> .*c0.yaml"):
        load_config(write("c0.yaml", f"inherit_from: c{1 % length}.yaml"))


def test_a_missing_parent_is_named_with_the_file_that_asks_for_it(write):
    with pytest.raises(ConfigError, match=r"child.yaml: inherit_from nowhere.yaml: no such file"):
        load_config(write("child.yaml", "inherit_from: nowhere.yaml"))


# ---------------------------------------------------------------------------------------------------------- files, YAML


def test_a_missing_file_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"--config configs/defalt.yaml: no such file; did you mean .*default.yaml"):
        load_config("configs/defalt.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not valid YAML"), ("- 1", "expected a mapping of sections, found list"), ("5", "found int")],
)
def test_a_file_that_is_no_configuration_is_named(write, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write("bad.yaml", text))
    assert "bad.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bad.yaml: cannot be read"):
        load_config(tmp_path / "bad.yaml")


def test_an_empty_file_is_the_defaults(write):
    assert load_config(write("empty.yaml", "# nothing\n")) == Config()


@pytest.mark.parametrize(("text", "value"), [("5e-4", 5e-4), ("1e1", 10.0), ("2.5E-3", 2.5e-3), ("1.e-2", 0.01)])
def test_exponents_without_a_dot_are_numbers(write, text, value):
    assert load_config(write("a.yaml", f"training: {{lr_g: {text}}}")).training.lr_g == value
    assert load_config(write("b.yaml", ""), [f"training.lr_g={text}"]).training.lr_g == value


# ------------------------------------------------------------------------------------------------------------ overrides


def test_overrides_reach_every_depth_and_type(write):
    path = write("a.yaml", "training: {batch_size: 2, lr_g: 1}")
    overrides = [
        "training.batch_size=4",
        "seed=9",
        "data.synthetic.count=12",
        "training.use_amp=true",
        "data.v_list=[0.1, 0.2]",
        "nerf.bounding_radius=null",
        "expname=a-b",
    ]
    config = load_config(path, overrides)
    assert (config.training.batch_size, config.training.lr_g, config.seed) == (4, 1.0, 9)
    assert (config.data.synthetic.count, config.training.use_amp) == (12, True)
    assert (config.data.v_list, config.nerf.bounding_radius, config.expname) == ((0.1, 0.2), None, "a-b")


def test_the_last_override_wins_and_overrides_beat_files(write):
    path = write("a.yaml", "seed: 1")
    assert load_config(path, ["seed=2", "seed=3"]).seed == 3


def test_the_value_of_an_override_may_hold_an_equals_sign(write):
    path = write("a.yaml", "")
    assert load_config(path, ["data.datadir=runs/a=b"]).data.datadir == "runs/a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_size", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("training.batch_size=[1", "the value is not YAML"),
        ("expname.x=3", "expname is a value, not a section"),
        ("training.batchsize=3", "did you mean training.batch_size"),
        ("training.batch_size=0", "greater than or equal to 1"),
        ("training.monitor_every=5", "use training.print_every"),
    ],
)
def test_a_wrong_override_is_named(write, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write("a.yaml", "expname: x"), [override])


# ----------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"training": {"lr_g": 1e-7, "betas": [0.1, 0.9], "max_minutes": 0.5, "monitoring": []}},
        {"expname": "1e3", "data": {"datadir": "5e-4"}},  # strings that look like numbers
        {"data": {"classes": ["14", "1e5", "null", "yes", "Größe: 1", "-"], "datadir": "~/a b"}},
        {"data": {"file_pattern": r"(?P<class>\w+)__(?P<angle>\d+)\.png", "v_list": [0, 0.1, 1]}},
        {"nerf": {"bounding_radius": 1, "background": "learned"}, "evaluation": {"inception_weights": "a#b"}},
    ],
)
def test_the_resolved_configuration_is_a_configuration_file(write, values):
    config = build_config(values)
    assert load_config(write("resolved.yaml", config.to_yaml())) == config


def test_the_resolved_file_lists_every_key():
    written = yaml.safe_load(Config().to_yaml())

    def leaves(values: dict, prefix: str = "") -> set[str]:
        found = set()
        for name, value in values.items():
            found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
        return found

    assert leaves(written) == set(_all_keys())


def test_the_run_folder_is_outdir_and_name():
    assert build_config({"expname": "a", "training": {"outdir": "x/y"}}).run_folder == Path("x/y/a")
