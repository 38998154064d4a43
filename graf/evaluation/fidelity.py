"""FID and KID through torch-fidelity: one protocol and one code path for training and for eval.py.

FID: Heusel et al. 2017 (arXiv 1706.08500), eq. 6. KID: Binkowski et al. 2018 (arXiv 1801.01401), unbiased MMD^2 with a
cubic polynomial kernel, mean over random subsets. Both compare features of uint8 images; a score without its
provenance (how many images, of what size, through which extractor) means nothing, so the two travel together.
"""

import csv
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from graf.base.errors import UserError
from graf.base.files import replace_file
from graf.evaluation.extractor import Extractor, hash_file, register_offline_extractor
from graf.evaluation.feature_cache import FeatureCache
from graf.evaluation.pictures import to_uint8
from graf.runtime.logs import info_once, warn_once
from graf.runtime.randomness import preserve_rng

Plain = str | int | float | bool | None
#: features (N, C) of N images by the extractor's layers
Features = dict[str, Tensor]
NEIGHBOURS = 3  # of precision and recall, as published
# Scores can be compared only where all of these agree; FID and KID depend on every one of them.
COMPARABLE = ("extractor", "extractor_hash", "n_real", "n_fake", "resolution", "kid_subset_size")


class FidelityError(UserError):
    """Images that cannot be scored; the message says what was found and what is needed."""


@dataclass(frozen=True)
class FidelityProtocol:
    """What fixes a score besides the images.

    seed: draws the KID subsets; batch_size: images per pass of the extractor; kid_subsets: subsets averaged by KID;
    kid_subset_size: at most so many images a subset, fewer where either side has fewer.
    """

    seed: int
    batch_size: int
    kid_subsets: int
    kid_subset_size: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "kid_subsets"):
            if getattr(self, name) < 1:
                raise FidelityError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.kid_subset_size < 2:
            raise FidelityError(f"kid_subset_size={self.kid_subset_size}: expected at least 2")


@dataclass(frozen=True)
class Scores:
    """Scores and where they come from.

    values: {"fid", "kid", "kid_std", "precision", "recall"}, each with the extractor's suffix ("fid_offline");
    provenance: plain values.
    """

    values: dict[str, float]
    provenance: dict[str, Plain] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Plain]:
        """One flat row, provenance first: a line of scores.jsonl, and what a checkpoint keeps of its best score."""
        return {**self.provenance, **self.values}


