"""The command `graf invert`: a photograph in; the object that it shows, its camera, pictures and a tuned run out."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graf.app.failures import ErrorLog, run_command
from graf.app.run_arguments import add_run_arguments, open_run
from graf.base.files import check_writable

if TYPE_CHECKING:
    from torch import Tensor

    from graf.app.loading import TrainedGenerator
    from graf.app.run_arguments import OpenedRun
    from graf.inversion.distance import PhotoDistance
    from graf.inversion.photograph import Photograph
    from graf.inversion.search import Hypothesis, SearchSettings

COMPARISON_FILE, VIEWS_FILE, OBJECT_FILE = RESULT_FILES = ("comparison.png", "views.png", "object.json")
#: steps of --tune without a number
TUNING_STEPS = 100
#: codes that are screened, all classes together; each class has at least the mean object
MOST_STARTS = 128
#: dB below which a render is hardly the object of the photograph
LEAST_PSNR = 15.0
#: a hypothesis whose error is below this multiple of the best one's may as well be the right one
DOUBTFUL = 1.5


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="graf invert",
        description="Find the object of a photograph: its class, its code and the camera that saw it.",
    )
    add_run_arguments(parser)
    parser.add_argument("photograph", metavar="PHOTO", help="PNG, JPEG, ...; best with a transparent background")
    parser.add_argument("--class", dest="class_name", help="name or index of the class (default: all are tried)")
    parser.add_argument("--crop", type=int, help="side of the central square that is used, pixels (default: data.crop)")
    parser.add_argument(
        "--mask",
        choices=("auto", "none"),
        default="auto",
        help="auto: transparency, else what differs from the background; none: colours alone (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the starts and rays (default: %(default)s)")
    parser.add_argument("--codes", type=int, default=12, help="drawn codes to start from (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="longest descent of the search (default: %(default)s)")
    parser.add_argument(
        "--perceptual", type=float, default=0.1, help="weight of LPIPS, where it is installed (default: %(default)s)"
    )
    parser.add_argument(
        "--tune",
        type=int,
        nargs="?",
        const=TUNING_STEPS,
        metavar="STEPS",
        help=f"then tune the weights to the photograph, and save them as a run ({TUNING_STEPS} steps)",
    )
    parser.add_argument("--out", help="folder of the results (default: eval/invert_PHOTO in the run's folder)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Invert a photograph; returns the exit code."""
    options = build_parser().parse_intermixed_args(arguments)

    def command(errors: ErrorLog) -> int:
        for path in Inversion.prepare(options).run():
            print(f"wrote {path}")
        return 0

    return run_command(command, debug=options.debug, interrupted="interrupted; what was written before stays")


