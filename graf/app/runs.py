"""Where a run keeps its files, and how the newest run and checkpoint are found.

It knows no network and no image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graf.config import Config, ConfigError
from graf.runtime.checkpoint import CheckpointError, read_checkpoint
from graf.runtime.logs import logger, warn_once

BEST_CHECKPOINT = "model_best.pt"
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

    def choose_checkpoint(self) -> Path:
        """The best checkpoint, else the newest one."""
        best = self.checkpoints / BEST_CHECKPOINT
        chosen = best if best.is_file() else self.newest_checkpoint()
        if chosen is None and not self.config_file.is_file():
            raise ConfigError(f"{self.path}: no run is there (no config.yaml); train one with train.py --config ...")
        if chosen is None:
            raise CheckpointError(
                f"{self.path}: the run has no checkpoint yet; let train.py run until it saves one (training.save_every)"
            )
        return chosen

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint of the highest iteration, whether timed, backup or best: each holds the whole state.

        A folder holds one course of training (`choose_run_folder` sees to it), so that one was also written last.
        """
        return max(self.saved(), key=lambda file: (_iteration(file), file.stat().st_mtime_ns, file.name), default=None)

    def saved(self) -> list[Path]:
        """Every checkpoint of the run, in no order."""
        files = self.checkpoints.glob("*.pt")
        return [file for file in files if file.name == BEST_CHECKPOINT or _NUMBERED.fullmatch(file.name)]


def _iteration(file: Path) -> int:
    """The iteration of a checkpoint: in its name, else inside; -1 where it cannot be read."""
    numbered = _NUMBERED.fullmatch(file.name)
    if numbered:
        return int(numbered[1])
    try:
        return int(read_checkpoint(file)["meta"]["iteration"])
    except (CheckpointError, KeyError, TypeError) as error:
        warn_once(f"{error}" if isinstance(error, CheckpointError) else f"{file}: does not tell its iteration")
        return -1


def newest_run(results: Path) -> RunFolder:
    """The run under `results` that wrote a checkpoint last."""
    runs = [RunFolder(config_file.parent) for config_file in results.glob("*/config.yaml")]
    if not runs:
        raise ConfigError(
            f"{results}: no run found; train one with train.py --config configs/default.yaml, or name one with --run"
        )
    return max(runs, key=lambda run: max((file.stat().st_mtime for file in run.checkpoints.glob("*.pt")), default=0.0))


def choose_run_folder(config: Config, resume: str) -> tuple[RunFolder, Path | None]:
    """The folder to train in and the checkpoint to continue from, if any.

    resume: "auto" continues from the newest checkpoint of outdir/expname; "none" starts afresh; anything else is the
    path of a checkpoint. What would mix with, or overwrite, what a run in outdir/expname has made goes beside it, to
    outdir/expname-2, -3, ...: a fresh start, and a checkpoint that is not that run's newest.
    """
    folder = RunFolder(config.run_folder)
    if resume == "auto":
        return folder, folder.newest_checkpoint()
    if resume == "none":
        return _free_folder(config), None
    file = Path(resume)
    if not file.is_file():
        raise CheckpointError(f"--resume {resume}: no such checkpoint; expected auto, none or the path of a .pt file")
    newest = folder.newest_checkpoint()
    inside = file.resolve().parent == folder.checkpoints.resolve()
    if newest is None or (inside and _iteration(file) >= _iteration(newest)):
        return folder, file
    free = _free_folder(config)
    logger.info("%s holds a run up to %s; what follows %s goes to %s", folder.path, newest.name, file, free.path)
    return free, file


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
