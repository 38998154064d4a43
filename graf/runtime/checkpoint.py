"""Named stateful objects in one file: written atomically, read without running pickled code, found by name.

A file is a sealed archive of {"format": 3, "meta": plain values, "objects": {name: state_dict}}, whose seal tells the
iteration. One process writes to a folder at a time.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from graf.base.errors import UserError
from graf.base.files import replace_file
from graf.runtime.amp import Scaler
from graf.runtime.logs import info_once
from graf.runtime.memory import MIB, is_out_of_memory
from graf.runtime.sealed_archive import load_sealed, read_seal, write_sealed

#: 3 has a seal, and these objects, which take an empty state for that of a new run; 2 had none; 1 had other names
FORMAT = 3
_NEW_IN_3: dict[str, Any] = {"limits": {}, "statistics": {}}

_NUMBERED = re.compile(r"model_(\d{8,})\.pt")
_PLAIN = (type(None), bool, int, float, str)


class Stateful(Protocol):
    """Anything whose state goes into a checkpoint: modules, optimisers, scalers, EMA."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


class CheckpointError(UserError):
    """A checkpoint could not be written, read or used; the message is one line that says what to do."""


class SaveError(CheckpointError):
    """The system could not write a checkpoint, for a reason that may pass."""


class ReadError(CheckpointError):
    """The system could not read a checkpoint, for a reason that may pass: the file itself may be whole."""


def save_checkpoint(path: Path | str, objects: Mapping[str, Stateful], meta: Mapping[str, Any]) -> None:
    """Write the objects' states and `meta` (plain Python values) to `path`, wholly or not at all.

    A crash, a kill or a full disk leaves the file that was there. Raises `SaveError` when writing fails, and
    `CheckpointError` before writing when a value could not be read back with `weights_only=True`.
    """
    path = Path(path)
    contents = {
        "format": FORMAT,
        "meta": dict(meta),
        "objects": {name: stateful.state_dict() for name, stateful in objects.items()},
    }
    _require_loadable(contents["meta"], "meta", with_tensors=False)
    _require_loadable(contents["objects"], "objects", with_tensors=True)
    try:
        with replace_file(path) as file:
            write_sealed(file, contents, {"format": FORMAT, "iteration": meta.get("iteration")})
    except (OSError, RuntimeError) as error:
        cause = _find_os_error(error)
        if cause is None:  # a device that failed while its tensors were read is not the disk's fault
            raise
        is_full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "Free some space" if is_full else "See to that disk"
        reason = cause.strerror or _first_line(cause)
        raise SaveError(
            f"{path}: the checkpoint could not be written ({reason}; {_count_free_mib(path)} free there); "
            f"the previous checkpoint is intact. {advice} or choose another output folder, then resume"
        ) from error


