"""One run of training, composed out of the rooms: what it needs is found, its folder is held, and it goes on."""

from __future__ import annotations

import gc
import os
import shlex
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from graf.app import builders, hooks, resuming
from graf.app.builders import DatasetInfo
from graf.app.failures import ErrorLog
from graf.app.loading import read_dataset_info, read_meta, read_photographs
from graf.app.memory_planner import choose_for_budget
from graf.app.refined_cameras import describe_refined_cameras
from graf.app.runs import RunFolder, choose_run_folder, describe_changes, read_first, set_aside
from graf.app.step_profile import ProfileHook
from graf.app.time_spent import describe_time
from graf.app.tuned_run import refuse_tuned
from graf.base.files import remove_leftovers, write_atomically
from graf.config import Config, ConfigError
from graf.data.datasets import PhotoDataset
from graf.evaluation.extractor import Extractor, ExtractorError
from graf.evaluation.scoring import ScoringTask
from graf.geometry.views import PoseSampler
from graf.runtime.amp import Precision, choose_precision
from graf.runtime.checkpoint import checkpoint_name, read_checkpoint, restore
from graf.runtime.device import configure_backends, describe_device, pick_device
from graf.runtime.distributed import Launch, Processes
from graf.runtime.interrupt import Stopped, StopRequest
from graf.runtime.logs import RunLog, SilentLog, drop_rows_after, logger, setup_console
from graf.runtime.memory import CacheRelease, prepare_allocator, record_allocations
from graf.runtime.run_lock import RunLock
from graf.runtime.threads import describe_threads
from graf.training.players import RATE_KEYS
from graf.training.trainer import Hook, Trainer


def train(
    config: Config,
    resume: str,
    *,
    accept_new_data: bool,
    trust: bool,
    memory_snapshot: bool,
    profile: int | None,
    started: float,
    program: str,
    errors: ErrorLog,
) -> bool:
    """Run a configuration; returns whether it has done all its iterations.

    resume: as for choose_run_folder; accept_new_data: go on though photographs have changed; trust: take files
    from outside the run folder that an old torch cannot read safely; memory_snapshot: write CUDA's allocation history;
    profile: write a trace of so many steps; started: time.monotonic() from which training.max_minutes counts; program:
    what to type to go on; errors: is told the run folder.
    """
    builders.check_field(config)
    launch = Launch.read(os.environ)
    setup_console(launch.rank)
    prepare_allocator()
    training = config.training
    device = pick_device(training.device, launch.local_rank, launch.local_size)
    configure_backends(device, training.deterministic, launch.local_size)
    processes = launch.join(device.type, training.process_timeout)
    errors.tells = processes.tells
    precision = processes.by_first(lambda: choose_precision(training.use_amp, training.amp_dtype, device))
    logger.info("device: %s, %s", describe_device(device), precision.describe())
    logger.info("threads: %s", describe_threads(launch.local_size))
    check_launch(processes, config)

    folder, checkpoints = processes.by_first(lambda: choose_run_folder(config, resume, trust))
    config = config.model_copy(update={"expname": folder.path.name})  # --resume none may have chosen a new one
    with ExitStack() as stack:
        checkpoints = processes.by_first(lambda: take_folder(stack, folder, checkpoints, resume))
        errors.folder = folder.path if processes.is_first else None
        run = open_run(config, folder, checkpoints, accept_new_data, trust, device, precision, processes)
        if run.is_complete:
            logger.info(
                "%s has already run its %d iterations; raise training.max_iterations, or use --resume none",
                folder.path,
                run.trainer.progress.iteration,
            )
        else:
            say_scaled_rates(run.trainer)
            name = "memory_snapshot.pickle" if processes.is_first else f"memory_snapshot_{processes.rank}.pickle"
            snapshot = folder.path / name if memory_snapshot else None
            run.go_on(started, snapshot, profile)
            run.report(program)
    processes.close()
    return run.is_complete


def check_launch(processes: Processes, config: Config) -> None:
    """Say how the batch is shared; raise ConfigError where processes would have no image or are not told the same."""
    if processes.size == 1:
        return
    batch_size = config.training.batch_size
    if batch_size < processes.size:
        raise ConfigError(
            f"training.batch_size={batch_size} for {processes.size} processes: it is the whole batch, of which every "
            "process needs an image; raise it or start fewer processes"
        )
    asked = {"configuration": config.to_yaml(), "torch": str(torch.__version__)}
    by_first = processes.by_first(lambda: asked)
    differing = [name for name, value in asked.items() if value != by_first[name]]
    processes.together(lambda: _refuse_difference(processes, differing))
    least, most = batch_size // processes.size, processes.largest_share(batch_size)
    text = f"{most} each" if least == most else f"{least} or {most} each, and those with fewer wait for the others"
    logger.info("%d processes share every batch of %d images: %s", processes.size, batch_size, text)


