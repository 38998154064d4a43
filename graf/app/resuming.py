"""What a run may be resumed with: the photographs of its checkpoint, and the sizes that its memory had room for."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graf.app import builders
from graf.app.builders import DatasetInfo
from graf.app.loading import read_photographs, read_words
from graf.app.runs import BEST_CHECKPOINT, RunFolder
from graf.base.files import replace_file
from graf.config import Config
from graf.data.datasets import PhotoDataset
from graf.data.errors import DataError
from graf.runtime.amp import Precision
from graf.runtime.checkpoint import CheckpointError, ReadError, read_checkpoint
from graf.runtime.logs import logger
from graf.training.trainer import Trainer

#: what decides the sizes that fit into memory; who changes one of these wants new ones
SIZE_KEYS = {
    "training": ("batch_size", "micro_batch_size", "memory_strategy", "chunk", "memory_budget"),
    "evaluation": ("batch_size",),
}

#: beginnings of the keys that decide which terms losses have, and what else is told of a step
TERM_KEYS = (
    *("training.gan_type", "training.reg_", "training.photometric", "training.instance_prior", "training.opacity"),
    *("training.layer_norms", "discriminator.class_loss", "ccsr."),
)

#: of data: which photographs are used, and what is known of them
CHOOSING_KEYS = (
    *("type", "classes", "file_pattern", "v_list", "angle_direction", "heldout_every", "max_megapixels", "strict"),
    *("radius", "fov", "synthetic"),
)


def describe_photographs(photographs: PhotoDataset, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint remembers of the photographs besides DatasetInfo.

    before: the same of the checkpoint that the run goes on from, None where there is none. exchanged: whether the run
    has trained on others too, which may be held out now; None where a checkpoint of an older version did not tell.
    """
    exchanged = False if before is None else before.get("exchanged")
    if before is not None and compare_photographs(photographs, before) is not None:
        exchanged = True
    return {"number": len(photographs), "identity": photographs.identity, "exchanged": exchanged}


def compare_photographs(photographs: PhotoDataset, known: Mapping[str, Any]) -> str | None:
    """How photographs differ from those that a checkpoint remembers, in words; None where they do not, or where an
    older version wrote it, which remembers none.
    """
    if known.get("identity", photographs.identity) == photographs.identity:
        return None
    return f"{known.get('number')} photographs then, {len(photographs)} now, with other names, sizes or labels"


def acts_on_terms(change: str) -> bool:
    """Whether a change, as describe_changes tells it, may decide which statistics a step has."""
    return change.startswith(TERM_KEYS)


def check_photographs(
    photographs: PhotoDataset, info: DatasetInfo, meta: Mapping[str, Any], config: Config, file: Path, accept: bool
) -> None:
    """Raise DataError for photographs that are not those of the checkpoint.

    Other classes and other known objects never go on: their embeddings and codes would be given to others. accept:
    photographs that were added, removed or labelled anew go on, which is said, as it is where the configuration asks
    for others: what is held out now may be what was trained on before.
    """
    saved = meta["dataset"]
    for what, before, now in (
        ("classes", saved.get("class_names", ()), info.class_names),
        ("known objects", saved.get("instance_names", ()), info.instance_names),
    ):
        is_single = len(before) == len(now) == 1  # often named after a folder, which may move: nothing to mix up
        if list(before) != list(now) and not is_single:
            raise DataError(
                f"{photographs.index.root}: the {what} are not those of {file}: {_list_changes(before, now)}; what it "
                "has learned of one would be given to another. Bring them back, or start anew with --resume none"
            )
    exchange = compare_photographs(photographs, read_photographs(meta))
    changes = [] if exchange is None else [exchange]
    for name, label in (("v_list", "heights"), ("fov", "field of view"), ("poses_known", "poses known")):
        before, now = saved.get(name), getattr(info, name)
        if _plain(before) != _plain(now):
            changes.append(f"{label} {before} then, {now} now")
    if not changes:
        return
    text = f"{photographs.index.root}: the photographs are not those of {file}: {'; '.join(changes)}"
    if not accept and not _asks_for_others(meta["config"], config.model_dump(mode="json")):
        raise DataError(f"{text}. To go on with them give --accept_new_data, to start anew --resume none")
    seen = "" if exchange is None else ". Training may have seen some of those that are held out from now on"
    logger.info("%s; they are accepted from the next checkpoint on%s", text, seen)


def keeps_sizes(config: Config, meta: Mapping[str, Any], device: torch.device, precision: Precision) -> bool:
    """Whether nothing that decides the sizes of a step has changed since the checkpoint, nor kind of device, nor
    precision.
    """
    if describe_precision(meta, precision):
        return False
    described = read_words(meta, "machine").get("device", device.type)  # "cuda:0 (...)"
    if described.partition(" ")[0].partition(":")[0] != device.type:
        return False
    before, now = meta["config"], config.model_dump(mode="json")
    return all(
        before.get(section, {}).get(key) == now[section][key] for section, keys in SIZE_KEYS.items() for key in keys
    )


def describe_precision(meta: Mapping[str, Any], precision: Precision) -> list[str]:
    """Another precision than the checkpoint's, as another device may choose it: one line; none where it is the same."""
    now = precision.describe()
    before = read_words(meta, "machine").get("precision", now)
    return [] if before == now else [f"computed in: {before} -> {now}"]


def forget_sizes(config: Config, trainer: Trainer) -> None:
    """Take the configured sizes again, not those that the checkpoint has brought."""
    trainer.use(builders.build_memory_settings(config, trainer.device.type))
    trainer.progress.scoring_batch = 0


def _asks_for_others(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the configuration has come to choose or label photographs otherwise; keys of later versions aside."""
    old, new = before.get("data", {}), now["data"]
    return any(old[key] != new[key] for key in CHOOSING_KEYS if key in old)


def bring_best(file: Path, folder: RunFolder, trainer: Trainer) -> None:
    """Into another folder the best checkpoint goes with its score; where it is missing the best score starts over.

    Raises ReadError.
    """
    target, source = folder.checkpoints / BEST_CHECKPOINT, file.with_name(BEST_CHECKPOINT)
    best = trainer.progress.best
    if not best or target.is_file():
        return
    try:
        if read_checkpoint(source)["meta"].get("iteration") == best.get("iteration"):
            with open(source, "rb") as original, replace_file(target) as copy:
                shutil.copyfileobj(original, copy)
            return
        reason = f"{source} is of another iteration"
    except ReadError:
        raise
    except CheckpointError as error:
        reason = str(error)
    trainer.progress.best = {}
    logger.info("the best score so far starts over, for its checkpoint is not there: %s", reason)


def _plain(value: Any) -> Any:
    return [round(number, 9) for number in value] if isinstance(value, (list, tuple)) else value


def _list_changes(before: Sequence[str], now: Sequence[str]) -> str:
    gone, new = [name for name in before if name not in now], [name for name in now if name not in before]
    parts = [f"{', '.join(names)} {verb}" for names, verb in ((gone, "is missing"), (new, "is new")) if names]
    return " and ".join(parts) or f"{', '.join(before)} then, {', '.join(now)} now"
