"""Batches in an order that depends on seed and epoch alone: a resumed run sees what an unbroken one would have seen.

The processes that load them live and die with :class:`Batches`; signals to stop are their parent's business. Where all
photographs are decoded, :class:`DecodedBatches` needs none.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from graf.base.tensors import move
from graf.data.errors import DataError
from graf.data.images import scale_pixels
from graf.runtime.interrupt import STOP_SIGNALS
from graf.runtime.randomness import derive_seed, seed_everything
from graf.runtime.threads import share_of_cpus

MAX_WORKERS = 4
#: seconds for worker processes to end by themselves
GRACE = 2.0


class BatchOrder(Sampler[list[int]]):
    """Endless batch sampler: yields the index list of iteration `start_iteration`, of the next one, and so on.

    Epoch e is a permutation of the images, each as often as `repeats` says, drawn from (seed, e) alone; iteration i is
    batch i mod P of epoch i // P with P batches in an epoch. With `drop_last` each epoch leaves out what does not fill
    its last batch, else that one is short. share: which places of a batch of so many images are wanted, all by default;
    several processes share the batches, none of which may be too small for them.
    """

    def __init__(
        self,
        repeats: Sequence[int],
        batch_size: int,
        drop_last: bool = True,
        seed: int = 0,
        start_iteration: int = 0,
        share: Callable[[int], range] = range,
    ) -> None:
        self.indices = torch.arange(len(repeats)).repeat_interleave(torch.tensor(repeats, dtype=torch.int64))
        length = len(self.indices)
        if batch_size < 1 or start_iteration < 0:
            raise DataError(
                f"batch_size={batch_size}, start_iteration={start_iteration}: expected at least 1 and at least 0"
            )
        self.batches_per_epoch = length // batch_size if drop_last else -(-length // batch_size)
        if self.batches_per_epoch == 0:
            raise DataError(
                f"training.batch_size={batch_size}: the data set has {length} images and drop_last leaves no batch; "
                f"use a batch_size of at most {length}"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.start_iteration = start_iteration
        self.share = share
        smallest = self.size_of(self.batches_per_epoch - 1)
        if not share(smallest):
            raise DataError(
                f"training.batch_size={batch_size}: of a batch of {smallest} images this process would get none; use "
                "fewer processes, a larger batch, or training.drop_last=true"
            )

    def size_of(self, iteration: int) -> int:
        """Images in the whole batch of an iteration."""
        batch = iteration % self.batches_per_epoch
        return min(self.batch_size, len(self.indices) - batch * self.batch_size)

    def order_of_epoch(self, epoch: int) -> list[int]:
        """The permutation that epoch number `epoch` follows."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "image order", epoch))
        order: list[int] = self.indices[torch.randperm(len(self.indices), generator=generator)].tolist()
        return order

    def __iter__(self) -> Iterator[list[int]]:
        epoch, batch = divmod(self.start_iteration, self.batches_per_epoch)
        while True:
            order = self.order_of_epoch(epoch)
            for first in range(batch * self.batch_size, self.batches_per_epoch * self.batch_size, self.batch_size):
                batch_indices = order[first : first + self.batch_size]
                yield [batch_indices[place] for place in self.share(len(batch_indices))]
            epoch, batch = epoch + 1, 0


def start_worker(worker_id: int, seed: int) -> None:
    """Seed Python, NumPy and torch in a loader worker from (seed, worker_id), and leave signals to its parent.

    Schedulers, terminals and `timeout` send theirs to every process of a program: the parent, which has something to
    save, needs its workers until then.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    seed_everything(derive_seed(seed, "worker", index=worker_id))


class Batches:
    """The batches of a loader, one after another; a context manager, whose end is the end of its processes.

    Images float32 (B, 3, H, W), labels int64 (B, 4), the size of the whole batch, of which these are a share, and what
    else the loader's data set has of each photograph, as its pose. A batch that does not come raises what went wrong
    with its photographs, or a DataError about the process.
    """

    def __init__(self, loader: DataLoader[tuple[Tensor, ...]]) -> None:
        with _starting_workers() if loader.num_workers else nullcontext():
            self._iterator: Any = iter(loader)
        order: Any = loader.batch_sampler
        self._sizes = (order.size_of(iteration) for iteration in count(order.start_iteration))

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[Any, ...]:
        try:
            images, labels, *more = next(self._iterator)
        except (RuntimeError, OSError, EOFError) as error:  # what the end of a worker looks like from here
            exitcode = self._find_exitcode()
            if exitcode is None:
                raise
            raise DataError(_describe_death(exitcode, len(self._workers))) from error
        return images, labels, next(self._sizes), *more

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes, those that do not listen too; calling it again changes nothing."""
        workers = self._workers
        if workers:
            timer = threading.Timer(GRACE, lambda: [worker.kill() for worker in workers])
            timer.start()
            self._iterator._shutdown_workers()
            timer.cancel()
            timer.join()
        for worker in workers:
            worker.join()

    def _find_exitcode(self) -> int | None:
        """How a worker has ended, if one has; the system may need a moment to say so."""
        deadline = time.monotonic() + 0.5
        while self._workers and time.monotonic() < deadline:
            for worker in self._workers:
                if worker.exitcode is not None:
                    return int(worker.exitcode)
            time.sleep(0.05)
        return None

    @property
    def _workers(self) -> list[Any]:
        return list(getattr(self._iterator, "_workers", ()))


