"""What happens between steps, hook by hook, on a stand-in trainer: when, how often, and with which numbers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graf.app import hooks
from graf.app.runs import RunFolder
from graf.config import Config
from graf.evaluation.fidelity import Scores
from graf.evaluation.grids import Showcase
from graf.evaluation.renderer import Renders
from graf.geometry.views import Cameras, Views
from graf.runtime.checkpoint import SaveError, read_checkpoint
from graf.runtime.distributed import Processes
from graf.runtime.interrupt import Stopped, StopRequest
from graf.runtime.logs import RunLog, SilentLog
from graf.runtime.memory import CacheRelease
from graf.runtime.memory_profiler import MemoryProfiler
from graf.runtime.phase_timer import make_timer
from graf.training.trainer import Progress

CPU = torch.device("cpu")


def trainer_at(iteration: int, seconds: float = 0.0, **training: Any) -> SimpleNamespace:
    """What the hooks use of a Trainer; training: keys of that section."""
    meter = MemoryProfiler(CPU)
    meter.readings["d"] = {"live_peak": 12.0}
    return SimpleNamespace(
        config=Config.model_validate({"training": training}),
        progress=Progress(iteration, seconds),
        settle=lambda: None,
        device=CPU,
        profiler=meter,
        phase=meter.phase,
        timer=make_timer(CPU),
        owners=[],
        state={"progress": Progress(iteration, seconds)},
        stop_reason=None,
        processes=Processes(),
        latest={"loss_d": torch.ones(())},
        share_statistics=lambda: None,
        scalars_of=lambda statistics: {"loss_d": 1.0, "loss_g": 2.0},
    )


def rows_of(folder: Path) -> dict[int, dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {row["iteration"]: row for row in map(json.loads, lines)}


@pytest.mark.parametrize(
    ("start", "seconds", "expected"),
    [
        (0, 0.0, {1: 8 / 2, 10: 9 * 8 / 18, 20: 10 * 8 / 20}),
        (13, 100.0, {20: 7 * 8 / 14}),  # resumed: its first line counts its own steps alone
        (10, 100.0, {20: 10 * 8 / 20}),
    ],
)
def test_images_per_second_counts_the_steps_since_the_last_line(tmp_path, start, seconds, expected):
    with RunLog(tmp_path, total=30, start=start, progress=False) as log:
        hook = hooks.LogHook(log, CacheRelease("never", CPU, make_timer(CPU)), (start, seconds))
        for iteration in range(start + 1, 24):
            hook(trainer_at(iteration, seconds + 2.0 * (iteration - start), print_every=10, batch_size=8), {})
    rows = rows_of(tmp_path)
    assert {iteration: row["images_per_second"] for iteration, row in rows.items()} == pytest.approx(expected)
    for row in rows.values():
        assert (row["loss_d"], row["loss_g"]) == (1.0, 2.0)
        assert row["memory_d_live_peak"] == 12.0
        assert {"memory_rss", "memory_peak_rss"} & row.keys()


@pytest.mark.parametrize(
    ("every", "expected"),
    [(500, [1, 10, 50, 100, 250, 500, 1000]), (100, [1, 10, 50, *range(100, 1001, 100)]), (400, None), (0, [])],
)
def test_sample_grids_are_denser_at_the_start(monkeypatch, every, expected):
    expected = [1, 10, 50, 100, 250, 400, 800] if expected is None else expected
    drawn: list[int] = []
    hook = hooks.SampleHook(*[None] * 4, CacheRelease("never", CPU, make_timer(CPU)))  # type: ignore[arg-type]
    monkeypatch.setattr(hook, "write", lambda iteration, processes: drawn.append(iteration))
    for iteration in range(1, 1001):
        hook(trainer_at(iteration, sample_every=every, max_iterations=2000), {})
    assert drawn == expected


def test_a_checkpoint_is_saved_when_its_time_has_come_and_once_an_iteration(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(hooks.time, "monotonic", lambda: clock.now)
    run = RunFolder(tmp_path)
    log = RunLog(tmp_path, total=30, start=0, progress=False)
    hook = hooks.CheckpointHook(run, {}, CacheRelease("never", CPU, make_timer(CPU)), log, _last=clock.now)
    settings = {"save_every": 10, "backup_every": 4, "keep_checkpoints": 2}
    for iteration in range(1, 10):
        clock.now += 4
        hook(trainer_at(iteration, **settings), {})
    hook.save_reached(trainer_at(9, **settings))
    saved = sorted(path.name for path in run.checkpoints.iterdir())
    backups = ["backup_00000004.pt", "backup_00000008.pt"]
    assert saved == [*backups, "model_00000006.pt", "model_00000009.pt"]  # 3, 6 and 9 were due, two are kept
    before = (run.checkpoints / "model_00000009.pt").stat().st_mtime_ns
    hook.save_reached(trainer_at(9, **settings))
    assert (run.checkpoints / "model_00000009.pt").stat().st_mtime_ns == before


def test_a_best_checkpoint_that_could_not_be_written_is_no_best_one(tmp_path, monkeypatch):
    log = RunLog(tmp_path, total=9, start=0, progress=False)
    caches = CacheRelease("never", CPU, make_timer(CPU))
    checkpoints = hooks.CheckpointHook(RunFolder(tmp_path), {}, caches, log)
    found = iter([9.0, 5.0, 5.0])
    task = SimpleNamespace(
        protocol=SimpleNamespace(batch_size=4),
        score=lambda *_: Scores({"fid": next(found)}, {"iteration": trainer.progress.iteration}),
    )
    photographs = {"render": SimpleNamespace(fingerprint=lambda: "")}
    hook = hooks.ScoreHook(task, photographs, RunFolder(tmp_path), log, checkpoints, caches)  # type: ignore[arg-type]
    trainer = trainer_at(3, fid_every=3, save_best="fid")
    trainer.state = {"progress": trainer.progress}
    hook(trainer, {})
    trainer.progress.iteration = 6
    with monkeypatch.context() as patch:
        patch.setattr(hooks, "RETRY_AFTER", (0.0, 0.0))
        patch.setattr(hooks, "save_checkpoint", lambda *_: (_ for _ in ()).throw(SaveError("no space")))
        with pytest.raises(SaveError):
            hook(trainer, {})
    assert trainer.progress.best == {"iteration": 3, "fid": 9.0}  # as model_best.pt has it
    hook.catch_up(trainer)
    best = read_checkpoint(tmp_path / "checkpoints" / "model_best.pt")["objects"]["progress"]["best"]
    assert best == trainer.progress.best == {"iteration": 6, "fid": 5.0}


def test_the_trainer_is_asked_to_stop_by_a_signal_or_by_the_clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(hooks.time, "monotonic", lambda: clock.now)
    request, trainer = StopRequest(), trainer_at(1, max_minutes=2.0)
    hook = hooks.StopHook(request, started=1000.0)
    clock.now = 1119.0
    hook(trainer, {})
    assert trainer.stop_reason is None
    clock.now = 1120.0
    hook(trainer, {})
    assert trainer.stop_reason == "training.max_minutes=2 have passed"
    request.reason = "SIGTERM"
    with pytest.raises(Stopped, match="SIGTERM"):
        hook(trainer, {})
    unlimited = trainer_at(1)
    hooks.StopHook(StopRequest(), started=0.0)(unlimited, {})
    assert unlimited.stop_reason is None


class FlatRenderer:
    """Stands in for Renderer: paints each image in one colour that says its code, class and azimuth."""

    cameras = Cameras(3.5, (0.2, 0.4))
    classes = ("cup", "pot", "jug")
    caster = SimpleNamespace(near=2.5, far=4.5)
    ccsr = None

    def render_views(self, z: torch.Tensor, views: Views, super_resolve: bool = False) -> Renders:
        colours = torch.stack([z[:, 0], views.class_idx / 10, views.u * 2 - 1], 1)
        plane = torch.ones(len(z), 1, 8, 8)
        return Renders(colours[:, :, None, None] * plane, 3 * plane, 0.5 * plane)


@pytest.mark.parametrize(("size", "objects"), [(2, 5), (3, 2), (4, 1)])
def test_several_processes_draw_the_grids_of_one(run_processes, tmp_path, size, objects):
    showcase = Showcase.around(torch.linspace(-1, 1, objects)[:, None], [row % 3 for row in range(objects)], 4, 0.3)

    def draw(processes: Processes) -> dict[str, bytes]:
        folder = RunFolder(tmp_path / str(processes.size))
        log = SilentLog()
        hook = hooks.SampleHook(FlatRenderer(), showcase, folder, log, CacheRelease("never", CPU, make_timer(CPU)))
        hook.write(7, processes)
        return {file.name: file.read_bytes() for file in folder.samples.iterdir()}

    alone = draw(Processes())
    assert set(alone) == {f"{kind}_00000007.png" for kind in ("rgb", "depth", "opacity")}
    assert run_processes(size, draw)[0] == alone


def test_of_a_checkpoint_without_statistics_no_line_is_made_up_for(tmp_path):
    """Else a run that has done all its steps would never be complete."""
    log = RunLog(tmp_path, total=9, start=3, progress=False)
    hook = hooks.LogHook(log, CacheRelease("never", CPU, make_timer(CPU)))
    trainer = trainer_at(3)
    trainer.latest, trainer.progress.logged = {}, 2
    hook.catch_up(trainer)
    assert trainer.progress.logged == 3
    assert not (tmp_path / "metrics.jsonl").exists()