def _is_plain(value: Any) -> bool:
    """Whether a description holds nothing but what YAML or JSON could."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, _PLAIN)


def _require_loadable(value: Any, where: str, with_tensors: bool) -> None:
    kind = type(value)  # not isinstance: numpy.float64 is a float, and not loadable
    if kind in _PLAIN or (with_tensors and isinstance(value, torch.Tensor)):
        return
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            _require_loadable(key, f"a key of {where}", with_tensors)
            _require_loadable(item, f"{where}[{key!r}]", with_tensors)
    elif kind in (list, tuple):
        for index, item in enumerate(value):
            _require_loadable(item, f"{where}[{index}]", with_tensors)
    else:
        raise CheckpointError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}: a checkpoint holds plain Python values"
            f"{' and tensors' if with_tensors else ''} only; convert it with int(), float(), str() or .tolist()"
        )


def _find_os_error(error: BaseException) -> OSError | None:
    """What the operating system said: torch reports a failing disk as an internal check that failed."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _count_free_mib(path: Path) -> str:
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    return f"{shutil.disk_usage(folder).free / MIB:,.1f} MiB"


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """The contents of a checkpoint, of this format or an older one, on the CPU: `format`, `meta`, `objects`.

    Raises `ReadError` when the system cannot read the file, and `CheckpointError` when it is missing, cut short, or not
    a checkpoint of this program.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; {_suggest_other(path)}")
    try:
        contents, seal = load_sealed(path)
    except Exception as error:  # which one a foreign file raises depends on its first bytes: KeyError, EOFError, ...
        if is_out_of_memory(error):
            raise
        cause = _find_os_error(error)
        if cause is not None:
            raise ReadError(
                f"{path}: could not be read ({cause.strerror or _first_line(cause)}), and may be whole: try again when "
                "that has passed, or move it out of its folder to go on without it"
            ) from error
        raise CheckpointError(
            f"{path}: cannot be read: it is cut short or not a checkpoint of this program "
            f"({type(error).__name__}: {_first_line(error)}); {_suggest_other(path)}"
        ) from error
    if not _is_checkpoint(contents):
        raise CheckpointError(f"{path}: is not a checkpoint of this program; {_suggest_other(path)}")
    written = contents["format"]
    if contents["format"] == 1:
        try:
            contents = _from_format_1(contents)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: is not a checkpoint of this program; {_suggest_other(path)}") from error
    if contents["format"] == 2:
        contents = {"format": 3, "meta": contents["meta"], "objects": {**_NEW_IN_3, **contents["objects"]}}
    if contents["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: has format {written!r}, this version reads 1 to {FORMAT}; use the one that wrote it"
        )
    if written == FORMAT and seal is None:
        raise CheckpointError(f"{path}: has lost its seal, so its end is damaged; {_suggest_other(path)}")
    return contents


def _is_checkpoint(contents: Any) -> bool:
    """Whether this has the form of what :func:`save_checkpoint` writes; its objects are compared on loading."""
    if not isinstance(contents, dict) or not {"format", "meta", "objects"} <= contents.keys():
        return False
    is_whole = isinstance(contents["format"], int) and isinstance(contents["objects"], dict)
    return is_whole and isinstance(contents["meta"], dict) and _is_plain(contents["meta"])


def read_iteration(path: Path | str) -> int | None:
    """The iteration that a file says it was saved at, without loading it; None where it does not say."""
    try:
        seal = read_seal(path)
    except OSError:
        return None
    iteration = None if seal is None else seal.get("iteration")
    return iteration if isinstance(iteration, int) else None


def _from_format_1(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Format 1 kept averaged weights and their count of updates in one object, and used other names."""
    objects, meta, updates = dict(contents["objects"]), dict(contents["meta"]), {}
    for old, name in (("average", "generator"), ("average_ccsr", "ccsr")):
        if old in objects:
            average = objects.pop(old)
            objects[f"{name}_average"], updates[name] = average["module"], average["updates"]
    for name in objects.keys() & {"generator", "generator_average"}:
        state = objects[name].items()
        objects[name] = {key.replace("field.density.", "field.raw_density."): value for key, value in state}
    if updates:
        objects["averages"] = updates
    if "scene" in meta:
        meta["dataset"] = meta.pop("scene")
    return {"format": 2, "meta": meta, "objects": objects}


def _suggest_other(path: Path) -> str:
    others = [other for other in path.parent.glob("*.pt") if other != path]
    if not others:
        return "there is no other checkpoint in that folder: start a new run"
    return f"try {max(others, key=lambda other: (read_iteration(other) or 0, other.name))}"


