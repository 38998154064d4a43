"""The RRDB trunk is ESRGAN's, by a second implementation and by size; weights load in every published layout."""

import logging
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from graf.models.rrdb import DenseBlock, ResidualDenseBlock, RRDBTrunk, WeightsError, load_esrgan_weights
from graf.runtime.logs import logger

BLOCK_NAMES = [(k, j) for k in (1, 2, 3) for j in (1, 2, 3, 4, 5)]


def small_trunk(scale: int = 4, blocks: int = 2, features: int = 4, growth: int = 2) -> RRDBTrunk:
    return RRDBTrunk(scale, features, growth, blocks)


def names_in_layout(layout: str, blocks: int) -> dict[str, str]:
    """{trunk's module name: the name of the same convolution in a file}, for scale 4."""
    table = {}
    for n in range(blocks):
        for k, j in BLOCK_NAMES:
            ours = f"body.{n}.rdb{k}.conv{j}"
            table[ours] = {
                "basicsr": ours,
                "new": f"RRDB_trunk.{n}.RDB{k}.conv{j}",
                "old": f"model.1.sub.{n}.RDB{k}.conv{j}.0",
            }[layout]
    others = {
        "basicsr": "conv_first conv_body conv_up1 conv_up2 conv_hr conv_last",
        "new": "conv_first trunk_conv upconv1 upconv2 HRconv conv_last",
        "old": f"model.0 model.1.sub.{blocks} model.3 model.6 model.8 model.10",
    }
    return table | dict(zip(others["basicsr"].split(), others[layout].split(), strict=True))


def weights_in_layout(trunk: RRDBTrunk, layout: str) -> dict[str, torch.Tensor]:
    names = names_in_layout(layout, len(trunk.body))
    parts = ((name, *name.rpartition(".")[::2]) for name in trunk.state_dict())
    return {f"{names[module]}.{kind}": trunk.state_dict()[name].clone() for name, module, kind in parts}


def assert_same_output(a: RRDBTrunk, b: RRDBTrunk) -> None:
    image = torch.rand(1, 3, 6, 5)
    assert torch.equal(a(image), b(image))


def convolve(image: np.ndarray, convolution: torch.nn.Conv2d) -> np.ndarray:
    """3 x 3, zero padding, one product at a time."""
    weight, bias = convolution.weight.detach().numpy(), convolution.bias.detach().numpy()
    _, height, width = image.shape
    out = np.zeros((len(weight), height, width))
    for o, y, x in np.ndindex(*out.shape):
        out[o, y, x] = bias[o]
        for c, dy, dx in np.ndindex(*weight.shape[1:]):
            if 0 <= y + dy - 1 < height and 0 <= x + dx - 1 < width:
                out[o, y, x] += weight[o, c, dy, dx] * image[c, y + dy - 1, x + dx - 1]
    return out


def test_a_block_equals_the_papers_formula_by_brute_force():
    block = ResidualDenseBlock(2, 1).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    start = torch.randn(2, 4, 3, dtype=torch.float64)
    x = start.numpy()
    for dense in (block.rdb1, block.rdb2, block.rdb3):
        stack = [x]
        for number in (1, 2, 3, 4):
            y = convolve(np.concatenate(stack), getattr(dense, f"conv{number}"))
            stack.append(np.where(y > 0, y, 0.2 * y))
        x = x + 0.2 * convolve(np.concatenate(stack), dense.conv5)
    assert_close(block(start[None])[0], start + 0.2 * torch.from_numpy(x))


def test_the_published_size_has_the_published_number_of_weights():
    with torch.device("meta"):
        trunk = RRDBTrunk(4)
    assert len(trunk.state_dict()) == 702
    assert sum(parameter.numel() for parameter in trunk.parameters()) == 16_697_987


@pytest.mark.parametrize("scale", [2, 4])
def test_output_is_scale_times_as_large(scale):
    assert small_trunk(scale)(torch.rand(2, 3, 5, 7)).shape == (2, 3, 5 * scale, 7 * scale)


@pytest.mark.parametrize("arguments", [(3,), (1,), (4, 0), (4, 8, 4, 0)])
def test_impossible_sizes_are_named(arguments):
    with pytest.raises(ValueError, match=r"scale=|features="):
        RRDBTrunk(*arguments)


