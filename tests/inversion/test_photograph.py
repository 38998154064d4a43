"""Reading a photograph for inversion: what is used of it, where its object is, and what is refused."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from graf.inversion.photograph import PhotographError, PhotographSettings, find_object, read_photograph

SETTINGS = PhotographSettings(resolution=32, white_bkgd=True, background=torch.ones(3))


def disc(size: int = 64, colour: tuple[int, ...] = (200, 30, 40), hole: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """RGB pixels of a disc with a white hole on white, and where the disc is, hole included."""
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    inside = np.hypot(x, y) < 0.35 * size
    painted = inside & (np.hypot(x, y) > 0.1 * size if hole else True)
    return np.where(painted[..., None], np.array(colour, np.uint8), np.uint8(255)), inside


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    Image.fromarray(pixels, mode=mode).save(path) if mode else Image.fromarray(pixels).save(path)
    return path


def test_the_mask_is_what_differs_from_the_background_with_its_holes_filled(tmp_path):
    pixels, inside = disc()
    photograph = read_photograph(save(tmp_path / "disc.png", pixels), SETTINGS)
    assert photograph.colours.shape == (1, 3, 32, 32)
    expected = torch.from_numpy(inside).float().view(1, 1, 32, 2, 32, 2).mean((3, 5))
    assert photograph.mask is not None
    assert float((photograph.mask - expected).abs().mean()) < 0.05  # of the outline's pixels alone
    assert float(photograph.mask[0, 0, 16, 16]) == 1  # the white hole is no background


def test_transparency_is_the_mask_and_shows_the_generators_background(tmp_path):
    pixels, inside = disc(hole=False)
    rgba = np.dstack([pixels, (inside * 255).astype(np.uint8)])
    file = save(tmp_path / "disc.png", rgba)
    grey = torch.tensor([0.2, 0.0, -0.4])
    photograph = read_photograph(file, PhotographSettings(32, True, grey))
    assert photograph.mask is not None
    expected = torch.from_numpy(inside).float().view(1, 1, 32, 2, 32, 2).mean((3, 5))
    torch.testing.assert_close(photograph.mask, expected, rtol=0, atol=0.005)
    torch.testing.assert_close(photograph.colours[0, :, 0, 0], grey, rtol=0, atol=1e-6)
    without = read_photograph(file, PhotographSettings(32, True, grey, mask="none"))
    assert without.mask is None
    assert torch.equal(without.colours, photograph.colours)


def test_an_opaque_alpha_channel_says_nothing(tmp_path):
    pixels, _ = disc()
    opaque = save(tmp_path / "opaque.png", np.dstack([pixels, np.full((64, 64), 255, np.uint8)]))
    plain = save(tmp_path / "plain.png", pixels)
    first, second = (read_photograph(file, SETTINGS) for file in (opaque, plain))
    assert torch.equal(first.mask, second.mask)
    assert torch.equal(first.colours, second.colours)


def test_another_background_gives_no_mask_and_says_so(tmp_path, caplog):
    pixels = np.random.default_rng(0).integers(0, 200, (64, 64, 3), dtype=np.uint8)
    with caplog.at_level(logging.WARNING, "graf"):
        assert read_photograph(save(tmp_path / "room.png", pixels), SETTINGS).mask is None
    assert "border is not the background" in caplog.text


def test_a_photograph_without_colours_is_compared_by_brightness(tmp_path, caplog):
    pixels, _ = disc(colour=(90, 90, 90))
    with caplog.at_level(logging.WARNING, "graf"):
        assert read_photograph(save(tmp_path / "grey.png", pixels[..., 0]), SETTINGS).is_grey
    assert "brightness alone" in caplog.text
    assert not read_photograph(save(tmp_path / "red.png", disc()[0]), SETTINGS).is_grey


def test_grey_with_alpha_is_read(tmp_path):
    pixels, inside = disc(colour=(0, 0, 0), hole=False)
    la = np.dstack([pixels[..., 0], (inside * 255).astype(np.uint8)])
    file = save(tmp_path / "silhouette.png", la)
    with Image.open(file) as image:
        assert image.mode == "LA"
    photograph = read_photograph(file, SETTINGS)
    assert photograph.is_grey
    assert float(photograph.mask.mean()) == pytest.approx(inside.mean(), abs=1e-3)


def test_the_central_square_is_used_and_crop_narrows_it(tmp_path):
    pixels, _ = disc()
    wide = np.pad(pixels, ((0, 0), (40, 40), (0, 0)), constant_values=255)
    file, plain = save(tmp_path / "wide.png", wide), save(tmp_path / "plain.png", pixels)
    assert torch.equal(read_photograph(file, SETTINGS).colours, read_photograph(plain, SETTINGS).colours)
    cropped = read_photograph(file, PhotographSettings(32, True, torch.ones(3), crop=32))
    centre = save(tmp_path / "centre.png", pixels[16:48, 16:48])
    assert torch.equal(cropped.colours, read_photograph(centre, SETTINGS).colours)


def test_a_small_photograph_is_enlarged_and_that_is_said(tmp_path, caplog):
    pixels, _ = disc(20)
    with caplog.at_level(logging.WARNING, "graf"):
        photograph = read_photograph(save(tmp_path / "small.png", pixels), SETTINGS)
    assert photograph.colours.shape[-1] == 32
    assert "20 pixels are enlarged to 32" in caplog.text


def test_what_cannot_be_inverted_is_refused_with_its_reason(tmp_path):
    white = np.full((64, 64, 3), 255, np.uint8)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    save(tmp_path / "tiny.png", disc(8)[0])
    save(tmp_path / "empty.png", white)
    save(tmp_path / "clear.png", np.dstack([white, np.zeros((64, 64), np.uint8)]))
    for name, crop, expected in (
        ("absent.png", None, "no such file"),
        ("broken.png", None, "cannot be read as a photograph"),
        ("tiny.png", None, "is 8 pixels wide: expected at least 16"),
        ("empty.png", 12, "is 12 pixels wide after --crop 12"),
        ("empty.png", None, "shows no object: 100.0% of it is background"),
        ("clear.png", None, "shows no object: 100.0% of it is background"),
    ):
        with pytest.raises(PhotographError, match=expected) as caught:
            read_photograph(tmp_path / name, PhotographSettings(32, True, torch.ones(3), crop=crop))
        assert name in str(caught.value)


def test_only_background_that_is_connected_with_the_border_is_background():
    pixels = torch.full((3, 9, 9), 255, dtype=torch.uint8)
    pixels[:, 2:7, 2:7] = 0
    pixels[:, 4, 4] = 255
    expected = torch.zeros(1, 9, 9, dtype=torch.bool)
    expected[:, 2:7, 2:7] = True
    assert torch.equal(find_object(pixels, torch.full((3, 1, 1), 255, dtype=torch.uint8)), expected)
    pixels[:, 4, 4:] = 255  # a channel to the border
    expected[:, 4, 4:] = False
    assert torch.equal(find_object(pixels, torch.full((3, 1, 1), 255, dtype=torch.uint8)), expected)


def test_the_photograph_is_sampled_where_rays_go():
    from graf.geometry.rays import pixel_grid
    from graf.inversion.photograph import Photograph

    photograph = Photograph(torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 8))
    same = photograph.sample(pixel_grid(1, 8, 8))
    torch.testing.assert_close(same.colours, photograph.colours)
    torch.testing.assert_close(photograph.reduce(4).mask, torch.nn.functional.avg_pool2d(photograph.mask, 2))
