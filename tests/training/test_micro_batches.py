"""Splitting a batch and running out of memory: neither changes what a step computes."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.fixed_seed_runs import make_float64
from graf.app import builders
from graf.app.failures import explain_failure
from graf.runtime.live_tensors import LiveTensorMeter
from graf.runtime.memory import OutOfMemory
from graf.runtime.memory_settings import MemorySettings
from graf.training.inputs import StepInputs
from graf.training.objective import GANObjective
from graf.training.players import Player
from graf.training.trainer import SharedRender, Trainer

#: everything that a step can hold: R1, class loss, augmentation, spectral norm, importance samples, CCSR with all terms
EVERYTHING = (
    *(
        "data.imsize=16",
        "data.synthetic.instances=3",
        "training.batch_size=5",
        "nerf.N_importance=4",
        "nerf.raw_noise_std=1",
        "nerf.jitter=true",
    ),
    *(
        "training.reg_type=real",
        "training.reg_every=1",
        "discriminator.class_loss=1",
        "discriminator.spectral_norm=true",
    ),
    "discriminator.augment={colour: 0.2, translation: 0.1, cutout: 0.2}",
    *("ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1", "ccsr.supervise_generator=1", "ccsr.agreement=1"),
    *("ccsr.start_iteration=0", "ccsr.every=1"),
)

#: rays that draw no random numbers at all
NOISELESS = ("nerf.jitter=false", "nerf.raw_noise_std=0")
#: another field of layers
SIREN = ("nerf.field=siren",)
#: tri-planes, and generated patches that show what the photographs show, with instances' codes
TRIPLANE = (
    *("nerf.field=triplane", "nerf.plane_resolution=8", "nerf.plane_channels=4", "nerf.decoder_width=8"),
    *("training.match_views=true", "training.photometric=20", "training.opacity=0.1", "ray_sampler.snap=true"),
    "ccsr.photometric=10",
)
SYNTHESIS = (*TRIPLANE, "nerf.planes=synthesis", "nerf.synthesis_width=4")
#: and cameras that are learned: gradients that end in the rays
REFINED = (*TRIPLANE, "data.refine_cameras=true")


@pytest.fixture(scope="module")
def photographs(smoke_config):
    """Photographs at the resolution of super-resolution."""
    return builders.open_photographs(smoke_config(*EVERYTHING))


@pytest.fixture
def make_trainer(make_trainer) -> Callable[..., Trainer]:
    """Build a trainer with everything on."""
    return partial(make_trainer, *EVERYTHING)


@pytest.fixture
def batch(photographs) -> tuple[torch.Tensor, torch.Tensor]:
    """Five photographs with their labels."""
    images, labels = zip(*(photographs[index] for index in range(0, 25, 5)), strict=True)
    return torch.stack(images), torch.stack(labels)


def gradients_of_a_step(
    trainer: Trainer, batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """The gradients that every player is updated with in one step in float64."""
    torch.manual_seed(2)
    make_float64(trainer)
    for player in trainer.players:
        for parameter in player.network.parameters():
            if not parameter.any():  # what starts at zero would hide what is in front of it
                nn.init.normal_(parameter, std=0.1)
    found: dict[str, torch.Tensor] = {}
    apply = Player.apply

    def spy(player: Player, *arguments: Any) -> Any:
        for name, parameter in player.network.named_parameters():
            assert parameter.dtype == torch.float64
            if parameter.grad is not None:
                found[f"{player.name}.{name}"] = parameter.grad.clone()
        return apply(player, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Player, "apply", spy)
        trainer.step(batch[0].double(), batch[1])
    return found


@pytest.mark.parametrize("sharing", ["training.share_fakes=false", "training.share_fakes=true"])
@pytest.mark.parametrize(
    "field",
    [(), NOISELESS, SIREN, TRIPLANE, SYNTHESIS, REFINED],
    ids=["mlp", "no noise", "siren", "triplane", "synthesis", "learned cameras"],
)
def test_gradients_of_parts_are_those_of_the_whole_batch(make_trainer, batch, monkeypatch, field, sharing):
    make_trainer = partial(make_trainer, *field)
    whole = gradients_of_a_step(make_trainer(sharing, "training.chunk=4096"), batch, monkeypatch)
    assert {name.split(".")[0] for name in whole} == {"discriminator", "generator", "ccsr"}
    moving = [name for name, gradient in whole.items() if ".cameras." in name and gradient.any()]
    assert len(moving) == (3 if field is REFINED else 0)
    for strategy in ("dense", "checkpoint", "deferred"):
        for size in (1, 3):  # of five
            keys = (f"training.micro_batch_size={size}", f"training.memory_strategy={strategy}", "training.chunk=100")
            parts = gradients_of_a_step(make_trainer(sharing, *keys), batch, monkeypatch)
            assert parts.keys() == whole.keys()
            for name, gradient in whole.items():
                scale = float(gradient.abs().max())
                difference = float((parts[name] - gradient).abs().max())
                assert difference <= 1e-9 * scale + 1e-15, (strategy, size, name)


def test_buffers_are_the_same_after_a_split_step(make_trainer, batch):
    whole, parts = make_trainer(), make_trainer("training.micro_batch_size=2")
    for trainer in (whole, parts):
        trainer.step(*batch)
    for (name, one), (_, other) in zip(whole.d.network.named_buffers(), parts.d.network.named_buffers(), strict=True):
        assert torch.equal(one, other), name  # spectral norm has iterated once, however many parts there are


# ---------------------------------------------------------------- running out of memory

#: phase -> which method of the objective runs out of memory in it
FAULTS = {
    "render": "render_patches",
    "d": "discriminator_loss",
    "r1": "penalty_loss",
    "g": "generator_loss",
    "sr": "super_resolution_loss",
}


@contextmanager
def fault(monkeypatch: pytest.MonkeyPatch, method: str, at: int) -> Iterator[list[int]]:
    """Call number `at` of a method of the objective runs out of memory, after it has computed its result."""
    calls: list[int] = []
    original = getattr(GANObjective, method)

    def faulty(objective: GANObjective, *arguments: Any, **keywords: Any) -> Any:
        result = original(objective, *arguments, **keywords)
        calls.append(len(calls))
        if len(calls) == at:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(GANObjective, method, faulty)
        yield calls


def shrink_before(trainer: Trainer, phase: str) -> None:
    """The next phase of this name begins with the sizes that a retry would have."""
    original = trainer._in_phase

    def in_phase(name: str, inputs: StepInputs, shared: SharedRender, accumulate: Callable[..., Any]) -> Any:
        if name == phase:
            trainer._in_phase = original  # type: ignore[method-assign]
            trainer._shrink(name, len(inputs), shared)
        return original(name, inputs, shared, accumulate)

    trainer._in_phase = in_phase  # type: ignore[method-assign, assignment]


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every weight and buffer, the averages' too, and the optimisers' states."""
    found = {}
    for player in trainer.players:
        found |= {f"{player.name}.{name}": value for name, value in player.network.state_dict().items()}
        for number, state in enumerate(player.optimizer.state.values()):
            found |= {f"{player.name}.{number}.{name}": value for name, value in state.items()}
    for name, average in (("average", trainer.average), ("average_ccsr", trainer.sr_average)):
        if average is not None:
            found |= {f"{name}.{key}": value for key, value in average.module.state_dict().items()}
    return {name: value.clone() for name, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("phase", FAULTS)
@pytest.mark.parametrize(("size", "at"), [(5, 1), (2, 1), (2, 2)])
def test_after_a_retry_everything_is_as_with_the_smaller_size_from_that_phase_on(
    make_trainer, batch, monkeypatch, caplog, phase, size, at
):
    if phase == "render" and size < 5:
        pytest.skip("a batch in parts renders nothing in advance")
    keys = ("training.share_fakes=true", f"training.micro_batch_size={size}")
    retried, smaller = make_trainer(*keys), make_trainer(*keys)
    for trainer in (retried, smaller):
        trainer.step(*batch)
    with caplog.at_level(logging.WARNING, "graf"), fault(monkeypatch, FAULTS[phase], at) as calls:
        retried.step(*batch)
    assert len(calls) > at
    shrink_before(smaller, "d" if phase == "r1" else phase)
    smaller.step(*batch)
    for trainer in (retried, smaller):
        trainer.step(*batch)  # the smaller size is kept
    assert retried.memory == smaller.memory
    assert retried.memory.micro_batch_size == size // 2
    expected = weights_of(smaller)
    for name, value in weights_of(retried).items():
        assert torch.equal(value, expected[name]), name
    assert len(caplog.records) == 1
    assert f"training.micro_batch_size {size} -> {size // 2}" in caplog.text


def peak_of(make_trainer: Callable[..., Trainer], batch: tuple[torch.Tensor, torch.Tensor], *overrides: str) -> int:
    with LiveTensorMeter() as meter:
        trainer = make_trainer(*overrides)
        for _ in range(2):
            trainer.step(*batch)
        return meter.peak


def test_a_device_that_is_too_small_for_the_batch_trains_with_less_at_once(make_trainer, batch, small_device, caplog):
    need = peak_of(make_trainer, batch)
    least = peak_of(make_trainer, batch, "training.micro_batch_size=1", "training.memory_strategy=checkpoint")
    with caplog.at_level(logging.WARNING, "graf"), small_device((need + least) / 2):
        trainer = make_trainer()
        for _ in range(3):
            statistics = trainer.step(*batch)
    assert trainer.memory.micro_batch_size < 5
    assert 1 <= len(caplog.records) <= 3
    assert all(bool(torch.isfinite(value)) for value in statistics.values())
    assert trainer.progress.iteration == 3


@pytest.mark.parametrize(("strategy", "smallest"), [("dense", "checkpoint"), ("deferred", "deferred")])
def test_a_device_that_is_too_small_for_anything_ends_with_the_keys_to_change(
    make_trainer, batch, small_device, strategy, smallest
):
    keys = (f"training.memory_strategy={strategy}", "training.chunk=256", "discriminator.spectral_norm=false")
    trainer = make_trainer(*keys)
    before = weights_of(trainer)
    with small_device(250_000), pytest.raises(OutOfMemory) as caught:
        trainer.step(*batch)
    assert trainer.memory == MemorySettings(1, smallest, 64)
    assert (trainer.generator.strategy, trainer.generator.chunk) == (smallest, 64)
    message = explain_failure(caught.value)
    assert "smallest size" in message
    for key in ("ray_sampler.N_samples", "nerf.N_samples", "nerf.netwidth", "--plan"):
        assert key in message
    after = weights_of(trainer)
    for name, value in before.items():
        if "generator" in name or "average" in name:
            assert torch.equal(value, after[name]), name  # nothing that was not finished has moved
    assert trainer.progress.iteration == 0


def test_other_errors_are_not_retried(make_trainer, batch, monkeypatch):
    trainer = make_trainer()

    def broken(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(GANObjective, "generator_loss", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        trainer.step(*batch)
    assert trainer.memory.micro_batch_size == 5
