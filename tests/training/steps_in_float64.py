"""Not a test: steps in float64 in each of the processes that torchrun starts, on GPUs or not; the first one saves the
weights. `python steps_in_float64.py FILE DEVICE STEPS section.key=value ...`
"""

import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from graf.app import builders
from graf.config import load_config
from graf.data.loader import Batches
from graf.runtime.amp import Precision
from graf.runtime.device import configure_backends, pick_device
from graf.runtime.distributed import Launch
from graf.training.inputs import InputSampler, StepInputs

SMOKE = Path(__file__).resolve().parents[2] / "configs" / "smoke.yaml"


class Float64Inputs:
    """A trainer's inputs with every number in float64."""

    def __init__(self, inputs: InputSampler) -> None:
        self.inputs = inputs

    def draw(self, *arguments: Any) -> StepInputs:
        return self.inputs.draw(*arguments).map(lambda part: part.double() if part.is_floating_point() else part)


def main() -> None:
    file, request, steps, *keys = sys.argv[1:]
    config, launch = load_config(SMOKE, keys), Launch.read(os.environ)
    device = pick_device(request, launch.local_rank, launch.local_size)
    configure_backends(device, processes=launch.local_size)
    processes = launch.join(device.type, 60.0)
    photographs = processes.first_of_all(lambda: builders.open_photographs(config))
    info = builders.describe_dataset(config, photographs)
    sampler = builders.build_pose_sampler(config, photographs, builders.build_cameras(config, info))
    precision = Precision(device.type, None)
    trainer = builders.build_trainer(config, info, sampler, precision, device, processes=processes)
    averages = [average.module for average in trainer.averages.values()]
    for module in [*(player.network for player in trainer.players), *averages]:
        module.double()
    trainer.inputs = Float64Inputs(trainer.inputs)  # type: ignore[assignment]
    with Batches(builders.build_loader(config, photographs, share=processes.share)) as batches:
        for images, labels, size in islice(batches, int(steps)):
            trainer.step(images.double(), labels, size)
            trainer._check_equality()
    if processes.is_first:
        state = {player.name: player.network.state_dict() for player in trainer.players}
        torch.save({"backend": type(processes).__name__, "device": device.type, "state": state}, file)
    processes.close()


if __name__ == "__main__":
    main()
