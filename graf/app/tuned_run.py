"""Runs that inversion makes: a generator tuned to one photograph in a folder of its own, which every command opens.

Such a run holds averaged weights alone: no discriminator, no optimisers, so it can be rendered and not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graf.app.loading import TUNED_KEY, TrainedGenerator, read_meta
from graf.app.runs import BEST_CHECKPOINT, RunFolder, read_first
from graf.base.errors import UserError
from graf.base.files import write_atomically
from graf.config import build_config
from graf.evaluation.renderer import Renderer
from graf.runtime.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from graf.runtime.run_lock import RunLock


def save_tuned_run(source: TrainedGenerator, tuned: Renderer, folder: Path, photograph: str) -> RunFolder:
    """Write config.yaml and model_best.pt of `tuned`, which comes from `source` and shows `photograph`, to `folder`.

    A run of the same kind that is there is replaced. Raises UserError where the folder holds any other run.
    """
    run = RunFolder(folder)
    file, checkpoint = read_first([source.file])
    meta = read_meta(checkpoint, file)
    config = build_config(meta["config"])
    training = config.training.model_copy(update={"outdir": str(folder.parent)})
    config = config.model_copy(update={"expname": folder.name, "training": training})
    objects: dict[str, Any] = {"generator_average": tuned.generator}
    if tuned.ccsr is not None:
        objects["ccsr_average"] = tuned.ccsr
    with RunLock(folder):
        refuse_other_runs(run)
        save_checkpoint(
            run.checkpoints / BEST_CHECKPOINT,
            objects,
            {
                **meta,
                "config": config.model_dump(mode="json"),
                TUNED_KEY: {"photograph": photograph, "from": str(file)},
            },
        )
        write_atomically(run.config_file, config.to_yaml())
    return run


def refuse_other_runs(run: RunFolder) -> None:
    """Raise UserError where a folder holds a run that training has made: a tuned one must not take its place."""
    for present in run.saved():
        if present.name != BEST_CHECKPOINT or not is_tuned(read_checkpoint(present)["meta"]):
            raise UserError(f"{run.path}: holds a run of training ({present.name}); choose another --out")


def is_tuned(meta: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's description is that of a generator tuned to one photograph."""
    return TUNED_KEY in meta


def refuse_tuned(meta: Mapping[str, Any], file: Path) -> None:
    """Raise CheckpointError where training is to go on from such a checkpoint."""
    if is_tuned(meta):
        raise CheckpointError(
            f"{file}: is a generator tuned to one photograph: it has no discriminator and no optimisers to train on "
            f"with; go on with the run that it comes from ({meta[TUNED_KEY].get('from')}), or start anew with --resume "
            "none"
        )
