"""Where a run keeps its files, and how the newest run and checkpoint are found.

It knows no network and no image.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graf.config import Config, ConfigError
from graf.config.schema import is_device
from graf.runtime.checkpoint import CheckpointError, ReadError, read_checkpoint, read_iteration
from graf.runtime.logs import logger, warn_once
from graf.runtime.torch_release import require_trust
from graf.sharing.weights import read_weights

BEST_CHECKPOINT = "model_best.pt"
WEIGHTS_ALONE = ".safetensors"  # averaged weights, which can be rendered but not trained on
WEIGHT_SUFFIXES = (".pt", WEIGHTS_ALONE)
_NUMBERED = re.compile(r"(?:model|backup)_(\d+)\.pt")


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved configuration, itself a valid --config."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """model_XXXXXXXX.pt, backup_XXXXXXXX.pt and model_best.pt."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Sample grids of the training run."""
        return self.path / "samples"

    @property
    def evaluation(self) -> Path:
        """What eval.py writes."""
        return self.path / "eval"

    def best_first(self) -> list[Path]:
        """The checkpoints to show something with: the best one, then from the newest to the oldest."""
        best, newest = self.checkpoints / BEST_CHECKPOINT, self.newest_first()
        if not newest and not self.config_file.is_file():
            raise ConfigError(f"{self.path}: no run is there (no config.yaml); train one with train.py --config ...")
        if not newest:
            raise CheckpointError(
                f"{self.path}: the run has no checkpoint yet; let train.py run until it saves one (training.save_every)"
            )
        return sorted(newest, key=lambda file: file != best)

    def newest_first(self) -> list[Path]:
        """The checkpoints by iteration, whether timed, backup or best, highest first: each holds the whole state.

        A folder holds one course of training (`choose_run_folder` sees to it), so the first one was also written last.
        """
        return sorted(self.saved(), key=lambda file: (_iteration(file), _last_change(file), file.name), reverse=True)

    def saved(self) -> list[Path]:
        """Every checkpoint of the run, in no order."""
        files = self.checkpoints.glob("*.pt")
        return [file for file in files if file.name == BEST_CHECKPOINT or _NUMBERED.fullmatch(file.name)]


def run_name(text: str) -> str:
    """A text as expname may be: letters, digits, and _ . - behind the first, at most 100 of them."""
    signs = unicodedata.normalize("NFKC", text)
    name = "".join(sign if sign.isalpha() or sign.isdecimal() or sign in "_.-" else "_" for sign in signs)
    name = name.lstrip(".-")
    name = f"_{name}" if is_device(name) else name
    return name[:100].rstrip(".") or "photos"


