"""Processes that train one model together: their shares of the work, and how they agree; the only file that names
torch.distributed.

A single process is a :class:`Processes`, whose methods hand back what they are given. Several are
:class:`JoinedProcesses`, which a :class:`Launch` makes of what torchrun, or another launcher, has put into the
environment. Every method here is called by all processes, in the same order: what one of them alone finds out (memory
that has run out, a signal, a full disk) is agreed on first, so that nobody waits for who has left.
"""

from __future__ import annotations

import pickle
import secrets
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graf.base.errors import UserError
from graf.runtime.interrupt import Stopped, deaf
from graf.runtime.memory import OutOfMemory, is_out_of_memory

Result = TypeVar("Result")

#: seconds in which those that are left make themselves known before the others are called missing
GRACE = 3.0
#: seconds in which a process that has failed may save what it has and say why, before the others end
PATIENCE = 12.0
#: bytes of gradients that are summed at once: `python -m benchmarks.scaling` shows what other sizes cost
BUCKET = 16 * 2**20
#: numbers of a tensor that its hash holds in memory at once
HASHED_AT_ONCE = 2**20

# How a piece of work has ended, in order of weight: the heaviest of all processes is what it has come to.
_DONE, _OUT_OF_MEMORY, _STOPPED, _FAILED = range(4)
_RANKS = 2**20


class LaunchError(UserError):
    """The environment names processes that cannot train together; the message says what to change."""


class PeerError(UserError):
    """Another process has failed, has gone or does not answer; its own message, where it could give one, says why."""


class PeerFailure(PeerError):
    """Another process has failed, and is there to say why."""


class DesynchronisedError(UserError):
    """Processes that have to hold the same tensors do not; the message names the first one."""


class PeerOutOfMemory(MemoryError):
    """Memory has run out in another process: this one takes the smaller sizes too."""


