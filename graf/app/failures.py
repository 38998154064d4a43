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
        # What can be done in smaller pieces has been tried again so; this happened outside of it.
        return (
            "out of memory where nothing can be halved; in training lower nerf.netwidth, discriminator.ndf, "
            f"ccsr.features or training.batch_size, in eval.py --resolution or --num_images [{_first_line(error)}]"
        )
    if isinstance(error, FORESEEN):
        # A process that loads images sends its error with its traceback, whose last line is the message.
        lines = str(error).strip().splitlines()
        return lines[-1].partition(": ")[2] if lines and lines[0].startswith("Caught ") else str(error)
    raise error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
