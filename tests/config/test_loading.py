"""How a configuration is read: files, inheritance, shipped names, overrides, and the round trip."""

import re
from pathlib import Path

import pytest
import yaml

from graf.config import CONFIG_FOLDER, Config, ConfigError, build_config, load_config
from graf.config.loading import _all_keys

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


# -------------------------------------------------------------------------------------------------------- shipped names


@pytest.mark.parametrize("name", ["coil100_sr", "coil100_sr.yaml", "configs/coil100_sr.yaml"])
def test_a_shipped_configuration_is_found_by_its_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name) == load_config(CONFIG_FOLDER / "coil100_sr.yaml")


@pytest.mark.parametrize("name", ["default.yaml", "default", "configs/default.yaml"])
def test_a_file_that_is_there_comes_before_a_shipped_one(name, write, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    write(name, "seed: 7")
    monkeypatch.chdir(tmp_path)
    assert load_config(name) == Config(seed=7)


def test_a_folder_of_the_same_name_is_no_configuration(tmp_path, monkeypatch):
    (tmp_path / "default").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("default").expname == "default"


def test_a_folder_beside_a_file_is_not_what_it_inherits_from(write, tmp_path):
    (tmp_path / "smoke").mkdir()
    assert load_config(write("mine.yaml", "inherit_from: smoke\nexpname: mine")) == load_config(
        "smoke", ["expname=mine"]
    )


def test_a_name_that_no_disk_has_is_no_file():
    with pytest.raises(ConfigError, match="x: no such file"):
        load_config("x" * 300)


@pytest.mark.parametrize("parent", ["smoke", "smoke.yaml"])
def test_any_file_can_inherit_from_a_shipped_one(parent, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    child = load_config(write("mine.yaml", f"inherit_from: {parent}\nexpname: mine"))
    assert child == load_config("smoke", ["expname=mine"])


def test_a_file_may_extend_the_shipped_one_whose_name_it_has(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("smoke.yaml", "inherit_from: smoke\nseed: 7")
    assert load_config("smoke.yaml") == load_config("smoke", ["seed=7"])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("defalt", "did you mean default.yaml?"),
        ("elsewhere/default.yaml", "did you mean default.yaml?"),
        ("zzz", "shipped are blender, carla, "),
    ],
)
def test_what_is_neither_a_file_nor_shipped_is_answered_with_what_is(name, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^--config {name}: no such file; {re.escape(hint)}"):
        load_config(name)


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


@pytest.mark.parametrize(("text", "seed"), [("010", 10), ("0x1F", 31), ("0o17", 15), ("+7", 7), ("0", 0)])
def test_whole_numbers_are_those_of_yaml_1_2(write, text, seed):
    assert load_config(write("a.yaml", f"seed: {text}")).seed == seed
    assert load_config(write("b.yaml", ""), [f"seed={text}"]).seed == seed


@pytest.mark.parametrize("override", ["data.radius=3:30", "seed=1:10", "seed=0b11"])
def test_what_is_no_number_in_yaml_1_2_is_an_error(write, override):
    key, value = override.split("=")
    with pytest.raises(ConfigError, match=f"{key}='{value}': input should be a valid"):
        load_config(write("a.yaml", ""), [override])


@pytest.mark.parametrize("text", ["2024", "007", "2024_05_01", "2024-05-01", "12e456", "on", "0x10", "1.50"])
def test_text_is_taken_as_it_is_typed(write, text):
    file = write("a.yaml", f"expname: {text}\ndata: {{datadir: {text}, classes: [{text}, duck]}}")
    overrides = [f"expname={text}", f"data.datadir={text}", f"data.classes=[{text}, duck]"]
    for config in (load_config(file), load_config(write("b.yaml", ""), overrides)):
        assert (config.expname, config.data.datadir, config.data.classes) == (text, text, (text, "duck"))
        assert load_config(write("resolved.yaml", config.to_yaml())) == config


def test_a_section_in_which_all_is_commented_out_says_nothing(write):
    write("parent.yaml", "data: {near: 1.0}\ndiscriminator: {augment: {colour: 0.5}}")
    empty = "data:\n  # near: 2\ndiscriminator:\n  augment:\n"
    assert load_config(write("a.yaml", empty)) == Config()
    config = load_config(write("b.yaml", f"inherit_from: parent.yaml\n{empty}"))
    assert (config.data.near, config.discriminator.augment.colour) == (1.0, 0.5)


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
        ("data=", "^data=None: this is a section; expected its keys"),
        ("data.synthetic=5", "^data.synthetic=5: this is a section; expected its keys"),
        ("discriminator.augmant.colour=1", "did you mean discriminator.augment"),
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
        {"data": {"datadir": "3:30", "classes": ["010", "0o17", "1_000", "0b1"]}},
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


def test_the_run_folder_may_be_in_the_home_folder(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert build_config({"expname": "a", "training": {"outdir": "~/runs"}}).run_folder == tmp_path / "runs" / "a"
