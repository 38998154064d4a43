"""Folders of photographs become data sets, and what cannot be used is reported."""

import json
import logging
import math
import os
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from graf.config import Config
from graf.data.datasets import DataError, DataSettings, PhotoDataset, open_dataset
from graf.data.synthetic import SyntheticSettings
from graf.geometry.cameras import angles_from_pose, pose_from_angles

PHOTOGRAPHS = Path(__file__).resolve().parents[3] / "shared" / "data"


def real_folder(name):
    """A folder of real photographs that lies beside the repository; only outside CI may it be absent."""
    folder = PHOTOGRAPHS / name
    if not folder.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{folder} is missing")
        pytest.skip(f"{folder} is missing")
    return folder


def write_photo(path, value=100, size=(16, 16), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)


@pytest.fixture
def turntable(tmp_path):
    """Two classes, twelve angles; the grey value is the angle / 30, plus 100 for the second class."""
    folder = tmp_path / "photos"
    for class_number, name in ((0, "obj5"), (1, "obj14")):
        for step in range(12):
            write_photo(folder / f"{name}__{30 * step}.png", 100 * class_number + step)
    return folder


def settings(folder, **changes):
    """The configuration's defaults, but small turntable photographs from one height."""
    defaults = DataSettings.from_mapping(Config().data.model_dump())
    return replace(defaults, **{"type": "turntable", "datadir": folder, "imsize": 16, "v_list": (0.3,)} | changes)


def grey_values(dataset):
    return [round((image.mean().item() + 1) * 127.5) for image, _ in dataset]


# turntable


def test_images_and_labels_belong_together(turntable):
    dataset = open_dataset(settings(turntable))
    assert dataset.class_names == ["obj5", "obj14"]
    assert len(dataset) == 24
    for image, label in dataset:
        assert image.dtype == torch.float32
        assert image.shape == (3, 16, 16)
        assert label.dtype == torch.int64
        value = 100 * label[0] + label[2] / 30
        torch.testing.assert_close(image, torch.full_like(image, value / 127.5 - 1))
    assert dataset.poses is None
    assert dataset.poses_known
    assert dataset.fov is None


@pytest.mark.parametrize(("value", "expected"), [(0, -1.0), (255, 1.0)])
def test_images_span_minus_one_to_one(tmp_path, value, expected):
    write_photo(tmp_path / "cup__0.png", value)
    image, _ = open_dataset(settings(tmp_path))[0]
    assert image.unique().tolist() == [expected]


@pytest.mark.parametrize("kind", ["turntable", "transforms"])
def test_train_validation_and_test_split_the_set(turntable, kind, tmp_path):
    if kind == "transforms":
        turntable = write_transforms(tmp_path / "nerf", 24)
    everything, train, validation, test = (
        open_dataset(settings(turntable, type=kind, heldout_every=4, subset=subset))
        for subset in ("all", "train", "validation", "test")
    )
    assert sorted(train.paths + validation.paths + test.paths) == sorted(everything.paths)  # each in one of them
    assert (len(test), len(validation)) == ((4, 2) if kind == "turntable" else (3, 3))


def test_heldout_angles_are_every_kth_distinct_angle_for_test_and_validation_in_turn(turntable):
    write_photo(turntable / "obj5__0.jpg")  # a second photograph of an angle counts once
    test, validation = (
        open_dataset(settings(turntable, heldout_every=5, subset=subset)) for subset in ("test", "validation")
    )
    assert test.labels[:, 2].unique().tolist() == [0, 300]
    assert validation.labels[:, 2].unique().tolist() == [150]
    assert (len(test), len(validation)) == (5, 2)


def test_an_unreadable_photograph_does_not_move_the_split(turntable):
    before = open_dataset(settings(turntable, heldout_every=5, subset="test")).labels[:, 2].unique()
    for name in ("obj5__30.png", "obj14__30.png"):
        (turntable / name).write_text("broken")
    after = open_dataset(settings(turntable, heldout_every=5, subset="test")).labels[:, 2].unique()
    assert torch.equal(before, after)


def test_heldout_without_a_split_is_an_error(turntable):
    with pytest.raises(DataError, match="heldout_every=0 holds nothing out"):
        open_dataset(settings(turntable, subset="test"))


@pytest.mark.parametrize(("count", "every"), [(3, 6), (6, 6), (4, 0), (5, 5)])
@pytest.mark.parametrize("kind", ["turntable", "image_folder"])
def test_what_is_advised_for_an_empty_split_leaves_photographs_in_all(tmp_path, kind, count, every):
    for number in range(count):
        write_photo(tmp_path / f"obj__{10 * number}.png")
    with pytest.raises(DataError, match=r"set data\.heldout_every=\d, or add photographs") as caught:
        open_dataset(settings(tmp_path, type=kind, heldout_every=every, subset="validation"))
    advised = int(re.search(r"set data\.heldout_every=(\d)", str(caught.value))[1])
    for subset in ("train", "validation", "test"):
        assert len(open_dataset(settings(tmp_path, type=kind, heldout_every=advised, subset=subset)))


