"""Weights without pickle: they come back as they were, and a file that is not whole or not ours is one line."""

import json
import struct

import pytest
import torch

from graf.runtime.checkpoint import CheckpointError
from graf.sharing import weights
from graf.sharing.weights import read_weights, write_weights

safetensors = pytest.importorskip("safetensors.torch")
META = {"config": {"seed": 3, "name": "ä"}, "dataset": {"v_list": [0.25]}, "iteration": 7}


@pytest.fixture
def objects() -> dict[str, dict[str, torch.Tensor]]:
    generator = {"field.weight": torch.randn(3, 4).T, "count": torch.tensor(5), "empty": torch.zeros(0, 2)}
    return {"generator_average": generator, "ccsr_average": {"field.weight": torch.randn(2).to(torch.bfloat16)}}


@pytest.fixture
def file(tmp_path, objects):
    write_weights(tmp_path / "model.safetensors", objects, META)
    return tmp_path / "model.safetensors"


def header_of(path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


def test_what_is_read_is_what_was_written(file, objects):
    found = read_weights(file)
    assert found["meta"] == META
    assert found["objects"].keys() == objects.keys()
    for name, state in objects.items():
        assert found["objects"][name].keys() == state.keys()
        for key, tensor in state.items():
            assert torch.equal(found["objects"][name][key], tensor)
            assert found["objects"][name][key].dtype == tensor.dtype


def test_other_programs_read_the_tensors_and_the_strings(file, objects):
    assert torch.equal(safetensors.load_file(file)["generator_average.count"], objects["generator_average"]["count"])
    metadata = header_of(file)["__metadata__"]
    assert all(isinstance(value, str) for value in metadata.values())
    assert json.loads(metadata["graf"]) == META
    assert (metadata["format"], metadata["graf_format"]) == ("pt", "1")


def assert_refused_in_one_line(path, expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(str(path))
    assert "\n" not in message


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_one_line(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert_refused_in_one_line(file, "cannot be read: it is cut short or no safetensors file")


def test_any_flipped_bit_is_noticed(file):
    content = file.read_bytes()
    for place in range(8, len(content), 41):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(CheckpointError) as caught:
            read_weights(file)
        assert "\n" not in str(caught.value)


def rewrite(file, **changes: str | None) -> None:
    """The same tensors under other metadata; None removes a key."""
    metadata = header_of(file)["__metadata__"] | changes
    kept = {key: value for key, value in metadata.items() if value is not None}
    safetensors.save_file(safetensors.load_file(file), file, kept)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"graf": None}, "holds tensors but no description of a run"),
        ({"sha256": None}, "holds tensors but no description of a run"),
        ({"graf_format": "2"}, "has format '2', this version reads 1"),
        ({"graf": json.dumps(META | {"iteration": 8})}, "is not what was written"),
        ({"sha256": "0" * 64}, "is not what was written"),
    ],
)
def test_other_metadata_is_one_line(file, changes, expected):
    rewrite(file, **changes)
    assert_refused_in_one_line(file, expected)


@pytest.mark.parametrize("meaning", ["[" * 100_000, "nonsense", "[1]", "null"])
def test_a_description_that_is_none_is_one_line_though_its_hash_is_right(file, meaning):
    header = {"format": "pt", "graf_format": "1", "graf": meaning}
    tensors = safetensors.load_file(file)
    safetensors.save_file(tensors, file, header | {"sha256": weights._hash(tensors, header)})
    assert_refused_in_one_line(file, "its description of the run is")


def test_a_changed_shape_is_noticed(file):
    content = file.read_bytes()
    assert content.count(b"[4,3]") == 1
    file.write_bytes(content.replace(b"[4,3]", b"[3,4]"))
    assert_refused_in_one_line(file, "is not what was written")


def test_a_foreign_file_is_one_line(tmp_path):
    for name, content in {
        "a": b"",
        "b": b"PK\x03\x04" * 9,
        "c": b"\xff" * 100,
        "d": b"\x02" + bytes(7) + b"{}",
    }.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)
    assert_refused_in_one_line(tmp_path / "none.safetensors", "no such file of weights")
