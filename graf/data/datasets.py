"""Photographs as a torch Dataset of (image in [-1, 1], label), opened from one plain settings object.

How folders are read is in index.py, how a file becomes an image in images.py.
"""

import difflib
import hashlib
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from graf.data.errors import DataError
from graf.data.images import UnreadableImage, quiet_decoders, read_image, read_image_size, scale_pixels, square_side
from graf.data.index import PhotoIndex, index_image_folder, index_transforms, index_turntable
from graf.data.labels import LABELS_FILE
from graf.data.synthetic import DEFAULT_V_LIST, SyntheticSettings, ensure_synthetic
from graf.runtime.logs import logger, progress_bar, warn_once

DATA_TYPES = ("synthetic", "turntable", "transforms", "image_folder")
SUBSETS = ("train", "validation", "test", "all")
DECODING_THREADS = 4


@dataclass(frozen=True)
class DataSettings:
    """Everything that opening a data set needs, named as in the config's `data` section, which alone has defaults.

    `v_list` is required for turntable, derived from the poses for transforms where it is None, and defaults to
    synthetic.py's heights for the synthetic set. `classes` keeps these classes only. `heldout_every` k > 0 holds out
    every k-th of the sorted distinct label angles, beginning with the first (turntable, synthetic), or every k-th
    photograph (transforms, image_folder); of these the first, third, ... are the test split, by which a run is
    reported, the others the validation split, by which choices are made. Photographs to which labels.csv gives a split
    belong there instead. Larger photographs than `max_megapixels` are skipped. `strict` turns skipped photographs into
    a DataError. `crop` is the side of the central square that is used, in pixels, where it is not the largest one. Sets
    that fit `cache_mib` MiB as uint8 are decoded when they are opened; larger ones when an image is asked for.
    `radius`, `fov` (degrees) and the synthetic_* fields act on the synthetic set only.
    """

    type: str
    datadir: str | Path
    imsize: int
    crop: int | None
    white_bkgd: bool
    v_list: tuple[float, ...] | None
    angle_direction: str
    file_pattern: str | None
    classes: tuple[str, ...] | None
    heldout_every: int
    max_megapixels: float
    strict: bool
    cache_mib: float
    radius: float
    fov: float
    synthetic_count: int
    synthetic_seed: int
    synthetic_instances: int
    synthetic_known_instances: int | None
    synthetic_heldout_instances: int
    subset: str = "train"

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("type", self.type, DATA_TYPES),
            ("subset", self.subset, SUBSETS),
            ("angle_direction", self.angle_direction, ("ccw", "cw")),
        ):
            if value not in allowed:
                nearest = difflib.get_close_matches(str(value), allowed, n=1)
                hint = f"; did you mean {nearest[0]}?" if nearest else ""
                raise DataError(f"data.{key}={value!r}: expected one of {', '.join(allowed)}{hint}")
        if self.angle_direction == "cw" and self.type in ("synthetic", "transforms"):
            raise DataError(
                f"data.angle_direction=cw: data.type={self.type} has known poses, counter-clockwise; set ccw"
            )
        if self.imsize < 1:
            raise DataError(f"data.imsize={self.imsize}: expected at least 1 pixel")
        if self.heldout_every < 0 or self.heldout_every == 1:
            raise DataError(f"data.heldout_every={self.heldout_every}: expected 0 (none) or at least 2")
        if any(not 0 <= v <= 1 for v in self.v_list or ()):
            raise DataError(
                f"data.v_list={list(self.v_list or ())}: expected heights v in [0, 1], v = (1 - sin(elevation)) / 2"
            )

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], subset: str = "train") -> "DataSettings":
        """Settings from the config's `data` section as a plain dict; keys of others (near, umin, ...) are ignored."""
        values = {item.name: data[item.name] for item in fields(cls) if item.name in data}
        values |= {f"synthetic_{key}": value for key, value in data["synthetic"].items()}
        for key in ("v_list", "classes"):
            if values.get(key) is not None:
                values[key] = tuple(values[key])
        return cls(**values | {"subset": subset})


