"""Label conventions: how (class, height, angle, instance) is read from a file name or from labels.csv, and numbered.

A label is int64 (class_idx, height_idx, angle_idx, instance_idx). Classes are numbered in natural order of their names
(obj5 before obj14), heights index `v_list`, angles are whole degrees 0..359. Instances, the individual objects of a
class, are numbered over the whole set in natural order of (class, instance name); -1 is an unknown one.
"""

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from graf.data.errors import DataError

LABELS_FILE = "labels.csv"
CAPTURE_FILE, CAPTURE_FOLDER = "capture.yaml", "capture_check"  # what graf capture leaves beside it, no photographs
LABELS_HEADER = ("file", "class", "height", "angle")
OPTIONAL_COLUMNS = ("instance", "split")
SPLITS = ("train", "validation", "test")
MAX_NAME = 100
DEFAULT_FILE_PATTERN = r"(?P<class>.+?)(?:_h(?P<height>\d+))?__(?P<angle>-?\d+(?:\.\d+)?)\.\w+"


@dataclass(frozen=True)
class LabelRow:
    """One photograph's label before names are numbered; `file` is relative to the data folder.

    `instance` is "" where it is not known, `split` is "" where data.heldout_every decides.
    """

    file: str
    class_name: str
    height: int
    angle: int
    instance: str = ""
    split: str = ""


def natural_key(text: str) -> tuple[tuple[int, int, str, str], ...]:
    """Sort key that orders numbers inside names by value, of any length: obj5 before obj14."""
    parts = [part for part in re.split(r"([0-9]+)", text) if part]
    digits = [part.lstrip("0") if part.isascii() and part.isdecimal() else None for part in parts]
    return tuple(
        (1, 0, part, "") if number is None else (0, len(number), number, part)
        for part, number in zip(parts, digits, strict=True)
    )


def check_name(name: str, what: str, where: str) -> str:
    """A name that may become part of a file name; raises DataError for one that could lead out of a folder."""
    is_plain = name.isprintable() and not set(name) & set("/\\") and name not in (".", "..")
    if not is_plain or len(name) > MAX_NAME:
        raise DataError(
            f"{where}: {what} {name[:MAX_NAME]!r}; expected a name of at most {MAX_NAME} printable characters without "
            "slashes, for files are named after it"
        )
    return name


def wrap_angle(degrees: float) -> int:
    """Whole degrees in 0..359; raises ValueError when `degrees` is not finite."""
    if not math.isfinite(degrees):
        raise ValueError(f"{degrees} is not a finite angle")
    return round(degrees) % 360


def compile_file_pattern(pattern: str | None) -> re.Pattern[str]:
    """The regular expression that reads labels from file names; None is the default: obj14__235.png, cup_h2__235.png.

    Named groups `class` and `angle` are required; `height` is optional and counts as 0 where it does not match, and so
    is `instance`, which is unknown there. A pattern with a "/" has to match the whole path relative to the data folder,
    any other the whole file name.
    """
    text = pattern or DEFAULT_FILE_PATTERN
    try:
        compiled = re.compile(text)
    except re.error as error:
        raise DataError(f"data.file_pattern={text!r} is not a regular expression: {error}") from error
    missing = [group for group in ("class", "angle") if group not in compiled.groupindex]
    if missing:
        raise DataError(
            f"data.file_pattern={text!r}: named group(s) {', '.join(missing)} missing; "
            f"expected (?P<class>...) and (?P<angle>...), optionally (?P<height>...) and (?P<instance>...)"
        )
    return compiled


def parse_file_name(file: str, pattern: re.Pattern[str]) -> LabelRow | None:
    """The label in the name of `file` (relative to the data folder, with "/"); None when the pattern does not match."""
    match = pattern.fullmatch(file if "/" in pattern.pattern else file.rsplit("/", 1)[-1])
    if match is None:
        return None
    groups = match.groupdict()
    if not groups["class"] or not groups["angle"]:  # optional in this pattern, and absent in this name
        return None
    try:
        height, angle = int(groups.get("height") or 0), wrap_angle(float(groups["angle"]))
    except ValueError as error:
        raise DataError(
            f"{file}: data.file_pattern found height {groups.get('height')!r} and angle {groups['angle']!r}; "
            f"expected a whole number and degrees; correct data.file_pattern={pattern.pattern!r}"
        ) from error
    return LabelRow(file, groups["class"], height, angle, groups.get("instance") or "")