@pytest.mark.parametrize(("count", "subset", "first"), [(2, "validation", ""), (1, "train", "set .*_every=0, or ")])
def test_where_no_split_is_possible_photographs_are_asked_for(tmp_path, count, subset, first):
    for number in range(count):
        write_photo(tmp_path / f"obj__{10 * number}.png")
    with pytest.raises(DataError, match=rf"put one there; {first}add photographs from other angles$"):
        open_dataset(settings(tmp_path, heldout_every=6, subset=subset))


def test_labels_csv_wins_over_file_names(turntable):
    (turntable / "labels.csv").write_text("file,class,height,angle\nobj14__0.png,cup,1,90\nobj5__0.png,pot,0,361\n")
    dataset = open_dataset(settings(turntable, v_list=(0.3, 0.4)))
    assert dataset.class_names == ["cup", "pot"]
    assert dataset.labels.tolist() == [[0, 1, 90, -1], [1, 0, 1, -1]]
    assert grey_values(dataset) == [100, 0]
    assert len(dataset.report.unlabelled) == 22


def test_classes_keeps_and_renumbers(turntable):
    dataset = open_dataset(settings(turntable, classes=("obj14",)))
    assert dataset.class_names == ["obj14"]
    assert dataset.labels[:, 0].unique().tolist() == [0]
    assert min(grey_values(dataset)) == 100


@pytest.fixture
def collection(turntable):
    """The turntable with labels.csv: grey value v belongs to instance i{v % 3}, of which i0 is not known.

    obj5's last two photographs are validation, obj14's first two are test.
    """
    rows = []
    for number, name in enumerate(("obj5", "obj14")):
        for step in range(12):
            split = "validation" if name == "obj5" and step >= 10 else "test" if name == "obj14" and step < 2 else ""
            instance = f"i{(100 * number + step) % 3}" if (100 * number + step) % 3 else ""
            rows.append(f"{name}__{30 * step}.png,{name},0,{30 * step},{instance},{split}")
    (turntable / "labels.csv").write_text("\n".join(["file,class,height,angle,instance,split", *rows]))
    return turntable


@pytest.mark.parametrize("subset", ["train", "validation", "test", "all"])
def test_instances_have_the_same_numbers_in_every_split(collection, subset):
    dataset = open_dataset(settings(collection, heldout_every=5, subset=subset))
    assert dataset.instance_names == ["obj5/i1", "obj5/i2", "obj14/i1", "obj14/i2"]
    for grey, label in zip(grey_values(dataset), dataset.labels.tolist(), strict=True):
        name = f"{dataset.class_names[label[0]]}/i{grey % 3}" if grey % 3 else None
        assert (dataset.instance_names[label[3]] if label[3] >= 0 else None) == name


def test_classes_keeps_their_instances_and_renumbers_them(collection):
    dataset = open_dataset(settings(collection, classes=("obj14",)))
    assert dataset.instance_names == ["obj14/i1", "obj14/i2"]
    known = [(100 + step) % 3 - 1 for step in range(2, 12)]
    assert dataset.labels[:, 3].tolist() == known


def test_a_split_in_labels_csv_wins_and_the_others_are_split_by_their_own_angles(collection):
    opened = {
        subset: open_dataset(settings(collection, heldout_every=5, subset=subset))
        for subset in ("train", "validation", "test")
    }
    # without a split: obj5 at 0..270 and obj14 at 60..330 degrees, so that 0 and 300 are test, 150 validation
    assert grey_values(opened["test"]) == [0, 100, 101, 110]
    assert grey_values(opened["validation"]) == [5, 10, 11, 105]
    assert len(opened["train"]) == 24 - 8
    paths = [path for dataset in opened.values() for path in dataset.paths]
    assert sorted(paths) == sorted(open_dataset(settings(collection, subset="all")).paths)


def test_splits_of_labels_csv_need_no_heldout_angles(collection):
    assert grey_values(open_dataset(settings(collection, subset="test"))) == [100, 101]
    assert grey_values(open_dataset(settings(collection, subset="validation"))) == [10, 11]
    assert len(open_dataset(settings(collection))) == 20
    with pytest.raises(DataError, match="no photograph of 12 in the subset 'test'"):
        open_dataset(settings(collection, subset="test", classes=("obj5",)))


def test_the_fingerprint_depends_on_instances(collection):
    before = open_dataset(settings(collection)).fingerprint()
    labels = collection / "labels.csv"
    labels.write_text(labels.read_text().replace("i2", ""))
    assert open_dataset(settings(collection)).fingerprint() != before


