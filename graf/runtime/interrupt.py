"""SIGINT and SIGTERM as a request to stop, which the training loop honours between two steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Inside the `with` block the first signal is remembered in `reason`; a second one stops the program at once."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
