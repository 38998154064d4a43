"""`python -m benchmarks.throughput`: work in closed form, what tables make of it, and the command on the smoke run."""

import json
import math

import pytest
import torch
from torch import nn

from benchmarks import stepping, throughput
from benchmarks.roofline import Limits, LimitsMeter, WorkMeter, count_bytes
from benchmarks.throughput import Measured
from graf.config import load_config
from graf.models.linear_relu import PackedWeights, linear_relu
from graf.runtime import operator_classes
from graf.runtime.profiling import REST, TimeSplit

CPU = torch.device("cpu")
ROWS, INPUTS, OUTPUTS = 32, 24, 8


# ---------------------------------------------------------------- work and limits


def test_a_linear_layer_costs_one_product_forwards_and_two_backwards():
    layer, points = nn.Linear(INPUTS, OUTPUTS), torch.randn(ROWS, INPUTS, requires_grad=True)
    with WorkMeter() as forwards:
        result = layer(points)
    assert dict(forwards.operations) == {"float32": 2 * ROWS * INPUTS * OUTPUTS}
    assert forwards.calls == 1
    # addmm reads bias, points and weight, and writes the result; the transpose of the weight is a view
    assert forwards.traffic == 4 * (OUTPUTS + ROWS * INPUTS + INPUTS * OUTPUTS + ROWS * OUTPUTS)
    with WorkMeter() as backwards:
        result.backward(torch.ones_like(result))
    assert dict(backwards.operations) == {"float32": 2 * (2 * ROWS * INPUTS * OUTPUTS)}


@pytest.mark.parametrize("has_second", [False, True])
def test_a_layer_with_its_relu_costs_the_same_products(has_second):
    leaves = [torch.randn(size, requires_grad=True) for size in ((ROWS, INPUTS), (OUTPUTS, INPUTS), (1, OUTPUTS))]
    again = (leaves[0], leaves[1]) if has_second else None
    for dtype, mode in (("float32", torch.no_grad()), ("bfloat16", torch.autocast("cpu", torch.bfloat16))):
        with WorkMeter() as meter, mode:
            result = linear_relu(*leaves, again, PackedWeights())
        assert dict(meter.operations) == {dtype: (1 + has_second) * 2 * ROWS * INPUTS * OUTPUTS}
    with WorkMeter() as meter:
        result.sum().backward()
    assert dict(meter.operations) == {"bfloat16": (1 + has_second) * 2 * (2 * ROWS * INPUTS * OUTPUTS)}


def test_a_convolution_costs_its_products_and_its_backward_pass_twice_as_much():
    layer, images = nn.Conv2d(3, 5, 3, padding=1, bias=False), torch.randn(2, 3, 8, 8, requires_grad=True)
    with WorkMeter() as meter:
        layer(images).sum().backward()
    assert dict(meter.operations) == {"float32": 3 * 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)}


def test_operations_count_under_the_dtype_in_which_they_are_done():
    layer, points = nn.Linear(INPUTS, OUTPUTS), torch.randn(ROWS, INPUTS)
    with WorkMeter() as meter:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(points)
        layer(points)
    assert dict(meter.operations) == dict.fromkeys(["bfloat16", "float32"], 2 * ROWS * INPUTS * OUTPUTS)


@pytest.mark.parametrize(
    ("operate", "moved"),
    [
        (lambda x: x + 1, 2),  # read and written
        (lambda x: x.add_(1), 2),
        (lambda x: x.fill_(1), 1),
        (lambda x: x.copy_(x.clone()), 4),
        (lambda x: x.view(-1).t(), 0),
        (lambda x: x.split(5), 0),
        (lambda x: torch.ops.aten._unsafe_view(x, [-1]), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: torch._foreach_add_([x, x], 1), 4),
        (lambda x: x[:1].expand(10, 100) * 1, 1.1),  # a row of it read once, all of it written
        (lambda x: torch.cat([x, x]), 4),
    ],
    ids=[
        "out of place",
        "in place",
        "fill",
        "copy",
        "view",
        "views",
        "reshaped",
        "allocation",
        "foreach",
        "expanded",
        "list",
    ],
)
def test_traffic_is_what_operators_read_and_write(operate, moved):
    numbers = torch.zeros(10, 100)
    with WorkMeter() as meter:
        operate(numbers)
    assert meter.traffic == pytest.approx(moved * count_bytes(numbers))


