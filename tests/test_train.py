"""train.py as a program: what a run leaves behind, how it stops, and that a resumed run is the unbroken one."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import graf
from graf.config import load_config
from graf.evaluation.fidelity import read_scores
from graf.geometry.rays import Patches
from graf.models.camera_refinement import STORED_FACTOR
from graf.runtime.amp import Precision
from graf.runtime.checkpoint import read_checkpoint
from graf.runtime.interrupt import Stopped, StopRequest
from graf.runtime.logs import RunLog

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"
PHOTOS = ROOT.parent / "shared" / "data"

#: a run without pictures, scores and monitors: iterations and checkpoints only
BARE = ("training.fid_every=0", "training.sample_every=0", "training.monitoring=[]")


@pytest.fixture
def train(run_program, smoke_run):
    """train.py on configs/smoke.yaml in tmp_path, with the photographs of the shared run; returns the exit code."""
    return lambda *arguments: run_program("train.py", "--config", SMOKE, f"data.datadir={smoke_run.data}", *arguments)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The training rows of metrics.jsonl, without the rows of scores."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss_d" in row]


def checkpoint_names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_equal(first: object, second: object, where: str) -> None:
    """Nested dicts and lists with bit for bit equal tensors."""
    if isinstance(first, torch.Tensor):
        assert isinstance(second, torch.Tensor)
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert isinstance(second, dict)
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list):
        assert isinstance(second, list)
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_equal(a, b, f"{where}.{number}")
    else:
        assert first == second, where


# ---------------------------------------------------------------- a finished run


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_help_answers_within_three_seconds(program):
    started = time.monotonic()
    result = subprocess.run([sys.executable, ROOT / program, "--help"], capture_output=True, text=True, timeout=30)
    assert time.monotonic() - started < 3
    assert result.returncode == 0
    assert result.stdout.startswith("usage:")


def test_every_promised_scalar_is_logged_in_every_iteration(smoke_run):
    rows = read_metrics(smoke_run.folder)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    promised = {
        *("loss_d", "loss_g", "penalty", "d_real", "d_fake", "grad_norm_d", "grad_norm_g", "scale_d", "scale_g"),
        *("lr_d", "lr_g", "patch_min_scale", "density_noise", "images_per_second", "time"),
        *(f"seconds_{phase}" for phase in ("data", "inputs", "d", "r1", "g", "update", "ema")),
    }
    for row in rows:
        assert promised <= row.keys()
        assert any(name.startswith("memory_") for name in row)
        assert all(math.isfinite(value) for value in row.values())
        assert 0 < row["d_real"] < 1
        assert row["images_per_second"] > 0
        assert all(value >= 0 for name, value in row.items() if name.startswith("seconds_"))
    assert len({row["loss_d"] for row in rows}) == 6


def test_grids_of_colour_depth_and_opacity_show_every_object_from_all_sides(smoke_run):
    files = sorted(path.name for path in (smoke_run.folder / "samples").iterdir())
    kinds = ("depth", "opacity", "rgb")
    assert files == [f"{kind}_{iteration:08d}.png" for kind in kinds for iteration in (1, 3, 6)]
    for file in files:
        with Image.open(smoke_run.folder / "samples" / file) as picture:
            assert picture.height == 2 * (32 + 2) + 2 + 18  # two objects, captions above
            assert 8 * (32 + 2) + 2 < picture.width < 8 * (32 + 2) + 2 + 60  # eight azimuths, class names on the left


def test_scores_carry_their_provenance(smoke_run):
    rows = read_scores(smoke_run.folder / "scores.jsonl")
    assert [row["iteration"] for row in rows] == [3, 6]
    for row in rows:
        assert {"fid_offline", "kid_offline", "kid_std_offline"} <= row.keys()
        assert not {"fid", "kid"} & row.keys()
        assert (row["n_real"], row["n_fake"], row["resolution"], row["ema"]) == (42, 12, "32x32", True)
        assert row["extractor"] == "graf-offline-v1"
        assert len(str(row["extractor_hash"])) == 64
        assert row["seed"] == 0
        assert "42 views" in str(row["poses"])
    assert (smoke_run.folder / "scores.csv").read_text().count("\n") == 3


def test_the_best_checkpoint_is_that_of_the_lowest_fid_and_says_what_it_was_scored_with(smoke_run):
    assert checkpoint_names(smoke_run.folder) == ["backup_00000004.pt", "model_00000006.pt", "model_best.pt"]
    rows = read_scores(smoke_run.folder / "scores.jsonl")
    lowest = min(rows, key=lambda row: row["fid_offline"])
    best = read_checkpoint(smoke_run.folder / "checkpoints" / "model_best.pt")
    assert best["meta"]["iteration"] == lowest["iteration"]
    assert best["objects"]["progress"]["best"] == lowest
    last = read_checkpoint(smoke_run.folder / "checkpoints" / "model_00000006.pt")
    assert last["meta"]["iteration"] == last["objects"]["progress"]["iteration"] == 6
    assert last["objects"]["averages"] == {"generator": 6}


def test_the_resolved_config_is_a_config_of_the_same_run(smoke_run, run_program, monkeypatch, capsys):
    written = smoke_run.folder / "config.yaml"
    assert load_config(written) == load_config(SMOKE)
    assert read_checkpoint(smoke_run.folder / "checkpoints" / "model_best.pt")["meta"]["config"] == load_config(
        written
    ).model_dump(mode="json")
    monkeypatch.chdir(smoke_run.cwd)
    assert run_program("train.py", "--config", written) == 0
    assert "has already run its 6 iterations" in capsys.readouterr().out
    assert len(read_metrics(smoke_run.folder)) == 6


def test_the_console_names_device_data_and_folder(smoke_run):
    assert "device: " in smoke_run.stdout
    assert "42 photographs of 4 classes" in smoke_run.stdout
    assert f"run folder: {Path('results', 'smoke')}" in smoke_run.stdout
    (line,) = [line for line in smoke_run.stdout.splitlines() if line.startswith("where the time went, ")]
    assert all(f"{phase} " in line for phase in ("generator", "scoring", "sample grids", "rest"))
    assert "Warning" not in smoke_run.stderr
    assert "Traceback" not in smoke_run.stderr
    assert any((smoke_run.folder / "tensorboard").iterdir())


# ---------------------------------------------------------------- the command line


def test_flags_and_keys_may_stand_in_any_order_and_keys_win(train, tmp_path):
    arguments = ["--outdir", "runs", *BARE, "--seed", "3", "expname=mine", "--max_iterations", "9"]
    assert train(*arguments, "training.batch_size=4", "--device", "cpu", "training.max_iterations=1", "--use_amp") == 0
    config = load_config(tmp_path / "runs" / "mine" / "config.yaml")
    assert (config.seed, config.training.max_iterations, config.training.batch_size) == (3, 1, 4)
    assert (config.training.device, config.training.use_amp) == ("cpu", True)
    assert checkpoint_names(tmp_path / "runs" / "mine") == ["model_00000001.pt"]


def test_rates_that_follow_the_batch_are_said_and_logged(train, tmp_path, capsys):
    keys = ["training.scale_lr=linear", "training.batch_size=6", "training.lr_points=[[0, 0.5], [4, 1]]"]
    assert train(*BARE, *keys, "training.lr_schedule=points", "--max_iterations", "3") == 0
    assert (
        "training.scale_lr=linear: batches of 6 images, the learning rates are written for 2: "
        "training.lr_d 0.0001 -> 0.0003, training.lr_g 0.0005 -> 0.0015"
    ) in capsys.readouterr().out
    rows = read_metrics(tmp_path / "results" / "smoke")
    assert [row["lr_g"] for row in rows] == pytest.approx([1.5e-3 * factor for factor in (0.5, 0.625, 0.75)])


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("coil100", ["data.type=turntable", "data.v_list=[0.31]", "data.white_bkgd=false"]),
        ("lego128", ["data.type=transforms"]),
    ],
)
def test_real_photographs_train(run_program, tmp_path, name, keys):
    if not (PHOTOS / name).is_dir():
        assert os.environ.get("CI") != "true", f"{PHOTOS / name} is missing"
        pytest.skip(f"no {PHOTOS / name}")
    keys = [f"data.datadir={PHOTOS / name}", *keys, *BARE, "discriminator.class_loss=1", "--max_iterations", "2"]
    assert run_program("train.py", "--config", SMOKE, *keys) == 0
    rows = read_metrics(tmp_path / "results" / "smoke")
    assert all(math.isfinite(row["loss_d_class"]) for row in rows)


def write_labelled_photographs(folder: Path, splits: dict[int, str]) -> None:
    """Eight views of a cup; `splits`: azimuth -> what its row of labels.csv says in the column split."""
    folder.mkdir()
    rows = ["file,class,height,angle,split"]
    for angle in range(0, 360, 45):
        Image.new("RGB", (32, 32), (angle // 2, 50, 50)).save(folder / f"{angle}.png")
        rows.append(f"{angle}.png,cup,0,{angle},{splits.get(angle, '')}")
    (folder / "labels.csv").write_text("\n".join(rows))


def test_splits_of_labels_csv_choose_the_best_checkpoint_and_are_reported(run_program, tmp_path, capsys):
    keys = [f"data.datadir={tmp_path / 'cups'}", "data.type=turntable", "data.v_list=[0.3]", "data.heldout_every=0"]
    keys += ["training.save_best=psnr", "training.sample_every=0", "training.monitoring=[]"]
    write_labelled_photographs(tmp_path / "cups", {90: "validation", 180: "test", 270: "test"})
    assert run_program("train.py", "--config", SMOKE, *keys) == 0
    folder = tmp_path / "results" / "smoke"
    best = read_checkpoint(folder / "checkpoints" / "model_best.pt")["objects"]["progress"]["best"]
    rows = read_scores(folder / "scores.jsonl")
    assert len(rows) == 2
    assert best["psnr_validation"] == max(row["psnr_validation"] for row in rows)
    assert run_program("eval.py", "--run", folder, "--heldout") == 0
    [report] = folder.glob("eval*/heldout*.json")
    assert json.loads(report.read_text())["objects"][-1]["photographs"] == 2

    write_labelled_photographs(tmp_path / "all_seen", {})
    capsys.readouterr()
    keys[0] = f"data.datadir={tmp_path / 'all_seen'}"
    assert run_program("train.py", "--config", SMOKE, *keys, "expname=unsplit") == 1
    said = capsys.readouterr()
    assert "training.save_best=psnr: there are no photographs to compare with" in said.err
    assert "set data.heldout_every=6, or add photographs" in said.out + said.err


def test_a_line_that_a_disk_has_refused_is_written_by_a_start_with_other_terms(train, tmp_path, monkeypatch):
    write = RunLog.scalars

    def refuse(log, iteration, scalars):
        if iteration == 2:
            raise OSError(28, "No space left on device", "metrics.jsonl")
        write(log, iteration, scalars)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "scalars", refuse)
        assert train(*BARE, "training.max_iterations=3", "training.opacity=0.3") == 1
    assert train(*BARE, "training.max_iterations=3", "training.opacity=0") == 0
    rows = [json.loads(row) for row in (tmp_path / "results" / "smoke" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["iteration"], "loss_g_opacity" in row) for row in rows] == [(1, True), (2, True), (3, False)]


@pytest.mark.parametrize("is_stopped_before", [False, True])
def test_a_term_that_a_resumed_run_leaves_out_is_logged_no_more(train, tmp_path, monkeypatch, is_stopped_before):
    def leave(_):
        raise Stopped("at once")

    assert train(*BARE, "training.max_iterations=2", "training.opacity=0.3", "training.layer_norms=true") == 0
    without = ("training.max_iterations=4", "training.opacity=0", "training.layer_norms=false")
    if is_stopped_before:  # its first step; the checkpoint that it saves has its settings already
        with monkeypatch.context() as patch:
            patch.setattr(StopRequest, "leave_if_asked", leave)
            assert train(*BARE, *without) == 75
    assert train(*BARE, *without) == 0
    rows = [json.loads(row) for row in (tmp_path / "results" / "smoke" / "metrics.jsonl").read_text().splitlines()]
    assert ["loss_g_opacity" in row for row in rows] == [True, True, False, False]
    assert [any(name.startswith("grad_norm_g/") for name in row) for row in rows] == [True, True, False, False]


# ---------------------------------------------------------------- learned cameras

LEARNED = (*BARE, "training.match_views=true", "training.photometric=20", "training.optimizer=adam")
LEARNED += ("training.lr_g=3e-3", "training.model_average_beta=0.5")


def test_learned_cameras_are_saved_resumed_written_to_the_config_and_used_by_eval(train, run_program, tmp_path, capsys):
    keys = (*LEARNED, "data.refine_cameras=true", "training.max_iterations=3")
    assert train(*keys, "expname=whole") == 0
    printed = capsys.readouterr().out
    assert train(*keys, "expname=parts", "training.max_iterations=1") == 0
    run = tmp_path / "results" / "parts"
    assert run_program("train.py", "--config", run / "config.yaml", "training.max_iterations=3") == 0
    states = []
    for folder in (run, tmp_path / "results" / "whole"):
        objects = read_checkpoint(folder / "checkpoints" / "model_00000003.pt")["objects"]
        states.append({name: objects[name] for name in ("generator", "generator_average", "optimizer_g")})
    assert_equal(*states, "resumed")
    average = states[0]["generator_average"]
    assert all(bool(average[f"cameras.{name}"].any()) for name in ("lens", "elevation", "framing"))

    found = load_config(run / "config.yaml").data.refined_cameras
    assert found is not None
    assert f"field of view {found.fov:.2f} degrees (given: 30.00)" in printed
    lens = math.log(math.tan(math.radians(15)) / math.tan(math.radians(found.fov / 2)))
    assert lens == pytest.approx(float(average["cameras.lens"]) / STORED_FACTOR, abs=1e-5)
    series = torch.tensor(found.framing["mug"].right)
    torch.testing.assert_close(series, average["cameras.framing"][3, 1] / STORED_FACTOR, atol=1e-6, rtol=0)

    renderer = graf.load(run, device="cpu")
    torch.testing.assert_close(renderer.generator.cameras.framing, average["cameras.framing"])
    labelled = renderer.cameras.views_of_labels(torch.tensor([[3, 0, 90, -1]]))
    poses, patches = renderer.generator.aim(labelled, Patches.whole(1))
    assert not torch.allclose(poses, labelled.poses, atol=1e-5)
    assert not torch.equal(patches.centre, torch.zeros(1, 2))
    assert run_program("eval.py", "--run", run, "--heldout", "--device", "cpu") == 0


def test_known_cameras_are_where_another_run_begins_or_what_it_uses_as_they_are(train, run_program, tmp_path, capsys):
    assert train(*LEARNED, "data.refine_cameras=true", "--max_iterations", "2") == 0
    run = tmp_path / "results" / "smoke"
    learned = read_checkpoint(run / "checkpoints" / "model_00000002.pt")["objects"]["generator_average"]
    again = ["train.py", "--config", run / "config.yaml", "--resume", "none", "--max_iterations", "1"]
    assert run_program(*again, "expname=fixed", "data.refine_cameras=false") == 0
    assert run_program(*again, "expname=moving", "training.lr_g=1e-9") == 0
    for name in ("fixed", "moving"):
        objects = read_checkpoint(tmp_path / "results" / name / "checkpoints" / "model_00000001.pt")["objects"]
        for key in ("cameras.lens", "cameras.elevation", "cameras.framing"):
            torch.testing.assert_close(objects["generator"][key], learned[key], atol=2e-5, rtol=0)
    capsys.readouterr()
    assert run_program(*again, "expname=other", "data.classes=[car]") == 0  # a part of the classes is known as well
    config = load_config(run / "config.yaml").data.refined_cameras.model_dump()
    del config["framing"]["mug"]
    assert train(*LEARNED, f"data.refined_cameras={json.dumps(config)}", "expname=foreign") == 1
    assert "data.refined_cameras: knows the classes car, duck, house, not mug; " in capsys.readouterr().err
    config = load_config(run / "config.yaml").data.refined_cameras.model_dump() | {"elevations": [20.0]}
    assert train(*LEARNED, f"data.refined_cameras={json.dumps(config)}", "expname=foreign") == 1
    assert "data.refined_cameras: has 1 elevations for the " in capsys.readouterr().err


# ---------------------------------------------------------------- checkpoints and resuming


@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "with loss scaling"])
def test_a_run_in_two_parts_is_the_run_in_one(train, tmp_path, monkeypatch, capsys, scaled):
    """Weights, average, optimisers, scalers, progress and every logged loss, bit for bit."""
    if scaled:
        scalers = pytest.importorskip("torch.amp.grad_scaler")  # torch 2.3
        scaler = lambda self, enabled=None: scalers.GradScaler("cpu", init_scale=1024.0, growth_interval=4)  # noqa: E731
        monkeypatch.setattr(Precision, "make_scaler", scaler)
    keys = [*BARE, "training.optimizer=adam", "training.lr_schedule=multistep", "training.lr_anneal_every=[2,4]"]
    keys += [
        "discriminator.spectral_norm=true",
        "training.reg_every=2",
        "data.heldout_every=24",
        "training.batch_size=9",
    ]
    assert train(*keys, "--outdir", "whole", "--max_iterations", "6") == 0
    assert train(*keys, "--outdir", "parts", "--max_iterations", "3") == 0
    assert "resuming" not in capsys.readouterr().out
    assert train(*keys, "--outdir", "parts", "--max_iterations", "6") == 0
    assert "resuming from" in (printed := capsys.readouterr().out)
    assert "training.max_iterations: 3 -> 6" in printed

    whole, parts = tmp_path / "whole" / "smoke", tmp_path / "parts" / "smoke"
    one, two = (read_checkpoint(run / "checkpoints" / "model_00000006.pt")["objects"] for run in (whole, parts))
    for checkpoint in (one, two):
        assert checkpoint["progress"].pop("seconds") > 0
        assert checkpoint["averages"] == {"generator": 6}
        assert checkpoint["optimizer_g"]["param_groups"][0]["lr"] == 5e-4 / 4
        if scaled:
            assert (checkpoint["scaler_d"]["scale"], checkpoint["scaler_d"]["_growth_tracker"]) == (2048.0, 2)
    assert_equal(one, two, "checkpoint")
    rows, resumed_rows = read_metrics(whole), read_metrics(parts)
    assert len(rows) == len(resumed_rows) == 6
    for row, resumed in zip(rows, resumed_rows, strict=True):
        assert resumed["images_per_second"] > 0
        for name in ("iteration", "loss_d", "loss_g", "grad_norm_d", "grad_norm_g", "lr_g", "scale_g", "d_real"):
            assert row[name] == resumed[name], name


def test_sigterm_saves_and_the_command_that_it_prints_goes_on_from_there(
    run_command_line, smoke_run, run_program, tmp_path
):
    keys = [*BARE, f"data.datadir={smoke_run.data}", "training.lr_schedule=exponential", "training.lr_anneal_every=10"]
    process = run_command_line(
        "train.py", "--config", str(SMOKE), *keys, "--max_iterations", "1000000", "--resume", "none", cwd=tmp_path
    )
    run = tmp_path / "results" / "smoke"
    try:
        for _ in range(600):
            if (run / "metrics.jsonl").is_file() and len(read_metrics(run)) >= 3:
                break
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, stderr
    last = read_metrics(run)[-1]
    iteration = int(last["iteration"])
    assert f"stopped after iteration {iteration} (SIGTERM); resume with: " in stdout
    assert checkpoint_names(run)[-1] == f"model_{iteration:08d}.pt"
    saved = read_checkpoint(run / "checkpoints" / f"model_{iteration:08d}.pt")
    assert saved["meta"]["iteration"] == iteration

    command = shlex.split(stdout.split("resume with: ")[1].splitlines()[0])
    assert command[:2] == ["python", "train.py"]
    assert run_program(*command[1:], "--max_iterations", iteration + 2) == 0
    rows = read_metrics(run)
    assert [row["iteration"] for row in rows] == list(range(1, iteration + 3))
    for row in rows:
        assert row["lr_g"] == pytest.approx(5e-4 * 0.5 ** ((row["iteration"] - 1) / 10))
        assert (row["scale_g"], row["scale_d"]) == (1.0, 1.0)
    resumed = read_checkpoint(run / "checkpoints" / f"model_{iteration + 2:08d}.pt")["objects"]
    assert resumed["averages"] == {"generator": iteration + 2}


def test_max_minutes_stops_saves_shows_and_says_how_to_go_on(train, tmp_path, capsys):
    assert train("training.fid_every=0", "training.monitoring=[]", "--max_minutes", "1e-6") == 75
    assert "stopped after iteration 1 (training.max_minutes=1e-06 have passed)" in (printed := capsys.readouterr().out)
    assert f"resume with: python train.py --config {Path('results', 'smoke', 'config.yaml')}" in printed
    run = tmp_path / "results" / "smoke"
    assert checkpoint_names(run) == ["model_00000001.pt"]
    assert (run / "samples" / "rgb_00000001.png").is_file()


def test_resume_none_starts_afresh_beside_the_run_in_a_folder_that_resumes_itself(train, run_program, tmp_path, capsys):
    keys = [*BARE, "--max_iterations", "1", "--resume", "none"]
    for name in ("smoke", "smoke-2", "smoke-3"):
        assert train(*keys) == 0
        assert f"run folder: {Path('results', name)}" in capsys.readouterr().out
        assert checkpoint_names(tmp_path / "results" / name) == ["model_00000001.pt"]
    second = Path("results", "smoke-2", "config.yaml")
    assert load_config(second).expname == "smoke-2"
    assert run_program("train.py", "--config", second, "--max_iterations", "2") == 0
    assert [row["iteration"] for row in read_metrics(tmp_path / "results" / "smoke-2")] == [1, 2]
    assert [row["iteration"] for row in read_metrics(tmp_path / "results" / "smoke")] == [1]


def test_resume_takes_a_checkpoint_by_its_path(run_command_line, smoke_run, tmp_path):
    backup = smoke_run.folder / "checkpoints" / "backup_00000004.pt"
    keys = [*BARE, f"data.datadir={smoke_run.data}", "--outdir", "elsewhere", "--resume", str(backup)]
    process = run_command_line("train.py", "--config", str(SMOKE), *keys, cwd=tmp_path)  # threads as in smoke_run
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert f"resuming from {backup}" in stdout
    rows = read_metrics(tmp_path / "elsewhere" / "smoke")
    original = read_metrics(smoke_run.folder)[4:]
    assert [row["loss_d"] for row in rows] == [row["loss_d"] for row in original]
    assert [row["iteration"] for row in rows] == [5, 6]


def test_timed_checkpoints_are_pruned_and_backups_are_kept(train, tmp_path):
    keys = ["training.save_every=1e-9", "training.keep_checkpoints=2", "training.backup_every=2"]
    assert train(*BARE, *keys, "--max_iterations", "5") == 0
    run = tmp_path / "results" / "smoke"
    assert checkpoint_names(run) == [
        *("backup_00000002.pt", "backup_00000004.pt", "model_00000004.pt", "model_00000005.pt")
    ]


def test_nothing_random_of_the_process_enters_a_run(train, tmp_path):
    for seed, outdir in ((1, "a"), (2, "b")):
        torch.manual_seed(seed)
        assert train("training.monitoring=[]", "--outdir", outdir, "--max_iterations", "3") == 0
    one, two = (read_metrics(tmp_path / outdir / "smoke") for outdir in ("a", "b"))
    assert [row["loss_g"] for row in one] == [row["loss_g"] for row in two]
    assert read_scores(tmp_path / "a/smoke/scores.jsonl") == read_scores(tmp_path / "b/smoke/scores.jsonl")
