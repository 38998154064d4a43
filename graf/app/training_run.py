"""One run of training, composed out of the rooms: what it needs is found, its folder is held, and it goes on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from graf.app import builders, hooks, resuming
from graf.app.builders import DatasetInfo
from graf.app.failures import ErrorLog
from graf.app.loading import read_dataset_info, read_meta
from graf.app.memory_planner import apply_budget
from graf.app.refined_cameras import describe_refined_cameras
from graf.app.runs import RunFolder, choose_run_folder, describe_changes, read_first, set_aside
from graf.app.tuned_run import refuse_tuned
from graf.base.files import remove_leftovers, write_atomically
from graf.config import Config, ConfigError
from graf.data.datasets import PhotoDataset
from graf.data.loader import Batches
from graf.evaluation.extractor import Extractor
from graf.evaluation.scoring import ScoringTask
from graf.geometry.views import PoseSampler
from graf.runtime.amp import Precision, choose_precision
from graf.runtime.checkpoint import restore
from graf.runtime.device import configure_backends, describe_device, pick_device
from graf.runtime.interrupt import Stopped, StopRequest
from graf.runtime.logs import RunLog, drop_rows_after, logger, setup_console
from graf.runtime.memory import CacheRelease, prepare_allocator, record_allocations
from graf.runtime.run_lock import RunLock
from graf.training.trainer import Hook, Trainer


def train(
    config: Config,
    resume: str,
    *,
    accept_new_data: bool,
    plan_again: bool,
    memory_snapshot: bool,
    started: float,
    program: str,
    errors: ErrorLog,
) -> bool:
    """Run a configuration; returns whether it has done all its iterations.

    resume: as for choose_run_folder; accept_new_data: go on though photographs have changed; plan_again: decide anew
    what fits training.memory_budget; memory_snapshot: write CUDA's allocation history; started: time.monotonic() from
    which training.max_minutes counts; program: what to type to go on; errors: is told the run folder.
    """
    setup_console()
    refuse_several_processes(os.environ)
    prepare_allocator()
    device = pick_device(config.training.device)
    configure_backends(device, config.training.deterministic)
    precision = choose_precision(config.training.use_amp, config.training.amp_dtype, device)
    logger.info("device: %s, %s", describe_device(device), precision.describe())

    folder, checkpoints = choose_run_folder(config, resume)
    config = config.model_copy(update={"expname": folder.path.name})  # --resume none may have chosen a new one
    with RunLock(folder.path):
        errors.folder = folder.path
        if resume == "auto":  # another process may have saved something until now
            checkpoints = folder.newest_first()
        for place in (folder.path, folder.checkpoints, folder.samples, folder.path / "feature_cache"):
            remove_leftovers(place)
        run = open_run(config, folder, checkpoints, accept_new_data, plan_again, device, precision)
        if run.is_complete:
            logger.info(
                "%s has already run its %d iterations; raise training.max_iterations, or use --resume none",
                folder.path,
                run.trainer.progress.iteration,
            )
            return True
        snapshot = folder.path / "memory_snapshot.pickle" if memory_snapshot else None
        run.go_on(started, snapshot)
        run.report(program)
    return run.is_complete


def refuse_several_processes(environment: Mapping[str, str]) -> None:
    """Raise ConfigError under torchrun and its like: several processes would train the same run side by side."""
    size = environment.get("WORLD_SIZE", "1")
    if size != "1":
        raise ConfigError(
            f"WORLD_SIZE={size}: training in several processes is not supported; start train.py once, without torchrun"
        )


@dataclass
class TrainingRun:
    """Everything that training needs, found before its first step: the trainer is where its checkpoint was."""

    config: Config
    folder: RunFolder
    device: torch.device
    precision: Precision
    photographs: PhotoDataset
    dataset_info: DatasetInfo
    pose_sampler: PoseSampler
    extractor: Extractor | None
    trainer: Trainer

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do, the last iteration's line, grids and scores included."""
        progress, training = self.trainer.progress, self.config.training
        done = [progress.logged]
        if training.sample_every:
            done.append(progress.sampled)
        if self.extractor is not None:
            done.append(progress.scored)
        return progress.iteration >= training.max_iterations and min(done) >= progress.iteration

    def go_on(self, started: float, snapshot: Path | None) -> None:
        """Train until the end or until asked to stop; what has been reached is saved, whatever ends it."""
        config, trainer, folder = self.config, self.trainer, self.folder
        progress, training = trainer.progress, config.training
        start = progress.iteration
        write_atomically(folder.config_file, config.to_yaml())
        drop_rows_after(folder.path / "scores.jsonl", progress.scored)  # what is trained again is scored again

        def describe() -> str:
            iteration = progress.iteration
            return f"finishing iteration {iteration + 1}, then saving" if trainer.in_step else "saving"

        with ExitStack() as stack:
            request = stack.enter_context(StopRequest(describe))
            log = stack.enter_context(
                RunLog(
                    folder.path,
                    total=training.max_iterations,
                    start=start,
                    scored=None if self.extractor is None else min(progress.scored, start),
                    monitoring=training.monitoring,
                )
            )
            loader = builders.build_loader(config, self.photographs, start, pin_memory=self.device.type == "cuda")
            batches = stack.enter_context(Batches(loader))
            stack.enter_context(record_allocations(snapshot, self.device))
            save, between = self._build_hooks(log, request, started)
            try:
                request.leave_if_asked()
                for hook in between:
                    if start and isinstance(hook, hooks.LogHook | hooks.SampleHook | hooks.ScoreHook):
                        hook.catch_up(trainer)
                trainer.run(batches, between)
            except Stopped as stopped:
                trainer.stop_reason = str(stopped)
            except Exception:
                if not trainer.in_step:  # the state is whole: what has failed was a photograph, a disk, a score
                    self._save_after_failure(save)
                raise
            save.save_reached(trainer)

    def _build_hooks(
        self, log: RunLog, request: StopRequest, started: float
    ) -> tuple[hooks.CheckpointHook, list[Hook]]:
        """What happens between steps, in order: what has been reached is saved before grids and scores take time."""
        config, info, trainer = self.config, self.dataset_info, self.trainer
        progress, training = trainer.progress, config.training
        networks = trainer.averaged_networks
        renderer = builders.build_renderer(config, info, self.precision, self.device, *networks)
        renderer = replace(renderer, before_image=request.leave_if_asked)
        meta = {
            "config": config.model_dump(mode="json"),
            "dataset": asdict(info),
            "photographs": resuming.describe_photographs(self.photographs),
            "machine": {
                "device": describe_device(self.device),
                "precision": self.precision.describe(),
                "torch": str(torch.__version__),
            },
        }
        caches = CacheRelease(training.empty_cache, self.device)
        save = hooks.CheckpointHook(self.folder, meta, caches, log)
        showcase = hooks.fixed_showcase(renderer, config)
        between: list[Hook] = [
            hooks.LogHook(log, caches, (progress.iteration, progress.seconds)),
            hooks.StopHook(request, started),
            save,
            hooks.SampleHook(renderer, showcase, self.folder, log, caches),
        ]
        if self.extractor is not None:
            protocol, count = builders.build_protocol(config), config.evaluation.num_images
            if progress.scoring_batch:
                protocol = replace(protocol, batch_size=progress.scoring_batch)
            cache = self.folder.path / "feature_cache"
            task = ScoringTask(renderer, self.pose_sampler, self.extractor, protocol, count, cache)
            between.append(hooks.build_score_hook(config, info, self.photographs, task, self.folder, log, save))
        return save, between

    def _save_after_failure(self, save: hooks.CheckpointHook) -> None:
        try:
            save.save_reached(self.trainer)
        except Exception as error:  # the first failure is the one to tell
            logger.warning("%s", error)
        else:
            logger.info("iteration %d was saved before the program ended", self.trainer.progress.iteration)

    def report(self, program: str) -> None:
        """Say where the run stands, and how it goes on."""
        trainer, folder = self.trainer, self.folder
        if trainer.stop_reason is not None and not self.is_complete:
            command = shlex.join([*program.split(), "--config", str(folder.config_file)])
            iteration, reason = trainer.progress.iteration, trainer.stop_reason
            logger.info("stopped after iteration %d (%s); resume with: %s", iteration, reason, command)
        refinement = trainer.averaged_networks[0].cameras
        if self.config.data.refine_cameras and refinement is not None:
            logger.info("%s", describe_refined_cameras(refinement, self.dataset_info))
        logger.info("run folder: %s", folder.path)


