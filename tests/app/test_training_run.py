"""One run of training: what all of its processes have to have in common before it begins."""

import hashlib
from pathlib import Path

import pytest
import torch

from graf.app.training_run import find_same_extractor
from graf.config import load_config
from graf.evaluation import extractor
from graf.runtime.distributed import PeerFailure, Processes

WEIGHTS = b"these bytes stand for the Inception weights"


@pytest.mark.parametrize(
    ("owners", "suffixes"),
    [((0, 1), ["", ""]), ((1,), ["_offline", "_offline"]), ((), ["_offline", "_offline"]), ((0,), None)],
    ids=["all", "not the first", "none", "the first alone"],
)
def test_all_processes_score_with_what_the_first_one_has(run_processes, tmp_path, monkeypatch, owners, suffixes):
    monkeypatch.setattr(extractor, "INCEPTION_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    for rank in owners:
        folder = tmp_path / str(rank) / "checkpoints"
        folder.mkdir(parents=True)
        (folder / Path(extractor.URL_INCEPTION_V3).name).write_bytes(WEIGHTS)
    config = load_config("smoke", ["evaluation.feature_extractor=auto", "evaluation.download=false"])

    def find(processes: Processes) -> str:
        torch.hub.set_dir(tmp_path / str(processes.rank))
        return find_same_extractor(config, processes).suffix

    found = run_processes(2, find)
    if suffixes is not None:
        assert found == suffixes
        return
    told, refused = found
    assert isinstance(told, PeerFailure)
    assert isinstance(refused, extractor.ExtractorError)
    assert str(refused).startswith("process 1 cannot score as process 0 does: evaluation.feature_extractor=inception: ")
    assert str(tmp_path / "1") in str(refused)
    assert str(refused).endswith("or set evaluation.feature_extractor=offline")
