"""`graf view` as people type it: it serves, follows, warns, writes its page, and says what is wrong."""

import atexit
import json
import math
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from graf.app import mesh_page, viewing
from graf.app.loading import open_checkpoint
from graf.app.runs import RunFolder
from graf.app.view_command import main
from graf.app.viewing import CAMERAS_PER_CLASS, ViewOptions, find_photographs
from graf.base.errors import UserError
from graf.base.extras import name_install_command
from graf.config import ConfigError
from graf.evaluation.renderer import Renderer
from graf.geometry.cameras import angles_from_pose, elevation_from_height, pose_from_angles
from graf.mesh import ColouredMesh, MeshOptions
from graf.mesh.extraction import EmptySurface
from graf.models.camera_refinement import STORED_FACTOR, CameraRefinement
from graf.runtime import interrupt
from graf.runtime.interrupt import STOP_SIGNALS, StopRequest
from graf.viewer.follow import sign

pytest.importorskip("viser")


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "graf", "view", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What the program prints up to the line that holds `text`."""
    lines = ""
    for line in process.stdout:
        lines += line
        if text in line:
            return lines
    raise AssertionError(f"{text!r} was not printed, but {lines}")


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Signals are answered as before when a command that was asked to stop in this process has ended."""
    former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    atexit.unregister(interrupt._fall_deaf)
    for number, handler in former.items():
        signal.signal(number, handler)


