"""What is read of videos and photographs, which frames are chosen, and what is said of sources that are none."""

import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cv2")
imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")

from graf.capture import frames as frames_module  # noqa: E402
from graf.capture import video as video_module  # noqa: E402
from graf.capture.errors import CaptureError  # noqa: E402
from graf.capture.frames import Scan, choose_frames, scan, select_frames  # noqa: E402
from graf.capture.photographs import read_photograph  # noqa: E402
from graf.capture.sources import open_source  # noqa: E402
from graf.capture.tone_mapping import BT2020_TO_BT709, HLG, PQ, tone_map  # noqa: E402


@pytest.fixture
def corner_frames():
    """Twelve pictures 64 x 48 with a bright upper left corner, and a bar that walks."""
    frames = np.full((12, 48, 64, 3), 60, np.uint8)
    frames[:, :16, :16] = 250
    for number in range(12):
        frames[number, 30:40, 4 * number : 4 * number + 8] = (200, 40, 40)
    return frames


def make_scan(thumbnails, sharpness=None):
    count = len(thumbnails)
    sharpness = np.ones(count) if sharpness is None else np.asarray(sharpness, float)
    return Scan(np.arange(count) / 10, sharpness, thumbnails[..., 0], thumbnails)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_phones_rotation_is_applied(tmp_path, write_video, corner_frames, turns):
    plain = write_video(tmp_path / "plain.mp4", corner_frames)
    rotated = tmp_path / "rotated.mp4"
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    copy = [ffmpeg, "-v", "error", "-display_rotation", str(90 * turns), "-i", plain, "-c", "copy", rotated]
    subprocess.run(copy, check=True)
    expected = next(iter(open_source(plain).read(200))).image
    found = next(iter(open_source(rotated).read(200))).image
    # ffmpeg counts counter-clockwise, as numpy does; chroma is subsampled, so that edges may differ a little
    assert found.shape == np.rot90(expected, turns).shape
    assert np.abs(found.astype(int) - np.rot90(expected, turns)).mean() < 2


def test_chosen_frames_of_a_video_are_those_frames(tmp_path, write_video, corner_frames):
    video = open_source(write_video(tmp_path / "v.mp4", corner_frames))
    everything = list(video.read(200))
    assert len(everything) == 12
    chosen = list(video.read(200, [2, 7]))
    assert [frame.source for frame in chosen] == ["v.mp4#2", "v.mp4#7"]
    assert [frame.time for frame in chosen] == pytest.approx([0.1, 0.35])
    for frame, number in zip(chosen, [2, 7], strict=True):
        np.testing.assert_array_equal(frame.image, everything[number].image)


def test_a_long_video_is_thinned_out_evenly(tmp_path, write_video, corner_frames, monkeypatch):
    monkeypatch.setattr(video_module, "MAX_SCANNED", 10)
    seen = scan(open_source(write_video(tmp_path / "v.mp4", np.repeat(corner_frames, 3, axis=0))))
    assert 9 <= len(seen) <= 11
    np.testing.assert_allclose(np.diff(seen.times), seen.times[1])


