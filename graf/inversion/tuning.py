"""Pivotal tuning: the generator's weights are changed near one code until its object is that of a photograph.

Roich et al., "Pivotal tuning for latent-based editing of real images" (ACM TOG 2022). A code alone reaches what the
collection has taught; details of a single object are in nobody's code. So the code and camera that the search has found
(the pivot) are held, and weights learn the photograph (eq. 2). Locality regularisation (eq. 3 to 5) holds what
neighbouring codes look like; here they are seen from all sides, so that the sides that the photograph does not show
stay as they were too.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from graf.evaluation.renderer import Renderer
from graf.inversion.candidates import Candidates, render_candidates, shrink_activations
from graf.inversion.distance import PhotoDistance, multi_scale_error, photo_psnr
from graf.inversion.photograph import Photograph
from graf.inversion.search import Hypothesis, SearchSettings, jittered_places
from graf.models.generator import draw_latents
from graf.runtime.memory import retry_smaller
from graf.runtime.randomness import Draws


@dataclass(frozen=True)
class TuningSettings:
    """How weights learn one photograph.

    steps, learning_rate: of Adam, the latter falling to a tenth as a cosine; size: side of the grid of rays of a step.
    locality: weight of what holds neighbours; neighbours: codes in each step, at `reach` standard deviations from the
    pivot; neighbour_size: the side of their grids.
    """

    steps: int = 100
    learning_rate: float = 2e-3
    size: int = 32
    locality: float = 0.3
    neighbours: int = 2
    reach: float = 1.0
    neighbour_size: int = 16
    seed: int = 0


def tune_generator(
    renderer: Renderer,
    photograph: Photograph,
    pivot: Hypothesis,
    distance: PhotoDistance,
    search: SearchSettings,
    settings: TuningSettings,
) -> Renderer:
    """A renderer whose generator shows the photograph at the pivot's code and camera; the given one stays as it is.

    Learned cameras, the background and the codes of known instances are kept. search: tells where cameras stand.
    """
    photograph = photograph.to(renderer.device)
    tuned = replace(renderer, generator=copy.deepcopy(renderer.generator))
    tuned.generator.eval().requires_grad_(False)
    tuned.generator.field.requires_grad_(True)
    weights = list(tuned.generator.field.parameters())
    optimizer = torch.optim.Adam(weights, lr=settings.learning_rate)
    scaler = renderer.precision.make_scaler()
    one = candidates_of(renderer, pivot)

    def descend(step: int) -> None:
        optimizer.zero_grad()
        places = jittered_places(settings.seed, step, settings.size).to(renderer.device)
        render = render_candidates(tuned, one, places, truncation=1.0)
        scaler.scale(distance(render, photograph.sample(places[None])).sum()).backward()
        if settings.locality and settings.neighbours:
            near = draw_neighbours(renderer, one, search, settings, step)
            places = jittered_places(settings.seed + 1, step, settings.neighbour_size).to(renderer.device)
            with torch.no_grad():
                before = render_candidates(renderer, near, places, truncation=1.0)
            after = render_candidates(tuned, near, places, truncation=1.0)
            change = multi_scale_error(after.rgb, before.rgb) + multi_scale_error(after.opacity, before.opacity)
            scaler.scale(settings.locality * change.mean()).backward()

    shrink = partial(shrink_activations, tuned.generator)
    for step in range(settings.steps):
        share = 0.1 + 0.9 * (1 + math.cos(math.pi * step / settings.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = share * settings.learning_rate
        retry_smaller(partial(descend, step), shrink, renderer.device, "lower training.chunk of the run")
        scaler.step(optimizer)
        scaler.update()
    tuned.generator.requires_grad_(False)
    tuned.generator.strategy, tuned.generator.chunk = renderer.generator.strategy, renderer.generator.chunk
    return tuned


def measure_psnr(renderer: Renderer, photograph: Photograph, found: Hypothesis) -> float:
    """PSNR in dB of the photograph and the render of a hypothesis."""
    render = renderer.sample(z=found.z, class_name=found.class_idx, **found.camera)
    return photo_psnr(render.rgb, photograph.to("cpu"))


def candidates_of(renderer: Renderer, hypothesis: Hypothesis) -> Candidates:
    """A hypothesis as a batch of one, its code without truncation."""
    numbers = {
        "u": hypothesis.azimuth / 360,
        "elevation": math.radians(hypothesis.elevation),
        "log_distance": math.log(hypothesis.radius / renderer.cameras.radius),
    }
    return Candidates(
        class_idx=torch.tensor([hypothesis.class_idx], device=renderer.device),
        code=hypothesis.z[None].to(renderer.device),
        **{name: torch.tensor([number], device=renderer.device) for name, number in numbers.items()},
    )


def draw_neighbours(
    renderer: Renderer, pivot: Candidates, search: SearchSettings, settings: TuningSettings, step: int
) -> Candidates:
    """Codes at a fixed distance from the pivot towards drawn ones (eq. 3), seen from drawn cameras around them.

    Uniform codes keep to their range, which may bring them nearer.
    """
    draws = Draws(settings.seed, step, range(settings.neighbours))
    dim_z, uniform = pivot.code.shape[1], renderer.uniform_z
    towards = draw_latents(draws, "tune/z", dim_z, uniform).to(renderer.device)
    towards = towards - pivot.code
    length = settings.reach * math.sqrt(dim_z / 3 if uniform else dim_z)
    codes = pivot.code + length * torch.nn.functional.normalize(towards, dim=1)
    if uniform:
        codes = codes.clamp(-1, 1)
    place = draws.uniform("tune/camera", 2).to(renderer.device)
    low, high = (math.radians(edge(search.elevations)) for edge in (min, max))
    return Candidates(
        class_idx=pivot.class_idx.expand(settings.neighbours),
        code=codes,
        u=place[:, 0],
        elevation=low + (high - low) * place[:, 1],
        log_distance=torch.zeros_like(place[:, 0]),
    )
