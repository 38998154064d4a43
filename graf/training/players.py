"""A player of the game: a network, its optimiser, learning rate and loss scale, and how its gradients are applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from graf.base.errors import UserError
from graf.runtime.amp import Scaler, find_inf, optimizer_step
from graf.runtime.distributed import Processes
from graf.training.optim import clip_gradients, find_nonfinite_gradient, gradient_norm, gradient_norms

#: the key that sets the learning rate of each player, by its suffix
RATE_KEYS = {"g": "training.lr_g", "d": "training.lr_d", "sr": "ccsr.lr"}
#: updates that a GradScaler may skip in a row before the run is given up as diverged
MAX_SKIPPED_UPDATES = 100


class DivergenceError(UserError):
    """A loss or gradient is not finite; the message names the first offending tensor."""


@dataclass
class Player:
    """One network of the game. `suffix` marks its scalars: lr_d, scale_d, grad_norm_d.

    schedule: the factor on `lr` at an iteration; layer_norms: updates tell the gradient norms of its layers too, as
    grad_norm_d/trunk.0.
    """

    name: str
    suffix: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Scaler
    lr: float
    schedule: Callable[[int], float]
    betas: tuple[float, float]
    processes: Processes = field(default_factory=Processes)
    layer_norms: bool = False
    skipped: int = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimiser owns."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def begin(self, iteration: int) -> None:
        """Set the learning rate of this iteration and drop old gradients.

        Rates come from the configuration, not from a checkpoint: who resumes with others gets these.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(iteration)
            if "betas" in group:
                group["betas"] = self.betas
            if group.get("fused") and not self.optimizer.defaults["fused"]:  # saved where Adam could be fused
                group["fused"] = False
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the (scaled) gradients of a loss."""
        self.scaler.scale(loss).backward()

    def apply(self, terms: dict[str, Tensor], iteration: int, clip: str, clip_at: float) -> dict[str, Tensor]:
        """Add up over the processes, unscale, check, clip, step and update the loss scale.

        Returns the terms with the gradient's norm, before clipping. All processes come to the same decisions. Raises
        DivergenceError for a term or gradient that is not finite, unless the scaler skips the update for it.
        """
        summed = self.processes.sum_gradients(self.parameters, terms)
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.parameters)
        terms = terms | {f"grad_norm_{self.suffix}": norm}
        finite = torch.isfinite(torch.stack([value.float().to(norm.device) for value in terms.values()])).all()
        inf = find_inf(self.scaler, self.optimizer)
        read = [finite if summed is None else torch.isfinite(norm) & summed.finite]
        read += [torch.zeros_like(finite) if inf is None else inf, *([] if summed is None else summed.present)]
        # The one wait for the device of an update; without it, everything after a NaN would be lost.
        is_finite, skip, *present = torch.stack(read).tolist()
        for parameter, is_present in zip(self.parameters if present else [], present, strict=True):
            if not is_present:  # as where there is one process: an optimiser would move it by its momentum
                parameter.grad = None
        if not is_finite and not skip:  # with a scaler: an infinite loss with finite gradients, which it does not see
            raise DivergenceError(self._describe_divergence(terms, iteration))
        if self.layer_norms:
            norms = gradient_norms(self.network)
            terms |= {f"grad_norm_{self.suffix}/{layer}": norm for layer, norm in norms.items()}
        if is_finite:
            clip_gradients(self.parameters, clip, clip_at)
        stepped = optimizer_step(self.scaler, self.optimizer, skip)
        self.scaler.update()
        self.skipped = 0 if stepped else self.skipped + 1
        if self.skipped > MAX_SKIPPED_UPDATES:
            reason = self._describe_divergence(terms, iteration)
            raise DivergenceError(f"{self.skipped} updates in a row skipped by the loss scaler: {reason}")
        return terms

    def lr_at(self, iteration: int) -> float:
        """The learning rate of an iteration."""
        return self.lr * self.schedule(iteration)

    def _describe_divergence(self, terms: dict[str, Tensor], iteration: int) -> str:
        bad_terms = [name for name, value in terms.items() if not bool(torch.isfinite(value))]
        first = bad_terms[0] if bad_terms else "no term"
        parameter = find_nonfinite_gradient(self.network)
        if first.startswith("grad_norm") and parameter is not None:
            first = f"the gradient of {self.name}.{parameter}"
        return (
            f"iteration {iteration}: {first} is not finite; the last checkpoint is untouched; resume from it with a "
            f"lower learning rate ({', '.join(RATE_KEYS.values())}) or with training.use_amp=false"
        )
