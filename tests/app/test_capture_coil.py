"""COIL-100's photographs, 72 of an object in steps of 5 degrees, as a turntable of which nothing is known."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2")

from graf.app.capture_command import main
from graf.data.labels import natural_key, read_labels_csv

COIL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "coil100"


@pytest.mark.skipif(not COIL.is_dir(), reason="needs COIL-100's photographs")
@pytest.mark.parametrize("again", [0, 18])
def test_angles_of_photographs_are_found_in_their_order(restored_process, tmp_path, again):
    """A whole turn, and a turn and a quarter; the cloth is black, so that no masks are needed."""
    folder = tmp_path / "shots"
    folder.mkdir()
    files = sorted(COIL.glob("obj14__*.png"), key=lambda file: natural_key(file.name))
    for number, file in enumerate([*files, *files[:again]]):
        (folder / f"{number}.png").symlink_to(file)
    assert main([str(folder), "--class", "obj14", "--mask", "none", "--out", "photos"]) == 0
    rows = read_labels_csv(tmp_path / "photos" / "labels.csv")
    assert len(rows) == 72
    angles = np.array([row.angle for row in rows])
    errors = {}
    for sense in (1, -1):
        difference = (angles - sense * 5 * np.arange(72) + 180) % 360 - 180
        errors[sense] = np.abs(difference).mean()
    # The project takes COIL's angles for the camera's azimuth (configs/coil100.yaml, ccw), by which it trains to 31 dB.
    assert errors[1] < 3 < errors[-1]
