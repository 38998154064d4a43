"""The whole program on a device like MPS, which has no float64: a pretended one, whose memory is the CPU's."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graf.runtime.memory import MIB, read_memory, read_usable_memory, release_cache

SMOKE = Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml"
_TO = torch.Tensor.to
MPS, CPU = torch.device("mps"), torch.device("cpu")


class OnDevice(torch.Tensor):
    """A tensor that says it is on MPS."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return MPS

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __reduce_ex__(self, protocol: int) -> Any:  # files hold plain tensors
        return self.cpu().detach().__reduce_ex__(protocol)


def _is_there(value: Any) -> bool:
    return isinstance(value, OnDevice) or (isinstance(value, list | tuple) and any(map(_is_there, value)))


class PretendedMPS(TorchDispatchMode):
    """Whatever is computed from tensors on the device, or made there, is there, and is not float64."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.releases: list[int] = []
        self._forced: bool | None = None  # where the outputs are, whatever they are made from

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, is_there = kwargs or {}, self._forced
        if is_there is None:
            is_there = _is_there(args) or _is_there(tuple(kwargs.values()))
        outputs = func(*args, **kwargs)
        if not is_there:
            return outputs
        return type(outputs)(map(self._place, outputs)) if isinstance(outputs, list | tuple) else self._place(outputs)

    def _place(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.dtype is torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64: the MPS framework doesn't support float64")
        self.dtypes.add(value.dtype)
        return value if isinstance(value, OnDevice) else value.as_subclass(OnDevice)

    def make(self, work: Callable[[], torch.Tensor], is_there: bool) -> torch.Tensor:
        self._forced = is_there
        try:
            return work()
        finally:
            self._forced = None

    def move(self, tensor: torch.Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
        """`Tensor.to`."""
        if args and isinstance(args[0], torch.Tensor):
            target, dtype = args[0].device, args[0].dtype
        else:
            target, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        dtype, target = dtype or tensor.dtype, target or tensor.device
        if target.type == tensor.device.type:
            return _TO(tensor, dtype, copy=copy)
        return self.make(lambda: _TO(tensor, dtype, copy=True), target.type == "mps")

    def hear(self, factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """`torch.zeros` and others, which torch would ask for a device that it does not have."""

        def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            if device is None:
                return factory(*args, **kwargs)
            target = torch.device(device)
            is_there = target.type == "mps"
            return self.make(lambda: factory(*args, device=CPU if is_there else target, **kwargs), is_there)

        return make


FACTORIES = ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye", "rand", "randn")


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedMPS]:
    """A machine with the pretended device, and with torch.mps for what is not a tensor; `releases` counts emptyings."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", cache(lambda: True))  # torch looks for what it wraps
    device = PretendedMPS()
    functions = {
        "current_allocated_memory": lambda: 100 * MIB,
        "driver_allocated_memory": lambda: 200 * MIB,
        "recommended_max_memory": lambda: 2**33,  # since torch 2.5
        "empty_cache": lambda: device.releases.append(1),
        "get_rng_state": lambda: torch.zeros(1, dtype=torch.uint8),
        "set_rng_state": lambda state: None,
        "manual_seed": lambda seed: None,
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch.mps, name, function, raising=False)
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a moved parameter is another tensor
    for name in FACTORIES:
        monkeypatch.setattr(torch, name, device.hear(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: device.move(tensor, *args, **kwargs))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: device.move(tensor, CPU))
    with device:
        yield device
    torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


def test_the_pretended_device_refuses_float64_and_nothing_else(mps: PretendedMPS) -> None:
    host = torch.linspace(0, 1, 6, dtype=torch.float64)
    moved = host.to(MPS, torch.float32)
    assert (moved.device, moved.sum().device, moved.cpu().device, host.device) == (MPS, MPS, CPU, CPU)
    assert torch.equal(moved.cpu(), host.float())
    assert torch.zeros(2, device="mps").device == torch.tensor([1.0], device=MPS).device == MPS
    weight = torch.nn.Linear(6, 1).to(MPS).weight
    assert weight.device == MPS
    (weight * moved).exp().sum().backward()
    assert weight.grad.device == MPS
    for attempt in (
        lambda: host.to(MPS),
        lambda: moved.double(),
        lambda: moved.to(torch.float64),
        lambda: torch.zeros(2, dtype=torch.float64, device=MPS),
        lambda: moved.sum(dtype=torch.float64),
        lambda: torch.tensor(1.0, dtype=torch.float64, device="mps"),
    ):
        with pytest.raises(TypeError, match="doesn't support float64"):
            attempt()


PLAIN = ("training.share_fakes=true", "discriminator.spectral_norm=true")
SUPER_RESOLVED = (
    "training.empty_cache=never",
    *("data.imsize=16", "ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1", "ccsr.start_iteration=0"),
    *("ccsr.agreement=0.3", "ccsr.supervise_generator=1", "ccsr.kernel=[0.1, 0.4, 0.4, 0.1]"),
    *("nerf.N_importance=4", "nerf.raw_noise_std=1", "training.memory_strategy=checkpoint"),
    *("training.optimizer=adam", "training.micro_batch_size=1", "training.grad_clip=norm"),
    "discriminator.augment={colour: 0.2, translation: 0.1, cutout: 0.2}",
)
PLANES = (
    "training.empty_cache=never",
    *("nerf.field=triplane", "nerf.plane_resolution=8", "nerf.plane_channels=4", "nerf.decoder_width=8"),
    *("training.match_views=true", "training.photometric=20", "training.opacity=0.1", "ray_sampler.snap=true"),
    *("data.refine_cameras=true", "training.memory_strategy=deferred", "training.optimizer=adam"),
)


@pytest.mark.parametrize("keys", [PLAIN, SUPER_RESOLVED, PLANES], ids=["plain", "ccsr", "planes"])
def test_a_run_trains_scores_saves_resumes_and_is_shown_without_float64(
    run_program, mps, tmp_path, caplog, keys
) -> None:
    arguments = ["--config", SMOKE, "--device", "mps", "--use_amp", *keys]
    with caplog.at_level(logging.INFO, "graf"):
        assert run_program("train.py", *arguments, "--max_iterations", "1") == 0
        assert run_program("train.py", *arguments, "--max_iterations", "2") == 0
    assert mps.dtypes >= {torch.float32, torch.int64}
    assert bool(mps.releases) == (keys is PLAIN), "cached memory is given back"
    assert sum("mixed precision is off: mps" in message for message in caplog.messages) == 1
    run = tmp_path / "results" / "smoke"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss_d" in row]
    assert [row["iteration"] for row in steps] == [1, 2]
    assert all(row["memory_current"] == 100 for row in steps)
    assert (run / "scores.csv").is_file()
    actions = ["--grid", "--views", "2", "--sr" if keys is SUPER_RESOLVED else "--heldout"]
    assert run_program("eval.py", "--run", run, "--device", "mps", *actions) == 0


def test_memory_of_mps_is_read_and_given_back(mps, monkeypatch) -> None:
    assert read_memory(MPS) == {"current": 100.0, "driver": 200.0}
    assert read_usable_memory(MPS) == 2**33
    release_cache(MPS)
    assert mps.releases == [1]
    monkeypatch.delattr(torch.mps, "empty_cache")  # as in a torch that has none
    assert release_cache(MPS) >= 0
