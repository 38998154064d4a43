"""Whether the learning-rate range test finds what a sweep finds: `python -m benchmarks.learning_rates`.

On small toys (32 x 32 pixels, patches of 16 x 16, constant rates) every rate of a sweep trains for a few iterations,
while the other player has its rate of configs/toys.yaml. G's best rate is that of the highest PSNR on the validation
split; D's, on which PSNR hardly depends there, that of its lowest own loss. Both are held against what the test of
`graf train --lr_range_test` suggests from the same start.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from benchmarks.results import RESULTS, format_table, hardware, write_section
from graf.app import builders
from graf.app.learning_rates import TrialStart, open_start
from graf.config import Config, load_config
from graf.training.lr_range import RateRange, measure_range
from graf.training.objective import Statistics
from graf.training.trainer import Trainer

SMALL_TOYS = (
    *("data.imsize=32", "ray_sampler.N_samples=256", "data.synthetic.count=240", "training.chunk=2048"),
    *("training.lr_schedule=constant", "training.model_average_beta=0", "training.use_amp=true"),
)
#: the rates of the sweep, about a factor of 3 apart
RATES = {
    "g": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "d": (2e-5, 6e-5, 2e-4, 6e-4, 2e-3, 6e-3),
}
#: share of a run's iterations, the last ones, over which D's loss is averaged
TAIL = 1 / 3


@dataclass(frozen=True)
class Outcome:
    """What a rate has come to: PSNR on the validation split, dB, and the mean of D's loss over the last iterations."""

    psnr: float
    loss_d: float


def train(start: TrialStart) -> Outcome:
    """One run of the sweep."""
    trainer, batches = start()
    losses: list[float] = []

    def note(trainer: Trainer, statistics: Statistics) -> None:
        losses.append(float(statistics["loss_d"]))

    trainer.run(batches, [note])
    networks = trainer.averaged_networks
    renderer = builders.build_renderer(start.config, start.info, start.precision, start.device, *networks)
    validation = builders.build_validation(start.config, renderer)
    assert validation is not None
    return Outcome(validation.measure()["psnr_validation"], fmean(losses[-round(TAIL * len(losses)) :]))


def sweep(config: Config, suffix: str, rates: Sequence[float]) -> dict[float, Outcome]:
    """Runs that differ in the rate of one player."""
    start = open_start(config, [], accept_new_data=False, trust=False)
    outcomes = {}
    for rate in rates:
        training = config.training.model_copy(update={f"lr_{suffix}": rate})
        outcomes[rate] = train(replace(start, config=config.model_copy(update={"training": training})))
        print(f"lr_{suffix}={rate:g}: {outcomes[rate]}", flush=True)
    return outcomes


def average(outcomes: Sequence[Outcome]) -> Outcome:
    """The mean over seeds."""
    return Outcome(fmean(one.psnr for one in outcomes), fmean(one.loss_d for one in outcomes))


def find_best(outcomes: dict[float, Outcome], suffix: str) -> float:
    """The rate that has served its player best."""
    if suffix == "g":
        return max(outcomes, key=lambda rate: outcomes[rate].psnr)
    return min(outcomes, key=lambda rate: outcomes[rate].loss_d)


def suggest(config: Config, suffix: str) -> float:
    """What the range test suggests."""
    start = open_start(config, [], accept_new_data=False, trust=False)
    suggestion = measure_range(start, suffix, RateRange()).suggestion
    assert suggestion is not None
    print(f"lr_{suffix}: {suggestion:.2g} is suggested", flush=True)
    return suggestion


def compare(configs: Sequence[Config], suffix: str) -> str:
    """A sentence and a table on one player; the configurations differ in their seeds."""
    swept = [sweep(config, suffix, RATES[suffix]) for config in configs]
    outcomes = {rate: average([one[rate] for one in swept]) for rate in RATES[suffix]}
    best, suggestions = find_best(outcomes, suffix), [suggest(config, suffix) for config in configs]
    farthest = max(max(suggestion / best, best / suggestion) for suggestion in suggestions)
    rows = [
        [f"{rate:g}", f"{outcome.psnr:.2f}", f"{outcome.loss_d:.4f}", "best" if rate == best else ""]
        for rate, outcome in outcomes.items()
    ]
    suggested = " and ".join(f"{rate:.2g}" for rate in suggestions)
    return (
        f"training.lr_{suffix}: the range test suggests {suggested}, at most a factor of {farthest:.1f} from the best "
        "rate of the sweep.\n\n" + format_table([f"training.lr_{suffix}", "validation PSNR, dB", "loss_d", ""], rows)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep, test and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=150, help="of every run of the sweep")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="over which outcomes are averaged")
    parser.add_argument("--datadir", default="data", help="where the toys are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    keys = [f"data.datadir={options.datadir}", *SMALL_TOYS, f"training.max_iterations={options.iterations}"]
    configs = [load_config("toys", [*keys, f"seed={seed}"]) for seed in options.seeds]
    text = (
        f"{hardware()}; configs/toys.yaml at 32 x 32 with constant rates, {options.iterations} iterations a run, "
        f"{RateRange().iterations} a trial. The sweep's figures are means over seeds {options.seeds}, the suggestions "
        "are each seed's own. PSNR of the last weights; loss_d over the last third, which D's rate is judged by.\n\n"
        + "\n\n".join(compare(configs, suffix) for suffix in RATES)
    )
    title = "Learning rates: the range test beside a sweep"
    write_section(title, "python -m benchmarks.learning_rates", text, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
