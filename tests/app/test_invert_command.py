"""`graf invert` on a real run: what it writes can be used again by every command, and nothing of the run changes."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import graf
from graf.app import invert_command
from graf.app.card_tasks import describe_model
from graf.app.command_line import main
from graf.app.invert_command import choose_starts
from graf.app.run_arguments import object_code, open_run
from graf.base.errors import UserError
from graf.inversion.object_file import ObjectFile, fingerprint, read_object
from graf.runtime.checkpoint import read_checkpoint

QUICK = ("--codes", "0", "--steps", "3", "--perceptual", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def photograph(smoke_run, tmp_path_factory) -> Path:
    """A render of the run itself with transparency, of 48 x 40 pixels."""
    renders = graf.load(smoke_run.folder, device="cpu").sample(seed=3, class_name="duck", azimuth=80)
    alpha = (renders.opacity[0, 0] * 255).round().to(torch.uint8).numpy()
    file = tmp_path_factory.mktemp("photographs") / "my duck.png"
    Image.fromarray(np.dstack([renders.numpy()[0], alpha])).resize((48, 40)).save(file)
    return file


@pytest.fixture(scope="module")
def inverted(smoke_run, photograph, tmp_path_factory) -> Path:
    """The results of one inversion with tuning, of which tests only read."""
    folder = tmp_path_factory.mktemp("inverted")
    arguments = [str(smoke_run.folder), "--class", "duck", str(photograph), "--tune", "20", "--out", str(folder)]
    assert main(["invert", *arguments, *QUICK]) == 0
    return folder


def test_the_results_are_pictures_and_an_object_that_sample_takes(smoke_run, photograph, inverted):
    found = json.loads((inverted / "object.json").read_text())
    renderer = graf.load(smoke_run.folder, device="cpu")
    assert found["class_name"] == "duck"
    assert found["name"] == "my duck"
    assert found["photograph"]["file"] == photograph.name
    assert found["photograph"]["has_mask"] is True
    assert found["run"]["iteration"] == 6
    assert found["options"]["class_name"] == "duck"
    assert found["starts"] == {"duck": 1}
    assert found["weights"][0] == fingerprint(renderer.generator)
    render = renderer.sample(z=torch.tensor(found["z"]), class_name=found["class_name"], **found["camera"])
    assert render.rgb.shape == (1, 3, 32, 32)
    for name in ("comparison.png", "views.png"):
        with Image.open(inverted / name) as image:
            assert image.width > 4 * 160


def test_a_tuned_run_opens_as_any_other_and_shows_what_was_tuned(smoke_run, inverted, capsys, restored_process):
    found = read_object(inverted / "object.json")
    tuned, source = (graf.load(path, device="cpu") for path in (inverted / "tuned", smoke_run.folder))
    assert fingerprint(tuned.generator) == found.weights[1] != found.weights[0]
    arguments = {"z": found.code, "class_name": found.class_name, **found.camera}
    shown, before = tuned.sample(**arguments).rgb, source.sample(**arguments).rgb
    assert not torch.equal(shown, before)
    colours = json.loads((inverted / "object.json").read_text())
    assert colours["tuned"]["psnr"] > colours["psnr"]
    saved, original = (read_checkpoint(path)["meta"] for path in checkpoints(smoke_run, inverted))
    assert saved["tuned"]["photograph"] == "my duck"
    assert saved["dataset"] == original["dataset"]
    assert main(["eval", "--run", str(inverted / "tuned"), "--grid", "--views", "2", "--classes", "duck"]) == 0
    assert (inverted / "tuned" / "eval" / "grid_duck_rgb.png").is_file()


def checkpoints(smoke_run, inverted) -> tuple[Path, Path]:
    return inverted / "tuned" / "checkpoints" / "model_best.pt", smoke_run.folder / "checkpoints" / "model_00000006.pt"


def test_training_does_not_go_on_from_a_tuned_run_and_says_why(inverted, smoke_run, restored_process, capsys):
    config = inverted / "tuned" / "config.yaml"
    data = f"data.datadir={smoke_run.data}"
    assert main(["train", "--config", str(config), data]) == 1
    error = capsys.readouterr().err
    assert "is a generator tuned to one photograph" in error
    assert "--resume none" in error
    assert read_checkpoint(checkpoints(smoke_run, inverted)[0])["meta"]["tuned"]  # still there, under its name


def test_the_source_is_untouched_and_the_same_command_gives_the_same_object(
    smoke_run, photograph, inverted, tmp_path, restored_process
):
    before = {path: path.read_bytes() for path in smoke_run.folder.rglob("*") if path.is_file()}
    arguments = [str(smoke_run.folder), str(photograph), "--class", "duck", "--out", str(tmp_path)]
    torch.manual_seed(99)
    assert main(["invert", *arguments, *QUICK]) == 0
    assert {path: path.read_bytes() for path in smoke_run.folder.rglob("*") if path.is_file()} == before
    assert read_object(tmp_path / "object.json").z == read_object(inverted / "object.json").z
    assert not (tmp_path / "tuned").exists()


def test_all_classes_are_tried_where_none_is_named_and_lpips_may_be_missing(
    smoke_run, photograph, tmp_path, restored_process, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "lpips", None)
    arguments = [str(smoke_run.folder), str(photograph), "--out", str(tmp_path), *QUICK, "--perceptual", "0.1"]
    assert main(["invert", *arguments]) == 0
    said = capsys.readouterr()
    assert "next best class" in said.out
    assert "--perceptual: LPIPS is not available" in said.err
    others = json.loads((tmp_path / "object.json").read_text())["others"]
    assert len({other["class_name"] for other in others}) > 1


def test_a_found_object_is_an_object_of_other_commands(smoke_run, inverted, caplog, restored_process):
    file = inverted / "object.json"
    given = {"class_name": None, "seed": 0, "instance": None, "object_file": str(file)}
    for run, in_others in ((smoke_run.folder, "mug"), (inverted / "tuned", "duck")):
        trained = open_run(str(run), "cpu", 1.0).trained
        class_name, code, name = object_code(trained, given)
        assert (class_name, name) == ("duck", "duck_my duck")
        assert tuple(code.tolist()) == pytest.approx(read_object(file).z)
        assert object_code(trained, given | {"class_name": in_others})[0] == in_others
    assert "another generator" not in caplog.text
    with torch.no_grad():
        next(trained.renderer.generator.parameters()).add_(1)
    object_code(trained, given)
    assert "was found in another generator" in caplog.text


def test_a_file_that_describes_no_object_is_refused(smoke_run, inverted, tmp_path, restored_process):
    trained = open_run(str(smoke_run.folder), "cpu", 1.0).trained
    values = json.loads((inverted / "object.json").read_text())

    def refuses(text: str, expected: str) -> None:
        (tmp_path / "object.json").write_text(text)
        with pytest.raises(UserError, match=expected):
            object_code(trained, {"class_name": None, "object_file": str(tmp_path / "object.json")})

    refuses("{", "cannot be read")
    refuses("[" * 100_000, "cannot be read")
    refuses("[]", "describes no object")
    refuses(json.dumps(values | {"z": [10**400] * 8}), "describes no object")
    refuses(json.dumps(values | {"format": 9}), "format 9, this version reads 1")
    refuses(json.dumps(values | {"z": []}), "describes no object")
    refuses(json.dumps(values | {"z": [0.0] * 3}), "its code has 3 numbers, those of this run 8")
    refuses(json.dumps(values | {"z": [float("nan")] * 8}), "not finite")
    refuses(json.dumps(values | {"class_name": "boat"}), "class 'boat'")
    with pytest.raises(UserError, match="no such file"):
        read_object(tmp_path / "absent.json")


def test_an_object_survives_its_file(tmp_path):
    camera = {"azimuth": 10.0, "elevation": 20.0, "radius": 3.5}
    written = ObjectFile("duck", (0.1, -0.2), camera, "photo", ("a",), {"psnr": 20.0})
    written.write(tmp_path / "object.json")
    assert read_object(tmp_path / "object.json") == written


def test_what_cannot_be_done_is_one_line(smoke_run, photograph, tmp_path, restored_process, capsys):
    run, photo = str(smoke_run.folder), str(photograph)
    for arguments, expected in (
        ((run, photo, "--class", "dck"), "class 'dck': expected a name or an index of car, duck, house, mug; did you"),
        ((run, "absent.png"), "absent.png: no such file"),
        ((run, photo, "--crop", "0"), "--crop 0: expected at least 1"),
        ((run, photo, "--tune", "0"), "--tune 0: expected at least 1"),
        ((run, photo, "--truncation", "2"), "truncation=2.0: expected 0 to 1"),
        (("nowhere", photo), "nowhere: no run is there"),
    ):
        assert main(["invert", *arguments, "--out", str(tmp_path / "out"), *QUICK]) == 1
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("error:") == 1
    assert not (tmp_path / "out").exists()


def test_a_class_of_which_no_object_is_known_is_searched_from_drawn_codes(smoke_run, restored_process):
    trained = open_run(str(smoke_run.folder), "cpu", 1.0).trained
    trained.renderer.generator.instances = torch.nn.Parameter(torch.randn(2, trained.renderer.generator.dim_z))
    known = replace(
        trained, dataset_info=replace(trained.dataset_info, instance_names=("car/red", "car/blue")), tuned={}
    )
    starts = choose_starts(known, None, count=3, seed=0)
    assert [len(starts[number]) for number in range(4)] == [1 + 3 + 2, 1 + 3, 1 + 3, 1 + 3]
    torch.testing.assert_close(starts[0][1:3], known.renderer.instance_codes([0, 1]))


def test_all_classes_share_one_number_of_starts_and_what_is_left_out_is_said(
    smoke_run, restored_process, monkeypatch, caplog
):
    trained = open_run(str(smoke_run.folder), "cpu", 1.0).trained
    trained.renderer.generator.instances = torch.nn.Parameter(torch.randn(3, trained.renderer.generator.dim_z))
    names = ("car/red", "car/blue", "car/green")
    known = replace(trained, dataset_info=replace(trained.dataset_info, instance_names=names))
    monkeypatch.setattr(invert_command, "MOST_STARTS", 12)
    caplog.clear()
    with caplog.at_level("INFO", "graf"):
        starts = choose_starts(known, None, count=5, seed=0)
    assert [len(starts[number]) for number in range(4)] == [3, 3, 3, 3]
    torch.testing.assert_close(starts[0], torch.cat([torch.zeros(1, 8), known.renderer.instance_codes([0, 1])]))
    torch.testing.assert_close(starts[1], torch.cat([torch.zeros(1, 8), known.renderer.codes(0, range(2))]))
    assert caplog.messages == [
        "12 of 27 codes are screened, at most 3 of each class: the mean, known ones, drawn ones, in this order"
    ]
    caplog.clear()
    assert sum(map(len, choose_starts(known, "duck", count=11, seed=0).values())) == 12
    assert caplog.messages == []


def test_a_photograph_is_never_replaced_by_a_result(smoke_run, photograph, tmp_path, restored_process, capsys):
    mine = tmp_path / "comparison.png"
    shutil.copyfile(photograph, mine)
    assert main(["invert", str(smoke_run.folder), str(mine), "--out", str(tmp_path), *QUICK]) == 1
    assert "comparison.png: would be replaced by a result of that name" in capsys.readouterr().err
    assert mine.read_bytes() == photograph.read_bytes()


def test_what_a_tuned_run_is_handed_on_as_says_so_without_places_of_this_machine(
    smoke_run, inverted, tmp_path, restored_process
):
    pytest.importorskip("safetensors")
    file = tmp_path / "model.safetensors"
    assert main(["export", str(inverted / "tuned"), "--to", "safetensors", "--out", str(file)]) == 0
    opened = open_run(str(file), "cpu", 1.0)
    assert opened.trained.tuned == {"photograph": "my duck", "from": "model_best.pt"}
    assert open_run(str(smoke_run.folder), "cpu", 1.0).trained.tuned == {}
    assert "tuned to one photograph (`graf invert --tune`), called `my duck`" in describe_model(opened, [], False).data
    assert "tuned" not in describe_model(open_run(str(smoke_run.folder), "cpu", 1.0), [], False).data
    # and it can be tuned once more
    arguments = [str(file), str(inverted / "comparison.png"), "--class", "duck", "--tune", "1", "--mask", "none"]
    assert main(["invert", *arguments, "--out", str(tmp_path / "again"), *QUICK]) == 0
    again = read_checkpoint(tmp_path / "again" / "tuned" / "checkpoints" / "model_best.pt")["meta"]
    assert again["tuned"] == {"photograph": "comparison", "from": str(file)}


def test_a_run_of_training_is_never_replaced_by_a_tuned_one(smoke_run, photograph, tmp_path, restored_process, capsys):
    shutil.copytree(smoke_run.folder / "checkpoints", tmp_path / "tuned" / "checkpoints")
    before = {path.name: path.read_bytes() for path in (tmp_path / "tuned" / "checkpoints").iterdir()}
    arguments = [str(smoke_run.folder), str(photograph), "--class", "duck", "--out", str(tmp_path), "--tune", "1"]
    assert main(["invert", *arguments, *QUICK]) == 1
    assert "holds a run of training" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "tuned" / "checkpoints").iterdir()} == before