@dataclass(frozen=True)
class Inversion:
    """One photograph, the run that it is looked for in, and how."""

    options: argparse.Namespace
    opened: OpenedRun
    photograph: Photograph
    distance: PhotoDistance
    search: SearchSettings
    starts: dict[int, Tensor]

    @classmethod
    def prepare(cls, options: argparse.Namespace) -> Inversion:
        """Open what the options name, and refuse what cannot be used before anything is computed."""
        from graf.app.runs import RunFolder
        from graf.app.tuned_run import refuse_other_runs
        from graf.base.errors import UserError
        from graf.inversion.distance import PhotoDistance
        from graf.inversion.photograph import PhotographSettings, read_photograph
        from graf.runtime.randomness import preserve_rng
        from graf.training.perceptual import load_perceptual_distance

        for name, least in (("crop", 1), ("codes", 0), ("steps", 1), ("tune", 1), ("perceptual", 0)):
            given = getattr(options, name)
            if given is not None and given < least:
                raise UserError(f"--{name} {given}: expected at least {least}")
        opened = open_run(options.run, options.device, options.truncation, options.trust)
        renderer = opened.renderer
        data = renderer.config.data
        photograph = read_photograph(
            Path(options.photograph),
            PhotographSettings(
                resolution=renderer.resolution,
                white_bkgd=data.white_bkgd,
                background=renderer.generator.background_colour,
                crop=options.crop or data.crop,
                max_megapixels=data.max_megapixels,
                mask=options.mask,
            ),
        )
        perceptual = None
        if options.perceptual:
            with preserve_rng():  # its layers are drawn before they are loaded
                perceptual = load_perceptual_distance(renderer.device, "--perceptual", "the search")
        distance = PhotoDistance(perceptual=perceptual, perceptual_weight=options.perceptual)
        starts = choose_starts(opened.trained, options.class_name, options.codes, options.seed)
        search = describe_search(opened.trained, options.seed, options.steps)
        inversion = cls(options, opened, photograph, distance, search, starts)
        if Path(options.photograph).resolve() in {(inversion.folder / name).resolve() for name in RESULT_FILES}:
            raise UserError(f"{options.photograph}: would be replaced by a result of that name; choose another --out")
        if options.tune is not None:
            refuse_other_runs(RunFolder(inversion.folder / "tuned"))
        check_writable(inversion.folder)
        return inversion

    @property
    def folder(self) -> Path:
        """Where results go."""
        if self.options.out is not None:
            return Path(self.options.out)
        return self.opened.folder.evaluation / f"invert_{self.name}"

    @property
    def name(self) -> str:
        """The photograph's name without its ending."""
        return Path(self.options.photograph).stem

    def run(self) -> list[Path]:
        """Search, tune where that is asked for, and write the results; returns the files."""
        from graf.app.tuned_run import save_tuned_run
        from graf.evaluation.pictures import save_png
        from graf.inversion.object_file import fingerprint
        from graf.inversion.pictures import compare, show_around
        from graf.inversion.search import Search
        from graf.inversion.tuning import TuningSettings, measure_psnr, tune_generator
        from graf.runtime.logs import logger

        renderer = self.opened.renderer
        ranked = Search(renderer, self.photograph, self.distance, self.search).run(self.starts)
        self._report(ranked)
        found, rows = ranked[0], [("found", renderer)]
        weights, details, written = [fingerprint(renderer.generator)], self._describe(ranked), []
        if self.options.tune is not None:
            settings = TuningSettings(steps=self.options.tune, seed=self.options.seed)
            tuned = tune_generator(renderer, self.photograph, found, self.distance, self.search, settings)
            rows.append(("tuned", tuned))
            psnr = measure_psnr(tuned, self.photograph, found)
            logger.info("tuned in %d steps: PSNR of the photograph %.1f -> %.1f dB", settings.steps, found.psnr, psnr)
            run = save_tuned_run(self.opened.trained, tuned, self.folder / "tuned", self.name)
            weights.append(fingerprint(tuned.generator))
            details["tuned"] = {"run": "tuned", "steps": settings.steps, "psnr": psnr}
            written.append(run.path)
        written.append(save_png(self.folder / COMPARISON_FILE, compare(rows, self.photograph, found)))
        written.append(save_png(self.folder / VIEWS_FILE, show_around(rows, found)))
        written.append(self._write_object(found, weights, details))
        return written

    def _report(self, ranked: Sequence[Hypothesis]) -> None:
        """Say what was found, how sure it is, and what else it may be."""
        from graf.inversion.search import best_of_each_class, best_other_view
        from graf.runtime.logs import logger

        found, classes = ranked[0], self.opened.renderer.classes
        logger.info(
            "%s, azimuth %.1f, elevation %.1f degrees, distance %.2f: error %.4f, PSNR of the photograph %.1f dB",
            classes[found.class_idx],
            found.azimuth,
            found.elevation,
            found.radius,
            found.error,
            found.psnr,
        )
        for other in best_of_each_class(ranked)[1:2]:
            _compare_errors(found, other, f"class {classes[other.class_idx]}")
        other_view = best_other_view(ranked)
        if other_view is not None:
            _compare_errors(found, other_view, f"azimuth {other_view.azimuth:.0f}")
        if found.psnr < LEAST_PSNR:
            logger.warning(
                "below %g dB a render hardly shows the object of the photograph: is it of a class of this run (%s), "
                "framed as its photographs, in the middle, on their background?",
                LEAST_PSNR,
                ", ".join(classes),
            )

    def _describe(self, ranked: Sequence[Hypothesis]) -> dict[str, Any]:
        """What object.json tells besides the object: where it comes from, how near it is, what else it may be."""
        trained, photograph = self.opened.trained, Path(self.options.photograph)
        options = ("class_name", "crop", "mask", "seed", "codes", "steps", "perceptual", "truncation")
        return {
            "error": ranked[0].error,
            "psnr": ranked[0].psnr,
            "others": [
                {
                    "class_name": trained.renderer.classes[other.class_idx],
                    "camera": other.camera,
                    "error": other.error,
                    "psnr": other.psnr,
                }
                for other in ranked[1:]
            ],
            "photograph": {
                "file": photograph.name,
                "sha256": hashlib.sha256(photograph.read_bytes()).hexdigest(),
                "has_mask": self.photograph.mask is not None,
            },
            "run": {"file": str(trained.file), "iteration": trained.iteration},
            "options": {name: getattr(self.options, name) for name in options},
            "starts": {trained.renderer.classes[class_idx]: len(codes) for class_idx, codes in self.starts.items()},
        }

    def _write_object(self, found: Hypothesis, weights: Sequence[str], details: dict[str, Any]) -> Path:
        from graf.inversion.object_file import ObjectFile

        path = self.folder / OBJECT_FILE
        class_name = self.opened.renderer.classes[found.class_idx]
        z = tuple(found.z.tolist())
        ObjectFile(class_name, z, found.camera, self.name, tuple(weights), details).write(path)
        return path


