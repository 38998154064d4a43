"""What a training step asks of the machine besides arithmetic: draws, copies to the device, waits for it, launches.

The step runs on a pretended device, whose tensors really live on the CPU but may be read only by waiting for them.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

import graf
from graf.app import builders
from graf.app.hooks import CheckpointHook
from graf.app.runs import RunFolder
from graf.runtime import randomness
from graf.runtime.amp import Precision
from graf.runtime.device import pack, unpack
from graf.runtime.logs import RunLog
from graf.runtime.memory import CacheRelease
from graf.runtime.torch_release import torch_release
from graf.training import inputs as inputs_module
from graf.training import trainer as trainer_module
from graf.training.players import DivergenceError
from graf.training.trainer import Trainer

# What is claimed is a property of the program, so that one torch is enough; 2.1 refuses such tensors.
pytestmark = pytest.mark.skipif(torch_release() < (2, 6), reason="the pretended device is made for torch 2.6 and newer")

PACKAGE = str(Path(graf.__file__).parent)
#: torch's device without memory: nothing but the pretended device below uses it here
DEVICE = torch.device("meta")
#: operations whose result has as many rows as a device tensor says; `index` only where it is given a mask
INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
COPIES = {torch.ops.aten._to_copy, torch.ops.aten.copy_}
#: what belongs to networks and rendering: files of the program, functions in others, and all of backward passes
NETWORKS = ("models/", "geometry/volume_rendering.py", "runtime/activation_checkpointing.py")
WITHIN = {"cast", "cast_patches", "backward", "input_gradient_norms"}


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

    launches: what fills memory of the device outside of networks and rendering, and so is a kernel there, or a few.
    As on a real one, an operation on tensors of both sides fails, unless those of the CPU have no dimensions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self.waits: list[str] = []
        self.launches: list[str] = []

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
        if (on_device or moves_here) and _fills_memory(func, held_args, outputs) and not _is_in_networks():
            self.launches.append(_say(func))
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


def _fills_memory(func, args, outputs) -> bool:
    """Whether an operation computes: views and empty tensors only name memory."""
    if "empty" in func.overloadpacket.__name__:
        return False
    given = {leaf.untyped_storage().data_ptr() for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor)}
    made = [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]
    return func._schema.is_mutable or any(tensor.untyped_storage().data_ptr() not in given for tensor in made)


def _is_in_networks() -> bool:
    """Whether the program is computing a network or a render, or what leads to their gradients."""
    return any(
        (file.startswith(NETWORKS) and name != "advance_spectral_norm") or name in WITHIN for file, name, _ in _frames()
    )


def _frames() -> Iterator[tuple[str, str, int]]:
    """File, function and line of the program's calls, the innermost first."""
    frame = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(f"{PACKAGE}/"):
            yield file.removeprefix(f"{PACKAGE}/"), frame.f_code.co_name, frame.f_lineno
        frame = frame.f_back


def _say(func) -> str:
    """An operation and the innermost line of the program that asked for it."""
    place = next(_frames(), None)
    return f"{func} at {'the test' if place is None else f'{place[0]}:{place[2]}'}"


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
    "tri-planes and cameras": (
        *("nerf.field=triplane", "nerf.plane_resolution=8", "nerf.plane_channels=4", "nerf.decoder_width=8"),
        *("training.match_views=true", "training.photometric=20", "training.opacity=0.1", "ray_sampler.snap=true"),
        *("data.refine_cameras=true", "data.synthetic.instances=2", "training.optimizer=adam"),
    ),
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