def _refuse_difference(processes: Processes, differing: list[str]) -> None:
    if differing:
        raise ConfigError(
            f"process {processes.rank} has another {' and '.join(differing)} than process 0: start all of them with "
            "the same command, file and version of torch"
        )


def say_scaled_rates(trainer: Trainer) -> None:
    """Log which learning rates training.scale_lr has changed for the batch of this run, and to what."""
    training = trainer.config.training
    if training.scale_lr == "none":
        return
    rates = []
    for player in trainer.players:
        key = RATE_KEYS[player.suffix]
        rates.append(f"{key} {attrgetter(key)(trainer.config):.4g} -> {player.lr:.4g}")
    logger.info(
        "training.scale_lr=%s: batches of %d images, the learning rates are written for %s: %s",
        *(training.scale_lr, training.batch_size, training.lr_batch_size, ", ".join(rates)),
    )


def take_folder(stack: ExitStack, folder: RunFolder, checkpoints: list[Path], resume: str) -> list[Path]:
    """Hold a run folder until the end of the stack, and clear it of what a killed run has left; returns what is to be
    resumed from."""
    stack.enter_context(RunLock(folder.path))
    for place in (folder.path, folder.checkpoints, folder.samples, folder.path / "feature_cache"):
        remove_leftovers(place)
    # another process may have saved something until now
    return folder.newest_first() if resume == "auto" else checkpoints


@dataclass
class TrainingRun:
    """Everything that training needs, found before its first step: the trainer is where its checkpoint was.

    described: what its checkpoints remember of the photographs.
    """

    config: Config
    folder: RunFolder
    device: torch.device
    precision: Precision
    photographs: PhotoDataset
    described: dict[str, Any]
    dataset_info: DatasetInfo
    pose_sampler: PoseSampler
    extractor: Extractor | None
    trainer: Trainer
    processes: Processes

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

    def go_on(self, started: float, snapshot: Path | None, profile: int | None) -> None:
        """Train until the end or until asked to stop; what has been reached is saved, whatever ends it.

        What ends before the first step leaves nothing: weights that nothing was learned with would bind the next start
        to photographs and keys that may have been put right by then.
        """
        config, trainer, processes = self.config, self.trainer, self.processes
        progress = trainer.progress
        start = progress.iteration

        def describe() -> str:
            iteration = progress.iteration
            if trainer.in_step:
                return f"finishing iteration {iteration + 1}, then saving"
            return "saving" if iteration else "stopping"

        with ExitStack() as stack:
            request = stack.enter_context(StopRequest(describe if processes.is_first else None))
            log = stack.enter_context(self._open_log() if processes.is_first else SilentLog())
            batches = stack.enter_context(
                builders.open_batches(
                    config, self.photographs, start, self.device, processes.share, processes.local_size
                )
            )
            stack.enter_context(record_allocations(snapshot, self.device))
            save, between = self._build_hooks(log, request, started)
            if profile is not None and processes.is_first:
                between.append(stack.enter_context(ProfileHook(trainer, self.folder, profile)))
            gc.collect()  # what planning and resuming have left, before it is spared with all that is needed
            try:
                processes.together(request.leave_if_asked)
                for hook in between:
                    if start and isinstance(hook, hooks.LogHook | hooks.SampleHook | hooks.ScoreHook):
                        hook.catch_up(trainer)
                trainer.run(batches, between)
            except Stopped as stopped:
                trainer.stop_reason = str(stopped)
            except Exception:
                # the state is whole: what has failed was a photograph, a disk, a score; not what would be saved now
                if progress.iteration and not trainer.in_step and save.refused != checkpoint_name(progress.iteration):
                    self._save_after_failure(save)
                raise
            if progress.iteration:
                save.save_reached(trainer)
            if processes.is_first:
                request.describe = lambda: "all is saved, closing the records"
            try:
                log.close()
            except KeyboardInterrupt:
                logger.warning("the trackers were left before they had finished; metrics.jsonl has everything")

    def _open_log(self) -> RunLog:
        """Write down how the run goes on, and continue its records from there."""
        folder, progress, training = self.folder, self.trainer.progress, self.config.training
        write_atomically(folder.config_file, self.config.to_yaml())
        drop_rows_after(folder.path / "scores.jsonl", progress.scored)  # what is trained again is scored again
        return RunLog(
            folder.path,
            total=training.max_iterations,
            start=progress.iteration,
            scored=None if self.extractor is None else min(progress.scored, progress.iteration),
            pictures=hooks.find_grids(folder, progress.iteration) if progress.sampled == progress.iteration else None,
            monitoring=training.monitoring,
        )

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
            "photographs": self.described,
            "machine": {
                "device": describe_device(self.device),
                "precision": self.precision.describe(),
                "torch": str(torch.__version__),
            },
        }
        caches = CacheRelease(training.empty_cache, self.device, trainer.timer)
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
            task = ScoringTask(renderer, self.pose_sampler, self.extractor, protocol, count, cache, self.processes)
            between.append(hooks.build_score_hook(config, info, self.photographs, task, self.folder, log, save))
        return save, between

    def _save_after_failure(self, save: hooks.CheckpointHook) -> None:
        try:
            save.save_alone(self.trainer)
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
        seconds = trainer.timer.totals()
        if seconds:
            logger.info("where the time went, %s", describe_time(seconds))
        logger.info("run folder: %s", folder.path)