class Processes:
    """One process, which has all the work and agrees with itself."""

    rank = 0
    size = 1
    local_size = 1  # of them on this machine

    @property
    def is_first(self) -> bool:
        """Whether this process writes, logs and decides for all."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The numbers of 0 .. count - 1 that are this process's work: a run of them, as long as the others' or by one
        longer."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def largest_share(self, count: int) -> int:
        """How much of it the busiest process has."""
        return -(-count // self.size)

    def together(self, work: Callable[[], Result]) -> Result:
        """`work()`, which raises in every process if it does in one: out of memory, Stopped, or any other failure.

        The process that has failed raises its own error, the others PeerOutOfMemory, Stopped or PeerError.
        """
        return work()

    def by_first(self, work: Callable[[], Result]) -> Result:
        """What `work()` returns in the first process, in every process; a plain value, since it is sent."""
        return work()

    def first_of_all(self, work: Callable[[], Result]) -> Result:
        """`work()` in every process, in the first one before the others, which may then find what it has left."""
        return work()

    def any(self, value: bool) -> bool:
        """Whether it is true in some process."""
        return value

    def gather(self, value: Result) -> list[Result]:
        """Every process's value in order in the first one; an empty list in the others. Values are pickled."""
        return [value]

    def sum_gradients(self, parameters: Sequence[nn.Parameter], terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add up the gradients of all processes. One that is missing counts as zero, where it is not missing in all.

        terms: the losses that led to them. Returns what has to be finite besides this process's own, by name: their
        sum, which the same message adds up.
        """
        return {}

    def sum_to_first(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars, added up over the processes: the sums in the first one, zeros in the others."""
        return values

    def check_equal(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise DesynchronisedError, which names the first tensor, where processes hold different ones."""

    def tells(self, error: Exception) -> bool:
        """Whether this process is the one to tell people of an error that has ended them all."""
        return True

    def close(self) -> None:
        """Leave the others, after all work is done."""


class JoinedProcesses(Processes):
    """Processes that torch.distributed connects; what is said on the CPU goes through gloo, gradients by the device.

    store: where those that are left find each other when messages no longer come through. It lives in the first process
    unless the launcher keeps it, and then goes with that one.
    """

    def __init__(self, launch: Launch, store: Any) -> None:
        self.rank, self.size, self.store = launch.rank, launch.size, store
        self.local_size, self.store_is_in_first = launch.local_size, not launch.keeps_store
        self._lost: PeerError | None = None
        self._messages: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    # ------------------------------------------------------------------------------------------------ agreement

    def together(self, work: Callable[[], Result]) -> Result:
        outcome, error, result = _DONE, None, None
        try:
            result = work()
        except (Exception, Stopped) as caught:
            outcome, error = _weigh(caught), caught
        worst, rank = divmod(self._largest(outcome * _RANKS + self.rank), _RANKS)
        if error is not None and (outcome == worst or isinstance(error, PeerError)):
            raise error
        if worst == _OUT_OF_MEMORY:
            raise PeerOutOfMemory(f"in process {rank}, out of memory")
        if worst == _STOPPED:
            raise Stopped(f"process {rank} was asked to stop")
        if worst == _FAILED:
            raise PeerFailure(f"process {rank} of {self.size} has failed, and says why itself")
        return result  # type: ignore[return-value]

    def by_first(self, work: Callable[[], Result]) -> Result:
        result = self.together(lambda: work() if self.is_first else None)
        (message,) = self._pack(result)
        with self._connected(message):
            _distributed().broadcast(message, src=0)
        return result if self.is_first else _unpack(message)  # type: ignore[return-value, no-any-return]

    def first_of_all(self, work: Callable[[], Result]) -> Result:
        mine = self.together(lambda: work() if self.is_first else None)
        others = self.together(lambda: None if self.is_first else work())
        return mine if self.is_first else others  # type: ignore[return-value]

    def any(self, value: bool) -> bool:
        return bool(self._largest(int(value)))

    def gather(self, value: Result) -> list[Result]:
        own, *all_of_them = self._pack(value, others=self.size if self.is_first else 0)
        with self._connected(own, *all_of_them):
            _distributed().gather(own, all_of_them or None, dst=0)
        return [_unpack(message) for message in all_of_them]

    def _pack(self, value: object, others: int = 0) -> list[Tensor]:
        """A value as bytes, and empty messages for others; all processes call it.

        Messages have to be equally long, so that the shorter ones are padded: unpickling reads nothing after a value.
        """
        packed = self.together(lambda: pickle.dumps(value))
        length = self._largest(len(packed))
        messages = self.together(lambda: [torch.zeros(length, dtype=torch.uint8) for _ in range(1 + others)])
        messages[0].numpy().data[: len(packed)] = packed
        return messages

    def _largest(self, number: int) -> int:
        found = torch.tensor([number])
        with self._connected(found):
            _distributed().all_reduce(found, op=_distributed().ReduceOp.MAX)
        return int(found)

    # ------------------------------------------------------------------------------------------------ sums

    def sum_gradients(self, parameters: Sequence[nn.Parameter], terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # On the CPU, so that no GPU is waited for: which parameters an optimiser moves has to be known
        present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int8)
        with self._connected(present):
            _distributed().all_reduce(present, op=_distributed().ReduceOp.MAX)
        summed = [parameter for parameter, is_present in zip(parameters, present.tolist(), strict=True) if is_present]
        first = parameters[0]
        total = torch.stack([value.detach().to(first.device, first.dtype) for value in terms.values()]).sum()
        parts = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in summed]
        flat = torch.cat([*(part.reshape(-1) for part in parts), total.reshape(1)])
        self._sum(flat)
        *sums, total = flat.split([*(parameter.numel() for parameter in summed), 1])
        for parameter, gradient in zip(summed, sums, strict=True):
            parameter.grad = gradient.view_as(parameter)
        return {"a term of another process": total[0]}

    def sum_to_first(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if not values:  # of a checkpoint of an older version, which holds none
            return {}
        numbers = torch.stack([value.detach().cpu().double() for value in values.values()])
        with self._connected(numbers):
            _distributed().all_reduce(numbers)
        sums = numbers.clone() if self.is_first else torch.zeros_like(numbers)  # what is kept is no part of a message
        return dict(zip(values, sums, strict=True))

    def _sum(self, flat: Tensor) -> None:
        buckets = flat.split(max(1, BUCKET // flat.element_size()))
        with self._connected(*buckets):
            for work in [_distributed().all_reduce(bucket, async_op=True) for bucket in buckets]:
                work.wait()

    # ------------------------------------------------------------------------------------------------ equality

    def check_equal(self, tensors: Mapping[str, Tensor]) -> None:
        own = torch.stack([hash_tensor(tensor) for tensor in tensors.values()]).cpu()
        extremes = torch.stack([own, ~own])  # the largest of the complements is the complement of the smallest
        with self._connected(extremes):
            _distributed().all_reduce(extremes, op=_distributed().ReduceOp.MAX)
        differs = (extremes[0] != ~extremes[1]).tolist()
        for name, is_different in zip(tensors, differs, strict=True):
            if is_different:
                raise DesynchronisedError(
                    f"{name} ({sum(differs)} of {len(differs)} tensors) is not the same in all processes: different "
                    "processors or versions of torch round differently; train on machines of one kind, and resume "
                    "from the last checkpoint"
                )

    # ------------------------------------------------------------------------------------------------ the end

    @contextmanager
    def _connected(self, *messages: Tensor) -> Iterator[None]:
        """What goes wrong with messages becomes a PeerError that names who is missing.

        messages: every tensor that torch.distributed is handed inside the block, for :meth:`close`, which waits until
        nothing holds them.
        """
        if self._lost is not None:
            raise self._lost
        self._messages.update({id(message): message for message in messages})
        try:
            yield
        except RuntimeError as error:  # torch has no closer type before 2.2
            if is_out_of_memory(error):
                raise
            with deaf():
                self._lost = self._find_lost(error)
            raise self._lost from error

    def _find_lost(self, error: RuntimeError) -> PeerError:
        reason = str(error).strip().partition("\n")[0][:200]
        until = time.monotonic() + GRACE
        try:
            self.store.add(f"here/{self.rank}", 1)
            missing = [rank for rank in range(self.size) if rank != self.rank]
            while missing and time.monotonic() < until:
                missing = [rank for rank in missing if not self.store.add(f"here/{rank}", 0)]
                time.sleep(0.05)
        except Exception:  # the store has gone with the process or the machine that held it
            missing = [0] if self.store_is_in_first else []
        who = f"process {', '.join(map(str, missing))} of {self.size}" if missing else f"one of {self.size} processes"
        return PeerError(
            f"{who} has ended or does not answer [{reason}]; the last checkpoint is untouched: start again with the "
            "same command, or let torchrun do it with --max-restarts 3"
        )

    def tells(self, error: Exception) -> bool:
        may_tell = not isinstance(error, PeerFailure | PeerOutOfMemory)
        has_cause = may_tell and not isinstance(error, PeerError)
        if not has_cause:  # who has the cause goes first
            self._wait_until("told", 1, GRACE / 3 if may_tell else PATIENCE)
        try:
            self.store.add(f"here/{self.rank}", 1)
            tells = may_tell and int(self.store.add("told", 1)) == 1
            self.store.add("asked", 1)
        except Exception:  # without the store everybody says what it knows
            return may_tell
        if self.store_is_in_first and self.is_first:  # it goes with this process
            self._wait_until("asked", self.size, GRACE)
        return tells

    def _wait_until(self, key: str, count: int, seconds: float) -> None:
        """Until the store has counted so many, or has gone, or the time is over."""
        until = time.monotonic() + seconds
        with suppress(Exception):
            while self.store.add(key, 0) < count and time.monotonic() < until:
                time.sleep(0.05)

    def close(self) -> None:
        if self._lost is not None:
            return
        # A thread of gloo may hold a message for a moment longer than its sender. To free it the thread needs Python's
        # lock, with which torch before 2.8 waits for that thread (https://github.com/pytorch/pytorch/issues/56297).
        until = time.monotonic() + PATIENCE / 2
        while self._messages and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)  # it needs the lock once or twice more when a message can no longer be seen
        # One after another, the holder of the store last: gloo of torch 2.1 may wait for ever where two leave at once
        self._wait_until("left", self.size - 1 - self.rank, PATIENCE)
        with suppress(Exception):  # all work is done
            _distributed().destroy_process_group()
            self.store.add("left", 1)


@dataclass(frozen=True)
class Launch:
    """What a launcher has said of this process: its number among all and among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    keeps_store: bool = False

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Launch:
        """From RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, as torchrun sets them.

        One process alone (WORLD_SIZE 1, or none of it) is told nothing. Without LOCAL_WORLD_SIZE all processes are on
        one machine. keeps_store: whether the launcher holds what they meet at, else the first process does.
        Raises LaunchError for an environment that is not whole.
        """
        size = _read_number(environment, "WORLD_SIZE", 1)
        if size <= 1:
            return cls()
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise LaunchError(
                    f"WORLD_SIZE={size}, but {name} is not set: start with torchrun, or set it as docs/distributed.md "
                    "shows"
                )
        return cls(
            rank=_read_number(environment, "RANK", 0),
            size=size,
            local_rank=_read_number(environment, "LOCAL_RANK", 0),
            local_size=_read_number(environment, "LOCAL_WORLD_SIZE", size),
            address=f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}",
            keeps_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    def join(self, device_type: str, timeout: float) -> Processes:
        """Meet the other processes. timeout: seconds that they are waited for, here and at every agreement.

        Raises LaunchError where torch cannot connect processes, and PeerError where the others do not come.
        """
        if self.size == 1:
            return Processes()
        distributed, wait = _distributed(), timedelta(seconds=timeout)
        if not distributed.is_available():
            raise LaunchError(f"WORLD_SIZE={self.size}: this build of torch connects no processes; train in one")
        backend = "gloo"
        if device_type == "cuda" and distributed.is_nccl_available():
            backend = "cpu:gloo,cuda:nccl"
        try:
            store, _, _ = next(distributed.rendezvous("env://", rank=self.rank, world_size=self.size, timeout=wait))
            store.set_timeout(wait)
            store = distributed.PrefixStore(meet(store, self.rank, self.size, timeout), store)
            group = distributed.PrefixStore("group", store)
            distributed.init_process_group(backend, store=group, rank=self.rank, world_size=self.size, timeout=wait)
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise PeerError(
                f"process {self.rank} of {self.size} did not find the others at {self.address} within {timeout:g} s "
                f"(training.process_timeout) [{reason}]"
            ) from error
        return JoinedProcesses(self, distributed.PrefixStore("people", store))


def meet(store: Any, rank: int, size: int, timeout: float) -> str:
    """A name that the processes share which meet now, and none that have met before.

    torchrun may keep one store from restart to restart, in which the addresses of ended processes are still to be
    found. So each process shows a number of its own, which the first one answers with the name; a number that nobody
    waits for any more is answered in vain. Raises RuntimeError for those that do not come.
    """
    own = secrets.randbelow(2**62) + 1
    if rank:
        store.set(f"hello/{rank}", str(own))
        name = str(store.get(f"answer/{own}").decode())
        store.add(f"{name}/{rank}", 1)
        return name
    name, missing, until = f"meeting/{own}", list(range(1, size)), time.monotonic() + timeout
    while missing:
        if time.monotonic() > until:
            raise RuntimeError(f"process {', '.join(map(str, missing))} did not come")
        for other in missing:
            if shown := store.add(f"hello/{other}", 0):
                store.set(f"answer/{shown}", name)
        missing = [other for other in missing if not store.add(f"{name}/{other}", 0)]
        time.sleep(0.01)
    return name


def list_backends() -> list[str]:
    """What torch can connect processes with here, of "gloo" and "nccl"; empty in a build that connects none."""
    distributed = _distributed()
    if not distributed.is_available():
        return []
    asked = {
        "gloo": "is_gloo_available",
        "nccl": "is_nccl_available",
    }  # the former since torch 2.4; builds had it before
    return [name for name, is_there in asked.items() if getattr(distributed, is_there, lambda: True)()]


def hash_tensor(tensor: Tensor) -> Tensor:
    """An int64 scalar that depends on every bit of a tensor and on its place: equal tensors have equal ones."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().reshape(-1)
    flat = flat.to(torch.uint8) if flat.dtype is torch.bool else flat.view(words[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), HASHED_AT_ONCE):
        part = flat[start : start + HASHED_AT_ONCE].long()
        places = torch.arange(start, start + len(part), device=flat.device)
        # odd, so that no bit of a number is lost; the constants are Knuth's, of MMIX
        factors = places * (0x5851F42D4C957F2D - 1) + 0x14057B7EF767814F
        total += ((part + 1) * factors).sum()
    return total


def _weigh(error: BaseException) -> int:
    if isinstance(error, Stopped):
        return _STOPPED
    # OutOfMemory: it has been tried with less, in vain
    return _OUT_OF_MEMORY if is_out_of_memory(error) and not isinstance(error, OutOfMemory) else _FAILED


def _unpack(message: Tensor) -> Any:
    return pickle.loads(message.numpy().data)


def _read_number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise LaunchError(f"{name}={text!r}: expected a whole number, as torchrun sets it")
    return int(text)


def _distributed() -> Any:
    """torch.distributed, which takes a moment to import and which a single process does without."""
    import torch.distributed

    return torch.distributed
