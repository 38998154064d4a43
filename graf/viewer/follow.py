"""Notices new checkpoints of a run in training, by looking at its folder: training itself does nothing for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from graf.runtime.logs import logger

#: seconds between two looks at the folder
EVERY = 2.0

#: what tells a checkpoint from the one before it: name, time of its last change in nanoseconds, bytes
Signature = tuple[tuple[str, int, int], ...]


def sign(files: Sequence[Path]) -> Signature:
    """The state of files; those that go while they are looked at do not count."""
    found = []
    for file in files:
        try:
            status = file.stat()
        except OSError:
            continue  # training keeps a few checkpoints and removes older ones
        found.append((file.name, status.st_mtime_ns, status.st_size))
    return tuple(sorted(found))


class Follower:
    """Calls `take` whenever one of the files that `list_files` names is new or has changed.

    take: in the follower's thread; what it raises is logged, and the next change is tried again.
    """

    def __init__(
        self, list_files: Callable[[], Sequence[Path]], take: Callable[[], None], every: float = EVERY
    ) -> None:
        self._list_files, self._take, self._every = list_files, take, every
        self._seen = sign(list_files())
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
        if found == self._seen or not found:
            return False
        self._seen = found
        self._take()
        return True

    def _run(self) -> None:
        while not self._stopped.wait(self._every):
            try:
                self.look()
            except Exception as error:  # a checkpoint that goes while it is read; the viewer goes on with what it has
                logger.warning("the new checkpoint was not taken: %s", error)