class DecodedBatches:
    """The batches of photographs that are decoded: the same as a loader's, gathered as uint8 where their pixels are.

    pixels: uint8 (N, 3, H, W), on the host or on `device`, where they are made float32; from the host they travel in a
    quarter of the bytes. labels: int64 (N, 4), poses: (N, 4, 4) or None, on the host. A batch is as in
    :class:`Batches`, its images on `device`.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, order: BatchOrder, device: torch.device, poses: Tensor | None = None
    ) -> None:
        self.pixels, self.labels, self.poses, self.device = pixels, labels, poses, device
        self._indices = iter(order)
        self._sizes = (order.size_of(iteration) for iteration in count(order.start_iteration))

    def __iter__(self) -> DecodedBatches:
        return self

    def __next__(self) -> tuple[Any, ...]:
        indices = torch.tensor(next(self._indices))
        chosen = self.pixels.index_select(0, _send(indices, self.pixels.device))
        poses = () if self.poses is None else (self.poses[indices],)
        return scale_pixels(_send(chosen, self.device)), self.labels[indices], next(self._sizes), *poses

    def __enter__(self) -> DecodedBatches:
        return self

    def __exit__(self, *exception: object) -> None:
        """There is nothing to end."""


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; the program does not wait for the copy."""
    pins = device.type == "cuda" and tensor.device.type == "cpu"
    return move(tensor.pin_memory() if pins else tensor, device)


@contextmanager
def _starting_workers() -> Iterator[None]:
    """Signals to stop wait meanwhile, and for ever in the processes that are started, from their first moment on."""
    child_signal, blocks = getattr(signal, "SIGCHLD", None), hasattr(signal, "pthread_sigmask")
    former = None if child_signal is None else signal.getsignal(child_signal)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS) if blocks else set()
    try:
        yield
    finally:
        if child_signal is not None:
            # torch's handler raises wherever the program is when a worker dies; without it the next batch raises
            is_torchs = getattr(former, "__module__", "").startswith("torch.")
            signal.signal(child_signal, signal.SIG_DFL if former is None or is_torchs else former)
        if blocks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _describe_death(exitcode: int, workers: int) -> str:
    cause = f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with exit code {exitcode}"
    hint = {"SIGKILL": ": the system does that when memory runs out", "SIGBUS": ": shared memory is too small"}
    reason = next((text for name, text in hint.items() if name in cause), "")
    return (
        f"a process that loads photographs {cause}{reason}; set training.nworkers to less than {workers}; 0 loads them "
        "in the program itself"
    )


def make_loader(
    dataset: Dataset[tuple[Tensor, ...]],
    batch_size: int,
    *,
    nworkers: int,
    drop_last: bool,
    seed: int,
    start_iteration: int = 0,
    pin_memory: bool = False,
    repeats: Sequence[int] | None = None,
    share: Callable[[int], range] = range,
    processes: int = 1,
) -> DataLoader[tuple[Tensor, ...]]:
    """Loader whose iterator never ends: batch i of iter(loader) belongs to iteration start_iteration + i.

    Batches are what `dataset` has of B photographs, stacked. `repeats`: how often an epoch shows each image, once
    by default; share: as for :class:`BatchOrder`; processes: of this machine, each of which has a loader. At most
    min(nworkers, 4, a process's cores) workers; the global random state is left as it is. Raises DataError for a data
    set smaller than a batch with `drop_last`.
    """
    repeats = [1] * len(dataset) if repeats is None else repeats  # type: ignore[arg-type]
    order = BatchOrder(repeats, batch_size, drop_last, seed, start_iteration, share)
    workers = max(0, min(nworkers, MAX_WORKERS, share_of_cpus(processes)))
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=partial(start_worker, seed=seed),
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(derive_seed(seed, "loader")),  # else iter() draws from the global one
    )