def test_other_pixels_in_a_file_of_the_same_size_change_the_fingerprint_but_not_the_identity(tmp_path):
    file = tmp_path / "photographs" / "a.bmp"
    write_photo(file, 10)
    before = open_dataset(settings(file.parent, type="image_folder"))
    prints = before.fingerprint(), before.identity
    size = file.stat().st_size
    write_photo(file, 200)
    os.utime(file, ns=(0, 1))
    assert file.stat().st_size == size
    after = open_dataset(settings(file.parent, type="image_folder"))
    assert after.fingerprint() != prints[0]
    assert after.identity == prints[1]


def test_unknown_class_is_an_error_that_names_the_nearest(turntable):
    with pytest.raises(DataError, match=r"'obj141' is not in .*did you mean 'obj14'"):
        open_dataset(settings(turntable, classes=("obj141",)))


def test_height_outside_v_list_names_the_file(turntable):
    write_photo(turntable / "obj5_h1__0.png")
    with pytest.raises(DataError, match=r"obj5_h1__0\.png has height 1, but data\.v_list has 1"):
        open_dataset(settings(turntable))


def test_sub_folders_are_read_where_names_are_labels(turntable):
    write_photo(turntable / "more" / "obj5_h0__7.png", 55)
    dataset = open_dataset(settings(turntable))
    assert 55 in grey_values(dataset)


def choose(dataset, indices):
    """The data set of some of the photographs, which are decoded when they are asked for."""
    return PhotoDataset(dataset.index.select(indices), dataset.settings)


def test_a_selection_keeps_its_order_and_agrees_with_the_whole(turntable):
    dataset = open_dataset(settings(turntable))
    subset = choose(dataset, [5, 2, 20])
    assert len(subset) == 3
    for place, index in enumerate((5, 2, 20)):
        assert torch.equal(subset[place][0], dataset[index][0])
        assert torch.equal(subset[place][1], dataset[index][1])
        assert subset.paths[place] == dataset.paths[index]


def test_lazy_decoding_gives_the_same_images(turntable):
    cached, lazy = open_dataset(settings(turntable)), open_dataset(settings(turntable, cache_mib=0))
    for (image, label), (other, other_label) in zip(cached, lazy, strict=True):
        assert torch.equal(image, other)
        assert torch.equal(label, other_label)
    assert cached.fingerprint() == lazy.fingerprint()


def test_fingerprint_tells_sets_apart_and_forgets_where_they_lie(turntable, tmp_path):
    dataset = open_dataset(settings(turntable))
    prints = {
        dataset.fingerprint(),
        open_dataset(settings(turntable, imsize=8)).fingerprint(),
        open_dataset(settings(turntable, white_bkgd=False)).fingerprint(),
        open_dataset(settings(turntable, heldout_every=4)).fingerprint(),
        open_dataset(settings(turntable, v_list=(0.4,))).fingerprint(),
        choose(dataset, range(23)).fingerprint(),
    }
    assert len(prints) == 6
    moved = turntable.rename(tmp_path / "elsewhere")
    assert open_dataset(settings(moved)).fingerprint() in prints
    write_photo(moved / "obj5__0.png", 1, size=(17, 16))
    assert open_dataset(settings(moved)).fingerprint() not in prints


# what cannot be used


