"""The offline extractor is fixed and ranks distortions; Inception weights are found, verified and downloaded safely."""

import hashlib
import http.server
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torch_fidelity import feature_extractor_inceptionv3

from graf.evaluation import extractor as extractor_module
from graf.evaluation.extractor import (
    OFFLINE,
    OFFLINE_DIMENSIONS,
    ExtractorError,
    OfflineFeatures,
    choose_extractor,
    draw_kernels,
)
from graf.evaluation.fidelity import FidelityProtocol, TensorImages, score_images

# A new hash makes old scores incomparable: change the extractor's name ("graf-offline-v1") with it.
OFFLINE_HASH = "38a6ebc3ed2aa7d0b9172398d63d5ddb09c8608386ff26b3671d79c0b18a22f1"
CONTENT = b"these bytes stand for the Inception weights" * 1000
FILE_NAME = "weights-inception-2015-12-05-6726825d.pth"
PROTOCOL = FidelityProtocol(seed=0, batch_size=64, kid_subsets=100, kid_subset_size=1000)


def extract(images: Tensor) -> Tensor:
    return OfflineFeatures()(images)


def draw_discs(count: int, seed: int, size: int = 32) -> Tensor:
    """Striped discs of random place, radius and colour on white: uint8 (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    axis = torch.arange(size) / size
    y, x = axis.view(1, size, 1), axis.view(1, 1, size)
    centre, radius = 0.35 + 0.3 * uniform(count, 2, 1, 1), 0.15 + 0.15 * uniform(count, 1, 1)
    inside = ((x - centre[:, 0]) ** 2 + (y - centre[:, 1]) ** 2 < radius**2)[:, None]
    stripes = 0.8 + 0.2 * torch.sin(40.0 * x + 6.0 * uniform(count, 1, 1))[:, None]
    return torch.where(inside, uniform(count, 3, 1, 1) * stripes * 255.0, 255.0).to(torch.uint8)


def blur(images: Tensor, passes: int) -> Tensor:
    blurred = images.float()
    for _ in range(passes):
        blurred = F.avg_pool2d(F.pad(blurred, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return blurred.round().to(torch.uint8)


def kid(real: Tensor, fake: Tensor) -> float:
    scores = score_images(
        TensorImages(real), TensorImages(fake), choose_extractor("offline"), PROTOCOL, torch.device("cpu")
    )
    return scores.values["kid_offline"]


def test_kid_ranks_blur_mean_image_and_noise() -> None:
    real, other = draw_discs(200, seed=0), draw_discs(200, seed=1)
    mean = real.float().mean(dim=0, keepdim=True).round().to(torch.uint8).expand_as(other)
    noise = torch.randint(0, 256, other.shape, generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    ranked = [kid(real, fake) for fake in (other, blur(other, 1), blur(other, 6), mean, noise)]
    assert abs(ranked[0]) < 0.1 * ranked[1]
    assert ranked == sorted(ranked)


def test_kid_sees_a_collapse_onto_one_image() -> None:
    real, other = draw_discs(100, seed=0), draw_discs(100, seed=1)
    assert kid(real, other[:1].expand_as(other)) > 10 * abs(kid(real, other))


def test_features_of_an_image_do_not_depend_on_its_batch_or_on_the_global_seed() -> None:
    images = draw_discs(5, seed=0)
    torch.manual_seed(1)
    together = extract(images)
    torch.manual_seed(2)
    alone = torch.cat([extract(image[None]) for image in images])
    assert together.shape == (5, OFFLINE_DIMENSIONS)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (128, 128)])
def test_any_resolution_from_16_gives_finite_features(size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.isfinite(extract(images)).all()


def test_an_image_of_one_colour_has_no_texture_and_layout_equal_to_the_colour() -> None:
    grey = extract(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))[0]
    torch.testing.assert_close(grey[:51], torch.ones(51))  # thumbnail and mean colour
    assert grey[51:].abs().max() < 1e-5  # no spread of colour, no response of kernels that sum to zero


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 32, 32), "uint8"),
        (torch.zeros(1, 1, 32, 32, dtype=torch.uint8), "3, H, W"),
        (torch.zeros(1, 3, 15, 32, dtype=torch.uint8), "at least 16"),
    ],
)
def test_offline_features_refuse_other_inputs(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(images)


def test_the_offline_weights_are_these_ones_on_every_machine() -> None:
    assert choose_extractor("offline").hash == OFFLINE_HASH
    assert draw_kernels()[0].sum(dim=(1, 2, 3)).abs().max() < 1e-5


def test_offline_features_are_cheap() -> None:
    with FlopCounterMode(display=False) as counter:
        extract(draw_discs(2, seed=0, size=64))
    inception = 11.4e9  # operations of an image, two to a multiply-add
    assert 0 < counter.get_total_flops() / 2 < 0.05 * inception


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache, a hash that only CONTENT has, and a URL at which nothing listens."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(extractor_module, "INCEPTION_SHA256", hashlib.sha256(CONTENT).hexdigest())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(extractor_module, "URL_INCEPTION_V3", f"http://127.0.0.1:{port}/{FILE_NAME}")
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def serve(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """Serve what the test puts under "body" at the weights' URL."""
    answer = {"body": CONTENT}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer["body"])))
            self.end_headers()
            self.wfile.write(answer["body"])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setattr(extractor_module, "URL_INCEPTION_V3", f"http://127.0.0.1:{server.server_port}/{FILE_NAME}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield answer
        server.shutdown()
        thread.join()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(extractor_module, "warn_once", lambda message, key=None: lines.append(message))
    monkeypatch.setattr(extractor_module, "info_once", lambda message, key=None: None)
    return lines


def test_weights_are_taken_from_the_configured_path_before_the_hub(hub: Path, tmp_path: Path) -> None:
    hub.mkdir(parents=True)
    (hub / FILE_NAME).write_bytes(CONTENT)
    assert choose_extractor("inception", None, allow_download=False).weights_path == hub / FILE_NAME
    configured = tmp_path / "own.pth"
    configured.write_bytes(CONTENT)
    assert choose_extractor("inception", str(configured), allow_download=False).weights_path == configured


def test_a_file_with_another_hash_is_never_used(hub: Path, tmp_path: Path, said: list[str]) -> None:
    configured = tmp_path / "own.pth"
    configured.write_bytes(CONTENT + b"!")
    assert choose_extractor("auto", str(configured), allow_download=False).suffix == "_offline"
    assert len(said) == 1
    assert str(configured) in said[0]
    assert "sha256" in said[0]


def test_a_configured_path_that_is_passed_over_is_reported(hub: Path, said: list[str]) -> None:
    hub.mkdir(parents=True)
    (hub / FILE_NAME).write_bytes(CONTENT)
    chosen = choose_extractor("auto", "/nowhere/weights.pth", allow_download=False)
    assert chosen.weights_path == hub / FILE_NAME
    assert said == [
        f"Inception weights: /nowhere/weights.pth: No such file or directory; using {hub / FILE_NAME} instead"
    ]


def test_auto_without_weights_or_network_says_so_in_one_line_and_is_quick(hub: Path, said: list[str]) -> None:
    start = time.perf_counter()
    chosen = choose_extractor("auto")
    assert time.perf_counter() - start < 5
    assert (chosen.name, chosen.suffix, chosen.weights_path) == (OFFLINE, "_offline", None)
    assert len(said) == 1
    assert "\n" not in said[0]
    assert "download failed" in said[0]
    assert "fid_offline" in said[0]


def test_inception_without_weights_says_where_it_looked_and_what_to_do(hub: Path) -> None:
    with pytest.raises(ExtractorError) as caught:
        choose_extractor("inception", allow_download=False)
    message = str(caught.value)
    assert str(hub / FILE_NAME) in message
    assert "evaluation.feature_extractor=offline" in message
    assert "Download http" in message


def test_an_unknown_kind_is_named_with_the_known_ones() -> None:
    with pytest.raises(ExtractorError, match="feature_extractor=clip: expected one of auto, inception, offline"):
        choose_extractor("clip")


def test_weights_are_downloaded_once_into_the_hub(hub: Path, serve: dict[str, bytes], said: list[str]) -> None:
    chosen = choose_extractor("inception")
    assert chosen.weights_path == hub / FILE_NAME
    assert chosen.suffix == ""
    assert (hub / FILE_NAME).read_bytes() == CONTENT
    serve["body"] = b"gone"
    assert choose_extractor("inception") == chosen


def test_a_download_of_other_content_leaves_nothing_behind(hub: Path, serve: dict[str, bytes], said: list[str]) -> None:
    serve["body"] = CONTENT[:-1]
    assert choose_extractor("auto").suffix == "_offline"
    assert "sha256" in said[0]
    assert list(hub.iterdir()) == []


def test_the_fallback_is_logged_once_however_often_the_extractor_is_chosen(
    hub: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="graf"):
        for _ in range(2):
            choose_extractor("auto", str(tmp_path / "absent.pth"), allow_download=False)
    assert sum("no Inception weights" in record.getMessage() for record in caplog.records) == 1


def test_the_weights_are_those_that_torch_fidelity_names() -> None:
    assert extractor_module.URL_INCEPTION_V3 == feature_extractor_inceptionv3.URL_INCEPTION_V3
