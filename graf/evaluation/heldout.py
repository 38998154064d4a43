"""The held-out measurement: renders of a labelled view against photographs of it that training never saw.

For each photograph one render is made with the code of its instance, where that is known, else z = 0, and one with each
of `num_z` drawn codes from the photograph's own view, and with the former one from the mirrored azimuth (-angle) and
one from +90 degrees. A generator that ignores the azimuth, or turns the wrong way, scores as well at the wrong azimuths
as at the right one; the gates ask for a margin above what two runs with other seeds differ by. Blur wins PSNR, so KID
must also be lower than that of the blurriest sensible answer, the mean of the object's training photographs. Where
photographs of objects are held out that training never saw in any view, KID is about these: do drawn codes look like
objects of their class?
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graf.base.errors import UserError
from graf.evaluation.enlargement import EnlargementReport, Gate
from graf.evaluation.extractor import Extractor
from graf.evaluation.fidelity import FidelityProtocol, Plain, Scores, TensorImages, json_value, score_images
from graf.evaluation.metrics import psnr, ssim
from graf.evaluation.pictures import to_uint8
from graf.geometry.views import Views

#: which codes a batch of views is rendered with: the number of one for all, numbers of one for each, or None, those of
#: the views' instances
CodeNumbers = int | range | None

#: two seeds differ by 0.1 to 0.3 dB
MARGIN_DB = 1.0
LEAST_PSNR_DB = 19.0
MIRROR_GATE = f"psnr over mirrored + {MARGIN_DB} dB"


class HeldoutError(UserError):
    """A held-out set that cannot be measured; the message says what is missing and what to do."""


@dataclass(frozen=True)
class HeldoutPhotographs:
    """What the renders are held against.

    images: float (N, 3, H, W) in [-1, 1]; views: the N that they were taken from, at their true poses where these are
    known; training_means: {class: float (3, H, W)}, the mean of that object's training photographs; class_names: one
    per class index.
    """

    images: Tensor
    views: Views
    training_means: dict[int, Tensor]
    class_names: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.images) < 2 or len(self.views) != len(self.images):
            numbers = f"{len(self.images)} images and {len(self.views)} views"
            raise HeldoutError(f"the held-out set has {numbers}: expected at least 2 of each")
        for class_idx in self.classes():
            if class_idx not in self.training_means:
                raise HeldoutError(
                    f"object {self.class_names[class_idx]} has held-out photographs but no training ones"
                )

    def classes(self) -> list[int]:
        """Class indices that occur, ascending."""
        return sorted(set(self.views.class_idx.tolist()))


@dataclass(frozen=True)
class ObjectRow:
    """One class's mean PSNR in dB, over its photographs, and its SSIM.

    labelled: with the instance's code or z = 0 at the photograph's own azimuth; mean_z: the same with drawn codes, and
    their mean; labelled_unmirrored: labelled without the angles 0 and 180, which mirror onto themselves; mirrored: at
    -angle, likewise without them (NaN where nothing is left); plus90: at angle + 90.
    """

    name: str
    photographs: int
    labelled: float
    ssim: float
    mean_z: float
    labelled_unmirrored: float
    mirrored: float
    plus90: float


@dataclass(frozen=True)
class HeldoutReport:
    """Result of `measure_heldout`: per-object PSNR, and FID/KID of the renders and of the per-object mean images.

    enlargement: of a run with super-resolution.
    """

    objects: tuple[ObjectRow, ...]
    renders: Scores
    mean_images: Scores
    kid_name: str
    num_z: int
    code: str = "z = 0"
    enlargement: EnlargementReport | None = None

    def average(self) -> ObjectRow:
        """Mean over the objects, each counted once however many photographs it has."""

        def mean(column: str) -> float:
            values = [getattr(row, column) for row in self.objects]
            kept = [value for value in values if value == value]
            return sum(kept) / len(kept) if kept else float("nan")

        columns = ("labelled", "ssim", "mean_z", "labelled_unmirrored", "mirrored", "plus90")
        return ObjectRow("average", sum(row.photographs for row in self.objects), *(mean(column) for column in columns))

    def gates(self) -> list[Gate]:
        """(name, value, threshold, passed) of each gate that can be measured; a value that is NaN does not pass."""
        average = self.average()
        kid, kid_mean = self.renders.values[self.kid_name], self.mean_images.values[self.kid_name]
        noise = self.renders.values[self.kid_name.replace("kid", "kid_std", 1)]
        mirrored, plus90 = average.mirrored + MARGIN_DB, average.plus90 + MARGIN_DB
        return [
            (f"{self.kid_name} below mean images by its deviation", kid, kid_mean - noise, kid < kid_mean - noise),
            *([] if self.unmeasured() else [(MIRROR_GATE, *_at_least(average.labelled_unmirrored, mirrored))]),
            (f"psnr over +90 degrees + {MARGIN_DB} dB", *_at_least(average.labelled, plus90)),
            ("psnr", *_at_least(average.labelled, LEAST_PSNR_DB)),
            *(self.enlargement.gates() if self.enlargement is not None else []),
        ]

    def unmeasured(self) -> dict[str, str]:
        """{name: reason} of each gate that these photographs cannot decide; it counts for nothing."""
        if math.isnan(self.average().mirrored):
            return {MIRROR_GATE: "all photographs are at 0 or 180 degrees, which mirror onto themselves"}
        return {}

    def passed(self) -> bool:
        """Whether every gate that can be measured holds."""
        return all(gate[3] for gate in self.gates())

    def rows(self) -> list[dict[str, Plain]]:
        """One row per object, then the average; PSNR in dB, as a string where it is not finite."""
        rows = (*self.objects, self.average())
        return [_plain_row(vars(row)) for row in rows]

    def text(self) -> str:
        """The report as a table for people."""
        lines = [
            f"PSNR in dB on the test split, {self.code}, and the mean over {self.num_z} z "
            "([..]: without 0 and 180 degrees)",
            f"{'object':<16}{'photos':>8}{self.code:>10}{'SSIM':>8}{'mean z':>8}"
            f"{'[' + self.code + ']':>12}{'[mirrored]':>12}{'+90':>8}",
        ]
        for row in (*self.objects, self.average()):
            lines.append(
                f"{row.name[:15]:<16}{row.photographs:>8}{row.labelled:>10.2f}{row.ssim:>8.4f}{row.mean_z:>8.2f}"
                f"{row.labelled_unmirrored:>12.2f}{row.mirrored:>12.2f}{row.plus90:>8.2f}"
            )
        for scores, name in ((self.renders, "renders"), (self.mean_images, "per-object mean images")):
            values = ", ".join(f"{key} {value:.5f}" for key, value in scores.values.items())
            lines.append(
                f"{name}: {values} ({scores.provenance['n_fake']} against {scores.provenance['n_real']} photographs, "
                f"KID subsets of {scores.provenance['kid_subset_size']})"
            )
        lines += self.enlargement.lines() if self.enlargement is not None else []
        for name, value, threshold, passed in self.gates():
            lines.append(f"{'pass' if passed else 'FAIL'}  {name}: {value:.5g} (gate {threshold:.5g})")
        lines += [f"none  {name}: not measured, {reason}" for name, reason in self.unmeasured().items()]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """Everything as plain values, for JSON."""
        gate_keys = ("name", "value", "threshold", "passed")
        return {
            "num_z": self.num_z,
            "objects": self.rows(),
            "renders": _plain_row(self.renders.as_dict()),
            "mean_images": _plain_row(self.mean_images.as_dict()),
            "enlargement": {
                name: _plain_row(scores.as_dict())
                for name, scores in (self.enlargement.outputs.items() if self.enlargement is not None else ())
            },
            "gates": [_plain_row(dict(zip(gate_keys, gate, strict=True))) for gate in self.gates()],
            "unmeasured": self.unmeasured(),
            "passed": self.passed(),
        }


def _plain_row(row: dict[str, Plain]) -> dict[str, Plain]:
    return {key: json_value(value) for key, value in row.items()}


def _at_least(value: float, threshold: float) -> tuple[float, float, bool]:
    return value, threshold, value >= threshold


def mean_images_by_class(photographs: Iterable[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """Mean image (C, H, W) of each class of photographs, pairs of image and label (4,); one is held at a time."""
    sums: dict[int, Tensor] = {}
    counts: Counter[int] = Counter()
    for image, label in photographs:
        class_idx = int(label[0])
        sums[class_idx] = image.double() + sums.get(class_idx, 0)
        counts[class_idx] += 1
    return {class_idx: (total / counts[class_idx]).float() for class_idx, total in sums.items()}


@torch.no_grad()
def measure_heldout(
    photographs: HeldoutPhotographs,
    render: Callable[[Views, CodeNumbers], Tensor],
    extractor: Extractor,
    protocol: FidelityProtocol,
    device: torch.device,
    *,
    unseen: HeldoutPhotographs | None = None,
    num_z: int = 4,
    batch_size: int = 16,
    provenance: dict[str, Plain] | None = None,
) -> HeldoutReport:
    """Render the held-out views and compare with the photographs.

    `render(views, codes)` returns float (B, 3, H, W) in [-1, 1]; the same number of a code means the same latent in
    every call, None the code of the views' instances, or 0. (3 + num_z) N images are rendered, `batch_size` at a time;
    the num_z N of drawn codes are kept, as uint8.

    unseen: photographs of objects that training never saw, on which KID is measured instead; (num_z N') more renders,
    each with a code of its own, since a few drawn objects seen often cannot look like a collection.
    KID: all num_z N renders against the N photographs, in subsets of N (all photographs, a random N of the renders).
    The mean images are treated alike: the mean of the object's training photographs once per photograph and latent, so
    that both sides have the same counts, the same objects in the same numbers, and the same subset draws.
    """
    if num_z < 1 or batch_size < 1:
        raise HeldoutError(f"num_z={num_z}, batch_size={batch_size}: expected at least 1 of each")
    labelled = photographs.views
    labels = labelled.labels.cpu()

    seen = {
        "labelled": labelled,
        "mirrored": labelled.mirror(),
        "plus90": labelled.turn(90.0 * labelled.angle_sign),  # in the sense of the labels
    }
    wanted: list[tuple[str, Views, CodeNumbers]] = [(name, views, None) for name, views in seen.items()]
    wanted += [("mean_z", labelled, z_index) for z_index in range(num_z)]
    scores: dict[str, list[Tensor]] = {}
    renders = []

    def render_all(
        photographs: HeldoutPhotographs, views: Views, codes: CodeNumbers
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(views), batch_size):
            rows = slice(start, start + batch_size)
            images = photographs.images[rows]
            rendered = render(views[rows], codes[rows] if isinstance(codes, range) else codes).cpu()
            if rendered.shape != images.shape:
                raise HeldoutError(f"renders are {tuple(rendered.shape)}, photographs {tuple(images.shape)}")
            yield rendered, images.cpu()

    for name, views, codes in wanted:
        for rendered, truth in render_all(photographs, views, codes):
            scores.setdefault(name, []).append(psnr(rendered, truth))
            if name == "labelled":
                scores.setdefault("ssim", []).append(ssim(rendered, truth))
            if name == "mean_z" and unseen is None:
                renders.append(to_uint8(rendered))
    measured = {name: torch.cat(parts).view(-1, len(labels)) for name, parts in scores.items()}
    if unseen is not None:
        count = len(unseen.views)
        for first in range(0, num_z * count, count):
            own = render_all(unseen, unseen.views, range(first, first + count))
            renders += [to_uint8(rendered) for rendered, _ in own]

    judged = photographs if unseen is None else unseen
    means = torch.stack([judged.training_means[int(c)].cpu() for c in judged.views.class_idx]).repeat(num_z, 1, 1, 1)
    real = TensorImages(to_uint8(judged.images.cpu()))
    extra = {**(provenance or {}), "num_z": num_z}
    scored = {
        name: score_images(real, TensorImages(fake), extractor, protocol, device, provenance={**extra, "scored": name})
        for name, fake in (("heldout renders", torch.cat(renders)), ("heldout mean images", to_uint8(means)))
    }
    return HeldoutReport(
        objects=tuple(
            _measure_object(photographs.class_names[class_idx], labels, labels[:, 0] == class_idx, measured)
            for class_idx in photographs.classes()
        ),
        renders=scored["heldout renders"],
        mean_images=scored["heldout mean images"],
        kid_name="kid" + extractor.suffix,
        num_z=num_z,
        code="instance" if bool((labels[:, 3] >= 0).any()) else "z = 0",
    )


def _measure_object(name: str, labels: Tensor, chosen: Tensor, measured: dict[str, Tensor]) -> ObjectRow:
    """Average the (codes, N) scores over the codes and the photographs of one object."""
    two_sided = chosen & (labels[:, 2] % 180 != 0)
    means = {name: float(values[:, chosen].mean()) for name, values in measured.items() if name != "mirrored"}
    return ObjectRow(
        name=name,
        photographs=int(chosen.sum()),
        labelled_unmirrored=float(measured["labelled"][:, two_sided].mean()),
        mirrored=float(measured["mirrored"][:, two_sided].mean()),
        **means,
    )
