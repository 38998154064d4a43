"""What people's programs use: `graf.load`, the examples in the docstrings, and what a Renderer promises."""

import doctest
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import graf
from graf.app import loading
from graf.base.errors import UserError
from graf.config import ConfigError
from graf.evaluation import renderer as renderer_module
from graf.evaluation.renderer import Renderer
from graf.geometry.cameras import (
    elevation_from_height,
    height_from_elevation,
    median_height,
    pose_from_angles,
)
from graf.runtime.checkpoint import CheckpointError, read_checkpoint
from graf.runtime.device import DeviceError
from graf.runtime.sealed_archive import write_sealed

ROOT = Path(__file__).resolve().parent.parent
FORMAT_1 = ROOT / "tests" / "files" / "format_1"


@pytest.fixture(scope="module")
def run(run_command_line, tmp_path_factory) -> Path:
    """A run of two iterations with super-resolution, 16 -> 32 pixels."""
    cwd = tmp_path_factory.mktemp("api")
    keys = ["data.imsize=16", "ccsr.enabled=true", "ccsr.features=4", "ccsr.blocks=1", "training.fid_every=0"]
    keys += ["training.sample_every=0", "training.monitoring=[]", "nerf.density_scale=20", "ccsr.lr=0.05"]
    config = str(ROOT / "configs" / "smoke.yaml")
    process = run_command_line("train.py", "--config", config, "--max_iterations", "2", *keys, cwd=cwd)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return cwd / "results" / "smoke"


@pytest.fixture(scope="module")
def renderer(run) -> Renderer:
    return graf.load(run, device="cpu")


# ---------------------------------------------------------------- examples and import


@pytest.mark.parametrize("module", [loading, renderer_module], ids=lambda module: module.__name__)
def test_every_example_in_the_docstrings_runs(module, run):
    names = {"run": run, "renderer": graf.load(run, device="cpu"), "torch": torch}
    examples = doctest.DocTestFinder().find(module, extraglobs=names)
    runner = doctest.DocTestRunner()
    report: list[str] = []
    for example in examples:
        runner.run(example, out=report.append)
    assert not report, "".join(report)
    shown = {example.name.rpartition(".")[2] for example in examples if example.examples}
    public = {
        loading: {"load"},
        renderer_module: {"sample", "render", "density", "radiance", "codes", "class_index", "numpy", "pil"},
    }
    assert shown >= public[module]


def test_importing_graf_imports_neither_torch_nor_any_room():
    program = "import sys, graf; print([m for m in sys.modules if m == 'torch' or m.startswith('graf.')])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert graf.Renderer is Renderer
    with pytest.raises(AttributeError, match="has no attribute 'Sampler'"):
        graf.Sampler  # noqa: B018


# ---------------------------------------------------------------- opening


def test_a_run_and_its_checkpoint_give_the_averaged_weights_in_eval_mode(run, renderer):
    file = run / "checkpoints" / "model_00000002.pt"
    objects = read_checkpoint(file)["objects"]
    for opened in (renderer, graf.load(str(file), device="cpu")):
        assert opened.ccsr is not None
        for network, name in ((opened.generator, "generator_average"), (opened.ccsr, "ccsr_average")):
            assert not any(part.training for part in network.modules())
            assert not any(parameter.requires_grad for parameter in network.parameters())
            assert_close(dict(network.state_dict()), dict(objects[name]), rtol=0, atol=0)
    assert not torch.equal(objects["generator_average"]["field.rgb.weight"], objects["generator"]["field.rgb.weight"])
    assert renderer.device == torch.device("cpu")
    assert renderer.config.nerf.density_scale == 20


def test_a_renderer_prints_as_one_readable_line(renderer):
    assert "'car'" in repr(renderer)
    assert len(repr(renderer)) < 1000


def test_a_configuration_that_lacks_a_later_key_takes_its_default(run, tmp_path):
    contents = torch.load(run / "checkpoints" / "model_00000002.pt", weights_only=True)
    del contents["meta"]["config"]["nerf"]["background"]
    with open(tmp_path / "older.pt", "wb") as file:
        write_sealed(file, contents, {})
    assert graf.load(tmp_path / "older.pt", device="cpu", trust=True).config.nerf.background == "auto"


