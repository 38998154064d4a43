"""Patches of photographs are as sharp as renders where configurations read them, and are not where GRAF does."""

from pathlib import Path

import pytest
import torch

from benchmarks import spectrum


@pytest.fixture(scope="module")
def sharpness() -> dict[str, spectrum.Sharpness]:
    return spectrum.measure(2)


def test_the_energy_is_that_of_the_finer_frequencies_alone():
    columns = torch.arange(32.0)
    coarse, fine = (torch.sin(2 * torch.pi * frequency * columns).expand(1, 3, 32, 32) for frequency in (0.125, 0.375))
    assert spectrum.fine_energy(coarse) < 1e-3 * spectrum.fine_energy(fine)
    assert spectrum.fine_energy(fine + 5) == pytest.approx(spectrum.fine_energy(fine), rel=1e-3)


def test_patches_on_whole_pixels_are_what_a_perfect_field_shows_of_their_area(sharpness):
    assert sharpness["cells of 1 pixel, on whole pixels"].areas == pytest.approx(1, abs=1e-3)
    assert sharpness["cells of 2 pixels, on whole pixels"].areas == pytest.approx(1, abs=1e-3)


def test_interpolation_betrays_photographs_and_bicubic_less_than_bilinear(sharpness):
    for cells in ("1 pixel, anywhere", "2 pixels, between pixels"):
        bilinear, bicubic = (sharpness[f"cells of {cells}, {name}"].points for name in ("bilinear", "bicubic"))
        assert bilinear < 0.8 * bicubic


def test_the_section_is_written(tmp_path: Path):
    assert spectrum.main(["--views", "1", "--results", str(tmp_path / "RESULTS.md")]) == 0
    assert "| cells of 1 pixel, on whole pixels | " in (tmp_path / "RESULTS.md").read_text()
