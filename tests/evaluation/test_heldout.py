"""The held-out measurement equals its definition by brute force; its gates tell right generators from wrong ones."""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from graf.evaluation.extractor import choose_extractor
from graf.evaluation.fidelity import FidelityProtocol
from graf.evaluation.heldout import (
    HeldoutError,
    HeldoutPhotographs,
    HeldoutReport,
    mean_images_by_class,
    measure_heldout,
    mirror_labels,
    psnr,
    turn_labels,
)

PHOTO_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "coil100"
NAMES = ("red", "green", "blue")


def draw_view(label: Tensor, size: int = 16) -> Tensor:
    """A closed-form turntable: a bright bar of the class's colour whose place turns with the azimuth."""
    class_idx, _, angle = label.tolist()
    x = (torch.arange(size) + 0.5) / size * 2 - 1
    y = x.view(-1, 1)
    phase = math.radians(angle)
    blob = torch.exp(-8 * ((x - 0.6 * math.cos(phase)) ** 2 + (y - 0.6 * math.sin(phase)) ** 2))
    image = torch.full((3, size, size), -1.0)
    image[class_idx] += 2 * blob
    return image


def draw_views(labels: Tensor) -> Tensor:
    return torch.stack([draw_view(label) for label in labels])


def make_labels(angles: range) -> Tensor:
    return torch.tensor([(c, 0, angle) for c in range(3) for angle in angles])


def make_photographs() -> HeldoutPhotographs:
    training = make_labels(range(10, 360, 20))
    heldout = make_labels(range(0, 360, 30))
    return HeldoutPhotographs(draw_views(heldout), heldout, mean_images_by_class(draw_views(training), training), NAMES)


def noise_for(z_index: int) -> Tensor:
    return 0.05 * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(z_index))


def measure(degrees_off: int = 0, sense: int = 1, num_z: int = 2) -> HeldoutReport:
    """Measure a generator that turns `sense` times the label's angle, plus an offset."""

    def render(labels: Tensor, z_index: int) -> Tensor:
        turned = labels.clone()
        turned[:, 2] = (sense * turned[:, 2] + degrees_off) % 360
        return draw_views(turned) + noise_for(z_index)

    protocol = FidelityProtocol(kid_subsets=20)
    return measure_heldout(
        make_photographs(),
        render,
        choose_extractor("offline"),
        protocol,
        torch.device("cpu"),
        num_z=num_z,
        batch_size=5,
    )


def test_psnr_is_ten_log_ten_of_peak_over_error() -> None:
    a = torch.zeros(3, 3, 4, 4)
    b = a + torch.tensor([2.0, 0.2, 0.0]).view(3, 1, 1, 1)
    assert psnr(a, b).tolist() == pytest.approx([0.0, 20.0, math.inf])


def test_labels_mirror_and_turn_on_the_ring() -> None:
    labels = torch.tensor([[1, 2, 0], [0, 1, 30], [2, 0, 180], [1, 1, 300]])
    assert mirror_labels(labels).tolist() == [[1, 2, 0], [0, 1, 330], [2, 0, 180], [1, 1, 60]]
    assert turn_labels(labels, 90).tolist() == [[1, 2, 90], [0, 1, 120], [2, 0, 270], [1, 1, 30]]


def test_the_report_equals_a_brute_force_measurement() -> None:
    report, photographs = measure(num_z=2), make_photographs()
    for class_idx, row in enumerate(report.objects):
        sums: dict[str, list[float]] = {"labelled": [], "labelled_unmirrored": [], "mirrored": [], "plus90": []}
        for photo, label in zip(photographs.images, photographs.labels, strict=True):
            if label[0] != class_idx:
                continue
            angle = int(label[2])
            for z in range(2):
                for view, turned in (("labelled", angle), ("mirrored", -angle), ("plus90", angle + 90)):
                    picture = draw_view(torch.tensor([class_idx, 0, turned % 360])) + noise_for(z)
                    value = 10 * math.log10(4 / float(((picture - photo) ** 2).mean()))
                    if view != "mirrored" or angle not in (0, 180):
                        sums[view].append(value)
                    if view == "labelled" and angle not in (0, 180):
                        sums["labelled_unmirrored"].append(value)
        assert row.name == NAMES[class_idx]
        assert row.photographs == 12
        for view, values in sums.items():
            assert getattr(row, view) == pytest.approx(sum(values) / len(values), rel=1e-5)
    average = report.average()
    assert average.photographs == 36
    assert average.plus90 == pytest.approx(sum(row.plus90 for row in report.objects) / 3)


def test_a_generator_that_follows_the_label_passes_every_gate() -> None:
    assert [passed for *_, passed in measure().gates()] == [True, True, True, True]
    assert measure().passed()


def test_turning_the_wrong_way_fails_the_mirror_gate() -> None:
    report = measure(sense=-1)
    assert [passed for *_, passed in report.gates()][1] is False
    assert not report.passed()


