"""What a run reports: console lines, a progress bar, metrics.jsonl, and trackers (graf.runtime.trackers).

The logger is "graf"; rooms that may not import this one use its children (`logging.getLogger("graf.base")`).
"""

from __future__ import annotations

import io
import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from graf.base.files import write_atomically
from graf.runtime.trackers import RESERVED, TRACKERS, Trackers, read_row

logger = logging.getLogger("graf")

METRICS_FILE = "metrics.jsonl"
#: what `monitoring` may name; metrics.jsonl is always written
MONITORS = (*TRACKERS, "jsonl")

_said: set[str] = set()
_silent_bars: set[int] = set()  # of this process's number, where another one shows its progress


class ConsoleHandler(logging.Handler):
    """Writes through `tqdm.write`, so that a progress bar survives: warnings to stderr, the rest to stdout.

    rank: the number of this process, which of several all but the first one say.
    """

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self.rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        try:
            is_warning = record.levelno >= logging.WARNING
            prefix = f"{record.levelname.lower()}: " if is_warning else ""
            prefix += f"process {self.rank}: " if self.rank else ""
            tqdm.write(prefix + self.format(record), file=sys.stderr if is_warning else sys.stdout)
        except OSError:  # as with bars, whoever read it has gone, or the disk is full: no line ends a program
            pass
        except Exception:  # logging's convention: a failing log line is reported on stderr, it never stops the program
            self.handleError(record)


class _ForgivingStream:
    """A stream that may lose its reader, as with a closed terminal or `| tee` after Ctrl-C: no bar ends a program."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __eq__(self, other: object) -> bool:  # by which tqdm.write finds the bars that it must not write into
        return other is self or other is self.stream

    def __hash__(self) -> int:
        return hash(self.stream)


def setup_console(rank: int = 0) -> None:
    """Show the "graf" logger's INFO lines and above on the console; calling it again changes nothing.

    What the console's encoding lacks, as names of files that are not UTF-8, is escaped, as stderr does by itself.

    Of several processes the first one speaks; of the others only warnings are heard, with their number.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if rank:
        _silent_bars.add(rank)
    if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(ConsoleHandler(rank))


