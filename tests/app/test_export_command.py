"""`graf export` on a trained run: weights render as their checkpoint does, bit for bit, and errors are one line."""

import copy
import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import graf
from graf.app import export_tasks
from graf.app.command_line import main
from graf.app.loading import open_checkpoint
from graf.app.run_arguments import object_code
from graf.base.errors import UserError
from graf.config import load_config
from graf.inversion.object_file import ObjectFile
from graf.models.camera_refinement import STORED_FACTOR, CameraRefinement
from graf.runtime.checkpoint import CheckpointError
from graf.runtime.torch_release import torch_release
from graf.sharing.programs import OLDEST_TORCH
from graf.sharing.weights import write_weights

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("restored_process")


@pytest.fixture
def trained(smoke_run):
    return open_checkpoint([next(smoke_run.folder.glob("checkpoints/model_0*.pt"))], torch.device("cpu"))


def test_weights_render_as_their_run_does_bit_for_bit(smoke_run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("safetensors")
    assert main(["export", str(smoke_run.folder), "--to", "safetensors", "--out", str(tmp_path / "m.safetensors")]) == 0
    assert "opens it" in capsys.readouterr().out
    expected = graf.load(smoke_run.folder, device="cpu").sample(seed=[0, 5], class_name=["car", "mug"])

    def refuse(*_, **__):
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(torch, "load", refuse)
    renderer = graf.load(tmp_path / "m.safetensors", device="cpu")
    found = renderer.sample(seed=[0, 5], class_name=["car", "mug"])
    for name in ("rgb", "depth", "opacity"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert main(["eval", "--checkpoint", str(tmp_path / "m.safetensors"), "--grid", "--views", "2"]) == 0
    assert (tmp_path / "eval" / "grid_car_rgb.png").is_file()


def test_the_description_holds_the_resolved_config_and_no_place_of_this_machine(smoke_run, trained):
    config = trained.renderer.config
    data = config.data.model_copy(update={"datadir": "/home/someone/photos"})
    moved = replace(trained, renderer=replace(trained.renderer, config=config.model_copy(update={"data": data})))
    found = export_tasks.describe_trained(moved)
    assert "someone" not in json.dumps(found)
    assert found["config"] == config.model_dump(mode="json") | {
        "data": config.data.model_dump(mode="json") | {"datadir": "photos"}
    }
    assert found["iteration"] == trained.iteration
    assert found["machine"].keys() == {"device", "precision", "torch"}
    assert found["photographs"].keys() == {"number", "identity", "exchanged"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda states, meta: states["generator_average"].popitem(), "missing in the checkpoint"),
        (lambda states, meta: states.pop("generator_average"), "object 'generator_average'"),
        (lambda states, meta: meta["config"]["nerf"].update(netwidth=24), "of shape"),
        (lambda states, meta: meta["config"]["nerf"].update(nowhere=1), "does not take"),
        (lambda states, meta: meta.pop("config"), "no description of its run"),
        (lambda states, meta: meta.update(iteration="many"), "does not tell its iteration"),
        (lambda states, meta: meta["dataset"].update(class_names=["../../etc"]), "what it says of its photographs"),
        (lambda states, meta: meta["dataset"].update(radius=-1.0), "what it says of its photographs"),
    ],
)
def test_a_whole_file_with_wrong_contents_is_one_line(trained, tmp_path, change, expected):
    pytest.importorskip("safetensors")
    states, meta = export_tasks.averaged_states(trained), export_tasks.describe_trained(trained)
    change(states, meta)
    write_weights(tmp_path / "m.safetensors", states, meta)
    with pytest.raises(CheckpointError) as caught:
        graf.load(tmp_path / "m.safetensors", device="cpu")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_is_exported_by_the_command_with_what_rendering_it_takes(smoke_run, tmp_path, capsys):
    if torch_release() < OLDEST_TORCH:
        pytest.skip("this torch exports no programs")
    path = tmp_path / "field.pt2"
    assert main(["export", str(smoke_run.folder), "--to", "pt2", "--out", str(path)]) == 0
    found = re.search(r"largest difference rgb (\S+), ", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) < 1e-6  # the program adds a bias after its product, the field within it
    extra = {"graf.json": ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra["graf.json"])["classes"] == list(graf.load(smoke_run.folder, device="cpu").classes)


def test_a_program_is_told_the_lens_that_was_learned(trained):
    renderer, cameras = trained.renderer, CameraRefinement(4, 1)
    cameras.load_state_dict(cameras.state_dict() | {"lens": STORED_FACTOR * torch.tensor(0.1)})
    generator = copy.copy(renderer.generator)
    generator.cameras = cameras
    moved = replace(trained, renderer=replace(renderer, generator=generator))
    half_width = math.tan(math.radians(trained.dataset_info.fov / 2)) / math.exp(0.1)
    fov = export_tasks.describe_program(moved)["fov_degrees"]
    assert fov == pytest.approx(2 * math.degrees(math.atan(half_width)))


