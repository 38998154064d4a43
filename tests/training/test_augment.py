"""Augmentation: the identity where it is off, one law per image, and shifts and cut-outs against loops."""

import pytest
import torch
from torch.testing import assert_close

from graf.training.augment import NUM_UNIFORMS, Augmentation, augment_patches, jitter_colour, translate

FULL = Augmentation(colour=0.8, translation=0.2, cutout=0.4)
LAWS = [FULL, Augmentation(colour=1.0), Augmentation(translation=0.3), Augmentation(cutout=0.5)]


def draw(batch: int = 5, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(batch, 3, size, size) * 2 - 1, torch.rand(batch, NUM_UNIFORMS)


def test_strength_zero_is_the_identity():
    patches, uniforms = draw()
    assert torch.equal(augment_patches(patches, Augmentation(), uniforms), patches)


def test_the_middle_of_every_uniform_moves_and_recolours_nothing():
    patches, uniforms = draw()
    law = Augmentation(colour=1.0, translation=0.3)
    assert_close(augment_patches(patches, law, torch.full_like(uniforms, 0.5)), patches, atol=1e-6, rtol=0)


@pytest.mark.parametrize("law", LAWS)
def test_every_law_that_is_on_changes_patches(law):
    patches, uniforms = draw()
    changed = (augment_patches(patches, law, uniforms) != patches).flatten(1).any(1)
    assert changed.sum() >= 4  # a shift may round to nothing


@pytest.mark.parametrize("law", LAWS)
def test_any_split_of_the_batch_gives_the_same_rows(law):
    patches, uniforms = draw()
    whole = augment_patches(patches, law, uniforms)
    for sizes in ([1, 4], [2, 2, 1], [1] * 5):
        pairs = zip(patches.split(sizes), uniforms.split(sizes), strict=True)
        assert_close(torch.cat([augment_patches(part, law, row) for part, row in pairs]), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("law", LAWS)
def test_gradients_pass_gradcheck(law):
    uniforms = torch.rand(2, NUM_UNIFORMS, dtype=torch.float64)
    patches = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda patches: augment_patches(patches, law, uniforms), (patches,))


def test_colour_jitter_by_hand():
    patches = torch.rand(1, 3, 4, 4) * 2 - 1
    brighter = jitter_colour(patches, torch.tensor([[0.4, 0.0, 0.0]]))
    assert_close(brighter, patches + 0.2)
    grey = jitter_colour(patches, torch.tensor([[0.0, -1.0, 0.0]]))
    assert_close(grey, patches.mean(1, keepdim=True).expand_as(patches))
    flatter = jitter_colour(patches, torch.tensor([[0.0, 0.0, -1.0]]))
    assert_close(flatter - patches.mean(), (patches - patches.mean()) / 2)


def test_translation_equals_the_loop_with_repeated_edges():
    patches, _ = draw(4, 6)
    shifts = torch.tensor([[0, 0], [2, -1], [-3, 4], [-6, 6]])
    moved = translate(patches, shifts)
    for b, (x, y) in enumerate(shifts.tolist()):
        for i in range(6):
            for j in range(6):
                source = patches[b, :, min(max(i - y, 0), 5), min(max(j - x, 0), 5)]
                assert torch.equal(moved[b, :, i, j], source)


def test_shifts_are_uniform_whole_pixels_up_to_the_limit_in_both_directions():
    columns = torch.arange(20.0).expand(1, 3, 20, 20)
    uniforms = torch.full((101, NUM_UNIFORMS), 0.5)
    uniforms[:, 3] = torch.linspace(0, 1 - 2**-24, 101)
    moved = augment_patches(columns.expand(101, -1, -1, -1), Augmentation(translation=0.15), uniforms)
    assert (10 - moved[:, 0, 10, 10]).unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert (10 - moved[[0, -1], 0, 10, 10]).tolist() == [-3, 3]


@pytest.mark.parametrize(("size", "cutout", "side"), [(16, 0.25, 4), (16, 0.3, 5), (9, 0.5, 4), (9, 1 / 3, 3)])
def test_the_cutout_blanks_one_square_of_its_side_clipped_at_the_border(size, cutout, side):
    uniforms = torch.rand(200, NUM_UNIFORMS)
    blank = augment_patches(torch.ones(200, 3, size, size), Augmentation(cutout=cutout), uniforms) == 0
    assert torch.equal(blank[:, 0], blank[:, 2])
    rows, columns = blank[:, 0].any(2).sum(1), blank[:, 0].any(1).sum(1)
    assert torch.equal(blank[:, 0].sum((1, 2)), rows * columns)  # a rectangle
    assert rows.max() == columns.max() == side
    central = (uniforms[:, 5:] - 0.5).abs().amax(1) < 0.2
    assert bool((blank[central, 0].sum((1, 2)) == side * side).all())


def test_the_cutout_reaches_every_pixel():
    uniforms = torch.rand(2000, NUM_UNIFORMS)
    uniforms[0, 5:], uniforms[1, 5:] = 0.0, 1 - 2**-24
    blank = augment_patches(torch.ones(2000, 3, 8, 8), Augmentation(cutout=0.25), uniforms)[:, 0] == 0
    assert bool(blank.any(0).all())
