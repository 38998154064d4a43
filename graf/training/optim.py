"""Optimisers, gradient clipping and learning-rate schedules, which are pure functions of the iteration."""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class LearningRateSchedule:
    """A factor on the learning rate as a function of the iteration.

    kind: "constant"; "multistep", times `gamma` at each of `milestones`; "step", times `gamma` every milestones[0]
    iterations; "exponential", the same curve without the steps; "cosine", constant until decay_start * horizon, then
    half a cosine down to `gamma` at the horizon. In front of any, `warmup` iterations of linear rise.
    """

    kind: str = "constant"
    gamma: float = 0.5
    milestones: Sequence[int] = (50_000,)
    horizon: int = 100_000
    decay_start: float = 0.0
    warmup: int = 0

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
        return 1.0


def gradient_norms(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """The Euclidean norm of the gradient of each parameter that has one, (P,), on the device, where they are."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(0, device=device)


def clip_gradients(parameters: Sequence[nn.Parameter], how: str, limit: float) -> None:
    """Clip gradients (already unscaled) by their total "norm", by "value", or not at all ("none")."""
    if how == "norm":
        torch.nn.utils.clip_grad_norm_(parameters, limit)
    elif how == "value":
        torch.nn.utils.clip_grad_value_(parameters, limit)
