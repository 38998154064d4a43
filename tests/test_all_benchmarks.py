"""`python -m benchmarks.all` keeps its time and what has been measured, with pretended parts."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import all as all_benchmarks
from benchmarks.all import CPU_PARTS, GPU_PARTS, ROOT, Part, main, run_parts


def pretend(name: str, program: str, weight: float = 1.0) -> Part:
    """A part that runs a program, for which `results` is the file that it may write."""
    start = "from pathlib import Path; results = Path({!r}); "
    return Part(
        name,
        f"pretends {name}",
        weight,
        lambda folder, seconds: ["-c", start.format(str(folder / f"{name}.md")) + program],
    )


QUICK = "results.write_text('measured'); print('start'); print('the figure is 7')"


def read_rows(folder: Path) -> dict[str, list[str]]:
    """The table of the summary: part -> what, state, seconds, last line."""
    lines = (folder / "summary.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    return {row[0]: row[1:] for row in cells}


def test_a_part_that_hangs_is_ended_at_its_share_with_all_it_has_started_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(all_benchmarks, "GRACE", 0.2)
    child = "import signal, subprocess, sys, time; results.write_text('half'); "
    child += "own = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    child += "print(own.pid, flush=True); signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    parts = [
        pretend("quick", QUICK),
        pretend("hangs", child),
        pretend("fails", "raise SystemExit(3)"),
        pretend("last", QUICK),
    ]
    started = time.monotonic()
    assert not run_parts(parts, tmp_path, "# Pretended", 6.0, {})
    assert time.monotonic() - started < 10
    rows = read_rows(tmp_path)
    assert list(rows) == ["[quick](quick.md)", "[hangs](hangs.md)", "fails", "[last](last.md)"]
    what, state, _, last = rows["[quick](quick.md)"]
    assert (what, state, last) == ("pretends quick", "done", "the figure is 7")
    assert rows["[hangs](hangs.md)"][1].startswith("ended after its share of ")
    assert rows["fails"][1] == "failed with exit code 3: see fails.log"
    assert rows["[last](last.md)"][1] == "done"
    assert (tmp_path / "hangs.md").read_text() == "half"
    grandchild = Path(f"/proc/{rows['[hangs](hangs.md)'][3]}/stat")
    assert not grandchild.exists() or grandchild.read_text().split()[2] == "Z"


def test_a_part_has_the_time_that_others_have_left_it_and_none_begins_without(tmp_path, monkeypatch):
    monkeypatch.setattr(all_benchmarks, "GRACE", 0.0)
    shares: dict[str, float] = {}

    def part(name: str, weight: float) -> Part:
        return Part(name, "", weight, lambda folder, seconds: [shares.setdefault(name, seconds), "-c", ""][1:])

    assert run_parts([part("first", 1), part("second", 3)], tmp_path, "", 40.0, {})
    assert shares["first"] == pytest.approx(10, abs=0.1)
    assert 39 < shares["second"] < 40
    assert not run_parts([part("third", 1)], tmp_path, "", 0.0, {})
    assert "third" not in shares
    assert read_rows(tmp_path)["third"][1] == "no time was left"


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda sent: sent.name)
def test_a_kill_leaves_what_has_been_measured(tmp_path, sent):
    program = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
from benchmarks import all as all_benchmarks
from test_all_benchmarks import QUICK, pretend
slow = "results.write_text('half'); import time; time.sleep(8)"
all_benchmarks.describe_machine = lambda environment: "cpu"
all_benchmarks.CPU_PARTS = [pretend("quick", QUICK), pretend("slow", slow), pretend("never", QUICK)]
all_benchmarks.main(["--minutes", "1", "--into", {str(tmp_path)!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "slow.md").exists() and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(sent)
        process.wait(timeout=30)
    finally:
        process.kill()
    rows = read_rows(tmp_path)
    assert rows["[quick](quick.md)"][1] == "done"
    slow = next(cells for name, cells in rows.items() if "slow" in name)
    assert slow[1].startswith("running" if sent is signal.SIGKILL else "interrupted")
    assert rows["never"][1] == "not reached"


def test_a_machine_without_a_gpu_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(all_benchmarks, "describe_machine", lambda environment: "cpu (Pretended, 2 threads), torch 2")
    with pytest.raises(SystemExit) as ended:
        main(["--gpu", "--into", str(tmp_path / "results")])
    assert ended.value.code == (
        "error: --gpu: torch finds no CUDA GPU here, but cpu (Pretended, 2 threads), torch 2; leave it out to measure "
        "the CPU"
    )
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--parts", "tests"], "--parts tests: expected without --gpu some of throughput, memory, quality, scaling"),
        (
            ["--gpu", "--parts", "quality", "memory"],
            "--parts memory: expected with --gpu some of throughput, ",
        ),
    ],
)
def test_parts_that_do_not_run_here_are_refused(tmp_path, capsys, arguments, complaint):
    with pytest.raises(SystemExit):
        main([*arguments, "--into", str(tmp_path / "results")])
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("parts", [GPU_PARTS, CPU_PARTS], ids=["gpu", "cpu"])
def test_every_part_names_a_module_that_is_there_and_options_that_it_takes(tmp_path, parts):
    for part in parts:
        flag, module, *options = part.command(tmp_path, 60.0)
        assert flag == "-m"
        if module == "pytest":
            continue
        file = ROOT / f"{module.replace('.', '/')}.py"
        assert all(f'"{option}"' in file.read_text() for option in options if option.startswith("--")), part