def test_what_cannot_be_opened_is_said(run, tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        graf.load(tmp_path / "absent.pt")
    with pytest.raises(ConfigError, match="absent: no run is there"):
        graf.load(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no run is there"):
        graf.load(tmp_path)
    with pytest.raises(DeviceError, match="cuda:97"):
        graf.load(run, device="cuda:97")
    contents = torch.load(run / "checkpoints" / "model_00000002.pt", weights_only=True)
    for change, expected in (
        (lambda meta: meta.pop("config"), "no description of its run"),
        (lambda meta: meta["config"].update(later=1), r"does not take \(later=1: unknown key"),
        (lambda meta: meta["config"]["nerf"].update(density="exp"), r"nerf\.density='exp'"),
    ):
        meta = json.loads(json.dumps(contents["meta"]))
        change(meta)
        with open(tmp_path / "changed.pt", "wb") as file:
            write_sealed(file, contents | {"meta": meta}, {})
        with pytest.raises(CheckpointError, match=expected):
            graf.load(tmp_path / "changed.pt", trust=True)


def test_a_run_of_format_1_shows_the_picture_that_its_own_version_showed():
    """renders.pt: codes z of classes 1 and 3 from azimuth 45 at the median height, rendered by the version before."""
    expected = torch.load(FORMAT_1 / "renders.pt", weights_only=True)
    z = expected.pop("z")
    found = graf.load(FORMAT_1, device="cpu", trust=True).sample(z=z, class_name=["duck", "mug"], super_resolve=True)
    assert float(expected["rgb"].std()) > 0.05
    for name, images in expected.items():
        assert_close(getattr(found, name), images, rtol=0, atol=1e-6)


def test_training_goes_on_from_a_checkpoint_of_format_1(run_program, tmp_path, capsys):
    file = FORMAT_1 / "checkpoints" / "model_00000006.pt"
    config = ["--config", FORMAT_1 / "config.yaml", "training.sample_every=0", "training.fid_every=0"]
    assert run_program("train.py", *config, "--resume", file, "--max_iterations", "8", "training.monitoring=[]") == 0
    assert "training.max_iterations: 6 -> 8" in capsys.readouterr().out
    saved = read_checkpoint(tmp_path / "results" / "smoke" / "checkpoints" / "model_00000008.pt")
    assert saved["objects"]["averages"] == {"generator": 8, "ccsr": 8}
    assert saved["objects"]["progress"]["iteration"] == 8
    before = read_checkpoint(file)["objects"]
    assert before["progress"]["best"]["iteration"] == 6
    assert saved["objects"]["progress"]["best"] == {}  # its model_best.pt is not there to go on with
    steps = [objects["optimizer_g"]["state"][0]["square_avg"] for objects in (before, saved["objects"])]
    assert steps[0].abs().sum() > 0
    assert not torch.equal(*steps)


# ---------------------------------------------------------------- sampling


def test_a_sample_is_the_object_and_view_that_the_program_shows(renderer):
    found = renderer.sample(seed=4, class_name="house", azimuth=90, elevation=30, super_resolve=True)
    z = renderer.codes(4, range(1))
    views = renderer.cameras.views_at(torch.tensor([2]), torch.tensor([0.25]), torch.tensor([0.25]))
    expected = renderer.render_views(z, views, super_resolve=True)
    for name in ("rgb", "depth", "opacity", "sr"):
        assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-5)


def test_lists_give_a_batch_and_single_values_serve_all_of_it(renderer):
    found = renderer.sample(seed=[0, 1], class_name=["car", 3], azimuth=np.array([0.0, 450.0]), elevation=[10, -20])
    assert len(found) == 2
    for row, (seed, name, azimuth, elevation) in enumerate(((0, "car", 0, 10), (1, "mug", 90, -20))):
        alone = renderer.sample(seed=seed, class_name=name, azimuth=azimuth, elevation=elevation)
        assert torch.equal(found.rgb[row], alone.rgb[0])
    turn = renderer.sample(azimuth=[0, 120, 240], radius=[3.4, 3.5, 3.6])
    assert len(turn) == 3
    assert torch.equal(turn[1:2].depth, renderer.sample(azimuth=120, radius=3.5).depth)


def test_codes_may_be_given_instead_of_seeds(renderer):
    z = renderer.codes(7, range(1))
    assert torch.equal(renderer.sample(z=z[0]).rgb, renderer.sample(seed=7).rgb)
    assert len(renderer.sample(z=z.repeat(3, 1))) == 3


def test_truncation_is_a_factor_on_drawn_codes(run, renderer):
    truncated = graf.load(run, truncation=0.5)
    z = 0.5 * renderer.codes(3, range(1))
    assert torch.equal(truncated.sample(seed=3).rgb, renderer.sample(z=z).rgb)
    assert torch.equal(truncated.sample(z=z).rgb, renderer.sample(z=z).rgb)
    with pytest.raises(UserError, match=r"truncation=1.5: expected 0 to 1"):
        graf.load(run, truncation=1.5)


def test_the_default_camera_stands_at_the_median_height_and_the_runs_own_distance(renderer):
    v_list = renderer.cameras.v_list
    degrees = elevation_from_height(v_list[median_height(v_list)])
    assert renderer.default_elevation == degrees
    expected = renderer.sample(azimuth=45, elevation=degrees, radius=3.5, resolution=16, num_samples=8)
    assert torch.equal(renderer.sample().rgb, expected.rgb)


@pytest.mark.parametrize("degrees", [-90, -37.5, 0, 20, 90])
def test_elevation_is_the_angle_of_the_camera_above_the_horizon(degrees):
    v = height_from_elevation(degrees)
    x, y, z = pose_from_angles(torch.tensor(0.3), torch.tensor(v), 2.0)[:3, 3].tolist()
    assert np.degrees(np.arctan2(z, np.hypot(x, y))) == pytest.approx(degrees, abs=0.05)
    assert elevation_from_height(v) == pytest.approx(degrees, abs=1e-5)


def test_resolution_and_samples_may_differ_from_training(renderer):
    assert renderer.sample(resolution=24).rgb.shape == (1, 3, 24, 24)
    assert renderer.sample(resolution=24, super_resolve=True).sr.shape == (1, 3, 48, 48)
    coarse, fine = (renderer.sample(num_samples=count).rgb for count in (2, 64))
    assert not torch.equal(coarse, fine)
    assert renderer.resolution == 16


def test_pictures_for_numpy_and_pil_are_the_clipped_colours(renderer):
    found = renderer.sample(seed=[0, 1], super_resolve=True)
    for output in ("rgb", "sr"):
        images, colours = found.numpy(output), getattr(found, output)
        assert images.dtype == np.uint8
        expected = ((colours.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
        assert np.array_equal(images, expected.numpy())
        assert np.array_equal(np.array(found.pil(output)[1]), images[1])
    with pytest.raises(UserError, match="super_resolve=True"):
        renderer.sample().numpy("sr")


# ---------------------------------------------------------------- any pose


def test_a_pose_on_the_sphere_is_the_sample_from_there(renderer):
    u, v = torch.tensor([0.1, 0.6]), torch.tensor([0.2, 0.3])
    poses = pose_from_angles(u, v, 3.5)
    found = renderer.render(renderer.codes(2, range(1)), "duck", poses, super_resolve=True)
    degrees = [elevation_from_height(float(height)) for height in v]
    expected = renderer.sample(2, class_name="duck", azimuth=360 * u, elevation=degrees, super_resolve=True)
    for name in ("rgb", "depth", "opacity", "sr"):
        assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-4)


def test_a_camera_that_looks_elsewhere_sees_something_else(renderer):
    pose = pose_from_angles(torch.tensor(0.1), torch.tensor(0.2), 3.5)
    turned = pose.clone()
    turned[:3, :3] = turned[:3, :3] @ torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # to its side
    z = renderer.codes(2, range(1))
    assert float(renderer.render(z, 0, pose).opacity.max()) > 0.1
    assert float(renderer.render(z, 0, turned).opacity.max()) == 0


@pytest.mark.parametrize("direction", ["ccw", "cw"])
def test_super_resolution_takes_the_view_that_a_label_of_that_direction_names(renderer, direction, monkeypatch):
    seen: list[float] = []
    forward = renderer.ccsr.forward

    def watch(rgb: torch.Tensor, angles: torch.Tensor, patches: object) -> object:
        seen.extend(angles.tolist())
        return forward(rgb, angles, patches)

    monkeypatch.setattr(renderer.ccsr, "forward", watch)
    turned = replace(renderer, cameras=replace(renderer.cameras, angle_direction=direction))
    pose = pose_from_angles(torch.tensor(0.25), torch.tensor(0.2), 3.5)
    turned.render(turned.codes(0, range(1)), "car", pose, super_resolve=True)
    assert seen == [90 if direction == "ccw" else 270]


# ---------------------------------------------------------------- densities


def test_densities_are_those_that_are_rendered_with_and_do_not_depend_on_the_chunk(renderer):
    points = torch.rand(2, 50, 3) * 1.6 - 0.8
    found = renderer.density(points, seed=[0, 5], class_name=["car", "duck"])
    field, z = renderer.generator.field, torch.cat([renderer.codes(seed, range(1)) for seed in (0, 5)])
    with torch.no_grad():
        codes = field.prepare(z, torch.tensor([0, 1]))
        directions = torch.tensor([0.0, 0, 1]).expand(2, 50, 3)
        _, expected = field(points[:, :, None], directions, codes)
    assert_close(found, expected[..., 0])
    assert float(found.max()) > 0
    assert_close(renderer.density(points[1], seed=5, class_name="duck"), found[1])
    chunk = renderer.generator.chunk
    renderer.generator.chunk = 1
    try:
        assert_close(renderer.density(points, seed=[0, 5], class_name=["car", "duck"]), found)
    finally:
        renderer.generator.chunk = chunk
    assert renderer.density(torch.zeros(0, 3)).shape == (0,)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda r: r.sample(class_name="hose"), r"class 'hose': .* car, duck, house, mug; did you mean house\?"),
        (lambda r: r.sample(class_name=4), "class 4: expected a name or an index of car"),
        (lambda r: r.sample(seed=[0, 1], azimuth=[0, 1, 2]), "seed has 2 values and azimuth 3: give one value or 3"),
        (lambda r: r.sample(azimuth=[]), "azimuth has 0 values"),
        (lambda r: r.sample(elevation=91), "elevation=91: expected -90 to 90 degrees"),
        (lambda r: r.sample(azimuth=[0, math.nan]), "azimuth=nan: expected a finite number of degrees"),
        (lambda r: r.sample(azimuth=-math.inf), "azimuth=-inf: expected a finite number of degrees"),
        (lambda r: r.sample(azimuth=None), "azimuth=None: expected a finite number of degrees"),
        (lambda r: r.sample(elevation="high"), "elevation=high: expected -90 to 90 degrees"),
        (lambda r: r.sample(radius=0), "radius=0: expected a finite distance above 0"),
        (lambda r: r.sample(radius=math.inf), "radius=inf: expected a finite distance above 0"),
        (lambda r: r.sample(z=torch.full((8,), math.nan)), "z holds NaN or infinity: expected finite numbers"),
        (lambda r: r.sample(seed=1.5), "seed=1.5: expected a whole number"),
        (lambda r: r.sample(seed=None), "seed=None: expected a whole number"),
        (lambda r: r.sample(z=torch.tensor(1.0)), "z has 1 numbers: expected 8"),
        (lambda r: r.instance_codes([-2]), "instance=-2: expected a whole number of at least -1"),
        (lambda r: r.instance_codes([3.7]), "instance=3.7: expected a whole number"),
        (lambda r: r.instance_codes(torch.tensor([3.7])), "instance=3.7.*: expected a whole number"),
        (lambda r: r.sample(resolution=16.0), "resolution=16.0: expected at least 1 pixel, whole"),
        (lambda r: r.sample(resolution=0), "resolution=0: expected at least 1"),
        (lambda r: r.sample(num_samples=1), "num_samples=1: expected at least 2"),
        (lambda r: r.sample(z=torch.zeros(3)), "z has 3 numbers: expected 8"),
        (lambda r: r.render(torch.zeros(8), "car", torch.eye(3)), r"camera_to_world has shape \(3, 3\)"),
        (lambda r: r.density(torch.zeros(5, 2)), r"points has shape \(5, 2\): expected \(N, 3\)"),
        (lambda r: r.density(torch.zeros(5, 3), seed=[0, 1]), r"expected \(B, N, 3\) for several"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(renderer, call, expected):
    with pytest.raises(UserError, match=expected):
        call(renderer)


def test_super_resolution_that_a_run_does_not_have_is_refused(smoke_run):
    with pytest.raises(UserError, match=r"no super-resolution; train one with ccsr\.enabled=true"):
        graf.load(smoke_run.folder, device="cpu").sample(super_resolve=True)
