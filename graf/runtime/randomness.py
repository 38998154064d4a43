"""Random numbers as a function of (seed, purpose, iteration, global sample index), never of rank or micro-batch.

`purpose` names what is drawn (`"z"`, `"pose"`, `"jitter"`); `index` is the sample's position in the effective batch of
that iteration. So a step can be recomputed, split over micro-batches or ranks, and resumed with equal results.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graf.runtime.regions import RANDOM_NUMBERS, region


def derive_seed(seed: int, purpose: str, iteration: int = 0, index: int = 0) -> int:
    """A seed in [0, 2^63) from its four parts: 63 bits of BLAKE2b, the same on every platform and Python version."""
    parts = [operator.index(seed), purpose, operator.index(iteration), operator.index(index)]
    digest = hashlib.blake2b(json.dumps(parts).encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# A counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): number n of a row
# is a hash of n under the row's key, so it does not matter in which order, parts or places numbers are made. The hash
# is MurmurHash3's 64-bit finaliser, with shifts by 32 instead of 33 so that a shift is an exchange of words, over a
# Weyl sequence whose step belongs to the row (Steele et al., "Fast splittable pseudorandom number generators", OOPSLA
# 2014). A hash gives two numbers of 24 bits. Integers wrap alike on CPUs and GPUs, hence equal numbers there. On the
# CPU NumPy makes them: its calls cost a fraction of torch's, and there are many small ones.
_MULTIPLIERS = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
_24_BITS = 0xFFFFFF
#: hashes that NumPy makes at once, so that they stay in the cache
_BLOCK = 2**14


def _hash(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of `values`, which are overwritten."""
    shifted = np.empty_like(values)
    for multiplier in _MULTIPLIERS:
        values ^= np.right_shift(values, np.uint64(32), out=shifted)
        values *= np.uint64(multiplier)
    values ^= np.right_shift(values, np.uint64(32), out=shifted)
    return values


def _hash_on_device(values: Tensor) -> Tensor:
    """The same of int64 tensors, whose shifts would drag the sign along: a word is changed by the other."""
    words = values.view(torch.int32)
    low, high = words[:, 0::2], words[:, 1::2]
    for multiplier in _MULTIPLIERS:
        low.bitwise_xor_(high)
        values.mul_(multiplier - 2**64)
    low.bitwise_xor_(high)
    return values


def make_keys(seed: int, purpose: str, iteration: int, indices: Sequence[int]) -> Tensor:
    """Keys (len(indices), 2) of the rows of random numbers that belong to samples, int64 on the CPU."""
    rows = np.fromiter(indices, dtype=np.int64, count=len(indices)).view(np.uint64)[:, None]
    offsets = np.array([0, _MULTIPLIERS[1]], dtype=np.uint64) + np.uint64(derive_seed(seed, purpose, iteration))
    keys = _hash(rows * np.uint64(_GOLDEN) + offsets)
    keys[:, 1] |= np.uint64(1)  # the step of a Weyl sequence of full period
    return torch.from_numpy(keys.view(np.int64))


def draw_uniform(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """Numbers first .. first + count - 1 of each row, uniform in [0, 1): (B, count), float32, on the keys' device."""
    with region(RANDOM_NUMBERS):
        return _draw_pairs(keys, count, first)[:, first % 2 : first % 2 + count]


def draw_normal(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """Standard normal numbers first .. first + count - 1 of each row: the quantiles of the middles of 2^24 intervals.

    sqrt(2) erfinv(2 u - 1) costs half of Box & Muller's transform on a CPU, and no number waits for its partner.
    """
    with region(RANDOM_NUMBERS):
        uniform = draw_uniform(keys, count, first)
        return (2 * uniform).add_(2.0**-24 - 1).erfinv_().mul_(math.sqrt(2))  # 2 u + 2^-24 - 1 is exact in float32


def _draw_pairs(keys: Tensor, count: int, first: int) -> Tensor:
    """Uniform numbers (B, an even number), beginning with the first one of the pair that number `first` belongs to."""
    start, stop = first // 2, -(-(first + count) // 2)
    if keys.device.type != "cpu" or type(keys) is not Tensor:  # a fake tensor has no memory that NumPy could read
        places = torch.arange(start, stop, device=keys.device)
        words = _hash_on_device((places * keys[:, 1:]).add_(keys[:, :1])).view(torch.int32)
        # Not in place: torch 2.1 refuses that under a mode that watches operations
        return words.bitwise_and(_24_BITS).to(torch.float32).mul_(2.0**-24)
    rows = keys.numpy().view(np.uint64)
    origins, steps = rows[:, :1], rows[:, 1:]
    numbers, block = np.empty((len(keys), 2 * (stop - start)), np.float32), max(1, _BLOCK // max(1, len(keys)))
    for begin in range(start, stop, block):
        counters = np.arange(begin, min(begin + block, stop), dtype=np.uint64)
        values = counters * steps
        values += origins
        hashed = _hash(values).view(np.int32)
        hashed &= np.int32(_24_BITS)
        numbers[:, 2 * (begin - start) : 2 * (begin - start) + hashed.shape[1]] = hashed
    return torch.from_numpy(numbers).mul_(2.0**-24)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one iteration for the samples `indices` of its effective batch.

    Row i of every draw depends on (seed, purpose, iteration, indices[i]) alone, so any split of the indices gives the
    same rows, and a longer row begins with the numbers of a shorter one.
    """

    seed: int
    iteration: int
    indices: tuple[int, ...] | range

    def keys(self, purpose: str) -> Tensor:
        """The keys (len(indices), 2) from which :func:`draw_uniform` and :func:`draw_normal` make the rows."""
        return make_keys(self.seed, purpose, self.iteration, self.indices)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Uniform in [0, 1), float32, (len(indices), *shape), on the CPU."""
        return draw_uniform(self.keys(purpose), math.prod(shape)).reshape(len(self.indices), *shape)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal, float32, (len(indices), *shape), on the CPU."""
        return draw_normal(self.keys(purpose), math.prod(shape)).reshape(len(self.indices), *shape)

    def integers(self, purpose: str, high: int, *shape: int) -> Tensor:
        """Uniform over 0 .. high - 1 (high far below 2^24), int64, (len(indices), *shape), on the CPU."""
        return (self.uniform(purpose, *shape) * high).long()


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
