"""Every command of docs/tutorial.md, in its order, in one folder, on a smaller video and for two iterations."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TUTORIAL, re.DOTALL) for line in block.splitlines()]

#: what makes a command quick enough for a test, by how it begins
SHORTER = {
    "python -m benchmarks.videos": "--size 96 --frames 24",
    "graf capture": "--frames 16",
    "graf train": "--max_iterations 2 data.imsize=32 nerf.plane_resolution=16 nerf.density_scale=20 "
    "training.fid_every=0 training.monitoring=[]",
    "graf mesh": "--resolution 24 --level 1",
    "graf view results/photos --html": "--resolution 24",
    "graf card": "--frames 0",
}


def test_every_command_of_the_tutorial_works_in_its_order(tmp_path):
    for extra in ("cv2", "viser", "skimage", "trimesh", "huggingface_hub", "safetensors"):
        pytest.importorskip(extra)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in COMMANDS:
        if command.startswith("pip "):
            continue  # .ci/run installs the package
        shorter = next((keys for start, keys in SHORTER.items() if command.startswith(start)), "")
        words = shlex.split(f"{command} {shorter}")
        python = [sys.executable, *words[1:]] if words[0] == "python" else [sys.executable, "-m", *words]
        if command.startswith("graf view") and "--html" not in command:
            assert_serves([*python, "--port", str(free_port())], tmp_path, environment)
            continue
        result = subprocess.run(python, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    made = [
        "photos/labels.csv",
        "doctor/overlay.png",
        "duck.glb",
        "duck.ply",
        "duck.stl",
        "objects.html",
        "card/README.md",
    ]
    assert [name for name in made if not (tmp_path / name).is_file()] == []


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def assert_serves(command: list[str], cwd: Path, environment: dict[str, str]) -> None:
    """The viewer says its address, and ends on Ctrl-C."""
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seen = ""
    deadline = time.monotonic() + 60
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if "http://127.0.0.1:" in line or "http://localhost:" in line or time.monotonic() > deadline:
            break
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert "http://" in seen, seen + rest
    assert process.returncode in (0, 130), seen + rest
