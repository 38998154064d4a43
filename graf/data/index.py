"""What photographs a folder holds and how they are labelled, without opening them: turntable, transforms, image folder.

A photograph that cannot be used is never dropped silently: every index carries a LoadReport that names it.
"""

import difflib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from graf.data.errors import DataError
from graf.data.images import IMAGE_SUFFIXES
from graf.data.labels import (
    CAPTURE_FILE,
    CAPTURE_FOLDER,
    LABELS_FILE,
    LabelRow,
    check_heights,
    check_name,
    compile_file_pattern,
    natural_key,
    number_labels,
    parse_file_name,
    read_labels_csv,
)
from graf.data.lens import read_lens
from graf.geometry.cameras import angle_label, angles_from_pose

MAX_DERIVED_HEIGHTS = 8
NAMES_SHOWN = 5


@dataclass
class LoadReport:
    """What was found besides usable photographs: lists of file names, with the reason where there is one."""

    unreadable: list[str] = field(default_factory=list)  # corrupt or truncated, or not an image despite the suffix
    unlabelled: list[str] = field(default_factory=list)  # images outside of the pattern, labels.csv or class folders
    missing: list[str] = field(default_factory=list)  # labelled, but no such file
    closed: list[str] = field(default_factory=list)  # folders that cannot be read
    not_images: list[str] = field(default_factory=list)  # other files; harmless, so not an error even when strict
    outside: list[str] = field(default_factory=list)  # used, but links or paths lead out of the folder to them
    repeated: list[str] = field(default_factory=list)  # folders left out, as links lead to what was read already
    lens: list[str] = field(default_factory=list)  # keys of transforms.json that hardly move what is seen
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height) of the usable photographs

    def problems(self) -> list[tuple[str, list[str]]]:
        """The non-empty lists of photographs that were skipped: (what is wrong, names)."""
        kinds = (
            ("unreadable photographs", self.unreadable),
            ("photographs without a label", self.unlabelled),
            ("labelled photographs that are missing", self.missing),
            ("folders that cannot be read", self.closed),
        )
        return [(what, names) for what, names in kinds if names]

    def lines(self) -> list[str]:
        """One line for each kind of skipped, ignored or distant file: count and first names."""
        harmless = [
            ("files that are not images", self.not_images),
            ("photographs outside of the folder, by links or paths", self.outside),
            ("folders that links lead to a second time, left out", self.repeated),
            ("keys of the lens are passed over (how far each moves the edge of a picture, of its width)", self.lens),
        ]
        noted = self.problems() + [(what, names) for what, names in harmless if names]
        return [f"{len(names)} {what}: {_list_names(names)}" for what, names in noted]

    def closed_folders(self) -> str:
        """For an error about photographs that are not there: the folders that they may be in."""
        return f" (folders that cannot be read: {_list_names(self.closed)})" if self.closed else ""


