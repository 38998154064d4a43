"""The feature extractor behind FID and KID: Inception where its verified weights are at hand, else a fixed random one.

Scores of the two are different quantities. `Extractor.suffix` keeps their names apart (`fid` and `fid_offline`), and
`Extractor.hash` says which weights made the features.
"""

import hashlib
import http.client
import math
import secrets
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graf.base.errors import UserError
from graf.base.files import replace_file
from graf.runtime.logs import info_once, warn_once

INCEPTION = "inception-v3-compat"
#: torch-fidelity's own; it takes longer to import than all of graf, so that waits for the first score
URL_INCEPTION_V3 = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
OFFLINE = "graf-offline-v1"
KINDS = ("auto", "inception", "offline")

DOWNLOAD_TIMEOUT = 5.0  # seconds without an answer; a machine without a network waits no longer than this per address

OFFLINE_SEED = 20_201_206
STAGE_CHANNELS = (16, 24, 32, 32)
MIN_RESOLUTION = 16  # four stages, each halves the image: 16 -> 2
LAYOUT_SIZE = 4
OFFLINE_DIMENSIONS = 2 * sum(STAGE_CHANNELS) + 2 * 3 + 3 * LAYOUT_SIZE**2
TEXTURE_GAIN = 3.0  # gives texture about as much variance between photographs as the thumbnail has


class ExtractorError(UserError):
    """No usable feature extractor; the message says where it was looked for and what to do."""


@dataclass(frozen=True)
class Extractor:
    """A feature extractor as torch-fidelity knows it, and what its scores are called.

    name: the name it is registered under; suffix: "" or "_offline", appended to every score's name;
    hash: sha256 of the weights; weights_path: file with the weights, None where they are generated.
    """

    name: str
    suffix: str
    hash: str
    weights_path: Path | None = None


def choose_extractor(kind: str, weights_path: str | None = None, allow_download: bool = True) -> Extractor:
    """Choose the extractor for `evaluation.feature_extractor`: "auto", "inception" or "offline".

    "auto" without weights says so in one line and takes the offline extractor. Raises ExtractorError for an unknown
    kind, and for "inception" without weights.
    """
    if kind not in KINDS:
        raise ExtractorError(f"evaluation.feature_extractor={kind}: expected one of {', '.join(KINDS)}")
    if kind == "offline":
        return offline_extractor()
    weights, failures = _search_inception_weights(weights_path, allow_download)
    if weights is not None:
        if weights_path is not None and failures:  # the configured file comes first
            warn_once(f"Inception weights: {failures[0]}; using {weights} instead")
        return Extractor(INCEPTION, "", INCEPTION_SHA256, weights)
    searched = "; ".join(failures)
    if kind == "inception":
        raise ExtractorError(
            f"evaluation.feature_extractor=inception: no Inception weights ({searched}). Download {URL_INCEPTION_V3} "
            f"to {_hub_file()}, or set evaluation.feature_extractor=offline"
        )
    warn_once(
        f"no Inception weights ({searched}): FID/KID use the fixed offline extractor and are named "
        f"fid_offline/kid_offline"
    )
    return offline_extractor()


def find_inception_weights(path: str | None) -> tuple[Path | None, list[str]]:
    """The file of Inception weights on this machine, None without one, and why each place before it had none."""
    return _search_inception_weights(path, allow_download=False)


def _search_inception_weights(path: str | None, allow_download: bool) -> tuple[Path | None, list[str]]:
    """Weights with the right sha256 (or None), and why each place before them had none.

    Looked for at `path`, then in $TORCH_HOME/hub/checkpoints, then downloaded.
    """
    failures = []
    candidates = [_hub_file()] if path is None else [Path(path).expanduser(), _hub_file()]
    for candidate in candidates:
        try:
            found = hash_file(candidate)
        except OSError as error:
            failures.append(f"{candidate}: {error.strerror or error}")
            continue
        if found == INCEPTION_SHA256:
            return candidate, failures
        failures.append(f"{candidate}: sha256 starts {found[:8]}, expected {INCEPTION_SHA256[:8]}, so it is not loaded")
    if not allow_download:
        return None, [*failures, "download not allowed"]
    try:
        return download_inception_weights(_hub_file()), failures
    except (OSError, http.client.HTTPException, ExtractorError) as error:
        return None, [*failures, f"download failed: {getattr(error, 'reason', None) or error or type(error).__name__}"]


def _hub_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]