def test_dense_blocks_begin_with_a_tenth_of_kaiming_weights():
    block = DenseBlock(64, 32)
    for convolution in (block.conv1, block.conv5):
        expected = 0.1 * math.sqrt(2 / (9 * convolution.in_channels))
        assert convolution.weight.std().item() == pytest.approx(expected, rel=0.03)
        assert not bool(convolution.bias.any())


@pytest.mark.parametrize("scale", [2, 4])
def test_receptive_radius_is_the_reach_of_the_gradient(scale):
    trunk = small_trunk(scale, blocks=1, features=1, growth=1).double()
    for parameter in trunk.parameters():
        torch.nn.init.constant_(parameter, 0.2)  # nothing cancels and no unit is negative
    radius = trunk.receptive_radius
    side, middle = 2 * radius + 5, radius + 2
    image = torch.ones(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    seen = slice(scale * middle, scale * (middle + 1))
    trunk(image)[..., seen, seen].sum().backward()
    touched = image.grad[0].sum(0) != 0
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[2:-2, 2:-2] = True
    assert torch.equal(touched, expected)


def test_every_parameter_gets_a_gradient():
    trunk = small_trunk()
    trunk(torch.rand(1, 3, 8, 8)).square().mean().backward()
    assert all(bool((parameter.grad != 0).any()) for parameter in trunk.parameters())


@pytest.mark.parametrize("layout", ["basicsr", "new", "old"])
@pytest.mark.parametrize("wrapper", [None, "params_ema", "params", "state_dict"])
def test_files_load_in_every_layout_and_wrapper(tmp_path, layout, wrapper):
    source, trunk = small_trunk(), small_trunk()
    weights = weights_in_layout(source, layout)
    torch.save(weights if wrapper is None else {wrapper: weights, "iter": 3}, tmp_path / "w.pth")
    report = load_esrgan_weights(trunk, tmp_path / "w.pth", trust=True)
    assert (report.matched, report.missing, report.unexpected, report.mismatched) == (len(weights), [], [], [])
    assert_same_output(source, trunk)


def test_a_file_may_be_named_from_the_home_folder(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    torch.save(small_trunk().state_dict(), tmp_path / "w.pth")
    assert not load_esrgan_weights(small_trunk(), "~/w.pth", trust=True).missing


def test_the_average_is_preferred_where_a_file_has_both(tmp_path):
    source, other, trunk = small_trunk(), small_trunk(), small_trunk()
    torch.save({"params": other.state_dict(), "params_ema": source.state_dict()}, tmp_path / "w.pth")
    load_esrgan_weights(trunk, tmp_path / "w.pth", trust=True)
    assert_same_output(source, trunk)


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "pickle of before torch 1.6"])
def test_prefixed_names_and_old_files_load(tmp_path, old_format):
    source, trunk = small_trunk(), small_trunk()
    weights = {f"module.{name}": value for name, value in weights_in_layout(source, "new").items()}
    torch.save(weights, tmp_path / "w.pth", _use_new_zipfile_serialization=not old_format)
    assert load_esrgan_weights(trunk, tmp_path / "w.pth", trust=True).matched == len(weights)
    assert_same_output(source, trunk)


def test_the_old_layout_of_scale_2_is_told_by_order(tmp_path):
    source, trunk = small_trunk(2, blocks=1), small_trunk(2, blocks=1)
    places = {"conv_first": "model.0", "conv_up1": "model.3", "conv_hr": "model.5", "conv_last": "model.7"}
    weights = {}
    for name, value in source.state_dict().items():
        module, _, kind = name.rpartition(".")
        inside = module.replace("body.0", "model.1.sub.0").replace("rdb", "RDB") + ".0"
        old = places.get(module, "model.1.sub.1" if module == "conv_body" else inside)
        weights[f"{old}.{kind}"] = value
    torch.save(weights, tmp_path / "w.pth")
    assert load_esrgan_weights(trunk, tmp_path / "w.pth", trust=True).matched == len(weights)
    assert_same_output(source, trunk)


