"""Whether super-resolution stays true: to the render it came from, to its neighbouring views, to a known truth.

Three measurements. Low resolution: |down(SR) - render| with down = s x s mean, on the numbers and on files of 8 bits.
Between views: the mean of |A - warp(B)| over the pixels that two neighbouring views of one object both see, for the
bicubically upsampled render and for the SR, so that both are measured at high resolution and their difference is what
SR adds. Against the truth: depth error, PSNR and SSIM. Colour errors are in units of [-1, 1], so that none exceeds 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional

from graf.base.errors import UserError
from graf.evaluation.fidelity import Plain, json_value
from graf.evaluation.metrics import psnr, ssim
from graf.evaluation.pictures import to_uint8
from graf.evaluation.renderer import Renderer
from graf.evaluation.rings import Ring, TruthRenderer, render_ring
from graf.geometry.cameras import Intrinsics
from graf.geometry.volume_rendering import Render
from graf.geometry.warping import DEFAULT_VISIBILITY, SurfaceView, Visibility, warp_between
from graf.models.ccsr import upsample

Down = Callable[[Tensor], Tensor]


class ConsistencyError(UserError):
    """Images that cannot be measured against each other; the message says what was found and expected."""


@dataclass(frozen=True)
class LowResolutionConsistency:
    """|down(SR) - render|, largest and mean, of the numbers and of 8-bit files; the share of values outside [-1, 1].

    Rounding to 8 bits alone moves a value by at most 1/255; what file_max has beyond it comes from clipping.
    """

    low_resolution_max: float
    low_resolution_mean: float
    file_max: float
    file_mean: float
    clipped: float


@dataclass(frozen=True)
class ReprojectionError:
    """Mean |A - warp(B)| over what both views see (NaN: nothing), and which share of A's opaque pixels that is."""

    error: float
    coverage: float


@dataclass(frozen=True)
class ConsistencyReport:
    """Result of :func:`measure_consistency`: means over the objects, `low_resolution_max` and `file_max` the largest.

    low_resolution_*, file_*, clipped: see LowResolutionConsistency. reprojection_render and _sr: see ReprojectionError,
    both at high resolution; coverage is theirs together. depth_error: in world units. psnr in dB and ssim: of the SR,
    and of the bicubically upsampled render. What needs the truth is NaN without it.
    """

    objects: int
    low_resolution_max: float
    low_resolution_mean: float
    file_max: float
    file_mean: float
    clipped: float
    reprojection_render: float
    reprojection_sr: float
    coverage: float
    depth_error: float = math.nan
    psnr: float = math.nan
    psnr_bicubic: float = math.nan
    ssim: float = math.nan
    ssim_bicubic: float = math.nan

    @property
    def reprojection_added(self) -> float:
        """What SR adds to the disagreement of neighbouring views; negative where it removes some."""
        return self.reprojection_sr - self.reprojection_render

    def as_dict(self) -> dict[str, Plain]:
        """Everything as plain values for JSON; what could not be measured is left out."""
        values: dict[str, Plain] = {**asdict(self), "reprojection_added": self.reprojection_added}
        return {name: json_value(value) for name, value in values.items() if value == value}

    def text(self) -> str:
        """The report for people."""
        lines = [
            f"consistency over {self.objects} object{'s' if self.objects != 1 else ''}, colours in [-1, 1]",
            f"  |down(SR) - render|        max {self.low_resolution_max:.2e}  mean {self.low_resolution_mean:.2e}",
            f"  the same, 8-bit files      max {self.file_max:.2e}  mean {self.file_mean:.2e}"
            f"  clipped {self.clipped:.2%}",
            f"  between neighbouring views render {self.reprojection_render:.4f}  SR {self.reprojection_sr:.4f}"
            f"  added {self.reprojection_added:+.4f}  (seen by both: {self.coverage:.0%})",
        ]
        if not math.isnan(self.depth_error):
            lines.append(f"  depth error                {self.depth_error:.4f}")
        if not math.isnan(self.psnr):
            lines += [
                f"  PSNR against the truth     SR {self.psnr:.2f} dB  bicubic {self.psnr_bicubic:.2f} dB",
                f"  SSIM against the truth     SR {self.ssim:.4f}  bicubic {self.ssim_bicubic:.4f}",
            ]
        return "\n".join(lines)


