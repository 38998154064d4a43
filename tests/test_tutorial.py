"""Every command of docs/tutorial.md, in its order, in one folder, on a smaller video and for two iterations."""

import importlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from graf.app.command_line import main as graf

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TUTORIAL, re.DOTALL) for line in block.splitlines()]
MADE = ("photos/labels.csv", "doctor/overlay.png", "duck.glb", "duck.ply", "duck.stl", "objects.html", "card/README.md")

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


def test_every_command_of_the_tutorial_works_in_its_order(tmp_path, restored_process, capsys):
    """In this process, by the functions that the programs call: importing torch ten times would be most of the time."""
    for extra in ("cv2", "viser", "skimage", "scipy", "huggingface_hub", "safetensors"):
        pytest.importorskip(extra)
    for command in COMMANDS:
        shorter = next((keys for start, keys in SHORTER.items() if command.startswith(start)), "")
        program, *words = shlex.split(f"{command} {shorter}")
        if program == "pip":
            continue  # .ci/run installs the package
        if program == "graf" and words[0] == "view" and "--html" not in words:
            assert_serves([sys.executable, "-m", program, *words, "--port", str(free_port())], tmp_path)
            continue
        if program == "graf":
            code = graf(words)
        else:
            assert (program, words[0]) == ("python", "-m")
            code = importlib.import_module(words[1]).main(words[2:])
        assert code == 0, f"{command}\n{capsys.readouterr()}"
    assert [name for name in MADE if not (tmp_path / name).is_file()] == []


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def assert_serves(command: list[str], cwd: Path) -> None:
    """The viewer says its address, and ends on Ctrl-C."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    giving_up = threading.Timer(60, process.kill)
    giving_up.start()
    try:
        assert process.stdout is not None
        seen = ""
        for line in process.stdout:
            seen += line
            if "http://" in line:
                break
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
        assert "http://localhost:" in seen or "http://127.0.0.1:" in seen, seen + rest
        assert process.returncode in (0, 130), seen + rest
    finally:
        giving_up.cancel()
        process.kill()
        process.wait()