def open_run(
    config: Config,
    folder: RunFolder,
    checkpoints: list[Path],
    accept_new_data: bool,
    plan_again: bool,
    device: torch.device,
    precision: Precision,
) -> TrainingRun:
    """Find everything that can be missing: checkpoint, photographs, Inception weights; and build what they ask for.

    checkpoints: the first one that can be read is continued, none begin afresh. The rest is as for :func:`train`.
    """
    file, checkpoint = read_first(checkpoints) if checkpoints else (None, None)
    meta = None if checkpoint is None or file is None else read_meta(checkpoint, file)
    if meta is not None and file is not None:
        refuse_tuned(meta, file)
    if file is not None and file.parent == folder.checkpoints:
        set_aside(checkpoints[: checkpoints.index(file)])
    photographs = builders.open_photographs(config)
    builders.check_batch_size(config, len(photographs))
    info = builders.describe_dataset(config, photographs)
    logger.info(
        "data: %d photographs of %d classes in %s", len(photographs), len(info.class_names), config.data.datadir
    )
    if meta is not None and file is not None:
        read_dataset_info(meta, file)
        resuming.check_photographs(photographs, info, meta, config, file, accept_new_data)
    extractor = builders.find_extractor(config) if config.training.fid_every else None
    pose_sampler = builders.build_pose_sampler(config, photographs, builders.build_cameras(config, info))
    trainer = builders.build_trainer(config, info, pose_sampler, precision, device, pretrained=checkpoint is None)

    keeps_sizes = False
    if checkpoint is not None and meta is not None and file is not None:
        restore(checkpoint, trainer.state, file)
        changes = describe_changes(meta["config"], config.model_dump(mode="json"))
        shown = [f"\n  {change}" for change in changes if "refined_cameras" not in change]  # the weights have them
        logger.info("resuming from %s%s", file, "".join(shown))
        resuming.bring_best(file, folder, trainer)
        has_sizes = bool(checkpoint["objects"]["limits"])  # older formats have none
        keeps_sizes = has_sizes and resuming.keeps_sizes(config, meta) and not plan_again
        if not keeps_sizes:
            resuming.forget_sizes(config, trainer)
        elif trainer.memory != builders.build_memory_settings(config):
            logger.info("memory: %s, as this run has found out", trainer.memory)
    run = TrainingRun(config, folder, device, precision, photographs, info, pose_sampler, extractor, trainer)
    if not run.is_complete and config.training.memory_budget is not None and not keeps_sizes:
        apply_budget(config, trainer, info, offline_features=extractor is not None and extractor.suffix != "")
    return run
