"""What processes agree on, add up and compare: the same in every one of them, whoever fails."""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graf.runtime.distributed import (
    PATIENCE,
    DesynchronisedError,
    Launch,
    LaunchError,
    PeerError,
    PeerFailure,
    PeerOutOfMemory,
    Processes,
    hash_tensor,
    meet,
)
from graf.runtime.interrupt import Stopped

ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize("count", range(20))
@pytest.mark.parametrize("size", range(1, 6))
def test_shares_are_all_of_the_work_in_order_and_nearly_equal(count, size):
    shares = []
    for rank in range(size):
        processes = Processes()
        processes.rank, processes.size = rank, size
        shares.append(processes.share(count))
        assert processes.largest_share(count) == -(-count // size)
    assert [number for share in shares for number in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) == -(-count // size)
    assert max(lengths) - min(lengths) <= 1


def test_one_process_agrees_with_itself_and_imports_nothing():
    processes = Launch.read({"WORLD_SIZE": "1", "RANK": "0"}).join("cpu", 1.0)
    assert type(processes) is Processes
    assert (processes.is_first, processes.share(7)) == (True, range(7))
    assert processes.together(lambda: 3) == processes.by_first(lambda: 3) == processes.first_of_all(lambda: 3) == 3
    assert processes.gather("a") == ["a"]
    parameter = nn.Parameter(torch.ones(2))
    assert processes.sum_gradients([parameter], {}) == {}
    assert parameter.grad is None
    with pytest.raises(ZeroDivisionError):
        processes.together(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two': expected a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "-1", "LOCAL_RANK": "0", **ADDRESS}, "RANK='-1': expected a whole number"),
    ],
)
def test_an_environment_that_is_not_whole_is_refused(environment, message):
    with pytest.raises(LaunchError, match=message):
        Launch.read(environment)


def test_what_torchrun_says_is_read():
    environment = {"WORLD_SIZE": "6", "RANK": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", **ADDRESS}
    assert Launch.read(environment) == Launch(4, 6, 1, 3, "127.0.0.1:1")
    assert Launch.read(environment | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).keeps_store
    assert (
        Launch.read({name: value for name, value in environment.items() if name != "LOCAL_WORLD_SIZE"}).local_size == 6
    )


def test_those_who_meet_are_not_taken_in_by_what_others_have_left():
    store, names = torch.distributed.HashStore(), []
    for _ in range(3):  # as after restarts, for which the launcher keeps the store
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(lambda rank: meet(store, rank, 4, timeout=20.0), range(4)))
        assert len(set(found)) == 1
        names.append(found[0])
    assert len(set(names)) == 3
    with pytest.raises(RuntimeError, match="process 1, 2, 3 did not come"):
        meet(store, 0, 4, timeout=0.1)


def test_who_is_alone_says_whom_it_did_not_find(monkeypatch):
    for name, value in ADDRESS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PeerError, match=r"process 1 of 2 did not find the others at 127.0.0.1:1 within 1 s"):
        Launch(1, 2, 1, 2, "127.0.0.1:1").join("cpu", 1.0)


def attempt(work: Callable[[], Any]) -> Any:
    """The result, or the kind and text of the error."""
    try:
        return work()
    except (Exception, Stopped) as error:
        return type(error), str(error)


def raise_in(processes: Processes, errors: dict[int, BaseException]) -> Any:
    error = errors.get(processes.rank)
    if error is not None:
        raise error
    return processes.rank


@pytest.mark.parametrize(
    ("errors", "kinds"),
    [
        ({}, (0, 1, 2)),
        ({1: MemoryError()}, (PeerOutOfMemory, MemoryError, PeerOutOfMemory)),
        ({0: MemoryError(), 2: Stopped("SIGTERM")}, (Stopped, Stopped, Stopped)),
        ({0: Stopped("SIGTERM"), 1: ValueError("no")}, (PeerFailure, ValueError, PeerFailure)),
        ({0: ValueError("a"), 1: ValueError("b"), 2: ValueError("c")}, (ValueError, ValueError, ValueError)),
    ],
    ids=["none", "memory", "memory and a signal", "a signal and a failure", "all"],
)
def test_what_happens_to_one_happens_to_all(run_processes, errors, kinds):
    def work(processes):
        first = attempt(partial(processes.together, partial(raise_in, processes, errors)))
        return first, processes.together(lambda: "and on")

    for (outcome, after), expected in zip(run_processes(3, work), kinds, strict=True):
        assert outcome == expected if isinstance(expected, int) else outcome[0] is expected
        assert after == "and on"  # nobody waits for who has left


