"""The ESRGAN trunk (Wang et al., ECCV Workshops 2018): residual-in-residual dense blocks, and published weights.

Images are in [0, 1] here, as ESRGAN's weights expect; the caller maps the project's [-1, 1] there and back. Modules are
named as in BasicSR and Real-ESRGAN: conv_first, body.N.rdb1.conv1, conv_body, conv_up1, conv_up2, conv_hr, conv_last.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graf.base.errors import UserError
from graf.base.extras import MissingExtra, import_optional
from graf.runtime.logs import logger
from graf.runtime.memory import is_out_of_memory
from graf.runtime.sealed_archive import load_plainly
from graf.runtime.torch_release import SAFE_SUFFIX, require_trust

RESIDUAL_SCALE = 0.2
INITIAL_SCALE = 0.1
WRAPPERS = ("params_ema", "params", "state_dict")


class WeightsError(UserError):
    """A file of published weights that cannot be read or does not fit; the message names it and says what to do."""


class DenseBlock(nn.Module):
    """Five convolutions, each seeing the input and all outputs before it; the last is added to the input, scaled."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.conv1 = _convolution(features, growth)
        self.conv2 = _convolution(features + growth, growth)
        self.conv3 = _convolution(features + 2 * growth, growth)
        self.conv4 = _convolution(features + 3 * growth, growth)
        self.conv5 = _convolution(features + 4 * growth, features)
        for convolution in self._convolutions():
            nn.init.kaiming_normal_(convolution.weight)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            with torch.no_grad():
                convolution.weight.mul_(INITIAL_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """(B, features, H, W) -> the same shape."""
        *growing, last = self._convolutions()
        seen = x
        for convolution in growing:
            seen = torch.cat([seen, _activate(convolution(seen))], dim=1)
        return x + RESIDUAL_SCALE * last(seen)

    def _convolutions(self) -> tuple[nn.Conv2d, ...]:
        return self.conv1, self.conv2, self.conv3, self.conv4, self.conv5


class ResidualDenseBlock(nn.Module):
    """Three dense blocks in a row inside one more scaled residual: ESRGAN's RRDB."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = DenseBlock(features, growth)
        self.rdb2 = DenseBlock(features, growth)
        self.rdb3 = DenseBlock(features, growth)

    def forward(self, x: Tensor) -> Tensor:
        """(B, features, H, W) -> the same shape."""
        return x + RESIDUAL_SCALE * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBTrunk(nn.Module):
    """ESRGAN's generator: (B, 3, H, W) -> (B, 3, scale H, scale W), both about [0, 1]; nothing clamps the output.

    scale: 2 or 4. features, growth, blocks: 64, 32, 23 in the published x4 model. Raises ValueError for another scale.
    """

    def __init__(self, scale: int, features: int = 64, growth: int = 32, blocks: int = 23) -> None:
        super().__init__()
        if scale not in (2, 4):
            raise ValueError(f"scale={scale}: the RRDB trunk upsamples by 2 or 4")
        if min(features, growth, blocks) < 1:
            raise ValueError(f"features={features}, growth={growth}, blocks={blocks}: expected at least 1 of each")
        self.scale = scale
        self.conv_first = _convolution(3, features)
        self.body = nn.Sequential(*(ResidualDenseBlock(features, growth) for _ in range(blocks)))
        self.conv_body = _convolution(features, features)
        self.conv_up1 = _convolution(features, features)
        self.conv_up2 = _convolution(features, features) if scale == 4 else None
        self.conv_hr = _convolution(features, features)
        self.conv_last = _convolution(features, 3)

    @property
    def receptive_radius(self) -> int:
        """How many low-resolution pixels away, in x or y, an input pixel can still matter."""
        radius = 2  # conv_hr and conv_last, in fine pixels
        for _ in self._upsampling():
            radius = (radius + 2) // 2  # one more convolution, then nearest upsampling: half, rounded up
        return radius + 2 + 15 * len(self.body)

    def forward(self, images: Tensor) -> Tensor:
        first = self.conv_first(images)
        hidden = first + self.conv_body(self.body(first))
        for convolution in self._upsampling():
            hidden = _activate(convolution(functional.interpolate(hidden, scale_factor=2, mode="nearest")))
        return self.conv_last(_activate(self.conv_hr(hidden)))

    def _upsampling(self) -> list[nn.Conv2d]:
        return [self.conv_up1] if self.conv_up2 is None else [self.conv_up1, self.conv_up2]


def _convolution(inside: int, outside: int) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1)


def _activate(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, 0.2, inplace=True)  # a convolution's backward does not need its own output


@dataclass(frozen=True)
class LoadReport:
    """What came out of a weights file.

    matched: tensors loaded. missing: the trunk's names that the file has no value for, which keep theirs. unexpected:
    the file's names that the trunk has no place for. mismatched: the trunk's names whose shape in the file is another.
    """

    matched: int
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]


def load_esrgan_weights(trunk: RRDBTrunk, path: Path | str, trust: bool = False) -> LoadReport:
    """Load published weights into `trunk`, as far as names and shapes agree, and say how far that is.

    Understands the names of ESRGAN's repository (old and new architecture) and of BasicSR / Real-ESRGAN, as a plain
    state dict or inside params_ema, params or state_dict. Where the file has more blocks, the trunk takes the first
    ones. A .safetensors file holds such a state dict too. trust: read a pickle though torch is so old that it could do
    harm. Raises UntrustedFile, and WeightsError when the file is missing, cannot be read with weights_only=True, or
    matches no tensor.
    """
    path = Path(os.path.expanduser(path))
    found = _read_tensors(path, trust)
    renamed = translate_names(found)
    own = trunk.state_dict()
    mismatched = [name for name in own if name in renamed and found[renamed[name]].shape != own[name].shape]
    matched = [name for name in own if name in renamed and name not in mismatched]
    missing = [name for name in own if name not in renamed]
    used = {renamed[name] for name in own if name in renamed}
    unexpected = [name for name in found if name not in used]
    if not matched:
        raise WeightsError(
            f"{path}: none of its {len(found)} tensors fits the RRDB trunk ({_summarise(unexpected + mismatched)}); "
            f"expected ESRGAN weights with {trunk.conv_first.out_channels} features, such as RRDB_ESRGAN_x4.pth for 64"
        )
    trunk.load_state_dict({name: found[renamed[name]] for name in matched}, strict=False)
    logger.info("%s: %d of the trunk's %d tensors loaded", path, len(matched), len(own))
    for names, meaning in (
        (missing, "are not in the file and keep their initial values"),
        (mismatched, "have another shape in the file and keep their initial values"),
        (unexpected, "of the file have no place in the trunk and are left out"),
    ):
        if names:
            logger.warning("%s: %d tensors %s: %s", path, len(names), meaning, _summarise(names))
    return LoadReport(len(matched), missing, unexpected, mismatched)


def _read_tensors(path: Path, trust: bool) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; download ESRGAN weights, for example RRDB_ESRGAN_x4.pth, to there")
    require_trust(path, trust)
    try:
        contents = _read(path)
    except Exception as error:  # what a foreign file raises depends on its first bytes
        if is_out_of_memory(error) or isinstance(error, MissingExtra):
            raise
        raise WeightsError(
            f"{path}: cannot be read with weights_only=True ({type(error).__name__}: {_first_line(error)}). It is cut "
            "short, or a pickle that runs code when it is loaded. If you trust where it comes from, convert it once: "
            'x = torch.load(path, map_location="cpu", weights_only=False); '
            "torch.save({k: v for k, v in getattr(x, 'state_dict', lambda: x)().items()}, new_path)"
        ) from error
    outer: Mapping[str, Any] = contents if isinstance(contents, Mapping) else {}
    state = next((outer[name] for name in WRAPPERS if isinstance(outer.get(name), Mapping)), outer)
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(
            f"{path}: holds a {type(contents).__name__} without named tensors; expected a state dict, plain or inside "
            f"{', '.join(WRAPPERS)}"
        )
    return tensors


def _read(path: Path) -> Any:
    if path.suffix == SAFE_SUFFIX:
        return import_optional("safetensors.torch", "share").load_file(path)
    return load_plainly(path)


NEW_ARCHITECTURE = {
    "trunk_conv": "conv_body",
    "upconv1": "conv_up1",
    "upconv2": "conv_up2",
    "HRconv": "conv_hr",
}


def translate_names(names: Mapping[str, object]) -> dict[str, str]:
    """{the trunk's name: the file's name} for every name that one of the three layouts explains.

    The old architecture is a flat sequence: 0 is the first convolution, 1 the body, then one convolution per factor of
    2 with gaps for activations, and the two last ones. So places are told by order, which holds for x2 and x4 alike.
    """
    plain = {name: name.removeprefix("module.") for name in names}  # DataParallel's prefix
    places = sorted({int(found[1]) for found in map(_OLD_PLACE.fullmatch, plain.values()) if found})
    old = {}
    if len(places) >= 4:
        first, *ups, high, last = places
        old = {first: "conv_first", high: "conv_hr", last: "conv_last"}
        old |= {place: f"conv_up{number}" for number, place in enumerate(ups, start=1)}
    return {_translate(plain_name, old): name for name, plain_name in plain.items()}


_OLD_PLACE = re.compile(r"model\.(\d+)\.(?:weight|bias)")
_OLD_BODY = re.compile(r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.(weight|bias)")
_OLD_BODY_END = re.compile(r"model\.1\.sub\.\d+\.(weight|bias)")
_NEW_BODY = re.compile(r"RRDB_trunk\.(\d+)\.RDB(\d)\.conv(\d)\.(weight|bias)")


def _translate(name: str, old_places: Mapping[int, str]) -> str:
    if place := _OLD_PLACE.fullmatch(name):
        return f"{old_places.get(int(place[1]), name)}.{name.rpartition('.')[2]}"
    if inside := _OLD_BODY.fullmatch(name) or _NEW_BODY.fullmatch(name):
        return "body.{}.rdb{}.conv{}.{}".format(*inside.groups())
    if end := _OLD_BODY_END.fullmatch(name):
        return f"conv_body.{end[1]}"
    module, _, kind = name.rpartition(".")
    return f"{NEW_ARCHITECTURE.get(module, module)}.{kind}"


def _summarise(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
