"""Claims about which release of torch may read whose files."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from graf.base.errors import UserError
from graf.runtime.device import pick_device
from graf.runtime.torch_release import UntrustedFile, find_hole, require_trust, torch_release

PretendRelease = Callable[[str], None]


@pytest.mark.parametrize(
    ("version", "expected"),
    [("1.13.1+cu117", (1, 13)), ("2.1.2", (2, 1)), ("2.10.0a0+git12ab", (2, 10)), ("2.15.0.dev20270101", (2, 15))],
)
def test_a_release_is_two_numbers(pretend_release: PretendRelease, version: str, expected: tuple[int, int]) -> None:
    pretend_release(version)
    assert torch_release() == expected


@pytest.mark.parametrize("numpy", ["1.26.4", "2.0.0", "2.5.5"])
@pytest.mark.parametrize("version", ["1.13.1", "2.1.2", "2.2.2+cpu", "2.3.0", "2.15.0"])
def test_a_numpy_that_torch_does_not_know_is_said_before_anything_is_computed(
    pretend_release: PretendRelease, monkeypatch: pytest.MonkeyPatch, version: str, numpy: str
) -> None:
    pretend_release(version)
    monkeypatch.setattr(np, "__version__", numpy)
    if numpy == "1.26.4" or version in ("2.3.0", "2.15.0"):
        pick_device("cpu")
        return
    with pytest.raises(UserError, match=rf"does not work with NumPy {numpy}.*pip install \"numpy<2\""):
        pick_device("cpu")


@pytest.mark.parametrize("version", ["1.13.1", "2.1.2+cpu", "2.5.1"])
def test_below_2_6_a_foreign_file_can_run_code(pretend_release: PretendRelease, version: str) -> None:
    pretend_release(version)
    with pytest.raises(UntrustedFile) as caught:
        require_trust("downloads/model.pt", trust=False)
    message = str(caught.value)
    assert message.startswith("downloads/model.pt: is not from a run folder")
    assert f"with torch {version} such a file can run code when it is loaded (CVE-2025-32434)" in message
    assert "update torch to 2.10 or newer" in message
    assert ".safetensors" in message
    assert "--trust" in message
    assert "\n" not in message


@pytest.mark.parametrize("version", ["2.6.0", "2.9.1+cu128"])
def test_below_2_10_a_foreign_file_can_corrupt_memory(pretend_release: PretendRelease, version: str) -> None:
    pretend_release(version)
    with pytest.raises(UntrustedFile, match=r"can corrupt memory when it is loaded \(CVE-2026-24747\)"):
        require_trust("model.pt", trust=False)


@pytest.mark.parametrize("version", ["2.10.0", "2.15.0", "3.0.0"])
def test_a_new_torch_takes_every_file(
    pretend_release: PretendRelease, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    pretend_release(version)
    assert find_hole() is None
    for trust in (False, True):
        require_trust("model.pt", trust)
    assert not caplog.records


@pytest.mark.parametrize("version", ["1.13.1", "2.1.2", "2.6.0"])
def test_safetensors_hold_no_code_for_any_torch(
    pretend_release: PretendRelease, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    pretend_release(version)
    require_trust("model.safetensors", trust=False)
    assert not caplog.records


def test_trust_lets_a_file_in_and_is_logged_once(
    pretend_release: PretendRelease, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_release("2.1.2")
    for _ in range(3):
        require_trust("model.pt", trust=True)
    assert len(caplog.records) == 1
    assert "model.pt: trusted as you said, though with torch 2.1.2" in caplog.text