def test_the_first_one_decides_works_first_and_collects(run_processes, tmp_path):
    def work(processes):
        decided = processes.by_first(lambda: f"by {processes.rank}")
        seen = processes.first_of_all(lambda: (tmp_path / "made").exists() or (tmp_path / "made").touch())
        any_of = [processes.any(processes.rank == rank) for rank in (2, 5)]
        gathered = processes.gather(torch.full((processes.rank,), processes.rank))
        sums = processes.sum_to_first({"a": torch.tensor(0.1), "b": torch.tensor(processes.rank)})
        assert processes.sum_to_first({}) == {}
        return decided, seen, any_of, [part.tolist() for part in gathered], {k: float(v) for k, v in sums.items()}

    first, *others = run_processes(3, work)
    assert first == ("by 0", None, [True, False], [[], [1], [2, 2]], {"a": pytest.approx(0.3), "b": 3.0})
    for other in others:
        assert other == ("by 0", True, [True, False], [], {"a": 0.0, "b": 0.0})


def make_gradients(rank: int) -> list[nn.Parameter]:
    """Three parameters: with gradients everywhere, in process 1 alone, nowhere."""
    parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(()))]
    generator = torch.Generator().manual_seed(rank)
    parameters[0].grad = torch.randn(3, 2, generator=generator)
    if rank == 1:
        parameters[1].grad = torch.ones(5)
    return parameters


@pytest.mark.parametrize("bucket", [2**20, 8])
@pytest.mark.parametrize("terms", [(1.0, 2.0, 3.0), (1.0, float("inf"), 3.0), (1.0, 2.0, float("nan"))])
def test_gradients_are_summed_wherever_they_are(run_processes, monkeypatch, bucket, terms):
    monkeypatch.setattr("graf.runtime.distributed.BUCKET", bucket)

    def work(processes):
        parameters = make_gradients(processes.rank)
        summed = processes.sum_gradients(parameters, {"loss": torch.tensor(terms[processes.rank])})
        return [parameter.grad for parameter in parameters], summed

    expected = torch.stack([make_gradients(rank)[0].grad for rank in range(3)]).sum(0)
    for gradients, summed in run_processes(3, work):
        torch.testing.assert_close(gradients[0], expected)
        assert torch.equal(gradients[1], torch.ones(5))
        assert gradients[2] is None
        assert {name: float(total) for name, total in summed.items()} == pytest.approx(
            {"a term of another process": sum(terms)}, nan_ok=True
        )


def test_the_first_tensor_that_differs_is_named(run_processes):
    def work(processes):
        tensors = {"a": torch.arange(5.0), "b": torch.ones(3, dtype=torch.float16), "c": torch.zeros(2) == 0}
        processes.check_equal(tensors)
        if processes.rank == 1:
            tensors |= {"b": tensors["b"] + 2**-10, "c": ~tensors["c"]}
        return attempt(lambda: processes.check_equal(tensors))

    for kind, message in run_processes(3, work):
        assert kind is DesynchronisedError
        assert message.startswith("b (2 of 3 tensors) is not the same in all processes")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_a_hash_depends_on_every_number_and_its_place(dtype):
    tensor = torch.arange(9).to(dtype)
    others = [tensor.flip(0), tensor[:-1], torch.zeros(9, dtype=dtype)]
    for place in range(9):
        changed = tensor.clone()
        changed[place] = 1 - changed[place].int() if dtype is torch.bool else changed[place] + 1
        others.append(changed)
    hashes = {int(hash_tensor(other)) for other in [tensor, *others]}
    assert len(hashes) == len({tuple(other.tolist()) for other in [tensor, *others]})
    assert int(hash_tensor(tensor)) == int(hash_tensor(tensor.clone().reshape(3, 3)))


def test_a_hash_of_parts_is_that_of_the_whole(monkeypatch):
    tensor = torch.randn(1000)
    whole = int(hash_tensor(tensor))
    monkeypatch.setattr("graf.runtime.distributed.HASHED_AT_ONCE", 7)
    assert int(hash_tensor(tensor)) == whole


