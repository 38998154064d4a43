"""The set of photographs that captures build up in a folder: labels.csv, a folder of pictures for each, their cameras.

Whatever ends a capture leaves the set as it was: pictures go into a new folder, then capture.yaml tells of the cameras,
and labels.csv, which is replaced as a whole, is the last file to be written.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from graf.base.files import create_folder, remove_leftovers, write_atomically
from graf.capture.errors import CaptureError
from graf.data.errors import DataError
from graf.data.images import DECODER_ERRORS, FORMATS
from graf.data.labels import CAPTURE_FILE, LABELS_FILE, LABELS_HEADER, LabelRow, check_name, read_labels_csv, spell_path
from graf.runtime.run_lock import LockedError, RunLock, UnwritableError

COLUMNS = (*LABELS_HEADER, "instance")
MAX_SUBJECT = 200  # bytes: names of files have a number and endings besides, and disks take 255
SAME_HEIGHT = 0.004  # of v: about half a degree of elevation


@dataclass(frozen=True)
class Subject:
    """What was photographed: an object's class, its name in the class or "", and the index of the camera's height."""

    class_name: str
    instance: str
    height: int

    def shows(self, row: LabelRow) -> bool:
        """Whether a photograph is of this object from this height."""
        return Subject.of(row) == self

    @classmethod
    def of(cls, row: LabelRow) -> Subject:
        """What a photograph shows."""
        return cls(row.class_name, row.instance, row.height)

    @property
    def name(self) -> str:
        """For folders and messages: duck, duck_mine, duck_h1."""
        height = f"h{self.height}" if self.height else ""
        return "_".join(part for part in (self.class_name, self.instance, height) if part)


@contextmanager
def work_in(folder: Path) -> Iterator[None]:
    """Work on a set alone, what captures that were killed left in it being removed. Raises CaptureError."""
    try:
        with RunLock(folder):
            remove_leftovers(folder)
            for leftover in folder.glob(".*.saving"):
                shutil.rmtree(leftover)
            yield
    except UnwritableError as error:
        raise CaptureError(f"--out {folder}: cannot be written; choose another folder") from error
    except LockedError as error:
        raise CaptureError(f"--out {folder}: another program works there; wait for it, or stop it") from error


def read_rows(folder: Path) -> list[LabelRow]:
    """The photographs that a set has; none where there is no set yet. Raises DataError for a broken labels.csv."""
    file = folder / LABELS_FILE
    return read_labels_csv(file) if file.is_file() else []


def check_subject(rows: Sequence[LabelRow], subject: Subject, replace: bool) -> None:
    """Raises CaptureError where a subject's names cannot be used, or it is there already and not to be replaced."""
    for what, name in (("class", subject.class_name), ("instance", subject.instance)):
        try:
            check_name(name, what, f"--{what}")
        except DataError as error:
            raise CaptureError(str(error)) from error
    if (length := len(subject.name.encode())) > MAX_SUBJECT:
        raise CaptureError(
            f"--class {subject.class_name}: names of class and instance take {length} bytes in UTF-8; expected at most "
            f"{MAX_SUBJECT}, for folders and files are named after them"
        )
    if not subject.class_name.strip() or subject.class_name.startswith("."):
        raise CaptureError(f"--class {subject.class_name!r}: expected a name, for example --class duck")
    same = [row for row in rows if subject.shows(row)]
    if same and not replace:
        raise CaptureError(
            f"--class {subject.class_name}: {len(same)} photographs of {subject.name} are there already; give another "
            "--class, name the object with --instance, film it from another --elevation, or use --replace"
        )
    named = {bool(row.instance) for row in rows}
    if named and named != {bool(subject.instance)}:
        have = "have no names" if named == {False} else "have names (--instance)"
        raise CaptureError(
            f"--instance {subject.instance or 'is missing'}: the objects of this set {have}; name all of them or none, "
            "for training takes a class without names for one object"
        )


def height_index(v_list: Sequence[float], v: float) -> tuple[int, list[float]]:
    """The index of a height v among those of a set, which is extended where it is none of them, and all heights."""
    distances = [abs(known - v) for known in v_list]
    if distances and min(distances) < SAME_HEIGHT:
        return distances.index(min(distances)), list(v_list)
    return len(v_list), [*v_list, round(v, 4)]


def widest_extent(folder: Path, rows: Iterable[LabelRow]) -> float | None:
    """How wide an object is in its pictures, as a share of their side, by their transparency; None without any.

    Raises CaptureError where one cannot be read.
    """
    held: Any = None
    for row in rows:
        with _open_picture(folder / row.file) as image:
            if image.mode != "RGBA":
                return None
            columns = (np.asarray(image.getchannel("A")) >= 128).any(axis=0)
        held = columns if held is None or held.shape != columns.shape else held | columns
    if held is None or not held.any():
        return None
    places = np.nonzero(held)[0]
    return float((places[-1] - places[0] + 1) / len(held))


