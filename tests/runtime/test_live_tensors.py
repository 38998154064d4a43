"""The meter of live tensors against hand-counted bytes, real against fake runs, and CUDA's own count."""

import gc
import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from graf.runtime.activation_checkpointing import evaluate_chunks
from graf.runtime.live_tensors import LiveTensorMeter, count_bytes

FLOAT = 4


@pytest.fixture
def meter():
    gc.collect()
    with LiveTensorMeter() as meter:
        yield meter


def test_a_tensor_counts_from_its_creation_until_it_is_dropped(meter):
    first = torch.ones(1000)
    second = first + 1
    assert meter.current == meter.peak == 2 * 1000 * FLOAT
    del first
    assert meter.current == 1000 * FLOAT
    assert meter.peak == 2 * 1000 * FLOAT
    del second
    assert meter.current == 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_what_a_library_has_packed_for_itself_counts_too(meter):
    packed = torch.ones(1000).to_mkldnn()
    assert meter.current == 1000 * FLOAT
    del packed
    assert meter.current == 0


def test_temporaries_inside_an_expression_count_towards_the_peak(meter):
    result = (torch.ones(1000) + 1) * 2  # at most two at a time
    assert meter.peak == 2 * 1000 * FLOAT
    assert meter.current == 1000 * FLOAT
    del result


def test_views_of_one_storage_count_once_and_keep_it_alive(meter):
    whole = torch.zeros(10, 100)
    part = whole[3].view(10, 10).t()
    assert meter.current == 1000 * FLOAT
    del whole
    assert meter.current == 1000 * FLOAT
    del part
    assert meter.current == 0


def test_in_place_operations_add_nothing(meter):
    x = torch.zeros(1000)
    x.add_(1).mul_(2).clamp_(0, 1)
    torch._foreach_add_([x], 1.0)
    assert meter.peak == 1000 * FLOAT


def test_a_resized_storage_counts_with_its_new_size(meter):
    x = torch.zeros(10)
    x.resize_(1000)
    assert meter.current == 1000 * FLOAT
    del x
    assert meter.current == 0


def test_dtypes_count_with_their_size(meter):
    kept = [torch.zeros(100, dtype=dtype) for dtype in (torch.bfloat16, torch.float64, torch.uint8, torch.bool)]
    assert meter.current == 100 * (2 + 8 + 1 + 1)
    assert count_bytes([*kept, kept[0][:3]]) == meter.current


def test_a_new_peak_starts_from_what_is_alive(meter):
    kept = torch.zeros(100)
    torch.zeros(1000)
    meter.reset_peak()
    assert meter.peak == kept.nbytes
    meter.expect(50)
    assert meter.peak == kept.nbytes + 50
    meter.expect(20)
    assert meter.peak == kept.nbytes + 50


def test_a_graph_keeps_its_saved_tensors_alive_until_the_backward_pass(meter):
    x = torch.zeros(1000).requires_grad_()
    y = x.exp().exp().exp().sum()  # each saves its result: 3 of 1000
    assert meter.current == (4 * 1000 + 1) * FLOAT
    y.backward()
    assert meter.current == (1000 + 1 + 1000) * FLOAT  # x, y and the gradient


def test_what_existed_before_counts_on_request_and_once():
    layer = nn.Linear(10, 10)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.zeros(1, 10)).sum().backward()
    optimizer.step()
    with LiveTensorMeter() as meter:
        meter.track(layer, optimizer)
        meter.track(layer.weight, layer.weight.view(-1))
        # weights, gradients and two moments of 110 numbers each, and two step counters
        assert meter.current == (4 * 110 + 2) * FLOAT
        layer.zero_grad(set_to_none=True)
        assert meter.current == (3 * 110 + 2) * FLOAT


def test_what_a_thread_of_its_own_leaves_behind_can_be_counted_afterwards(meter):
    x = torch.zeros(1000).requires_grad_()
    loss = x.exp().sum()
    thread = threading.Thread(target=loss.backward)  # a meter belongs to the thread that entered it
    thread.start()
    thread.join()
    assert x.grad is not None
    meter.track(x)
    assert meter.current == (2 * 1000 + 1) * FLOAT


def chain(x, depth=8):
    for _ in range(depth):
        x = torch.sin(x)
    return x


def test_checkpointing_lowers_the_peak_by_what_it_recomputes(meter):
    x = torch.zeros(1000).requires_grad_()
    loss = chain(chain(x)).sum()
    loss.backward()
    dense = meter.peak
    x.grad = None
    del loss
    meter.reset_peak()
    halves = checkpoint(chain, checkpoint(chain, x, use_reentrant=False), use_reentrant=False).sum()
    halves.backward()
    assert dense - meter.peak == pytest.approx(7 * 1000 * FLOAT, abs=1000 * FLOAT)


def run_network(strategy: str, device: str = "cpu") -> None:
    """A forward and backward pass in chunks, with a gradient penalty on top (a second derivative)."""
    torch.manual_seed(0)
    wide = (nn.Linear(16, 64, device=device), nn.Linear(64, 64, device=device), nn.Linear(64, 4, device=device))
    network = nn.Sequential(wide[0], nn.Tanh(), wide[1], nn.Tanh(), wide[2])
    judge = nn.Sequential(nn.Linear(4, 32, device=device), nn.Softplus(), nn.Linear(32, 1, device=device))
    inputs = torch.randn(4, 64, 16, device=device)
    shared = torch.randn(4, 1, 16, device=device, requires_grad=True)

    def chunk(number: int, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (network(inputs[:, number * 8 : number * 8 + 8] + tensors[0]),)

    (images,) = evaluate_chunks(chunk, 8, (shared,), list(network.parameters()), strategy)
    judge(images).mean().backward()
    real = torch.randn(4, 64, 4, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(judge(real).sum(), real, create_graph=True)
    gradient.square().sum().backward()


@pytest.mark.parametrize("strategy", ["dense", "checkpoint", "deferred"])
def test_fake_tensors_have_the_peak_of_real_ones(strategy):
    peaks = []
    for fake in (False, True):
        gc.collect()
        if fake:
            with FakeTensorMode(), LiveTensorMeter() as meter:
                run_network(strategy)
        else:
            with LiveTensorMeter() as meter:
                run_network(strategy)
        peaks.append(meter.peak)
    assert peaks[0] == peaks[1] > 0


def test_only_the_wanted_kind_of_device_counts():
    with LiveTensorMeter(device_type="cuda") as meter:
        torch.zeros(1000)
    assert meter.peak == 0


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["dense", "checkpoint", "deferred"])
def test_the_peak_is_that_of_cudas_own_count(strategy):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    run_network(strategy, "cuda")  # library workspaces are allocated at first use and stay
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with LiveTensorMeter(device_type="cuda") as meter:
        run_network(strategy, "cuda")  # CUDA's backward pass runs in a thread of the autograd engine
    measured = torch.cuda.max_memory_allocated() - before
    assert meter.peak <= measured <= 1.1 * meter.peak + 2**16  # CUDA rounds every tensor up to 512 bytes