def find_scale(sr: Tensor, lr: Tensor) -> int:
    """s of images (B, C, s H, s W) and (B, C, H, W). Raises ConsistencyError where there is none."""
    scale = sr.shape[-1] // lr.shape[-1]
    if lr.dim() != 4 or sr.shape != (*lr.shape[:2], scale * lr.shape[2], scale * lr.shape[3]):
        raise ConsistencyError(
            f"SR is {tuple(sr.shape)} and the render {tuple(lr.shape)}: expected (B, C, s H, s W) and (B, C, H, W)"
        )
    return scale


@torch.no_grad()
def low_resolution_consistency(sr: Tensor, lr: Tensor, down: Down | None = None) -> LowResolutionConsistency:
    """How far down(SR) is from the render, in float64: SR (B, C, s H, s W) of any range, render (B, C, H, W).

    down: what makes low-resolution images, None for the s x s mean; it gets float64 on the CPU.
    """
    scale = find_scale(sr, lr)
    reduce = partial(functional.avg_pool2d, kernel_size=scale) if down is None else down
    images = [_compare_reduced(fine.cpu().double(), coarse.cpu().double(), reduce) for fine, coarse in _each(sr, lr)]
    return LowResolutionConsistency(
        low_resolution_max=max(image.low_resolution_max for image in images),
        low_resolution_mean=fmean(image.low_resolution_mean for image in images),
        file_max=max(image.file_max for image in images),
        file_mean=fmean(image.file_mean for image in images),
        clipped=fmean(image.clipped for image in images),
    )


def _compare_reduced(sr: Tensor, lr: Tensor, reduce: Down) -> LowResolutionConsistency:
    in_file = to_uint8(sr).to(sr.dtype) / 127.5 - 1
    difference, file_difference = (reduce(sr) - lr).abs(), (reduce(in_file) - lr).abs()
    return LowResolutionConsistency(
        low_resolution_max=difference.max().item(),
        low_resolution_mean=difference.mean().item(),
        file_max=file_difference.max().item(),
        file_mean=file_difference.mean().item(),
        clipped=(sr.abs() > 1).double().mean().item(),
    )


