"""The search for an object and its camera: many starts looked at cheaply, the best of them followed by gradients.

1. Screening: every code of every class is rendered small from a ring of cameras at several elevations.
2. Following: the best starts, some of each likely class, descend the distance to the photograph (Adam, Kingma & Ba,
   ICLR 2015) in code, azimuth, elevation and distance. Each step sees one ray at a random place of every cell of a
   grid over the photograph, so that it costs little and favours no pixel.
3. Opposites: what looks alike from the other side is a minimum of its own (front and back of a car), so the leaders
   are turned by 90, 180 and 270 degrees and followed once more.
4. Finish: the leaders are followed on a finer grid, rendered whole, and the nearest one is the answer.

Weights stay as they are; see tuning.py for the opposite. Random numbers depend on the seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graf.evaluation.renderer import Renderer
from graf.geometry.rays import pixel_grid
from graf.geometry.volume_rendering import Render
from graf.inversion.candidates import Candidates, cast_candidates, render_candidates, shrink_activations
from graf.inversion.distance import PhotoDistance, photo_psnr
from graf.inversion.photograph import Photograph
from graf.runtime.amp import Scaler
from graf.runtime.memory import retry_smaller
from graf.runtime.randomness import Draws

Result = TypeVar("Result")

#: steepest elevation, degrees: beyond, azimuth and roll become one
STEEPEST = 88.0
#: the distance of a camera may differ from the run's own by this factor
DISTANCE_RANGE = 1.3
#: Adam's first step lengths of code, azimuth (turns), elevation (radians) and log-distance
STEP_LENGTHS = (0.08, 0.006, 0.02, 0.01)
#: the last step is this share of the first
LAST_STEP = 0.1
#: degrees by which azimuths differ that count as other views
OTHER_VIEW = 45.0
ADVICE = "lower --resolution or training.chunk of the run"


@dataclass(frozen=True)
class SearchSettings:
    """How long is searched, and what is likely before the photograph is seen.

    elevations: degrees, of the cameras that the search starts from; between the lowest and the highest one all are
    equally likely. truncation: factor on codes. azimuths and screen_size: cameras around each start and the side of
    their renders; leaders: starts that are followed; finalists: those that are followed to the end; follow_steps,
    finish_steps, follow_size, finish_size: their steps and the sides of their grids of rays. code_prior: weight of the
    mean square of a normal code; camera_prior: that of the squared distance from the likely range, in units of 15
    degrees and of 10% of distance.
    """

    elevations: tuple[float, ...]
    seed: int = 0
    truncation: float = 1.0
    azimuths: int = 16
    screen_size: int = 16
    leaders: int = 8
    finalists: int = 4
    follow_steps: int = 60
    follow_size: int = 16
    finish_steps: int = 100
    finish_size: int = 32
    code_prior: float = 0.001
    camera_prior: float = 0.002


@dataclass(frozen=True)
class Hypothesis:
    """One answer: class index, code z (dim_z,), azimuth and elevation in degrees, distance in world units.

    error: its distance from the photograph, priors included; psnr: of the render, in dB (:func:`photo_psnr`).
    """

    class_idx: int
    z: Tensor
    azimuth: float
    elevation: float
    radius: float
    error: float
    psnr: float

    @property
    def camera(self) -> dict[str, Any]:
        """The camera as arguments of `Renderer.sample`."""
        return {"azimuth": self.azimuth, "elevation": self.elevation, "radius": self.radius}


def best_of_each_class(ranked: Sequence[Hypothesis]) -> list[Hypothesis]:
    """The first hypothesis of each class, in order."""
    first: dict[int, Hypothesis] = {}
    for hypothesis in ranked:
        first.setdefault(hypothesis.class_idx, hypothesis)
    return list(first.values())


def best_other_view(ranked: Sequence[Hypothesis]) -> Hypothesis | None:
    """The best hypothesis of the winner's class that sees it from elsewhere; None where none was followed so far."""
    winner = ranked[0]
    others = (item for item in ranked if item.class_idx == winner.class_idx)
    return next((item for item in others if angle_between(item.azimuth, winner.azimuth) > OTHER_VIEW), None)


def angle_between(first: float, second: float) -> float:
    """Degrees in [0, 180] between two azimuths."""
    return abs((first - second + 180) % 360 - 180)


