"""Where curves and marks lie in a plot, pixel by pixel."""

import numpy as np
from PIL import ImageColor

from graf.evaluation.curves import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Panel, draw_panels


def pixels_of(picture: np.ndarray, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a colour below the legend."""
    rows, columns = np.nonzero((picture == ImageColor.getrgb(colour)).all(2))
    return rows[rows >= TOP], columns[rows >= TOP]


def test_a_mark_between_two_powers_stands_in_the_middle_of_them():
    panel = Panel("title", {"curve": [(1.0, 0.0), (100.0, 1.0)]}, {"mark": 10.0})
    rows, columns = pixels_of(draw_panels([panel]), COLOURS[1])
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    assert abs(columns.mean() - middle) <= 1
    assert columns.max() - columns.min() <= 2
    assert (rows.min(), rows.max()) == (TOP, HEIGHT - BOTTOM)


def test_a_curve_goes_from_corner_to_corner_and_is_held_at_the_bottom():
    panel = Panel("title", {"curve": [(1.0, -50.0), (10.0, -1.0), (100.0, 1.0)]}, bottom=-1.0)
    rows, columns = pixels_of(draw_panels([panel]), COLOURS[0])
    assert (columns.min(), columns.max()) == (LEFT, WIDTH - RIGHT)
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    assert np.abs(rows[columns < middle - 5] - (HEIGHT - BOTTOM)).max() <= 1
    assert rows.min() <= TOP + 1


def test_panels_stand_below_each_other_and_one_value_alone_can_be_drawn():
    flat = Panel("flat", {"curve": [(1e-5, 3.0)]})
    assert draw_panels([flat, flat, flat]).shape == (3 * HEIGHT, WIDTH, 3)
