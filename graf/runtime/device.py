"""Picks the device that a run computes on and sets its backend flags; tensors are moved by graf.base.tensors.

A device is a `torch.device` with an explicit index on CUDA (`cuda:0`), so that it compares equal to `tensor.device`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from graf.base.errors import UserError
from graf.base.tensors import TensorBatch
from graf.runtime.threads import limit_threads
from graf.runtime.torch_release import require_fitting_numpy

Batch = TypeVar("Batch", bound=TensorBatch)


class DeviceError(UserError):
    """A device was asked for that this machine or this build of torch does not have."""


def pick_device(request: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """The device that `request` names: `auto` (first of cuda, mps, cpu), `cpu`, `cuda`, `cuda:1`, `mps`.

    local_rank, local_size: which of the processes of this machine asks, each of which gets a GPU of its own.
    Raises `DeviceError` with the request, what is available and the next step when it is not there, and UserError
    where torch could compute nothing because NumPy is too new for it.
    """
    require_fitting_numpy()
    available = list_devices()
    if local_size > 1 and request != "cpu":
        gpus = [name for name in available if name.startswith("cuda")]
        if request not in ("auto", "cuda") or (len(gpus) < local_size and (gpus or request == "cuda")):
            raise DeviceError(
                f"device {request!r} for {local_size} processes on this machine, which offers {', '.join(available)}; "
                "each process takes a GPU of its own: start as many as there are GPUs, or use training.device=cpu"
            )
        return torch.device(gpus[local_rank] if gpus else "cpu")
    if request == "auto":
        return torch.device(available[0])
    wanted = "cuda:0" if request == "cuda" else request
    if wanted in available:
        return torch.device(wanted)
    raise DeviceError(
        f"device {request!r} is not available; this machine offers {', '.join(available)}. "
        f"Use one of these or 'auto'{_explain_absence(request)}"
    )


def list_devices() -> list[str]:
    """Names of the devices that can be used here, in the order in which `auto` prefers them."""
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def _explain_absence(request: str) -> str:
    if not request.startswith("cuda") or torch.cuda.is_available():
        return "."
    if torch.version.cuda is None and torch.version.hip is None:
        return ", or install a build of torch with CUDA: this one has none."
    return ", or check the driver with nvidia-smi: this build of torch has CUDA but finds no usable GPU."


def configure_backends(device: torch.device, deterministic: bool = False, processes: int = 1) -> None:
    """Set the process-wide flags that make `device` fast; call it before the first computation.

    CUDA: TF32 matrix products and convolutions (float32's range with a 10-bit mantissa, several times faster; what
    must be exact belongs in elementwise operations), cuDNN's search for the fastest convolution (shapes repeat, so it
    is paid once per shape; two runs may pick different algorithms and differ in the last bits), and `device` as the
    current one, so that library code that only says "cuda" lands on it.

    CPU: denormals are flushed to zero. Densities and Adam's moments decay through the denormal range, where one
    operation costs on the order of a hundred cycles. The flag belongs to a thread, and worker threads inherit it when
    the first parallel operation starts them: hence before the first computation.

    On all devices torch computes with no more threads than there are cores for, in a container or a batch job too.

    deterministic: on CUDA, algorithms whose sums have one order, so that two runs agree bit for bit. torch has none for
    some, such as the backward pass of grid_sample, by which planes are read; it warns of each once. On a CPU every run
    is deterministic. processes: of this machine, which share its cores.
    """
    limit_threads(processes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
            torch.backends.cudnn.deterministic = True
            torch.use_deterministic_algorithms(True, warn_only=True)
    elif device.type == "cpu":
        # Older NumPy warns when it first measures a float type while denormals are flushed: measure them now.
        for dtype in (np.float32, np.float64):
            np.finfo(dtype)
        torch.set_flush_denormal(True)


def for_convolution(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Images or weights (N, C, H, W) in a dtype, laid out in memory as convolutions on their device read them fastest.

    That is with the channels of a pixel side by side; on MPS, where such convolutions have been wrong, as they are.
    """
    if tensor.device.type == "mps":
        return tensor.to(dtype)
    return tensor.to(dtype, memory_format=torch.channels_last)


def wait_for(device: torch.device) -> None:
    """Return when a device has done what it was asked for, so that a clock may be read; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def describe_device(device: torch.device) -> str:
    """One phrase for the log: name, memory or thread count."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device} ({properties.name}, {properties.total_memory / 2**30:.1f} GiB)"
    if device.type == "cpu":
        name = read_processor("model name") or platform.processor() or platform.machine()
        threads = torch.get_num_threads()
        return f"cpu ({name}, {threads} thread{'s' * (threads > 1)})"
    return f"{device} ({platform.processor() or platform.machine()})"


def read_processor(key: str, listing: str = "/proc/cpuinfo") -> str:
    """What Linux lists for the first processor under `key` ("flags", "model name"); empty on other systems."""
    try:
        with open(listing, encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith(key)), "")
    except FileNotFoundError:
        return ""


#: bytes to which tensors are aligned in a common buffer: the largest element
_ALIGNMENT = 16


def move_in_one_copy(batch: Batch, device: torch.device) -> Batch:
    """A batch of small tensors on the CPU, on `device`.

    On CUDA they travel together in one pinned buffer, whose copy does not block: many small copies would each wait.
    """
    if device.type != "cuda":
        return batch.to(device)
    tensors = batch.tensors()
    buffer, offsets = pack(tensors)
    moved = buffer.pin_memory().to(device, non_blocking=True)
    return batch.with_tensors(unpack(moved, tensors, offsets))


def pack(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """The bytes of tensors one behind the other in a uint8 tensor, and where each begins."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    starts = [0, *accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    buffer = torch.zeros(starts[-1], dtype=torch.uint8)
    for tensor, start, size in zip(tensors, starts, sizes, strict=False):
        buffer[start : start + size] = tensor.contiguous().reshape(-1).view(torch.uint8)
    return buffer, starts[:-1]


def unpack(buffer: Tensor, like: Sequence[Tensor], starts: Sequence[int]) -> list[Tensor]:
    """Tensors of the dtypes and shapes of `like` out of the bytes that :func:`pack` made of them."""
    return [
        buffer[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(like, starts, strict=True)
    ]
