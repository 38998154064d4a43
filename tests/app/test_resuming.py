"""What a checkpoint's photographs, sizes and precision mean for the run that goes on from it."""

from types import SimpleNamespace

import pytest
import torch

from graf.app import builders, resuming
from graf.app.resuming import describe_photographs, describe_precision, keeps_sizes
from graf.app.runs import RunFolder
from graf.config import load_config
from graf.runtime.amp import Precision
from graf.runtime.checkpoint import ReadError


@pytest.mark.parametrize(
    ("described", "device", "kept"),
    [
        ("cpu (a processor, 2 threads)", "cpu", True),
        ("cuda:1 (a card, 8.0 GiB)", "cuda:0", True),
        ("cpu (a processor, 2 threads)", "cuda:0", False),
        ("cuda:0 (a card, 8.0 GiB)", "cpu", False),
        (None, "cpu", True),  # of a format that did not say
        ("", "cpu", False),
    ],
)
def test_sizes_go_with_the_kind_of_device(described, device, kept):
    config = load_config("smoke")
    meta = {"config": config.model_dump(mode="json")}
    if described is not None:
        meta["machine"] = {"device": described}
    precision = Precision(device, None)
    assert keeps_sizes(config, meta, torch.device(device), precision) == kept
    assert not keeps_sizes(load_config("smoke", ["training.batch_size=3"]), meta, torch.device(device), precision)


@pytest.mark.parametrize(
    ("keys", "on_cpu", "on_gpu"),
    [
        (("nerf.netwidth=256", "nerf.N_samples=64"), 192, 4096),
        (("nerf.field=triplane", "nerf.decoder_width=64", "nerf.N_samples=12", "nerf.N_importance=12"), 8192, 65536),
        (("nerf.netwidth=4096", "nerf.N_samples=64"), 64, 256),
        (("training.chunk=300",), 300, 300),
    ],
)
def test_as_many_rays_are_rendered_at_once_as_caches_or_launches_want(keys, on_cpu, on_gpu):
    config = load_config("smoke", [*keys])
    found = [builders.build_memory_settings(config, device).chunk for device in ("cpu", "cuda")]
    assert found == [on_cpu, on_gpu]


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"precision": "float32"}, []),
        ({"precision": "bfloat16 autocast"}, ["computed in: bfloat16 autocast -> float32"]),
        ({}, []),
    ],
)
def test_another_precision_than_the_checkpoints_is_said_and_keeps_no_sizes(
    machine: dict[str, str], said: list[str]
) -> None:
    config, precision = load_config("smoke"), Precision("cpu", None)
    meta = {"config": config.model_dump(mode="json"), "machine": machine}
    assert describe_precision(meta, precision) == said
    assert keeps_sizes(config, meta, torch.device("cpu"), precision) == (not said)


def test_a_run_remembers_that_it_was_trained_on_other_photographs():
    class Photographs(SimpleNamespace):
        def __len__(self) -> int:
            return 3

    one, other = Photographs(identity="one"), Photographs(identity="other")
    begun = describe_photographs(one, None)
    assert begun == {"number": 3, "identity": "one", "exchanged": False}
    assert describe_photographs(one, begun) == begun
    changed = describe_photographs(other, begun)
    assert changed == {"number": 3, "identity": "other", "exchanged": True}
    assert describe_photographs(other, changed) == changed
    assert describe_photographs(one, changed)["exchanged"]
    for before in ({"number": 3, "identity": "one"}, {}):  # of versions that did not tell
        assert describe_photographs(one, describe_photographs(one, before))["exchanged"] is None
        assert describe_photographs(other, describe_photographs(one, before))["exchanged"] is True


def test_a_best_checkpoint_that_cannot_be_read_for_the_moment_keeps_its_score(tmp_path, monkeypatch):
    trainer = SimpleNamespace(progress=SimpleNamespace(best={"iteration": 3, "fid": 9.0}))
    monkeypatch.setattr(resuming, "read_checkpoint", lambda _: (_ for _ in ()).throw(ReadError("stale")))
    with pytest.raises(ReadError):
        resuming.bring_best(tmp_path / "model_00000004.pt", RunFolder(tmp_path / "other"), trainer)
    assert trainer.progress.best["fid"] == 9.0
