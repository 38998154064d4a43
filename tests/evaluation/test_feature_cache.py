"""The feature cache: nothing of a run folder is unpickled, and what does not match is computed again."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from graf.evaluation.feature_cache import FeatureCache
from graf.runtime import logs

STEM = "{name}-extractor-features-64"


@pytest.fixture(autouse=True)
def fresh_messages(monkeypatch):
    monkeypatch.setattr(logs, "_said", set())


def use(cache: FeatureCache, features: torch.Tensor | None = None) -> torch.Tensor | None:
    """One call of torch-fidelity: what it finds in its cache, where it puts `features` if there are none."""
    with cache.lend() as private:
        file = private / (STEM.format(name=cache.name) + ".pt")
        if file.exists():
            return torch.load(file, weights_only=True)
        if features is not None:
            torch.save(features, file)
    return None


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_features_come_back_equal_and_only_to_the_same_images(tmp_path):
    cache, features = FeatureCache(tmp_path / "cache", ["a", 5]), torch.randn(5, 64)
    assert use(cache, features) is None
    assert torch.equal(use(FeatureCache(tmp_path / "cache", ["a", 5])), features)
    assert use(FeatureCache(tmp_path / "cache", ["b", 5])) is None


def test_statistics_and_what_is_no_feature_are_not_kept(tmp_path):
    cache = FeatureCache(tmp_path / "cache", ["a"])
    with cache.lend() as private:
        (private / f"{cache.name}-extractor-stat-fid-64.pt").write_bytes(pickle.dumps({"mu": np.zeros(3)}))
    assert not (tmp_path / "cache").exists()


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_planted_file_is_never_executed(tmp_path):
    folder, sign = tmp_path / "cache", tmp_path / "executed"
    cache = FeatureCache(folder, ["a"])
    folder.mkdir()
    stem = STEM.format(name=cache.name)
    for planted in (f"{stem}.pt", f"{stem}.features", f"{stem}-more.features"):
        torch.save(Bomb(sign), folder / planted)
    head = json.dumps({"protocol": cache.protocol, "file": f"{stem}.features"}).encode()
    (folder / f"{stem}.features").write_bytes(head + b"\n" + pickle.dumps(Bomb(sign)))
    assert use(cache, torch.zeros(2, 64)) is None
    assert not sign.exists()
    assert torch.equal(use(cache), torch.zeros(2, 64))  # and has been replaced


def test_every_change_of_a_file_is_noticed_and_repaired(tmp_path, caplog):
    cache, features = FeatureCache(tmp_path / "cache", ["a"]), torch.randn(3, 8)
    use(cache, features)
    file = only_file(tmp_path / "cache")
    whole = file.read_bytes()
    for position in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        for content in (damaged, whole[:position]):
            file.write_bytes(content)
            assert use(cache) is None
    assert "is not used" in caplog.text
    use(cache, features)
    assert file.read_bytes() == whole


def test_features_of_other_images_under_this_name_are_noticed(tmp_path):
    cache, other = FeatureCache(tmp_path / "cache", ["a"]), FeatureCache(tmp_path / "cache", ["b"])
    use(other, torch.ones(3, 8))
    file = only_file(tmp_path / "cache")
    shutil.copy(file, file.with_name(file.name.replace(other.name, cache.name)))
    assert use(cache) is None


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_costs_time_alone(tmp_path, caplog):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o500)
    assert use(FeatureCache(folder, ["a"]), torch.ones(3, 8)) is None
    assert "features are not kept" in caplog.text


def test_a_disk_that_refuses_costs_time_alone(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    cache = FeatureCache(tmp_path / "cache", ["a"])
    assert use(cache, torch.ones(3, 8)) is None
    assert "features are not kept" in caplog.text