@pytest.fixture
def fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimisers are those of CUDA: Adam fused, RMSprop over all parameters at once."""

    def build(name, parameters, lr, betas):
        if name == "rmsprop":
            return torch.optim.RMSprop(list(parameters), lr=lr, alpha=0.99, eps=1e-8, foreach=True)
        optimizer = torch.optim.Adam(list(parameters), lr=lr, betas=betas, eps=1e-8, foreach=False)
        optimizer.defaults |= {"fused": True, "foreach": None}
        for group in optimizer.param_groups:
            group |= {"fused": True, "foreach": None}
        optimizer._step_supports_amp_scaling = True
        return optimizer

    monkeypatch.setattr(trainer_module, "build_optimizer", build)
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None)


def add_scalers(trainer: Trainer) -> None:
    for player in trainer.players:
        player.scaler = torch.amp.GradScaler(trainer.device.type, init_scale=1024.0)


@pytest.mark.parametrize("scaled", [False, True], ids=["", "loss scaling"])
@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES.keys())
def test_a_step_draws_and_copies_everything_once_and_waits_for_nothing_but_loss_scaling(
    make_trainer, smoke_config, batches, purposes, overrides, scaled
):
    first, second = batches(2, data=builders.open_photographs(smoke_config(*overrides)))
    with PretendedDevice() as device:
        trainer = make_trainer(*overrides)
        if scaled:
            add_scalers(trainer)
        trainer.step(*first)  # what is kept from step to step is made in the first
        purposes.clear(), device.copies.clear(), device.waits.clear()
        statistics = trainer.step(*second)
        assert len(purposes) > 2
        assert max(Counter(purposes).values()) == 1, purposes
        assert len(device.copies) == 2, device.copies  # the photographs, and everything else
        # RMSprop cannot leave out by itself what a scaler has to skip; nor can Adam, where it is not fused, as here
        assert count_by_place(device.waits) == ({"training/players.py": len(trainer.players)} if scaled else {})

        device.copies.clear(), device.waits.clear()
        trainer.settle()
        assert len(device.waits) == int(not scaled)
        assert all(player.skipped == 0 for player in trainer.players)
        scalars = trainer.scalars_of(statistics)
        assert (len(device.waits), device.copies) == (1 if scaled else 2, [])

        # steps go on where something was not finite: no number becomes a place in memory that is not there
        for player in trainer.players:
            for name, parameter in player.network.named_parameters():
                if "cameras" not in name:  # the CPU's grid_sample reads anywhere at NaN; CUDA's takes it as far outside
                    parameter.detach().fill_(math.nan)
        trainer.step(*second)
        if not scaled:
            with pytest.raises(DivergenceError, match="iteration 2: "):
                trainer.settle()
    assert set(statistics) < set(scalars)


#: what configs/default.yaml switches on; super-resolution takes part in every second step of it
DEFAULT = (
    *("nerf.field=triplane", "nerf.planes=synthesis", "nerf.plane_resolution=16", "nerf.plane_channels=4"),
    *("nerf.decoder_width=8", "nerf.colour_components=3", "nerf.N_importance=4", "z_dist.dim_appearance=4"),
    *("data.synthetic.instances=3", "data.synthetic.known_instances=1", "training.instance_prior=0.02"),
    *("training.match_views=true", "training.photometric=20", "training.opacity=0.3", "ray_sampler.snap=true"),
    *("training.share_fakes=true", "training.optimizer=adam", "discriminator.norm=none"),
    *("discriminator.condition_maps=4", *SUPER_RESOLUTION, "ccsr.photometric=200", "ccsr.adversarial=0.1"),
)
#: a case and the most launches of its step, R1 included, outside of networks and rendering; super-resolution has an
#: optimiser, crops and terms of its own
MOST_LAUNCHES = {
    "plain": ((), 60),
    "importance samples and noise": (CASES["importance samples and noise"], 60),
    "deferred chunks": (CASES["deferred chunks"], 60),
    "tri-planes and cameras": (CASES["tri-planes and cameras"], 60),
    "default": ((*DEFAULT, "ccsr.start_iteration=9"), 60),
    "default with super-resolution": (DEFAULT, 95),
}


@pytest.mark.parametrize(("overrides", "most"), MOST_LAUNCHES.values(), ids=MOST_LAUNCHES.keys())
def test_a_step_launches_little_outside_of_networks_and_rendering(
    make_trainer, smoke_config, batches, fuse, overrides, most
):
    first, second = batches(2, data=builders.open_photographs(smoke_config(*overrides)))
    with PretendedDevice() as device:
        trainer = make_trainer(*overrides)
        trainer.step(*first)
        trainer.step(*second)  # latents of views that it meets for the first time make their optimiser's state
        device.launches.clear()
        trainer.step(*second)
    assert 30 < len(device.launches) <= most, count_by_place(device.launches)


# ---------------------------------------------------------------- what is read later


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {
        f"{player.name}.{name}": parameter.detach().cpu().clone()
        for player in trainer.players
        for name, parameter in player.network.named_parameters()
    }


def test_a_loss_scale_that_skips_is_neither_waited_for_nor_noticed_in_the_weights(
    make_trainer, smoke_config, batches, fuse
):
    """On the device as on the CPU, where every update is read before it is made."""
    # the strategy of both, as hooks of a parameter are called once for each chunk of another one
    keys = ("training.optimizer=adam", "training.grad_clip=norm", "training.memory_strategy=dense")
    # in front of instance norm a bias has no gradient but rounding, of which Adam makes whole steps
    keys += ("discriminator.norm=none",)
    photographs = builders.open_photographs(smoke_config())
    steps = list(batches(4, data=photographs))

    def train(trainer: Trainer) -> dict[str, Tensor]:
        add_scalers(trainer)
        for number, batch in enumerate(steps):
            handles = [
                next(player.network.parameters()).register_hook(lambda gradient: gradient * math.inf)
                for player, when in ((trainer.d, (1, 2)), (trainer.g, (2, 3)))
                if number in when
            ]
            trainer.step(*batch)
            for handle in handles:
                handle.remove()
        return weights_of(trainer)

    with PretendedDevice() as device:
        trainer = make_trainer(*keys)
        device.waits.clear()
        add_scalers(trainer)
        found = train(trainer)
        waits = [wait for wait in device.waits if not wait.endswith("at the test")]
        assert waits == []
        assert [player.skipped for player in trainer.players] == [0, 0]
        trainer.settle()
        scales = [player.scaler.get_scale() for player in trainer.players]
    info = builders.describe_dataset(smoke_config(), photographs)
    sampler = builders.build_pose_sampler(smoke_config(), photographs, builders.build_cameras(smoke_config(), info))
    on_cpu = builders.build_trainer(smoke_config(*keys), info, sampler, Precision("cpu", None), torch.device("cpu"))
    expected = train(on_cpu)
    assert [player.skipped for player in trainer.players] == [player.skipped for player in on_cpu.players] == [0, 2]
    assert scales == [player.scaler.get_scale() for player in on_cpu.players] == [256.0, 256.0]
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_what_has_diverged_is_named_when_it_is_read_and_never_saved(make_trainer, smoke_config, batches, tmp_path):
    """Steps have gone on: the first thing that was not finite is the one to tell, again and again."""
    with PretendedDevice():
        trainer = make_trainer()
        log = RunLog(tmp_path, total=9, start=0, progress=False)
        caches = CacheRelease("never", torch.device("cpu"), trainer.timer)
        save = CheckpointHook(RunFolder(tmp_path), {}, caches, log)
        parameter, name = trainer.generator.field.rgb.bias, r"generator\.field\.rgb\.bias"
        handle = None

        def hurt(trainer: Trainer, statistics: object) -> None:
            nonlocal handle
            if trainer.progress.iteration == 2:
                handle = parameter.register_hook(lambda gradient: gradient * math.nan)
            if trainer.progress.iteration == 4:
                save.save_reached(trainer)

        with pytest.raises(DivergenceError, match=rf"iteration 2: .*gradient of {name} is not finite"):
            trainer.run(batches(9, data=builders.open_photographs(smoke_config())), [hurt])
        assert trainer.progress.iteration == 4
        assert trainer.in_step, "nothing of it is worth saving"
        with pytest.raises(DivergenceError, match="iteration 2: "):
            save.save_alone(trainer)
    assert not list(tmp_path.rglob("*.pt"))


def test_updates_are_not_left_unread_for_ever(make_trainer, smoke_config, batches, monkeypatch):
    monkeypatch.setattr(trainer_module, "MOST_UNREAD", 2)
    with PretendedDevice() as device:
        trainer = make_trainer()
        device.waits.clear()
        for number, batch in enumerate(batches(4, data=builders.open_photographs(smoke_config()))):
            trainer.step(*batch)
            assert len(device.waits) == (number + 1) // 2
            assert all(len(player.unread) == (number + 1) % 2 for player in trainer.players)


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
