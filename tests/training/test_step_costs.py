"""What a training step asks of the machine besides arithmetic: draws, copies to the device and waits for it.

The step runs on a pretended device, whose tensors really live on the CPU but may be read only by waiting for them.
"""

import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

import graf
from graf.app import builders
from graf.runtime import randomness
from graf.runtime.amp import Precision
from graf.runtime.device import pack, unpack
from graf.runtime.torch_release import torch_release
from graf.training import inputs as inputs_module
from graf.training.trainer import Trainer

# What is claimed is a property of the program, so that one torch is enough; 2.1 refuses such tensors.
pytestmark = pytest.mark.skipif(torch_release() < (2, 6), reason="the pretended device is made for torch 2.6 and newer")

PACKAGE = str(Path(graf.__file__).parent)
#: torch's device without memory: nothing but the pretended device below uses it here
DEVICE = torch.device("meta")
#: operations whose result has as many rows as a device tensor says; `index` only where it is given a mask
INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
COPIES = {torch.ops.aten._to_copy, torch.ops.aten.copy_}


class DeviceTensor(Tensor):
    """A tensor that says it is on DEVICE and keeps its numbers in a tensor on the CPU, `held`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "DeviceTensor":
        found = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        found.held = held
        return found

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on a tensor of the pretended device outside of PretendedDevice")

    def tolist(self):  # torch refuses subclasses; what it does with a tensor on a device is one copy to the CPU
        return self.cpu().tolist()


class PretendedDevice(TorchDispatchMode):
    """Runs programs on DEVICE and lists, as "operation at file:line", copies to it (`copies`) and `waits` for it.

    As on a real one, an operation on tensors of both sides fails, unless those of the CPU have no dimensions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in given if isinstance(tensor, DeviceTensor)]
        on_cpu = [tensor for tensor in given if not isinstance(tensor, DeviceTensor)]
        packet, target = func.overloadpacket, kwargs.get("device")
        assert all(tensor.device.type == "cpu" for tensor in on_cpu), f"made from numbers of the CPU: {_say(func)}"
        moves_here = target is not None and torch.device(target).type == DEVICE.type
        moves_away = target is not None and not moves_here
        if packet in COPIES:
            if on_cpu and (moves_here or (on_device and args[0] is on_device[0])):
                self.copies.append(_say(func))
            elif on_device and (moves_away or on_cpu):
                self.waits.append(_say(func))
        elif on_device and any(tensor.dim() for tensor in on_cpu):
            raise AssertionError(f"tensors of both sides in {_say(func)}")
        elif on_device and self._must_be_known(func, args):
            self.waits.append(_say(func))
        if moves_here:
            kwargs["device"] = torch.device("cpu")
        wrappers = {id(tensor.held): tensor for tensor in on_device}
        held_args, held_kwargs = tree_map_only(DeviceTensor, lambda tensor: tensor.held, (args, kwargs))
        if packet is torch.ops.aten._to_copy and (moves_here or moves_away):
            held_args = (held_args[0].clone(), *held_args[1:])  # to the CPU from the CPU would be no copy
        outputs = func(*held_args, **held_kwargs)
        stays = (on_device and not moves_away) or moves_here
        if packet is torch.ops.aten.copy_:
            stays = isinstance(args[0], DeviceTensor)
        if not stays:
            return outputs
        return tree_map_only(
            Tensor, lambda tensor: wrappers[id(tensor)] if id(tensor) in wrappers else DeviceTensor(tensor), outputs
        )

    @staticmethod
    def _must_be_known(func, args) -> bool:
        """Whether the program has to know numbers of a device tensor to go on: its result, or how large that is."""
        if func.overloadpacket in INDEXING:
            return any(isinstance(index, Tensor) and index.dtype is torch.bool for index in args[1])
        return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _say(func) -> str:
    """An operation and the innermost line of the program that asked for it."""
    places = [frame for frame in traceback.extract_stack() if frame.filename.startswith(f"{PACKAGE}/")]
    where = f"{places[-1].filename.removeprefix(f'{PACKAGE}/')}:{places[-1].lineno}" if places else "the test"
    return f"{func} at {where}"


# ---------------------------------------------------------------- the pretended device


@pytest.mark.parametrize(
    "read",
    [
        lambda values: values.tolist(),
        lambda values: values.cpu(),
        lambda values: torch.zeros(6).copy_(values),
        lambda values: float(values[0]),
        lambda values: bool((values > 2).any()),
        lambda values: torch.equal(values, values),
        lambda values: values.nonzero(),
        lambda values: values[values > 2],
        lambda values: values.clone().index_put_((values > 2,), values[:3]),
        lambda values: values.masked_select(values > 2),
        lambda values: values.unique(),
    ],
    ids=["tolist", "cpu", "copy", "float", "bool", "equal", "nonzero", "mask", "mask_put", "masked_select", "unique"],
)
def test_reading_the_pretended_device_is_a_wait(read):
    with PretendedDevice() as device:
        values = torch.arange(6.0).to(DEVICE)
        assert device.waits == []
        read(values)
    assert len(device.waits) == len(device.copies) == 1


def test_computing_on_the_pretended_device_is_none_and_gives_the_numbers_of_the_cpu():
    with PretendedDevice() as device:
        weight = torch.arange(6.0).to(DEVICE).requires_grad_(True)
        order = torch.arange(5, -1, -1, device=DEVICE)
        total = (weight[order] * torch.ones(6, device=DEVICE)).square().sum() + torch.ones(())
        total.backward()
        assert (len(device.copies), device.waits) == (1, [])
        assert weight.grad is not None
        assert weight.grad.tolist() == [0, 2, 4, 6, 8, 10]


