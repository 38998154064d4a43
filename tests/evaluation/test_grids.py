"""Grids and paths: which object and which camera stands where in a picture."""

import numpy as np
import pytest
import torch
from torch import Tensor

from graf.evaluation.grids import Showcase, compare_with_photographs, draw_showcase, path_frames, render_showcase
from graf.evaluation.pictures import to_uint8
from graf.evaluation.renderer import Renders
from graf.geometry.views import Cameras, Views

CAMERAS = Cameras(3.5, (0.2, 0.4))
SIZE = 4


class FlatRenderer:
    """Stands in for Renderer: paints each image in one colour that says its code, class and azimuth."""

    cameras = CAMERAS
    classes = ("cup", "pot", "jug")

    def __init__(self) -> None:
        self.views: list[Views] = []

    def instance_codes(self, instances: Tensor) -> Tensor:
        return instances[:, None] / 10.0

    def render_views(self, z: Tensor, views: Views, super_resolve: bool = False) -> Renders:
        self.views.append(views)
        colours = torch.stack([z[:, 0], views.class_idx / 10, views.u * 2 - 1], 1)
        plane = torch.ones(len(z), 1, SIZE, SIZE)
        rgb = colours[:, :, None, None] * plane
        sr = -rgb.repeat_interleave(2, -1).repeat_interleave(2, -2) if super_resolve else None
        return Renders(rgb, 3 * plane, 0.5 * plane, sr)


def tile(picture: np.ndarray, row: int, column: int, size: int = SIZE) -> list[int]:
    """The colour of a tile of an unlabelled grid of images of `size` pixels."""
    step = size + 2
    part = picture[row * step + 2 : row * step + 2 + size, column * step + 2 : column * step + 2 + size]
    assert (part == part[0, 0]).all()
    return part[0, 0].tolist()


def colour(z: float, class_idx: int, u: float) -> list[int]:
    return to_uint8(torch.tensor([z, class_idx / 10, u * 2 - 1])[:, None, None])[:, 0, 0].tolist()


def test_objects_are_rows_and_azimuths_columns():
    showcase = Showcase.around(torch.tensor([[0.1], [-0.6]]), [2, 1], 4, 0.3)
    assert showcase.columns == 4
    renderer = FlatRenderer()
    pictures = draw_showcase(render_showcase(renderer, showcase), showcase.columns, 2.5, 4.5)
    assert set(pictures) == {"rgb", "depth", "opacity"}
    for picture in pictures.values():
        assert picture.shape == (2 * (SIZE + 2) + 2, 4 * (SIZE + 2) + 2, 3)
        assert picture.dtype == np.uint8
    for row, (z, class_idx) in enumerate(((0.1, 2), (-0.6, 1))):
        for column, u in enumerate((0, 0.25, 0.5, 0.75)):
            assert tile(pictures["rgb"], row, column) == colour(z, class_idx, u)
    assert tile(pictures["opacity"], 1, 2) == [128, 128, 128]
    heights = torch.cat([views.v for views in renderer.views])
    assert torch.allclose(heights, torch.full((8,), 0.3))


def test_super_resolved_images_are_shown_beside_their_bicubic_counterparts_at_their_own_size():
    showcase = Showcase.around(torch.tensor([[0.1], [-0.6]]), [2, 1], 4, 0.3)
    pictures = draw_showcase(render_showcase(FlatRenderer(), showcase, super_resolve=True), 4, 2.5, 4.5)
    assert set(pictures) == {"rgb", "depth", "opacity", "sr", "bicubic"}
    assert pictures["sr"].shape == pictures["bicubic"].shape == (2 * (2 * SIZE + 2) + 2, 4 * (2 * SIZE + 2) + 2, 3)
    assert (
        tile(pictures["sr"], 1, 3, 2 * SIZE) == to_uint8(-torch.tensor([[[-0.6]], [[0.1]], [[0.5]]]))[:, 0, 0].tolist()
    )
    assert tile(pictures["bicubic"], 1, 3, 2 * SIZE) == colour(-0.6, 1, 0.75)