def test_a_limit_is_work_by_seconds_and_work_at_the_limit_takes_these_seconds():
    limits = Limits({"float32": 100.0, "bfloat16": 400.0}, bandwidth=10.0)
    assert limits.seconds_of_arithmetic({"float32": 50, "bfloat16": 100, "float64": 25}) == pytest.approx(1.0)
    assert limits.seconds_of_traffic(5) == pytest.approx(0.5)
    meter = LimitsMeter(CPU, side=64, copied=4096)
    for _ in range(3):
        meter.measure()
    found = meter.limits()
    assert found.products.keys() >= {"float32"}
    assert all(rate > 0 for rate in (*found.products.values(), found.bandwidth))
    assert found.seconds_of_arithmetic({"float32": 2 * 64**3}) == pytest.approx(2 * 64**3 / found.products["float32"])


# ---------------------------------------------------------------- steps


def test_a_step_is_the_mean_over_its_kinds_of_medians_over_turns():
    turns = [[1.0, 10.0], [2.0, 100.0], [9.0, 20.0]]  # an outlier in each kind
    assert stepping.mean_step([second for turn in turns for second in turn], 2) == pytest.approx((2 + 20) / 2)


@pytest.mark.parametrize(
    ("keys", "period"),
    [
        ((), 1),
        (("training.reg_every=8",), 8),
        (("training.reg_every=8", "training.reg_type=none"), 1),
        (("training.reg_every=6", "ccsr.enabled=true", "ccsr.every=4"), 12),
    ],
)
def test_a_period_holds_every_kind_of_step(keys, period):
    assert stepping.count_period(load_config("smoke", list(keys))) == period


def test_the_profiles_shares_are_spread_over_the_seconds_and_lines_of_the_log_are_as_rare_as_they_are():
    matrix, log = operator_classes.MATRIX_PRODUCT, operator_classes.LOGGING
    split = TimeSplit(1, 10.0, {("g", matrix): 4.0, (REST, operator_classes.OVERHEAD): 2.0, ("log", log): 4.0})
    phases, classes = throughput.spread(split, seconds=32.0, lines=0.1)
    assert phases == pytest.approx({"g": 20.0, REST: 10.0, "log": 2.0})
    assert classes == pytest.approx({matrix: 20.0, operator_classes.OVERHEAD: 10.0, log: 2.0})


def measured(title: str, seconds: float, **other) -> Measured:
    """A row of four images, whose arithmetic takes half a second at peak and whose traffic a quarter."""
    given = {
        "keys": ["training.use_amp=true"],
        "batch": 4,
        "cpu_seconds": seconds,
        "peak": 12.0,
        "operations": {"float32": 50.0},
        "traffic": 25.0,
        "calls": 7.0,
        "limits": Limits({"float32": 100.0}, 100.0),
        "phases": {"d": seconds / 4, "g": 3 * seconds / 4},
        "classes": {operator_classes.MATRIX_PRODUCT: seconds},
    }
    return Measured(title=title, seconds=seconds, **(given | other))


def test_utilisation_is_the_share_of_the_step_at_the_limits():
    row = measured("toys", 2.0)
    assert (row.rate, row.of_peak, row.of_bandwidth) == (2.0, pytest.approx(0.25), pytest.approx(0.125))


def test_an_earlier_run_stands_beside_rows_that_measured_the_same_and_only_those(tmp_path):
    throughput.save(tmp_path / "before.json", {"toys": measured("toys", 4.0), "default": measured("default", 1.0)}, CPU)
    hardware, before = throughput.read(tmp_path / "before.json")
    assert before["toys"] == measured("toys", 4.0)
    now = {"toys": measured("toys", 2.0), "default": measured("default", 1.0, keys=["training.chunk=64"])}
    same = throughput.compare(now, before)
    assert list(same) == ["toys"]
    table = throughput.table_of_steps(now, same).splitlines()
    assert "| images/s before | x before |" in table[0]
    assert "| 2.00 | 1.00 | 2.00 |" in table[2]
    assert "| 4.00 | - | - |" in table[3]
    text = throughput.tell(now, same, hardware, CPU, tmp_path / "throughput.png")
    assert f"Before: {hardware}" in text