def open_run(
    config: Config,
    folder: RunFolder,
    checkpoints: list[Path],
    accept_new_data: bool,
    trust: bool,
    device: torch.device,
    precision: Precision,
    processes: Processes,
) -> TrainingRun:
    """Find everything that can be missing: checkpoint, photographs, Inception weights; and build what they ask for.

    checkpoints: the first one that can be read is continued, none begin afresh. The rest is as for :func:`train`.
    """
    file, checkpoint = read_same(checkpoints, processes) if checkpoints else (None, None)
    meta = None if checkpoint is None or file is None else read_meta(checkpoint, file)
    if meta is not None and file is not None:
        refuse_tuned(meta, file)
    if file is not None and file.parent == folder.checkpoints and processes.is_first:
        set_aside(checkpoints[: checkpoints.index(file)])
    photographs = processes.first_of_all(lambda: builders.open_photographs(config))
    builders.check_batch_size(config, len(photographs))
    info = builders.describe_dataset(config, photographs)
    logger.info(
        "data: %d photographs of %d classes in %s", len(photographs), len(info.class_names), config.data.datadir
    )
    if meta is not None and file is not None:
        read_dataset_info(meta, file)
        resuming.check_photographs(photographs, info, meta, config, file, accept_new_data)
    extractor = find_same_extractor(config, processes) if config.training.fid_every else None
    pose_sampler = builders.build_pose_sampler(config, photographs, builders.build_cameras(config, info))
    trainer = builders.build_trainer(
        config, info, pose_sampler, precision, device, checkpoint is None, processes, trust
    )

    keeps_sizes = False
    if checkpoint is not None and meta is not None and file is not None:
        restore(checkpoint, trainer.state, file)
        changes = describe_changes(meta["config"], config.model_dump(mode="json"))
        changes += resuming.describe_precision(meta, precision)
        shown = [f"\n  {change}" for change in changes if "refined_cameras" not in change]  # the weights have them
        logger.info("resuming from %s%s", file, "".join(shown))
        trainer.latest_is_outdated = any(resuming.acts_on_terms(change) for change in changes)
        processes.together(lambda: resuming.bring_best(file, folder, trainer) if processes.is_first else None)
        has_sizes = bool(checkpoint["objects"]["limits"])  # older formats have none
        keeps_sizes = has_sizes and resuming.keeps_sizes(config, meta, device, precision)
        if not keeps_sizes:
            resuming.forget_sizes(config, trainer)
        elif trainer.memory != builders.build_memory_settings(config, device.type):
            logger.info("memory: %s, as this run has found out", trainer.memory)
    described = resuming.describe_photographs(photographs, None if meta is None else read_photographs(meta))
    run = TrainingRun(
        *(config, folder, device, precision, photographs, described, info, pose_sampler, extractor, trainer, processes)
    )
    if not run.is_complete and config.training.memory_budget is not None and not keeps_sizes:
        offline_features = extractor is not None and extractor.suffix != ""
        trainer.use(processes.by_first(lambda: choose_for_budget(config, trainer, info, offline_features)))
    return run


def read_same(checkpoints: list[Path], processes: Processes) -> tuple[Path, dict[str, Any]]:
    """The first checkpoint that the first process can read, which the others then read too."""
    if processes.size == 1:
        return read_first(checkpoints)
    found: list[dict[str, Any]] = []

    def read() -> Path:
        file, contents = read_first(checkpoints)
        found.append(contents)
        return file

    file = processes.by_first(read)
    return file, processes.together(lambda: found[0] if found else read_checkpoint(file))


def find_same_extractor(config: Config, processes: Processes) -> Extractor:
    """The feature extractor that the first process finds, which the others then need too: their features are one score.

    What it has downloaded the others of its machine find. Raises ExtractorError.
    """
    found: list[Extractor] = []

    def find() -> str:
        found.append(builders.find_extractor(config))
        return "offline" if found[0].suffix else "inception"

    def find_like_first(kind: str) -> Extractor:
        evaluation = config.evaluation.model_copy(update={"feature_extractor": kind})
        try:
            return builders.find_extractor(config.model_copy(update={"evaluation": evaluation}))
        except ExtractorError as error:
            raise ExtractorError(f"process {processes.rank} cannot score as process 0 does: {error}") from error

    kind = processes.by_first(find)
    return processes.together(lambda: found[0] if found else find_like_first(kind))
