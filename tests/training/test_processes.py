"""Several processes train as one does: the same weights and decisions, whoever meets an infinity or a full memory."""

import math
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.fixed_seed_runs import make_float64
from graf.app import builders
from graf.data.errors import DataError
from graf.data.loader import Batches, BatchOrder
from graf.runtime.amp import Precision
from graf.runtime.distributed import DesynchronisedError, Processes
from graf.training.objective import GANObjective
from graf.training.players import DivergenceError, Player
from graf.training.trainer import Trainer

#: everything that a step can hold, as in test_micro_batches.py, on a batch of eight
EVERYTHING = (
    *("data.imsize=16", "data.synthetic.instances=3", "training.batch_size=8", "nerf.N_importance=4"),
    *("nerf.raw_noise_std=1", "nerf.jitter=true", "training.reg_type=real", "training.reg_every=2"),
    *("discriminator.class_loss=1", "discriminator.spectral_norm=true", "training.grad_clip=norm"),
    *("training.grad_clip_at=0.5", "training.share_fakes=true", "training.sync_check_every=1"),
    "discriminator.augment={colour: 0.2, translation: 0.1, cutout: 0.2}",
    *("ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1", "ccsr.supervise_generator=1", "ccsr.agreement=1"),
    *("ccsr.start_iteration=0", "ccsr.every=1", "training.layer_norms=true"),
)
#: what a phase computes
PHASES = ("render_patches", "discriminator_loss", "penalty_loss", "generator_loss", "super_resolution_loss")
PLANES = (
    *("nerf.field=triplane", "nerf.plane_resolution=8", "nerf.plane_channels=4", "nerf.decoder_width=8"),
    *("training.match_views=true", "training.photometric=20", "training.opacity=0.1", "ray_sampler.snap=true"),
    *("data.refine_cameras=true", "training.share_fakes=false", "training.optimizer=adam"),
)


@pytest.fixture(scope="module")
def photographs(smoke_config):
    """Photographs at the resolution of super-resolution."""
    return builders.open_photographs(smoke_config(*EVERYTHING))


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """Every weight and buffer, the averages' too, and the optimisers' states."""
    found = {}
    for player in trainer.players:
        found |= {f"{player.name}.{name}": value for name, value in player.network.state_dict().items()}
        for number, state in enumerate(player.optimizer.state.values()):
            found |= {f"{player.name}.{number}.{name}": value for name, value in state.items()}
    for name, average in trainer.averages.items():
        found |= {f"average.{name}.{key}": value for key, value in average.module.state_dict().items()}
    return {name: value.clone() for name, value in found.items() if isinstance(value, Tensor)}


@pytest.fixture
def train(smoke_config, photographs, make_trainer) -> Callable[..., Any]:
    """Train for some steps as a run does, in the process given; returns weights and statistics."""

    def run(processes: Processes, *keys: str, steps: int, float64: bool = True) -> tuple[dict[str, Tensor], Any]:
        trainer = make_trainer(*EVERYTHING, *keys, data=photographs, processes=processes)
        if float64:
            make_float64(trainer)
        loader = builders.build_loader(smoke_config(*EVERYTHING, *keys), photographs, share=processes.share)
        with Batches(loader) as batches:
            for images, labels, size in islice(batches, steps):
                trainer.latest |= trainer.step(images.double() if float64 else images, labels, size)
                trainer._check_equality()
        trainer.share_statistics()
        return weights_of(trainer), {name: float(value) for name, value in trainer.latest.items()}

    return run


@pytest.mark.parametrize(
    ("size", "keys"),
    [(2, ()), (3, ("training.micro_batch_size=2",)), (2, PLANES), (3, (*PLANES, "training.memory_strategy=deferred"))],
    ids=["2", "3 in parts", "2, planes", "3, planes, deferred"],
)
def test_twenty_steps_of_several_processes_are_those_of_one(run_processes, train, size, keys):
    expected, statistics = train(Processes(), *keys, steps=20)
    results = run_processes(size, lambda processes: train(processes, *keys, steps=20), timeout=120.0)
    for rank, (found, shared) in enumerate(results):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            scale = max(1.0, float(value.abs().max()))
            assert float((found[name].double() - value.double()).abs().max()) <= 1e-8 * scale, (rank, name)
        if rank == 0:
            assert shared == pytest.approx(statistics, rel=1e-6, abs=1e-8)


