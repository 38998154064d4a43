"""Pictures have the pixels they should, and video files hold the frames they were given."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from graf.evaluation import pictures
from graf.evaluation.pictures import (
    Picture,
    depth_to_rgb,
    label_grid,
    opacity_to_rgb,
    save_png,
    tile_grid,
    to_uint8,
    write_video,
)


def test_uint8_conversion_is_the_nearest_level_clipped() -> None:
    values = torch.tensor([-2.0, -1.0, -1.0 + 0.49 / 127.5, -1.0 + 0.51 / 127.5, 1.0, 3.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255]


def test_images_with_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        to_uint8(torch.tensor([0.0, float("nan")]))


def test_a_grid_puts_image_i_at_row_i_over_columns() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 6)
    grid = tile_grid(images, columns=3, padding=2, background=1.0)
    assert grid.shape == (2 * 4 + 3 * 2, 3 * 6 + 4 * 2, 3)
    brute_force = np.full(grid.shape, 255, dtype=np.uint8)
    for i in range(5):
        for y in range(4):
            for x in range(6):
                brute_force[2 + i // 3 * 6 + y, 2 + i % 3 * 8 + x] = i
    assert np.array_equal(grid, brute_force)


@pytest.mark.parametrize(("columns", "shape"), [(1, (8, 10, 3)), (3, (8, 26, 3))])
def test_a_single_image_has_its_frame_and_leaves_the_other_columns_blank(columns: int, shape: tuple[int, ...]) -> None:
    expected = np.full(shape, 255, dtype=np.uint8)
    expected[2:6, 2:8] = 7
    assert np.array_equal(tile_grid(torch.full((1, 3, 4, 6), 7, dtype=torch.uint8), columns), expected)


def test_a_grid_of_floats_equals_the_grid_of_their_uint8() -> None:
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert np.array_equal(tile_grid(images, 2), tile_grid(to_uint8(images), 2))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 1, 4, 4), (3, 4, 4)])
def test_a_grid_of_anything_but_rgb_images_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        tile_grid(torch.zeros(shape), 2)


def test_depth_colours_are_monotonous_in_brightness_from_far_to_near() -> None:
    depth = torch.linspace(4.5, 2.5, 101).view(1, 1, 1, -1)
    rgb = depth_to_rgb(depth, near=2.5, far=4.5)
    assert rgb.shape == (1, 3, 1, 101)
    assert rgb.min() >= -1.0
    assert rgb.max() <= 1.0
    brightness = (rgb * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1).flatten()
    assert (brightness.diff() > 0).all()
    assert torch.equal(depth_to_rgb(torch.full_like(depth, 99.0), 2.5, 4.5)[..., :1], rgb[..., :1])


def test_depth_of_the_background_is_white() -> None:
    depth, opacity = torch.full((1, 1, 2, 2), 3.0), torch.zeros(1, 1, 2, 2)
    assert torch.equal(depth_to_rgb(depth, 2.5, 4.5, opacity), torch.ones(1, 3, 2, 2))
    torch.testing.assert_close(depth_to_rgb(depth, 2.5, 4.5, opacity + 1.0), depth_to_rgb(depth, 2.5, 4.5))


def test_a_depth_range_without_extent_is_refused() -> None:
    with pytest.raises(ValueError, match=r"near=2\.0, far=2\.0"):
        depth_to_rgb(torch.zeros(1, 1, 2, 2), 2.0, 2.0)


def test_opacity_runs_from_black_to_white() -> None:
    opacity = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)
    assert opacity_to_rgb(opacity)[0, :, 0].tolist() == [[-1.0, 0.0, 1.0]] * 3


def test_captions_stand_on_a_margin_and_leave_the_grid_as_it_is() -> None:
    grid = tile_grid(torch.zeros(4, 3, 16, 16), 2)
    labelled = label_grid(grid, row_labels=["mug", "car"], column_labels=["0", "90"])
    assert np.array_equal(labelled[-grid.shape[0] :, -grid.shape[1] :], grid)
    assert (labelled[: -grid.shape[0]] < 128).any()
    assert (labelled[:, : -grid.shape[1]] < 128).any()
    assert np.array_equal(label_grid(grid), grid)


@pytest.mark.parametrize(
    ("given", "drawn"), [("été 2", "ete 2"), ("e\u0301te\u0301 2", "ete 2"), ("Łódź", "Łodz"), ("猫が한", "猫が한")]
)
def test_captions_lose_marks_that_the_font_lacks_and_nothing_else(given: str, drawn: str) -> None:
    grid = tile_grid(torch.zeros(1, 3, 30, 30, dtype=torch.uint8), columns=1)
    found = label_grid(grid, [given], [given])
    font = ImageFont.load_default()
    canvas = Image.new("RGB", (found.shape[1], found.shape[0]), "white")
    canvas.paste(Image.fromarray(grid), (found.shape[1] - grid.shape[1], 18))
    draw = ImageDraw.Draw(canvas)
    draw.text((4, 18 + grid.shape[0] / 2 - 6), drawn, fill="black", font=font)
    middle = found.shape[1] - grid.shape[1] / 2
    draw.text((middle - font.getlength(drawn) / 2, 3), drawn, fill="black", font=font)
    assert np.array_equal(found, np.array(canvas))


def test_a_png_holds_exactly_its_pixels(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = save_png(tmp_path / "new" / "folder" / "picture.png", picture)
    assert np.array_equal(np.array(Image.open(path)), picture)


def make_frames(count: int, height: int = 33, width: int = 47) -> Iterator[Picture]:
    for i in range(count):
        yield np.full((height, width, 3), 10 * i, dtype=np.uint8)


def read_video(path: Path, height: int, width: int) -> np.ndarray:
    """Decode with ffmpeg itself: imageio-ffmpeg's reader leaves its pipes open."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24"]
    decoded = subprocess.run([*command, "-"], capture_output=True, check=True).stdout
    return np.frombuffer(decoded, dtype=np.uint8).reshape(-1, height, width, 3)


