"""A long run needs no more memory at its end than soon after its start."""

import gc
import json
import sys

import pytest
import torch

from graf.app import hooks
from graf.runtime.live_tensors import LiveTensorMeter
from graf.runtime.memory import read_memory

CPU = torch.device("cpu")
STEPS, EVERY = 200, 20


@pytest.mark.skipif(sys.platform != "linux", reason="resident size is read from /proc")
def test_200_steps_with_sampling_scoring_and_checkpoints_leave_nothing_behind(run_program, monkeypatch, tmp_path):
    live: dict[int, int] = {}
    resident: dict[int, float] = {}
    original = hooks.StopHook.__call__

    def observe(hook, trainer, statistics):
        original(hook, trainer, statistics)
        iteration = trainer.progress.iteration
        if iteration % EVERY == 0:
            for player in trainer.players:  # which latents of views have gradients depends on the batch
                player.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            live[iteration], resident[iteration] = meter.current, read_memory(CPU)["rss"]

    monkeypatch.setattr(hooks.StopHook, "__call__", observe)
    with LiveTensorMeter() as meter:  # sees what was made in any step, the autograd graph's own tensors too
        keys = (
            "ccsr.enabled=true",
            "ccsr.agreement=0.3",
            "ccsr.features=4",
            "ccsr.blocks=1",
            "data.imsize=16",
            "ccsr.start_iteration=0",
            "data.classes=[car,duck]",
            "data.synthetic.instances=2",  # of one instance the truth would be drawn for minutes
            "training.sample_every=20",
            "training.fid_every=40",  # the first score alone makes tables and programs that stay
            "training.backup_every=25",
            "training.save_every=3",
            "training.keep_checkpoints=2",
            "training.print_every=10",
        )
        config = str(hooks.__file__).replace("graf/app/hooks.py", "configs/smoke.yaml")
        assert run_program("train.py", "--config", config, "--max_iterations", STEPS, *keys) == 0
    assert sorted(live) == list(range(EVERY, STEPS + 1, EVERY))
    settled = [live[iteration] for iteration in range(3 * EVERY, STEPS + 1, EVERY)]
    half = len(settled) // 2  # the meter may miss a tensor for a while, where another has taken its place in memory
    assert max(settled[half:]) - max(settled[:half]) <= 4096, live
    first, last = resident[STEPS // 2], resident[STEPS]
    assert last - first < 16, resident  # MiB; allocators keep a few
    lines = (tmp_path / "results" / "smoke" / "metrics.jsonl").read_text().splitlines()
    phases = {key for line in lines for key in json.loads(line)}
    for phase in ("d", "r1", "g", "sr", "ema", "sample", "score", "save"):
        assert f"memory_{phase}_rss" in phases
        if phase != "save":
            assert f"memory_{phase}_live_peak" in phases