def has_masks(folder: Path, rows: Iterable[LabelRow]) -> bool | None:
    """Whether the pictures of a set are transparent around their objects, as the first that captures made tells; None
    where there is none. Raises CaptureError where it cannot be read.
    """
    for row in rows:
        if _was_captured(row) and (folder / row.file).is_file():
            with _open_picture(folder / row.file) as image:
                return image.mode == "RGBA"
    return None


@contextmanager
def _open_picture(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except DECODER_ERRORS as error:
        raise CaptureError(f"{file} cannot be read ({error}), which new pictures have to fit; put it back") from error


def add_photographs(
    folder: Path,
    rows: Sequence[LabelRow],
    subject: Subject,
    pictures: Iterable[tuple[int, Image.Image]],
    configuration: str,
) -> list[LabelRow]:
    """Add pictures, each with its angle in whole degrees, to the set of `rows`; returns all rows of the new one.

    configuration: capture.yaml from now on. Photographs of the same subject are replaced. Raises OSError.
    """
    place, added = free_folder(folder, subject.name), []
    with create_folder(place) as staged:
        for angle, picture in pictures:
            file = _free_name(staged, f"{subject.name}_{angle:03d}")
            picture.save(staged / file, format="PNG")
            added.append(LabelRow(f"{place.name}/{file}", subject.class_name, subject.height, angle, subject.instance))
    replaced = [row for row in rows if subject.shows(row)]
    labels = _compose_labels(folder / LABELS_FILE, {row.file for row in replaced}, added)
    _tell_of(place, configuration, labels)
    for row in replaced:
        if _was_captured(row):
            (folder / row.file).unlink(missing_ok=True)
            _remove_empty((folder / row.file).parent)
    return [*(row for row in rows if not subject.shows(row)), *added]


def _tell_of(pictures: Path, configuration: str, labels: str) -> None:
    """Write capture.yaml, where it changes, and labels.csv, which name new pictures; without both the pictures go."""
    config_file, labels_file = pictures.parent / CAPTURE_FILE, pictures.parent / LABELS_FILE
    before = _read_text(config_file)
    try:
        if before != configuration:
            write_atomically(config_file, configuration)
        write_atomically(labels_file, labels)
    except BaseException:
        if _read_text(labels_file) != labels:  # else an interrupt has come after it took its place
            shutil.rmtree(pictures, ignore_errors=True)
            if before is None:
                config_file.unlink(missing_ok=True)
            elif before != configuration:
                write_atomically(config_file, before)
        raise


def _read_text(file: Path) -> str | None:
    """A file's text with its line ends; None where there is no file."""
    return file.read_bytes().decode("utf-8") if file.is_file() else None


def _compose_labels(file: Path, replaced: set[str], added: Sequence[LabelRow]) -> str:
    """labels.csv with the rows that are there, but for those of `replaced` files, as a person has filled them in."""
    columns, kept = list(COLUMNS), []
    if file.is_file():
        with file.open(newline="", encoding="utf-8-sig") as former:
            reader = csv.DictReader(former)
            columns = list(dict.fromkeys([*(reader.fieldnames or ()), *COLUMNS]))
            kept = [entry for entry in reader if spell_path(entry["file"]) not in replaced]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(kept)
    for row in added:
        values = (row.file, row.class_name, row.height, row.angle, row.instance)
        writer.writerow(dict(zip(COLUMNS, values, strict=True)))
    return stream.getvalue()


def _was_captured(row: LabelRow) -> bool:
    """Whether a photograph has the folder and the name that captures give theirs; one of a person's own has not."""
    name = re.escape(Subject.of(row).name)
    return re.fullmatch(rf"{name}(-\d+)?/{name}_\d{{3}}(-\d+)?\.png", row.file) is not None


def free_folder(folder: Path, name: str) -> Path:
    """A folder of that name which is not there: name, name-2, ..."""
    places = (folder / (name if number == 1 else f"{name}-{number}") for number in range(1, 10**6))
    return next(place for place in places if not place.exists())


def _free_name(folder: Path, stem: str) -> str:
    """A file name that is not taken: two frames may have the same whole degree."""
    names = (f"{stem}.png" if number == 1 else f"{stem}-{number}.png" for number in range(1, 10**6))
    return next(name for name in names if not (folder / name).exists())


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
