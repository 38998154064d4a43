"""Archives of torch.save with a seal: a SHA-256 of their bytes inside, checked before any loader sees them.

A zip archive may end in a comment that readers of its entries pass over. The seal stands there as JSON: the hash of
everything else, and facts that can be read without loading it. It finds what disks and copies do to a file;
against strangers the loader itself is the guard, which takes tensors and plain values and runs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

#: the record that ends a zip archive: its signature and, in its last two bytes, the length of the comment that follows
_END, _END_SIZE = b"PK\x05\x06", 22
_LONGEST_COMMENT = 2**16 - 1
_PIECE = 2**20
_HASH = "sha256"


class BrokenSeal(ValueError):
    """A file is not what was written, or is no archive of tensors; the message says what is wrong with it."""


class _HashingWriter:
    """What torch.save takes for a file: passes bytes on, and hashes them on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_sealed(file: IO[bytes], contents: Any, facts: Mapping[str, str | int | float | None]) -> None:
    """torch.save of `contents` into an empty file that is open for writing, followed by its seal with `facts`."""
    writer = _HashingWriter(file)
    torch.save(contents, writer)  # type: ignore[arg-type]
    writer.hash.update(_encode(facts))
    seal = _encode({**facts, _HASH: writer.hash.hexdigest()})
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", len(seal)) + seal)


def read_seal(path: Path | str) -> dict[str, Any] | None:
    """The seal of a file, unchecked and without reading the rest; None where there is none. Raises OSError."""
    with open(path, "rb") as file:
        return _find_seal(file)[1]


def load_sealed(path: Path | str) -> tuple[Any, dict[str, Any] | None]:
    """The contents of an archive, on the CPU, and its seal; None for archives that were written without one.

    Raises `BrokenSeal` for a file that does not match its seal or is no archive of torch.save: pickles, tar files,
    TorchScript and packed entries are refused unread. Raises what zipfile, torch.load and reading raise besides.
    """
    with open(path, "rb") as file:
        sealed_size, seal = _find_seal(file)
        if seal is not None and _hash(file, sealed_size, seal) != seal.get(_HASH):
            raise BrokenSeal("its bytes are not those that were written: the disk or a copy has damaged it")
        _require_tensors(file)
        file.seek(0)
        return load_plainly(file), seal


def load_plainly(file: IO[bytes] | Path | str) -> Any:
    """torch.load of tensors and plain values alone, on the CPU, without its warnings. Raises whatever it raises.

    torch explains what it does not take in warnings before it raises, and 2.1 warns of storages that it makes itself.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True)


def _find_seal(file: IO[bytes]) -> tuple[int, dict[str, Any] | None]:
    """How many bytes come before the length of the seal, and the seal; (0, None) where there is none."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - _END_SIZE - _LONGEST_COMMENT)
    file.seek(start)
    tail = file.read()
    end = tail.rfind(_END)
    comment = tail[end + _END_SIZE :]
    if end < 0 or len(tail) < end + _END_SIZE or len(comment) != struct.unpack_from("<H", tail, end + 20)[0]:
        return 0, None
    try:
        seal = json.loads(comment.decode("ascii"))
    except (ValueError, RecursionError):
        return 0, None
    return (start + end + 20, seal) if isinstance(seal, dict) else (0, None)


def _encode(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True).encode("ascii")


def _hash(file: IO[bytes], size: int, seal: Mapping[str, Any]) -> str:
    """The hash of the archive as it was before it was sealed, `size` bytes and an empty comment, and of the facts."""
    file.seek(0)
    found = hashlib.sha256()
    while size > 0 and (piece := file.read(min(size, _PIECE))):
        found.update(piece)
        size -= len(piece)
    found.update(b"\0\0" + _encode({name: value for name, value in seal.items() if name != _HASH}))
    return found.hexdigest()


def _require_tensors(file: IO[bytes]) -> None:
    """Raise BrokenSeal unless this is a zip archive of torch.save, judged by the names of its entries."""
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        raise BrokenSeal("it is no zip archive")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise BrokenSeal(f"it is cut short or damaged: {error}") from error
    names = [entry.filename.partition("/")[2] for entry in entries]
    if "data.pkl" not in names:
        raise BrokenSeal("it is a zip archive, but not of torch.save")
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise BrokenSeal("it is a TorchScript program, not an archive of tensors")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise BrokenSeal("it holds packed entries, which torch.save does not write")
