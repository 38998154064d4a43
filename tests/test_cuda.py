"""The whole program on GPUs: training with super-resolution in half precision, resumed, scored, shown; on several."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from graf.app import builders
from graf.config import load_config
from graf.data.loader import BatchOrder, DecodedBatches, make_loader
from graf.runtime.amp import NoOpScaler, Precision, choose_precision
from graf.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"

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


def test_auto_is_bfloat16_where_it_is_native_and_goes_on_from_float16(run_program, tmp_path, capsys):
    arguments = ["--config", SMOKE, "--use_amp", "--device", "cuda"]
    assert run_program("train.py", *arguments, "training.amp_dtype=float16", "--max_iterations", "2") == 0
    assert "float16 autocast with gradient scaling" in capsys.readouterr().out
    assert run_program("train.py", *arguments, "--max_iterations", "4") == 0
    precision = choose_precision(True, "auto", torch.device("cuda:0"))
    is_native = torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)
    assert precision.dtype is (torch.bfloat16 if is_native else torch.float16)
    assert isinstance(precision.make_scaler(), NoOpScaler) is is_native
    assert f", {precision.describe()}\n" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "results" / "smoke" / "metrics.jsonl").read_text().splitlines()]
    scales = {row["iteration"]: row["scale_g"] for row in rows if "scale_g" in row}
    assert scales[2] > 1
    assert (scales[4] == 1) is is_native


def torchrun(processes: int, *command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A script in as many processes as asked for, as torchrun starts them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_process_for_each_gpu_trains_resumes_and_scores(tmp_path):
    processes = min(2, torch.cuda.device_count())
    keys = ["data.imsize=16", "ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1", "training.batch_size=4"]
    keys += ["training.sync_check_every=1"]
    command = [ROOT / "train.py", "--config", SMOKE, "--use_amp", "--device", "cuda", *keys]
    for iterations in (3, 6):
        result = torchrun(processes, *command, "--max_iterations", iterations, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert (f"{processes} processes share every batch of 4 images" in result.stdout) is (processes > 1)
    run = tmp_path / "results" / "smoke"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "loss_sr" in row] == [1, 2, 3, 4, 5, 6]
    assert "sr_kid_offline" in (run / "scores.csv").read_text().splitlines()[0]


#: as in tests/training/test_processes.py, where processes of the CPU are compared
EVERYTHING = (
    *("data.imsize=16", "data.synthetic.instances=3", "training.batch_size=8", "nerf.N_importance=4"),
    *("nerf.raw_noise_std=1", "nerf.jitter=true", "training.reg_type=real", "training.reg_every=2"),
    *("discriminator.class_loss=1", "discriminator.spectral_norm=true", "training.grad_clip=norm"),
    *("training.grad_clip_at=0.5", "training.share_fakes=true", "training.sync_check_every=1"),
    "discriminator.augment={colour: 0.2, translation: 0.1, cutout: 0.2}",
    *("ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1", "ccsr.supervise_generator=1", "ccsr.agreement=1"),
    *("ccsr.start_iteration=0", "ccsr.every=1"),
)
PLANES = (
    *("nerf.field=triplane", "nerf.plane_resolution=8", "nerf.plane_channels=4", "nerf.decoder_width=8"),
    *("training.match_views=true", "training.photometric=20", "training.opacity=0.1", "ray_sampler.snap=true"),
    *("data.refine_cameras=true", "training.share_fakes=false", "training.optimizer=adam"),
)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("keys", [(), PLANES], ids=["mlp", "planes"])
def test_twenty_steps_of_two_gpus_over_nccl_are_those_of_one(tmp_path, keys):
    assert torch.distributed.is_nccl_available()
    script, found = ROOT / "tests" / "training" / "steps_in_float64.py", {}
    for processes in (1, 2):
        file = tmp_path / f"{processes}.pt"
        command = [script, file, "cuda", 20, f"data.datadir={tmp_path / 'data'}", *EVERYTHING, *keys]
        result = torchrun(processes, *command, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        found[processes] = torch.load(file, map_location="cpu", weights_only=True)
    assert [found[count]["backend"] for count in (1, 2)] == ["Processes", "JoinedProcesses"]
    for name, network in found[1]["state"].items():
        for key, value in network.items():
            other, scale = found[2]["state"][name][key], max(1.0, float(value.abs().max()))
            assert float((other.double() - value.double()).abs().max()) <= 1e-8 * scale, f"{name}.{key}"


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


def build_trainer(folder: Path, dtype: torch.dtype | None, *overrides: str) -> tuple[Trainer, list[tuple[Any, ...]]]:
    """The smoke configuration with super-resolution on the GPU, and three batches in pinned memory."""
    keys = [f"data.datadir={folder}", "data.imsize=16", "ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1"]
    config = load_config(SMOKE, [*keys, *overrides])
    photographs = builders.open_photographs(config)
    info = builders.describe_dataset(config, photographs)
    sampler = builders.build_pose_sampler(config, photographs, builders.build_cameras(config, info))
    trainer = builders.build_trainer(config, info, sampler, Precision("cuda", dtype), torch.device("cuda:0"))
    loader = make_loader(photographs, 2, nworkers=0, drop_last=True, seed=0)
    return trainer, [(images.pin_memory(), labels) for images, labels in islice(iter(loader), 3)]


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("training.optimizer=adam",),
        ("ccsr.agreement=1", "ccsr.supervise_generator=1", "training.share_fakes=true"),
        ("training.micro_batch_size=1", "training.memory_strategy=checkpoint", "training.chunk=256"),
        ("training.memory_strategy=deferred", "training.chunk=256", "training.optimizer=adam", "nerf.N_importance=4"),
        ("discriminator.spectral_norm=true", "discriminator.augment.cutout=0.2", "training.grad_clip=norm"),
        PLANES,
    ],
    ids=" ".join,
)
def test_a_step_waits_for_the_gpu_where_rmsprop_has_to_know_a_skip_and_else_not(tmp_path, reads, overrides, dtype):
    trainer, batches = build_trainer(tmp_path, dtype, *overrides)
    waiting = len(trainer.players) if dtype is torch.float16 and trainer.config.training.optimizer == "rmsprop" else 0
    for batch in batches:
        reads.clear()
        torch.cuda.set_sync_debug_mode("error")
        statistics = trainer.step(*batch)
        assert len(reads) == waiting
        trainer.settle()
        assert len(reads) == (waiting or 1)
        trainer.scalars_of(statistics)
        torch.cuda.set_sync_debug_mode("default")
        assert len(reads) == (waiting or 1) + 1
    assert trainer.progress.iteration == 3


def test_adam_in_half_precision_skips_an_infinity_on_the_gpu_and_counts_it_later(tmp_path):
    trainer, batches = build_trainer(tmp_path, torch.float16, "training.optimizer=adam")
    trainer.step(*batches[0])
    trainer.settle()
    skipped, scale = trainer.g.skipped, trainer.g.scaler.get_scale()
    before = [parameter.detach().clone() for parameter in trainer.g.parameters]
    handle = trainer.g.parameters[0].register_hook(lambda gradient: gradient * float("inf"))
    trainer.step(*batches[1])
    handle.remove()
    assert all(map(torch.equal, before, trainer.g.parameters))
    assert trainer.g.skipped == skipped, "nobody has read it"
    trainer.settle()
    assert (trainer.g.skipped, trainer.g.scaler.get_scale()) == (skipped + 1, scale / 2)


def test_a_run_that_diverges_on_the_gpu_says_where_and_keeps_its_last_checkpoint(run_program, tmp_path, capsys):
    arguments = ["--config", SMOKE, "--device", "cuda", "training.print_every=5"]
    arguments += ["training.sample_every=0", "training.fid_every=0"]
    assert run_program("train.py", *arguments, "--max_iterations", "2") == 0
    assert run_program("train.py", *arguments, "--max_iterations", "40", "training.lr_g=1e30") == 1
    assert "is not finite; the last checkpoint is untouched" in capsys.readouterr().err
    checkpoints = tmp_path / "results" / "smoke" / "checkpoints"
    assert [file.name for file in checkpoints.glob("model_0*.pt")] == ["model_00000002.pt"]


@pytest.mark.parametrize("place", ["cpu", "cuda:0"])
def test_batches_of_decoded_photographs_are_those_of_the_cpu_and_nobody_waits_for_them(place):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (9, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels, order = torch.arange(36).view(9, 4), BatchOrder([1] * 9, 4)
    found = DecodedBatches(pixels.to(place), labels, order, torch.device("cuda:0"))
    expected = DecodedBatches(pixels, labels, order, torch.device("cpu"))
    for _ in range(5):
        torch.cuda.set_sync_debug_mode("error")
        images, of_images, _ = next(found)
        torch.cuda.set_sync_debug_mode("default")
        wanted, of_wanted, _ = next(expected)
        assert images.device.type == "cuda"
        assert torch.allclose(images.cpu(), wanted, rtol=0, atol=1e-6)
        assert torch.equal(of_images, of_wanted)
