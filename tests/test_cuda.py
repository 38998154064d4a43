"""The whole program on a GPU: training with super-resolution in half precision, resumed, scored and shown."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from graf.app import builders
from graf.config import load_config
from graf.data.loader import make_loader
from graf.runtime.amp import Precision

SMOKE = Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("strategy", ["dense", "checkpoint", "deferred"])
def test_a_run_with_super_resolution_trains_resumes_and_is_shown(run_program, tmp_path, dtype, strategy):
    keys = ["data.imsize=16", "ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1", "training.micro_batch_size=1"]
    keys += ["ccsr.agreement=0.3", "training.chunk=256"]
    keys += [f"training.memory_strategy={strategy}", f"training.amp_dtype={dtype}"]
    arguments = ["--config", SMOKE, "--use_amp", "--device", "cuda", *keys]
    assert run_program("train.py", *arguments, "--max_iterations", "3") == 0
    assert run_program("train.py", *arguments, "--max_iterations", "6") == 0
    run = tmp_path / "results" / "smoke"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss_sr" in row]
    assert [row["iteration"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert all(0 < row["memory_g_peak"] <= row["memory_g_peak_reserved"] for row in steps)
    assert "sr_kid_offline" in (run / "scores.csv").read_text().splitlines()[0]
    actions = ["--grid", "--rotation", "--frames", "4", "--sr", "--consistency", "--heldout", "--fid_kid"]
    assert run_program("eval.py", "--run", run, "--device", "cuda", *actions) == 0


def test_a_budget_is_kept_by_what_the_allocator_reserves(run_program, tmp_path):
    arguments = ["--config", SMOKE, "--device", "cuda", "--max_iterations", "3", "--memory_budget", "1500MiB"]
    assert run_program("train.py", *arguments, "nerf.netwidth=256", "nerf.netdepth=8", "nerf.N_samples=64") == 0
    rows = (tmp_path / "results" / "smoke" / "metrics.jsonl").read_text().splitlines()
    reserved = [value for row in rows for key, value in json.loads(row).items() if key.endswith("_peak_reserved")]
    assert 0 < max(reserved) <= 1500


@pytest.fixture
def reads(monkeypatch):
    """The numbers of elements that `Tensor.tolist` has read from the GPU; it may, whatever the sync debug mode says."""
    found, tolist = [], torch.Tensor.tolist

    def read(tensor):
        if not tensor.is_cuda:
            return tolist(tensor)
        found.append(tensor.numel())
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return tolist(tensor)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    yield found
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("ccsr.agreement=1", "ccsr.supervise_generator=1", "training.share_fakes=true"),
        ("training.micro_batch_size=1", "training.memory_strategy=checkpoint", "training.chunk=256"),
        ("training.memory_strategy=deferred", "training.chunk=256", "training.optimizer=adam", "nerf.N_importance=4"),
        ("discriminator.spectral_norm=true", "discriminator.augment.cutout=0.2", "training.grad_clip=norm"),
    ],
    ids=" ".join,
)
def test_a_step_waits_for_the_gpu_once_for_each_update_and_a_logged_one_once_more(tmp_path, reads, overrides, dtype):
    keys = [f"data.datadir={tmp_path}", "data.imsize=16", "ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1"]
    config = load_config(SMOKE, [*keys, *overrides])
    photographs = builders.open_photographs(config)
    info = builders.describe_dataset(config, photographs)
    sampler = builders.build_pose_sampler(config, photographs, builders.build_cameras(config, info))
    trainer = builders.build_trainer(config, info, sampler, Precision("cuda", dtype), torch.device("cuda:0"))
    loader = make_loader(photographs, 2, nworkers=0, drop_last=True, seed=0)
    batches = [(images.pin_memory(), labels) for images, labels in islice(iter(loader), 2)]
    for images, labels in batches:
        reads.clear()
        torch.cuda.set_sync_debug_mode("error")
        statistics = trainer.step(images, labels)
        assert reads == [
            2,
            2,
            2,
        ]  # of D, G and CCSR: whether all is finite, and whether the loss scale skips the update
        trainer.scalars_of(statistics)
        torch.cuda.set_sync_debug_mode("default")
        assert len(reads) == 4
    assert trainer.progress.iteration == 2