@dataclass(frozen=True)
class PhotoIndex:
    """Photographs by path with labels int64 (N, 4) and, where they are known apart from labels, poses (N, 4, 4).

    `instance_names` are those that labels number, class/name; `splits` has train, validation, test or "" for each
    photograph, "" where data.heldout_every decides.
    """

    root: Path
    paths: list[Path]
    labels: Tensor
    class_names: list[str]
    instance_names: list[str]
    splits: list[str]
    v_list: tuple[float, ...]
    report: LoadReport
    poses: Tensor | None = None
    poses_known: bool = True
    camera_angle_x: float | None = None  # radians, across the whole width of the photograph

    def select(self, indices: Sequence[int]) -> "PhotoIndex":
        """The index of the photographs at `indices`, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return replace(
            self,
            paths=[self.paths[index] for index in chosen.tolist()],
            labels=self.labels[chosen],
            splits=[self.splits[index] for index in chosen.tolist()],
            poses=None if self.poses is None else self.poses[chosen],
        )

    def keep_classes(self, classes: Sequence[str]) -> "PhotoIndex":
        """The index of these classes and their instances, numbered anew; raises DataError for an unknown class."""
        for name in classes:
            if name not in self.class_names:
                nearest = difflib.get_close_matches(name, self.class_names, n=1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise DataError(
                    f"data.classes: {name!r} is not in {self.root}; it has {_list_names(self.class_names)}{hint}"
                )
        kept = [name for name in self.class_names if name in classes]
        renumber = torch.tensor([kept.index(name) if name in kept else -1 for name in self.class_names])
        new_classes = renumber[self.labels[:, 0]]
        index = self.select(torch.nonzero(new_classes >= 0)[:, 0].tolist())
        instances = index.labels[:, 3].contiguous()
        kept_instances = instances[instances >= 0].unique()  # sorted
        labels = index.labels.clone()
        labels[:, 0] = new_classes[new_classes >= 0]
        labels[:, 3] = torch.where(instances >= 0, torch.searchsorted(kept_instances, instances), -1)
        names = [self.instance_names[number] for number in kept_instances.tolist()]
        return replace(index, labels=labels, class_names=kept, instance_names=names)

    def names(self) -> list[str]:
        """Paths relative to the data folder, with "/"."""
        return [os.path.relpath(path, self.root).replace(os.sep, "/") for path in self.paths]


def index_turntable(root: Path, v_list: Sequence[float] | None, file_pattern: str | None) -> PhotoIndex:
    """Photographs labelled by labels.csv in `root` or, where there is none, by file names (also in sub-folders)."""
    _check_folder(root, "photographs labelled by file name (obj14__235.png) or by labels.csv")
    if not v_list:
        raise DataError(
            "data.v_list is empty: a turntable set needs one v in [0, 1] for each camera height, "
            "v = (1 - sin(elevation)) / 2, for example [0.31] for one camera 22 degrees above the table"
        )
    report = LoadReport()
    labels_path = root / LABELS_FILE
    if os.path.isfile(labels_path):
        rows = _list_labelled(root, read_labels_csv(labels_path), report)
        source = str(labels_path)
        if not rows:
            raise DataError(f"{labels_path}: has no rows; expected one for each photograph, or remove the file")
    else:
        pattern = compile_file_pattern(file_pattern)
        rows = []
        for file in _list_images(root, report):
            row = parse_file_name(file, pattern)
            if row is None:
                report.unlabelled.append(file)
            else:
                rows.append(row)
        source = f"{root}, labels from file names"
        if not rows and report.unlabelled:
            raise DataError(
                f"{root}: none of the {len(report.unlabelled)} image names ({_list_names(report.unlabelled)}) matches "
                f"{pattern.pattern!r}; set data.file_pattern or write a {LABELS_FILE} (file,class,height,angle)"
            )
    if not rows:
        raise DataError(
            f"{root}: no photographs; expected names like obj14__235.png or a {LABELS_FILE}; correct data.datadir"
            f"{report.closed_folders()}"
        )
    check_heights(rows, v_list, source)
    return _index_rows(root, rows, v_list, report)


def index_transforms(path: Path, v_list: Sequence[float] | None) -> PhotoIndex:
    """Photographs with true poses from NeRF's transforms_*.json.

    `path` is a folder with transforms_train.json (or transforms.json), or one such file. Poses are taken as they
    stand (OpenGL camera-to-world, world z-up, object at the origin; their radius may vary), the lens as `read_lens`
    takes it. Labels: class 0, the nearest entry of `v_list` (where it is not given: the centres of at most 8 equal bins
    over the poses' v), the pose's label angle, instance -1.
    """
    transforms_path = _find_transforms(path)
    root = transforms_path.parent
    content = _read_transforms(transforms_path)
    frames, used = content["frames"], {}
    report = LoadReport()
    paths: list[Path] = []
    matrices: list[Tensor] = []
    for number, frame in enumerate(frames):
        file, matrix = _read_frame(frame, f"{transforms_path}, frame {number}")
        image_path = _find_frame_image(root, file)
        if image_path is None:
            report.missing.append(file)
        else:
            used[number] = frame
            paths.append(image_path)
            matrices.append(matrix)
    if not paths:
        raise DataError(
            f"{transforms_path}: none of its {len(frames)} photographs is there ({_list_names(report.missing)}); "
            f"expected them relative to {root}, with or without suffix"
        )
    camera_angle_x, report.lens = read_lens(content, used, str(transforms_path))
    if camera_angle_x is None:
        raise DataError(
            f"{transforms_path}: found {_list_names(content)}; expected camera_angle_x in radians, or fl_x and w in "
            "pixels"
        )
    _note_outside(root, paths, report)
    poses = torch.stack(matrices)
    u, v = angles_from_pose(poses)
    heights = tuple(v_list or derive_heights(v))
    height_idx = (v[:, None] - torch.tensor(heights, dtype=v.dtype)).abs().argmin(dim=1)
    zeros = torch.zeros_like(height_idx)
    labels = torch.stack((zeros, height_idx, angle_label(u), zeros - 1), dim=1)
    return PhotoIndex(
        root,
        paths,
        labels,
        class_names=[root.resolve().name],
        instance_names=[],
        splits=[""] * len(paths),
        v_list=heights,
        report=report,
        poses=poses.float(),
        camera_angle_x=camera_angle_x,
    )


def derive_heights(v: Tensor, count: int = MAX_DERIVED_HEIGHTS) -> list[float]:
    """Centres of `count` equal bins over the range of `v`; a single entry where all heights agree to 1e-3."""
    low, high = v.min().item(), v.max().item()
    if high - low < 1e-3:
        return [(low + high) / 2]
    return [low + (high - low) * (index + 0.5) / count for index in range(count)]


def index_image_folder(root: Path, v_list: Sequence[float] | None) -> PhotoIndex:
    """Photographs without poses: class folders where sub-folders hold images (as in torchvision), else one class.

    Heights and angles are unknown and stored as 0, instances as -1.
    """
    _check_folder(root, "photographs, or one sub-folder of photographs for each class")
    report = LoadReport()
    files = _list_images(root, report)
    in_folders = [file for file in files if "/" in file]
    if in_folders:
        report.unlabelled += [file for file in files if "/" not in file]
        rows = [LabelRow(file, file.split("/", 1)[0], 0, 0) for file in in_folders]
    else:
        rows = [LabelRow(file, root.resolve().name, 0, 0) for file in files]
    if not rows:
        raise DataError(
            f"{root}: no photographs; expected image files ({', '.join(sorted(IMAGE_SUFFIXES))}) in it or in class "
            f"folders; correct data.datadir{report.closed_folders()}"
        )
    return replace(_index_rows(root, rows, v_list or (0.5,), report), poses_known=False)


def _index_rows(root: Path, rows: Sequence[LabelRow], v_list: Sequence[float], report: LoadReport) -> PhotoIndex:
    class_names = sorted({row.class_name for row in rows}, key=natural_key)
    for name in class_names:
        check_name(name, "class", str(root))
    labels, instance_names = number_labels(rows, class_names)
    paths, splits = [root / row.file for row in rows], [row.split for row in rows]
    _note_outside(root, paths, report)
    return PhotoIndex(root, paths, labels, class_names, instance_names, splits, tuple(v_list), report)


def _note_outside(root: Path, paths: Sequence[Path], report: LoadReport) -> None:
    inside = root.resolve()
    report.outside += [
        os.path.relpath(path, root).replace(os.sep, "/") for path in paths if inside not in path.resolve().parents
    ]


def _check_folder(root: Path, expected: str) -> None:
    if not os.path.isdir(root):
        found = "is a file" if os.path.exists(root) else "does not exist"
        raise DataError(
            f"data.datadir={root} {found}; expected a folder of {expected}; correct data.datadir (in graf eval "
            f"and graf view: --datadir), or train with data.type=synthetic, which makes its own data"
        )


def _list_images(root: Path, report: LoadReport) -> list[str]:
    """Image files under `root` in natural order, relative to it; other files go into the report."""
    images = []
    files, report.repeated, report.closed = _list_files(root)
    for file in files:
        if Path(file).suffix.lower() in IMAGE_SUFFIXES:
            images.append(file)
        else:
            report.not_images.append(file)
    return images


def _list_files(root: Path) -> tuple[list[str], list[str], list[str]]:
    """Files under `root` in natural order, relative to it, but for hidden ones, which are no part of a set; folders
    that are left out, as links lead there from elsewhere too; and folders that cannot be read. Raises DataError where
    `root` cannot.
    """
    files, repeated, closed, seen = [], [], [], set()

    def note_closed(error: OSError) -> None:
        if Path(error.filename) == root:
            raise DataError(f"{root} cannot be read ({error.strerror}); allow it to be read") from error
        closed.append(f"{Path(error.filename).relative_to(root).as_posix()} ({error.strerror})")

    for folder, folders, names in os.walk(root, onerror=note_closed, followlinks=True):
        inside = Path(folder).relative_to(root)
        real = os.path.realpath(folder)
        if real in seen:
            repeated.append(inside.as_posix())
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        files += [(inside / name).as_posix() for name in names if not _is_hidden(name)]
    return sorted(files, key=natural_key), repeated, closed


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is one that programs keep for themselves: .git, ._a.png and __MACOSX of macOS."""
    return name.startswith(".") or name == "__MACOSX"


def _list_labelled(root: Path, rows: list[LabelRow], report: LoadReport) -> list[LabelRow]:
    """Rows whose file exists; image files that labels.csv leaves out go into the report, wherever they are.

    Except companions of labelled photographs: depth/a.png and mask/a.png belong to a.png; and what graf capture writes
    besides photographs. A name that only another form of Unicode tells from a file's, as on a Mac, is that file's.
    """
    files, _, report.closed = _list_files(root)
    forms = {unicodedata.normalize("NFC", file): file for file in files}
    present = []
    for row in rows:
        found = row.file if os.path.isfile(root / row.file) else forms.get(unicodedata.normalize("NFC", row.file))
        if found is None:
            report.missing.append(row.file)
        else:
            present.append(replace(row, file=found))
    labelled = {PurePosixPath(row.file) for row in present}
    folders = {PurePosixPath("."), *(file.parent for file in labelled)}
    own_files = (LABELS_FILE, CAPTURE_FILE)
    for file in map(PurePosixPath, files):
        if file in labelled or str(file) in own_files or file.parts[0] == CAPTURE_FOLDER:
            continue
        if file.suffix.lower() in IMAGE_SUFFIXES:
            if file.parent.parent / file.name not in labelled:
                report.unlabelled.append(str(file))
        elif file.parent in folders:
            report.not_images.append(str(file))
    if rows and not present:
        raise DataError(
            f"{root / LABELS_FILE}: none of its {len(rows)} photographs is there ({_list_names(report.missing)}); "
            f"expected paths relative to {root}{report.closed_folders()}"
        )
    return present


def _find_transforms(path: Path) -> Path:
    if os.path.isfile(path):
        return path
    _check_folder(path, "NeRF photographs with transforms_train.json, or that file itself")
    for name in ("transforms_train.json", "transforms.json"):
        if os.path.isfile(path / name):
            return path / name
    others = sorted(other.name for other in path.glob("*.json"))
    raise DataError(
        f"{path}: found {_list_names(others) if others else 'no .json file'}; expected transforms_train.json or "
        f"transforms.json; data.datadir may also name one transforms file"
    )


def _read_transforms(path: Path) -> dict[str, Any]:
    """The file's object, which has a list of frames."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); expected NeRF's camera_angle_x and frames") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); allow it to be read") from error
    keys = list(content) if isinstance(content, dict) else [type(content).__name__]
    if not isinstance(content, dict) or not isinstance(content.get("frames"), list) or not content["frames"]:
        raise DataError(f"{path}: found {_list_names(keys)}; expected camera_angle_x and a non-empty list 'frames'")
    return content


def _read_frame(frame: Any, where: str) -> tuple[str, Tensor]:
    if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str) or "transform_matrix" not in frame:
        raise DataError(f"{where}: expected an object with file_path and transform_matrix")
    try:
        matrix = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DataError(f"{where}: transform_matrix is not a matrix of numbers; expected 4 x 4") from error
    if matrix.shape != (4, 4) or not torch.isfinite(matrix).all():
        raise DataError(f"{where}: transform_matrix has shape {tuple(matrix.shape)}; expected 4 x 4 finite numbers")
    rotation = matrix[:3, :3]
    deviation = (rotation @ rotation.T - torch.eye(3, dtype=torch.float64)).abs().max().item()
    if deviation > 1e-3 or torch.linalg.det(rotation) < 0:
        raise DataError(
            f"{where}: transform_matrix is no camera-to-world rotation (R R^T differs from 1 by {deviation:.2g}, "
            f"det R = {torch.linalg.det(rotation).item():.3g}); expected an OpenGL pose without scale or mirror"
        )
    return frame["file_path"], matrix


def _find_frame_image(root: Path, file: str) -> Path | None:
    suffixes = ["", *sorted(IMAGE_SUFFIXES, key=lambda suffix: suffix != ".png")]
    candidates = (root / f"{file}{suffix}" for suffix in suffixes)
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), None)


def _list_names(names: Iterable[str]) -> str:
    all_names = list(names)
    more = f" and {len(all_names) - NAMES_SHOWN} more" if len(all_names) > NAMES_SHOWN else ""
    listed = ", ".join(all_names[:NAMES_SHOWN]) + more
    return listed.encode(errors="backslashreplace").decode()  # names of files may be any bytes, logs are UTF-8