def test_bars_are_as_long_as_an_image_takes_beside_the_earlier_run():
    kind = operator_classes.MATRIX_PRODUCT
    now = {"toys": measured("toys", 2.0, batch=8), "coil100": measured("coil100", 3.0)}
    bars = throughput.make_bars(now, {"toys": measured("toys", 4.0)})
    assert [(bar.title, bar.note) for bar in bars] == [
        ("toys", "before 1,000.0 ms"),
        ("", "now 250.0 ms"),
        ("coil100", "750.0 ms"),
    ]
    assert [bar.parts[kind] for bar in bars] == pytest.approx([1.0, 0.25, 1.0])


def test_only_the_published_model_stands_beside_the_plain_loop_and_is_timed_with_it():
    rows = throughput.choose_rows(["toys", "published_amp", "plain"], quick=True, keys=["seed=1"])
    groups = throughput.group_rows(rows)
    assert [list(group) for group in groups] == [["published_amp", "plain"], ["toys"]]
    assert all("narrow" in row.title and row.keys[-1] == "seed=1" for row in groups[0].values())
    now = {"plain": measured("plain", 4.0), "published_amp": measured("AMP", 1.0), "toys": measured("toys", 2.0)}
    ratios = [line.split(" | ")[5] for line in throughput.table_of_steps(now, {}).splitlines()[2:]]
    assert ratios == ["1.000", "0.250", "-"]


# ---------------------------------------------------------------- the command


def run(tmp_path, rows, *more):
    keys = ["data.synthetic.count=48", "ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1", "ccsr.every=2"]
    places = ["--results", tmp_path / "RESULTS.md", "--data", tmp_path, "--save", tmp_path / "now.json"]
    return throughput.main([str(item) for item in (*places, *more, "--quick", "--rows", *rows, "--set", *keys)])


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
        ),
    ],
)
def test_the_command_measures_rows_and_writes_section_plot_and_file(tmp_path, device, capsys):
    assert run(tmp_path, ["plain", "smoke"], "--device", device) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert capsys.readouterr().out.strip() in text
    assert "## Throughput" in text
    assert (tmp_path / "throughput.png").stat().st_size > 1000
    rows = json.loads((tmp_path / "now.json").read_text())["rows"]
    assert list(rows) == ["plain", "smoke"]
    smoke = throughput.read(tmp_path / "now.json")[1]["smoke"]
    assert smoke.phases.keys() >= {"data", "d", "r1", "g", "sr", "ema", "log", REST}
    assert smoke.classes.keys() >= {"matrix product", "elementwise", "random numbers", "optimiser", "EMA", "data"}
    for parts in (smoke.phases, smoke.classes):
        assert math.fsum(parts.values()) == pytest.approx(smoke.seconds)
    assert smoke.classes.get(operator_classes.UNKNOWN, 0.0) < 0.02 * smoke.seconds, smoke.unclassified
    assert smoke.operations["float32"] > 0
    assert 0 < smoke.of_peak < 1
    (tmp_path / "now.json").rename(tmp_path / "before.json")
    assert run(tmp_path, ["smoke"], "--device", device, "--before", tmp_path / "before.json") == 0
    assert "| x before |" in (tmp_path / "RESULTS.md").read_text()


def test_rows_without_their_photographs_are_left_out_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "PHOTOGRAPHS", tmp_path)
    assert throughput.main(["--rows", "coil100", "--results", str(tmp_path / "RESULTS.md"), "--device", "cpu"]) == 1
    assert f"left out, no photographs in {tmp_path}: coil100" in capsys.readouterr().err
    assert not (tmp_path / "RESULTS.md").exists()