class PhotoDataset(Dataset[tuple[Tensor, Tensor]]):
    """Square photographs float32 (3, imsize, imsize) in [-1, 1] with labels int64 (4,).

    Attributes: `labels` (N, 4); `poses` (N, 4, 4) camera-to-world or None, where they follow from the labels
    (`poses_known`) or are unknown; `class_names`; `instance_names`; `v_list`; `paths`; `imsize`; `fov` in degrees
    across the square image, or None where the set does not tell; `report`; `pixels` uint8 (N, 3, imsize, imsize) of a
    set that was decoded when it was opened, else None.
    """

    def __init__(
        self, index: PhotoIndex, settings: DataSettings, pixels: Tensor | None = None, fov: float | None = None
    ) -> None:
        self.index = index
        self.settings = settings
        self.labels = index.labels
        self.poses = index.poses
        self.poses_known = index.poses_known
        self.class_names = index.class_names
        self.instance_names = index.instance_names
        self.v_list = index.v_list
        self.paths = index.paths
        self.report = index.report
        self.imsize = settings.imsize
        self.fov = fov
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image and label."""
        image, number = self.read(index)
        return image, self.labels[number]

    def read(self, index: int) -> tuple[Tensor, int]:
        """An image, and the number of the photograph that it is.

        A file that was not decoded at opening may turn out to be unreadable. The next one then replaces it, which is
        reported once, so that training continues; with `strict`, or when none is left, it is a DataError.
        """
        if self.pixels is not None:
            return scale_pixels(self.pixels[index]), index
        for number in chain([index], range(index + 1, len(self)), range(index)):  # past the end: an IndexError
            pixels = self._try_pixels(number)
            if pixels is not None:
                return scale_pixels(pixels), number
        raise DataError(f"{self.index.root}: none of its {len(self)} photographs can be read any more; restore them")

    def _try_pixels(self, number: int) -> Tensor | None:
        try:
            with quiet_decoders():
                return _read_pixels(self.paths[number], self.settings)
        except UnreadableImage as error:
            if self.settings.strict:
                raise DataError(
                    f"{self.paths[number]} cannot be read ({error}), and data.strict=true makes this an error; repair "
                    f"or remove it, or set data.strict=false"
                ) from error
            warn_once(
                f"{self.paths[number]} cannot be read ({error}): the next photograph replaces it; repair or remove it, "
                f"or raise data.cache_mib so that all are decoded when the set is opened"
            )
            return None

    def fingerprint(self) -> str:
        """Hash of these photographs as images of their size: of `identity`, times of change, size, crop, background."""
        settings = self.settings
        how = f"{settings.imsize} {settings.crop} {settings.white_bkgd}"
        changed = [changed for _, changed in self._files]  # formats without compression keep their size
        return hashlib.sha256(f"{how} {self.identity} {changed}".encode()).hexdigest()[:16]

    @cached_property
    def identity(self) -> str:
        """Hash of file names and sizes, labels, heights and poses: same for equal data, and for a copy of it."""
        digest = hashlib.sha256(f"{self.v_list}".encode())
        poses = self.poses if self.poses is not None else [None] * len(self)
        for name, file, label, pose in zip(self.index.names(), self._files, self.labels.tolist(), poses, strict=True):
            line = f"{name} {file[0]} {label} {None if pose is None else pose.tolist()}\n"
            digest.update(line.encode(errors="surrogateescape"))  # names of files may be any bytes
        return digest.hexdigest()[:16]

    @cached_property
    def _files(self) -> list[tuple[int, int]]:
        """Sizes and times of modification of the files, when first asked: later they may be gone."""
        return [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in self.paths)]


class PosedPhotographs(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """The photographs of a set that has poses, each as (image, label, pose)."""

    def __init__(self, photographs: PhotoDataset, poses: Tensor) -> None:
        self.photographs, self.poses = photographs, poses

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image, number = self.photographs.read(index)
        return image, self.photographs.labels[number], self.poses[number]


def is_at_hand(settings: DataSettings) -> bool:
    """Whether a data set can be opened without rendering the synthetic set first."""
    if settings.type != "synthetic":
        return True
    folder = Path(settings.datadir).expanduser() / _synthetic_settings(settings).folder_name
    return (folder / LABELS_FILE).is_file()


def open_dataset(settings: DataSettings) -> PhotoDataset:
    """Index, split, check and (where it fits the cache) decode a data set; log what was skipped.

    Raises DataError for a missing or empty folder, wrong labels, an empty subset, and with `settings.strict` for
    skipped photographs.
    """
    index = _index_photographs(settings)
    if settings.classes:
        index = index.keep_classes(settings.classes)
    index = index.select(_choose_subset(index, settings))
    kept, cache = _read_photographs(index, settings)
    _log_report(index, settings.strict)
    if not kept:
        raise DataError(
            f"{index.root}: none of the {len(index.paths)} photographs can be read ({index.report.unreadable[0]}); "
            f"expected PNG, JPEG or another format that Pillow reads"
        )
    return PhotoDataset(index.select(kept), settings, cache, _find_fov(index, settings.crop))


def _index_photographs(settings: DataSettings) -> PhotoIndex:
    root = Path(settings.datadir).expanduser()
    if settings.type == "synthetic":
        synthetic = _synthetic_settings(settings)
        return index_turntable(ensure_synthetic(root, synthetic), synthetic.v_list, None)
    if settings.type == "turntable":
        return index_turntable(root, settings.v_list, settings.file_pattern)
    if settings.type == "transforms":
        return index_transforms(root, settings.v_list)
    return index_image_folder(root, settings.v_list)


def _synthetic_settings(settings: DataSettings) -> SyntheticSettings:
    return SyntheticSettings(
        imsize=settings.imsize,
        count=settings.synthetic_count,
        seed=settings.synthetic_seed,
        instances=settings.synthetic_instances,
        known_instances=settings.synthetic_known_instances,
        heldout_instances=settings.synthetic_heldout_instances,
        radius=settings.radius,
        fov=settings.fov,
        v_list=settings.v_list or DEFAULT_V_LIST,
        white_bkgd=settings.white_bkgd,
    )


def _choose_subset(index: PhotoIndex, settings: DataSettings) -> list[int]:
    every, subset = settings.heldout_every, settings.subset
    splits = list(index.splits)
    undecided = [number for number, split in enumerate(splits) if not split]
    by_angle = settings.type in ("turntable", "synthetic")
    places = index.labels[:, 2] if by_angle else torch.arange(len(index.paths))
    distinct = places[undecided].unique().tolist()  # sorted
    if every:
        split_at = {place: ("test", "validation")[number % 2] for number, place in enumerate(distinct[::every])}
        for number in undecided:
            splits[number] = split_at.get(int(places[number]), "")
    chosen = [number for number, split in enumerate(splits) if subset in ("all", split or "train")]
    if not chosen:
        is_helped = subset != "train" and len(distinct) > 2  # then one of each split can be held out, and one be left
        other_value = f"set data.heldout_every={min(6, len(distinct) - 1)}, or " if is_helped else ""
        if subset == "train" and every and undecided:
            other_value = "set data.heldout_every=0, or "
        raise DataError(
            f"{index.root}: data.heldout_every={every} {'leaves' if every else 'holds nothing out, which leaves'} no "
            f"photograph of {len(splits)} in the subset {subset!r}, nor does a column split of {LABELS_FILE} put one "
            f"there; {other_value}add photographs{' from other angles' if by_angle else ''}"
        )
    return chosen


def _read_photographs(index: PhotoIndex, settings: DataSettings) -> tuple[list[int], Tensor | None]:
    """Indices of the readable photographs and their uint8 cache (None where it would not fit); fills the report."""
    count, imsize = len(index.paths), settings.imsize
    decode = count * 3 * imsize**2 <= settings.cache_mib * 2**20
    cache = torch.empty((count, 3, imsize, imsize), dtype=torch.uint8) if decode else None

    def read(number: int) -> tuple[int, int] | UnreadableImage:
        try:
            size = read_image_size(index.paths[number], settings.max_megapixels)
            if cache is not None:
                cache[number] = _read_pixels(index.paths[number], settings)
        except UnreadableImage as error:
            return error
        return size

    kept = []
    # Pillow decodes and resizes without the interpreter lock, so threads help.
    with quiet_decoders(), ThreadPoolExecutor(DECODING_THREADS) as pool:
        results = progress_bar(
            pool.map(read, range(count)), desc="reading photographs", total=count, unit="image", delay=2
        )
        for number, (name, result) in enumerate(zip(index.names(), results, strict=True)):
            if isinstance(result, UnreadableImage):
                index.report.unreadable.append(f"{name} ({result})")
            else:
                kept.append(number)
                index.report.sizes[result] += 1
    return kept, cache[kept] if cache is not None and len(kept) < count else cache


def _read_pixels(path: Path, settings: DataSettings) -> Tensor:
    return read_image(path, settings.imsize, settings.white_bkgd, settings.crop)


def _log_report(index: PhotoIndex, strict: bool) -> None:
    problems = index.report.problems()
    if not index.report.lines():
        return
    summary = f"{index.root}: using {len(index.paths) - len(index.report.unreadable)} photographs; " + "; ".join(
        index.report.lines()
    )
    if strict and problems:
        raise DataError(
            f"{summary}. data.strict=true makes this an error; repair or remove them, or set data.strict=false"
        )
    logger.warning(summary)


def _find_fov(index: PhotoIndex, crop: int | None) -> float | None:
    """Field of view in degrees across the square that is used, from camera_angle_x across the photographs' width."""
    if index.camera_angle_x is None:
        return None
    shares = {square_side(size, crop) / size[0] for size in index.report.sizes}
    if len(shares) > 1:
        raise DataError(
            f"{index.root}: photographs of different shapes ({', '.join(f'{w}x{h}' for w, h in index.report.sizes)}) "
            f"share one camera_angle_x; expected one aspect ratio"
        )
    return math.degrees(2 * math.atan(math.tan(index.camera_angle_x / 2) * shares.pop()))