@pytest.fixture
def damaged(turntable):
    """The turntable with a corrupt, a truncated, a mislabelled image and a text file."""
    (turntable / "obj5__0.png").write_bytes(b"no image")
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(turntable / "obj5__30.png")
    content = (turntable / "obj5__30.png").read_bytes()
    (turntable / "obj5__30.png").write_bytes(content[: len(content) // 2])
    write_photo(turntable / "portrait.png")
    (turntable / "notes.txt").write_text("hello")
    return turntable


def test_unusable_files_are_skipped_and_reported_once(damaged, caplog):
    with caplog.at_level(logging.WARNING, "graf.data"):
        dataset = open_dataset(settings(damaged))
        list(dataset)
    assert len(dataset) == 22
    assert [name.split(" ")[0] for name in dataset.report.unreadable] == ["obj5__0.png", "obj5__30.png"]
    assert dataset.report.unlabelled == ["portrait.png"]
    assert dataset.report.not_images == ["notes.txt"]
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    for part in ("2 unreadable photographs: obj5__0.png", "portrait.png", "notes.txt", "using 22 photographs"):
        assert part in message


@pytest.mark.parametrize("cache_mib", [0, 100])
def test_images_and_labels_still_belong_together_after_skipping(damaged, cache_mib):
    (damaged / "obj5__30.png").unlink()
    dataset = open_dataset(settings(damaged, cache_mib=cache_mib))
    assert len(dataset) == 22
    assert grey_values(dataset) == (100 * dataset.labels[:, 0] + dataset.labels[:, 2] // 30).tolist()
    assert all(
        path.name.endswith(f"__{label[2]}.png") for path, label in zip(dataset.paths, dataset.labels, strict=True)
    )


@pytest.mark.parametrize("victim", ["obj5__0.png", "obj5__30.png", "portrait.png"])
def test_strict_makes_each_skipped_photograph_an_error(damaged, victim):
    for name in {"obj5__0.png", "obj5__30.png", "portrait.png"} - {victim}:
        (damaged / name).unlink()
    with pytest.raises(DataError, match=victim):
        open_dataset(settings(damaged, strict=True))


def test_strict_accepts_files_that_are_no_photographs(damaged):
    for name in ("obj5__0.png", "obj5__30.png", "portrait.png"):
        (damaged / name).unlink()
    assert len(open_dataset(settings(damaged, strict=True))) == 22


def test_sound_folder_logs_nothing(turntable, caplog):
    open_dataset(settings(turntable))
    assert not caplog.records


def test_in_a_lazy_set_the_next_photograph_stands_in_for_a_truncated_one_which_is_reported_once(damaged, caplog):
    dataset = open_dataset(settings(damaged, cache_mib=0))
    assert [name.split(" ")[0] for name in dataset.report.unreadable] == ["obj5__0.png"]
    caplog.clear()
    names = [path.name for path in dataset.paths]
    index = names.index("obj5__30.png")
    for _ in range(2):
        image, label = dataset[index]
        assert torch.equal(image, dataset[index + 1][0])
        assert torch.equal(label, dataset.labels[index + 1])
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        f"{damaged}/obj5__30.png cannot be read"
    ]
    last = choose(dataset, [index + 1, index])
    assert torch.equal(last[1][0], last[0][0])  # after the last one comes the first


def test_in_a_strict_lazy_set_a_truncated_file_is_an_error(damaged):
    for name in ("obj5__0.png", "portrait.png"):
        (damaged / name).unlink()
    dataset = open_dataset(settings(damaged, cache_mib=0, strict=True))
    index = [path.name for path in dataset.paths].index("obj5__30.png")
    with pytest.raises(DataError, match=r"obj5__30\.png cannot be read .*data\.strict"):
        dataset[index]


def test_a_lazy_set_that_vanished_says_so(turntable):
    dataset = open_dataset(settings(turntable, cache_mib=0))
    for path in dataset.paths:
        path.unlink()
    with pytest.raises(DataError, match="none of its 24 photographs can be read any more"):
        dataset[3]


def test_labels_csv_names_what_it_leaves_out_in_any_folder_but_companions(turntable):
    for folder in ("listed", "new", "depth"):
        (turntable / folder).mkdir()
    write_photo(turntable / "listed" / "a.png")
    for name in ("new/b.png", "new/deep.png", "depth/obj5__0.png"):
        write_photo(turntable / name)
    (turntable / "depth" / "scene.json").write_text("{}")
    rows = [f"{path.name},cup,0,{5 * number}" for number, path in enumerate(sorted(turntable.glob("*.png")))]
    (turntable / "labels.csv").write_text("\n".join(["file,class,height,angle", *rows, "listed/a.png,cup,0,1"]))
    report = open_dataset(settings(turntable)).report
    assert report.unlabelled == ["new/b.png", "new/deep.png"]
    assert report.not_images == []
    with pytest.raises(DataError, match=r"new/b\.png"):
        open_dataset(settings(turntable, strict=True))


def test_a_crop_takes_the_central_square_of_that_side(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a__0.png")
    small = np.full((4, 4, 3), 9, np.uint8)
    Image.fromarray(small).save(tmp_path / "b__0.png")  # smaller than the crop: the whole of it
    cropped = open_dataset(settings(tmp_path, crop=16, imsize=16))
    wanted = torch.from_numpy(pixels[2:18, 7:23]).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(cropped[0][0], wanted)
    assert cropped[1][0].unique().numel() == 1
    assert cropped.fingerprint() != open_dataset(settings(tmp_path, imsize=16)).fingerprint()


@pytest.mark.parametrize("kind", ["turntable", "image_folder"])
def test_hidden_files_and_folders_are_no_photographs(turntable, kind):
    before = open_dataset(settings(turntable, type=kind))
    for name in (".ipynb_checkpoints/obj5__0-1.png", ".trash/cat__0.png", "__MACOSX/obj5__0.png", "._obj5__0.png"):
        write_photo(turntable / name)
    after = open_dataset(settings(turntable, type=kind))
    assert (after.class_names, after.paths) == (before.class_names, before.paths)
    assert not after.report.lines()


def test_a_hidden_file_that_labels_csv_names_counts(turntable):
    write_photo(turntable / ".mine" / "a.png", 77)
    (turntable / "labels.csv").write_text("file,class,height,angle\n.mine/a.png,cup,0,0\n")
    assert grey_values(open_dataset(settings(turntable))) == [77]


@pytest.mark.parametrize("kind", ["turntable", "image_folder"])
def test_a_folder_that_may_not_be_read_is_reported_and_the_set_itself_an_error(turntable, kind, monkeypatch):
    write_photo(turntable / "secret" / "obj5__7.png")
    scan, refused = os.scandir, "secret"

    def refuse(path):
        if str(path).endswith(refused):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    if kind == "turntable":
        assert open_dataset(settings(turntable)).report.closed == ["secret (Permission denied)"]
    with pytest.raises(DataError, match=r"1 folders that cannot be read: secret \(Permission denied\)"):
        open_dataset(settings(turntable, type=kind, strict=True))
    for file in turntable.glob("*.png"):
        file.unlink()
    reason = r"no photographs; .*\(folders that cannot be read: secret \(Permission denied\)\)"
    with pytest.raises(DataError, match=reason):
        open_dataset(settings(turntable, type=kind))
    refused = turntable.name
    with pytest.raises(DataError, match=rf"{refused} cannot be read \(Permission denied\); allow it to be read"):
        open_dataset(settings(turntable, type=kind))


def test_transforms_that_may_not_be_read_are_an_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    folder = write_transforms(tmp_path, 2)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(DataError, match=r"transforms_train\.json cannot be read \(Permission denied\)"):
        open_dataset(transforms(folder))


def test_names_that_no_disk_has_are_missing(turntable):
    (turntable / "labels.csv").write_text(f"file,class,height,angle\nobj5__0.png,a,0,0\n{'x' * 300}.png,a,0,5\n")
    assert open_dataset(settings(turntable)).report.missing == [f"{'x' * 300}.png"]
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(settings("x" * 300))


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_names_that_are_not_utf8_have_a_fingerprint(turntable):
    before = open_dataset(settings(turntable, type="image_folder")).identity
    try:
        os.rename(turntable / "obj5__0.png", os.fsencode(turntable) + b"/caf\xe9.png")
    except OSError:  # macOS
        pytest.skip("this file system has UTF-8 names only")
    dataset = open_dataset(settings(turntable, type="image_folder"))
    assert len(dataset) == 24
    assert dataset.identity != before


def test_a_labelled_name_in_another_form_of_unicode_is_found(turntable):
    for number, name in enumerate(("cafe\u0301.png", "\u212b.png")):  # as a Mac writes them
        write_photo(turntable / name, 50 + number)
    rows = "".join(f"{name},cup,0,{number}\n" for number, name in enumerate(("caf\u00e9.png", "\u00c5.png")))
    (turntable / "labels.csv").write_text(f"file,class,height,angle\n{rows}", encoding="utf-8")
    dataset = open_dataset(settings(turntable))
    assert grey_values(dataset) == [50, 51]
    assert not dataset.report.missing
    assert not any("caf" in name for name in dataset.report.unlabelled)


def test_a_labels_csv_without_rows_says_so(turntable):
    (turntable / "labels.csv").write_text("file,class,height,angle\n\n")
    with pytest.raises(DataError, match=r"labels\.csv: has no rows; expected one for each photograph"):
        open_dataset(settings(turntable))


def test_a_folder_that_two_links_lead_to_is_read_once_and_reported(tmp_path):
    for number in range(3):
        write_photo(tmp_path / "real" / f"{number}.png")
    (tmp_path / "set").mkdir()
    for name in ("beta", "alpha"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "real", target_is_directory=True)
    dataset = open_dataset(settings(tmp_path / "set", type="image_folder"))
    assert (dataset.class_names, len(dataset)) == (["alpha"], 3)
    assert "1 folders that links lead to a second time, left out: beta" in dataset.report.lines()


def test_labels_of_missing_photographs_are_reported(turntable):
    (turntable / "labels.csv").write_text("file,class,height,angle\nobj5__0.png,cup,0,0\ngone.png,cup,0,5\n")
    assert open_dataset(settings(turntable)).report.missing == ["gone.png"]
    with pytest.raises(DataError, match=r"gone\.png"):
        open_dataset(settings(turntable, strict=True))


def test_mixed_sizes_and_modes_become_one_format(tmp_path):
    for name, size, mode in (("a", (20, 10), "RGB"), ("b", (10, 30), "L"), ("c", (64, 64), "RGBA")):
        write_photo(tmp_path / f"{name}__0.png", 100, size, mode)
    dataset = open_dataset(settings(tmp_path))
    assert grey_values(dataset) == [100, 100, round(255 - 155 * 100 / 255)]
    assert dict(dataset.report.sizes) == {(20, 10): 1, (10, 30): 1, (64, 64): 1}


@pytest.mark.parametrize("kind", ["turntable", "transforms", "image_folder"])
def test_missing_and_empty_folders_are_errors_that_name_them(tmp_path, kind):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError) as error:
            open_dataset(settings(folder, type=kind))
        assert str(folder) in str(error.value)
        assert "expected" in str(error.value)
        assert "data.datadir" in str(error.value)


def test_folder_of_broken_photographs_is_an_error(tmp_path):
    (tmp_path / "cup__0.png").write_text("x")
    with pytest.raises(DataError, match=r"none of the 1 photographs can be read.*cup__0\.png"):
        open_dataset(settings(tmp_path))


def test_names_that_do_not_match_are_an_error_that_shows_pattern_and_names(tmp_path):
    write_photo(tmp_path / "img_001.png")
    with pytest.raises(DataError, match=r"img_001\.png.*data\.file_pattern"):
        open_dataset(settings(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "turntabel"}, "did you mean turntable"),
        ({"subset": "heldout"}, "data.subset='heldout': expected one of train, validation, test, all"),
        ({"v_list": (1.2,)}, r"data.v_list=\[1.2\]"),
        ({"heldout_every": 1}, "data.heldout_every=1"),
        ({"imsize": 0}, "data.imsize=0"),
        ({"type": "transforms", "angle_direction": "cw"}, "data.angle_direction=cw"),
    ],
)
def test_wrong_settings_name_the_key(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        settings(tmp_path, **changes)


def test_turntable_without_v_list_says_how_to_set_it(turntable):
    with pytest.raises(DataError, match=r"data\.v_list is empty.*for example"):
        open_dataset(settings(turntable, v_list=None))


def test_settings_from_the_config_ignore_other_keys():
    mapping = {
        **Config().data.model_dump(),
        "type": "turntable",
        "datadir": "photos",
        "near": 2.0,
        "vmin": 0.1,
        "v_list": [0.2, 0.3],
        "classes": None,
        "synthetic": {"count": 40, "seed": 1, "instances": 2, "known_instances": 1, "heldout_instances": 1},
    }
    found = DataSettings.from_mapping(mapping, "test")
    assert found.v_list == (0.2, 0.3)
    assert found.subset == "test"
    assert (found.synthetic_count, found.synthetic_seed, found.synthetic_instances) == (40, 1, 2)
    assert (found.synthetic_known_instances, found.synthetic_heldout_instances) == (1, 1)


def test_the_configuration_alone_has_defaults():
    for kind, own in ((DataSettings, {"subset"}), (SyntheticSettings, set())):
        assert {item.name for item in fields(kind) if item.default is not MISSING} == own


# transforms


def write_transforms(folder, count, size=(16, 16), matrix=None, camera_angle_x=0.6):
    u, v = torch.arange(count, dtype=torch.float64) / count, torch.linspace(0.1, 0.45, count, dtype=torch.float64)
    poses = pose_from_angles(u, v, 4.0)
    frames = []
    for index in range(count):
        write_photo(folder / "train" / f"r_{index}.png", index, size)
        pose = poses[index].tolist() if matrix is None else matrix
        frames.append({"file_path": f"./train/r_{index}", "transform_matrix": pose})
    content = {"camera_angle_x": camera_angle_x, "frames": frames}
    (folder / "transforms_train.json").write_text(json.dumps(content))
    return folder


def transforms(folder, **changes):
    return settings(folder, **{"type": "transforms", "v_list": None} | changes)


def test_transforms_give_true_poses_and_binned_labels(tmp_path):
    dataset = open_dataset(transforms(write_transforms(tmp_path, 20), v_list=(0.1, 0.4)))
    u, v = angles_from_pose(dataset.poses)
    torch.testing.assert_close(u, torch.arange(20) / 20, atol=1e-6, rtol=0)
    assert dataset.labels[:, 2].tolist() == [18 * index for index in range(20)]
    assert dataset.labels[:, 1].tolist() == [int(height > 0.25) for height in v]
    assert dataset.labels[:, [0, 3]].unique(dim=0).tolist() == [[0, -1]]
    assert dataset.instance_names == []
    assert grey_values(dataset) == list(range(20))
    assert dataset.fov == pytest.approx(math.degrees(0.6))


def test_derived_heights_are_even_bins_that_the_split_does_not_move(tmp_path):
    folder = write_transforms(tmp_path, 20)
    dataset = open_dataset(transforms(folder))
    assert np.diff(dataset.v_list) == pytest.approx(np.full(7, 0.35 / 8))
    assert set(dataset.labels[:, 1].tolist()) == set(range(8))
    for subset in ("train", "test"):
        assert open_dataset(transforms(folder, heldout_every=3, subset=subset)).v_list == dataset.v_list


def test_datadir_may_be_one_transforms_file(tmp_path):
    write_transforms(tmp_path, 4)
    (tmp_path / "transforms_train.json").rename(tmp_path / "transforms_val.json")
    assert len(open_dataset(transforms(tmp_path / "transforms_val.json"))) == 4
    with pytest.raises(DataError, match=r"found transforms_val\.json; expected transforms_train\.json"):
        open_dataset(transforms(tmp_path))


def test_field_of_view_is_that_of_the_central_square(tmp_path):
    dataset = open_dataset(transforms(write_transforms(tmp_path, 2, size=(32, 16))))
    assert math.tan(math.radians(dataset.fov) / 2) == pytest.approx(math.tan(0.3) / 2)


def test_one_camera_angle_for_different_shapes_is_an_error(tmp_path):
    write_photo(write_transforms(tmp_path, 3) / "train" / "r_1.png", size=(32, 16))
    with pytest.raises(DataError, match="one aspect ratio"):
        open_dataset(transforms(tmp_path))


# what a file says of a lens of 0.6 radians beside camera_angle_x, as colmap2nerf, nerfstudio and graf itself write it
FOCAL = 8 / math.tan(0.3)
FULL_LENS = {"camera_model": "OPENCV", "is_fisheye": False, "fl_x": FOCAL, "fl_y": FOCAL, "cx": 8, "cy": 8.0, "w": 16}
FULL_LENS |= {"h": 16, "camera_angle_y": 0.6, "k1": 0, "k2": 0, "k3": 0, "k4": 0, "p1": 0, "p2": 0, "aabb_scale": 4}


def describe_lens(folder, of_frame=None, **changes):
    """Transforms whose file says more of the lens; of_frame: what frame 1 says of its own. None removes a key."""
    file = write_transforms(folder, 3) / "transforms_train.json"
    content = json.loads(file.read_text()) | changes
    content["frames"][1] |= of_frame or {}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return transforms(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cx": 8.5}, r"json: cx=8\.5 moves .* by 3\.1% of its width; expected at most 2%.*crop"),
        ({"cy": 7}, "cy=7 .* 6.2%"),
        ({"fl_y": 1.3 * FOCAL}, "fl_y=33.6.*square pixels"),
        ({"camera_angle_x": 0.7}, "fl_x=25.*one lens"),
        ({"of_frame": {"fl_x": 1.5 * FOCAL}}, "json, frame 1: fl_x=38.*one lens"),
        ({"of_frame": {"camera_angle_x": 0.7}}, "frame 1: camera_angle_x=0.7 .*one lens"),
        ({"k1": 0.5}, r"k1=0\.5 .* 2\.4%.*image_undistorter"),
        ({"k3": -60}, "k3=-60 .*undistort"),
        ({"p2": 0.05}, "p2=0.05 .*undistort"),
        ({"camera_model": "OPENCV_FISHEYE"}, "camera_model='OPENCV_FISHEYE' .*undistort"),
        ({"of_frame": {"camera_model": "EQUIRECTANGULAR"}}, "frame 1: camera_model='EQUIRECTANGULAR'"),
        ({"is_fisheye": True}, "is_fisheye .*undistort"),
        ({"cx": "middle"}, "cx='middle'; expected a number"),
        ({"k1": math.nan}, "k1=nan; expected a number"),
        ({"w": 0}, "w=0; expected pixels"),
        ({"w": None, "camera_angle_x": None}, "expected camera_angle_x in radians, or fl_x and w"),
        ({"camera_angle_y": 0.3}, "camera_angle_y=0.3 .*square pixels"),
        ({"k1": 0.3, "p1": 0.02}, r"k1=0\.3 .* 2\.4%.*image_undistorter"),
        ({"k1": 0.25, "k2": 1.5, "k3": 20}, r"k1=0\.25 .* 2\.8%.*image_undistorter"),
        ({"p1": -0.04, "p2": 0.03}, "p1=-0.04 .* 2.3%"),
    ],
)
def test_a_lens_that_is_no_centred_pinhole_is_an_error(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        open_dataset(describe_lens(tmp_path, **FULL_LENS | changes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"cx": 8.05, "k1": 0.01, "of_frame": {"fl_x": 1.005 * FOCAL, "w": 16}}, []),
        ({"cx": 8.2, "k1": -0.15}, ["cx=8.2 (1.2%)", "k1=-0.15 (0.7%)"]),
        ({"of_frame": {"fl_x": 1.02 * FOCAL}}, ["fl_x=26.3791 (1.0%)"]),
        ({"k1": 0.3, "k2": -3.0, "cx": 5, "w": None, "camera_model": None}, []),
    ],
)
def test_what_moves_pictures_by_a_pixel_or_so_is_told(tmp_path, changes, told):
    dataset = open_dataset(describe_lens(tmp_path, **FULL_LENS | changes))
    assert dataset.report.lens == told
    assert not dataset.report.problems()
    assert [line.partition(": ")[2] for line in dataset.report.lines()] == ([", ".join(told)] if told else [])
    assert dataset.fov == pytest.approx(math.degrees(0.6))


