"""Signals as a request to stop, which training honours between two steps, and long work between two pieces of it."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

#: what a person, a scheduler and a closing terminal send
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
#: signals within so many seconds of the first one are the same request: many senders repeat themselves
SAME_REQUEST = 3.0


class Stopped(BaseException):
    """Work that can be done again later was left because the program was asked to stop.

    No error, as little as KeyboardInterrupt is one: what handles failures on the way lets it pass.
    """


class StopRequest:
    """Inside the `with` block the first signal is remembered in `reason`; one after SAME_REQUEST seconds interrupts.

    Senders that repeat themselves find the program at its end: until those seconds have passed they are not heard.

    describe: says what is still done, for the line that answers the first signal at once; None: another process does.
    """

    def __init__(self, describe: Callable[[], str] | None = lambda: "stopping") -> None:
        self.reason: str | None = None
        self.describe = describe
        self._since = 0.0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            # nohup, and shells that start a job in the background, mean it; a scheduler's SIGTERM is always heard
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler if self.reason is None else self._pass_on)
        if self.reason is not None:
            atexit.register(_fall_deaf)

    def leave_if_asked(self) -> None:
        """Raise Stopped after a signal: for work whose pieces may be left out now and done again."""
        if self.reason is not None:
            raise Stopped(self.reason)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """After the block: a repetition of the request is still none of its own; anything later is as before."""
        if not self._repeats():
            signal.signal(number, self._former[number])
            signal.raise_signal(number)

    def _repeats(self) -> bool:
        return time.monotonic() - self._since <= SAME_REQUEST

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None:
            if not self._repeats():
                raise KeyboardInterrupt
            return
        self.reason, self._since = signal.Signals(number).name, time.monotonic()
        if self.describe is None:
            return
        with suppress(OSError):  # who asked may have gone, with the terminal or the pipe
            # written past Python's buffers, in which the interrupted code may be at work
            os.write(2, f"\n{self.reason}: {self.describe()}; again to stop without\n".encode())


@contextmanager
def deaf() -> Iterator[None]:
    """Inside the `with` block no request to stop is heard: for the last words of a program that ends anyway.

    A launcher that has seen one process fail asks the others to stop, one of which may just be about to say why.
    """
    former: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():  # others neither hear signals nor may refuse them
            for number in STOP_SIGNALS:
                former[number] = signal.signal(number, signal.SIG_IGN)
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _fall_deaf() -> None:
    """Python's last moments, in which its handlers are gone, belong to the same request: there is nothing to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