def test_a_sharpened_path_shows_both_in_two_rows():
    z, u, v = torch.zeros(1, 2, 1), torch.tensor([0.25]), torch.tensor([0.3])
    (frame,) = path_frames(FlatRenderer(), z, [1, 3], u, v, super_resolve=True)
    assert tile(frame, 0, 1, 2 * SIZE) == colour(0, 3, 0.25)
    assert tile(frame, 1, 1, 2 * SIZE) == to_uint8(torch.tensor([[[0.0]], [[-0.3]], [[0.5]]]))[:, 0, 0].tolist()


def test_captions_take_a_margin_and_leave_the_images_as_they_are():
    showcase = Showcase.around(torch.tensor([[0.1], [-0.6]]), [2, 1], 4, 0.3)
    renders = list(render_showcase(FlatRenderer(), showcase))
    plain = draw_showcase(renders, 4, 2.5, 4.5)["rgb"]
    labelled = draw_showcase(renders, 4, 2.5, 4.5, ["car", "mug"], ["0", "90", "180", "270"])["rgb"]
    top, left = labelled.shape[0] - plain.shape[0], labelled.shape[1] - plain.shape[1]
    assert top > 0
    assert left > 0
    assert np.array_equal(labelled[top:, left:], plain)


@pytest.mark.parametrize(("depth", "darker"), [(4.4, 2.6), (3.4, 2.6)])
def test_a_far_surface_is_drawn_darker(depth, darker):
    ones = torch.ones(1, 1, SIZE, SIZE)

    def brightness(value: float) -> float:
        renders = Renders(torch.zeros(1, 3, SIZE, SIZE), value * ones, ones)
        return float(np.mean(tile(draw_showcase([renders], 1, 2.5, 4.5)["depth"], 0, 0)))

    assert brightness(depth) < brightness(darker)


def test_a_path_shows_frame_by_frame_the_codes_and_the_camera_of_that_frame():
    z = torch.tensor([[[0.0], [0.5]], [[0.2], [0.6]], [[0.4], [0.7]]])
    u, v = torch.tensor([0.0, 0.3, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    renderer = FlatRenderer()
    frames = path_frames(renderer, z, [0, 2], u, v)
    first = next(frames)
    assert len(renderer.views) == 1  # rendered as they are asked for
    frames = [first, *frames]
    assert len(frames) == 3
    for number, frame in enumerate(frames):
        assert frame.shape == (SIZE + 4, 2 * (SIZE + 2) + 2, 3)
        for column, class_idx in enumerate((0, 2)):
            assert tile(frame, 0, column) == colour(float(z[number, column, 0]), class_idx, float(u[number]))
        assert torch.allclose(renderer.views[number].v, v[number].expand(2))


def test_a_path_whose_parts_differ_in_length_is_an_error():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        list(path_frames(FlatRenderer(), torch.zeros(3, 1, 1), [0], torch.zeros(2), torch.zeros(3)))


@pytest.mark.parametrize("super_resolve", [False, True])
def test_photographs_stand_above_renders_of_the_same_views_and_instances(super_resolve):
    labels = torch.tensor([[2, 0, 0, 5], [1, 0, 90, 3], [2, 1, 180, 6], [2, 0, 270, 7]])
    views = CAMERAS.views_of_labels(labels)
    size = SIZE * (2 if super_resolve else 1)
    photographs = labels[:, 3, None, None, None] / 10 * torch.ones(4, 3, size, size)
    picture = compare_with_photographs(FlatRenderer(), photographs, views, 2, super_resolve)
    assert picture.shape[0] == (6 if super_resolve else 4) * (size + 2) + 2
    grid = picture[:, -(2 * (size + 2) + 2) :]

    def grey(value: float) -> list[int]:
        return [int(level) for level in to_uint8(torch.full((3, 1, 1), value)).flatten()]

    def render(row: int) -> list[int]:
        z, class_idx, u = labels[row, 3] / 10, labels[row, 0] / 10, views.u[row] * 2 - 1
        return to_uint8(torch.stack([z, class_idx, u])[:, None, None]).flatten().tolist()

    assert tile(grid, 0, 0, size) == grey(0.3)  # classes in order; of the third the first and the last photograph
    assert tile(grid, 0, 1, size) == [255, 255, 255]
    assert tile(grid, 1, 0, size) == render(1)
    first = 2 + super_resolve
    assert [tile(grid, first, column, size) for column in (0, 1)] == [grey(0.5), grey(0.7)]
    assert [tile(grid, first + 1, column, size) for column in (0, 1)] == [render(0), render(3)]
