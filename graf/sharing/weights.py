"""Averaged weights as a safetensors file: tensors, and a description of their run in the header; no pickled code.

The header's metadata are strings: `format` "pt", as other programs expect it of torch's tensors; `graf_format`, the
version of this layout; `graf`, the description as JSON (configuration, data set, iteration); and `sha256` of all of it.
Tensors are named "object.key", after the objects and keys of a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graf.base.extras import import_optional
from graf.base.files import write_atomically
from graf.runtime.checkpoint import CheckpointError
from graf.runtime.memory import is_out_of_memory

FORMAT = 1
_FORMAT_KEY, _MEANING_KEY, _HASH_KEY = "graf_format", "graf", "sha256"


def write_weights(path: Path | str, objects: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
    """Write state dicts by name, and `meta` (plain values, as in a checkpoint), wholly or not at all.

    The file is made in memory, so it takes the weights' size once more. Raises OSError, and MissingExtra where
    safetensors is not installed.
    """
    safetensors = import_optional("safetensors.torch", "share")
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, state in objects.items()
        for key, tensor in state.items()
    }
    header = {"format": "pt", _FORMAT_KEY: str(FORMAT), _MEANING_KEY: json.dumps(meta, allow_nan=False)}
    header[_HASH_KEY] = _hash(tensors, header)
    write_atomically(path, safetensors.save(tensors, header))


def read_weights(path: Path | str) -> dict[str, Any]:
    """The contents of such a file in the form of a checkpoint's: `format`, `meta` and `objects`, on the CPU.

    Raises CheckpointError for a file that is missing, cut short, changed, or not written by :func:`write_weights`, and
    MissingExtra where safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file of weights; graf export --to safetensors writes one")
    safetensors, loader = import_optional("safetensors", "share"), import_optional("safetensors.torch", "share")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        tensors = loader.load_file(path, device="cpu")
    except Exception as error:  # SafetensorError, and what a foreign header provokes in the loader: KeyError, ...
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: cannot be read: it is cut short or no safetensors file ({reason})") from error
    if not {_FORMAT_KEY, _MEANING_KEY, _HASH_KEY} <= header.keys():
        raise CheckpointError(
            f"{path}: holds tensors but no description of a run; expected what graf export --to safetensors wrote"
        )
    if header[_FORMAT_KEY] != str(FORMAT):
        found = header[_FORMAT_KEY][:20]
        raise CheckpointError(f"{path}: has format {found!r}, this version reads {FORMAT}; use the one that wrote it")
    sealed = header.pop(_HASH_KEY)
    if _hash(tensors, header) != sealed:
        raise CheckpointError(f"{path}: is not what was written: it was changed or damaged; copy or export it again")
    try:
        meta = json.loads(header[_MEANING_KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its description of the run is not JSON; export it again") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path}: its description of the run is a {type(meta).__name__}; export it again")
    objects: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.partition(".")
        objects.setdefault(owner, {})[key] = tensor
    return {"format": FORMAT, "meta": meta, "objects": objects}


def _hash(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 of the header's strings and of every tensor's name, type, shape and bytes, in the order of the names."""
    found = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
