"""`graf train` and `graf plan`: their options, and training composed out of the rooms, from start to end."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from graf.app.failures import ErrorLog, run_command

if TYPE_CHECKING:
    from graf.config import Config


def main(arguments: Sequence[str] | None = None, program: str = "graf train") -> int:
    """Train; returns the exit code. program: how a person starts it, for messages."""
    started = time.monotonic()
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments, program)

    def command(errors: ErrorLog) -> None:
        from graf.config import load_config

        config = load_config(options.config, collect_overrides(options))
        if options.plan:
            from graf.app.memory_planner import print_plan

            print_plan(config)
        else:
            train(config, options.resume, options.memory_snapshot, started=started, program=program, errors=errors)

    interrupted = "interrupted before the step was finished; nothing was saved since the last checkpoint"
    return run_command(command, debug=options.debug, interrupted=interrupted)


def plan(arguments: Sequence[str]) -> int:
    """Predict what training needs of memory; returns the exit code."""
    return main(["--plan", *arguments], program="graf plan")


def parse_arguments(arguments: Sequence[str], program: str) -> argparse.Namespace:
    """The command line; flags are shorthands for configuration keys and win over the file."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Train a label-conditional generative radiance field.",
        epilog=f"Any key of the configuration can be overridden: {program} --config coil100 data.datadir=photos "
        "training.batch_size=2",
    )
    parser.add_argument(
        "--config", default="default", help="YAML file, or name of a shipped configuration (default: %(default)s)"
    )
    parser.add_argument(
        "--use_amp", action="store_const", const="true", help="mixed precision where the device gains from it"
    )
    parser.add_argument("--device", help="auto | cpu | cuda | cuda:1 | mps")
    parser.add_argument("--resume", default="auto", help="auto: newest checkpoint of the run; none: afresh; or a file")
    parser.add_argument("--outdir", help="folder of all runs; this one is written to OUTDIR/expname")
    parser.add_argument("--max_iterations", type=int, help="length of the run and of its schedules")
    parser.add_argument("--max_minutes", type=float, help="stop and save after so many minutes")
    parser.add_argument("--seed", type=int, help="seed of every random number")
    parser.add_argument(
        "--memory_snapshot", action="store_true", help="CUDA: write the allocator's history for its viewer"
    )
    parser.add_argument("--plan", action="store_true", help="predict memory, print what fits and exit; needs no data")
    parser.add_argument("--memory_budget", help="training.memory_budget: auto, or an amount such as 8GiB")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any key of the configuration")
    return parser.parse_intermixed_args(arguments)  # keys may stand between flags


def collect_overrides(options: argparse.Namespace) -> list[str]:
    """The flags as overrides of configuration keys, before the explicit ones."""
    flags = ("device", "outdir", "max_iterations", "max_minutes", "memory_budget", "use_amp")
    values = {f"training.{flag}": getattr(options, flag) for flag in flags} | {"seed": options.seed}
    return [f"{key}={value}" for key, value in values.items() if value is not None] + list(options.overrides)