def hash_file(path: Path) -> str:
    """sha256 of a file, as hexadecimal digits. Raises OSError where it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download_inception_weights(target: Path) -> Path:
    """Download the weights (91 MiB) to `target`, which appears only when the sha256 is right.

    Raises OSError or http.client.HTTPException when the network or the disk refuses, ExtractorError for another file.
    """
    digest = hashlib.sha256()
    with urllib.request.urlopen(URL_INCEPTION_V3, timeout=DOWNLOAD_TIMEOUT) as response:
        info_once(f"downloading Inception weights (91 MiB) to {target}")
        partial = f"{target.name}.{secrets.token_hex(4)}.partial"  # other processes may be downloading it too
        with replace_file(target, temporary_name=partial) as file:
            while block := response.read(1 << 20):
                digest.update(block)
                file.write(block)
            if digest.hexdigest() != INCEPTION_SHA256:
                raise ExtractorError(f"{URL_INCEPTION_V3} has sha256 {digest.hexdigest()[:8]}..., not the expected one")
    return target


def offline_extractor() -> Extractor:
    """The extractor that is there without weights."""
    return Extractor(OFFLINE, "_offline", _offline_hash())


@lru_cache(maxsize=1)
def _offline_hash() -> str:
    digest = hashlib.sha256(OFFLINE.encode())
    for kernel in draw_kernels():
        digest.update(kernel.numpy().tobytes())
    return digest.hexdigest()


def draw_kernels() -> list[Tensor]:
    """Draw the 3 x 3 kernels of the offline extractor, one (C_out, C_in, 3, 3) float32 tensor per stage.

    They are integers until the last multiplication, so that they, and their hash, are equal on every machine. The first
    stage's kernels sum to zero: it sees edges and texture, and leaves brightness to the colour statistics.
    """
    generator = torch.Generator().manual_seed(OFFLINE_SEED)
    kernels = []
    channels_in = 3
    for stage, channels in enumerate(STAGE_CHANNELS):
        integers = torch.randint(-1024, 1025, (channels, channels_in, 3, 3), generator=generator)
        fan_in = 9 * channels_in
        if stage == 0:
            integers = fan_in * integers - integers.sum(dim=(1, 2, 3), keepdim=True)
            scale = TEXTURE_GAIN / fan_in
        else:
            scale = 1.0
        # He et al. 2015, eq. 14, for a uniform distribution of standard deviation 1024 / sqrt(3).
        scale *= math.sqrt(2.0 / fan_in) * math.sqrt(3.0) / 1024.0
        kernels.append(integers.to(torch.float32) * scale)
        channels_in = channels
    return kernels


class OfflineFeatures(nn.Module):
    """Fixed, untrained convolutional features: uint8 (B, 3, H, W), H and W at least 16 -> float32 (B, 262).

    Four random conv stages with leaky ReLU, each pooled to a mean and a standard deviation per channel (texture at four
    scales), mean and standard deviation of the colours, and a 4 x 4 thumbnail (layout). Random features rank
    distortions and mode collapse sensibly; they know nothing of objects, so scores compare only runs on one data set.
    """

    def __init__(self) -> None:
        super().__init__()
        for stage, kernel in enumerate(draw_kernels()):
            self.register_buffer(f"kernel_{stage}", kernel)

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype != torch.uint8 or input.dim() != 4 or input.shape[1] != 3:
            raise ValueError(f"offline features: expected uint8 (B, 3, H, W), found {input.dtype} {tuple(input.shape)}")
        if min(input.shape[2:]) < MIN_RESOLUTION:
            raise ValueError(
                f"offline features: images of {input.shape[2]} x {input.shape[3]} are too small, "
                f"they need at least {MIN_RESOLUTION} pixels a side"
            )
        images = input.to(torch.float32) / 127.5 - 1.0
        features = [F.adaptive_avg_pool2d(images, LAYOUT_SIZE).flatten(1), *_pool_moments(images)]
        activations = images
        for stage in range(len(STAGE_CHANNELS)):
            padded = F.pad(activations, (1, 1, 1, 1), mode="replicate")
            activations = F.leaky_relu(F.conv2d(padded, self.get_buffer(f"kernel_{stage}")), 0.2)
            features += _pool_moments(activations)
            activations = F.avg_pool2d(activations, 2)
        return torch.cat(features, dim=1)


def _pool_moments(maps: Tensor) -> list[Tensor]:
    """(B, C, H, W) -> mean and standard deviation over the image, (B, C) each."""
    variance, mean = torch.var_mean(maps, dim=(2, 3), unbiased=False)
    return [mean, variance.sqrt()]


def register_offline_extractor() -> None:
    """Tell torch-fidelity of the offline extractor, once."""
    from torch_fidelity import FeatureExtractorBase, register_feature_extractor
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    if OFFLINE in FEATURE_EXTRACTORS_REGISTRY:
        return

    class Registered(FeatureExtractorBase):
        def __init__(self, name: str, features_list: Sequence[str], **kwargs: Any) -> None:
            super().__init__(name, list(features_list))
            self.features = OfflineFeatures()

        def forward(self, input: Tensor) -> tuple[Tensor, ...]:
            return (self.features(input),)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (str(OFFLINE_DIMENSIONS),)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return str(OFFLINE_DIMENSIONS)

    register_feature_extractor(OFFLINE, Registered)
