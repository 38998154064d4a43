"""Optimisers, gradient clipping and learning-rate schedules, which are pure functions of the iteration."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graf.runtime.logs import info_once


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """RMSprop as GRAF uses it (alpha .99, eps 1e-8) or Adam, fused into one pass where this torch and device can."""
    parameters = list(parameters)
    if name == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, alpha=0.99, eps=1e-8)
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    try:
        return torch.optim.Adam(parameters, lr=lr, betas=betas, eps=1e-8, fused=fused)
    except RuntimeError as error:  # torch before 2.4 on a CPU
        info_once(f"Adam runs unfused: {error}")
        return torch.optim.Adam(parameters, lr=lr, betas=betas, eps=1e-8)


def refit_fused(optimizer: torch.optim.Optimizer) -> None:
    """Fused here or not, as `optimizer` was built, whatever it was where its loaded state comes from.

    A fused step counts on the parameters' device; any other one counts on the CPU, where it is read.
    """
    is_fused = bool(optimizer.defaults.get("fused"))
    for group in optimizer.param_groups:
        if bool(group.get("fused")) == is_fused:
            continue
        group["fused"] = is_fused
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                device = parameter.device if is_fused else "cpu"
                state["step"] = state["step"].to(device, torch.float32)


@dataclass(frozen=True)
class LearningRateSchedule:
    """A factor on the learning rate as a function of the iteration.

    kind: "constant"; "multistep", times `gamma` at each of `milestones`; "step", times `gamma` every milestones[0]
    iterations; "exponential", the same curve without the steps; "cosine", constant until decay_start * horizon, then
    half a cosine down to `gamma` at the horizon; "points", through `points` (iteration, factor), with straight lines
    between the factors or, `logarithmic`, between their logarithms, and constant outside. In front of any, `warmup`
    iterations of linear rise.
    """

    kind: str = "constant"
    gamma: float = 0.5
    milestones: Sequence[int] = (50_000,)
    horizon: int = 100_000
    decay_start: float = 0.0
    warmup: int = 0
    points: Sequence[tuple[int, float]] = ()
    logarithmic: bool = False

    def __call__(self, iteration: int) -> float:
        rise = min(1.0, (iteration + 1) / self.warmup) if self.warmup else 1.0
        return rise * self._fall(iteration)

    def _fall(self, iteration: int) -> float:
        if self.kind == "multistep":
            return self.gamma ** sum(iteration >= milestone for milestone in self.milestones)
        if self.kind == "step":
            return self.gamma ** (iteration // self.milestones[0])
        if self.kind == "exponential":
            return self.gamma ** (iteration / self.milestones[0])
        if self.kind == "cosine":
            start = self.decay_start * self.horizon
            progress = min(max((iteration - start) / max(self.horizon - start, 1), 0.0), 1.0)
            return self.gamma + (1 - self.gamma) * 0.5 * (1 + math.cos(math.pi * progress))
        if self.kind == "points":
            return self._interpolate(iteration)
        return 1.0

    def _interpolate(self, iteration: int) -> float:
        following = bisect_right(self.points, iteration, key=lambda point: point[0])
        if following in (0, len(self.points)):
            return self.points[max(following - 1, 0)][1]
        (start, before), (end, after) = self.points[following - 1 : following + 1]
        share = (iteration - start) / (end - start)
        if self.logarithmic:
            return float(before * (after / before) ** share)
        return before + share * (after - before)


def batch_factor(rule: str, batch_size: int, reference: int | None) -> float:
    """The factor on learning rates that are written for batches of `reference` images, in a run of other batches.

    rule: "none", "linear" (Goyal et al. 2017, for SGD) or "sqrt" (Malladi et al. 2022, for RMSprop and Adam).
    """
    if rule == "none" or reference is None:
        return 1.0
    return math.sqrt(batch_size / reference) if rule == "sqrt" else batch_size / reference


def parameter_norms(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """The Euclidean norm of the gradient of each parameter that has one, (P,), on the device, where they are."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(0, device=device)


def gradient_norms(network: nn.Module) -> dict[str, Tensor]:
    """The norms of the gradients of a network's layers, the first two parts of whose names they go by."""
    layers: dict[str, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            layers.setdefault(".".join(name.split(".")[:-1][:2]) or name, []).append(parameter)
    return {
        layer: torch.linalg.vector_norm(parameter_norms(parameters, parameters[0].device))
        for layer, parameters in layers.items()
    }


def clip_gradients(parameters: Sequence[nn.Parameter], how: str, limit: float) -> None:
    """Clip gradients (already unscaled) by their total "norm", by "value", or not at all ("none")."""
    if how == "norm":
        torch.nn.utils.clip_grad_norm_(parameters, limit)
    elif how == "value":
        torch.nn.utils.clip_grad_value_(parameters, limit)