def read_labels_csv(path: Path) -> list[LabelRow]:
    """Rows of a labels.csv with the columns file,class,height,angle (any order; further columns are allowed).

    `file` is relative to the csv's folder, `height` an index into v_list, `angle` degrees. Two columns are optional:
    `instance` names the object, `split` (train, validation or test) says where its photograph belongs whatever
    data.heldout_every is; both may be empty. Raises DataError that names the file, the line, what was found and what
    was expected.
    """
    try:
        return _read_rows(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8 (in Excel: CSV UTF-8)") from error
    except csv.Error as error:
        raise DataError(f"{path}: is not a CSV file ({error}); expected {','.join(LABELS_HEADER)}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); allow it to be read") from error


def _read_rows(path: Path) -> list[LabelRow]:
    rows: list[LabelRow] = []
    seen: dict[str, int] = {}
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        found = reader.fieldnames or []
        if not set(LABELS_HEADER) <= set(found):
            raise DataError(
                f"{path}, line 1: found {','.join(found) or 'nothing'}; expected the header {','.join(LABELS_HEADER)}"
            )
        for entry in reader:
            where = f"{path}, line {reader.line_num}"
            row = _read_row(entry, where)
            if row.file in seen:
                raise DataError(f"{where}: {row.file!r} is already in line {seen[row.file]}; expected each file once")
            seen[row.file] = reader.line_num
            rows.append(row)
    return rows


def spell_path(file: str) -> str:
    """A path as labels.csv may hold it (./a.png, a\\b.png) in the one form in which paths are compared."""
    return PurePosixPath(file.strip().replace("\\", "/")).as_posix()


def _read_row(entry: dict[str, str | None], where: str) -> LabelRow:
    values = {column: (entry.get(column) or "").strip() for column in LABELS_HEADER + OPTIONAL_COLUMNS}
    for column in ("file", "class"):
        if not values[column]:
            raise DataError(f"{where}: column {column!r} is empty; expected {'/'.join(LABELS_HEADER)} in every line")
    try:
        height = int(values["height"])
    except ValueError as error:
        raise DataError(
            f"{where}: height {values['height']!r}; expected a whole number, an index into data.v_list"
        ) from error
    try:
        angle = wrap_angle(float(values["angle"]))
    except ValueError as error:
        raise DataError(f"{where}: angle {values['angle']!r}; expected degrees") from error
    if values["split"] not in ("", *SPLITS):
        raise DataError(f"{where}: split {values['split']!r}; expected {', '.join(SPLITS)} or nothing")
    return LabelRow(spell_path(values["file"]), values["class"], height, angle, values["instance"], values["split"])


def check_heights(rows: Iterable[LabelRow], v_list: Sequence[float], source: str) -> None:
    """Raise DataError at the first row whose height is no index into `v_list`; `source` says where labels came from."""
    for row in rows:
        if not 0 <= row.height < len(v_list):
            raise DataError(
                f"{source}: {row.file} has height {row.height}, but data.v_list has {len(v_list)} "
                f"heights (indices 0..{len(v_list) - 1}); correct the label or data.v_list"
            )


def number_labels(rows: Sequence[LabelRow], class_names: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Labels int64 (N, 4) of `rows`, with classes numbered by their place in `class_names`, and the instances' names.

    An instance is called class/name, because instances of two classes may share a name.
    """
    classes = {name: index for index, name in enumerate(class_names)}
    pairs = {(classes[row.class_name], row.instance) for row in rows if row.instance}
    ordered = sorted(pairs, key=lambda pair: (pair[0], natural_key(pair[1])))
    instances = {pair: number for number, pair in enumerate(ordered)}
    labels = []
    for row in rows:
        class_idx = classes[row.class_name]
        labels.append((class_idx, row.height, row.angle, instances.get((class_idx, row.instance), -1)))
    names = [f"{class_names[class_idx]}/{name}" for class_idx, name in ordered]
    return torch.tensor(labels, dtype=torch.int64).reshape(-1, 4), names


def balance_instances(labels: Tensor) -> list[int]:
    """How often to show each photograph, (N, 4) labels, so that those of known instances make about half of a batch.

    A known instance is learned from its own photographs alone: rare ones are shown again, the others once.
    """
    is_known = labels[:, 3] >= 0
    known = int(is_known.sum())
    times = max(1, round((len(labels) - known) / known)) if known else 1
    return torch.where(is_known, times, 1).tolist()
