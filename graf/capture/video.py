"""Frames of a video file, decoded by ffmpeg as a stream: upright, of square pixels, tone-mapped, at an even rate."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from graf.base.extras import import_optional
from graf.capture.errors import CaptureError
from graf.capture.frames import Frame
from graf.capture.tone_mapping import HLG, PQ, tone_map
from graf.runtime.logs import warn_once

MAX_SCANNED = 900  # frames of a video that are looked at; a longer one is thinned out evenly


class Video:
    """A video file, decoded by the ffmpeg that imageio brings, which turns a phone's video upright."""

    def __init__(self, path: Path) -> None:
        """Look at the file's header. Raises CaptureError where it is no video."""
        self.path = path
        report = self._ask()
        stream = re.search(r"Stream #.*: Video: (.*)", report)
        if stream is None:
            why = "has no video stream" if "Stream #" in report or "Duration:" in report else "is not a video"
            raise CaptureError(f"{path} {why}; expected a file such as a phone records (mp4, mov), or a folder")
        #: of HDR, None of any other video
        self.transfer = next((name for name in (HLG, PQ) if name in stream[1]), None)
        rate = re.search(r"([\d.]+) fps", stream[1]) or re.search(r"([\d.]+) tbr", stream[1])
        native = float(rate[1]) if rate else 30.0
        seconds = _read_clock(r"Duration: ", report)
        if seconds is None:  # what a browser has recorded does not tell
            seconds = _read_clock(r"time=", self._ask("-map", "0:v:0", "-c", "copy", "-f", "null", "-")) or 0.0
        #: frames a second that are looked at; phones vary theirs, and an even rate makes the number of a frame its time
        self.rate = min(native, MAX_SCANNED / seconds) if seconds > 0 else native
        self._expected = max(1, round(seconds * self.rate))

    def __len__(self) -> int:
        return self._expected

    def read(self, side: int, numbers: Sequence[int] | None = None) -> Iterator[Frame]:
        """Frames at an even rate; see Source. Raises CaptureError where none can be decoded; damage is reported."""
        command = [*self._command(), "-v", "error", "-i", f"file:{self.path}", "-map", "0:v:0"]
        command += ["-vf", self._filters(side, numbers), "-fps_mode", "passthrough"]
        command += ["-pix_fmt", "rgb48be" if self.transfer else "rgb24", "-f", "image2pipe", "-c:v", "ppm", "-"]
        wanted = itertools.count() if numbers is None else iter(numbers)
        with tempfile.TemporaryFile() as complaints:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, stdin=subprocess.DEVNULL)
            assert process.stdout is not None
            count = 0
            try:
                while (image := _read_ppm(process.stdout)) is not None:
                    number, count = next(wanted), count + 1
                    picture = tone_map(image, self.transfer) if self.transfer else image
                    yield Frame(picture, number / self.rate, f"{self.path.name}#{number}")
            except BaseException:  # nobody wants the rest, which it would decode to the end
                process.kill()
                raise
            finally:
                process.stdout.close()
                process.wait()
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().splitlines()
        if count == 0:
            raise CaptureError(f"{self.path}: no frame can be decoded ({said[-1] if said else 'it is empty'})")
        if process.returncode or said:
            warn_once(
                f"{self.path} is damaged ({said[-1] if said else process.returncode}): {count} frames of it were read"
            )

    def _filters(self, side: int, numbers: Sequence[int] | None) -> str:
        """ffmpeg's filters: an even rate, the frames wanted, square pixels, the longer side at most `side` of them."""
        filters = [f"fps={self.rate:.6f}"]
        if numbers is not None:
            filters.append(f"select='{_any_of(numbers)}'")
        filters.append("scale=w='iw*max(1,sar)':h='ih*max(1,1/sar)'")  # camcorders' pixels are wider than high
        filters.append(f"scale=w='min({side},iw)':h='min({side},ih)':force_original_aspect_ratio=decrease:flags=area")
        return ",".join(filters)

    def _ask(self, *output: str) -> str:
        """What ffmpeg says of the file."""
        command = [*self._command(), "-i", f"file:{self.path}", *output]
        answer = subprocess.run(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False)
        return answer.stderr.decode(errors="replace")

    @staticmethod
    def _command() -> list[str]:
        ffmpeg = import_optional("imageio_ffmpeg", "capture").get_ffmpeg_exe()
        return [ffmpeg, "-hide_banner", "-nostdin", "-protocol_whitelist", "file,pipe"]


def _read_clock(before: str, report: str) -> float | None:
    """Seconds of the last time of the form 00:01:02.50 that follows `before`; None where there is none."""
    clocks = re.findall(before + r"(\d+):(\d+):([\d.]+)", report)
    return sum(float(part) * unit for part, unit in zip(clocks[-1], (3600, 60, 1), strict=True)) if clocks else None


def _any_of(numbers: Sequence[int]) -> str:
    """ffmpeg's expression for a frame of one of these numbers; in halves, for it refuses sums of over 100 terms."""
    if len(numbers) == 1:
        return f"eq(n,{numbers[0]})"
    half = len(numbers) // 2
    return f"({_any_of(numbers[:half])}+{_any_of(numbers[half:])})"


def _read_ppm(stream: IO[bytes]) -> np.ndarray | None:
    """The next image of a stream of PPM files, uint8 or uint16 (H, W, 3); None at its end."""
    header = [stream.readline() for _ in range(3)]
    if not header[2]:
        return None
    width, height = map(int, header[1].split())
    kind: Any = np.uint8 if int(header[2]) < 256 else np.dtype(">u2")
    pixels = stream.read(height * width * 3 * np.dtype(kind).itemsize)
    if len(pixels) < height * width * 3 * np.dtype(kind).itemsize:
        return None
    return np.frombuffer(pixels, kind).reshape(height, width, 3)
