"""The exponential moving average of a module's weights, which is what samples and scores are drawn from."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ModelAverage:
    """A frozen copy whose weights follow a module: w <- beta_t w + (1 - beta_t) w_module.

    beta_t = min(beta, (1 + t) / (10 + t)) at update t.
    The warm-up lets the average forget the random initialisation within tens of updates. Buffers are copied.
    """

    def __init__(self, module: nn.Module, beta: float) -> None:
        self.beta = beta
        self.updates = 0
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the weights of `module`."""
        beta = min(self.beta, (1 + self.updates) / (10 + self.updates))
        averages: list[Tensor] = list(self.module.parameters())
        torch._foreach_lerp_(averages, list[Tensor](module.parameters()), 1 - beta)
        if kept := list(self.module.buffers()):
            torch._foreach_copy_(kept, list(module.buffers()))
        self.updates += 1


class UpdateCounts:
    """How many updates each average has seen: what a checkpoint holds of them beside their modules."""

    def __init__(self, averages: Mapping[str, ModelAverage]) -> None:
        self.averages = averages

    def state_dict(self) -> dict[str, int]:
        return {name: average.updates for name, average in self.averages.items()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        for name, average in self.averages.items():
            average.updates = int(state[name])
