"""Random numbers as a function of (seed, purpose, iteration, global sample index), never of rank or micro-batch.

`purpose` names what is drawn (`"z"`, `"pose"`, `"jitter"`); `index` is the sample's position in the effective batch of
that iteration. So a step can be recomputed, split over micro-batches or ranks, and resumed with equal results.
"""

from __future__ import annotations

import hashlib
import json
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, iteration: int = 0, index: int = 0) -> int:
    """A seed in [0, 2^63) from its four parts: 63 bits of BLAKE2b, the same on every platform and Python version."""
    parts = [operator.index(seed), purpose, operator.index(iteration), operator.index(index)]
    digest = hashlib.blake2b(json.dumps(parts).encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Draws:
    """The random numbers of one iteration for the samples `indices` of its effective batch.

    Row i of every draw depends on (seed, purpose, iteration, indices[i]) and the shape alone, so any split of the
    indices gives the same rows. Each row is one launch: draw per sample, not per ray or point.
    """

    seed: int
    iteration: int
    indices: tuple[int, ...] | range

    def uniform(self, purpose: str, *shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Uniform in [0, 1), float32, (len(indices), *shape), drawn on `device`."""
        return self._fill_rows(purpose, shape, torch.float32, device, lambda row, g: row.uniform_(generator=g))

    def normal(self, purpose: str, *shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Standard normal, float32, (len(indices), *shape), drawn on `device`."""
        return self._fill_rows(purpose, shape, torch.float32, device, lambda row, g: row.normal_(generator=g))

    def integers(self, purpose: str, high: int, *shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Uniform over 0 .. high - 1, int64, (len(indices), *shape), drawn on `device`."""
        return self._fill_rows(purpose, shape, torch.int64, device, lambda row, g: row.random_(0, high, generator=g))

    def _fill_rows(
        self,
        purpose: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        fill: Callable[[torch.Tensor, torch.Generator], Any],
    ) -> torch.Tensor:
        rows = torch.empty((len(self.indices), *shape), dtype=dtype, device=device)
        generator = torch.Generator(device=rows.device)
        for row, index in zip(rows, self.indices, strict=True):
            fill(row, generator.manual_seed(derive_seed(self.seed, purpose, self.iteration, index)))
        return rows


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators, for library code that takes no generator of ours."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore the global random states of Python, NumPy and torch (CPU, CUDA, MPS) when the block ends or fails.

    CUDA generators are covered where CUDA has started before the block: asking earlier would start it on every GPU.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)
