"""The YAML of configurations: plain values only, every key once, small enough for a person to have written it."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable
from typing import Any

import yaml

_LIST, _TEXT = "tag:yaml.org,2002:seq", "tag:yaml.org,2002:str"
_BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float"))
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_NUMBERS = {  # of YAML 1.2's core schema
    _INT: re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    _FLOAT: re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}
#: values of a file, each time that an alias repeats them counted: a few lines of aliases can stand for billions
MAX_VALUES = 10_000
#: characters of a text, and of a number in it
MAX_CHARACTERS, MAX_DIGITS = 500_000, 400


class YamlProblem(ValueError):
    """A text is not YAML, or not of this dialect; the message is one line and says where."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers, since PyYAML takes `5e-4` for a string, 010 for 8 and 3:30 for 210; no dates; every key once.

    text_keys: names of keys whose values are taken as they are typed where they look like numbers or truth values.
    """

    text_keys: Collection[str] = ()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            line, key = key_node.start_mark.line + 1, getattr(key_node, "value", None)
            if isinstance(key, str):
                if key == "<<":  # of which a few, nested, stand for billions of keys
                    raise YamlProblem(f"line {line}: merge keys (<<) are not taken: write the keys out")
                if key in lines:
                    raise YamlProblem(f"{key} is given twice, in lines {lines[key]} and {line}: remove one")
                lines[key] = line
                if key in self.text_keys:
                    keep_text(value_node)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = node.value
        if isinstance(text, str) and len(text) > MAX_DIGITS and re.fullmatch(r"[-+\d_.:]+", text):
            line = node.start_mark.line + 1
            raise YamlProblem(f"line {line}: a number of {len(text)} digits; expected at most {MAX_DIGITS}")
        return super().construct_scalar(node)


def keep_text(node: yaml.Node) -> None:
    """Make text, as it is typed, of a number or a truth value, or of those in a list."""
    for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if item.tag in (_BOOL, _INT, _FLOAT):
            item.tag = _TEXT


class YamlDumper(yaml.SafeDumper):
    """Puts quotes around strings that :func:`load_yaml`, or another reader of YAML, takes for numbers; each list on one
    line.
    """


YamlDumper.add_representer(list, lambda dumper, values: dumper.represent_sequence(_LIST, values, flow_style=True))

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _TIMESTAMP)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind in (_Loader, YamlDumper):
    for _tag, _pattern in _NUMBERS.items():
        _kind.add_implicit_resolver(_tag, _pattern, list("-+0123456789."))
_Loader.add_constructor(_INT, lambda loader, node: int(node.value, 0 if node.value[:2] in ("0x", "0o") else 10))


def load_yaml(text: str, text_keys: Collection[str] = (), key: str = "") -> Any:
    """The plain values of a YAML text, which may be the value of a `key`. Raises YamlProblem.

    text_keys: names of keys whose values are text, also where they are not in quotes and look like numbers.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlProblem(f"it has {len(text):,} characters; expected at most {MAX_CHARACTERS:,}")
    try:
        loader = _Loader(text)
        loader.text_keys = text_keys
        node = loader.get_single_node()
        if node is not None and key in text_keys:
            keep_text(node)
        values = None if node is None else loader.construct_document(node)
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
