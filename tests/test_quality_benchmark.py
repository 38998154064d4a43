"""The quality benchmark reads its curves as it says, and writes its section and picture."""

from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.quality import Point, first_crossing


def test_a_crossing_is_interpolated_between_measurements():
    curve = [Point(10.0, 40, 18.0, 0.5), Point(20.0, 80, 22.0, 0.6), Point(40.0, 160, 23.0, 0.7)]
    assert first_crossing(curve, 20.0) == pytest.approx(15.0)
    assert first_crossing(curve, 22.5) == pytest.approx(30.0)
    assert first_crossing(curve, 17.0) == 10.0
    assert first_crossing(curve, 25.0) is None


SMALL = ("data.imsize=32", "data.synthetic.count=48", "ray_sampler.N_samples=256", "discriminator.ndf=8")
SMALL += ("nerf.plane_resolution=16", "nerf.netwidth=16", "evaluation.N_samples=8")


def test_the_section_and_the_picture_are_written(tmp_path: Path):
    names = ["MLP, drawn views", "+ opacity term: toys.yaml"]
    results = tmp_path / "RESULTS.md"
    arguments = ["--seconds", "0.5", "--datadir", str(tmp_path), "--results", str(results), "--levers", *names]
    assert quality.main([*arguments, "--", *SMALL]) == 0
    text = results.read_text()
    assert "## Time to a given quality" in text
    assert all(f"| {name} |" in text for name in names)
    assert (tmp_path / "quality.png").stat().st_size > 1000


def test_a_configuration_of_ones_own_is_measured_at_every_mark_and_at_its_end(tmp_path: Path):
    results = tmp_path / "RESULTS.md"
    keys = [*SMALL, f"data.datadir={tmp_path}", "training.max_iterations=12"]
    arguments = ["--seconds", "0.2", "1000", "--config", "toys.yaml", "--results", str(results)]
    assert quality.main([*arguments, "--", *keys]) == 0
    text = results.read_text()
    assert "## Time to a given quality: toys" in text
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| toys |")]
    after = [float(row[7].removesuffix("s ")) for row in rows]
    assert len(rows) == 2
    assert 0.2 <= after[0] < after[1] < 1000
    assert (tmp_path / "quality_toys.png").exists()