def test_a_video_that_does_not_tell_how_long_it_is_is_thinned_out_too(
    tmp_path, write_video, corner_frames, monkeypatch
):
    """As browsers record it; and of more than a hundred chosen frames, which ffmpeg would not take in one sum."""
    path = write_video(tmp_path / "v.mkv", np.repeat(corner_frames, 30, axis=0), "-c:v", "libx264", "-live", "1")
    monkeypatch.setattr(video_module, "MAX_SCANNED", 180)
    video = open_source(path)
    assert len(video) == 180
    frames = list(video.read(64, range(1, 151)))
    assert [frame.source for frame in frames] == [f"v.mkv#{number}" for number in range(1, 151)]
    bar = frames[148].image.astype(int)[35] @ (1, -1, 0) > 80  # the bar of 24 frames of the file, 12 of those looked at
    assert np.nonzero(bar)[0].mean() == pytest.approx(4 * (149 // 15) + 3.5, abs=1)


def test_oblong_pixels_become_square(tmp_path, write_video, corner_frames):
    options = ("-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p", "-vf")
    wide = next(
        iter(open_source(write_video(tmp_path / "w.mp4", corner_frames, *options, "setsar=4/3")).read(200))
    ).image
    high = next(
        iter(open_source(write_video(tmp_path / "h.mp4", corner_frames, *options, "setsar=1/2")).read(200))
    ).image
    assert wide.shape == (48, 85, 3)  # of 64 x 48
    assert high.shape == (96, 64, 3)
    assert next(iter(open_source(tmp_path / "w.mp4").read(40))).image.shape == (23, 40, 3)


def test_a_decoder_ends_when_nobody_wants_the_rest(tmp_path, write_video, corner_frames, monkeypatch):
    """One that is still at work behind the last frame that was chosen."""
    video = open_source(write_video(tmp_path / "v.mp4", corner_frames))
    code = "import sys, time; sys.stdout.buffer.write(b'P6\\n1 1\\n255\\nabc'); sys.stdout.flush(); time.sleep(60)"
    monkeypatch.setattr(video, "_command", lambda: [sys.executable, "-c", code])
    frames = video.read(64, [0])
    next(frames)
    started = time.monotonic()
    frames.close()
    assert time.monotonic() - started < 20


def test_the_sharpest_of_a_blurred_neighbourhood_is_chosen(tmp_path, write_video):
    cv2 = pytest.importorskip("cv2")
    random = np.random.default_rng(0)
    picture = cv2.resize(random.integers(0, 255, (24, 32, 3), np.uint8), (128, 96), interpolation=cv2.INTER_NEAREST)
    moving = [np.roll(picture, 2 * number, axis=1) for number in range(60)]
    sharp = set(range(2, 60, 6))
    frames = [image if n in sharp else cv2.GaussianBlur(image, (0, 0), 2.5) for n, image in enumerate(moving)]
    seen = scan(open_source(write_video(tmp_path / "v.mp4", np.stack(frames))))
    assert set(choose_frames(seen, 10, 0, 60.0)) <= sharp


def test_equally_sharp_frames_are_evenly_spaced():
    thumbnails = np.random.default_rng(0).integers(0, 255, (60, 8, 8, 3)).astype(np.uint8)
    wobble = 1 + 0.1 * np.sin(np.arange(60))
    assert choose_frames(make_scan(thumbnails, wobble), 10, 0, 60.0) == list(range(0, 60, 6))
    assert choose_frames(make_scan(thumbnails), 4) == [0, 20, 39, 59]


def test_a_turn_may_end_a_little_after_the_frames_do():
    thumbnails = np.random.default_rng(0).integers(0, 255, (39, 8, 8, 3)).astype(np.uint8)
    assert choose_frames(make_scan(thumbnails), 13, 0, 39.5) == [round(39.5 / 13 * n) for n in range(13)]


def test_of_a_part_of_a_turn_all_is_used():
    thumbnails = np.random.default_rng(0).integers(0, 255, (24, 8, 8, 3)).astype(np.uint8)
    assert choose_frames(make_scan(thumbnails), 24, 0, 48.0) == list(range(24))
    assert choose_frames(make_scan(thumbnails), 8, 2, 44.0) == [2, 5, 8, 11, 14, 17, 20, 23]


def test_duplicates_are_dropped(tmp_path, write_video, corner_frames):
    twice = corner_frames[[0, 1, 2, 2, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11]]
    source = open_source(write_video(tmp_path / "v.mp4", twice))
    assert len(select_frames(source, 15)) == 12


def test_all_frames_or_the_most_are_taken_where_no_number_is_given(tmp_path, corner_frames):
    source = open_source(write_photographs(tmp_path / "p", corner_frames))
    assert len(select_frames(source, None)) == 12
    assert [frame.time for frame in select_frames(source, None, 8)] == [0, 2, 3, 5, 6, 8, 9, 11]
    assert len(select_frames(source, None, 80)) == 12


def test_more_frames_than_there_are_is_an_error():
    thumbnails = np.zeros((20, 8, 8, 3), np.uint8)
    with pytest.raises(CaptureError, match="--frames 40: there are 20 frames"):
        choose_frames(make_scan(thumbnails), 40)


# -- photographs


def write_photographs(folder, images, suffix=".png", **options):
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"photo{number}{suffix}", **options)
    return folder


def test_photographs_come_in_natural_order(tmp_path, corner_frames):
    source = open_source(write_photographs(tmp_path / "p", corner_frames))
    read = list(source.read(200))
    assert [frame.source for frame in read] == [f"photo{n}.png" for n in range(12)]
    np.testing.assert_array_equal(read[11].image, corner_frames[11])
    assert [frame.source for frame in source.read(200, [3, 5])] == ["photo3.png", "photo5.png"]


def test_exif_orientation_and_focal_length_are_used(tmp_path, corner_frames):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the picture has to be turned clockwise
    exif.get_ifd(0x8769)[0xA405] = 26
    Image.fromarray(corner_frames[0]).save(tmp_path / "a.jpg", exif=exif, quality=95)
    frame = read_photograph(tmp_path / "a.jpg", 200)
    assert frame.image.shape == (64, 48, 3)
    assert frame.image[:12, -12:].mean() > 200  # the corner is at the upper right now
    assert frame.diagonal_fov == pytest.approx(2 * np.degrees(np.arctan(np.hypot(36, 24) / 2 / 26)), abs=0.01)


def test_exif_that_cannot_be_written_again_is_read(tmp_path, corner_frames):
    tags = struct.pack("<HHIf", 0x0132, 11, 1, 1.5) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    Image.fromarray(corner_frames[0]).save(tmp_path / "a.jpg", exif=exif)
    assert read_photograph(tmp_path / "a.jpg", 200).image.shape == (64, 48, 3)


@pytest.mark.parametrize(("kind", "reason"), [(np.int32, "integer values"), (np.float32, "floating-point pixels")])
def test_pixels_without_a_known_range_are_refused(tmp_path, kind, reason):
    Image.fromarray(np.full((48, 64), 70_000, kind)).save(tmp_path / "a.tif")
    with pytest.raises(CaptureError, match=rf"a\.tif cannot be read \({reason}"):
        read_photograph(tmp_path / "a.tif", 200)


def test_16_bit_is_scaled_as_in_training(tmp_path):
    values = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 21
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_photograph(tmp_path / "a.png", 200).image[..., 0], np.round(values / 257))


