"""Labels from file names and labels.csv."""

from pathlib import Path

import pytest
import torch

from graf.data.errors import DataError
from graf.data.labels import (
    LabelRow,
    balance_instances,
    check_heights,
    check_name,
    compile_file_pattern,
    natural_key,
    number_labels,
    parse_file_name,
    read_labels_csv,
    wrap_angle,
)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("obj14__235.png", ("obj14", 0, 235)),
        ("classname_h2__235.png", ("classname", 2, 235)),
        ("red_car_h10__0.JPEG", ("red_car", 10, 0)),
        ("folder/obj5__-90.png", ("obj5", 0, 270)),
        ("a__b__719.6.png", ("a__b", 0, 0)),
    ],
)
def test_default_pattern_reads_class_height_and_angle(file, expected):
    row = parse_file_name(file, compile_file_pattern(None))
    assert (row.class_name, row.height, row.angle) == expected


@pytest.mark.parametrize("file", ["photo.png", "obj14_235.png", "__5.png", "obj__x.png"])
def test_names_without_a_label_do_not_match(file):
    assert parse_file_name(file, compile_file_pattern(None)) is None


def test_pattern_with_a_slash_reads_the_folder_name():
    pattern = compile_file_pattern(r"(?P<class>\w+)/deg(?P<angle>\d+)\.png")
    assert parse_file_name("cup/deg45.png", pattern) == LabelRow("cup/deg45.png", "cup", 0, 45)
    assert parse_file_name("deg45.png", pattern) is None


def test_pattern_may_name_the_instance():
    pattern = compile_file_pattern(r"(?P<class>[a-z]+)(?P<instance>\d+)?__(?P<angle>\d+)\.png")
    assert parse_file_name("cup7__5.png", pattern) == LabelRow("cup7__5.png", "cup", 0, 5, "7")
    assert parse_file_name("cup__5.png", pattern) == LabelRow("cup__5.png", "cup", 0, 5)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [(r"(?P<class>.+)", "angle"), (r"(?P<angle>\d+)", "class"), ("(", "not a regular expression")],
)
def test_unusable_patterns_are_refused(pattern, message):
    with pytest.raises(DataError, match=message):
        compile_file_pattern(pattern)


def test_pattern_that_finds_no_number_for_the_angle_is_an_error_that_names_the_file():
    with pytest.raises(DataError, match=r"cup-left\.png.*'left'"):
        parse_file_name("cup-left.png", compile_file_pattern(r"(?P<class>\w+)-(?P<angle>\w+)\.png"))


def test_classes_are_numbered_in_natural_order():
    assert sorted(["obj33", "obj14", "obj5", "cup"], key=natural_key) == ["cup", "obj5", "obj14", "obj33"]
    rows = [LabelRow("a", "obj14", 1, 7), LabelRow("b", "obj5", 0, 359)]
    labels, instance_names = number_labels(rows, ["obj5", "obj14"])
    assert labels.tolist() == [[1, 1, 7, -1], [0, 0, 359, -1]]
    assert instance_names == []


def test_instances_are_numbered_over_all_classes_in_natural_order_of_class_and_name():
    pairs = [("obj14", "2"), ("obj5", "i10"), ("obj5", "i9"), ("obj14", ""), ("obj5", "2"), ("obj5", "i10")]
    rows = [LabelRow(str(number), *pair[:1], 0, number, pair[1]) for number, pair in enumerate(pairs)]
    labels, instance_names = number_labels(rows, ["obj5", "obj14"])
    assert instance_names == ["obj5/2", "obj5/i9", "obj5/i10", "obj14/2"]
    assert labels[:, 3].tolist() == [3, 2, 1, -1, 0, 2]


@pytest.mark.parametrize(("degrees", "label"), [(359.6, 0), (-0.4, 0), (-1, 359), (725, 5), (12.3, 12)])
def test_angles_are_whole_degrees_below_360(degrees, label):
    assert wrap_angle(degrees) == label


def write_csv(tmp_path, text, **options):
    path = tmp_path / "labels.csv"
    path.write_text(text, **options)
    return path


