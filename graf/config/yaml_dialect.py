"""The YAML of configurations: plain values only, every key once, small enough for a person to have written it."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

_LIST = "tag:yaml.org,2002:seq"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
#: values of a file, each time that an alias repeats them counted: a few lines of aliases can stand for billions
MAX_VALUES = 10_000
#: characters of a text, and of a number in it
MAX_CHARACTERS, MAX_DIGITS = 500_000, 400


class YamlProblem(ValueError):
    """A text is not YAML, or not of this dialect; the message is one line and says where."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats, since PyYAML takes `5e-4` (no dot) for a string; no dates; every key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            line, key = key_node.start_mark.line + 1, getattr(key_node, "value", None)
            if isinstance(key, str):
                if key == "<<":  # of which a few, nested, stand for billions of keys
                    raise YamlProblem(f"line {line}: merge keys (<<) are not taken: write the keys out")
                if key in lines:
                    raise YamlProblem(f"{key} is given twice, in lines {lines[key]} and {line}: remove one")
                lines[key] = line
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = node.value
        if isinstance(text, str) and len(text) > MAX_DIGITS and re.fullmatch(r"[-+\d_.:]+", text):
            line = node.start_mark.line + 1
            raise YamlProblem(f"line {line}: a number of {len(text)} digits; expected at most {MAX_DIGITS}")
        return super().construct_scalar(node)


class YamlDumper(yaml.SafeDumper):
    """Puts quotes around strings that :func:`load_yaml` would read as floats, and each list on one line."""


YamlDumper.add_representer(list, lambda dumper, values: dumper.represent_sequence(_LIST, values, flow_style=True))

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind in (_Loader, YamlDumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def load_yaml(text: str) -> Any:
    """The plain values of a YAML text. Raises YamlProblem."""
    if len(text) > MAX_CHARACTERS:
        raise YamlProblem(f"it has {len(text):,} characters; expected at most {MAX_CHARACTERS:,}")
    try:
        values = yaml.load(text, Loader=_Loader)
    except YamlProblem:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, LookupError) as error:
        raise YamlProblem(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise YamlProblem("it is nested too deeply") from error
    if _count_values(values) > MAX_VALUES:
        raise YamlProblem(f"it stands for more than {MAX_VALUES:,} values, aliases (*name) written out")
    return values


def _count_values(values: Any) -> int:
    """How many values there are, up to one more than MAX_VALUES. Raises YamlProblem for a number of too many digits."""
    count, waiting = 0, [values]
    while waiting and count <= MAX_VALUES:
        value = waiting.pop()
        count += 1
        if isinstance(value, int) and value.bit_length() > 4 * MAX_DIGITS:
            raise YamlProblem(f"a number of {value.bit_length()} bits; expected at most {MAX_DIGITS} digits")
        if isinstance(value, (dict, list, tuple, set)):
            waiting += [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return count + len(waiting)
