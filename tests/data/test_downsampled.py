"""Photographs at the generator's resolution are the means of those at super-resolution's."""

import pytest
import torch
from torch.nn import functional
from torch.utils.data import Dataset

from graf.data.downsampled import DownsampledPhotographs
from graf.models.ccsr import BoxProjection, KernelProjection


class Photographs(Dataset):
    """Three random images with their labels."""

    def __init__(self):
        self.images, self.labels = (
            torch.rand(3, 3, 16, 16) * 2 - 1,
            torch.tensor([[0, 1, 20, -1], [1, 0, 350, 2], [0, 0, 0, 1]]),
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]

    def fingerprint(self):
        return "photographs-1"


@pytest.mark.parametrize("scale", [2, 4])
def test_reduced_photographs_are_block_means_with_the_same_labels(scale):
    photographs = Photographs()
    reduced = DownsampledPhotographs(photographs, BoxProjection(scale).down, f"box{scale}")
    assert len(reduced) == 3
    for index in range(3):
        image, label = reduced[index]
        assert torch.equal(image, functional.avg_pool2d(photographs.images[index], scale))
        assert torch.equal(label, photographs.labels[index])


def test_reduction_is_that_of_the_projection_and_leaves_no_graph():
    project, photographs = KernelProjection(2, (0.125, 0.375, 0.375, 0.125)), Photographs()
    photographs.images.requires_grad_(True)
    image, _ = DownsampledPhotographs(photographs, project.down, "binomial")[2]
    assert not image.requires_grad
    assert torch.equal(image, project.down(photographs.images.detach()[2:3])[0])


def test_the_fingerprint_tells_photographs_and_reductions_apart():
    def names(projection, name):
        photographs = Photographs()
        return photographs.fingerprint(), DownsampledPhotographs(photographs, projection.down, name).fingerprint()

    full, box = names(BoxProjection(2), "box2")
    _, other = names(BoxProjection(4), "box4")
    assert len({full, box, other}) == 3
    assert box == names(BoxProjection(2), "box2")[1]
