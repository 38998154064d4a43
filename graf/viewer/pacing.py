"""How large pictures may be so that they come at a steady rate while a camera moves."""

from __future__ import annotations

from dataclasses import dataclass

#: pictures per second that a moving camera is meant to have
RATE = 8.0
#: rows of the smallest picture that still shows something
SMALLEST = 32
#: rows come in multiples of this, so that the size does not change with every picture
STEP = 16
#: how much of the newest measurement counts: most of it, since a load comes and goes within seconds
NEWEST = 0.5


@dataclass
class Pacer:
    """Finds the height of moving pictures from what the last ones took.

    A picture's time is taken as proportional to its pixels. rate: pictures per second; seconds_per_pixel: None before
    the first picture, for which `first` rows are tried.
    """

    rate: float = RATE
    first: int = 64
    seconds_per_pixel: float | None = None

    def note(self, pixels: int, seconds: float) -> None:
        """A picture of so many pixels took so many seconds."""
        measured = seconds / pixels
        if self.seconds_per_pixel is None:
            self.seconds_per_pixel = measured
        else:
            self.seconds_per_pixel += NEWEST * (measured - self.seconds_per_pixel)

    def height(self, aspect: float, full: int) -> int:
        """Rows of the next moving picture, whose width is aspect times its height; at most `full`."""
        if self.seconds_per_pixel is None:
            rows = float(self.first)
        else:
            rows = (1 / (self.rate * self.seconds_per_pixel * aspect)) ** 0.5
        return min(max(SMALLEST, int(rows // STEP * STEP)), full)