def read_first(files: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """The first of several checkpoints that can be read, and its contents; every one before it is reported.

    Raises CheckpointError where none can be read, and ReadError where the system cannot read one that may be whole:
    whoever stepped over it would go back for nothing.
    """
    failures: list[CheckpointError] = []
    for file in files:
        try:
            contents = read_weights(file) if file.suffix == WEIGHTS_ALONE else read_checkpoint(file)
        except ReadError:
            raise
        except CheckpointError as error:
            failures.append(error)
            continue
        for failure in failures:
            warn_once(str(failure))
        if failures:
            warn_once(f"{file} is used instead")
        return file, contents
    if len(failures) == 1:
        raise failures[0]
    for failure in failures:
        warn_once(str(failure))
    raise CheckpointError(
        f"{files[0].parent}: none of its checkpoints can be read ({', '.join(file.name for file in files)}); restore "
        "one of them, or train anew with --resume none"
    )


def set_aside(refused: Sequence[Path]) -> None:
    """Rename checkpoints that cannot be read, so that none of them is kept in the place of a good one."""
    for file in refused:
        renamed = file.with_name(f"{file.name}.refused")
        file.replace(renamed)
        logger.warning("%s is kept as %s", file, renamed.name)


def _iteration(file: Path) -> int:
    """The iteration of a checkpoint: in its name, its seal, else inside; -1 where it is damaged. Raises ReadError."""
    numbered = _NUMBERED.fullmatch(file.name)
    if numbered:
        return int(numbered[1])
    sealed = read_iteration(file)
    if sealed is not None:
        return sealed
    try:
        return int(read_checkpoint(file)["meta"]["iteration"])
    except ReadError:
        raise
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        warn_once(f"{error}" if isinstance(error, CheckpointError) else f"{file}: does not tell its iteration")
        return -1


def _last_change(file: Path) -> int:
    """When a file was last written, nanoseconds; 0 where it has gone, as training removes older checkpoints."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def newest_run(results: Path) -> RunFolder:
    """The run under `results` that wrote a checkpoint last."""
    runs = [RunFolder(config_file.parent) for config_file in results.glob("*/config.yaml")]
    if not runs:
        raise ConfigError(
            f"{results}: no run found; train one with train.py --config configs/default.yaml, or name one"
        )
    return max(runs, key=lambda run: max(map(_last_change, run.checkpoints.glob("*.pt")), default=0))


def find_run(path: str | None, outdir: str = "results", trust: bool = False) -> tuple[RunFolder, list[Path]]:
    """The run that a run folder or a file of weights names, and its checkpoints, those to show something with first.

    None: the run under `outdir` that saved last. trust: take a file from anywhere; raises UntrustedFile without it.
    """
    if path is None:
        run = newest_run(Path(outdir))
        return run, run.best_first()
    run = named_run(path)
    if Path(path).suffix not in WEIGHT_SUFFIXES:
        return run, run.best_first()
    require_origin(Path(path), trust)
    return run, [Path(path)]


def named_run(path: str) -> RunFolder:
    """The run that a run folder or a file of weights names, whatever is there."""
    if Path(path).suffix not in WEIGHT_SUFFIXES:
        return RunFolder(Path(path))
    folder = Path(path).resolve().parent
    return RunFolder(folder.parent if folder.name == "checkpoints" else folder)


def require_origin(file: Path, trust: bool) -> None:
    """Refuse a checkpoint from elsewhere that this torch cannot read safely, unless it is trusted.

    Checkpoints of a run lie in checkpoints/ beside a config.yaml. A missing file passes: who reads it says so. Raises
    UntrustedFile.
    """
    folder = file.absolute().parent
    of_a_run = folder.name == "checkpoints" and RunFolder(folder.parent).config_file.is_file()
    if file.is_file() and not of_a_run:
        require_trust(file, trust)


def named_checkpoint(resume: str, trust: bool = False) -> Path:
    """The checkpoint that --resume names by its path. Raises CheckpointError for what is none, UntrustedFile."""
    file = Path(resume)
    if file.suffix == WEIGHTS_ALONE:
        raise CheckpointError(
            f"--resume {resume}: holds averaged weights for rendering; training goes on from a checkpoint, a .pt file"
        )
    if not file.is_file():
        raise CheckpointError(f"--resume {resume}: no such checkpoint; expected auto, none or the path of a .pt file")
    require_origin(file, trust)
    return file


def choose_run_folder(config: Config, resume: str, trust: bool = False) -> tuple[RunFolder, list[Path]]:
    """The folder to train in and the checkpoints to continue from: the first one that can be read.

    resume: "auto" continues from the newest checkpoint of outdir/expname; "none" starts afresh; anything else is the
    path of a checkpoint. What would mix with, or overwrite, what a run in outdir/expname has made goes beside it, to
    outdir/expname-2, -3, ...: a fresh start, and a checkpoint that is not that run's newest. trust: as in `find_run`.
    """
    folder = RunFolder(config.run_folder)
    if resume == "auto":
        return folder, folder.newest_first()
    if resume == "none":
        return _free_folder(config), []
    file = named_checkpoint(resume, trust)
    newest = next(iter(folder.newest_first()), None)
    inside = file.resolve().parent == folder.checkpoints.resolve()
    if newest is None or (inside and _iteration(file) >= _iteration(newest)):
        return folder, [file]
    free = _free_folder(config)
    logger.info("%s holds a run up to %s; what follows %s goes to %s", folder.path, newest.name, file, free.path)
    return free, [file]


def _free_folder(config: Config) -> RunFolder:
    """outdir/expname or, where a run has saved something, the first of -2, -3, ... where none has."""
    folder, number = RunFolder(config.run_folder), 2
    while folder.saved():
        folder = RunFolder(config.run_folder.with_name(f"{config.expname}-{number}"))
        number += 1
    return folder


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys whose values differ between two nested mappings, as "key: old -> new"."""
    changes = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += describe_changes(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(f"{prefix}{key}: {before} -> {after}")
    return changes