class TensorImages(Dataset[Tensor]):
    """The rows of a uint8 tensor (N, 3, H, W)."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class ImagesAsUint8(Dataset[Tensor]):
    """A data set of (float (3, H, W) in [-1, 1], label) as uint8 (3, H, W) images without labels.

    before_image: is called before each; it may raise, to end a long piece of work.
    """

    def __init__(self, dataset: Dataset[Any], before_image: Callable[[], None] | None = None) -> None:
        self.dataset, self.before_image = dataset, before_image

    def __len__(self) -> int:
        return len(cast(Any, self.dataset))

    def __getitem__(self, index: int) -> Tensor:
        if self.before_image is not None:
            self.before_image()
        return to_uint8(self.dataset[index][0])


class RenderedImages(Dataset[Tensor]):
    """Images that are rendered while they are read, `batch_size` at a time, and of which one batch is kept.

    `render([i, j, ...])` returns float (B, 3, H, W) in [-1, 1] for the image numbers it is given, which are always the
    same for a batch: image i does not depend on the order or the batch size in which the images are read. Read
    in order, each image is rendered once.
    """

    def __init__(self, render: Callable[[list[int]], Tensor], length: int, batch_size: int) -> None:
        if batch_size < 1:
            raise FidelityError(f"batch_size={batch_size}: expected at least 1")
        self.render = render
        self.length = length
        self.batch_size = batch_size
        self._first = -1
        self._batch = torch.empty(0, dtype=torch.uint8)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.length:
            raise IndexError(f"image {index} of {self.length}")
        first = index - index % self.batch_size
        if first != self._first:
            indices = list(range(first, min(first + self.batch_size, self.length)))
            with torch.no_grad():
                self._batch = to_uint8(self.render(indices)).cpu()
            if len(self._batch) != len(indices):
                raise FidelityError(f"render returned {len(self._batch)} images for {len(indices)} indices")
            self._first = first
        return self._batch[index - first]


def score_images(
    real: Dataset[Tensor],
    fake: Dataset[Tensor],
    extractor: Extractor,
    protocol: FidelityProtocol,
    device: torch.device,
    *,
    real_cache_name: str | None = None,
    cache_root: str | Path | None = None,
    provenance: Mapping[str, Plain] | None = None,
    fake_features: Features | None = None,
) -> Scores:
    """Compute FID and KID between two data sets of uint8 (3, H, W) images, and precision and recall.

    Precision is the share of generated images that lie among the real ones, recall that of real images which lie among
    the generated ones, and so what of their variety is generated: nearer to some image of the other side than its
    third neighbour there is (Kynkäänniemi et al., NeurIPS 2019).

    `real_cache_name` is a fingerprint of the real images: with `cache_root` it keeps their features there, under a name
    that also hashes the extractor's weights and the protocol. Generated images are never cached.
    `provenance` adds fields of the caller (EMA, pose distribution, checkpoint, iteration). No global random state is
    advanced. The extractor runs on `device` where that is CUDA, else on the CPU (torch-fidelity knows no other).

    Raises FidelityError for fewer than two images on a side, for images that are not uint8 (3, H, W) or of two sizes,
    and for a provenance field that is taken or is not a plain value.
    """
    import torch_fidelity  # which takes longer than all of graf

    n_real, n_fake = len(cast(Any, real)), len(cast(Any, fake))
    if min(n_real, n_fake) < 2:
        raise FidelityError(f"FID/KID need at least 2 images on each side, found {n_real} real and {n_fake} generated")
    with preserve_rng():
        resolution = _common_resolution(real, fake)
        subset_size = min(protocol.kid_subset_size, n_real, n_fake)
        own: dict[str, Plain] = {
            "n_real": n_real,
            "n_fake": n_fake,
            "resolution": resolution,
            "extractor": extractor.name,
            "extractor_hash": extractor.hash,
            "seed": protocol.seed,
            "kid_subsets": protocol.kid_subsets,
            "kid_subset_size": subset_size,
        }
        names = {key: key + extractor.suffix for key in ("fid", "kid", "kid_std", "precision", "recall")}
        extra = _check_provenance(provenance or {}, {*own, *names.values()})
        cache = None
        if real_cache_name is not None and cache_root is not None:
            parts = [real_cache_name, n_real, resolution, extractor.name, extractor.hash, asdict(protocol)]
            cache = FeatureCache(cache_root, parts)
        _verify_weights(extractor)
        register_offline_extractor()
        with nullcontext() if cache is None else cache.lend() as private, _quiet_pinning():
            known = None
            if fake_features is not None:
                assert private is not None  # torch-fidelity takes features from its cache alone
                known = _hand_over(fake_features, private, extractor)
            metrics = torch_fidelity.calculate_metrics(
                input1=real,
                input2=fake,
                input1_cache_name=None if cache is None else cache.name,
                input2_cache_name=known,
                cache=cache is not None,
                cache_root=None if private is None else str(private),
                cuda=device.type == "cuda",
                batch_size=protocol.batch_size,
                fid=True,
                kid=True,
                kid_subsets=protocol.kid_subsets,
                kid_subset_size=subset_size,
                prc=True,
                prc_neighborhood=min(NEIGHBOURS, n_real - 1, n_fake - 1),
                feature_extractor=extractor.name,
                feature_extractor_weights_path=None if extractor.weights_path is None else str(extractor.weights_path),
                rng_seed=protocol.seed,
                save_cpu_ram=True,  # no worker processes: they could not render on the device
                verbose=False,
            )
    values = {
        names["fid"]: float(metrics[torch_fidelity.KEY_METRIC_FID]),
        names["kid"]: float(metrics[torch_fidelity.KEY_METRIC_KID_MEAN]),
        names["kid_std"]: float(metrics[torch_fidelity.KEY_METRIC_KID_STD]),
        # for torch-fidelity the first data set is the generated one
        names["precision"]: float(metrics[torch_fidelity.KEY_METRIC_RECALL]),
        names["recall"]: float(metrics[torch_fidelity.KEY_METRIC_PRECISION]),
    }
    return Scores(values, {**own, **extra})


def extract_features(
    images: Dataset[Tensor], extractor: Extractor, protocol: FidelityProtocol, device: torch.device
) -> Features:
    """The features that :func:`score_images` compares, of uint8 images (3, H, W), on the CPU."""
    from torch_fidelity import utils
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    _verify_weights(extractor)
    register_offline_extractor()
    on_cuda = device.type == "cuda"
    path = None if extractor.weights_path is None else str(extractor.weights_path)
    with preserve_rng(), _quiet_pinning():
        kind = FEATURE_EXTRACTORS_REGISTRY[extractor.name]
        layers = sorted({kind.get_default_feature_layer_for_metric(metric) for metric in ("fid", "kid", "prc")})
        network = utils.create_feature_extractor(
            extractor.name, layers, cuda=on_cuda, feature_extractor_weights_path=path, verbose=False
        )
        return utils.get_featuresdict_from_dataset(  # type: ignore[no-any-return]
            images, network, protocol.batch_size, on_cuda, save_cpu_ram=True, verbose=False
        )


def _hand_over(features: Features, folder: Path, extractor: Extractor) -> str:
    """Put features where torch-fidelity looks for those of an input of this name, which is returned."""
    name = "generated"
    for layer, values in features.items():
        torch.save(values, folder / f"{name}-{extractor.name}-features-{layer}.pt")
    return name


@contextmanager
def _quiet_pinning() -> Iterator[None]:
    """Without the warnings of torch's own pinning thread, https://github.com/pytorch/pytorch/issues/174546."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*pin memory thread", category=DeprecationWarning)
        yield


