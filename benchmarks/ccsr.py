"""What CCSR's parts do: `python -m benchmarks.ccsr` trains short runs with and without them, and writes a table.

Every variant is trained with the same seeds on the embedded toys, and measured at high resolution on the same renders:
PSNR, SSIM and KID against photographs of the test split, agreement with the render, and what super-resolution adds to
the disagreement of neighbouring views.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import train as train_program
from benchmarks.results import format_table, hardware, write_section
from graf.app import builders
from graf.app.eval_options import EvalOptions
from graf.app.eval_tasks import Evaluation, open_evaluation
from graf.evaluation.enlargement import measure_enlargement
from graf.evaluation.extractor import choose_extractor
from graf.geometry.rays import Patches
from graf.geometry.views import Views
from graf.models.ccsr import CCSR, BoxProjection, LatentMixture, SuperResolved, ViewLatents, upsample

SCALE = 2
COMMON = (
    "ccsr.enabled=true",
    "ccsr.adversarial=0.1",
    "training.fid_every=0",
    "training.sample_every=0",
    "training.print_every=20",
    "training.save_every=100000",
    "training.save_best=kid",
    "training.monitoring=[]",
    "evaluation.feature_extractor=offline",
)
WITHOUT, PROJECTED = "no CCSR (bicubic)", "no CCSR (bicubic, projected)"
RESTORING, MATCHED = "CCSR that restores photographs", "+ photographs that renders match"
AGREEING, SHARED = "+ agreement", "one shared latent instead of eight"
#: trained variants -> their keys; PROJECTED is measured on the runs WITHOUT CCSR
VARIANTS = {
    WITHOUT: ("ccsr.enabled=false",),
    RESTORING: (),
    MATCHED: ("ccsr.photometric=200",),
    SHARED: ("ccsr.photometric=200", "ccsr.num_views=1"),
    AGREEING: ("ccsr.agreement=0.3", "ccsr.photometric=200"),
}
#: column -> (key of a measured row, factor)
COLUMNS = {
    "PSNR, dB": ("psnr", 1),
    "SSIM": ("ssim", 1),
    "KID x 1000": ("kid", 1000),
    "|down(SR) - render|, largest": ("low_resolution_max", 1),
    "in 8-bit files, mean": ("file_mean", 1),
    "clipped, %": ("clipped", 100),
    "reprojection error of the render x 1000": ("reprojection_render", 1000),
    "added by SR x 1000": ("reprojection_added", 1000),
    "step, ms": ("seconds_per_step", 1000),
    "peak of live tensors, MiB": ("memory", 1),
}


class Bicubic(CCSR):
    """Bicubic upsampling in the place of CCSR, so that it is measured by the same code; `project`: made consistent."""

    def __init__(self, project: bool = False) -> None:
        super().__init__(nn.Identity(), ViewLatents(1, 3, 1), BoxProjection(SCALE))
        self.project = project

    def forward(self, render: Tensor, angles: Tensor | LatentMixture, patches: Patches) -> SuperResolved:
        render = render.float()
        image = upsample(render, SCALE)
        return SuperResolved(self.projection(image, render) if self.project else image, image)


def train_variant(name: str, seed: int, iterations: int, folder: Path) -> Path:
    """Train one variant with one seed; a finished run is left as it is."""
    expname = "".join(letter if letter.isalnum() else "_" for letter in f"{name}_{seed}")
    arguments = [
        "--config",
        "configs/toys.yaml",
        "--use_amp",
        "--outdir",
        str(folder),
        *COMMON,
        f"expname={expname}",
    ]
    arguments += [f"seed={seed}", f"training.max_iterations={iterations}", f"ccsr.start_iteration={iterations // 3}"]
    if train_program.main([*arguments, *VARIANTS[name]]):
        sys.exit(f"{expname}: training failed")
    return folder / expname


def open_run(run: Path) -> Evaluation:
    """The averaged networks of a finished run."""
    return open_evaluation(EvalOptions(run=str(run)))


def measure(evaluation: Evaluation, ccsr: CCSR, run: Path) -> dict[str, float]:
    """Quality and consistency of a CCSR on the renders of `evaluation`, and step time and memory of its own run.

    Generators differ from run to run, and with them every figure of what is made from their renders; modules that
    are compared therefore work on the renders of one generator.
    """
    evaluation = replace(evaluation, renderer=replace(evaluation.renderer, ccsr=ccsr))
    row = compare_with_photographs(evaluation)
    report = builders.build_consistency(
        evaluation.config, evaluation.dataset_info, evaluation.renderer, evaluation.classes
    ).measure()
    row |= {key: float(value) for key, value in report.as_dict().items() if value is not None}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    late = [line for line in lines if line["iteration"] > 0.5 * lines[-1]["iteration"]]
    batch_size = evaluation.config.training.batch_size
    row["seconds_per_step"] = statistics.median(batch_size / line["images_per_second"] for line in late)
    peaks = [f"memory_{phase}_{kind}" for phase in ("render", "d", "g", "sr") for kind in ("live_peak", "peak")]
    row["memory"] = max(line[peak] for line in late for peak in peaks if peak in line)
    return row


def compare_with_photographs(evaluation: Evaluation) -> dict[str, float]:
    """PSNR, SSIM and KID (offline extractor) of the super-resolved renders against photographs of the test split."""
    config, renderer = evaluation.config, evaluation.renderer
    fine = config.model_copy(update={"ccsr": config.ccsr.model_copy(update={"enabled": True, "scale": SCALE})})
    photographs = builders.open_photographs(fine, "test")
    views = builders.build_pose_sampler(config, photographs, renderer.cameras).views

    def render(views: Views) -> dict[str, Tensor]:
        renders = renderer.render_views(renderer.instance_codes(views.labels[:, 3]), views, super_resolve=True)
        assert renders.sr is not None
        return {"sr": renders.sr, "bicubic": upsample(renders.rgb, SCALE)}

    images = torch.stack([photographs[index][0] for index in range(len(photographs))])
    protocol, extractor = builders.build_protocol(config), choose_extractor("offline")
    report = measure_enlargement(images, views, render, extractor, protocol, renderer.device)
    values = report.outputs["sr"].values
    return {"psnr": values["psnr"], "ssim": values["ssim"], "kid": values[report.kid_name]}


def tabulate(measured: dict[str, list[dict[str, float]]]) -> str:
    """A row per variant: the mean over its seeds, with the spread (standard deviation) where there are several."""
    rows = []
    for name, runs in measured.items():
        cells = [name]
        for key, factor in COLUMNS.values():
            values = [factor * run[key] for run in runs]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}")
        rows.append(cells)
    return format_table(["variant", *COLUMNS], rows)


def compare_pairs(measured: dict[str, list[dict[str, float]]]) -> str:
    """What one part changes, seed by seed: the seeds differ from each other by far more than that."""
    lines = []
    for name, without in ((MATCHED, RESTORING), (SHARED, MATCHED), (AGREEING, MATCHED)):
        changes = []
        for column in ("PSNR, dB", "KID x 1000", "added by SR x 1000"):
            key, factor = COLUMNS[column]
            values = [factor * (a[key] - b[key]) for a, b in zip(measured[name], measured[without], strict=True)]
            listed = ", ".join(f"{value:+.3f}" for value in values)
            changes.append(f"{column} {statistics.mean(values):+.3f} ({listed})")
        lines.append(f"{name}, beside {without}, mean (seed by seed): {'; '.join(changes)}.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all variants and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=1500, help="length of every run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per variant (default: %(default)s)")
    parser.add_argument("--outdir", type=Path, default=Path("results/ccsr_ablation"), help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in (WITHOUT, PROJECTED, *VARIANTS)}
    for seed in range(options.seeds):
        runs = {name: train_variant(name, seed, options.iterations, options.outdir) for name in VARIANTS}
        common = open_run(runs[WITHOUT])  # a generator that no module was trained with
        modules: dict[str, tuple[CCSR, str]] = {WITHOUT: (Bicubic(), WITHOUT), PROJECTED: (Bicubic(True), WITHOUT)}
        for name in VARIANTS:
            ccsr = open_run(runs[name]).renderer.ccsr
            if ccsr is not None:
                modules[name] = (ccsr, name)
        for row, (module, trained) in modules.items():
            measured[row].append(measure(common, module, runs[trained]))
            print(f"seed {seed}, {row}: {json.dumps(measured[row][-1])}", flush=True)
    text = (
        f"{options.seeds} seeds, {options.iterations} iterations each, embedded toys, {hardware()}. "
        "Per seed all rows are measured on the renders of one generator, trained without CCSR; "
        f"mean (± standard deviation) over the seeds.\n\n{tabulate(measured)}\n\n"
        f"{compare_pairs(measured)}"
    )
    command = f"python -m benchmarks.ccsr --iterations {options.iterations} --seeds {options.seeds}"
    write_section("CCSR: what its parts do (64 -> 128 pixels)", command, text)
    print(text)


if __name__ == "__main__":
    main()
