"""`graf eval --path`: a camera path that the viewer saved becomes a video of its length."""

import subprocess
from dataclasses import replace

import imageio_ffmpeg
import pytest
import torch

from graf.evaluation.camera_paths import CameraPath, Keyframe, write_path
from graf.geometry.cameras import pose_from_angles


def make_path(dim_z: int, class_name: str = "duck") -> CameraPath:
    poses = pose_from_angles(torch.tensor([0.0, 0.3]), torch.tensor([0.3, 0.2]), 3.5)
    return CameraPath(tuple(Keyframe(pose, 30.0, class_name, torch.zeros(dim_z)) for pose in poses), 0.5, True, 1.5)


def test_a_path_becomes_a_video_of_its_length_and_shape(smoke_run, run_program, tmp_path, capsys):
    path = make_path(8)
    write_path(tmp_path / "around.json", path)
    arguments = ["--run", smoke_run.folder, "--device", "cpu", "--fps", "12", "--resolution", "20"]
    assert run_program("eval.py", *arguments, "--path", tmp_path / "around.json") == 0
    video = smoke_run.folder / "eval" / "around.mp4"
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {video}"
    assert imageio_ffmpeg.count_frames_and_secs(str(video)) == (12, pytest.approx(1.0, abs=0.1))
    description = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", video], capture_output=True, text=True).stderr
    assert ", 30x20" in description


def test_a_path_and_a_turn_of_one_name_are_two_videos(smoke_run, run_program, tmp_path, capsys):
    write_path(tmp_path / "rotation.json", make_path(8))
    arguments = ["--run", smoke_run.folder, "--device", "cpu", "--fps", "4", "--frames", "2", "--classes", "car"]
    assert run_program("eval.py", *arguments, "--rotation", "--path", tmp_path / "rotation.json") == 0
    written = [smoke_run.folder / "eval" / name for name in ("rotation.mp4", "path_rotation.mp4")]
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {written[0]} {written[1]}"


def test_a_path_too_wide_for_a_video_is_told(smoke_run, run_program, tmp_path, capsys):
    write_path(tmp_path / "wide.json", replace(make_path(8), aspect=10.0))
    arguments = ["--run", smoke_run.folder, "--device", "cpu", "--resolution", "1700", "--path", tmp_path / "wide.json"]
    assert run_program("eval.py", *arguments) == 1
    assert "a video of 17000 x 1700 pixels: H.264 takes at most 16384" in capsys.readouterr().err


def test_a_path_of_another_run_is_told(smoke_run, run_program, tmp_path, capsys):
    write_path(tmp_path / "other.json", make_path(7))
    arguments = ["--run", smoke_run.folder, "--device", "cpu", "--path", tmp_path / "other.json"]
    assert run_program("eval.py", *arguments) == 1
    assert "its code has 7 numbers and those of this run have 8" in capsys.readouterr().err
    assert not (smoke_run.folder / "eval" / "other.mp4").exists()
