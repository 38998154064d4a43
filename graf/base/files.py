"""Files that are replaced as a whole: a kill, a crash or a full disk leaves what was there before."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from graf.base.errors import UserError


@contextmanager
def replace_file(
    path: Path | str, mode: str = "wb", temporary_name: str | None = None, **options: Any
) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; when the block ends it is synced and takes the place of `path`.

    Folders on the way are made. Where the block fails or is interrupted nothing of it is left and `path` is untouched.
    mode and options: as for :func:`open`. temporary_name: by default one that no other process has; what a killed
    process leaves of it, `remove_leftovers` finds. Raises OSError, which names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name or f".{path.name}.{secrets.token_hex(4)}.saving")
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # an interrupt too must not leave half a file behind
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary, str(temporary)):
            error.filename = str(path)  # a full disk names no file, and nobody knows the temporary one
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path | str, content: str | bytes) -> None:
    """Replace a file by `content`, text in UTF-8. Raises OSError."""
    with replace_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def check_writable(folder: Path) -> None:
    """Make a folder and try it, before anything is computed that is to be written there. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error


@contextmanager
def create_folder(path: Path | str) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its name when the block ends, so that it appears when it is whole.

    Folders on the way are made; an empty one at `path` is taken over. Where the block fails or is interrupted nothing
    is left. Raises UserError where something is at `path` already, and OSError.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists already; remove it, or choose another folder with --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".saving", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_read_umask())  # mkdtemp's is for its maker alone
        os.replace(temporary, path)
    except BaseException:  # an interrupt too
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def _read_umask() -> int:
    """Which permissions new files do not get; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what killed processes left of `replace_file` in a folder, when no other process writes there."""
    found = [path for path in folder.glob(".*.saving") if not path.is_dir()]
    for file in found:
        file.unlink(missing_ok=True)
    return found


def sync_folder(folder: Path) -> None:
    """Make a rename durable; without it a power cut may bring the previous file back; a refusal is reported once."""
    if os.name == "nt":  # folders cannot be opened there
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        _warn_of_unsynced(folder, str(error))


@cache
def _warn_of_unsynced(folder: Path, reason: str) -> None:
    message = "%s: this file system does not sync folders (%s): a power cut may undo the last save"
    logging.getLogger("graf.base").warning(message, folder, reason)
