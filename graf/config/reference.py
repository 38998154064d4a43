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
from pydantic_core import PydanticUndefined

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

Any key can be given on the command line too: `graf train --config default training.batch_size=2`. A wrong key is answered
with the nearest right one, a value out of range with the range, before anything is read. `graf train` writes the resolved
configuration to `config.yaml` in the run's folder. The shipped files, in `configs/`, are examples that work.

This page is made by `python -m graf.config.reference > docs/configuration.md` out of `graf/config/schema.py`.
"""


def write_reference() -> str:
    """The whole page."""
    return "\n".join([_TITLE, *_describe_section(Config, "")]).rstrip() + "\n"


def _describe_section(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """A heading, what the section is about, and a table of its own keys; then the sections inside it."""
    inner = {name: kind for name, info in section.model_fields.items() if (kind := _section_of(info)) is not None}
    yield f"## {prefix.rstrip('.') or 'Top level'}\n"
    yield f"{' '.join((section.__doc__ or '').split())}\n"
    rows = [_describe_key(prefix + name, info) for name, info in section.model_fields.items() if name not in inner]
    if rows:
        yield "| key | type | default | meaning |\n| --- | --- | --- | --- |"
        yield "\n".join(rows) + "\n"
    for name, kind in inner.items():
        yield from _describe_section(kind, f"{prefix}{name}.")


def _section_of(info: FieldInfo) -> type[BaseModel] | None:
    """The section that a field is, or holds where it is not null."""
    kinds = [kind for kind in (info.annotation, *get_args(info.annotation)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, Section)), None)


def _describe_key(key: str, info: FieldInfo) -> str:
    default = "required" if info.default is PydanticUndefined else f"`{_spell(info.default)}`"
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
        kinds = [kind for kind in arguments if kind is not type(None)]
        words = [_describe_type(kind, constraints if kind in (int, float) else []) for kind in kinds]
        others = constraints if not any(kind in (int, float) for kind in kinds) and len(kinds) == 1 else []
        if others:
            words = [_describe_type(kinds[0], others)]
        return " or ".join([*words, *(["null"] if type(None) in arguments else [])])
    if origin is tuple:
        return _describe_tuple(arguments, constraints)
    if origin is dict:
        return f"mapping of {_describe_type(arguments[1], [])}"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation))) + _describe_range(constraints)


def _describe_tuple(arguments: tuple[Any, ...], constraints: list[Any]) -> str:
    lengths = [(getattr(item, "min_length", None), getattr(item, "max_length", None)) for item in constraints]
    shortest = next((low for low, _ in lengths if low is not None), None)
    longest = next((high for _, high in lengths if high is not None), None)
    if arguments[-1] is not Ellipsis:
        return f"list of {len(arguments)}: " + ", ".join(_describe_type(kind, []) for kind in arguments)
    count = f"{shortest} " if shortest is not None and shortest == longest else ""
    return f"list of {count}{_describe_type(arguments[0], [])}s".replace("`s", "`")


def _describe_range(constraints: list[Any]) -> str:
    """ ", at least 1, below 5" and the like."""
    words = []
    for item in _flatten(constraints):
        for name, text in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
            if getattr(item, name, None) is not None:
                words.append(f"{text} {getattr(item, name):g}")
        if getattr(item, "max_length", None) is not None:
            words.append(f"at most {item.max_length} characters")
        if getattr(item, "pattern", None) is not None:
            words.append(f"matching `{item.pattern}`")
    return "".join(f", {word}" for word in words)


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
