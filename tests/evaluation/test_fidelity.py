"""Scores agree with FID's and KID's definitions, are repeatable, carry their provenance and touch no training state."""

import csv
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from graf.evaluation import fidelity
from graf.evaluation.extractor import OFFLINE, Extractor, OfflineFeatures, choose_extractor
from graf.evaluation.fidelity import (
    FidelityError,
    FidelityProtocol,
    ImagesAsUint8,
    Plain,
    RenderedImages,
    Scores,
    is_better,
    read_scores,
    score_images,
    write_scores,
)

CPU = torch.device("cpu")
PROTOCOL = FidelityProtocol(seed=0, batch_size=64, kid_subsets=100, kid_subset_size=1000)


class Images(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.reads = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        self.reads += 1
        return self.images[index]


def draw_images(count: int, seed: int, spread: int = 200, size: int = 16) -> Images:
    """Smooth random images: uint8 (count, 3, size, size) below `spread`."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    return Images((smooth * spread).to(torch.uint8))


def score(real: Dataset[Tensor], fake: Dataset[Tensor], **settings: Any) -> Scores:
    protocol = settings.pop("protocol", replace(PROTOCOL, kid_subsets=10))
    return score_images(real, fake, choose_extractor("offline"), protocol, CPU, **settings)


def extract(images: Images) -> np.ndarray:
    return OfflineFeatures()(images.images).double().numpy()


def test_fid_is_the_frechet_distance_of_the_features() -> None:
    real, fake = draw_images(400, 0), draw_images(300, 1, spread=120)
    x, y = extract(real), extract(fake)
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # Second implementation: tr sqrt(A B) through the symmetric sqrt(A) B sqrt(A).
    values, vectors = np.linalg.eigh(cov_x)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_y @ root).clip(0)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross
    assert score(real, fake).values["fid_offline"] == pytest.approx(expected, rel=1e-4)


def test_kid_is_the_unbiased_mmd_of_the_features() -> None:
    real, fake = draw_images(12, 0), draw_images(12, 1, spread=120)
    x, y = extract(real), extract(fake)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1.0) ** 3)

    n = len(x)
    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    across = sum(kernel(a, b) for a in x for b in y) / n**2
    scores = score(real, fake)  # subsets of all 12: every one gives the same value
    assert scores.values["kid_offline"] == pytest.approx(within - 2 * across, rel=1e-3, abs=1e-6)
    assert scores.values["kid_std_offline"] < 1e-5


@pytest.mark.parametrize(("n_real", "n_fake", "neighbours"), [(40, 30, 3), (3, 5, 2)])
def test_precision_and_recall_are_shares_within_the_other_sides_neighbourhoods(
    n_real: int, n_fake: int, neighbours: int
) -> None:
    real, fake = draw_images(n_real, 0), draw_images(n_fake, 1, spread=20)
    x, y = extract(real), extract(fake)

    def share_among(points: np.ndarray, others: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(other - others, axis=1))[neighbours] for other in others]
        within = [(np.linalg.norm(point - others, axis=1) <= radii).any() for point in points]
        return float(np.mean(within))

    values = score(real, fake).values
    assert values["precision_offline"] == pytest.approx(share_among(y, x))
    assert values["recall_offline"] == pytest.approx(share_among(x, y))


def test_half_of_the_real_images_are_precise_and_recall_half() -> None:
    dark, bright = draw_images(30, 0, spread=60).images, 255 - draw_images(30, 1, spread=60).images
    values = score(Images(torch.cat([dark, bright])), Images(dark)).values
    assert values["precision_offline"] == 1
    assert values["recall_offline"] == 0.5


def test_same_images_and_seed_give_equal_scores_and_another_seed_other_subsets() -> None:
    real, fake = draw_images(40, 0), draw_images(30, 1)
    protocol = replace(PROTOCOL, seed=3, kid_subsets=5, kid_subset_size=10)
    first = score(real, fake, protocol=protocol)
    assert score(real, fake, protocol=protocol) == first
    other = score(real, fake, protocol=replace(PROTOCOL, seed=4, kid_subsets=5, kid_subset_size=10))
    assert other.values["fid_offline"] == first.values["fid_offline"]
    assert other.values["kid_offline"] != first.values["kid_offline"]


@pytest.mark.parametrize(("n_real", "n_fake", "expected"), [(8, 30, 8), (30, 8, 8), (30, 40, 20)])
def test_kid_subsets_are_as_large_as_both_sides_and_the_limit_allow(n_real: int, n_fake: int, expected: int) -> None:
    protocol = replace(PROTOCOL, kid_subsets=2, kid_subset_size=20)
    scores = score(draw_images(n_real, 0), draw_images(n_fake, 1), protocol=protocol)
    assert scores.provenance["kid_subset_size"] == expected


def test_scores_carry_their_provenance() -> None:
    extra: dict[str, Plain] = {"ema": True, "iteration": 500, "pose_distribution": "labels", "checkpoint": None}
    scores = score(draw_images(6, 0), draw_images(5, 1), provenance=extra)
    names = ("fid", "kid", "kid_std", "precision", "recall")
    assert set(scores.values) == {f"{name}_offline" for name in names}
    assert scores.provenance == {
        "n_real": 6,
        "n_fake": 5,
        "resolution": "16x16",
        "extractor": OFFLINE,
        "extractor_hash": choose_extractor("offline").hash,
        "seed": 0,
        "kid_subsets": 10,
        "kid_subset_size": 5,
        **extra,
    }


@pytest.mark.parametrize("extra", [{"n_real": 3}, {"fid_offline": 0.0}, {"poses": [1, 2]}])
def test_a_provenance_field_may_not_overwrite_another_nor_hold_an_object(extra: dict[str, Any]) -> None:
    with pytest.raises(FidelityError, match=f"provenance field '{next(iter(extra))}'"):
        score(draw_images(3, 0), draw_images(3, 1), provenance=extra)


def test_scoring_leaves_the_training_random_states_alone_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index,union-attr]
    real, fake = draw_images(6, 0), RenderedImages(lambda indices: torch.rand(len(indices), 3, 16, 16), 5, 4)
    score(real, fake)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[index,call-overload]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert capfd.readouterr() == ("", "")


def test_real_features_are_cached_under_their_fingerprint_and_generated_ones_never(tmp_path: Path) -> None:
    def reads(fingerprint: str, protocol: FidelityProtocol, count: int = 6) -> tuple[int, int]:
        real, fake = draw_images(count, 0), draw_images(5, 1)
        score(real, fake, protocol=protocol, real_cache_name=fingerprint, cache_root=tmp_path)
        return real.reads, fake.reads

    protocol = replace(PROTOCOL, kid_subsets=2)
    fresh = (8, 7)  # the first image is looked at once by score_images and once by torch-fidelity
    assert reads("a/b c", protocol) == fresh
    assert reads("a/b c", protocol) == (1, 7)
    assert reads("another data set", protocol) == fresh
    assert reads("a/b c", replace(PROTOCOL, kid_subsets=2, batch_size=2)) == fresh
    assert reads("a/b c", protocol, count=7) == (9, 7)


def test_cached_and_uncached_scores_are_equal(tmp_path: Path) -> None:
    real, fake = draw_images(6, 0), draw_images(5, 1)
    uncached = score(real, fake)
    for _ in range(2):
        assert score(real, fake, real_cache_name="x", cache_root=tmp_path) == uncached


@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (draw_images(1, 0), draw_images(5, 1), "found 1 real and 5 generated"),
        (draw_images(5, 0), draw_images(0, 1), "found 5 real and 0 generated"),
        (draw_images(3, 0), draw_images(3, 1, size=32), "real images are 16x16, generated ones 32x32"),
        (Images(torch.zeros(3, 3, 16, 16)), draw_images(3, 1), "real images: expected uint8"),
        (draw_images(3, 1), Images(torch.zeros(3, 1, 16, 16, dtype=torch.uint8)), "generated images: expected uint8"),
    ],
)
def test_images_that_cannot_be_scored_are_refused(real: Images, fake: Images, message: str) -> None:
    with pytest.raises(FidelityError, match=message):
        score(real, fake)


def test_weights_that_changed_after_they_were_chosen_are_not_loaded(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"something else")
    chosen = Extractor("inception-v3-compat", "", "0" * 64, weights)
    with pytest.raises(FidelityError, match="has changed since it was chosen"):
        score_images(draw_images(3, 0), draw_images(3, 1), chosen, PROTOCOL, CPU)


def test_rendered_images_are_rendered_once_each_in_fixed_batches_and_one_batch_is_kept() -> None:
    calls: list[list[int]] = []

    def render(indices: list[int]) -> Tensor:
        assert not torch.is_grad_enabled()
        calls.append(indices)
        return torch.tensor(indices).view(-1, 1, 1, 1).expand(-1, 3, 16, 16) / 127.5 - 1.0

    images = RenderedImages(render, length=7, batch_size=3)
    score(draw_images(4, 0), images)
    assert calls == [[0, 1, 2], [3, 4, 5], [6]]  # image 0 is looked at ahead, and not rendered again
    assert [int(images[i][0, 0, 0]) for i in (6, 0, 4)] == [6, 0, 4]
    assert len(images._batch) == 3


def test_a_rendering_of_the_wrong_length_or_beyond_the_end_is_refused() -> None:
    images = RenderedImages(lambda indices: torch.zeros(2, 3, 16, 16), length=3, batch_size=3)
    with pytest.raises(FidelityError, match="2 images for 3"):
        images[0]
    with pytest.raises(IndexError):
        images[3]


def test_photographs_survive_the_round_trip_through_floats() -> None:
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    dataset = [(levels.float() / 127.5 - 1.0, torch.zeros(3, dtype=torch.int64))]
    wrapped = ImagesAsUint8(dataset)  # type: ignore[arg-type]
    assert len(wrapped) == 1
    assert torch.equal(wrapped[0], levels)


def make_scores(suffix: str = "", **changes: Any) -> Scores:
    provenance = {"extractor": "e" + suffix, "extractor_hash": "h", "n_real": 5, "n_fake": 5, "resolution": "8x8"}
    values = {"fid": changes.pop("fid", 1.0), "kid": changes.pop("kid", 1.0)}
    return Scores({name + suffix: value for name, value in values.items()}, {**provenance, **changes})


def test_the_lower_score_is_better_and_the_metric_is_respected() -> None:
    best = make_scores(fid=2.0, kid=0.1).as_dict()
    assert is_better(make_scores(fid=1.0, kid=0.2), best, "fid")
    assert not is_better(make_scores(fid=1.0, kid=0.2), best, "kid")
    assert not is_better(make_scores(fid=2.0), best, "fid")
    assert is_better(make_scores(fid=9.0).as_dict(), None, "fid")


def test_scores_of_another_extractor_or_count_start_the_record_over(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(fidelity, "info_once", lambda message, key=None: said.append(message))
    best = make_scores("_offline", kid=0.001).as_dict()
    assert is_better(make_scores(kid=5.0), best, "kid")
    assert is_better(make_scores("_offline", kid=5.0, extractor_hash="other"), best, "kid")
    assert is_better(make_scores("_offline", kid=5.0, n_fake=50), best, "kid")
    assert [("extractor_hash" in line, "n_fake 5 -> 50" in line) for line in said[1:]] == [(True, False), (False, True)]
    assert not is_better(make_scores("_offline", kid=5.0), best, "kid")


def test_a_score_that_is_not_finite_never_wins_and_always_loses() -> None:
    assert not is_better(make_scores(fid=math.nan), None, "fid")
    assert not is_better(make_scores(fid=math.inf), make_scores().as_dict(), "fid")
    assert is_better(make_scores(fid=1e9), make_scores(fid=math.nan).as_dict(), "fid")


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(FidelityError, match="save_best=lpips: expected one of fid, kid, psnr"):
        is_better(make_scores(), None, "lpips")


def test_the_higher_psnr_on_the_validation_split_is_better() -> None:
    best, worse = make_scores(psnr_validation=30.0), make_scores(psnr_validation=29.0, fid=0.0)
    assert is_better(best, None, "psnr")
    assert is_better(best, worse.as_dict(), "psnr")
    assert not is_better(worse, best.as_dict(), "psnr")
    with pytest.raises(FidelityError, match="a score row without psnr"):
        is_better(make_scores(), None, "psnr")


def test_scores_are_appended_and_the_table_has_every_row_and_column(tmp_path: Path) -> None:
    write_scores(tmp_path / "run", make_scores(fid=2.0, iteration=100))
    write_scores(tmp_path / "run", make_scores("_offline", fid=math.nan, ema=True))
    lines = (tmp_path / "run" / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line).get("fid", json.loads(line).get("fid_offline")) for line in lines] == [2.0, "nan"]
    with open(tmp_path / "run" / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["iteration"], row["fid"], row["fid_offline"], row["ema"]) for row in rows] == [
        ("100", "2.0", "", ""),
        ("", "", "nan", "True"),
    ]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["scores.csv", "scores.jsonl"]


def test_a_line_cut_off_by_a_killed_run_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(fidelity, "warn_once", lambda message, key=None: said.append(message))
    write_scores(tmp_path, make_scores(fid=1.0))
    path = tmp_path / "scores.jsonl"
    path.write_text(path.read_text() + '{"fid": 2.')
    write_scores(tmp_path, make_scores(fid=3.0))
    assert [row["fid"] for row in read_scores(path)] == [1.0, 3.0]
    assert all("line 2" in message for message in said)
    assert said


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"kid_subsets": 0}, {"kid_subset_size": 1}])
def test_a_protocol_that_cannot_be_carried_out_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(FidelityError, match=next(iter(change))):
        replace(PROTOCOL, **change)