def gradients_of_first_step(trainer: Trainer, batch: tuple[Any, ...], patch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    clip = "graf.training.players.clip_gradients"

    def spy(parameters: list[nn.Parameter], how: str, limit: float) -> None:
        for player in trainer.players:
            for name, parameter in player.network.named_parameters():
                if parameter.grad is not None and any(parameter is one for one in parameters):
                    found[f"{player.name}.{name}"] = parameter.grad.clone()

    patch.setattr(clip, spy)
    trainer.step(*batch)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_of_the_first_step_in_float32_are_those_of_one_process(
    run_processes, smoke_config, photographs, make_trainer, monkeypatch, size
):
    def work(processes: Processes) -> dict[str, Tensor]:
        trainer = make_trainer(*EVERYTHING, data=photographs, processes=processes)
        loader = builders.build_loader(smoke_config(*EVERYTHING), photographs, share=processes.share)
        with Batches(loader) as batches, monkeypatch.context() as patch:
            return gradients_of_first_step(trainer, next(batches), patch)

    expected = work(Processes())
    assert {name.split(".")[0] for name in expected} == {"discriminator", "generator", "ccsr"}
    for found in run_processes(size, work):
        assert found.keys() == expected.keys()
        for player in ("discriminator", "generator", "ccsr"):
            names = [name for name in expected if name.startswith(f"{player}.")]
            gradient, others = (torch.cat([one[name].flatten() for name in names]) for one in (expected, found))
            assert float((others - gradient).norm()) <= 1e-5 * float(gradient.norm()), player


@pytest.mark.parametrize("phase", PHASES)
def test_memory_that_runs_out_in_one_process_makes_all_smaller(run_processes, train, monkeypatch, phase):
    original = getattr(GANObjective, phase)

    def work(processes: Processes) -> Any:
        calls: list[int] = []

        def faulty(*arguments: Any, **keywords: Any) -> Any:
            calls.append(1)
            if processes.rank == 1 and len(calls) == 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return original(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(GANObjective, phase, faulty)
            return train(processes, steps=4)

    (first, _), (second, _) = run_processes(2, work)
    expected, _ = train(Processes(), steps=4)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        scale = max(1.0, float(value.abs().max()))
        assert float((first[name].double() - value.double()).abs().max()) <= 1e-8 * scale, name


def poison(processes: Processes, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """The second gradient of G is not finite in process 0."""
    backward, calls = Player.backward, []

    def poisoned(player: Player, loss: Tensor) -> None:
        backward(player, loss)
        if player.name == "generator" and processes.rank == 0:
            calls.append(1)
            if len(calls) == 2:
                next(p for p in player.parameters if p.grad is not None).grad.view(-1)[0] = value

    monkeypatch.setattr(Player, "backward", poisoned)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_infinity_in_one_process_is_skipped_by_all(run_processes, make_trainer, batches, monkeypatch, value):
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("this torch scales gradients on CUDA alone")
    precision = Precision("cpu", None)
    scaling = partial(Precision.make_scaler, precision, True)
    steps = list(batches(4, size=4))

    def work(processes: Processes) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Precision, "make_scaler", lambda *_: scaling())
            trainer = make_trainer("training.batch_size=4", precision=precision, processes=processes)
            poison(processes, patch, value)
            for images, labels in steps:
                rows = processes.share(len(images))
                trainer.step(images[rows.start : rows.stop], labels[rows.start : rows.stop], len(images))
            scales = [player.scaler.get_scale() for player in trainer.players]
        return weights_of(trainer), scales, trainer.g.skipped, len(trainer.g.optimizer.state)

    (first, scales, _, _), (second, other_scales, _, _) = run_processes(2, work)
    assert scales == other_scales
    assert scales[1] < scales[0]  # G's was halved, D's was not
    for name, weights in first.items():
        assert torch.equal(weights, second[name]), name
        assert bool(torch.isfinite(weights).all()), name


def test_without_a_scaler_all_give_up_together_and_untouched(run_processes, make_trainer, batches, monkeypatch):
    (images, labels), *_ = batches(1, size=4)

    def work(processes: Processes) -> Any:
        with monkeypatch.context() as patch:
            trainer = make_trainer("training.batch_size=4", "training.micro_batch_size=1", processes=processes)
            poison(processes, patch, math.nan)
            before = weights_of(trainer)
            rows = processes.share(4)
            try:
                trainer.step(images[rows.start : rows.stop], labels[rows.start : rows.stop], 4)
            except DivergenceError as error:
                after = weights_of(trainer)
                return str(error), all(torch.equal(before[n], after[n]) for n in before if n.startswith("generator"))

    for message, is_untouched in run_processes(2, work):
        assert "iteration 0: the norm of the gradient of generator." in message
        assert is_untouched


def test_a_process_that_has_drifted_ends_the_run(run_processes, make_trainer, batches):
    (images, labels), *_ = batches(1, size=4)

    def work(processes: Processes) -> Any:
        trainer = make_trainer("training.batch_size=4", "training.sync_check_every=1", processes=processes)
        rows = processes.share(4)
        trainer.step(images[rows.start : rows.stop], labels[rows.start : rows.stop], 4)
        trainer._check_equality()
        if processes.rank == 1:
            with torch.no_grad():
                list(trainer.average.module.parameters())[1].view(-1)[0] += 1e-6
        try:
            trainer._check_equality()
        except DesynchronisedError as error:
            return str(error)

    for message in run_processes(2, work):
        assert message.startswith("generator_average.")
        assert "(1 of " in message


@pytest.mark.parametrize(("drop_last", "size"), [(True, 3), (False, 2), (False, 4)])
def test_processes_see_the_batches_of_one_and_no_image_twice(drop_last, size):
    repeats, batch_size = [1] * 21, 8  # whose last batch has five images
    orders = []
    for rank in range(size):
        processes = Processes()
        processes.rank, processes.size = rank, size
        orders.append(BatchOrder(repeats, batch_size, drop_last, seed=3, start_iteration=1, share=processes.share))
    whole = BatchOrder(repeats, batch_size, drop_last, seed=3, start_iteration=1)
    batches = list(islice(whole, 2 * whole.batches_per_epoch - 1))
    parts = list(zip(*(islice(order, len(batches)) for order in orders), strict=True))
    assert [list(chain(*part)) for part in parts] == batches
    assert [whole.size_of(number) for number in range(1, len(batches) + 1)] == [len(batch) for batch in batches]
    epoch = list(chain(*batches[-whole.batches_per_epoch :]))
    assert len(set(epoch)) == len(epoch)


def test_a_last_batch_that_is_too_small_for_the_processes_is_refused_at_once():
    processes = Processes()
    processes.rank, processes.size = 0, 6
    with pytest.raises(DataError, match=r"of a batch of 5 images this process would get none; use fewer processes"):
        BatchOrder([1] * 21, 8, drop_last=False, share=processes.share)
