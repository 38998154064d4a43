"""Where the scalars and pictures of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

Each is imported when a run asks for it, and is a copy: one that is missing, cannot start or fails later is said once,
and the run goes on without it.
"""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from graf.base.extras import MissingExtra, import_optional
from graf.base.files import write_atomically

#: the project under which W&B and Trackio list runs
PROJECT = "graf"
#: keys of a row of metrics.jsonl that are no scalars
RESERVED = {"iteration", "time", "kind"}


def read_row(line: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl, with its iteration and kind; None where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("iteration"), int):
        return None
    return {**row, "kind": str(row.get("kind", ""))}


class Tracker(Protocol):
    """One place that records a run."""

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Record named numbers."""

    def image(self, iteration: int, tag: str, pixels: np.ndarray) -> None:
        """Record a picture, uint8 (H, W, 3)."""

    def flush(self) -> None:
        """Hand what was recorded to the system."""

    def close(self) -> None:
        """Finish."""


class TensorBoard:
    """Event files in the run's folder, `tensorboard/`.

    start: events past this iteration are hidden, for they are written again. rows: a metrics.jsonl of which those at
    `start` are written again, and its events hidden too; None: they stay. pictures: files of those at `start` by tag,
    which are written again with the rows.
    """

    title = "TensorBoard"

    def __init__(self, folder: Path, start: int, rows: Path | None, pictures: Mapping[str, Path]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside TensorBoard's and protobuf's own modules
            from torch.utils.tensorboard import SummaryWriter
        again = rows is not None and start > 0
        first_hidden = start if again else start + 1
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_hidden)
        if rows is not None and again and rows.exists():
            for line in rows.read_text(encoding="utf-8").splitlines():
                self._write_again(line, start)
            for tag, file in pictures.items():
                with suppress(OSError):  # removed or broken since
                    self.image(start, tag, np.asarray(Image.open(file).convert("RGB")))

    def _write_again(self, line: str, iteration: int) -> None:
        row = read_row(line)
        if row is not None and row["iteration"] == iteration:
            for name in row.keys() - RESERVED:
                with suppress(TypeError, ValueError):  # no number: not written by this program
                    self._writer.add_scalar(name, float(row[name]), iteration)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def image(self, iteration: int, tag: str, pixels: np.ndarray) -> None:
        self._writer.add_image(tag, pixels, iteration, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run, which a resumed run continues; WANDB_MODE=offline keeps it in the run's folder.

    Without network it gives up after W&B's own time (90 s and a little), and the run begins without it. Where the
    network goes later, W&B tries again for as long as the run lasts, and `close` until Ctrl-C: all is saved by then.
    """

    title = "W&B"

    def __init__(self, folder: Path) -> None:
        self._wandb = import_optional("wandb", "track")
        self._run = self._wandb.init(
            project=PROJECT, name=folder.name, dir=str(folder), id=_own_id(folder / "wandb_id.txt"), resume="allow"
        )

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=iteration)

    def image(self, iteration: int, tag: str, pixels: np.ndarray) -> None:
        self._run.log({tag: self._wandb.Image(pixels)}, step=iteration)

    def flush(self) -> None:
        """W&B's own process writes all the time."""

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of Trackio, in its folder on this machine (TRACKIO_DIR), which a resumed run continues.

    Runs are found by their names, so that of the folder gets an ending that no other run has.
    """

    title = "Trackio"

    def __init__(self, folder: Path) -> None:
        self._trackio = import_optional("trackio", "track")
        name = f"{folder.name}-{_own_id(folder / 'trackio_id.txt')}"
        self._run = self._trackio.init(project=PROJECT, name=name, resume="allow", embed=False)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=iteration)

    def image(self, iteration: int, tag: str, pixels: np.ndarray) -> None:
        self._run.log({tag: self._trackio.Image(pixels)}, step=iteration)

    def flush(self) -> None:
        """Trackio's own thread writes all the time."""

    def close(self) -> None:
        self._trackio.finish()  # not the run's own, after which Trackio would finish it once more at the program's end


#: values of training.monitoring -> what each is called, and how it is opened: (folder, start, rows, pictures) -> it
TRACKERS: dict[str, tuple[str, Callable[[Path, int, Path | None, Mapping[str, Path]], Tracker]]] = {
    "tensorboard": (TensorBoard.title, TensorBoard),
    "wandb": (WeightsAndBiases.title, lambda folder, *_: WeightsAndBiases(folder)),
    "trackio": (Trackio.title, lambda folder, *_: Trackio(folder)),
}


class Trackers:
    """All trackers of a run, as one; what any of them raises is told to `warn` once, and ends that one alone."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        start: int,
        rows: Path | None,
        pictures: Mapping[str, Path],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            title, opener = TRACKERS[name]
            try:
                self._open[title] = opener(folder, start, rows, pictures)
            except MissingExtra as error:
                warn(f"monitoring: {error}, or leave {name} out; the run goes on without it")
            except ImportError as error:  # TensorBoard's, which is no extra
                warn(f"monitoring: {title} is not installed ({error}); run: pip install {name}, or leave it out")
            except Exception as error:  # their own error types vary over versions: no login, no network, no disk
                warn(f"monitoring: {title} could not start ({_reason(error)}); the run goes on without it")

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._tell(lambda tracker: tracker.scalars(iteration, values))

    def image(self, iteration: int, tag: str, pixels: np.ndarray) -> None:
        self._tell(lambda tracker: tracker.image(iteration, tag, pixels))

    def flush(self) -> None:
        self._tell(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Finish all; calling it again, though it was interrupted, changes nothing."""
        try:
            self._tell(lambda tracker: tracker.close())
        finally:
            self._open.clear()

    def _tell(self, act: Callable[[Tracker], None]) -> None:
        for title, tracker in list(self._open.items()):
            try:
                act(tracker)
            except Exception as error:  # as above
                del self._open[title]
                self._warn(
                    f"monitoring: {title} cannot write ({_reason(error)}); the run goes on without it, metrics.jsonl "
                    "has everything"
                )


def _reason(error: Exception) -> str:
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or " ".join(str(error).split())[:200] or type(error).__name__


def _own_id(file: Path) -> str:
    """A name for this run alone, kept in its folder."""
    if not file.exists():
        write_atomically(file, secrets.token_hex(8))
    return file.read_text(encoding="ascii")
