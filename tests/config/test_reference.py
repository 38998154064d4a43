"""The page of every key: it is what the schema says now, and says of each key what the schema says."""

from pathlib import Path

import pytest

from graf.config.loading import _all_keys
from graf.config.reference import write_reference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_page_is_up_to_date():
    advice = "run: python -m graf.config.reference > docs/configuration.md"
    assert PAGE.read_text(encoding="utf-8") == write_reference(), advice


def test_every_key_has_a_row_with_its_description():
    page = write_reference()
    for key, description in _all_keys().items():
        if key != "data.refined_cameras":  # a section of its own, where it is not null
            assert f"| `{key}` |" in page, key
        assert description.replace("|", "\\|") in page, key


@pytest.mark.parametrize(
    "row",
    [
        "| `data.imsize` | whole number (at least 16, at most 2048) | `64` | side of the square images, pixels |",
        "| `training.max_minutes` | number (above 0) or null | `null` |",
        "| `training.chunk` | `auto` or whole number (above 0) | `auto` |",
        "| `training.betas` | list of 2: number (at least 0, below 1), number (at least 0, below 1) | `[0.0, 0.99]` |",
        '| `training.monitoring` | list of `tensorboard` or `wandb` or `trackio` | `["tensorboard"]` |',
        "| `data.radius` | number or list of 2: number, number | `3.5` |",
        "| `data.refined_cameras.framing.<name>.right` | list of 7 times number | required |",
        "| `evaluation.seed` | whole number (at least 0, below 4294967296) | `0` |",
    ],
)
def test_types_ranges_and_defaults_are_said_as_people_say_them(row):
    assert row in write_reference()
