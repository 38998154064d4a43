"""YAML files with `inherit_from` and command-line overrides -> a validated Config, or a ConfigError.

Whatever is wrong with a configuration is found here, before anything is built, and reported with the key, the value,
what is allowed and the nearest valid key.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from graf.base.errors import UserError
from graf.config.schema import Config
from graf.config.yaml_dialect import YamlProblem, load_yaml

_PACKAGE = Path(__file__).resolve().parent.parent
_INSTALLED = _PACKAGE / "configs"

#: the shipped configurations: inside an installed package, beside the package in a checkout
CONFIG_FOLDER = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"

#: GRAF keys that have no meaning here, and what to use instead.
RETIRED_KEYS = {
    "data.orthographic": "only perspective cameras exist here: remove it",
    "data.augmentation": "use discriminator.augment",
    "nerf.i_embed": "use nerf.multires=0 for no positional encoding",
    "training.netchunk": "use training.chunk (rays rendered at once)",
    "nerf.netdepth_fine": "one network serves coarse and importance samples: remove it",
    "nerf.netwidth_fine": "one network serves coarse and importance samples: remove it",
    "nerf.perturb": "use nerf.jitter",
    "training.take_model_average": "use training.model_average_beta (0 for none)",
    "training.lr_anneal_end": "use training.lr_anneal_every",
    "training.equalize_lr": "not supported: remove it",
    "training.model_file": "runs continue from their newest checkpoint: remove it, or use --resume PATH",
    "training.model_average_reinit": "not supported: remove it",
    "training.restart_every": "not supported: remove it",
    "training.video_every": "eval.py renders videos: remove it",
    "training.n_test_samples_with_same_shape_code": "use eval.py --shape_appearance: remove it",
    "training.monitor_every": "use training.print_every",
    "discriminator.nc": "images always have three channels: remove it",
    "discriminator.type": "there is one discriminator: remove it",
    "discriminator.imsize": "the patch size is sqrt(ray_sampler.N_samples): remove it",
}


class ConfigError(UserError):
    """The configuration is wrong; the message has one line per problem."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and everything it inherits from, apply `section.key=value` overrides, validate.

    path: a file or, where there is none, the name of a shipped configuration, such as default. Raises ConfigError with
    one line per problem.
    """
    values = read_yaml(Path(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r}: expected section.key=value, as in training.batch_size=4")
        keys = key.strip().split(".")
        try:
            value = load_yaml(text, _text_keys(), keys[-1])
        except YamlProblem as error:
            raise ConfigError(f"override {override[:200]!r}: the value is not YAML ({_one_line(error)})") from error
        _set(values, keys, value, override)
    return build_config(values)


def build_config(values: Mapping[str, Any]) -> Config:
    """Validate a nested mapping. Raises ConfigError with one line per problem."""
    unknown = list(_unknown_keys(values, Config))
    if unknown:
        raise ConfigError("\n".join(unknown))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        found: dict[tuple[str, str], list[str]] = {}  # (key, value) -> what is allowed: one for each kind of value
        for problem in error.errors():
            key = _key_of(problem["loc"])
            message = str(problem["msg"]).removeprefix("Value error, ")
            if problem["type"] in ("model_type", "model_attributes_type"):
                message = "this is a section; expected its keys, each with a value"
            message = message[:1].lower() + message[1:] if key else message
            found.setdefault((key, repr(problem["input"])), []).append(message)
        lines = []
        descriptions = _all_keys()
        for (key, value), messages in found.items():
            text = ", or ".join(dict.fromkeys(messages))
            description = f" ({descriptions[key]})" if descriptions.get(key) else ""
            lines.append(f"{key}={value}: {text}{description}" if key else text)
        raise ConfigError("\n".join(lines)) from None


def _key_of(location: Sequence[int | str]) -> str:
    """The key that pydantic's location is in, with a place in a list but without the kinds of value that it tried."""
    keys, parts = {*_all_keys(), *_all_sections()}, [str(part) for part in location]
    length = max((n for n in range(len(parts) + 1) if ".".join(parts[:n]) in keys), default=len(parts))
    places = [str(part) for part in location[length:] if isinstance(part, int)]
    return ".".join([*parts[:length], *places])


