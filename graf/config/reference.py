"""The reference of every key, as Markdown: `python -m graf.config.reference > docs/configuration.md`.

Everything in it is read off the schema: types, ranges, defaults and descriptions. A test fails where the file is stale.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from graf.config.schema import Config, Section

_TITLE = """# Configuration

Every key, with its type, range and default. A configuration file has the keys under the names of their sections:

```yaml
inherit_from: default.yaml   # another file, or one that is shipped: this file changes it
expname: mine
data:
  type: turntable
  datadir: photos
```

Any key can be given on the command line too: `graf train --config default training.batch_size=2`. A wrong key is
answered with the nearest right one, a value out of range with the range, before anything is read. Values are YAML, with
the numbers of YAML 1.2 (010 is 10); where a key is text, what is typed is taken (`expname: 2024`), but for `null`.
`graf train` writes the resolved configuration to `config.yaml` in the run's folder. The shipped files, in `configs/`,
are working examples.

This page is made by `python -m graf.config.reference > docs/configuration.md` out of `graf/config/schema.py`.
"""


def write_reference() -> str:
    """The whole page."""
    return "\n".join([_TITLE, *_describe_section(Config, "")]).rstrip() + "\n"


def _describe_section(section: type[BaseModel], prefix: str, note: str = "") -> Iterator[str]:
    """A heading, what the section is about, a note, and a table of its own keys; then the sections inside it."""
    inner = {name: kind for name, info in section.model_fields.items() if (kind := _section_of(info)) is not None}
    yield f"## {prefix.rstrip('.') or 'Top level'}\n"
    yield f"{' '.join((section.__doc__ or '').split())}\n"
    if note:
        yield f"{note}\n"
    rows = [_describe_key(prefix + name, info) for name, info in section.model_fields.items() if name not in inner]
    if rows:
        yield "| key | type | default | meaning |\n| --- | --- | --- | --- |"
        yield "\n".join(rows) + "\n"
    for name, kind in inner.items():
        info = section.model_fields[name]
        is_mapping = get_origin(info.annotation) is dict
        note = f"A mapping, {info.description}." if is_mapping else ""
        note = f"Null, or: {info.description}." if info.default is None else note
        place = f"{prefix}{name}.<name>." if is_mapping else f"{prefix}{name}."
        yield from _describe_section(kind, place, note)


def _section_of(info: FieldInfo) -> type[BaseModel] | None:
    """The section that a field is, or holds where it is not null."""
    kinds = [kind for kind in (info.annotation, *get_args(info.annotation)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, Section)), None)


def _describe_key(key: str, info: FieldInfo) -> str:
    default = "required" if info.is_required() else f"`{_spell(info.default)}`"
    kind = _describe_type(info.annotation, info.metadata)
    cells = [f"`{key}`", kind, default, info.description or ""]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _describe_type(annotation: Any, constraints: list[Any]) -> str:
    """A type in words, with its range."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe_type(arguments[0], [*_flatten(arguments[1:]), *constraints])
    if origin is Literal:
        return " or ".join(f"`{_spell(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if kind is type(None) else _describe_type(kind, constraints) for kind in arguments)
    if origin is tuple:
        return _describe_tuple(arguments, constraints)
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation))) + _describe_range(constraints)


def _describe_tuple(arguments: tuple[Any, ...], constraints: list[Any]) -> str:
    if arguments[-1] is not Ellipsis:
        return f"list of {len(arguments)}: " + ", ".join(_describe_type(kind, []) for kind in arguments)
    lengths = [getattr(item, name, None) for item in constraints for name in ("min_length", "max_length")]
    known = [length for length in lengths if length is not None]
    exact = f"{known[0]} times " if len(known) == 2 and known[0] == known[1] else ""
    shortest = "at least one " if known == [1] else ""
    return f"list of {exact}{shortest}{_describe_type(arguments[0], [])}"


def _describe_range(constraints: list[Any]) -> str:
    """What a value may be, in brackets: " (at least 1, below 5)"."""
    names = (("ge", "at least {}"), ("gt", "above {}"), ("le", "at most {}"), ("lt", "below {}"))
    texts = (("max_length", "at most {} characters"), ("pattern", "matching `{}`"))
    words = [
        text.format(f"{value:g}" if isinstance(value, float) else value)
        for item in _flatten(constraints)
        for name, text in (*names, *texts)
        if (value := getattr(item, name, None)) is not None
    ]
    return f" ({', '.join(words)})" if words else ""


def _flatten(constraints: Any) -> Iterator[Any]:
    """Constraints, those of a FieldInfo among them taken out of it."""
    for item in constraints:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item


def _spell(value: Any) -> str:
    """A value as YAML has it on one line."""
    if isinstance(value, str):
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value)


if __name__ == "__main__":
    print(write_reference(), end="")