def progress_bar(items: Iterable[Any] | None = None, disable: bool = False, **options: Any) -> tqdm:
    """A tqdm bar that disappears when it is done, and that writes one line per 10 seconds where stderr is a file."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    options |= {"leave": False, "mininterval": interval, "disable": disable or bool(_silent_bars)}
    return tqdm(items, file=_ForgivingStream(sys.stderr), **options)


def warn_once(message: str, key: str | None = None) -> None:
    """Log a warning the first time that `key` (default: the message) is seen in this process."""
    _log_once(logging.WARNING, message, key)


def info_once(message: str, key: str | None = None) -> None:
    """Log an INFO line the first time that `key` (default: the message) is seen in this process."""
    _log_once(logging.INFO, message, key)


def _log_once(level: int, message: str, key: str | None) -> None:
    if (key or message) not in _said:
        _said.add(key or message)
        logger.log(level, "%s", message)


class RunLog:
    """The records of one run, in `folder`; a context manager.

    `start` is the last iteration already done (0 for a new run) and `total` the last one to do. metrics.jsonl is
    always written, one JSON object a line: `iteration`, `time` (seconds since 1970) and the scalars, where a number
    that is not finite is a string ("nan", "inf", "-inf"); rows of :meth:`scores` have "kind": "scores" besides. A
    resumed run continues the file after dropping what an earlier attempt wrote past `start`, and scores past `scored`
    (default: `start`). `pictures`: files of those at `start` by tag, for trackers that hide them with the scores.
    `monitoring` adds names of MONITORS; a missing or failing one is reported once.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total: int,
        start: int,
        scored: int | None = None,
        pictures: Mapping[str, Path] | None = None,
        monitoring: Sequence[str] = (),
        progress: bool = True,
    ) -> None:
        unknown = [name for name in monitoring if name not in MONITORS]
        if unknown:
            raise ValueError(f"monitoring: {unknown[0]!r} is unknown; expected some of {', '.join(MONITORS)}")
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics_path = folder / METRICS_FILE
        scored = start if scored is None else scored
        drop_rows_after(self._metrics_path, start, scored)
        wanted = [name for name in monitoring if name in TRACKERS]
        rows = self._metrics_path if scored < start else None
        self._trackers = Trackers(wanted, folder, start, rows, pictures or {}, warn_once)
        self._bar = tqdm(
            file=_ForgivingStream(sys.stderr),
            total=total,
            initial=start,
            unit="it",
            dynamic_ncols=True,
            disable=not progress,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,  # a redirected bar is one line per refresh
        )

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Record named numbers at `iteration`; names of RESERVED are taken. Raises OSError on a full disk."""
        self._record(iteration, values, {})

    def scores(self, iteration: int, values: Mapping[str, float]) -> None:
        """Record what has been measured on the state of `iteration`, which may come after its scalars."""
        self._record(iteration, values, {"kind": "scores"})

    def flush(self) -> None:
        """Hand the trackers' records to the system, as lines of metrics.jsonl are when they are written."""
        self._trackers.flush()

    def _record(self, iteration: int, values: Mapping[str, float], more: Mapping[str, str]) -> None:
        reserved = RESERVED & values.keys()
        if reserved:
            raise ValueError(f"scalar {min(reserved)!r}: the name is taken by {METRICS_FILE}; use another")
        numbers = {name: float(value) for name, value in values.items()}
        line: dict[str, Any] = {"iteration": iteration, "time": round(time.time(), 3), **more}
        line |= {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        _append_line(self._metrics_path, json.dumps(line, allow_nan=False))
        self._trackers.scalars(iteration, numbers)

    def progress(self, iteration: int, status: str | Mapping[str, float]) -> None:
        """Move the bar to `iteration` and show `status` (text, or numbers by name) behind the time left."""
        text = status if isinstance(status, str) else "  ".join(f"{name} {value:.4g}" for name, value in status.items())
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(iteration - self._bar.n)

    def image(self, iteration: int, tag: str, pixels: np.ndarray) -> None:
        """Show a picture (uint8, H x W x 3) in the trackers."""
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"image {tag!r}: found {pixels.dtype} {pixels.shape}, expected uint8 (H, W, 3)")
        self._trackers.image(iteration, tag, pixels)

    def close(self) -> None:
        """Finish all records; calling it again changes nothing."""
        self._bar.close()
        self._trackers.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class SilentLog(RunLog):
    """Records nothing: of several processes that train one run, the first one writes for all."""

    def __init__(self) -> None:
        """There is nothing to open."""

    def _record(self, iteration: int, values: Mapping[str, float], more: Mapping[str, str]) -> None:
        """Nothing is recorded."""

    def flush(self) -> None:
        """There is nothing to hand over."""

    def progress(self, iteration: int, status: str | Mapping[str, float]) -> None:
        """There is no bar."""

    def image(self, iteration: int, tag: str, pixels: np.ndarray) -> None:
        """Nothing is shown."""

    def close(self) -> None:
        """There is nothing to finish."""


def _append_line(path: Path, line: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:  # closing it is the flush
            file.write(line + "\n")
    except OSError as error:  # a failed flush does not name its file
        raise OSError(error.errno, error.strerror, str(path)) from error


def drop_rows_after(path: Path, iteration: int, scored: int | None = None) -> None:
    """Remove from a .jsonl of rows with an iteration those past `iteration`, and any cut short by a kill; log it.

    scored: the limit of rows whose kind is "scores", where it is another one.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    lines = content.decode("utf-8", errors="replace").splitlines()
    limits = {"scores": iteration if scored is None else scored}
    kept = [
        line for line in lines if (row := read_row(line)) and row["iteration"] <= limits.get(row["kind"], iteration)
    ]
    if len(kept) == len(lines) and content.endswith(b"\n" if lines else b""):
        return
    write_atomically(path, "".join(f"{line}\n" for line in kept))
    if len(kept) < len(lines):
        logger.info("%s: %d lines past iteration %d dropped", path, len(lines) - len(kept), iteration)
