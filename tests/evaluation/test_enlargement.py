"""Super-resolution against bicubic enlargement: sharper and truer passes every gate, blurrier fails every one."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from graf.evaluation.enlargement import EnlargementReport, measure_enlargement
from graf.evaluation.extractor import choose_extractor
from graf.evaluation.fidelity import FidelityProtocol, Scores
from graf.evaluation.heldout import HeldoutReport, ObjectRow
from graf.geometry.views import Cameras, Views

LABELS = torch.tensor([(0, 0, angle, -1) for angle in range(0, 360, 30)])
VIEWS = Cameras(3.5, (0.3,)).views_of_labels(LABELS)
PROTOCOL = FidelityProtocol(seed=0, batch_size=8, kid_subsets=5, kid_subset_size=12)


def draw(label: Tensor) -> Tensor:
    """Stripes whose direction turns with the label's angle, (1, 3, 32, 32)."""
    x, y = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="xy")
    angle = torch.deg2rad(label[2].float())
    return torch.tanh(3 * torch.sin(9 * (torch.cos(angle) * x + torch.sin(angle) * y))).expand(1, 3, -1, -1)


TRUTH = torch.cat([draw(label) for label in LABELS])


def measure(blur_of_sr: int, blur_of_bicubic: int) -> EnlargementReport:
    def render(views: Views) -> dict[str, Tensor]:
        assert len(views) == 1
        sharp = draw(views.labels[0])
        return {
            name: functional.avg_pool2d(sharp, width, 1, width // 2) if width > 1 else 1.2 * sharp
            for name, width in (("sr", blur_of_sr), ("bicubic", blur_of_bicubic))
        }

    return measure_enlargement(TRUTH, VIEWS, render, choose_extractor("offline"), PROTOCOL, torch.device("cpu"))


def test_what_is_sharper_wins_in_everything_and_what_is_softer_loses():
    assert [passed for *_, passed in measure(3, 9).gates()] == [True] * 3
    assert [passed for *_, passed in measure(9, 3).gates()] == [False] * 3
    assert [name for name, *_ in measure(3, 9).gates()][2] == "sr kid_offline below bicubic"


def test_outputs_are_clipped_and_measured_by_their_definition():
    report = measure(1, 3)
    error = (1.2 * TRUTH).clamp(-1, 1) - TRUTH
    psnr = (10 * torch.log10(4 / error.square().mean((1, 2, 3)))).mean()
    assert report.outputs["sr"].values["psnr"] == pytest.approx(float(psnr), rel=1e-5)
    assert report.outputs["sr"].provenance["n_fake"] == report.outputs["sr"].provenance["n_real"] == len(LABELS)
    assert [line.split(":")[0] for line in report.lines()] == ["sr", "bicubic"]


def test_a_heldout_report_counts_the_gates_of_super_resolution():
    row = ObjectRow("stripes", 12, 30.0, 0.9, 30.0, 30.0, 20.0, 20.0)
    counts = {"n_fake": 12, "n_real": 12, "kid_subset_size": 12}
    renders, means = (
        Scores({"fid_offline": 1.0, "kid_offline": kid, "kid_std_offline": 0.01}, counts) for kid in (0.0, 0.1)
    )
    without = HeldoutReport((row,), renders, means, "kid_offline", 1)
    good, bad = (replace(without, enlargement=measure(*blurs)) for blurs in ((3, 9), (9, 3)))
    assert without.passed()
    assert good.passed()
    assert not bad.passed()
    assert len(good.gates()) == len(without.gates()) + 3
    assert "\nsr: psnr" in good.text()
    assert json.loads(json.dumps(good.as_dict()))["enlargement"]["sr"]["ssim"] > 0.5
    assert without.as_dict()["enlargement"] == {}
