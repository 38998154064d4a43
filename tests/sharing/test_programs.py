"""Exported programs compute what the field computes, at sizes that they were not made with; others are not written."""

import copy
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from graf.evaluation.renderer import Renderer
from graf.runtime.torch_release import torch_release
from graf.sharing import programs
from graf.sharing.programs import Differences, ExportError, WholeField, draw_inputs, write_onnx, write_torch_program

needs_exporter = pytest.mark.skipif(torch_release() < programs.OLDEST_TORCH, reason="this torch exports no programs")

SIZES = ((2, 5, 3), (1, 1, 1), (4, 9, 2))
META = {"classes": ["car", "duck", "mug"], "near": 2.5}


def expected_of(renderer, inputs):
    """What the field itself says, without the class that is exported."""
    z, class_idx, points, directions = inputs
    field = renderer.generator.field
    return field(points, directions, field.prepare(z, class_idx))


@dataclass(frozen=True)
class Exported:
    """A renderer, the folder of its exported field.pt2 and field.onnx, and their differences by suffix."""

    renderer: Renderer
    folder: Path
    differences: dict[str, Differences]


@pytest.fixture(scope="module", params=["mlp", "siren", "table", "synthesis"])
def exported(request, make_field_renderer, tmp_path_factory) -> Exported:
    """Both programs of one kind of field, only read by tests; tracing, half of the time, is done once for both."""
    if torch_release() < programs.OLDEST_TORCH:
        pytest.skip("this torch exports no programs")
    renderer, folder = make_field_renderer(request.param), tmp_path_factory.mktemp(request.param)
    field, writers = renderer.generator.field, {"pt2": write_torch_program}
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
        writers["onnx"] = write_onnx
    with pytest.MonkeyPatch.context() as patch:
        traced = programs._trace(WholeField(field), 3)
        patch.setattr(programs, "_trace", lambda *_: traced)
        found = {suffix: write(folder / f"field.{suffix}", field, 3, META) for suffix, write in writers.items()}
    return Exported(renderer, folder, found)


def test_differences_are_small_and_densities_were_met(exported):
    for found in exported.differences.values():
        assert found.are_small
        assert found.rgb <= 1e-5
        assert 0.1 < found.largest_density < 100


def test_the_torch_program_is_the_field_at_any_size(exported):
    extra = {"graf.json": ""}
    program = torch.export.load(exported.folder / "field.pt2", extra_files=extra).module()
    assert json.loads(extra["graf.json"]) == META
    for size in SIZES:
        inputs = draw_inputs(size, exported.renderer.generator.field.dim_z, 3)
        assert_close(program(*inputs), expected_of(exported.renderer, inputs), rtol=1e-5, atol=1e-5)


def test_the_onnx_model_is_the_field_at_any_size_and_names_its_dimensions(exported):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file, dim_z = exported.folder / "field.onnx", exported.renderer.generator.field.dim_z
    model = onnx.load(file)
    assert json.loads({entry.key: entry.value for entry in model.metadata_props}["graf"]) == META
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    shapes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    assert shapes == {
        "z": ["batch", dim_z],
        "class_idx": ["batch"],
        "points": ["batch", "rays", "samples", 3],
        "directions": ["batch", "rays", 3],
        "rgb": ["batch", "rays", "samples", 3],
        "density": ["batch", "rays", "samples"],
    }
    for size in SIZES:
        inputs = draw_inputs(size, dim_z, 3)
        named = {name: tensor.numpy() for name, tensor in zip(programs.INPUTS, inputs, strict=True)}
        found = [torch.from_numpy(array) for array in session.run(["rgb", "density"], named)]
        assert_close(tuple(found), expected_of(exported.renderer, inputs), rtol=1e-5, atol=1e-5)


def test_the_inputs_of_the_check_meet_every_class_and_both_sides_of_the_unit_sphere():
    z, class_idx, points, directions = draw_inputs((5, 64, 24), 8, 3)
    assert set(class_idx.tolist()) == {0, 1, 2}
    inside = float((points.norm(dim=-1) < 1).float().mean())
    assert 0.2 < inside < 0.8
    assert_close(directions.norm(dim=-1), torch.ones(5, 64))
    assert z.shape == (5, 8)


@pytest.mark.parametrize("layer", ["rgb", "raw_density"])
def test_a_program_that_differs_by_more_than_1e_5_is_not_written(make_renderer, tmp_path, layer):
    whole = WholeField(make_renderer().generator.field)
    other = copy.deepcopy(whole)
    getattr(other.field, layer).bias.add_(1e-3)
    with pytest.raises(ExportError, match=r"pt2: not written: largest difference .* at most 1e-05 of rgb, and of"):
        programs._compare(other, whole, 3, tmp_path / "field.pt2")


@needs_exporter
def test_a_program_that_is_not_written_leaves_the_earlier_one(make_renderer, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "TOLERANCE", -1.0)  # which nothing keeps
    path, small = tmp_path / "field.pt2", ("nerf.netdepth=2", "nerf.netwidth=8")
    path.write_bytes(b"an earlier one")
    with pytest.raises(ExportError, match="pt2: not written"):
        write_torch_program(path, make_renderer(*small).generator.field, 3, META)
    assert path.read_bytes() == b"an earlier one"


@needs_exporter
def test_a_program_whose_sizes_are_fixed_is_not_written(make_renderer, tmp_path):
    whole = WholeField(make_renderer().generator.field)
    fixed = torch.export.export(whole, draw_inputs((2, 5, 3), whole.field.dim_z, 3)).module()
    with pytest.raises(ExportError, match=r"it does not run at batch, rays, samples \(1, 1, 1\)"):
        programs._compare(fixed, whole, 3, tmp_path / "field.pt2")


def test_a_torch_that_is_too_old_is_told_which_one_is_needed(make_renderer, monkeypatch):
    whole = WholeField(make_renderer().generator.field)
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    with pytest.raises(ExportError, match=r"torch 2\.4\.1\+cpu cannot export .* update torch to 2\.7 or newer"):
        programs._trace(whole, 3)


def test_weights_of_another_precision_are_exported_in_float32(make_renderer):
    whole = WholeField(make_renderer().generator.field.double())
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("rgb", "density", "largest", "expected"),
    [
        (1e-5, 1e-5, 0.0, True),
        (1e-5, 0.9e-3, 100.0, True),
        (1.1e-5, 0.0, 100.0, False),
        (0.0, 1.1e-5, 0.5, False),
        (0.0, 1.1e-3, 100.0, False),
        (float("nan"), 0.0, 1.0, False),
        (0.0, float("nan"), 1.0, False),
    ],
)
def test_colours_are_held_to_1e_5_and_densities_to_that_share_of_the_largest(rgb, density, largest, expected):
    assert Differences(rgb, density, largest).are_small is expected