@pytest.mark.parametrize("end", ["killed", "hanging"])
def test_who_is_missing_is_named_by_one_of_the_others(run_processes, end):
    def work(processes):
        processes.together(lambda: None)
        if processes.rank == 1:
            if end == "hanging":
                time.sleep(6)
            os.kill(os.getpid(), signal.SIGKILL)
        started = time.monotonic()
        try:
            processes.together(lambda: None)
        except PeerError as error:
            again = attempt(lambda: processes.together(lambda: None))  # no further waiting
            return str(error), again[0] is PeerError, time.monotonic() - started, processes.tells(error)

    results = run_processes(3, work, timeout=2.0)
    for message, again, seconds, _ in (results[0], results[2]):
        assert message.startswith("process 1 of 3 has ended or does not answer")
        assert again
        assert seconds < 10
    assert [results[0][3], results[2][3]].count(True) == 1


def test_the_first_process_is_missed_though_what_they_meet_at_goes_with_it(run_processes):
    def work(processes):
        processes.together(lambda: None)
        if processes.is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            processes.together(lambda: None)
        except PeerError as error:
            return str(error), processes.tells(error)

    _, second, third = run_processes(3, work)
    assert [message.partition(" has")[0] for message, _ in (second, third)] == ["process 0 of 3"] * 2
    assert second[1]
    assert third[1]


def test_what_they_meet_at_stays_until_all_know_that_the_cause_is_told(run_processes):
    def work(processes):
        try:
            processes.together(partial(raise_in, processes, {0: ValueError("the cause")}))
        except Exception as error:
            if not processes.is_first:
                time.sleep(0.5)
            told = processes.tells(error)
            if processes.is_first:
                os.write(read_end[1], bytes([told]))
                os.kill(os.getpid(), signal.SIGKILL)  # with it the store goes
            return told

    read_end = os.pipe()
    assert run_processes(3, work) == [None, False, False]
    assert os.read(read_end[0], 1) == b"\x01"


def test_the_cause_is_told_before_its_consequences(run_processes):
    def work(processes):
        try:
            processes.together(partial(raise_in, processes, {2: ValueError("the cause")}))
        except Exception as error:
            return processes.tells(error)

    assert run_processes(3, work) == [False, False, True]


@pytest.mark.parametrize("way", ["broadcast", "gather", "all_reduce"])
def test_they_leave_when_their_messages_are_let_go_of(run_processes, way):
    """Else gloo's thread, which may hold one for longer than its sender, and the sender wait for each other."""

    def work(processes: Processes) -> float:
        send = getattr(torch.distributed, way)

        def send_and_hold(message: Tensor, *others: Any, **options: Any) -> Any:
            # A view keeps its base as gloo does, without a reference of Python's
            threading.Timer(0.5, lambda _: None, [message[:]]).start()
            return send(message, *others, **options)

        setattr(torch.distributed, way, send_and_hold)
        parameter = nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        started = time.monotonic()
        kept = [
            processes.by_first(lambda: torch.ones(3)),
            processes.gather(torch.ones(3)),
            processes.sum_gradients([parameter], {"loss": torch.ones(())}),
            processes.sum_to_first({"loss": torch.ones(())}),
        ]
        processes.close()
        assert len(kept) == 4
        return time.monotonic() - started

    assert all(0.5 <= seconds < PATIENCE / 2 for seconds in run_processes(2, work))


def test_what_one_cannot_send_is_told_to_all(run_processes):
    def work(processes: Processes) -> list[Any]:
        value = (lambda: 0) if processes.is_first else 0  # a local function cannot be pickled
        ways = (processes.gather, lambda value: processes.by_first(lambda: value))
        kinds = [attempt(partial(way, value))[0] for way in ways]
        return [*(kind is PeerFailure for kind in kinds), processes.gather(processes.rank)]  # nobody waits for others

    assert run_processes(2, work) == [[False, False, [0, 1]], [True, True, []]]


def test_tensors_of_peers_arrive_as_they_are(run_processes):
    def work(processes: Processes) -> list[Tensor]:
        return processes.gather(torch.full((processes.rank + 1, 2), float(processes.rank)))

    first, second = run_processes(2, work)
    assert [tuple(part.shape) for part in first] == [(1, 2), (2, 2)]
    assert second == []