def restore(
    checkpoint: Mapping[str, Any], objects: Mapping[str, Stateful], path: Path | str, partial: bool = False
) -> None:
    """Load each object's state from `checkpoint` (as read from `path`, which only messages use).

    partial: the checkpoint may hold other objects too, which are left unread; else it must hold exactly these.

    Names, keys and shapes are compared first, so a mismatch raises `CheckpointError` before anything is loaded. A
    module's (or an EMA's) tensors must exist in it already; only an optimiser fills its own later. A scaler that is
    off on either side (another precision) keeps its fresh state. Loaded states may share memory with `checkpoint`:
    restore once, then drop it, or its tensors stay in memory beside the objects'.
    """
    saved: Mapping[str, Any] = checkpoint["objects"]
    for name in objects if partial else [*objects, *saved]:
        if name not in saved or name not in objects:
            where = "this run has it, the checkpoint does not" if name in objects else "the checkpoint alone has it"
            raise _mismatch(path, f"object {name!r}: {where}")
    for name, stateful in objects.items():
        try:
            difference = _find_difference(stateful, saved[name])
        except (AttributeError, KeyError, TypeError, ValueError):
            difference = "its state is not of the form that such objects have"
        if difference is not None:
            raise _mismatch(path, f"object {name!r}: {difference}")
    for name, stateful in objects.items():
        if isinstance(stateful, Scaler) and not (stateful.is_enabled() and saved[name]):
            if stateful.is_enabled() or saved[name]:
                info_once(f"{path}: {name!r} was saved under another precision; it starts from its initial scale")
            continue
        try:
            stateful.load_state_dict(saved[name])
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise _mismatch(path, f"object {name!r}: {_first_line(error)}") from error


def _mismatch(path: Path | str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what}: a checkpoint of another config; use the config in its run folder, or start a new run"
    )


def _find_difference(stateful: Stateful, saved: Any) -> str | None:
    """The first difference of structure between an object and its saved state, in words; None when they fit."""
    current = stateful.state_dict()
    if isinstance(stateful, torch.optim.Optimizer):
        return _find_group_difference(current["param_groups"], saved.get("param_groups", ()))
    shapes, saved_shapes = dict(_list_tensor_shapes(current)), dict(_list_tensor_shapes(saved))
    for key in [*shapes, *saved_shapes]:
        if shapes.get(key) != saved_shapes.get(key):
            return f"{key!r} is {_name_shape(saved_shapes, key)} in the checkpoint and {_name_shape(shapes, key)} here"
    return None


def _find_group_difference(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> str | None:
    if len(groups) != len(saved):
        return f"'param_groups' has {len(saved)} entries in the checkpoint and {len(groups)} here"
    for index, (group, saved_group) in enumerate(zip(groups, saved, strict=True)):
        count, saved_count = len(group["params"]), len(saved_group["params"])
        if count != saved_count:
            return f"'param_groups.{index}.params' has {saved_count} entries in the checkpoint and {count} here"
        # Versions of torch add keys on one side; another kind of optimiser (alpha, betas) differs on both.
        own, foreign = group.keys() - saved_group.keys(), saved_group.keys() - group.keys()
        if own and foreign:
            return f"'param_groups.{index}.{min(foreign)}' is in the checkpoint, 'param_groups.{index}.{min(own)}' here"
    return None


def _list_tensor_shapes(value: Any, prefix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    if isinstance(value, torch.Tensor):
        yield prefix, tuple(value.shape)
    elif isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _list_tensor_shapes(item, f"{prefix}.{key}" if prefix else str(key))


def _name_shape(shapes: Mapping[str, tuple[int, ...]], key: str) -> str:
    return f"of shape {shapes[key]}" if key in shapes else "missing"


def checkpoint_name(iteration: int) -> str:
    """`model_00000500.pt`: names sort by iteration."""
    return f"model_{iteration:08d}.pt"


def list_checkpoints(folder: Path | str) -> list[Path]:
    """The numbered checkpoints in `folder`, oldest iteration first; none when there is no such folder."""
    found = ((match, path) for path in Path(folder).glob("model_*.pt") if (match := _NUMBERED.fullmatch(path.name)))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found)]


def prune_checkpoints(folder: Path | str, keep: int) -> None:
    """Remove all numbered checkpoints but the newest `keep` (at least 1); other files are never touched."""
    if keep < 1:
        raise ValueError(f"keep={keep}: at least 1 checkpoint has to stay")
    for path in list_checkpoints(folder)[:-keep]:
        path.unlink()
