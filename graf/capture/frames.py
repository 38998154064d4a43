"""Frames of a video or of a folder of photographs: a quick look at all of them, a choice, and the chosen ones in full.

Frames are uint8 (H, W, 3) sRGB, upright (phone rotation and EXIF orientation applied), HDR videos tone-mapped. A video
is decoded by ffmpeg as a stream: once small, to compare, and once for the chosen frames; it is never held as a whole.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from graf.base.extras import import_optional
from graf.capture.errors import CaptureError
from graf.data.images import DECODER_ERRORS, FORMATS, IMAGE_SUFFIXES, quiet_decoders
from graf.data.labels import natural_key
from graf.runtime.logs import progress_bar, warn_once

Picture = np.ndarray

VIDEO_SUFFIXES = frozenset((".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".3gp", ".mts", ".gif"))
HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
FULL_SIDE = 1600  # pixels of the longer side of a chosen frame: more than a data set's images are made of
SCAN_SIDE = 480  # of a frame whose sharpness is measured: a blur that matters is seen here
GREY_SIDE = 160  # of what motion is measured on
THUMBNAIL_SIDE = 48  # of what is compared
MAX_SCANNED = 900  # frames of a video that are looked at; a longer one is thinned out evenly
MIN_FRAMES = 8  # of a usable source
NEIGHBOURHOOD = 1 / 3  # of the step between chosen frames: how far the sharpest one may lie to either side
SHARP = 0.8  # of the sharpest one's variance: as sharp, so that the one in the middle is taken
DUPLICATE = 0.1  # of the usual difference of two chosen frames: a nearer one shows the same

#: HDR transfer functions as ffmpeg names them
HLG, PQ = "arib-std-b67", "smpte2084"
BT2020_TO_BT709 = np.array(  # ITU-R BT.2087
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
REFERENCE_WHITE = 203.0  # cd/m2 of paper white, ITU-R BT.2408
PEAK = 1000.0  # cd/m2 that become pure white
KNEE = 0.6  # of paper white: what is darker keeps its brightness


@dataclass(frozen=True)
class Frame:
    """A picture uint8 (H, W, 3) sRGB, when it was taken (seconds from the start; the number of a photograph) and where
    it comes from (a file's name, for a video with "#" and the number of the frame).

    alpha: uint8 (H, W), the transparency that the file itself has, or None; diagonal_fov: degrees across the diagonal
    of the photograph as its EXIF tells, or None.
    """

    image: Picture
    time: float
    source: str
    alpha: Picture | None = None
    diagonal_fov: float | None = None


class Source(Protocol):
    """Where frames come from. `path` is what the person named."""

    path: Path

    def __len__(self) -> int:
        """How many frames there are to choose from, about."""

    def read(self, side: int, numbers: Sequence[int] | None = None) -> Iterator[Frame]:
        """Frames in order, all or those of sorted `numbers`, the longer side at most `side` pixels."""


@dataclass(frozen=True)
class Scan:
    """A quick look at all n frames: `times` (n,) in seconds, `sharpness` (n,) (variance of the Laplacian), `grey` uint8
    (n, h, w) and `thumbnails` uint8 (n, h', w', 3).
    """

    times: np.ndarray
    sharpness: np.ndarray
    grey: np.ndarray
    thumbnails: np.ndarray

    def __len__(self) -> int:
        return len(self.times)


def open_source(path: Path) -> Source:
    """A video or a folder of photographs. Raises CaptureError where it is neither, or empty, or broken."""
    if path.is_dir():
        return Photographs(path)
    if not path.exists():
        raise CaptureError(f"{path}: no such file or folder; expected a video, or a folder of photographs")
    if path.suffix.lower() in (IMAGE_SUFFIXES | HEIF_SUFFIXES) - VIDEO_SUFFIXES:
        raise CaptureError(f"{path} is one photograph; expected a video, or a folder of at least {MIN_FRAMES}")
    return Video(path)


def scan(source: Source) -> Scan:
    """Look at every frame of a source once."""
    cv2 = import_optional("cv2", "capture")
    times, sharpness, grey, thumbnails = [], [], [], []
    first: Frame | None = None
    for frame in progress_bar(source.read(SCAN_SIDE), desc=f"looking at {source.path.name}", total=len(source)):
        first = first or frame
        if frame.image.shape != first.image.shape:
            raise CaptureError(
                f"{source.path}: {frame.source} is {_size(frame)}, {first.source} {_size(first)} (reduced); expected "
                "frames of one camera, all upright or all on their side"
            )
        scanned = cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY)
        times.append(frame.time)
        sharpness.append(cv2.Laplacian(scanned, cv2.CV_32F).var())
        grey.append(fit_within(scanned, GREY_SIDE))
        thumbnails.append(fit_within(frame.image, THUMBNAIL_SIDE))
    if len(times) < MIN_FRAMES:
        raise CaptureError(f"{source.path} has {len(times)} frames; expected at least {MIN_FRAMES}, better 36 and more")
    return Scan(np.array(times), np.array(sharpness), np.stack(grey), np.stack(thumbnails))


def choose_frames(seen: Scan, count: int, start: float = 0.0, length: float | None = None) -> list[int]:
    """Numbers of `count` frames, evenly spaced over `length` frames from `start`, each the sharpest of those around it.

    A frame that shows the same as the chosen one before it is left out. Without `length` the first and the last frame
    are the ends. Raises CaptureError where `count` is more than there is.
    """
    is_open = length is None
    available = len(seen) - start if length is None else min(length, len(seen) - start)
    if count > round(available):
        raise CaptureError(
            f"--frames {count}: there are {round(available)} frames to choose from; ask for fewer, or film slower"
        )
    step = (available - 1) / max(count - 1, 1) if is_open else float(length or 0) / count
    chosen: list[int] = []
    for place in start + step * np.arange(count):
        low = max(round(place - NEIGHBOURHOOD * step), chosen[-1] + 1 if chosen else int(np.ceil(start)))
        high = min(round(place + NEIGHBOURHOOD * step), len(seen) - 1)
        if low <= high:  # a turn may end a little after the video does
            numbers = np.arange(low, high + 1)
            sharp = numbers[seen.sharpness[low : high + 1] >= SHARP * seen.sharpness[low : high + 1].max()]
            chosen.append(int(sharp[np.abs(sharp - place).argmin()]))
    return drop_duplicates(seen, chosen)


def drop_duplicates(seen: Scan, numbers: Sequence[int]) -> list[int]:
    """Those of `numbers` that differ from the one kept before by more than a small part of the usual difference."""
    if len(numbers) < 2:
        return list(numbers)
    pictures = seen.thumbnails[list(numbers)].astype(np.float32)
    usual = np.median([np.abs(one - other).mean() for one, other in pairwise(pictures)])
    kept = [0]
    for place in range(1, len(numbers)):
        if np.abs(pictures[place] - pictures[kept[-1]]).mean() > DUPLICATE * usual:
            kept.append(place)
    return [numbers[place] for place in kept]


def select_frames(source: Source, count: int | None, most: int = 80) -> list[Frame]:
    """`count` frames of a whole source in full (None: all, at most `most`): evenly spaced, sharp, no two the same."""
    seen = scan(source)
    numbers = choose_frames(seen, min(most, len(seen)) if count is None else count)
    return list(source.read(FULL_SIDE, numbers))


def fit_within(image: Picture, side: int) -> Picture:
    """The image reduced, by averaging, until its longer side is at most `side` pixels."""
    factor = side / max(image.shape[:2])
    if factor >= 1:
        return image
    cv2 = import_optional("cv2", "capture")
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))


def _size(frame: Frame) -> str:
    return f"{frame.image.shape[1]}x{frame.image.shape[0]}"


# -- photographs


class Photographs:
    """The image files of a folder in natural order of their names. HEIC needs pillow-heif."""

    def __init__(self, path: Path) -> None:
        self.path = path
        suffixes = IMAGE_SUFFIXES | HEIF_SUFFIXES
        files = [file for file in path.iterdir() if file.suffix.lower() in suffixes and not file.name.startswith(".")]
        self.files = sorted(files, key=lambda file: natural_key(file.name))
        if len(self.files) < MIN_FRAMES:
            raise CaptureError(
                f"{path} holds {len(self.files)} photographs; expected at least {MIN_FRAMES} of one object "
                f"({', '.join(sorted(suffixes))})"
            )
        if any(file.suffix.lower() in HEIF_SUFFIXES for file in self.files):
            import_optional("pillow_heif", "capture").register_heif_opener()

    def __len__(self) -> int:
        return len(self.files)

    def read(self, side: int, numbers: Sequence[int] | None = None) -> Iterator[Frame]:
        """Photographs in order; see Source."""
        for number in range(len(self.files)) if numbers is None else numbers:
            yield read_photograph(self.files[number], side, float(number))


def read_photograph(file: Path, side: int, time: float = 0.0) -> Frame:
    """A photograph as a frame, upright, its longer side at most `side` pixels. Raises CaptureError."""
    formats = ("HEIF",) if file.suffix.lower() in HEIF_SUFFIXES else FORMATS
    try:
        with quiet_decoders(), Image.open(file, formats=formats) as opened:
            fov = _diagonal_fov(opened)
            opened.draft("RGB", (side, side))  # a JPEG is decoded at a fraction of its size
            upright = ImageOps.exif_transpose(opened)
            has_alpha = upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info
            pixels = np.asarray(upright.convert("RGBA" if has_alpha else "RGB"))
    except DECODER_ERRORS as error:
        raise CaptureError(f"{file} cannot be read ({error}); repair or remove it") from error
    alpha = fit_within(pixels[..., 3], side) if has_alpha else None
    return Frame(fit_within(np.ascontiguousarray(pixels[..., :3]), side), time, file.name, alpha, fov)


def _diagonal_fov(image: Image.Image) -> float | None:
    """Degrees across the diagonal, from the focal length on 35 mm film (whose diagonal is 43.27 mm) that EXIF tells."""
    try:
        focal = float(image.getexif().get_ifd(0x8769).get(0xA405, 0))
    except DECODER_ERRORS:  # EXIF may be damaged beside an intact image
        return None
    return float(2 * np.degrees(np.arctan(43.27 / 2 / focal))) if focal > 0 else None


# -- videos


class Video:
    """A video file, decoded by the ffmpeg that imageio brings, which turns a phone's video upright."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.transfer: str | None = None
        report = subprocess.run(
            [*self._command(), "-i", f"file:{path}"], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False
        ).stderr.decode(errors="replace")
        stream = re.search(r"Stream #.*: Video: (.*)", report)
        if stream is None:
            why = "has no video stream" if "Stream #" in report or "Duration:" in report else "is not a video"
            raise CaptureError(f"{path} {why}; expected a file such as a phone records (mp4, mov), or a folder")
        rate = re.search(r"([\d.]+) fps", stream[1]) or re.search(r"([\d.]+) tbr", stream[1])
        duration = re.search(r"Duration: (\d+):(\d+):([\d.]+)", report)
        self.transfer = next((name for name in (HLG, PQ) if name in stream[1]), None)
        native = float(rate[1]) if rate else 30.0
        seconds = (
            sum(float(part) * unit for part, unit in zip(duration.groups(), (3600, 60, 1), strict=True))
            if duration
            else 0.0
        )
        #: frames a second that are looked at; phones vary theirs, and an even rate makes the number of a frame its time
        self.rate = min(native, MAX_SCANNED / seconds) if seconds > 0 else native
        self._expected = max(1, round(seconds * self.rate))

    @staticmethod
    def _command() -> list[str]:
        ffmpeg = import_optional("imageio_ffmpeg", "capture").get_ffmpeg_exe()
        return [ffmpeg, "-hide_banner", "-nostdin", "-protocol_whitelist", "file,pipe"]

    def __len__(self) -> int:
        return self._expected

    def read(self, side: int, numbers: Sequence[int] | None = None) -> Iterator[Frame]:
        """Frames at an even rate; see Source. Raises CaptureError where none can be decoded; damage is reported."""
        filters = [f"fps={self.rate:.6f}"]
        if numbers is not None:
            filters.append("select='" + "+".join(f"eq(n,{number})" for number in numbers) + "'")
        filters.append(f"scale=w='min({side},iw)':h='min({side},ih)':force_original_aspect_ratio=decrease:flags=area")
        depth = "rgb48be" if self.transfer else "rgb24"
        command = [
            *self._command(),
            "-v",
            "error",
            "-i",
            f"file:{self.path}",
            "-map",
            "0:v:0",
            "-vf",
            ",".join(filters),
        ]
        command += ["-fps_mode", "passthrough", "-pix_fmt", depth, "-f", "image2pipe", "-c:v", "ppm", "-"]
        wanted = iter(range(10**9) if numbers is None else numbers)
        with tempfile.TemporaryFile() as complaints:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, stdin=subprocess.DEVNULL)
            assert process.stdout is not None
            count = 0
            try:
                while (image := _read_ppm(process.stdout)) is not None:
                    number, count = next(wanted), count + 1
                    picture = tone_map(image, self.transfer) if self.transfer else image
                    yield Frame(picture, number / self.rate, f"{self.path.name}#{number}")
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


