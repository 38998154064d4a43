"""Failures as a person meets them: one line for what is foreseen; anything else is a bug and keeps its traceback."""

from __future__ import annotations

from graf.config import ConfigError
from graf.data.errors import DataError
from graf.evaluation.consistency import ConsistencyError
from graf.evaluation.extractor import ExtractorError
from graf.evaluation.fidelity import FidelityError
from graf.evaluation.heldout import HeldoutError
from graf.models.rrdb import WeightsError
from graf.runtime.checkpoint import CheckpointError
from graf.runtime.device import DeviceError
from graf.runtime.memory import OutOfMemory, is_out_of_memory
from graf.training.players import DivergenceError

FORESEEN = (
    ConfigError,
    DataError,
    ExtractorError,
    FidelityError,
    HeldoutError,
    ConsistencyError,
    WeightsError,
    CheckpointError,
    DeviceError,
    DivergenceError,
    OutOfMemory,
    OSError,
)


def explain_failure(error: Exception) -> str:
    """What to print for a failure that the program foresees; re-raises one that it does not."""
    if is_out_of_memory(error) and not isinstance(error, OutOfMemory):
        # Phases retry with less at once; what they do not cover is building the networks and updating them.
        return (
            "out of memory for weights or optimiser states; lower nerf.netwidth, discriminator.ndf or ccsr.features, "
            f"or training.batch_size [{_first_line(error)}]"
        )
    if isinstance(error, FORESEEN):
        return str(error)
    raise error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
