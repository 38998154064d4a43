"""What the random numbers of one step cost: `python -m benchmarks.random_numbers` writes its section into RESULTS.md.

The counter-based numbers of graf.runtime.randomness, a chunk of rays at a time, against torch's own generator, seeded
for every row and filled for the whole batch, which numbers that depend on their sample alone cost otherwise. Each is
the best of many repetitions, alternately in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.results import format_table, hardware, write_section
from graf.app import builders
from graf.config import Config, load_config
from graf.geometry.volume_rendering import RaySampling
from graf.models.ray_noise import RayNoiseKeys
from graf.runtime.randomness import Draws, derive_seed
from graf.training.inputs import USES

REPETITIONS = range(40)
#: purposes whose numbers a generator is seeded for, row by row, for the fakes of D or of G, and for photographs
SMALL_ROWS = {"fakes": (256, 4, 3, 7, 7, 7, 2, 1), "photographs": (4, 3, 7, 2, 1)}


def draw_by_counter(config: Config) -> None:
    """One step: codes and uniform numbers of D's and G's fakes and of photographs, noise of each chunk of rays."""
    draws, nerf, rays = Draws(0, 1, range(config.training.batch_size)), config.nerf, config.ray_sampler.N_samples
    step = max(1, builders.build_memory_settings(config, "cpu").chunk // config.training.batch_size)
    draws.uniform("real", sum(USES.values()))
    for player in players_of(config):
        draws.normal(f"{player}/z", config.z_dist.dim)
        draws.uniform(player, sum(USES.values()))
        density = draws.keys(f"{player}/density") if nerf.raw_noise_std else None
        noise = RayNoiseKeys(draws.keys(f"{player}/jitter"), None, density, nerf.raw_noise_std)
        for start in range(0, rays, step):
            noise.of_rays(start, min(start + step, rays), RaySampling(nerf.N_samples))


def draw_by_seeded_rows(config: Config) -> None:
    """The same amount of numbers from generators that are seeded for every row."""
    batch, nerf, rays = config.training.batch_size, config.nerf, config.ray_sampler.N_samples
    for sizes in [SMALL_ROWS["fakes"]] * len(players_of(config)) + [SMALL_ROWS["photographs"]]:
        for purpose, size in enumerate(sizes):
            fill_rows(str(purpose), batch, size, normal=size == 256)
    for player in players_of(config):
        fill_rows(f"{player}/jitter", batch, rays * nerf.N_samples, normal=False)
        if nerf.raw_noise_std:
            fill_rows(f"{player}/density", batch, rays * nerf.N_samples, normal=True)


def players_of(config: Config) -> tuple[str, ...]:
    """Whose generated patches are drawn."""
    return ("g",) if config.training.share_fakes else ("d", "g")


def fill_rows(purpose: str, batch: int, size: int, normal: bool) -> None:
    """Numbers (batch, size), each row from a generator seeded for it."""
    rows, generator = torch.empty(batch, size), torch.Generator()
    for number, row in enumerate(rows):
        generator.manual_seed(derive_seed(0, purpose, 1, number))
        row.normal_(generator=generator) if normal else row.uniform_(generator=generator)


def time_once(draw: Callable[[Config], None], config: Config) -> float:
    """Milliseconds of one call."""
    started = time.perf_counter()
    draw(config)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    """Measure, and write the section."""
    rows = []
    for name, keys in (("default", ()), ("coil100", ()), ("carla", ("training.chunk=4096",))):
        config = load_config(name, keys)
        pairs = [[time_once(draw, config) for draw in (draw_by_counter, draw_by_seeded_rows)] for _ in REPETITIONS]
        counter, seeded = (min(column) for column in zip(*pairs, strict=True))
        rows.append([f"{name}.yaml", f"{counter:.2f}", f"{seeded:.2f}", f"{counter / seeded:.2f}"])
    table = format_table(["configuration", "counter-based, ms", "seeded rows, ms", "ratio"], rows)
    text = f"{hardware(torch.device('cpu'))}. Random numbers of one step, best of {len(REPETITIONS)}.\n\n{table}"
    write_section("Random numbers", "python -m benchmarks.random_numbers", text)
    print(text)


if __name__ == "__main__":
    main()