def test_a_quarter_turn_fails_the_quarter_turn_gate() -> None:
    assert [passed for *_, passed in measure(degrees_off=270).gates()][2] is False


def test_ignoring_the_azimuth_fails_both_azimuth_gates() -> None:
    assert [passed for *_, passed in measure(sense=0).gates()][1:3] == [False, False]


def test_rendering_the_mean_image_gains_nothing_in_kid() -> None:
    photographs = make_photographs()

    def render(labels: Tensor, z_index: int) -> Tensor:
        return torch.stack([photographs.training_means[int(c)] for c in labels[:, 0]])

    report = measure_heldout(
        photographs, render, choose_extractor("offline"), FidelityProtocol(), torch.device("cpu"), num_z=2
    )
    name, value, threshold, passed = report.gates()[0]
    assert name.startswith("kid_offline")
    assert value == threshold
    assert not passed


def test_both_sides_of_the_kid_comparison_are_counted_alike_and_recorded() -> None:
    report = measure(num_z=2)
    for scores in (report.renders, report.mean_images):
        assert [scores.provenance[key] for key in ("n_real", "n_fake", "kid_subset_size", "num_z")] == [36, 72, 36, 2]
    assert report.renders.provenance["scored"] != report.mean_images.provenance["scored"]


def test_a_report_without_two_sided_angles_is_plain_json_and_fails_the_mirror_gate() -> None:
    labels = torch.tensor([[0, 0, 0], [0, 0, 180]])
    photographs = HeldoutPhotographs(draw_views(labels), labels, {0: draw_view(labels[0])}, ["only"])
    report = measure_heldout(
        photographs,
        lambda labels, z_index: draw_views(labels) + noise_for(z_index),
        choose_extractor("offline"),
        FidelityProtocol(kid_subsets=2),
        torch.device("cpu"),
        num_z=1,
    )
    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert plain["objects"][0]["mirrored"] == "nan"
    assert plain["gates"][1]["passed"] is False


def test_the_table_names_every_object_and_gate() -> None:
    text = measure(num_z=1).text()
    assert all(re.search(rf"^{name} ", text, re.MULTILINE) for name in (*NAMES, "average"))
    assert len(re.findall(r"^(pass|FAIL)  ", text, re.MULTILINE)) == 4
    assert "36 against 36 photographs" in text


def test_a_heldout_set_that_cannot_be_measured_says_why() -> None:
    image, label = torch.zeros(1, 3, 16, 16), torch.tensor([[0, 0, 0]])
    with pytest.raises(HeldoutError, match=r"data\.heldout_every"):
        HeldoutPhotographs(image, label, {0: image[0]}, ["one"])
    with pytest.raises(HeldoutError, match="object one has held-out photographs but no training ones"):
        HeldoutPhotographs(image.repeat(2, 1, 1, 1), label.repeat(2, 1), {}, ["one"])


def test_renders_of_another_size_are_refused() -> None:
    with pytest.raises(HeldoutError, match="renders are"):
        measure_heldout(
            make_photographs(),
            lambda labels, z_index: torch.zeros(len(labels), 3, 8, 8),
            choose_extractor("offline"),
            FidelityProtocol(),
            torch.device("cpu"),
        )


def test_real_photographs_of_the_next_angle_pass_and_of_the_mirrored_angle_fail() -> None:
    if not PHOTO_FOLDER.is_dir():
        assert os.environ.get("CI") != "true", f"CI needs the photographs in {PHOTO_FOLDER}"
        pytest.skip(f"no photographs in {PHOTO_FOLDER}")
    views: dict[tuple[int, int], Tensor] = {}
    names = sorted({path.name.split("__")[0] for path in PHOTO_FOLDER.glob("*.png")})
    for path in PHOTO_FOLDER.glob("*.png"):
        name, angle = path.stem.split("__")
        with Image.open(path) as opened:
            pixels = np.array(opened.convert("RGB").resize((64, 64), Image.Resampling.BOX))
        views[names.index(name), int(angle)] = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1.0
    heldout = torch.tensor([(c, 0, angle) for c, angle in sorted(views) if angle % 30 == 0])
    training = torch.tensor([(c, 0, angle) for c, angle in sorted(views) if angle % 30 != 0])

    def look_up(labels: Tensor) -> Tensor:
        return torch.stack([views[c, angle] for c, _, angle in labels.tolist()])

    photographs = HeldoutPhotographs(
        look_up(heldout), heldout, mean_images_by_class(look_up(training), training), names
    )

    def measure_with(mirrored: bool) -> HeldoutReport:
        def render(labels: Tensor, z_index: int) -> Tensor:
            seen = mirror_labels(labels) if mirrored else labels
            return look_up(turn_labels(seen, (-10, -5, 5, 10)[z_index]))

        return measure_heldout(
            photographs, render, choose_extractor("offline"), FidelityProtocol(), torch.device("cpu"), num_z=4
        )

    assert measure_with(mirrored=False).passed()
    assert [passed for *_, passed in measure_with(mirrored=True).gates()][:2] == [True, False]
