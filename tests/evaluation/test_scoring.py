"""Scoring a generator: images by number, whatever the batch, and the numbers of score_images itself."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from graf.evaluation import scoring
from graf.evaluation.extractor import OfflineFeatures, choose_extractor
from graf.evaluation.fidelity import Features, FidelityProtocol, ImagesAsUint8, RenderedImages, Scores, score_images
from graf.evaluation.metrics import ssim
from graf.evaluation.renderer import Renders
from graf.evaluation.scoring import ScoringTask, ValidationTask
from graf.geometry.views import Cameras, PoseSampler, Views
from graf.runtime.distributed import Processes
from graf.runtime.interrupt import Stopped
from graf.runtime.memory import OutOfMemory
from graf.runtime.randomness import Draws

LABELS = torch.tensor([[0, 0, 0, 0], [1, 0, 90, -1], [0, 0, 180, 1]])
POOL = PoseSampler(LABELS, Cameras(3.5, (0.3,)))
PROTOCOL = FidelityProtocol(seed=3, batch_size=4, kid_subsets=3, kid_subset_size=8)


class NoiseRenderer:
    """Stands in for Renderer: image i is noise that depends on (seed, i) alone."""

    device = torch.device("cpu")
    truncation = 1.0

    def __init__(self) -> None:
        self.before_image = lambda: None
        self.asked: list[int] = []
        self.seeds: set[int] = set()

    def render_random(
        self, pose_sampler: PoseSampler, seed: int, indices: range, super_resolve: bool = False
    ) -> Renders:
        assert pose_sampler is POOL
        self.asked += list(indices)
        self.seeds.add(seed)
        rgb = Draws(seed, 0, indices).uniform("noise", 3, 16, 16) * 2 - 1
        sr = Draws(seed, 0, indices).uniform("sharp", 3, 32, 32) * 2 - 1 if super_resolve else None
        return Renders(rgb, rgb[:, :1], rgb[:, :1], sr)


class ExactRenderer:
    """Stands in for Renderer: shows photographs, whatever the view, and asks for z = 0."""

    generator = SimpleNamespace(dim_z=5)

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def instance_codes(self, instances: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(instances), 5)

    def render_views(self, z: torch.Tensor, views: Views) -> Renders:
        assert torch.equal(z, torch.zeros(3, 5))
        assert len(views) == 3
        return Renders(self.images, self.images[:, :1], self.images[:, :1])


def test_the_validation_split_is_measured_by_the_mean_psnr_and_ssim_of_its_photographs() -> None:
    images = torch.rand(3, 3, 16, 16) - 0.5
    errors = torch.tensor([0.1, 0.02, 0.3])[:, None, None, None]
    found = ValidationTask(ExactRenderer(images + errors), images, POOL.views).measure()
    assert found.keys() == {"psnr_validation", "ssim_validation"}
    assert found["psnr_validation"] == pytest.approx(float((10 * torch.log10(4 / errors.square())).mean()), rel=1e-4)
    assert found["ssim_validation"] == pytest.approx(float(ssim(images + errors, images).mean()))


@pytest.fixture
def photographs() -> TensorDataset:
    return TensorDataset(torch.rand(10, 3, 16, 16) * 2 - 1, LABELS[torch.arange(10) % 3])


def score(renderer, photographs, folder, fingerprint="photos", output="render"):
    provenance = {"iteration": 5, "ema": True}
    task = ScoringTask(renderer, POOL, choose_extractor("offline"), PROTOCOL, 9, folder)
    return task.score(output, photographs, fingerprint, provenance)


def test_the_score_is_that_of_the_numbered_images_against_all_photographs(photographs, tmp_path):
    renderer = NoiseRenderer()
    scores = score(renderer, photographs, tmp_path)
    fakes = RenderedImages(lambda i: Draws(3, 0, tuple(i)).uniform("noise", 3, 16, 16) * 2 - 1, 9, 3)
    expected = score_images(ImagesAsUint8(photographs), fakes, choose_extractor("offline"), PROTOCOL, renderer.device)
    assert scores.values == expected.values
    assert set(range(9)) == set(renderer.asked)
    assert renderer.seeds == {3}


def test_the_score_does_not_depend_on_how_many_images_are_rendered_at_once(photographs, tmp_path, monkeypatch):
    expected = score(NoiseRenderer(), photographs, tmp_path / "a").values
    monkeypatch.setattr(scoring, "RENDER_BATCH", 2)
    assert score(NoiseRenderer(), photographs, tmp_path / "b").values == expected


def test_the_cached_photographs_give_the_same_score_and_the_provenance_says_where_it_comes_from(photographs, tmp_path):
    first = score(NoiseRenderer(), photographs, tmp_path)
    cached = sorted(path.name for path in tmp_path.iterdir())
    assert cached
    again = score(NoiseRenderer(), photographs, tmp_path)
    assert again == first
    assert sorted(path.name for path in tmp_path.iterdir()) == cached
    assert first.provenance["poses"] == "the 3 views of the data set, equally likely"
    assert first.provenance["n_real"] == 10
    assert first.provenance["n_fake"] == 9
    assert (first.provenance["iteration"], first.provenance["ema"]) == (5, True)


def test_other_photographs_are_not_scored_from_the_cache(photographs, tmp_path):
    first = score(NoiseRenderer(), photographs, tmp_path, "photos")
    others = TensorDataset(photographs.tensors[0].flip(0) * 0.3, photographs.tensors[1])
    fresh = score(NoiseRenderer(), others, tmp_path / "empty", "others")
    assert score(NoiseRenderer(), others, tmp_path, "others").values == fresh.values != first.values


def test_super_resolved_images_are_scored_under_their_own_name(photographs, tmp_path):
    large = TensorDataset(torch.rand(10, 3, 32, 32) * 2 - 1, photographs.tensors[1])
    scores = score(NoiseRenderer(), large, tmp_path, "large", "sr")
    fakes = RenderedImages(lambda i: Draws(3, 0, tuple(i)).uniform("sharp", 3, 32, 32) * 2 - 1, 9, 3)
    expected = score_images(ImagesAsUint8(large), fakes, choose_extractor("offline"), PROTOCOL, torch.device("cpu"))
    assert scores.values == {f"sr_{name}": value for name, value in expected.values.items()}
    assert scores.provenance["output"] == "sr"
    assert scores.provenance["resolution"] == "32x32"


def test_where_the_extractor_runs_out_of_memory_it_sees_fewer_images_from_then_on(
    photographs, tmp_path, monkeypatch, caplog
):
    expected = score(NoiseRenderer(), photographs, tmp_path / "a").values
    forward, sizes = OfflineFeatures.forward, []

    def limited(extractor, images):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(extractor, images)

    monkeypatch.setattr(OfflineFeatures, "forward", limited)
    task = ScoringTask(NoiseRenderer(), POOL, choose_extractor("offline"), PROTOCOL, 9, tmp_path / "b")
    with caplog.at_level(logging.WARNING, "graf"):
        assert task.score("render", photographs, "photos").values == pytest.approx(expected)
        task.score("render", photographs, "others")
    assert sizes.count(4) == 1
    assert len(caplog.records) == 1
    assert "evaluation.batch_size 4 -> 2" in caplog.text


def test_where_one_image_is_too_much_for_the_extractor_that_is_said(photographs, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(OfflineFeatures, "forward", fail)
    with pytest.raises(OutOfMemory, match=r"data\.imsize.*training\.fid_every"):
        score(NoiseRenderer(), photographs, tmp_path)


def test_images_that_cannot_be_rendered_in_any_size_are_not_tried_with_a_smaller_extractor(photographs, tmp_path):
    class TooSmall(NoiseRenderer):
        def render_random(self, *_: object, **__: object) -> Renders:
            self.asked.append(0)
            raise OutOfMemory("out of memory even at the smallest size; lower data.imsize")

    renderer = TooSmall()
    with pytest.raises(OutOfMemory, match=r"data\.imsize"):
        score(renderer, photographs, tmp_path)
    assert len(renderer.asked) == 1


@pytest.mark.parametrize(("size", "images"), [(2, 24), (3, 29), (4, 9)])  # 3, 4 and 2 blocks of renders
def test_scores_of_several_processes_are_those_of_one(run_processes, photographs, tmp_path, size, images):
    extractor = choose_extractor("offline")

    def score(processes: Processes) -> Scores:
        folder = tmp_path / str(processes.size)
        task = ScoringTask(NoiseRenderer(), POOL, extractor, PROTOCOL, images, folder, processes)
        return task.score("render", photographs, "photos")

    alone = score(Processes())
    for scores in run_processes(size, score):
        assert scores.provenance == alone.provenance
        assert scores.values == pytest.approx(alone.values, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("size", "images"), [(2, 24), (3, 29)])
def test_features_are_shared_out_and_collected_in_order(run_processes, tmp_path, size, images):
    extractor = choose_extractor("offline")

    def share(processes: Processes) -> tuple[Features, list[int]]:
        renderer = NoiseRenderer()
        task = ScoringTask(renderer, POOL, extractor, PROTOCOL, images, tmp_path, processes)
        fakes = RenderedImages(lambda indices: task._render("render", range(indices[0], indices[-1] + 1)), images, 8)
        return task._share_features(fakes), renderer.asked

    (alone, asked), results = share(Processes()), run_processes(size, share)
    assert asked == list(range(images))
    assert [number for _, numbers in results for number in numbers] == asked  # each is rendered once, by one of them
    assert results[0][0].keys() == alone.keys()
    for layer, features in alone.items():
        torch.testing.assert_close(results[0][0][layer], features, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("error", [Stopped("SIGTERM"), torch.cuda.OutOfMemoryError("CUDA out of memory")], ids=repr)
def test_what_ends_the_rendering_of_one_process_ends_that_of_all(run_processes, photographs, tmp_path, error):
    def score(processes: Processes) -> Any:
        renderer = NoiseRenderer()
        render, failures = renderer.render_random, [error] if processes.rank == 1 else []

        def fail_once(*arguments: Any, **keywords: Any) -> Renders:
            if failures:
                raise failures.pop()
            return render(*arguments, **keywords)

        renderer.render_random = fail_once
        task = ScoringTask(renderer, POOL, choose_extractor("offline"), PROTOCOL, 24, tmp_path, processes)
        try:
            return task.score("render", photographs, "photos").values["fid_offline"], task.protocol.batch_size
        except Stopped as stopped:
            return str(stopped)

    first, second = run_processes(2, score)
    if isinstance(error, Stopped):
        assert (first, second) == ("process 1 was asked to stop", "SIGTERM")
    else:
        assert first == second  # all try again with half of the images at once
        assert first[1] == PROTOCOL.batch_size // 2
