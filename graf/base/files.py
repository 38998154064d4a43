"""Files that are replaced as a whole: a kill, a crash or a full disk leaves what was there before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replace_file(path: Path | str, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; when the block ends it is synced and takes the place of `path`.

    Folders on the way are made. Where the block fails or is interrupted nothing of it is left and `path` is untouched.
    mode and options: as for :func:`open`. Raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.saving")  # one name per file: a killed process leaves at most one
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # an interrupt too must not leave half a file behind
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path | str, content: str | bytes) -> None:
    """Replace a file by `content`, text in UTF-8. Raises OSError."""
    with replace_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Make a rename durable; where a file system cannot, a power cut may bring the previous file back, whole."""
    if os.name == "nt":  # folders cannot be opened there
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # readable files in an unreadable folder
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems do not sync folders
        return
    finally:
        os.close(descriptor)
