"""Optional dependencies: imported where they are used, and missed in one line that says how to get them."""

from __future__ import annotations

import importlib
from typing import Any

from graf.base.errors import UserError

DISTRIBUTION = "graf-ccsr"


class MissingExtra(UserError):
    """A package that an optional capability needs is not installed."""


def import_optional(module: str, extra: str) -> Any:
    """Import `module`, which `pip install graf-ccsr[extra]` brings. Raises MissingExtra where it is not installed.

    >>> import_optional("math", "mesh").pi > 3
    True
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.partition(".")[0] != error.name.partition(".")[0]:
            raise  # the package is there and broken: not what this message is about
        package = module.partition(".")[0]
        raise MissingExtra(f'{package} is not installed; run: pip install "{DISTRIBUTION}[{extra}]"') from error
