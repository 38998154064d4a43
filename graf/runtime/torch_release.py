"""Which release of torch this is, whether it fits NumPy and may read files of strangers; what else it lacks is asked
where it is used.

`weights_only=True` is what keeps a pickle from running code. Two holes in it were closed by new releases of torch:
below 2.6 a file can run code (CVE-2025-32434), below 2.10 it can corrupt memory (CVE-2026-24747).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from graf.base.errors import UserError
from graf.runtime.logs import warn_once

#: the release that closed a hole -> its name, and what a file can do before; the worst first
_CLOSED = {
    (2, 6): ("CVE-2025-32434", "run code"),
    (2, 10): ("CVE-2026-24747", "corrupt memory"),
}
#: holds no pickles, so that any release may read it
SAFE_SUFFIX = ".safetensors"


class UntrustedFile(UserError):
    """A file of unknown origin, which this release of torch cannot read safely."""


def torch_release() -> tuple[int, int]:
    """The first two numbers of torch's version: (2, 10) for "2.10.0a0+git1234" and "2.10.1+cpu"."""
    major, minor = str(torch.__version__).split("+")[0].split(".")[:2]
    return int(major), int(minor)


def require_fitting_numpy() -> None:
    """Raise UserError where NumPy is newer than torch knows, so that no tensor could become an array."""
    if torch_release() < (2, 3) and int(np.__version__.split(".")[0]) >= 2:
        raise UserError(
            f"torch {torch.__version__} does not work with NumPy {np.__version__}: torch before 2.3 was built for "
            'NumPy 1; run: pip install "numpy<2", or update torch'
        )


def find_hole() -> str | None:
    """What a file can do to this release of torch though it is loaded with weights_only=True; None: nothing known."""
    open_holes = [hole for closed_in, hole in _CLOSED.items() if torch_release() < closed_in]
    if not open_holes:
        return None
    name, harm = open_holes[0]
    return f"with torch {torch.__version__} such a file can {harm} when it is loaded ({name})"


def require_trust(path: Path | str, trust: bool, option: str = "--trust") -> None:
    """Refuse a pickled file that a person names, unless torch is new enough or they trust it, which is logged once.

    For files of unknown origin; those that the program has written and finds by itself need no trust. option: what the
    message says to do to trust it. Raises UntrustedFile.
    """
    hole = None if Path(path).suffix == SAFE_SUFFIX else find_hole()
    if hole is None:
        return
    if trust:
        warn_once(f"{path}: trusted as you said, though {hole}")
        return
    newest = max(_CLOSED)
    raise UntrustedFile(
        f"{path}: is not from a run folder, and {hole}; update torch to {newest[0]}.{newest[1]} or newer, have it "
        f"exported to {SAFE_SUFFIX}, which is safe with every torch, or pass {option} if you know who made it"
    )


def is_exporting() -> bool:
    """Whether torch.export is tracing, so that others run the result, with operators that they know."""
    return bool(getattr(torch.compiler, "is_exporting", lambda: False)())  # since torch 2.7, as exports are