@pytest.mark.parametrize("layout", ["basicsr", "new", "old"])
def test_a_shallower_trunk_takes_the_first_blocks_and_reports_the_rest(tmp_path, layout, caplog):
    source, trunk = small_trunk(blocks=3), small_trunk(blocks=1)
    torch.save(weights_in_layout(source, layout), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, logger=logger.name):
        report = load_esrgan_weights(trunk, tmp_path / "w.pth", trust=True)
    names = names_in_layout(layout, 3)
    rest = [name for name in source.state_dict() if name.startswith(("body.1.", "body.2."))]
    assert report.unexpected == [names[name.rpartition(".")[0]] + "." + name.rpartition(".")[2] for name in rest]
    assert report.missing == report.mismatched == []
    assert report.matched == len(trunk.state_dict())
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
    assert f"{report.matched} of the trunk's {report.matched} tensors loaded" in caplog.text
    assert f"60 tensors of the file have no place in the trunk and are left out: {report.unexpected[0]}" in caplog.text


def test_a_deeper_trunk_keeps_what_the_file_lacks_and_says_so(tmp_path, caplog):
    source, trunk = small_trunk(blocks=1), small_trunk(blocks=2)
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    torch.save(weights_in_layout(source, "old"), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, logger=logger.name):
        report = load_esrgan_weights(trunk, tmp_path / "w.pth", trust=True)
    assert report.missing == [name for name in before if name.startswith("body.1.")]
    assert all(torch.equal(trunk.state_dict()[name], before[name]) for name in report.missing)
    assert torch.equal(trunk.conv_body.weight, source.conv_body.weight)
    assert "30 tensors are not in the file" in caplog.text


def test_an_x4_file_serves_an_x2_trunk_without_its_second_upsampling(tmp_path):
    source, trunk = small_trunk(4), small_trunk(2)
    torch.save(weights_in_layout(source, "new"), tmp_path / "w.pth")
    report = load_esrgan_weights(trunk, tmp_path / "w.pth", trust=True)
    assert report.unexpected == ["upconv2.weight", "upconv2.bias"]
    assert report.missing == report.mismatched == []


def test_tensors_of_another_shape_are_reported_and_left_alone(tmp_path, caplog):
    source, trunk = small_trunk(growth=3), small_trunk(growth=2)
    before = trunk.body[0].rdb1.conv1.weight.clone()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, logger=logger.name):
        report = load_esrgan_weights(trunk, tmp_path / "w.pth", trust=True)
    assert "body.0.rdb1.conv1.weight" in report.mismatched
    assert "conv_first.weight" not in report.mismatched
    assert report.matched + len(report.mismatched) == len(trunk.state_dict())
    assert report.missing == report.unexpected == []
    assert torch.equal(trunk.body[0].rdb1.conv1.weight, before)
    assert torch.equal(trunk.conv_first.weight, source.conv_first.weight)
    assert "have another shape in the file" in caplog.text


class Opaque:
    """A class that weights_only=True refuses, as whole pickled models are refused."""


def test_a_pickle_that_needs_code_is_refused_with_the_way_to_convert_it(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"net": Opaque()}, path)
    with pytest.raises(WeightsError, match=r"model\.pth: cannot be read with weights_only=True.*convert it once"):
        load_esrgan_weights(small_trunk(), path, trust=True)


def test_a_file_cut_short_and_a_missing_one_are_named(tmp_path):
    path = tmp_path / "cut.pth"
    torch.save(small_trunk().state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"cut\.pth: cannot be read"):
        load_esrgan_weights(small_trunk(), path, trust=True)
    with pytest.raises(WeightsError, match=r"none\.pth: no such file"):
        load_esrgan_weights(small_trunk(), tmp_path / "none.pth", trust=True)


@pytest.mark.parametrize("contents", [[torch.ones(2)], {}, {"params": {"epoch": 3}}, 7])
def test_a_file_without_named_tensors_is_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth: holds a .* without named tensors"):
        load_esrgan_weights(small_trunk(), tmp_path / "w.pth", trust=True)


@pytest.mark.parametrize(
    "weights",
    [{"layer.weight": torch.ones(3)}, {"model.0.weight": torch.ones(3)}, RRDBTrunk(4, 6, 5, 1).state_dict()],
    ids=["foreign names", "a sequence of one", "other shapes"],
)
def test_a_file_that_matches_nothing_is_refused_and_changes_nothing(tmp_path, weights):
    trunk = small_trunk(features=8, growth=4)
    weights = {name: value for name, value in weights.items() if name != "conv_last.bias"}
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth: none of its \d+ tensors fits.*expected ESRGAN weights with 8"):
        load_esrgan_weights(trunk, tmp_path / "w.pth", trust=True)
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())
