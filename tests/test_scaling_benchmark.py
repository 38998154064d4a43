"""The model of `python -m benchmarks.scaling`, and what it counts; the processes themselves run in test_torchrun.py."""

import argparse
import math

import pytest

from benchmarks import scaling
from benchmarks.scaling import Link, StepCost
from graf.runtime.distributed import Processes

COST = StepCost("toy", operations=2e9, bytes=8e6, sums=2.0, agreements=4.0)


def test_two_gpus_send_each_byte_once_and_rings_send_it_nearly_twice():
    link = Link("wire", bandwidth=1e9, latency=0.0)
    agreed = COST.agreements * 2 * scaling.AGREEMENT_LATENCY
    assert scaling.communication(COST, link, 2) == pytest.approx(8e6 / 1e9 + agreed)
    many = 2 * 1023 / 1024 * 8e6 / 1e9
    assert scaling.communication(COST, link, 1024) == pytest.approx(many + 10 * agreed)


@pytest.mark.parametrize("gpus", [2, 16, 256])
def test_at_the_smallest_batch_messages_take_the_share_that_was_asked_for(gpus):
    link = Link("wire", bandwidth=1e10, latency=1e-5)
    for share in (0.1, 0.5):
        batch = scaling.smallest_batch(COST, link, gpus, share)
        compute, messages = batch * COST.operations / scaling.SUSTAINED, scaling.communication(COST, link, gpus)
        assert messages / (compute + messages) == pytest.approx(share)


def test_gradients_and_sums_of_a_step_are_counted():
    cost = scaling.count("smoke")
    config, trainer = scaling.build("smoke", Processes())
    assert cost.bytes == sum(4 * parameter.numel() for player in trainer.players for parameter in player.parameters)
    assert (cost.sums, cost.agreements) == (2, 7)
    assert cost.operations * config.training.batch_size > 0
    assert Processes().sum_gradients([], {}) == {}  # nothing is counted any more


def test_the_section_has_every_part_and_the_plot_lies_beside_it(tmp_path):
    options = argparse.Namespace(results=tmp_path / "RESULTS.md", steps=6)
    messages = {"agreement": 1e-4} | {f"{size} MiB": 0.05 for size in scaling.BUCKETS}
    scaling.write(options, [["toy", "2", "8.00", "1.80", "3.0%", "1.00", "5.0"]], messages, [COST])
    text = options.results.read_text()
    assert "| toy | 2 | 8.00 | 1.80 | 3.0% | 1.00 | 5.0 |" in text
    assert "An agreement takes 100 microseconds" in text
    least = math.ceil(scaling.smallest_batch(COST, scaling.LINKS[0], 2))
    assert f"| toy | {scaling.LINKS[0].name} | {least:,} |" in text
    assert (tmp_path / "scaling.png").stat().st_size > 1000
