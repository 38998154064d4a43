"""`graf card`: the folder is whole, huggingface_hub reads its card without network, and it says only what is so."""

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import graf
from graf.app.command_line import main
from graf.app.loading import open_checkpoint
from graf.config import load_config
from graf.sharing.model_card import describe_score
from graf.sharing.records import read_measurements, read_resources

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")


@pytest.fixture(autouse=True)
def _offline(restored_process, monkeypatch):
    """Any connection is an error, whatever asks for it."""

    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def card(smoke_run, tmp_path) -> Path:
    """The folder that the command makes of the smoke run."""
    out = tmp_path / "card"
    options = ["--out", str(out), "--name", "small toys", "--license", "cc0-1.0", "--dataset", "someone/toys"]
    assert main(["card", str(smoke_run.folder), *options, "--frames", "2"]) == 0
    return out


def test_the_folder_is_whole_and_its_weights_render_as_the_run_does(card, smoke_run):
    names = {"README.md", "config.yaml", "grid.png", "model.safetensors", "rotation.mp4", "scores"}
    assert {path.name for path in card.iterdir()} == names
    assert (card / "scores" / "scores.jsonl").read_bytes() == (smoke_run.folder / "scores.jsonl").read_bytes()
    found, expected = (graf.load(path, device="cpu") for path in (card / "model.safetensors", smoke_run.folder))
    assert torch.equal(found.sample(seed=3).rgb, expected.sample(seed=3).rgb)
    with Image.open(card / "grid.png") as picture:
        assert min(picture.size) > 4 * 16
    assert load_config(card / "config.yaml").nerf == load_config(smoke_run.folder / "config.yaml").nerf


def test_the_card_is_read_by_the_hubs_own_library_with_every_score_and_its_provenance(card, smoke_run):
    data = hub.ModelCard.load(card / "README.md").data
    assert (data.license, data.library_name, data.model_name) == ("cc0-1.0", "graf", "small toys")
    assert data.datasets == ["someone/toys"]
    assert {"3d", "nerf", "mlp"} <= set(data.tags)
    opened = open_checkpoint(sorted(smoke_run.folder.glob("checkpoints/model_best.pt")), torch.device("cpu"))
    row: dict[str, Any] = {}  # the latest score of each kind: other tests score the run too
    for file in map(smoke_run.folder.joinpath, ("scores.jsonl", "eval/scores.jsonl")):
        for line in file.read_text().splitlines() if file.exists() else ():
            row |= json.loads(line) if json.loads(line)["iteration"] == opened.iteration else {}
    results = {result.metric_type: result for result in data.eval_results}
    names = [name for name in row if name in {"fid_offline", "kid_offline", "precision_offline", "psnr_validation"}]
    assert len(names) >= 3
    for name in names:
        assert results[name].metric_value == pytest.approx(row[name], abs=1e-6)
        assert results[name].metric_args["iteration"] == opened.iteration
    for name in ("n_real", "n_fake", "extractor", "extractor_hash", "seed", "truncation"):
        assert results["fid_offline"].metric_args[name] == row[name]
    assert "not comparable with FID" in results["fid_offline"].metric_name
    assert set(data.metrics) == set(results)


def test_the_text_names_hardware_memory_and_how_to_load_it(card, smoke_run):
    text = hub.ModelCard.load(card / "README.md").text
    meta = torch.load(next(smoke_run.folder.glob("checkpoints/model_0*.pt")), weights_only=True)["meta"]
    assert f"| hardware | {meta['machine']['device']} |" in text
    assert "largest resident memory of the process" in text
    assert 'graf.load("model.safetensors")' in text
    for name in ("grid.png", "rotation.mp4", "config.yaml"):
        assert name in text
    assert str(smoke_run.cwd) not in (card / "README.md").read_text()


def test_without_a_licence_the_card_says_that_it_is_the_persons_to_choose(smoke_run, tmp_path):
    assert main(["card", str(smoke_run.folder), "--out", str(tmp_path / "card"), "--frames", "0"]) == 0
    read = hub.ModelCard.load(tmp_path / "card" / "README.md")
    assert read.data.license == "other"
    assert read.data.datasets is None
    assert "none was named" in read.text
    assert not (tmp_path / "card" / "rotation.mp4").exists()
    assert "rotation.mp4" not in read.text


def test_a_folder_that_holds_something_is_left_alone(smoke_run, tmp_path, capsys):
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "mine.txt").write_text("mine")
    assert main(["card", str(smoke_run.folder), "--out", str(tmp_path / "card")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "card").iterdir()] == ["mine.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["card"]
    assert main(["card", str(smoke_run.folder), "--frames", "1"]) == 1
    assert "--frames 1: expected 0 for no video" in capsys.readouterr().err


def write_lines(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_only_scores_of_the_very_weights_are_taken_the_latest_of_each(tmp_path):
    write_lines(
        tmp_path / "scores.jsonl",
        {"iteration": 5, "seed": 0, "fid": 9.0},
        {"iteration": 6, "seed": 0, "fid": 8.0, "kid": "nan", "kid_std": 0.1, "psnr_validation": 20.0},
    )
    write_lines(tmp_path / "eval" / "scores.jsonl", {"iteration": 6, "seed": 1, "fid": 7.0, "sr_fid": 6.0})
    heldout = {"renders": {"iteration": 6, "resolution": "8x8"}, "objects": [{"name": "average", "labelled": 21.0}]}
    (tmp_path / "eval" / "heldout.json").write_text(json.dumps(heldout))
    found = {(score.name, score.split): score for score in read_measurements(tmp_path, 6)}
    values = {key: score.value for key, score in found.items()}
    expected = {("fid", "train"): 7.0, ("sr_fid", "train"): 6.0, ("psnr", "test"): 21.0}
    assert values == expected | {("psnr_validation", "validation"): 20.0}
    assert found["fid", "train"].provenance == {"iteration": 6, "seed": 1}
    assert "caution" not in found["psnr", "test"].provenance
    (tmp_path / "eval" / "heldout.json").write_text(json.dumps({"never_seen": False, **heldout}))
    (caution,) = (score.provenance["caution"] for score in read_measurements(tmp_path, 6) if score.split == "test")
    assert caution == "training may have seen these photographs"
    assert read_measurements(tmp_path, 7) == []
    assert describe_score("sr_fid").startswith("super-resolved: Fréchet distance of Inception features")


def test_resources_are_the_peaks_and_the_rates_up_to_the_weights(tmp_path):
    write_lines(
        tmp_path / "metrics.jsonl",
        {"iteration": 1, "images_per_second": math.pi, "memory_peak_rss": 100.0, "memory_r1_live_peak": 7.0},
        {"iteration": 31, "images_per_second": 2.0, "memory_peak_rss": 120.0, "memory_g_live_peak": 9.0},
        {"iteration": 31, "kind": "scores", "fid": 1.0},
        {"iteration": 61, "images_per_second": 2.0, "memory_peak_rss": 999.0},
    )
    found = read_resources(tmp_path, 31, batch_size=4)
    assert found.minutes == pytest.approx((4 / math.pi + 30 * 4 / 2) / 60)
    assert found.peaks == {"peak_rss": (120.0, ""), "live_peak": (9.0, "g")}
    assert read_resources(tmp_path / "nowhere", 31, batch_size=4).minutes is None
