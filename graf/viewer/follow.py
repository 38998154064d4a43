"""Notices new checkpoints of a run in training, by looking at its folder: training itself does nothing for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from graf.runtime.logs import logger

#: seconds between two looks at the folder
EVERY = 2.0

#: what tells checkpoints from those before them: name, time of the last change in nanoseconds, bytes
Signature = frozenset[tuple[str, int, int]]


def sign(files: Sequence[Path]) -> Signature:
    """The state of files; those that go while they are looked at do not count."""
    found = set()
    for file in files:
        try:
            status = file.stat()
        except OSError:
            continue  # training keeps a few checkpoints and removes older ones
        found.add((file.name, status.st_mtime_ns, status.st_size))
    return frozenset(found)


class Follower:
    """Calls `take` whenever one of the files that `list_files` names is new or has changed.

    seen: their state before the first of them was read; take: is called in the follower's thread; what it raises is
    logged, and the next file is tried again. Files that are removed are no news.
    """

    def __init__(
        self,
        list_files: Callable[[], Sequence[Path]],
        seen: Signature,
        take: Callable[[], None],
        every: float = EVERY,
    ) -> None:
        self._list_files, self._seen, self._take, self._every = list_files, seen, take, every
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="graf-view-follow", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> bool:
        """Take what is new, if anything is; whether there was."""
        found = sign(self._list_files())
        news, self._seen = found - self._seen, found
        if news:
            self._take()
        return bool(news)

    def _run(self) -> None:
        while not self._stopped.wait(self._every):
            try:
                self.look()
            except Exception as error:  # a checkpoint that goes while it is read; the viewer goes on with what it has
                logger.warning("the new checkpoint was not taken: %s", error)