def test_the_command_that_trains_on_pictures_has_a_name_that_runs_may_have(smoke_run, tmp_path, monkeypatch, capsys):
    find = export_tasks.object_code
    monkeypatch.setattr(export_tasks, "object_code", lambda *_: (*find(*_)[:2], "toy car & co_0"))
    out = ["--class", "car", "--out", "pictures", "--resolution", "32"]
    assert main(["export", str(smoke_run.folder), "--transforms", "2", *out]) == 0
    command = shlex.split(capsys.readouterr().out.partition("to train on it: ")[2])
    assert load_config("toys", command[4:]).expname == "toy_car___co_0"


def test_pictures_of_an_object_by_name_and_the_command_that_trains_on_them(smoke_run, tmp_path, capsys):
    out = ["--out", "set #2: [a] käfer", "--resolution", "32"]
    assert main(["export", str(smoke_run.folder), "--transforms", "3", "--class", "duck", "--seed", "2", *out]) == 0
    command = shlex.split(capsys.readouterr().out.partition("to train on it: ")[2])
    assert command[:4] == ["graf", "train", "--config", "toys"]
    config = load_config("toys", command[4:])
    assert (config.expname, config.data.type, config.data.datadir) == ("duck_2", "transforms", out[1])
    found = json.loads((tmp_path / out[1] / "transforms.json").read_text())
    assert (found["graf"]["class"], found["graf"]["object"], len(found["frames"])) == ("duck", "duck_2", 3)


def test_pictures_of_the_object_of_a_file(smoke_run, trained, tmp_path):
    z = tuple(torch.linspace(-1, 1, trained.renderer.generator.dim_z).tolist())
    ObjectFile("house", z, {"azimuth": 0.0, "elevation": 0.0, "radius": 3.5}, "mine").write(tmp_path / "o.json")
    out = tmp_path / "set"
    arguments = ["--transforms", "2", "--object", str(tmp_path / "o.json"), "--resolution", "8", "--out", str(out)]
    assert main(["export", str(smoke_run.folder), *arguments]) == 0
    scene = json.loads((out / "transforms.json").read_text())
    assert (scene["graf"]["class"], scene["graf"]["object"]) == ("house", "house_mine")
    pose = torch.tensor(scene["frames"][0]["transform_matrix"])
    expected = trained.renderer.render(torch.tensor(z), "house", pose, resolution=8).rgb[0].permute(1, 2, 0)
    with Image.open(out / scene["frames"][0]["file_path"]) as picture:
        pixels = torch.from_numpy(np.array(picture)) / 255
    found = 2 * (pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:]) - 1  # over white
    torch.testing.assert_close(found, expected, rtol=0, atol=4 / 255)


def test_a_known_object_is_of_its_own_class_where_none_is_named(trained):
    names = ("car/red", "mug/blue")
    generator = copy.deepcopy(trained.renderer.generator)
    generator.instances = torch.nn.Parameter(torch.randn(2, generator.dim_z))
    known = replace(
        trained,
        renderer=replace(trained.renderer, generator=generator),
        dataset_info=replace(trained.dataset_info, instance_names=names),
    )
    for given in ("mug/blue", "1"):
        class_name, z, name = object_code(known, {"class_name": None, "seed": 0, "instance": given})
        assert (class_name, name) == ("mug", "mug_mug_blue")
        assert torch.equal(z, known.renderer.instance_codes([1])[0])
    assert object_code(known, {"class_name": "duck", "seed": 0, "instance": "1"})[0] == "duck"
    with pytest.raises(UserError, match=r"--instance 2: expected one of the objects .*: car/red, mug/blue"):
        object_code(known, {"class_name": None, "seed": 0, "instance": "2"})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--to", "pt2", "--object", "o.json"), "--object: chooses pictures"),
        (("--to", "onnx", "--seed", "3"), "--seed: chooses pictures"),
        (("--to", "pt2", "--class", "car"), "--class: chooses pictures"),
        (("--to", "pt2", "--truncation", "0.5"), "--truncation: chooses pictures"),
        (("--to", "safetensors", "--out", "model.bin"), "--out model.bin: a file of --to safetensors ends in"),
        (("--transforms", "3", "--class", "cat"), "class 'cat': expected a name"),
        (("--transforms", "3", "--resolution", "2"), "--resolution 2: expected 8 to 8192"),
        (("--transforms", "1"), "--transforms 1: expected at least 2"),
    ],
)
def test_what_cannot_be_done_is_one_line(smoke_run, capsys, arguments, expected):
    assert main(["export", str(smoke_run.folder), *arguments]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len([line for line in error if line.startswith("error:")]) == 1
    assert error[-1].startswith(f"error: {expected}")


def test_averages_are_no_state_to_train_on(capsys):
    assert main(["train", "--config", "smoke", "--resume", "model.safetensors"]) == 1
    assert "training goes on from a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["export", "card"])
def test_help_needs_neither_torch_nor_an_extra(command):
    missing = "torch", "safetensors", "onnx", "huggingface_hub"
    code = f"import sys\nfor name in {missing}: sys.modules[name] = None\n"
    code += f"from graf.app.command_line import main\nmain([{command!r}, '--help'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: graf {command}")