def _common_resolution(real: Dataset[Tensor], fake: Dataset[Tensor]) -> str:
    """Return "HxW" of the first image of both sides; raise FidelityError where they are no uint8 images of one size."""
    sizes = []
    for side, dataset in (("real", real), ("generated", fake)):
        image = dataset[0]
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
            found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise FidelityError(f"{side} images: expected uint8 (3, H, W), found {found}")
        sizes.append(f"{image.shape[1]}x{image.shape[2]}")
    if sizes[0] != sizes[1]:
        raise FidelityError(f"real images are {sizes[0]}, generated ones {sizes[1]}: render at the data set's size")
    return sizes[0]


def _check_provenance(extra: Mapping[str, Plain], taken: set[str]) -> dict[str, Plain]:
    for key, value in extra.items():
        if key in taken:
            raise FidelityError(f"provenance field {key!r} is set by score_images: choose another name")
        if value is not None and not isinstance(value, str | int | float | bool):
            raise FidelityError(f"provenance field {key!r} is a {type(value).__name__}: expected a plain value")
    return dict(extra)


def _verify_weights(extractor: Extractor) -> None:
    """torch-fidelity unpickles the weights (weights_only=False), which runs whatever is in them."""
    if extractor.weights_path is not None and hash_file(extractor.weights_path) != extractor.hash:
        raise FidelityError(f"{extractor.weights_path} has changed since it was chosen: its sha256 is another")


def is_better(new: Scores | Mapping[str, Plain], best: Mapping[str, Plain] | None, metric: str) -> bool:
    """Whether `new` replaces `best` by `metric`; arguments are Scores or their `as_dict()`.

    metric: "fid" or "kid", which are to be low, or "psnr" on the validation split, which is to be high.

    Scores of different extractors, counts or resolutions are never compared: the record starts over with `new`, which
    is reported once. A score that is not finite is never better.
    """
    new_row = new.as_dict() if isinstance(new, Scores) else new
    name, value = _find_metric(new_row, metric)
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    differing = [key for key in COMPARABLE if new_row.get(key) != best.get(key)]
    if differing:
        changes = ", ".join(f"{key} {best.get(key)} -> {new_row.get(key)}" for key in differing)
        info_once(f"the best score so far cannot be compared ({changes}): best {name} starts over")
        return True
    return not value >= _find_metric(best, metric)[1]  # a best that is not finite loses


def _find_metric(row: Mapping[str, Plain], metric: str) -> tuple[str, float]:
    """The name of the metric in a row of scores, and its value, negative where high ones are good."""
    names = {"fid": ("fid", "fid_offline"), "kid": ("kid", "kid_offline"), "psnr": ("psnr_validation",)}
    if metric not in names:
        raise FidelityError(f"training.save_best={metric}: expected one of {', '.join(names)}")
    for name in names[metric]:
        if row.get(name) is not None:
            value = float(cast(float, row[name]))
            return name, -value if metric == "psnr" else value
    raise FidelityError(f"a score row without {metric}: it has {', '.join(row)}")


def write_scores(folder: str | Path, scores: Scores) -> None:
    """Append the scores to `folder`/scores.jsonl and write all its rows as `folder`/scores.csv.

    A line cut off by a killed run is reported and left out of the CSV; columns are the union over the rows.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines_path = folder / "scores.jsonl"
    row = {key: json_value(value) for key, value in scores.as_dict().items()}
    with open(lines_path, "a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
    _write_csv(folder / "scores.csv", read_scores(lines_path))


def read_scores(path: str | Path) -> list[dict[str, Plain]]:
    """Read the rows of a scores.jsonl, oldest first; a line that is no JSON object is reported and left out."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            warn_once(f"{path}, line {number}: expected a JSON object, found {line[:40]!r}; the line is left out")
    return rows


def json_value(value: Plain) -> Plain:
    """JSON has no infinities and no NaN: they are written as strings, which float() reads back."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write_csv(path: Path, rows: list[dict[str, Plain]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replace_file(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
