"""From what angle each frame of a turntable was taken: when it turns, how long a turn takes, and in which sense.

The camera stands still and the table turns at a constant speed; times are numbers of scanned frames, which are evenly
spaced. A table that turns counter-clockwise seen from above shows the object as a camera sees it that goes clockwise:
angles, which grow as the azimuth of the camera does (graf/geometry/cameras.py), fall.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from graf.base.extras import import_optional
from graf.capture.errors import CaptureError
from graf.capture.frames import Scan

STILL = 0.25  # of the usual motion between two frames: below it the table does not turn yet, or any more
SHORTEST_TURN = 8  # frames
RETURN_DEGREES = 5.0  # of turning: what differs less is the same view
ALIKE = 1.3  # times the smallest difference: a shorter turn of such a difference is preferred to its multiples
NEARLY_DEGREES = 60.0  # of a turn may be missing at its end
HALVES = 1.15  # of the frames, at most, that two turns have which may be halves of one
FLAT = 0.6  # of the usual difference: the best match has to be better than that
RIVAL = 0.5  # of the usual difference: a match that a person should know of
FLOW_DEGREES = 3.0  # that the table turns between two frames whose flow is measured
FLOW_PAIRS = 24
SURE = 0.2  # of the strongest balance of flow, 1, in which all of the front moves to one side


@dataclass(frozen=True)
class Turn:
    """One turn of the table: the frame at which it starts, its `length` in frames, and whether the table turns
    counter-clockwise seen from above.

    rival: degrees after which the object looks almost as it did at first, or None.
    """

    start: float
    length: float
    counter_clockwise: bool
    rival: float | None = None

    def angle(self, number: float) -> float:
        """Degrees in [0, 360) of the camera's azimuth around the object in frame `number`; 0 where the turn starts."""
        share = (number - self.start) / self.length
        return float(360 * (-share if self.counter_clockwise else share) % 360)


def find_turn(seen: Scan, turns: float | None, counter_clockwise: bool | None) -> Turn:
    """The first whole turn in a scan. turns: how many there are, None: to be found; counter_clockwise: None: by flow.

    Raises CaptureError where no turn can be found, or no direction.
    """
    start, end = find_motion(seen)
    rival = None
    if turns is not None:
        length = (end - start) / turns
    else:
        length, rival = measure_turn(seen, start, end)
    if counter_clockwise is None:
        counter_clockwise = turns_counter_clockwise(seen, start, min(end, start + round(length)), length)
    return Turn(float(start), length, counter_clockwise, rival)