@pytest.mark.parametrize("in_frames", [False, True])
def test_focal_length_and_width_are_a_field_of_view_too(tmp_path, in_frames):
    lens = {"fl_x": FOCAL, "w": 16}
    changes = {"of_frame": lens} if in_frames else lens
    dataset = open_dataset(describe_lens(tmp_path, camera_angle_x=None, **changes))
    assert dataset.fov == pytest.approx(math.degrees(0.6))


def test_missing_frames_are_reported(tmp_path):
    (write_transforms(tmp_path, 3) / "train" / "r_1.png").unlink()
    dataset = open_dataset(transforms(tmp_path))
    assert dataset.report.missing == ["./train/r_1"]
    assert dataset.labels[:, 2].tolist() == [0, 240]


@pytest.mark.parametrize("file", ["", "/", ".", "..", "\0"])
def test_frames_whose_paths_are_no_files_are_missing(tmp_path, file):
    content = json.loads((write_transforms(tmp_path, 3) / "transforms_train.json").read_text())
    content["frames"][1]["file_path"] = file
    (tmp_path / "transforms_train.json").write_text(json.dumps(content))
    dataset = open_dataset(transforms(tmp_path))
    assert dataset.report.missing == [file]
    assert len(dataset) == 2


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[1, 0], [0, 1]], r"shape \(2, 2\)"),
        ([["a"] * 4] * 4, "not a matrix of numbers"),
        (torch.diag(torch.tensor([2.0, 2, 2, 1])).tolist(), "without scale or mirror"),
        (torch.diag(torch.tensor([-1.0, 1, 1, 1])).tolist(), "without scale or mirror"),
        (torch.full((4, 4), math.nan).tolist(), "finite"),
    ],
)
def test_poses_that_are_none_are_errors_that_name_file_and_frame(tmp_path, matrix, message):
    with pytest.raises(DataError, match=message) as error:
        open_dataset(transforms(write_transforms(tmp_path, 1, matrix=matrix)))
    assert "transforms_train.json, frame 0" in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"frames": [{}]}', '{"frames": [{}], "camera_angle_x": 0}'])
