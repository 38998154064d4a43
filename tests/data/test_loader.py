"""Image order and the loader's promises."""

import multiprocessing
import os
import random
import signal
import time
from itertools import chain, islice

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from graf.data.errors import DataError
from graf.data.images import scale_pixels
from graf.data.loader import Batches, BatchOrder, DecodedBatches, make_loader, start_worker
from graf.runtime.interrupt import STOP_SIGNALS


class Numbers(Dataset):
    """Image i is filled with i; its label carries what the worker's generators drew."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        label = torch.tensor(
            [index, int(np.random.randint(2**31)), int(torch.randint(2**31, ())) + random.randrange(9)]
        )
        return torch.full((3, 2, 2), float(index)), label


def take(batches, count):
    return list(islice(batches, count))


def join(batches):
    return list(chain.from_iterable(batches))


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("start", [0, 1, 4, 5, 23])
def test_resumed_order_continues_the_unbroken_one(drop_last, start):
    unbroken = take(BatchOrder([1] * 17, 4, drop_last, seed=3), 40)
    resumed = take(BatchOrder([1] * 17, 4, drop_last, seed=3, start_iteration=start), 40 - start)
    assert resumed == unbroken[start:]


def test_each_epoch_shows_each_image_once_in_a_new_order():
    batches = take(BatchOrder([1] * 10, 4, drop_last=False, seed=0), 6)
    first, second = join(batches[:3]), join(batches[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert [len(batch) for batch in batches] == [4, 4, 2] * 2


def test_an_epoch_shows_an_image_as_often_as_asked():
    order = BatchOrder([1, 3, 2], 2, drop_last=False, seed=0)
    assert sorted(join(take(order, 3))) == [0, 1, 1, 1, 2, 2]
    assert order.order_of_epoch(0) != order.order_of_epoch(1)


def test_drop_last_leaves_out_the_remainder_of_each_epoch():
    order = BatchOrder([1] * 10, 4, drop_last=True, seed=0)
    batches = take(order, 4)
    assert all(len(batch) == 4 for batch in batches)
    assert join(batches[:2]) == order.order_of_epoch(0)[:8]
    assert join(batches[2:]) == order.order_of_epoch(1)[:8]


def test_order_depends_on_the_seed_and_not_on_the_batch_size():
    assert BatchOrder([1] * 50, 4, seed=0).order_of_epoch(2) == BatchOrder([1] * 50, 7, seed=0).order_of_epoch(2)
    assert BatchOrder([1] * 50, 4, seed=0).order_of_epoch(2) != BatchOrder([1] * 50, 4, seed=1).order_of_epoch(2)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_give_the_batches_of_the_main_process_and_end_with_the_iterator():
    arguments = {"drop_last": True, "seed": 5, "start_iteration": 3}
    alone = take(make_loader(Numbers(11), 3, nworkers=0, **arguments), 5)
    loader = make_loader(Numbers(11), 3, nworkers=2, **arguments)
    assert loader.num_workers >= 1
    assert loader.prefetch_factor == 2
    assert loader.persistent_workers
    for (images, labels), (other_images, other_labels) in zip(alone, take(loader, 5), strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels[:, 0], other_labels[:, 0])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_are_seeded():
    def draw(seed):
        return [labels for _, labels in take(make_loader(Numbers(8), 2, nworkers=1, drop_last=True, seed=seed), 3)]

    assert all(torch.equal(a, b) for a, b in zip(draw(1), draw(1), strict=True))
    assert not all(torch.equal(a[:, 1:], b[:, 1:]) for a, b in zip(draw(1), draw(2), strict=True))


def test_workers_of_one_loader_draw_different_numbers():
    states = []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for worker in range(2):
        start_worker(worker, seed=0)
        states.append((random.random(), np.random.rand(), torch.rand(()).item()))
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert all(a != b for a, b in zip(*states, strict=True))


def test_loader_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    take(make_loader(torch.utils.data.TensorDataset(torch.zeros(8, 3, 2, 2)), 2, nworkers=0, drop_last=True, seed=0), 9)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("cpus", [1, 3, 64])
def test_workers_are_limited_to_four_and_to_the_cpus(monkeypatch, cpus):
    monkeypatch.setattr("graf.data.loader.share_of_cpus", lambda processes: cpus // processes)
    monkeypatch.setattr("torch.utils.data.DataLoader.check_worker_number_rationality", lambda self: None)
    assert make_loader(Numbers(8), 2, nworkers=99, drop_last=True, seed=0).num_workers == min(4, cpus)
    shared = make_loader(Numbers(8), 2, nworkers=99, drop_last=True, seed=0, processes=2)
    assert shared.num_workers == min(4, cpus // 2)
    assert make_loader(Numbers(8), 2, nworkers=0, drop_last=True, seed=0).num_workers == 0


def test_batch_larger_than_the_set_is_an_error_that_says_what_to_do():
    with pytest.raises(DataError, match=r"batch_size=9: the data set has 8 images.*at most 8"):
        make_loader(Numbers(8), 9, nworkers=0, drop_last=True, seed=0)
    images, _ = next(iter(make_loader(Numbers(8), 9, nworkers=0, drop_last=False, seed=0)))
    assert len(images) == 8


class Decoded(Dataset):
    """Photographs whose pixels are in memory, read one by one."""

    def __init__(self, pixels, labels, poses):
        self.pixels, self.labels, self.poses = pixels, labels, poses

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return scale_pixels(self.pixels[index]), self.labels[index], self.poses[index]


@pytest.mark.parametrize("drop_last", [True, False])
def test_decoded_photographs_come_in_the_batches_of_a_loader(drop_last):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (7, 3, 4, 4), generator=generator, dtype=torch.uint8)
    labels, poses = torch.arange(28).view(7, 4), torch.rand(7, 4, 4)
    repeats = [1, 1, 3, 1, 2, 1, 1]
    places = {"seed": 2, "start_iteration": 2, "share": lambda count: range(count // 2, count)}
    loader = make_loader(Decoded(pixels, labels, poses), 4, nworkers=0, drop_last=drop_last, repeats=repeats, **places)
    order = BatchOrder(repeats, 4, drop_last, **places)
    decoded = DecodedBatches(pixels, labels, order, torch.device("cpu"), poses)
    with Batches(loader) as expected, decoded as found:
        for _ in range(9):
            (images, of_images, size, places), (wanted, of_wanted, whole, of_poses) = next(found), next(expected)
            assert torch.equal(images, wanted)
            assert torch.equal(of_images, of_wanted)
            assert torch.equal(places, of_poses)
            assert size == whole


# ------------------------------------------------------------------------------------------------------- processes


class Slow(Numbers):
    """Some of its photographs never come."""

    def __getitem__(self, index):
        if index % 3 == 0:
            time.sleep(3600)
        return super().__getitem__(index)


def open_batches(dataset) -> Batches:
    return Batches(make_loader(dataset, 2, nworkers=2, drop_last=True, seed=0))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_stop_leave_the_workers_at_work_from_their_first_moment_on(number):
    with open_batches(Numbers(64)) as batches:
        for worker in batches._workers:
            os.kill(worker.pid, number)
        next(batches)
        for worker in batches._workers:
            os.kill(worker.pid, number)
        for _ in range(40):
            next(batches)
        assert [worker.exitcode for worker in batches._workers] == [None, None]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_worker_that_dies_is_told_by_the_next_batch_and_interrupts_nothing_before():
    with open_batches(Numbers(64)) as batches:
        next(batches)
        victim = batches._workers[0]
        os.kill(victim.pid, signal.SIGKILL)
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:  # a handler of SIGCHLD would raise in here
            time.sleep(0.01)
        expected = r"was killed by SIGKILL: the system does that when memory runs out; set training.nworkers to less"
        with pytest.raises(DataError, match=expected):
            take(batches, 40)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_end_of_the_batches_is_the_end_of_their_workers_and_of_their_shared_memory():
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    with open_batches(Slow(64)) as batches:
        workers = batches._workers
        started = time.monotonic()
    assert time.monotonic() - started < 8
    assert all(worker.exitcode is not None for worker in workers)
    assert not multiprocessing.active_children()
    if os.path.isdir("/dev/shm"):
        assert set(os.listdir("/dev/shm")) <= before


def test_what_a_photograph_raises_is_passed_on():
    class Rotten(Numbers):
        def __getitem__(self, index):
            raise DataError("a.png: is rotten")

    loader = make_loader(Rotten(8), 2, nworkers=0, drop_last=True, seed=0)
    with Batches(loader) as batches, pytest.raises(DataError, match=r"a\.png: is rotten"):
        next(batches)