def test_transparency_is_kept(tmp_path, corner_frames):
    alpha = np.full((48, 64, 1), 255, np.uint8)
    alpha[:, 32:] = 0
    Image.fromarray(np.concatenate([corner_frames[0], alpha], axis=-1)).save(tmp_path / "a.png")
    frame = read_photograph(tmp_path / "a.png", 200)
    np.testing.assert_array_equal(frame.alpha, alpha[..., 0])
    assert read_photograph(tmp_path / "a.png", 32).alpha.shape == (24, 32)


def test_heic_is_read(tmp_path, corner_frames):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    source = open_source(write_photographs(tmp_path / "p", corner_frames, ".heic", quality=95))
    assert np.abs(next(iter(source.read(200))).image.astype(int) - corner_frames[0]).mean() < 6


# -- HDR


def hlg_code(scene):
    """BT.2100's HLG OETF of scene light 0..1, as it is written there."""
    a, b = 0.17883277, 1 - 4 * 0.17883277
    c = 0.5 - a * np.log(4 * a)
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


def pq_code(nits):
    """SMPTE ST 2084's inverse EOTF."""
    power = (np.asarray(nits) / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 4096 * 32 * power) / (1 + 2392 / 4096 * 32 * power)) ** (2523 / 4096 * 128)


def srgb(linear):
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("transfer", [HLG, PQ])
def test_middle_tones_of_hdr_keep_their_brightness_and_highlights_are_bent(transfer):
    nits = np.array([2.0, 20, 60, 100, 203, 600, 1000])
    code = pq_code(nits) if transfer == PQ else hlg_code((nits / 1000) ** (1 / 1.2))
    image = np.repeat(np.round(code * 65535).astype(np.uint16)[None, :, None], 3, axis=2)
    found = tone_map(image, transfer)[0]
    np.testing.assert_allclose(found[:4], np.repeat(srgb(nits[:4] / 203)[:, None], 3, axis=1), atol=2)
    assert 225 < found[4, 0] < found[5, 0] < 255
    assert found[6, 0] >= 253