def test_csv_columns_may_come_in_any_order_with_a_byte_order_mark(tmp_path):
    path = write_csv(tmp_path, "angle,class,note,height,file\n-10,cup,x,1,a/b.png\n", encoding="utf-8-sig")
    assert read_labels_csv(path) == [LabelRow("a/b.png", "cup", 1, 350)]


def test_csv_may_tell_instance_and_split(tmp_path):
    path = write_csv(
        tmp_path, "file,class,height,angle,split,instance\na,cup,0,1,test,old\nb,cup,0,2,,new\nc,cup,0,3\n"
    )
    assert read_labels_csv(path) == [
        LabelRow("a", "cup", 0, 1, "old", "test"),
        LabelRow("b", "cup", 0, 2, "new"),
        LabelRow("c", "cup", 0, 3),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file;class;height;angle\n", "line 1: found file;class;height;angle; expected the header file,class,height"),
        ("", "line 1: found nothing"),
        ("file,class,height,angle\na.png,cup,0,0\nb.png,cup,top,0\n", "line 3: height 'top'"),
        ("file,class,height,angle\na.png,cup,0,east\n", "line 2: angle 'east'"),
        ("file,class,height,angle\na.png,cup,0,nan\n", "line 2: angle 'nan'"),
        ("file,class,height,angle\na.png,,0,0\n", "line 2: column 'class' is empty"),
        ("file,class,height,angle\na.png,cup\n", "line 2: height ''"),
        (
            "file,class,height,angle,split\na.png,cup,0,0,\nb.png,cup,0,0,val\n",
            "line 3: split 'val'; expected train, validation, test or nothing",
        ),
        ("file,class,height,angle\na.png,cup,0,0\na.png,cup,0,5\n", "line 3: 'a.png' is already in line 2"),
        ("file,class,height,angle\na/b.png,cup,0,0\n.\\a//b.png,pot,0,5\n", "line 3: 'a/b.png' is already in line 2"),
    ],
)
def test_csv_errors_name_file_line_and_value(tmp_path, text, message):
    path = write_csv(tmp_path, text)
    with pytest.raises(DataError) as error:
        read_labels_csv(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,class,height,angle\na.png,Tür,0,0\n".encode("cp1252"), "is not UTF-8 text"),
        (b"file,class,height,angle\n" + b"x" * 200_000 + b",cup,0,0\n", "is not a CSV file"),
    ],
)
def test_a_file_that_is_no_utf8_table_says_so(tmp_path, content, message):
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_labels_csv(path)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = write_csv(tmp_path, "file,class,height,angle\n")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"labels\.csv: cannot be read \(Permission denied\)"):
        read_labels_csv(path)


@pytest.mark.parametrize("name", ["a/b", "a\\b", "..", "a\nb", "\udce9", "x" * 101])
def test_names_that_files_cannot_have_are_refused(name):
    with pytest.raises(DataError, match=r"here: class .* at most 100 printable characters"):
        check_name(name, "class", "here")
    assert check_name("あ" * 100, "class", "here") == "あ" * 100


def test_a_name_without_the_optional_angle_of_its_pattern_has_no_label():
    pattern = compile_file_pattern(r"(?P<class>[a-z]+)(?:_(?P<angle>\d+))?\.png")
    assert parse_file_name("cup_20.png", pattern) == LabelRow("cup_20.png", "cup", 0, 20)
    assert parse_file_name("cup.png", pattern) is None


@pytest.mark.parametrize("height", [-1, 2])
def test_height_outside_v_list_is_an_error(height):
    with pytest.raises(DataError, match=f"cup.png has height {height}, but data.v_list has 2"):
        check_heights([LabelRow("cup.png", "cup", height, 0)], (0.2, 0.3), "here")


@pytest.mark.parametrize(
    ("instances", "shown"),
    [([-1, -1, -1], [1, 1, 1]), ([0, 1, 2], [1, 1, 1]), ([0, -1, -1, -1], [3, 1, 1, 1]), ([0, 1, 2, -1], [1, 1, 1, 1])],
)
def test_rare_known_instances_are_shown_so_often_that_they_make_half(instances, shown):
    labels = torch.zeros(len(instances), 4, dtype=torch.int64)
    labels[:, 3] = torch.tensor(instances)
    assert balance_instances(labels) == shown
