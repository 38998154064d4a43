"""What happens between training steps: logging, sample grids, scores, checkpoints, stopping.

train.py injects these. Of several processes every one calls every hook: what they share (renders, sums) is done by all,
what is written by the first one, and what depends on time, signals or files is agreed on before anybody acts on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graf.app import builders
from graf.app.builders import DatasetInfo
from graf.app.refined_cameras import read_refined_cameras
from graf.app.runs import BEST_CHECKPOINT, RunFolder
from graf.base.files import write_atomically
from graf.config import Config, ConfigError
from graf.data.datasets import PhotoDataset
from graf.evaluation.consistency import ConsistencyTask
from graf.evaluation.fidelity import Scores, is_better, write_scores
from graf.evaluation.grids import Showcase, colour_rows, render_showcase, tile_showcase
from graf.evaluation.pictures import save_png
from graf.evaluation.renderer import Renderer
from graf.evaluation.scoring import ScoringTask, ValidationTask
from graf.runtime.checkpoint import SaveError, checkpoint_name, prune_checkpoints, save_checkpoint
from graf.runtime.distributed import Processes
from graf.runtime.interrupt import StopRequest
from graf.runtime.logs import RunLog, logger
from graf.runtime.memory import CacheRelease, read_memory
from graf.training.trainer import Trainer

#: seconds until a checkpoint that could not be written is tried again
RETRY_AFTER = (1.0, 5.0)
#: iterations with a sample grid besides the multiples of training.sample_every
EARLY_SAMPLES = (1, 10, 50, 100, 250)


def is_due(iteration: int, every: int) -> bool:
    """Whether something that happens every `every` iterations (0: never) happens after this one."""
    return every > 0 and iteration % every == 0


def _is_last(trainer: Trainer) -> bool:
    """Whether training ends here, by its length or by the clock, so that whatever is asked for has to be done now."""
    return trainer.progress.iteration >= trainer.config.training.max_iterations or trainer.stop_reason is not None


def _grid_name(kind: str, iteration: int) -> str:
    return f"{kind}_{iteration:08d}.png"


def _grid_tag(kind: str) -> str:
    return f"samples/{kind}"


def find_grids(folder: RunFolder, iteration: int) -> dict[str, Path]:
    """The sample grids of an iteration by the tags under which trackers show them."""
    ending = _grid_name("", iteration)
    return {_grid_tag(file.name.removesuffix(ending)): file for file in folder.samples.glob(f"*{ending}")}


@dataclass
class LogHook:
    """Scalars to console, metrics.jsonl and the configured monitors, every print_every iterations.

    since: iteration and seconds of training at the last line, or where the run begins or continues.
    """

    log: RunLog
    caches: CacheRelease
    since: tuple[int, float] = (0, 0.0)

    def __call__(self, trainer: Trainer, statistics: dict[str, Tensor]) -> None:
        progress, training = trainer.progress, trainer.config.training
        if is_due(progress.iteration, training.print_every) or progress.iteration == 1:
            with trainer.timer.phase("log"):
                trainer.share_statistics()
                if trainer.processes.is_first:
                    self._write(trainer, trainer.latest)
        self.caches.after_step(progress.iteration)  # a GPU is waited for in it, which belongs to the steps before
        progress.logged = progress.iteration

    def catch_up(self, trainer: Trainer) -> None:
        """Write the line that a full or failing disk has refused of the iteration that was reached."""
        if not trainer.latest:  # of a checkpoint that holds no statistics there is nothing to write
            trainer.progress.logged = trainer.progress.iteration
        elif trainer.progress.logged != trainer.progress.iteration:
            self(trainer, trainer.latest)

    def _write(self, trainer: Trainer, statistics: dict[str, Tensor]) -> None:
        progress, training = trainer.progress, trainer.config.training
        steps, seconds = progress.iteration - self.since[0], progress.seconds - self.since[1]
        self.since = (progress.iteration, progress.seconds)
        scalars = trainer.scalars_of(statistics)
        scalars["images_per_second"] = steps * training.batch_size / seconds if seconds > 0 else float("nan")
        memory = read_memory(trainer.device)
        for name in ("peak", "peak_reserved"):  # of what came after the last phase; those of the phases follow
            memory.pop(name, None)
        scalars |= {f"memory_{name}": value for name, value in memory.items()}
        scalars |= trainer.profiler.scalars()
        scalars |= {f"seconds_{name}": taken for name, taken in trainer.timer.take().items()}
        self.log.scalars(progress.iteration, scalars)
        shown = {"D": scalars["loss_d"], "G": scalars["loss_g"], "img/s": scalars["images_per_second"]}
        shown["MiB"] = next(iter(memory.values()), float("nan"))
        if trainer.profiler.worst is not None:
            name, peak = trainer.profiler.worst
            shown[f"peak ({name})"] = peak
        self.log.progress(progress.iteration, shown)


@dataclass
class SampleHook:
    """Grids of fixed objects from all sides, from the averaged weights: rgb, depth and opacity.

    The memory of the first ones is measured, which takes as long as drawing them; the others need as much.
    """

    renderer: Renderer
    showcase: Showcase
    folder: RunFolder
    log: RunLog
    caches: CacheRelease
    _measured: bool = False

    def __call__(self, trainer: Trainer, statistics: dict[str, Tensor]) -> None:
        if self._is_due(trainer):
            trainer.settle()
            watch = nullcontext() if self._measured else trainer.profiler.watch(*trainer.owners)
            with watch, trainer.phase("sample"):
                self.write(trainer.progress.iteration, trainer.processes)
            trainer.progress.sampled = trainer.progress.iteration
            self._measured = True
            self.caches.after_phase()

    def catch_up(self, trainer: Trainer) -> None:
        """Draw what an interrupted run has left out of the iteration that it had reached."""
        if trainer.progress.sampled != trainer.progress.iteration:
            self(trainer, trainer.latest)

    def _is_due(self, trainer: Trainer) -> bool:
        iteration, training = trainer.progress.iteration, trainer.config.training
        every, early = training.sample_every, iteration in EARLY_SAMPLES and iteration < training.sample_every
        return every > 0 and iteration > 0 and (early or is_due(iteration, every) or _is_last(trainer))

    def write(self, iteration: int, processes: Processes) -> None:
        """Render the grids of this iteration, a share of the objects in each process, and save them."""
        own = self.showcase[processes.share(len(self.showcase))]
        shares = processes.gather(processes.together(lambda: self._render(own)))
        processes.by_first(lambda: self._save(iteration, shares))

    def _render(self, showcase: Showcase) -> dict[str, Tensor]:
        caster = self.renderer.caster
        rows = render_showcase(self.renderer, showcase, super_resolve=self.renderer.ccsr is not None)
        return colour_rows(rows, caster.near, caster.far)

    def _save(self, iteration: int, shares: list[dict[str, Tensor]]) -> None:
        names = [self.renderer.classes[index] for index in self.showcase.class_idx.tolist()]
        columns = [f"{360 * float(u):.0f}" for u in self.showcase.u]
        whole = {kind: torch.cat([share[kind] for share in shares if share]) for kind in shares[0] or shares[-1]}
        for kind, picture in tile_showcase(whole, self.showcase.columns, names, columns).items():
            save_png(self.folder.samples / _grid_name(kind, iteration), picture)
            self.log.image(iteration, _grid_tag(kind), picture)


@dataclass
class ScoreHook:
    """FID and KID of the averaged weights; remembers the best score in trainer.progress.best and saves model_best.pt.

    photographs: what each output is scored against, "render" and, with super-resolution, "sr"; validation: measured
    beside the render.
    """

    task: ScoringTask
    photographs: Mapping[str, Any]
    folder: RunFolder
    log: RunLog
    checkpoints: CheckpointHook
    caches: CacheRelease
    consistency: ConsistencyTask | None = None
    validation: ValidationTask | None = None

    def __call__(self, trainer: Trainer, statistics: dict[str, Tensor]) -> None:
        iteration, every = trainer.progress.iteration, trainer.config.training.fid_every
        if every > 0 and iteration > 0 and (is_due(iteration, every) or _is_last(trainer)):
            trainer.share_statistics()  # the best checkpoint holds them
            with trainer.profiler.watch(*trainer.owners), trainer.phase("score"):
                self._score(trainer)
            trainer.progress.scored = iteration
            trainer.progress.scoring_batch = self.task.protocol.batch_size
            self.caches.after_phase()

    def catch_up(self, trainer: Trainer) -> None:
        """Score what an interrupted run has left out of the iteration that it had reached."""
        if trainer.progress.scored != trainer.progress.iteration:
            self(trainer, trainer.latest)

    def _score(self, trainer: Trainer) -> None:
        iteration = trainer.progress.iteration
        provenance = {"iteration": iteration, "ema": trainer.config.training.model_average_beta > 0}
        found: dict[str, Scores] = {}
        for output, photographs in self.photographs.items():
            found[output] = self.task.score(output, photographs, photographs.fingerprint(), provenance)
        trainer.processes.by_first(lambda: self._keep(trainer, found))

    def _keep(self, trainer: Trainer, found: Mapping[str, Scores]) -> None:
        """Measure the rest, write everything down and save the best."""
        iteration = trainer.progress.iteration
        for output, scores in found.items():
            if output == "render" and self.validation is not None:
                scores = replace(scores, values=scores.values | self.validation.measure())
            write_scores(self.folder.path, scores)
            self.log.scores(iteration, scores.values)
            text = ", ".join(f"{name} {value:.4f}" for name, value in scores.values.items())
            metric = trainer.config.training.save_best
            if output == "render" and is_better(scores, trainer.progress.best or None, metric):
                self._save_best(trainer, scores)
                text += f"; the best so far by {metric}"
            logger.info("iteration %d: %s", iteration, text)
        if self.consistency is not None:
            report = self.consistency.measure()
            values = report.as_dict().items()
            numbers = {name: float(value) for name, value in values if name != "objects" and value is not None}
            self.log.scores(iteration, {f"consistency_{name}": value for name, value in numbers.items()})
            logger.info("iteration %d: %s", iteration, report.text())

    def _save_best(self, trainer: Trainer, scores: Scores) -> None:
        """Save model_best.pt, which holds its own score; a score counts as the best only where its file was written."""
        progress = trainer.progress
        former, progress.best = progress.best, scores.as_dict()
        try:
            self.checkpoints.save(trainer, BEST_CHECKPOINT)
        except BaseException:
            progress.best = former
            raise


@dataclass
class CheckpointHook:
    """Saves model_XXXXXXXX.pt every save_every seconds and at the end, backup_XXXXXXXX.pt every backup_every steps.

    Of the former the last keep_checkpoints stay, the latter all. Learned cameras are also written to the run's
    config.yaml, as data.refined_cameras. `refused`: the file that could not be written, though it was tried patiently.
    """

    folder: RunFolder
    meta: dict[str, Any]
    caches: CacheRelease
    log: RunLog
    refused: str | None = None
    _last: float = field(default_factory=time.monotonic)
    _saved: tuple[int, ...] = ()

    def __call__(self, trainer: Trainer, statistics: dict[str, Tensor]) -> None:
        training, processes = trainer.config.training, trainer.processes
        is_time = processes.any(processes.is_first and time.monotonic() - self._last >= training.save_every)
        if is_time or _is_last(trainer):
            self.save_reached(trainer)
        elif is_due(trainer.progress.iteration, training.backup_every):
            trainer.share_statistics()
            processes.together(lambda: self._save_backup(trainer))

    def save_reached(self, trainer: Trainer) -> None:
        """Save what has been reached, by all processes; :meth:`save_alone` says what."""
        trainer.share_statistics()
        trainer.processes.together(lambda: self.save_alone(trainer))

    def save_alone(self, trainer: Trainer) -> None:
        """Save model_XXXXXXXX.pt of this iteration, unless it holds all that there is, and drop the oldest ones.

        A backup that is due is saved too, where a stop came before it. After a failure of one process the others are
        not asked.
        """
        if not trainer.processes.is_first:
            return
        progress = trainer.progress
        reached = (progress.iteration, progress.logged, progress.sampled, progress.scored)
        if reached != self._saved:
            self.save(trainer, checkpoint_name(progress.iteration))
            prune_checkpoints(self.folder.checkpoints, trainer.config.training.keep_checkpoints)
            self._last, self._saved = time.monotonic(), reached
        self._save_backup(trainer)

    def _save_backup(self, trainer: Trainer) -> None:
        iteration = trainer.progress.iteration
        if not trainer.processes.is_first:
            return
        name = checkpoint_name(iteration).replace("model_", "backup_")
        if is_due(iteration, trainer.config.training.backup_every) and not (self.folder.checkpoints / name).exists():
            self.save(trainer, name)

    def save(self, trainer: Trainer, name: str) -> None:
        """Write one checkpoint file of the whole training state; a disk that refuses is given time to recover."""
        trainer.settle()
        meta = self.meta | {"iteration": trainer.progress.iteration}
        self.log.flush()
        self.refused = name  # until it is written
        with trainer.phase("save"):
            _write_patiently(lambda: save_checkpoint(self.folder.checkpoints / name, trainer.state, meta))
            _write_patiently(lambda: self._write_cameras(trainer))
        self.refused = None
        self.caches.after_phase()

    def _write_cameras(self, trainer: Trainer) -> None:
        config = trainer.config
        if config.data.refine_cameras and (cameras := trainer.averaged_networks[0].cameras) is not None:
            found = read_refined_cameras(cameras, DatasetInfo(**self.meta["dataset"]))
            data = config.data.model_copy(update={"refined_cameras": found})
            write_atomically(self.folder.config_file, config.model_copy(update={"data": data}).to_yaml())


def _write_patiently(write: Callable[[], None]) -> None:
    """Write; what a disk refuses is tried again after a while, and at last once more."""
    for wait in RETRY_AFTER:
        try:
            return write()
        except (SaveError, OSError) as error:
            logger.warning("%s; trying again in %g s", error, wait)
            time.sleep(wait)
    write()


@dataclass
class StopHook:
    """Leaves after a signal, by Stopped; ends training once max_minutes have passed since the program started."""

    request: StopRequest
    started: float

    def __call__(self, trainer: Trainer, statistics: dict[str, Tensor]) -> None:
        processes, minutes = trainer.processes, trainer.config.training.max_minutes
        processes.together(self.request.leave_if_asked)
        if minutes is None:
            return
        if processes.any(processes.is_first and time.monotonic() - self.started >= 60 * minutes):
            trainer.stop_reason = f"training.max_minutes={minutes:g} have passed"


def build_score_hook(
    config: Config,
    dataset_info: DatasetInfo,
    photographs: PhotoDataset,
    task: ScoringTask,
    folder: RunFolder,
    log: RunLog,
    checkpoints: CheckpointHook,
) -> ScoreHook:
    """What is measured between steps: `task`, validation and, with super-resolution, its consistency over the views."""
    renderer, consistency = task.renderer, None
    if renderer.ccsr is not None:
        consistency = builders.build_consistency(config, dataset_info, renderer, range(len(renderer.classes)))
    real, validation = builders.real_images(photographs, renderer.ccsr), builders.build_validation(config, renderer)
    if validation is None and config.training.save_best == "psnr":
        raise ConfigError(
            "training.save_best=psnr: there are no photographs to compare with in the validation split; hold some out, "
            "as is said above, or use training.save_best=kid"
        )
    return ScoreHook(task, real, folder, log, checkpoints, checkpoints.caches, consistency, validation)


def fixed_showcase(renderer: Renderer, config: Config) -> Showcase:
    """The objects and views of every sample grid of a run: classes in turn, codes from the run's seed."""
    rows, num_classes = config.training.sample_objects, len(renderer.classes)
    classes = [row % num_classes for row in range(rows)]
    z = renderer.codes(config.seed, range(rows))
    return Showcase.around(z, classes, config.data.num_views, renderer.default_height)