def test_a_video_of_odd_size_is_padded_to_even_and_keeps_its_frames(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("imageio_ffmpeg")
    path = write_video(tmp_path / "new" / "turn.mp4", make_frames(12), fps=10)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    decoded = read_video(path, 34, 48)
    assert decoded.mean(axis=(1, 2, 3)) == pytest.approx([10.0 * i for i in range(12)], abs=3.0)


def test_frames_are_written_while_they_come(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    alive = []

    class Frame(np.ndarray):
        def __del__(self) -> None:
            alive.remove(1)

    def frames() -> Iterator[Picture]:
        for frame in make_frames(20):
            alive.append(1)
            yield frame.view(Frame)
            assert len(alive) <= 3

    write_video(tmp_path / "turn.mp4", frames())


def test_a_video_that_could_not_be_finished_is_removed(tmp_path: Path) -> None:
    def frames() -> Iterator[Picture]:
        yield from make_frames(3)
        raise RuntimeError("renderer failed")

    with pytest.raises(RuntimeError, match="renderer failed"):
        write_video(tmp_path / "turn.mp4", frames())
    assert list(tmp_path.iterdir()) == []


def test_a_video_that_could_not_be_finished_leaves_the_former_one(tmp_path: Path) -> None:
    file = write_video(tmp_path / "turn.mp4", make_frames(3))
    former = file.read_bytes()

    def frames() -> Iterator[Picture]:
        yield from make_frames(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(file, frames())
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == former


@pytest.mark.parametrize("kept", [0, 700])
def test_a_video_that_ffmpeg_breaks_off_is_an_error_and_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    pytest.importorskip("imageio_ffmpeg")
    file = write_video(tmp_path / "turn.mp4", make_frames(3))
    former, open_writer = file.read_bytes(), pictures.get_writer

    class FullDisk:
        def __init__(self, path: Path, **options: Any) -> None:
            self.path, self.writer = path, open_writer(path, **options)
            self.append_data = self.writer.append_data

        def close(self) -> None:
            self.writer.close()
            os.truncate(self.path, kept)

    monkeypatch.setattr(pictures, "get_writer", FullDisk)
    with pytest.raises(OSError, match=r"turn\.mp4: ffmpeg has left 0 of 3 frames"):
        write_video(file, make_frames(3))
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == former


def test_without_ffmpeg_a_gif_is_written_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(pictures, "warn_once", lambda message, key=None: said.append(message))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # an import of it now fails
    path = write_video(tmp_path / "turn.mp4", make_frames(4), fps=10)
    assert path.name == "turn.gif"
    with Image.open(path) as gif:
        assert gif.n_frames == 4  # type: ignore[attr-defined]
    assert len(said) == 1
    assert "GIF" in said[0]


def test_no_frames_and_frames_of_two_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "none.mp4", [])
    with pytest.raises(ValueError, match="one size"):
        write_video(tmp_path / "two.mp4", [*make_frames(1), *make_frames(1, height=40)])
