"""The whole program on a GPU: training with super-resolution in half precision, resumed, scored and shown."""

import json
from pathlib import Path

import pytest
import torch

SMOKE = Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("strategy", ["dense", "checkpoint", "deferred"])
def test_a_run_with_super_resolution_trains_resumes_and_is_shown(run_program, tmp_path, dtype, strategy):
    keys = ["data.imsize=16", "ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1", "training.micro_batch_size=1"]
    keys += ["training.chunk=256", f"training.memory_strategy={strategy}", f"training.amp_dtype={dtype}"]
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
