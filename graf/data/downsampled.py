"""Photographs at the generator's resolution where they are kept at a higher one for super-resolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class DownsampledPhotographs(Dataset[tuple[Tensor, Tensor]]):
    """A data set of (image, label) whose images are reduced by CCSR's `down`, (B, 3, s h, s w) -> (B, 3, h, w)."""

    def __init__(self, photographs: Any, down: Callable[[Tensor], Tensor], name: str) -> None:
        self.photographs, self.down, self.name = photographs, down, name

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.photographs[index]
        with torch.no_grad():
            return self.down(image[None])[0], label

    def fingerprint(self) -> str:
        """Identifies photographs and reduction, for the names of cached features."""
        return f"{self.photographs.fingerprint()}/{self.name}"