def train(
    config: Config, resume: str, memory_snapshot: bool, *, started: float, program: str, errors: ErrorLog
) -> None:
    """Compose the program from the configuration and run it.

    resume: as for choose_run_folder; memory_snapshot: write CUDA's allocation history; started: time.monotonic() from
    which training.max_minutes counts; program: what to type to go on; errors: is told the run folder.
    """
    from graf.app import builders, hooks
    from graf.app.refined_cameras import describe_refined_cameras
    from graf.app.runs import choose_run_folder, describe_changes
    from graf.base.files import write_atomically
    from graf.evaluation.scoring import ScoringTask
    from graf.runtime.amp import choose_precision
    from graf.runtime.checkpoint import read_checkpoint, restore
    from graf.runtime.device import configure_backends, describe_device, pick_device
    from graf.runtime.interrupt import StopRequest
    from graf.runtime.logs import RunLog, drop_rows_after, logger, setup_console
    from graf.runtime.memory import CacheRelease, prepare_allocator, record_allocations
    from graf.training.trainer import Hook

    setup_console()
    training = config.training

    # Machine
    prepare_allocator()
    device = pick_device(training.device)
    configure_backends(device)
    precision = choose_precision(training.use_amp, training.amp_dtype, device)
    logger.info("device: %s, %s", describe_device(device), precision.describe())

    # Everything that can be missing is looked for before the first step: checkpoint, photographs, Inception weights
    folder, checkpoint_file = choose_run_folder(config, resume)
    errors.folder = folder.path
    config = config.model_copy(update={"expname": folder.path.name})  # --resume none may have chosen a new one
    checkpoint = None if checkpoint_file is None else read_checkpoint(checkpoint_file)
    photographs = builders.open_photographs(config)
    builders.check_batch_size(config, len(photographs))
    dataset_info = builders.describe_dataset(config, photographs)
    logger.info(
        "data: %d photographs of %d classes in %s", len(photographs), len(dataset_info.class_names), config.data.datadir
    )
    extractor = builders.find_extractor(config) if training.fid_every else None

    # Networks
    cameras = builders.build_cameras(config, dataset_info)
    pose_sampler = builders.build_pose_sampler(config, photographs, cameras)
    trainer = builders.build_trainer(
        config, dataset_info, pose_sampler, precision, device, pretrained=checkpoint is None
    )

    # Where an earlier run stopped
    if checkpoint is not None:
        restore(checkpoint, trainer.state, str(checkpoint_file))
        changes = describe_changes(checkpoint["meta"]["config"], config.model_dump(mode="json"))
        shown = [f"\n  {change}" for change in changes if "refined_cameras" not in change]  # the weights have them
        logger.info("resuming from %s%s", checkpoint_file, "".join(shown))
        checkpoint = None  # or its tensors would stay in memory beside the networks'
    start = trainer.progress.iteration
    if start >= training.max_iterations:
        logger.info(
            "%s has already run its %d iterations; raise training.max_iterations, or use --resume none",
            folder.path,
            start,
        )
        return

    # Memory
    if training.memory_budget is not None:
        from graf.app.memory_planner import apply_budget

        apply_budget(config, trainer, dataset_info, offline_features=extractor is not None and extractor.suffix != "")

    # The run folder, as of the iteration that is continued, and the batches that follow
    write_atomically(folder.config_file, config.to_yaml())
    drop_rows_after(folder.path / "scores.jsonl", start)  # what is trained again is scored again
    loader = builders.build_loader(config, photographs, start, pin_memory=device.type == "cuda")

    # What happens between steps
    renderer = builders.build_renderer(config, dataset_info, precision, device, *trainer.averaged_networks)
    showcase = hooks.fixed_showcase(renderer, config)
    meta = {"config": config.model_dump(mode="json"), "dataset": asdict(dataset_info)}
    caches = CacheRelease(training.empty_cache, device)
    save = hooks.CheckpointHook(folder, meta, caches)
    log = RunLog(folder.path, total=training.max_iterations, start=start, monitoring=training.monitoring)
    snapshot = folder.path / "memory_snapshot.pickle" if memory_snapshot else None
    with log, StopRequest() as request, record_allocations(snapshot, device):
        sample = hooks.SampleHook(renderer, showcase, folder, log, caches)
        score = None
        if extractor is not None:
            protocol, count = builders.build_protocol(config), config.evaluation.num_images
            task = ScoringTask(renderer, pose_sampler, extractor, protocol, count, folder.path / "feature_cache")
            score = hooks.build_score_hook(config, dataset_info, photographs, task, folder, log, save)
        between: list[Hook] = [
            hooks.LogHook(log, caches, (start, trainer.progress.seconds)),
            sample,
            *([score] if score is not None else []),
            save,
            hooks.StopHook(request, started),
        ]

        # The loop
        trainer.run(iter(loader), between)

        # The end
        save.save_latest(trainer)
        if request.reason is None:
            if training.sample_every:
                sample.write(trainer.progress.iteration)
            if score is not None:
                score.write(trainer)
    if trainer.stop_reason is not None and trainer.progress.iteration < training.max_iterations:
        command = shlex.join([*program.split(), "--config", str(folder.config_file)])
        logger.info(
            "stopped after iteration %d (%s); resume with: %s", trainer.progress.iteration, trainer.stop_reason, command
        )
    if config.data.refine_cameras and (refinement := renderer.generator.cameras) is not None:
        logger.info("%s", describe_refined_cameras(refinement, dataset_info))
    logger.info("run folder: %s", folder.path)