def _compare_errors(found: Hypothesis, other: Hypothesis, name: str) -> None:
    """Say how much farther from the photograph another answer is."""
    from graf.runtime.logs import logger

    times = other.error / max(found.error, 1e-12)
    doubt = "; both may be right" if times < DOUBTFUL else ""
    logger.info("next best %s: error %.4f, %.1f times that%s", name, other.error, times, doubt)


def choose_starts(trained: TrainedGenerator, class_name: str | None, count: int, seed: int) -> dict[int, Tensor]:
    """Codes (n, dim_z) to start from for each class that is tried: the mean, those that the run knows, and drawn ones.

    Classes share MOST_STARTS evenly; what is left out, the last ones first, is logged.
    """
    import torch

    from graf.runtime.logs import logger

    renderer = replace(trained.renderer, truncation=1.0)  # the search has its own
    names = renderer.classes
    chosen = range(len(names)) if class_name is None else [renderer.class_index(class_name)]
    room = max(1, MOST_STARTS // len(chosen))
    drawn = renderer.codes(seed, range(min(count, room)))
    starts, wanted = {}, 0
    for class_idx in chosen:
        known = [
            number
            for number, instance in enumerate(trained.dataset_info.instance_names)
            if instance.startswith(f"{names[class_idx]}/") and renderer.generator.instances is not None
        ]
        mean = torch.zeros(1, drawn.shape[1])
        starts[class_idx] = torch.cat([mean, renderer.instance_codes(known), drawn])[:room]
        wanted += 1 + len(known) + count
    screened = sum(map(len, starts.values()))
    if screened < wanted:
        logger.info(
            "%d of %d codes are screened, at most %d of each class: the mean, known ones, drawn ones, in this order",
            screened,
            wanted,
            room,
        )
    return starts


def describe_search(trained: TrainedGenerator, seed: int, steps: int) -> SearchSettings:
    """A search of so many steps among the cameras of a run: at the heights of its photographs, or in the range that
    poses were drawn from.
    """
    from graf.geometry.cameras import elevation_from_height
    from graf.inversion.search import SearchSettings

    info, data = trained.dataset_info, trained.renderer.config.data
    heights = sorted(info.v_list if info.poses_known else (data.vmin, (data.vmin + data.vmax) / 2, data.vmax))
    chosen = {heights[0], heights[len(heights) // 2], heights[-1]}
    elevations = tuple(sorted(elevation_from_height(height) for height in chosen))
    return SearchSettings(
        elevations,
        seed=seed,
        truncation=trained.renderer.truncation,
        follow_steps=max(1, round(0.6 * steps)),
        finish_steps=steps,
    )
