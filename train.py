"""Train a 3D-aware GAN: `python train.py --config configs/default.yaml --use_amp`. See README.md."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Sequence


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; flags are shorthands for configuration keys and win over the file."""
    parser = argparse.ArgumentParser(
        description="Train a label-conditional generative radiance field.",
        epilog="Any key of the configuration can be overridden: python train.py --config configs/coil100.yaml "
        "data.datadir=photos training.batch_size=2",
    )
    parser.add_argument("--config", default="configs/default.yaml", help="YAML file (default: %(default)s)")
    parser.add_argument("--use_amp", action="store_true", help="mixed precision where the device gains from it")
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
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any key of the configuration")
    return parser.parse_intermixed_args(arguments)  # keys may stand between flags


def collect_overrides(options: argparse.Namespace) -> list[str]:
    """The flags as overrides of configuration keys, before the explicit ones."""
    flags = {
        "training.device": options.device,
        "training.outdir": options.outdir,
        "training.max_iterations": options.max_iterations,
        "training.max_minutes": options.max_minutes,
        "training.memory_budget": options.memory_budget,
        "training.use_amp": "true" if options.use_amp else None,
        "seed": options.seed,
    }
    return [f"{key}={value}" for key, value in flags.items() if value is not None] + list(options.overrides)


def train(options: argparse.Namespace, started: float) -> None:
    """Compose the program from the configuration and run it."""
    from graf.config import load_config

    config = load_config(options.config, collect_overrides(options))
    if options.plan:
        from graf.app.memory_planner import print_plan

        print_plan(config)
        return

    from graf.app import builders, hooks
    from graf.app.runs import choose_run_folder, describe_changes, write_atomically
    from graf.data.loader import make_loader
    from graf.evaluation.extractor import choose_extractor
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
    folder, checkpoint_file = choose_run_folder(config, options.resume)
    config = config.model_copy(update={"expname": folder.path.name})  # --resume none may have chosen a new one
    checkpoint = None if checkpoint_file is None else read_checkpoint(checkpoint_file)
    photographs = builders.open_photographs(config)
    builders.check_batch_size(config, len(photographs))
    dataset_info = builders.describe_dataset(config, photographs)
    logger.info(
        "data: %d photographs of %d classes in %s", len(photographs), len(dataset_info.class_names), config.data.datadir
    )
    extractor = None
    if training.fid_every:
        evaluation = config.evaluation
        extractor = choose_extractor(evaluation.feature_extractor, evaluation.inception_weights, evaluation.download)

    # Networks and loop
    cameras = builders.build_cameras(config, dataset_info)
    pose_sampler = builders.build_pose_sampler(config, photographs, cameras)
    trainer = builders.build_trainer(
        config, dataset_info, pose_sampler, precision, device, pretrained=checkpoint is None
    )
    if checkpoint is not None:
        restore(checkpoint, trainer.state, str(checkpoint_file))
        changes = describe_changes(checkpoint["meta"]["config"], config.model_dump(mode="json"))
        logger.info("resuming from %s%s", checkpoint_file, "".join(f"\n  {change}" for change in changes))
        checkpoint = None  # or its tensors would stay in memory beside the networks'
    if training.memory_budget is not None:
        from graf.app.memory_planner import apply_budget

        apply_budget(config, trainer, dataset_info, offline_features=extractor is not None and extractor.suffix != "")
    start = trainer.progress.iteration
    if start >= training.max_iterations:
        logger.info(
            "%s has already run its %d iterations; raise training.max_iterations, or use --resume none",
            folder.path,
            start,
        )
        return
    write_atomically(folder.config_file, config.to_yaml())
    drop_rows_after(folder.path / "scores.jsonl", start)  # what is trained again is scored again
    loader = make_loader(
        photographs,
        training.batch_size,
        nworkers=training.nworkers,
        drop_last=training.drop_last,
        seed=config.seed,
        start_iteration=start,
        pin_memory=device.type == "cuda",
    )

    # What happens between steps
    renderer = builders.build_renderer(config, dataset_info, precision, device, *trainer.averaged_networks)
    showcase = hooks.fixed_showcase(renderer, config)
    meta = {"config": config.model_dump(mode="json"), "dataset": dataset_info.as_meta()}
    caches = CacheRelease(training.empty_cache, device)
    save = hooks.CheckpointHook(
        folder, meta, training.save_every, training.backup_every, training.keep_checkpoints, caches
    )
    log = RunLog(folder.path, total=training.max_iterations, start=start, monitoring=training.monitoring)
    snapshot = folder.path / "memory_snapshot.pickle" if options.memory_snapshot else None
    with log, StopRequest() as request, record_allocations(snapshot, device):
        sample = hooks.SampleHook(renderer, showcase, folder, log, training.sample_every, caches)
        score = None
        if extractor is not None:
            protocol, count = builders.build_protocol(config), config.evaluation.num_images
            task = ScoringTask(renderer, pose_sampler, extractor, protocol, count, folder.path / "feature_cache")
            real = builders.real_images(photographs, renderer.ccsr)
            consistency = None
            if renderer.ccsr is not None:
                consistency = builders.build_consistency(
                    config, dataset_info, renderer, range(len(dataset_info.class_names))
                )
            score = hooks.ScoreHook(task, real, config, folder, log, save, caches, consistency)
        between: list[Hook] = [
            hooks.LogHook(log, training.print_every, training.batch_size, caches, (start, trainer.progress.seconds)),
            sample,
            *([score] if score is not None else []),
            save,
            hooks.StopHook(request, training.max_minutes, started),
        ]
        trainer.run(iter(loader), between)

        # The end
        save.save_latest(trainer)
        if request.reason is None:
            if training.sample_every:
                sample.write(trainer.progress.iteration)
            if score is not None:
                score.write(trainer)
    if trainer.stop_reason is not None and trainer.progress.iteration < training.max_iterations:
        command = shlex.join(["python", "train.py", "--config", str(folder.config_file)])
        logger.info(
            "stopped after iteration %d (%s); resume with: %s", trainer.progress.iteration, trainer.stop_reason, command
        )
    logger.info("run folder: %s", folder.path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit code is 0, or 1 after one line that says what is wrong and what to do."""
    started = time.monotonic()
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        train(options, started)
    except KeyboardInterrupt:
        print(
            "error: interrupted before the step was finished; nothing was saved since the last checkpoint",
            file=sys.stderr,
        )
        return 130
    except Exception as error:
        from graf.app.failures import explain_failure

        logging.getLogger("graf").debug("failed", exc_info=error)
        print(f"error: {explain_failure(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