class Search:
    """The search for what a photograph shows, through a renderer whose weights stay as they are."""

    def __init__(
        self, renderer: Renderer, photograph: Photograph, distance: PhotoDistance, settings: SearchSettings
    ) -> None:
        self.renderer, self.distance, self.settings = renderer, distance, settings
        self.photograph = photograph.to(renderer.device)
        self.iteration = 0

    def run(self, starts: Mapping[int, Tensor]) -> list[Hypothesis]:
        """All hypotheses that were followed to the end, the nearest first.

        starts: for each class that is tried, its index and the codes (n, dim_z) to start from.
        """
        settings = self.settings
        with frozen(self.renderer.generator):
            found, errors = self.screen(starts)
            leaders = found[pick_leaders(found, errors, settings.leaders)]
            leaders, errors = self.follow(leaders, settings.follow_steps, settings.follow_size)
            best = leaders[pick_leaders(leaders, errors, max(1, settings.leaders // 4))]
            turned = Candidates.cat([best.turned(degrees) for degrees in (90.0, 180.0, 270.0)])
            turned, turned_errors = self.follow(turned, settings.follow_steps, settings.follow_size)
            both, errors = Candidates.cat([leaders, turned]), torch.cat([errors, turned_errors])
            finalists = both[pick_leaders(both, errors, settings.finalists)]
            finalists, _ = self.follow(finalists, settings.finish_steps, settings.finish_size, first_step=0.5)
            return sorted(self.judge(finalists), key=lambda hypothesis: hypothesis.error)

    # ---------------------------------------------------------------------------------------------- its stages

    @torch.no_grad()
    def screen(self, starts: Mapping[int, Tensor]) -> tuple[Candidates, Tensor]:
        """Every start from all cameras, and its distance from the photograph (N,)."""
        settings = self.settings
        size = settings.screen_size
        photograph, places = self.photograph.reduce(size), pixel_grid(1, size, size, self.renderer.device)[0]
        u, elevation = torch.meshgrid(
            torch.arange(settings.azimuths) / settings.azimuths,
            torch.deg2rad(torch.tensor(settings.elevations)),
            indexing="ij",
        )
        u, elevation = u.flatten().to(self.renderer.device), elevation.flatten().to(self.renderer.device)
        found, errors = [], []
        for class_idx, codes in starts.items():
            for code in codes.to(self.renderer.device):
                cameras = Candidates(
                    class_idx=torch.full((len(u),), class_idx, device=u.device),
                    code=code.expand(len(u), -1),
                    u=u,
                    elevation=elevation,
                    log_distance=torch.zeros_like(u),
                )
                render = self._retry(partial(self._render_ring, cameras, places))
                found.append(cameras)
                errors.append(self.distance(render, photograph) + self.prior(cameras))
        return Candidates.cat(found), torch.cat(errors)

    def follow(
        self, candidates: Candidates, steps: int, size: int, first_step: float = 1.0
    ) -> tuple[Candidates, Tensor]:
        """Descend from each candidate for so many steps; where it ends, and its mean error over the last quarter."""
        candidates = candidates.leaves()
        lengths = [first_step * length for length in STEP_LENGTHS]
        groups = [
            {"params": [part], "lr": length} for part, length in zip(candidates.parameters(), lengths, strict=True)
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        scaler = self.renderer.precision.make_scaler()
        tail, total = max(1, steps // 4), torch.zeros(len(candidates), device=candidates.u.device)
        for step in range(steps):
            share = LAST_STEP + (1 - LAST_STEP) * (1 + math.cos(math.pi * step / steps)) / 2
            for group, length in zip(optimizer.param_groups, lengths, strict=True):
                group["lr"] = share * length
            places = jittered_places(self.settings.seed, self.iteration, size).to(candidates.u.device)
            errors = self._retry(partial(self._descend, candidates, places, optimizer, scaler))
            scaler.step(optimizer)
            scaler.update()
            self.clamp(candidates)
            self.iteration += 1
            if step >= steps - tail:
                total += errors / tail
        return candidates.detach(), total

    @torch.no_grad()
    def judge(self, candidates: Candidates) -> list[Hypothesis]:
        """Whole renders of the candidates beside the whole photograph."""
        renderer, settings = self.renderer, self.settings
        resolution = self.photograph.colours.shape[-1]
        places = pixel_grid(1, resolution, resolution, renderer.device)[0]
        priors, sampling = self.prior(candidates), renderer.sampling
        hypotheses = []
        for row in range(len(candidates)):
            one = candidates[row : row + 1]
            render = self._retry(partial(render_candidates, renderer, one, places, settings.truncation, sampling))
            hypotheses.append(
                Hypothesis(
                    class_idx=int(one.class_idx),
                    z=(settings.truncation * one.code[0]).cpu(),
                    azimuth=float(one.degrees()),
                    elevation=math.degrees(float(one.elevation)),
                    radius=renderer.cameras.radius * math.exp(float(one.log_distance)),
                    error=float(self.distance(render, self.photograph) + priors[row]),
                    psnr=photo_psnr(render.rgb, self.photograph),
                )
            )
        return hypotheses

    # ---------------------------------------------------------------------------------------------- its parts

    def prior(self, candidates: Candidates) -> Tensor:
        """What speaks against each candidate (B,) before the photograph is seen."""
        settings = self.settings
        low, high = (math.radians(edge(settings.elevations)) for edge in (min, max))
        outside = (candidates.elevation - candidates.elevation.clamp(low, high)) / math.radians(15)
        farther = candidates.log_distance / 0.1
        total = settings.camera_prior * (outside.square() + farther.square())
        if not self.renderer.uniform_z:
            total = total + settings.code_prior * candidates.code.square().mean(1)
        return total

    @torch.no_grad()
    def clamp(self, candidates: Candidates) -> None:
        """Keep parameters where they mean something."""
        steepest, log_range = math.radians(STEEPEST), math.log(DISTANCE_RANGE)
        candidates.elevation.clamp_(-steepest, steepest)
        candidates.log_distance.clamp_(-log_range, log_range)
        if self.renderer.uniform_z:
            candidates.code.clamp_(-1, 1)

    def _descend(
        self, candidates: Candidates, places: Tensor, optimizer: torch.optim.Optimizer, scaler: Scaler
    ) -> Tensor:
        optimizer.zero_grad()
        render = render_candidates(self.renderer, candidates, places, self.settings.truncation)
        errors = self.distance(render, self.photograph.sample(places[None])) + self.prior(candidates)
        scaler.scale(errors.sum()).backward()
        return errors.detach()

    def _render_ring(self, cameras: Candidates, places: Tensor) -> Render:
        """Images (B, ...) of one object from B cameras: all rays as those of one image, so that z is prepared once."""
        rays = cast_candidates(self.renderer, cameras, places[None].expand(len(cameras), -1, -1, -1))
        joined = rays.map(lambda part: part.reshape(1, -1, part.shape[-1]))
        with self.renderer.precision.autocast():
            z = self.settings.truncation * cameras.code[:1]
            render = self.renderer.generator(z, cameras.class_idx[:1], joined)
        return render.map(lambda part: part.reshape(len(cameras), -1, part.shape[-1])).as_images()

    def _retry(self, work: Callable[[], Result]) -> Result:
        """`work()`, with fewer activations kept and fewer rays at once where memory runs out."""
        return retry_smaller(work, partial(shrink_activations, self.renderer.generator), self.renderer.device, ADVICE)


def jittered_places(seed: int, iteration: int, size: int) -> Tensor:
    """One place (size, size, 2), x then y in [-1, 1], at random in every cell of a grid over the image plane."""
    inside = Draws(seed, iteration, range(1)).uniform("invert/places", size, size, 2)[0]
    cells = torch.arange(size, dtype=torch.float32)
    corners = torch.stack([cells[None, :].expand(size, -1), cells[:, None].expand(-1, size)], dim=-1)
    return 2 * (corners + inside) / size - 1


def pick_leaders(candidates: Candidates, errors: Tensor, count: int) -> Tensor:
    """The numbers of `count` of the candidates: the best one of each class in turn, then the best of all.

    Of a class no two are taken that see it from within a few degrees before others are there.
    """
    order = torch.argsort(errors).tolist()
    classes, azimuths = candidates.class_idx.tolist(), candidates.degrees().tolist()
    elected: list[int] = []
    for number in order:  # a class each
        if len(elected) < (count + 1) // 2 and all(classes[number] != classes[other] for other in elected):
            elected.append(number)
    for apart in (OTHER_VIEW / 2, -1.0):
        for number in order:
            alike = (
                classes[number] == classes[other] and angle_between(azimuths[number], azimuths[other]) <= apart
                for other in elected
            )
            if len(elected) < count and number not in elected and not any(alike):
                elected.append(number)
    return torch.tensor(elected)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradients for weights, inside; the former ones afterwards."""
    wanted = [parameter for parameter in network.parameters() if parameter.requires_grad]
    modes = {part: part.training for part in network.modules()}
    try:
        network.eval().requires_grad_(False)
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        for parameter in wanted:
            parameter.requires_grad_(True)