def find_motion(seen: Scan) -> tuple[int, int]:
    """The frames [start, end) between the first and the last motion; all of them where nothing stands still."""
    steps = np.sqrt(np.square(np.diff(_prepare(seen), axis=0)).mean(1))
    # A window over 1% of the frames: single frames may be equal, where a phone's rate varies.
    window = max(1, len(steps) // 100)
    motion = np.convolve(steps, np.ones(window) / window, mode="same")
    moving = np.nonzero(motion > STILL * np.median(motion))[0]
    if len(moving) == 0:
        raise CaptureError("nothing moves: expected an object on a turning table before a camera that stands still")
    return int(moving[0]), int(moving[-1]) + 2


def measure_turn(seen: Scan, start: int, end: int) -> tuple[float, float | None]:
    """Length of a turn in frames, and the degrees of a rival or None: the time after which frames look as they did.

    All pairs of frames that lie so far apart are compared, not only the first with the others. A turn that ends with
    the last frame, or a little after it, is found where the last frames approach the first as the next ones left it.
    Raises CaptureError.
    """
    frames = _prepare(seen)[start:end]
    pairs = pair_differences(frames)
    differences = mean_by_lag(pairs)
    count = len(frames)
    advice = "film a whole turn and a little more, with the camera still; or say --turns"
    if count < SHORTEST_TURN + 2:
        raise CaptureError(f"the table turns during {count} frames only; {advice}")
    usual = float(np.median(differences[1:]))
    inner = differences[SHORTEST_TURN:-1]
    is_minimum = (inner <= differences[SHORTEST_TURN - 1 : -2]) & (inner <= differences[SHORTEST_TURN + 1 :])
    minima = [_refine_minimum(differences, SHORTEST_TURN + int(lag)) for lag in np.nonzero(is_minimum)[0]]
    last = float(differences[-1])
    # Little enough to be the same view again: less than a few degrees of turning make, if that were a turn.
    alike = [(lag, value) for lag, value in minima if value <= _turned(differences, lag, RETURN_DEGREES)]
    if alike:
        limit = ALIKE * min(value for _, value in alike)
        length = next(lag for lag, value in alike if value <= max(limit, _turned(differences, lag, RETURN_DEGREES / 2)))
    elif last <= min(_turned(differences, count - 1, NEARLY_DEGREES), FLAT * usual):
        # The turn is not quite over: the last frame has as far to go as frames near the first and near the last one lie
        # apart that differ so much. (All frames together would not tell: some views change faster.)
        near = [(pairs[0, lag] + pairs[-1, -1 - lag]) / 2 for lag in range(max(2, count // 4))]
        length = count - 1 + float(np.interp(last, np.maximum.accumulate(near), np.arange(len(near))))
    elif minima and min(value for _, value in minima) <= FLAT * usual:
        length = min(minima, key=lambda minimum: minimum[1])[0]  # light or camera have changed meanwhile
        if count <= 2 * length <= HALVES * count:
            raise CaptureError(
                f"after {length:.0f} of {count} frames the object looks much as it did at first: that is a whole turn, "
                f"or half of one that is not quite over; say --turns {count / length:.2g} or {count / length / 2:.2g}"
            )
    else:
        raise CaptureError(f"no frame looks like an earlier one, so that no turn can be found; {advice}")
    others = [(value, lag) for lag, value in minima if lag < 0.9 * length and value < RIVAL * usual]
    return length, 360 * min(others)[1] / length if others else None


def pair_differences(frames: np.ndarray) -> np.ndarray:
    """Root mean square differences (n, n) of all pairs of frames (n, values)."""
    products = frames @ frames.T
    squares = np.diagonal(products)
    return np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * products, 0) / frames.shape[1])


def mean_by_lag(pairs: np.ndarray) -> np.ndarray:
    """Root mean square (n,) of the differences (n, n) of frames that lie 0, 1, ... n - 1 apart."""
    return np.array([np.sqrt(np.square(np.diagonal(pairs, lag)).mean()) for lag in range(len(pairs))])


def _turned(differences: np.ndarray, lag: float, degrees: float) -> float:
    """The difference that turning by some degrees makes where `lag` frames are a turn."""
    return float(np.interp(lag * degrees / 360, np.arange(len(differences)), differences))


def _refine_minimum(differences: np.ndarray, lag: int) -> tuple[float, float]:
    """A minimum between whole lags, and the difference there: of a parabola through the squares around it."""
    reach = max(1, round(0.02 * lag))
    lags = np.arange(max(1, lag - reach), min(len(differences) - 1, lag + reach) + 1)
    parabola = np.polyfit(lags - lag, np.square(differences[lags]), 2)
    shift = float(np.clip(-parabola[1] / (2 * parabola[0]), -reach, reach)) if parabola[0] > 0 else 0.0
    return lag + shift, math.sqrt(max(float(np.polyval(parabola, shift)), 0.0))


def _prepare(seen: Scan) -> np.ndarray:
    """Thumbnails as float32 (n, values), blurred, and weighted by how much each pixel changes: the object, mostly."""
    cv2 = import_optional("cv2", "capture")
    frames = np.stack([cv2.GaussianBlur(picture.astype(np.float32), (0, 0), 1.0) for picture in seen.thumbnails])
    change = frames.std(axis=0).mean(-1, keepdims=True)
    frames *= change / max(float(change.max()), 1e-6)
    return frames.reshape(len(frames), -1)


def turns_counter_clockwise(seen: Scan, start: int, end: int, length: float) -> bool:
    """Whether the table turns counter-clockwise seen from above: whether its front moves to the right.

    The front is what is seen in the lower half of all that moves (a camera that looks down sees the back above it, and
    that moves the other way). Optical flow: Farnebäck (SCIA 2003). Raises CaptureError where it does not say.
    """
    cv2 = import_optional("cv2", "capture")
    stride = max(1, round(FLOW_DEGREES / 360 * length))
    moved = seen.grey[start:end].astype(np.float32).std(axis=0)
    rows = np.nonzero((moved > 0.3 * moved.max()).any(axis=1))[0]
    middle = (rows[0] + rows[-1] + 1) // 2
    front = slice(middle, rows[-1] + 1)
    last = max(start + 1, end - stride)
    balances, strengths = [], []
    for number in np.unique(np.linspace(start, last - 1, FLOW_PAIRS).astype(int)):
        one, other = seen.grey[number], seen.grey[min(number + stride, len(seen) - 1)]
        flow = cv2.calcOpticalFlowFarneback(one, other, None, 0.5, 4, 15, 3, 5, 1.2, 0)[front, :, 0]
        weight = np.abs(cv2.Sobel(one, cv2.CV_32F, 1, 0))[front] * moved[front]  # flow is known where there are edges
        balances.append(float((weight * flow).sum()))
        strengths.append(float((weight * np.abs(flow)).sum()))
    balance = sum(balances) / max(sum(strengths), 1e-9)
    if abs(balance) < SURE:
        raise CaptureError(
            "--direction: optical flow does not tell in which sense the table turns (too little texture, or frames too "
            "far apart); say cw or ccw, as seen from above: ccw is where the front moves to the right"
        )
    return balance > 0