@pytest.mark.parametrize("transfer", [HLG, PQ])
def test_a_hdr_video_shows_the_colours_that_were_filmed(tmp_path, write_video, transfer):
    colours = np.array([[0.3, 0.05, 0.05], [0.05, 0.3, 0.05], [0.05, 0.05, 0.3], [0.3, 0.3, 0.05], [0.2, 0.2, 0.2]])
    nits = 203 * colours @ np.linalg.inv(BT2020_TO_BT709.astype(float)).T  # of BT.2020's primaries
    luminance = nits @ (0.2627, 0.6780, 0.0593) / 1000
    code = pq_code(nits) if transfer == PQ else hlg_code(nits / 1000 * luminance[:, None] ** (1 / 1.2 - 1))
    bars = np.repeat(np.round(code * 65535).astype(np.uint16)[None, None], 32, axis=2)
    parameters = f"log-level=error:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    convert = "scale=out_color_matrix=bt2020:out_range=tv,format=yuv420p10le"
    options = ["-vf", convert, "-colorspace", "bt2020nc", "-color_trc", transfer, "-color_primaries", "bt2020"]
    try:
        path = write_video(
            tmp_path / "hdr.mp4",
            np.broadcast_to(bars, (2, 64, 160, 3)),
            *options,
            *("-c:v", "libx265", "-preset", "ultrafast", "-crf", "8", "-x265-params", parameters),
        )
    except subprocess.CalledProcessError:
        pytest.skip("this ffmpeg has no encoder of 10 bits")
    video = open_source(path)
    assert video.transfer == transfer
    image = next(iter(video.read(200))).image
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image[32, 16::32], srgb(colours), atol=5)


# -- what is no source


def test_sources_that_are_none_are_named(tmp_path, corner_frames):
    (tmp_path / "text.mp4").write_text("not a video at all")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    Image.fromarray(corner_frames[0]).save(tmp_path / "one.png")
    for name, words in (
        ("text.mp4", "is not a video"),
        ("empty.mp4", "is not a video"),
        ("folder", "holds 0 photographs"),
        ("one.png", "is one photograph"),
        ("nowhere.mp4", "no such file"),
    ):
        with pytest.raises(CaptureError, match=words) as caught:
            open_source(tmp_path / name)
        assert name in str(caught.value)


def test_sound_without_pictures_is_said(tmp_path):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "sine=duration=1"]
    subprocess.run([*command, str(tmp_path / "sound.mp4")], check=True)
    with pytest.raises(CaptureError, match="has no video stream"):
        open_source(tmp_path / "sound.mp4")


def test_a_damaged_photograph_is_named(tmp_path, corner_frames):
    folder = write_photographs(tmp_path / "p", corner_frames)
    content = (folder / "photo4.png").read_bytes()
    (folder / "photo4.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(CaptureError, match=r"photo4\.png cannot be read"):
        scan(open_source(folder))


def test_photographs_of_several_sizes_are_an_error(tmp_path, corner_frames):
    folder = write_photographs(tmp_path / "p", corner_frames)
    Image.fromarray(np.rot90(corner_frames[0])).save(folder / "photo99.png")
    with pytest.raises(CaptureError, match=r"photo99\.png is read as 48x64"):
        scan(open_source(folder))


def test_photographs_that_are_alike_only_when_reduced_are_an_error(tmp_path, monkeypatch, corner_frames):
    monkeypatch.setattr(frames_module, "SCAN_SIDE", 32)
    folder = write_photographs(tmp_path / "p", corner_frames)
    Image.fromarray(corner_frames[7]).resize((48, 36)).save(folder / "photo7.png")
    with pytest.raises(CaptureError, match=r"photo7\.png is read as 48x36, photo0\.png as 64x48; expected .* one zoom"):
        select_frames(open_source(folder), 12)


def test_a_video_that_is_cut_off_is_used_as_far_as_it_goes(tmp_path, write_video, corner_frames, caplog):
    path = write_video(
        tmp_path / "v.mkv", np.repeat(corner_frames, 8, axis=0), "-c:v", "libx264", "-crf", "5", "-g", "8"
    )
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    assert 20 < len(scan(open_source(path))) < 96


def test_a_short_source_is_an_error(tmp_path, write_video, corner_frames):
    with pytest.raises(CaptureError, match="has 5 frames"):
        scan(open_source(write_video(tmp_path / "v.mp4", corner_frames[:5])))
