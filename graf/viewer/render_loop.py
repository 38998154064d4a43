"""One thread that draws for all clients: quick pictures first, in turns, and a full one where nothing moves any more.

It knows neither viser nor the renderer: it is given a function that draws and one that delivers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from graf.runtime.logs import logger
from graf.viewer.drawing import Interrupted
from graf.viewer.pacing import Pacer

#: seconds without anything new after which a client stands still
STILL_AFTER = 0.2

Request = TypeVar("Request")


@dataclass(frozen=True)
class Job(Generic[Request]):
    """What to draw now: a client's newest request, `quick` while it moves; `pacer` says how large that may be."""

    client: Hashable
    request: Request
    quick: bool
    pacer: Pacer


@dataclass
class _Waiting(Generic[Request]):
    """A client's newest request; quick and full: whether that picture is still due; asked: when it came, seconds."""

    request: Request
    asked: float
    quick: bool = True
    full: bool = True
    turn: int = 0
    pacer: Pacer = field(default_factory=Pacer)


class RenderLoop(Generic[Request]):
    """Draws the newest request of each client until `stop`.

    draw: Job -> result, in the loop's thread; it calls `check` from time to time, which raises Interrupted where the
    job is a full picture and something newer waits. deliver: (job, result), in the same thread.
    """

    def __init__(
        self,
        draw: Callable[[Job[Request]], Any],
        deliver: Callable[[Job[Request], Any], None],
    ) -> None:
        self._draw, self._deliver = draw, deliver
        self._waiting: dict[Hashable, _Waiting[Request]] = {}
        self._changed = threading.Condition()
        self._current: Job[Request] | None = None
        self._stopped = False
        self._turns = 0
        self._thread = threading.Thread(target=self._run, name="graf-view-render", daemon=True)

    def start(self) -> None:
        """Begin to draw."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a picture that is being drawn is left unfinished."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def ask(self, client: Hashable, request: Request) -> None:
        """Draw this for a client, instead of what it asked for before."""
        with self._changed:
            known = self._waiting.get(client)
            now = time.monotonic()
            if known is None:
                self._waiting[client] = _Waiting(request, now)
            else:
                known.request, known.asked, known.quick, known.full = request, now, True, True
            self._changed.notify()

    def forget(self, client: Hashable) -> None:
        """Draw nothing more for a client."""
        with self._changed:
            self._waiting.pop(client, None)
            self._changed.notify()

    def check(self) -> None:
        """Raise Interrupted where the picture that is being drawn is not worth finishing.

        Quick pictures are always finished while their client is there: cameras move faster than they are drawn.
        """
        job = self._current
        with self._changed:
            if self._stopped or (job is not None and job.client not in self._waiting):
                raise Interrupted
            if job is not None and not job.quick and any(client.quick for client in self._waiting.values()):
                raise Interrupted

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._current = job
            try:
                self._deliver(job, self._draw(job))
            except Interrupted:
                self._put_back(job)
            except Exception:  # a defect of one picture must not end the viewer: it is told, and the next one is tried
                logger.exception("a picture could not be drawn")
            finally:
                self._current = None

    def _next(self) -> Job[Request] | None:
        """The next thing to draw, when there is one; None at the end."""
        with self._changed:
            while not self._stopped:
                quick = [(client, state) for client, state in self._waiting.items() if state.quick]
                if quick:
                    return self._take(*min(quick, key=lambda item: item[1].turn), quick=True)
                full = [(client, state) for client, state in self._waiting.items() if state.full]
                if full:
                    client, state = min(full, key=lambda item: item[1].asked)
                    left = state.asked + STILL_AFTER - time.monotonic()
                    if left <= 0:
                        return self._take(client, state, quick=False)
                    self._changed.wait(left)
                else:
                    self._changed.wait()
            return None

    def _take(self, client: Hashable, state: _Waiting[Request], quick: bool) -> Job[Request]:
        self._turns += 1
        state.turn = self._turns
        if quick:
            state.quick = False
        else:
            state.full = False
        return Job(client, state.request, quick, state.pacer)

    def _put_back(self, job: Job[Request]) -> None:
        """A full picture that was interrupted is due again, unless its client is gone."""
        with self._changed:
            state = self._waiting.get(job.client)
            if state is not None and not job.quick:
                state.full = True