def test_a_run_is_served_on_this_machine_only_until_ctrl_c(smoke_run):
    with started(str(smoke_run.folder), "--device", "cpu", "--port", "18280") as process:
        printed = read_until(process, "open http://localhost:")
        port = int(printed.rpartition("localhost:")[2].split(" ")[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=10) as answer:
            assert b"<html" in answer.read()[:200]
        assert "password" not in printed
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 0


def test_another_host_is_warned_about_and_sigterm_ends_the_viewer_as_ctrl_c_does(
    smoke_run, restored_process, own_signals, caplog, monkeypatch
):
    """In this process, which it leaves without a thread."""
    monkeypatch.setattr(viewing.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
    arguments = [str(smoke_run.folder), "--device", "cpu", "--host", "0.0.0.0", "--port", "18290"]
    with socket.create_server(("0.0.0.0", 18290)):  # so that the next port is used
        assert main(arguments) == 0
    assert "--host 0.0.0.0: whoever reaches this address can use the viewer" in caplog.text
    assert "`ssh -L 18291:localhost:18291`" in caplog.text
    assert "open http://0.0.0.0:18291 in a browser" in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("graf-view")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_page_is_up_ends_what_gives_way(
    smoke_run, restored_process, own_signals, monkeypatch, number
):
    """Else the session of the terminal would go on giving way."""
    seen: list[str] = []

    @contextmanager
    def give_way() -> Iterator[None]:
        seen.append("begun")
        try:
            yield
        finally:
            seen.append("ended")

    Path("run").mkdir()
    shutil.copy(smoke_run.folder / "config.yaml", "run")
    monkeypatch.setattr(viewing, "give_way", give_way)
    monkeypatch.setattr(viewing.time, "sleep", lambda seconds: signal.raise_signal(number))
    assert main(["run", "--follow"]) == 0
    assert seen == ["begun", "ended"]


def test_a_run_in_training_is_followed_from_its_first_checkpoint_on(smoke_run, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(smoke_run.folder / "config.yaml", run)
    saved = {file.name: file for file in (smoke_run.folder / "checkpoints").glob("*.pt")}
    assert {"backup_00000004.pt", "model_00000006.pt"} <= set(saved)
    with started(str(run), "--follow", "--device", "cpu", "--port", "18300") as process:
        read_until(process, "waiting for the first one")
        (run / "half").write_bytes(b"a disk that was full")
        (run / "half").rename(run / "checkpoints" / "backup_00000005.pt")
        read_until(process, "waiting for the next one")
        put(saved["backup_00000004.pt"], run / "checkpoints")
        printed = read_until(process, "open http://")
        assert "backup_00000004.pt is used instead" in printed
        assert "iteration 4" in printed
        if sys.platform == "linux":
            niceness = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[16]
            assert niceness == "19"
        put(saved["model_00000006.pt"], run / "checkpoints")
        assert "model_00000006.pt" in read_until(process, "iteration 6")


def put(file: Path, folder: Path) -> None:
    """As training saves: the name appears when the file is whole."""
    shutil.copy(file, folder / "half")
    (folder / "half").rename(folder / file.name)


def test_one_page_holds_a_mesh_of_each_class_that_has_a_surface(smoke_run, restored_process, monkeypatch, caplog):
    """Six iterations make no surface, so the meshes are given; one class has none."""
    pytest.importorskip("skimage")

    def extract(renderer: Renderer, z: torch.Tensor, class_name: str, options: MeshOptions) -> ColouredMesh:
        if class_name == "mug":
            raise EmptySurface("there is nothing")
        assert options.resolution == 24
        assert torch.equal(z, renderer.codes(3, range(1))[0])
        corners = np.eye(3, dtype=np.float32)
        return ColouredMesh(corners, np.array([[0, 1, 2]], np.int32), corners, corners)

    monkeypatch.setattr(mesh_page, "extract_mesh", extract)
    arguments = ["--device", "cpu", "--html", "page.html", "--resolution", "24", "--seed", "3"]
    assert main([str(smoke_run.folder), *arguments]) == 0
    text = Path("page.html").read_text(encoding="utf-8")
    assert [name for name in ("car", "duck", "house", "mug") if f'"name": "{name}"' in text] == ["car", "duck", "house"]
    assert "class mug is left out: there is nothing" in caplog.text


def test_no_page_is_written_where_no_class_has_a_surface(smoke_run, restored_process, monkeypatch, capsys):
    pytest.importorskip("skimage")

    def extract(*given: object) -> ColouredMesh:
        raise EmptySurface("there is nothing")

    monkeypatch.setattr(mesh_page, "extract_mesh", extract)
    assert main([str(smoke_run.folder), "--device", "cpu", "--html", "page.html"]) == 1
    assert "no class has a surface for seed 0" in capsys.readouterr().err
    assert not Path("page.html").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"port": 0}, "--port=0"),
        ({"height": 5000}, "--height=5000: expected 16 to 2048"),
        ({"truncation": 2}, "--truncation=2"),
        ({"follow": True, "html": "x.html"}, "--follow and --html"),
        ({"height": 64, "html": "x.html"}, "--height and --html: a page that is written is not served"),
        ({"resolution": 64}, "--resolution: is that of the meshes of --html"),
        ({"follow": True, "run": "model_best.pt"}, "expected the folder of a run"),
    ],
)
def test_options_out_of_range_are_told(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        ViewOptions(**changes)


def test_a_missing_extra_is_one_line_that_names_the_command(restored_process, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "viser", None)
    assert main(["nowhere"]) == 1
    assert capsys.readouterr().err.endswith(f"viser is not installed; run: {name_install_command('viewer')}\n")


def test_following_leaves_the_gpu_to_training(smoke_run, monkeypatch):
    opened = []
    monkeypatch.setattr(viewing, "open_first", lambda folder, files, device, truncation: opened.append(device))
    for device in ("auto", "cuda"):
        viewing.open_followed(ViewOptions(str(smoke_run.folder), follow=True, device=device), StopRequest())
    assert opened == ["cpu", "cuda"]


def test_a_checkpoint_that_is_saved_while_the_first_one_is_read_is_new(smoke_run, tmp_path, monkeypatch):
    run = shutil.copytree(smoke_run.folder, tmp_path / "run")
    newer = run / "checkpoints" / "model_00000006.pt"
    newer.rename(run / "newer")
    (run / "checkpoints" / "model_best.pt").unlink()

    def open_slowly(*given):
        (run / "newer").rename(newer)

    monkeypatch.setattr(viewing, "open_first", open_slowly)
    _, seen = viewing.open_followed(ViewOptions(str(run), follow=True), StopRequest())
    assert {name for name, _, _ in sign([newer]) - seen} == {"model_00000006.pt"}


def test_a_checkpoint_that_goes_while_others_are_ordered_is_the_last(smoke_run, tmp_path, monkeypatch):
    """As training removes older ones."""
    folder = RunFolder(shutil.copytree(smoke_run.folder, tmp_path / "run"))
    gone = folder.checkpoints / "backup_00000001.pt"
    files = [gone, *folder.saved()]
    monkeypatch.setattr(RunFolder, "saved", lambda self: files)
    assert folder.newest_first()[-1] == gone


def test_a_run_that_is_not_there_is_told(restored_process, capsys, monkeypatch):
    assert main(["nowhere"]) == 1
    assert "nowhere: no run is there" in capsys.readouterr().err
    monkeypatch.setattr("os.nice", lambda increment: 0)  # of this process, which could not take it back
    assert main(["nowhere", "--follow"]) == 1
    assert "nowhere: no run is there" in capsys.readouterr().err


def test_training_cameras_have_their_photographs_where_these_are_at_hand(smoke_run, restored_process, monkeypatch):
    trained = open_checkpoint([smoke_run.folder / "checkpoints" / "model_00000006.pt"], torch.device("cpu"))
    renderer, info = trained.renderer, trained.dataset_info
    photographs = find_photographs(renderer, info, str(smoke_run.data))
    per_class = [sum(1 for photograph in photographs if photograph.class_name == name) for name in ("car", "mug")]
    assert 0 < min(per_class) <= max(per_class) <= CAMERAS_PER_CLASS
    assert all(photograph.thumbnail.shape == (64, 64, 3) for photograph in photographs)
    assert all(photograph.thumbnail.dtype == np.uint8 for photograph in photographs)
    radii = torch.stack([photograph.camera_to_world[:3, 3].norm() for photograph in photographs])
    assert radii.allclose(torch.tensor(renderer.config.data.radius))

    def refuse(config: object) -> None:
        raise ConfigError("data.near=9: the cameras stand 3 from the origin")

    with monkeypatch.context() as patch:
        patch.setattr(viewing.builders, "open_photographs", refuse)
        unusable = find_photographs(renderer, info, str(smoke_run.data))
    assert all(photograph.thumbnail is None for photograph in unusable)
    assert unusable

    bare = find_photographs(renderer, info, "elsewhere")
    assert len(bare) == len(info.class_names) * len(info.v_list) * 8
    assert all(photograph.thumbnail is None for photograph in bare)
    assert not Path("elsewhere").exists()  # a viewer draws no data set
    (own,) = smoke_run.data.glob("synthetic_*")
    shutil.copytree(own, Path("elsewhere", "synthetic_of_another_run"))
    assert find_photographs(renderer, info, "elsewhere")[0].thumbnail is None
    assert [folder.name for folder in Path("elsewhere").iterdir()] == ["synthetic_of_another_run"]


def test_posed_photographs_are_found_where_their_folder_has_moved(smoke_run, tmp_path):
    """Their class is named after the folder that they were in."""
    poses = pose_from_angles(torch.rand(2), torch.full((2,), 0.3), 3.5)
    frames = [{"file_path": f"{number}.png", "transform_matrix": pose.tolist()} for number, pose in enumerate(poses)]
    for number in range(2):
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{number}.png")
    (tmp_path / "transforms.json").write_text(json.dumps({"camera_angle_x": 0.5, "frames": frames}))
    trained = open_checkpoint([smoke_run.folder / "checkpoints" / "model_00000006.pt"], torch.device("cpu"))
    data = trained.renderer.config.data.model_copy(update={"type": "transforms", "heldout_every": 0})
    config = trained.renderer.config.model_copy(update={"data": data})
    info = replace(trained.dataset_info, class_names=("desk",), instance_names=())
    found = find_photographs(replace(trained.renderer, config=config), info, str(tmp_path))
    assert [photograph.class_name for photograph in found] == ["desk", "desk"]
    assert torch.equal(torch.stack([photograph.camera_to_world for photograph in found]), poses)
    assert all(photograph.thumbnail is not None for photograph in found)


def test_training_cameras_stand_where_training_has_found_them(smoke_run):
    """With and without photographs, also where the folder has a class that the run does not know."""
    trained = open_checkpoint([smoke_run.folder / "checkpoints" / "model_00000006.pt"], torch.device("cpu"))
    renderer, info = trained.renderer, replace(trained.dataset_info, class_names=("car", "duck", "house"))
    cameras = CameraRefinement(len(info.class_names), len(info.v_list)).requires_grad_(False)
    cameras.elevation += STORED_FACTOR * math.radians(5)
    renderer.generator.cameras = cameras
    learned = torch.tensor([elevation_from_height(v) + 5 for v in info.v_list])
    for datadir, has_thumbnails in ((str(smoke_run.data), True), ("elsewhere", False)):
        photographs = find_photographs(renderer, info, datadir)
        assert {photograph.thumbnail is not None for photograph in photographs} == {has_thumbnails}
        _, v = angles_from_pose(torch.stack([photograph.camera_to_world for photograph in photographs]))
        elevations = torch.tensor([elevation_from_height(float(height)) for height in v])
        is_learned = (elevations[:, None] - learned).abs() < 1e-3
        assert is_learned.any(dim=0).all()
        assert is_learned.any(dim=1).all()
