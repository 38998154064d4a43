"""The one value that says how a step fits into memory; what is computed does not depend on it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from graf.runtime.activation_checkpointing import STRATEGIES

#: fewer rays at once save no memory that matters
SMALLEST_CHUNK = 64


@dataclass(frozen=True)
class MemorySettings:
    """Images on the device at once, activations of rendering that are kept (of STRATEGIES), rays rendered at once."""

    micro_batch_size: int
    strategy: str
    chunk: int

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES or min(self.micro_batch_size, self.chunk) < 1:
            raise ValueError(f"{self}: expected sizes of at least 1 and a strategy of {', '.join(STRATEGIES)}")

    def __str__(self) -> str:
        return f"micro_batch_size={self.micro_batch_size} memory_strategy={self.strategy} chunk={self.chunk}"

    def shrink(self, batch_size: int, renders: bool = True) -> MemorySettings | None:
        """The next smaller settings for a batch: a smaller micro-batch, then checkpointing, then a smaller chunk.

        renders: whether what ran out of memory renders rays, so that the latter two help. None: nothing is left.
        """
        size = min(self.micro_batch_size, batch_size)
        if size > 1:
            return replace(self, micro_batch_size=size // 2)
        if renders and self.strategy == "dense":
            return replace(self, strategy="checkpoint")
        if renders and self.chunk > SMALLEST_CHUNK:
            return replace(self, chunk=halve_chunk(self.chunk))
        return None

    def describe_change(self, other: MemorySettings) -> str:
        """What is different in `other`, in words."""
        keys = {"strategy": "memory_strategy"}
        changed = [(keys.get(name, name), old, getattr(other, name)) for name, old in vars(self).items()]
        return ", ".join(f"training.{key} {old} -> {new}" for key, old, new in changed if old != new)


def halve_chunk(chunk: int) -> int:
    """Half as many rays, at least SMALLEST_CHUNK."""
    return max(SMALLEST_CHUNK, chunk // 2)
