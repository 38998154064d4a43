"""A player of the game: a network, its optimiser, learning rate and loss scale, and how its gradients are applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from graf.base.errors import UserError
from graf.runtime.amp import Scaler, find_inf, optimizer_step, skips_by_itself
from graf.runtime.distributed import Processes
from graf.training.optim import clip_gradients, gradient_norms, parameter_norms, refit_fused

#: the key that sets the learning rate of each player, by its suffix
RATE_KEYS = {"g": "training.lr_g", "d": "training.lr_d", "sr": "ccsr.lr"}
#: updates that a GradScaler may skip in a row before the run is given up as diverged
MAX_SKIPPED_UPDATES = 100


class DivergenceError(UserError):
    """A loss or gradient is not finite; the message names the first offending tensor."""


@dataclass(frozen=True)
class Update:
    """An update of which nobody knows yet what has become of it.

    numbers: what has to be finite, on the device, in the order of `names`; with a loss scale one more, not 0 where it
    has met an inf or NaN gradient and the update is skipped.
    """

    iteration: int
    names: tuple[str, ...]
    numbers: Tensor


@dataclass
class Player:
    """One network of the game. `suffix` marks its scalars: lr_d, scale_d, grad_norm_d.

    schedule: the factor on `lr` at an iteration; layer_norms: updates tell the gradient norms of its layers too, as
    grad_norm_d/trunk.0; skipped: updates that the scaler has skipped in a row, among those that have been read; unread:
    those that have not.
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
    unread: list[Update] = field(default_factory=list)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimiser owns."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @cached_property
    def names_in_network(self) -> list[tuple[str, nn.Parameter]]:
        """Every parameter of the network by its name, looked for once."""
        return list(self.network.named_parameters())

    def begin(self, iteration: int) -> None:
        """Set the learning rate of this iteration and drop old gradients.

        Rates come from the configuration, not from a checkpoint: who resumes with others gets these.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(iteration)
            if "betas" in group:
                group["betas"] = self.betas
        refit_fused(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the (scaled) gradients of a loss."""
        self.scaler.scale(loss).backward()

    @property
    def reads_at_once(self) -> bool:
        """Whether an update is read before it is made: nothing moves then that is not finite.

        That costs nothing on a CPU. Another device would have to be waited for, so its updates are read later, all at
        once; but where the scaler may skip one and the optimiser cannot do so by itself, there is no other way.
        """
        on_cpu = self.parameters[0].device.type == "cpu"
        return on_cpu or (self.scaler.is_enabled() and not skips_by_itself(self.optimizer))

    def apply(self, terms: dict[str, Tensor], iteration: int, clip: str, clip_at: float) -> dict[str, Tensor]:
        """Add up over the processes, unscale, measure, clip, step and update the loss scale.

        Returns the terms with the gradient's norm, before clipping. All processes come to the same decisions. Where
        updates are read at once this raises DivergenceError as :func:`read_updates` does; else that has to be called
        before anything is kept of what was learned.
        """
        others = self.processes.sum_gradients(self.parameters, terms)
        self.scaler.unscale_(self.optimizer)
        inf = find_inf(self.scaler, self.optimizer)
        norms = parameter_norms(self.parameters, next(iter(terms.values())).device)
        norm = torch.linalg.vector_norm(norms)
        self.unread.append(self._note(iteration, terms | others, norms, norm, inf))
        if self.reads_at_once:
            read_updates([self])
        found = {f"grad_norm_{self.suffix}": norm}
        if self.layer_norms:
            layers = gradient_norms(self.network)
            found |= {f"grad_norm_{self.suffix}/{layer}": value for layer, value in layers.items()}
        skip = self.skipped > 0 if self.reads_at_once else None
        if not skip:
            clip_gradients(self.parameters, clip, clip_at)
        optimizer_step(self.scaler, self.optimizer, skip)
        self.scaler.update()
        return terms | found

    def _note(
        self, iteration: int, terms: dict[str, Tensor], norms: Tensor, norm: Tensor, inf: Tensor | None
    ) -> Update:
        """What the update hangs on: gradients in the order of the optimiser's parameters, and whether it is skipped."""
        owned = {id(parameter) for parameter in self.parameters if parameter.grad is not None}
        named = [name for name, parameter in self.names_in_network if id(parameter) in owned]
        gradients = [f"the norm of the gradient of {self.name}.{name}" for name in named]
        last = [norm] if inf is None else [norm, inf.to(norm)]
        numbers = torch.stack([*(value.to(norm) for value in terms.values()), *norms, *last])
        return Update(iteration, (*terms, *gradients, f"grad_norm_{self.suffix}"), numbers)

    def judge(self, update: Update, numbers: Sequence[float]) -> None:
        """Count an update whose numbers have been read among those that were made or skipped, or raise."""
        *checked, skip = numbers if len(numbers) > len(update.names) else (*numbers, 0.0)
        bad = (name for name, number in zip(update.names, checked, strict=True) if not math.isfinite(number))
        first = next(bad, None)
        if first is not None and not skip:  # with a scaler: an infinite loss with finite gradients, unseen by it
            raise DivergenceError(_describe_divergence(first, update.iteration))
        self.skipped = self.skipped + 1 if skip else 0
        if self.skipped > MAX_SKIPPED_UPDATES:
            reason = _describe_divergence(first or "no term", update.iteration)
            raise DivergenceError(f"{self.skipped} updates in a row skipped by the loss scaler: {reason}")

    def lr_at(self, iteration: int) -> float:
        """The learning rate of an iteration."""
        return self.lr * self.schedule(iteration)


def read_updates(players: Sequence[Player]) -> None:
    """Learn what has become of all unread updates, in the order in which they were made; waits for the device once.

    Raises DivergenceError for the first one in which a term or gradient was not finite, unless the scaler has skipped
    it, and where it has skipped too many in a row. That one stays unread, so that it is raised whenever this is called.
    """
    unread = [(player, update) for player in players for update in player.unread]
    if not unread:
        return
    unread.sort(key=lambda pair: pair[1].iteration)  # the players of a step stay in their order
    numbers = torch.cat([update.numbers for _, update in unread]).tolist()
    for player, update in unread:
        count = len(update.numbers)
        player.judge(update, numbers[:count])
        player.unread.pop(0)
        numbers = numbers[count:]


def _describe_divergence(what: str, iteration: int) -> str:
    return (
        f"iteration {iteration}: {what} is not finite; the last checkpoint is untouched; resume from it, or from one "
        f"before it, with a lower learning rate ({', '.join(RATE_KEYS.values())}) or with training.use_amp=false"
    )