def test_the_pretended_device_refuses_what_a_real_one_would_refuse_or_copy_in_secret():
    with PretendedDevice():
        values = torch.arange(6.0).to(DEVICE)
        with pytest.raises(AssertionError, match=r"both sides in aten\.add"):
            values + torch.ones(6)
        with pytest.raises(AssertionError, match=r"both sides in aten\.index"):
            values[torch.arange(2)]
        with pytest.raises(AssertionError, match=r"made from numbers of the CPU: aten\.(mul|lift_fresh)"):
            values * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], device=DEVICE)


# ---------------------------------------------------------------- the step

SUPER_RESOLUTION = ("data.imsize=16", "ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1")
EVERY_TERM = (*SUPER_RESOLUTION, "ccsr.agreement=1", "ccsr.photographs=1", "ccsr.supervise_generator=1")
CASES = {
    "plain": (),
    "super-resolution": EVERY_TERM,
    "blur kernel": (*EVERY_TERM, "ccsr.kernel=[0.125,0.375,0.375,0.125]"),
    "layers' norms": (*EVERY_TERM, "training.layer_norms=true"),
    "shared fakes": (*EVERY_TERM, "training.share_fakes=true"),
    "checkpointed micro-batches": (*EVERY_TERM, "training.micro_batch_size=1", "training.memory_strategy=checkpoint"),
    "deferred chunks": ("training.memory_strategy=deferred", "training.chunk=256"),
    "matched views": (*EVERY_TERM, "training.match_views=true", "training.photometric=20", "ccsr.photometric=10"),
    "importance samples and noise": ("nerf.N_importance=4", "nerf.raw_noise_std=1"),
    "discriminator": (
        *("discriminator.class_loss=1", "discriminator.condition_maps=0", "discriminator.spectral_norm=true"),
        *(
            "discriminator.augment.colour=0.5",
            "discriminator.augment.translation=0.1",
            "discriminator.augment.cutout=0.2",
        ),
        *("training.reg_type=wgangp", "training.gan_type=wgan", "training.optimizer=adam", "training.grad_clip=norm"),
    ),
}


def count_by_place(events: list[str]) -> Counter[str]:
    """How often each file of the program appears in a device's list."""
    return Counter(event.rpartition(" at ")[2].partition(":")[0] for event in events)


@pytest.fixture
def purposes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What random numbers have been drawn for, in order."""
    drawn: list[str] = []
    make_keys = randomness.make_keys

    def watch(seed, purpose, iteration, indices):
        drawn.append(purpose)
        return make_keys(seed, purpose, iteration, indices)

    monkeypatch.setattr(randomness, "make_keys", watch)
    return drawn


@pytest.fixture
def make_trainer(smoke_config, monkeypatch: pytest.MonkeyPatch):
    """Build the trainer of the smoke configuration with overrides on the pretended device, as train.py does.

    The small inputs travel as on CUDA, in one buffer; only that the buffer is pinned cannot be pretended.
    """

    def move_in_one_buffer(batch, device):
        buffer, starts = pack(batch.tensors())
        return batch.with_tensors(unpack(buffer.to(device), batch.tensors(), starts))

    def make(*overrides: str) -> Trainer:
        monkeypatch.setattr(inputs_module, "move_in_one_copy", move_in_one_buffer)
        config = smoke_config(*overrides)
        photographs = builders.open_photographs(config)
        info = builders.describe_dataset(config, photographs)
        sampler = builders.build_pose_sampler(config, photographs, builders.build_cameras(config, info))
        return builders.build_trainer(config, info, sampler, Precision("cpu", None), DEVICE)

    return make


@pytest.mark.parametrize("scaled", [False, True], ids=["", "loss scaling"])
@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES.keys())
def test_a_step_draws_and_copies_everything_once_and_waits_once_for_each_update(
    make_trainer, smoke_config, batches, purposes, overrides, scaled
):
    first, second = batches(2, data=builders.open_photographs(smoke_config(*overrides)))
    with PretendedDevice() as device:
        trainer = make_trainer(*overrides)
        if scaled:
            for player in trainer.players:
                player.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
        trainer.step(*first)  # what is kept from step to step is made in the first
        purposes.clear(), device.copies.clear(), device.waits.clear()
        statistics = trainer.step(*second)
        assert len(purposes) > 2
        assert max(Counter(purposes).values()) == 1, purposes
        assert len(device.copies) == 2, device.copies  # the photographs, and everything else
        assert count_by_place(device.waits) == {"training/players.py": len(trainer.players)}, device.waits
        assert all(player.skipped == 0 for player in trainer.players)

        device.copies.clear(), device.waits.clear()
        scalars = trainer.scalars_of(statistics)
    assert (len(device.waits), device.copies) == (1, [])
    assert set(statistics) < set(scalars)


def test_a_step_on_the_pretended_device_is_the_step_on_the_cpu(make_trainer, smoke_config, batches):
    photographs = builders.open_photographs(smoke_config(*EVERY_TERM))
    info = builders.describe_dataset(smoke_config(), photographs)
    sampler = builders.build_pose_sampler(smoke_config(), photographs, builders.build_cameras(smoke_config(), info))
    precision = Precision("cpu", None)
    expected = builders.build_trainer(smoke_config(*EVERY_TERM), info, sampler, precision, torch.device("cpu"))
    steps = list(batches(2, data=photographs))
    with PretendedDevice():
        trainer = make_trainer(*EVERY_TERM)
        found = [trainer.scalars_of(trainer.step(*batch)) for batch in steps]
    for row, batch in zip(found, steps, strict=True):
        assert row == pytest.approx(expected.scalars_of(expected.step(*batch)), rel=1e-5, abs=1e-8)