def test_json_without_cameras_is_an_error(tmp_path, content):
    (tmp_path / "transforms_train.json").write_text(content)
    with pytest.raises(DataError, match=r"transforms_train\.json.*(camera_angle_x|file_path)"):
        open_dataset(transforms(tmp_path))


# image_folder


def test_class_folders_are_classes(tmp_path):
    for class_number, name in enumerate(("b2", "b10", "a")):
        write_photo(tmp_path / name / "deep" / "x.png", class_number)
        write_photo(tmp_path / name / "y.png", class_number)
    write_photo(tmp_path / "stray.png")
    dataset = open_dataset(settings(tmp_path, type="image_folder"))
    assert dataset.class_names == ["a", "b2", "b10"]
    assert grey_values(dataset) == [2, 2, 0, 0, 1, 1]  # in the order of the files
    assert dataset.labels[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.labels[:, 3].unique().tolist() == [-1]
    assert not dataset.poses_known
    assert dataset.report.unlabelled == ["stray.png"]


def test_plain_folder_is_one_class_with_every_kth_image_held_out(tmp_path):
    for number in range(12):
        write_photo(tmp_path / f"{number}.png", number)
    heldout = open_dataset(settings(tmp_path, type="image_folder", heldout_every=5, subset="test"))
    assert grey_values(heldout) == [0, 10]
    assert heldout.class_names == [tmp_path.name]


# real photographs


def test_coil100_is_three_objects_at_72_angles():
    folder = real_folder("coil100")
    dataset = open_dataset(settings(folder, imsize=64, white_bkgd=False, v_list=(0.31,)))
    assert dataset.class_names == ["obj5", "obj14", "obj33"]
    expected = torch.cartesian_prod(*map(torch.tensor, (range(3), [0], range(0, 360, 5), [-1])))
    assert torch.equal(dataset.labels, expected)
    assert not dataset.report.lines()
    heldout = open_dataset(settings(folder, v_list=(0.31,), heldout_every=6, subset="test"))
    assert heldout.labels[:, 2].unique().tolist() == list(range(0, 360, 60))
    assert len(heldout) == 18


def test_lego128_has_true_poses_above_the_ground():
    dataset = open_dataset(transforms(real_folder("lego128"), imsize=64))
    assert len(dataset) == 100
    assert dataset.fov == pytest.approx(39.598, abs=1e-3)
    elevation = torch.rad2deg(torch.asin(1 - 2 * angles_from_pose(dataset.poses)[1]))
    assert 6 < elevation.min() < 8
    assert 88 < elevation.max() < 90
    corners = torch.stack([dataset[index][0][:, 0, 0] for index in range(100)])
    assert corners.min() == 1  # transparent pixels became white
    black = open_dataset(transforms(real_folder("lego128"), imsize=64, white_bkgd=False))
    assert black[0][0][:, 0, 0].tolist() == [-1, -1, -1]