def tone_map(image: np.ndarray, transfer: str) -> Picture:
    """HDR code values uint16 (H, W, 3), BT.2020 with a transfer of HLG or PQ, as sRGB uint8.

    To light (ITU-R BT.2100), which is scaled by what happens to its luminance, and to BT.709's primaries (BT.2087).
    Paper white (203 cd/m2, BT.2408) counts as 1. Up to KNEE luminance stays; what is brighter is bent by the extended
    curve of Reinhard et al. (2002, eq. 4), so that PEAK becomes pure white and paper white 0.8.
    """
    # 16 bits are more than such a curve needs: a table of 4096 values costs a tenth of the powers.
    light = _light_table(transfer)[image >> 4]
    luminance = np.maximum(light @ np.array([0.2627, 0.6780, 0.0593], np.float32), 1e-6)
    if transfer == HLG:  # scene light to a display of 1000 cd/m2, BT.2100's system gamma
        light = light * (PEAK / REFERENCE_WHITE * luminance**0.2)[..., None]
        luminance = PEAK / REFERENCE_WHITE * luminance**1.2
    white = (PEAK / REFERENCE_WHITE - KNEE) / (1 - KNEE)
    above = np.maximum(luminance - KNEE, 0) / (1 - KNEE)
    mapped = np.minimum(luminance, KNEE) + (1 - KNEE) * above * (1 + above / white**2) / (1 + above)
    linear = np.clip((light * (mapped / luminance)[..., None]) @ BT2020_TO_BT709.T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray((255 * encoded + 0.5).astype(np.uint8))


@cache
def _light_table(transfer: str) -> np.ndarray:
    """Light (4096,) of code values 0..1: for HLG of the scene in 0..1, for PQ of the display, paper white is 1."""
    code = np.arange(4096, dtype=np.float64) / 4095
    if transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    else:
        power = code ** (1 / 78.84375)
        light = (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
        light *= 10000 / REFERENCE_WHITE
    return light.astype(np.float32)