def read_yaml(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file as a nested dict, laid over the files named by its `inherit_from`, unvalidated."""
    path = _find(path, f"{_seen[-1]}: inherit_from" if _seen else "--config")
    if path in _seen:
        raise ConfigError(f"{path}: inherit_from goes in a circle: {' -> '.join(map(str, (*_seen, path)))}")
    try:
        values = load_yaml(path.read_text(encoding="utf-8"), _text_keys()) or {}
    except YamlProblem as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    parent = values.pop("inherit_from", None)
    values = _drop_empty(values, Config)
    if parent is None:
        return values
    beside = path.parent / str(parent)
    return _merge(read_yaml(beside if os.path.isfile(beside) else Path(str(parent)), (*_seen, path)), values)


def _find(path: Path, asked_by: str) -> Path:
    """The file at `path`, else the shipped one of that name: `default`, `default.yaml` or `configs/default.yaml`."""
    if os.path.isfile(path):
        return path.resolve()
    names = sorted(file.stem for file in CONFIG_FOLDER.glob("*.yaml"))
    name = path.name.removesuffix(".yaml")
    if name in names and str(path.parent) in (".", "configs"):
        return CONFIG_FOLDER / f"{name}.yaml"
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    hint = f"did you mean {nearest[0]}.yaml?" if nearest else f"shipped are {', '.join(names)}"
    raise ConfigError(f"{asked_by} {path}: no such file; {hint}")


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _drop_empty(values: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Without sections in which nothing stands, as where all of it is commented out: they say nothing."""
    sections = _sections(model)
    kept = {name: value for name, value in values.items() if value is not None or sections.get(name) is None}
    for name, value in kept.items():
        section = sections.get(name)
        if section is not None and isinstance(value, Mapping):
            kept[name] = _drop_empty(value, section)
    return kept


def _set(values: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {key} is a value, not a section")
        values[key] = dict(inner or {})
        values = values[key]
    values[keys[-1]] = value


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """The fields of a model; those that are sections with their own model."""
    kinds: dict[str, Any] = {name: info.annotation for name, info in model.model_fields.items()}
    return {
        key: kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None for key, kind in kinds.items()
    }


def _all_keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, str]:
    """Every key with its dots -> its description."""
    keys: dict[str, str] = {}
    for name, section in _sections(model).items():
        if section is not None:
            keys |= _all_keys(section, f"{prefix}{name}.")
        else:
            keys[prefix + name] = model.model_fields[name].description or ""
    return keys


def _all_sections() -> list[str]:
    """Every section with its dots, each once."""
    names = [key.split(".") for key in _all_keys()]
    return list(dict.fromkeys(".".join(parts[:n]) for parts in names for n in range(1, len(parts))))


@cache
def _text_keys(model: type[BaseModel] = Config) -> frozenset[str]:
    """Names of the keys whose values are text, or lists of it."""
    names: set[str] = set()
    for name, section in _sections(model).items():
        if section is not None:
            names |= _text_keys(section)
        elif _holds_text(model.model_fields[name].annotation):
            names.add(name)
    return frozenset(names)


def _holds_text(kind: Any) -> bool:
    return kind is str or any(_holds_text(part) for part in get_args(kind))


def _unknown_keys(values: Mapping[str, Any], model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """A line for each key that no section has."""
    sections = _sections(model)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in RETIRED_KEYS:
            yield f"{key}={value!r}: {RETIRED_KEYS[key]}"
        elif name not in sections:
            yield f"{key}={value!r}: unknown key; did you mean {_nearest_key(key)}?"
        elif (section := sections[name]) is not None and isinstance(value, Mapping):
            yield from _unknown_keys(value, section, f"{key}.")


def _nearest_key(key: str) -> str:
    """The most similar key; a key that is right but for its section counts as nearest."""
    keys, last = [*_all_keys(), *_all_sections()], key.rpartition(".")[2]
    same_name = [other for other in keys if other.rpartition(".")[2] == last]
    return same_name[0] if same_name else max(keys, key=lambda other: difflib.SequenceMatcher(None, key, other).ratio())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