def _each(*batches: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """One image of each batch after the other, still (1, C, H, W): what is made of them is never there all at once."""
    return zip(*(batch.split(1) for batch in batches), strict=True)


@torch.no_grad()
def reprojection_error(
    views: SurfaceView, intrinsics: Intrinsics, visibility: Visibility = DEFAULT_VISIBILITY
) -> ReprojectionError:
    """Disagreement of the V neighbouring views of one object, each with the next one and the last with the first.

    Both ways round: A against B warped into A, and B against A. Pixels of all pairs count alike. Raises
    ConsistencyError for fewer than two views.
    """
    count = len(views.image)
    if count < 2:
        raise ConsistencyError(f"{count} view: neighbours need at least 2 views of an object")
    difference = shared = opaque = 0.0
    size = views.image.shape[-1]
    opacity = functional.interpolate(views.opacity, size=(size, size), mode="bilinear", align_corners=False)
    opaque_pixels = (opacity > visibility.min_opacity).sum(dim=(1, 2, 3))
    pairs = {tuple(sorted((i, (i + 1) % count))) for i in range(count)}  # two views are one pair, not two
    for first, second in sorted(pairs):
        for i, j in ((first, second), (second, first)):
            a, b = views[i : i + 1], views[j : j + 1]
            warped, mask = warp_between(a, b, intrinsics, visibility)
            difference += ((a.image - warped).abs().mean(1, keepdim=True) * mask).sum().item()
            shared += mask.sum().item()
            opaque += opaque_pixels[i].item()
    return ReprojectionError(
        error=difference / shared if shared else math.nan, coverage=shared / opaque if opaque else math.nan
    )


@torch.no_grad()
def depth_error(depth: Tensor, truth: Render) -> float:
    """Mean |z - z_true| in world units over the pixels that the truth covers by more than a half; NaN for none.

    depth: (V, 1, H, W), z-depth of the surface, the background's where nothing was rendered.
    """
    if depth.shape != truth.depth.shape or depth.shape != truth.opacity.shape:
        raise ConsistencyError(
            f"depth is {tuple(depth.shape)}, the true one {tuple(truth.depth.shape)} with a mask of "
            f"{tuple(truth.opacity.shape)}: expected three times (V, 1, H, W)"
        )
    covered = (truth.opacity > 0.5).to(depth.dtype)
    return (((depth - truth.depth).abs() * covered).sum() / covered.sum()).item()


def measure_consistency(
    rings: Iterable[Ring],
    intrinsics: Intrinsics,
    visibility: Visibility = DEFAULT_VISIBILITY,
    down: Down | None = None,
) -> ConsistencyReport:
    """Measure object after object and average, each object counted once; only one ring is held at a time.

    SR is clipped to [-1, 1], as it is shown, before it is compared with other views or with the truth; so is the
    upsampled render. `down` as in :func:`low_resolution_consistency`. Raises ConsistencyError when there is no ring.
    """
    measure = partial(measure_ring, intrinsics=intrinsics, visibility=visibility, down=down)
    reports = list(map(measure, rings))  # a loop's variable would hold a ring while the next one is rendered
    if not reports:
        raise ConsistencyError("no objects to measure: expected at least one ring of views")
    return _average_reports(reports)


@torch.no_grad()
def measure_ring(
    ring: Ring, intrinsics: Intrinsics, visibility: Visibility = DEFAULT_VISIBILITY, down: Down | None = None
) -> ConsistencyReport:
    """The report of one object; `down` as in :func:`low_resolution_consistency`."""
    render = ring.views.image
    measured = asdict(low_resolution_consistency(ring.sr, render, down))
    shown = ring.sr.clamp(-1, 1)
    bicubic = upsample(render, find_scale(ring.sr, render)).clamp(-1, 1)
    of_render = reprojection_error(replace(ring.views, image=bicubic), intrinsics, visibility)
    of_sr = reprojection_error(replace(ring.views, image=shown), intrinsics, visibility)
    measured |= {
        "reprojection_render": of_render.error,
        "reprojection_sr": of_sr.error,
        "coverage": of_sr.coverage,
    }
    if ring.truth is not None:
        true_images = ring.truth.rgb
        if true_images.shape != shown.shape:
            raise ConsistencyError(
                f"SR is {tuple(shown.shape)}, the true images {tuple(true_images.shape)}: expected equal"
            )
        measured |= {
            "depth_error": depth_error(ring.views.depth, ring.truth),
            "psnr": fmean(psnr(a, b).item() for a, b in _each(shown, true_images)),
            "psnr_bicubic": fmean(psnr(a, b).item() for a, b in _each(bicubic, true_images)),
            "ssim": fmean(ssim(a, b).item() for a, b in _each(shown, true_images)),
            "ssim_bicubic": fmean(ssim(a, b).item() for a, b in _each(bicubic, true_images)),
        }
    return ConsistencyReport(objects=1, **measured)


def _average_reports(reports: Sequence[ConsistencyReport]) -> ConsistencyReport:
    """Means over reports, the largest where the name says max; values that could not be measured are left out."""
    averages: dict[str, float] = {}
    for name in (field.name for field in fields(ConsistencyReport) if field.name != "objects"):
        values = [value for value in (getattr(report, name) for report in reports) if not math.isnan(value)]
        if not values:
            averages[name] = math.nan
        else:
            averages[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return ConsistencyReport(objects=sum(report.objects for report in reports), **averages)


@dataclass(frozen=True)
class ConsistencyTask:
    """Which objects are measured: one of each class, with the code of `seed`, from num_views azimuths at height v.

    truth: renders the true objects, where the data are synthetic.
    """

    renderer: Renderer
    classes: Sequence[int]
    v: float
    num_views: int = 24
    seed: int = 0
    truth: TruthRenderer | None = None

    def measure(self) -> ConsistencyReport:
        """How well super-resolved views agree with their renders, with each other and with the truth."""
        assert self.renderer.ccsr is not None
        return measure_consistency(self.render_rings(), self.renderer.caster.intrinsics, down=self.renderer.ccsr.down)

    def render_rings(self) -> Iterator[Ring]:
        """The ring of one object after the other, rendered as it is asked for."""
        z = self.renderer.codes(self.seed, range(1))
        for class_idx in self.classes:
            yield render_ring(self.renderer, z, class_idx, self.num_views, self.v, self.truth)
