"""Features of planes by rows of channels, as a CPU reads them, against grid_sample, as a GPU does."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from graf.app import builders
from graf.app.memory_estimator import StepPlanner
from graf.config import load_config
from graf.models import plane_lookup
from graf.models.plane_lookup import arrange_planes, sample_planes

CHANNELS, SIZES = 5, (2, 7, 8)


def draw(size: int, batch: int = 3, count: int = 40, channels: int = CHANNELS) -> tuple[Tensor, Tensor]:
    """Planes, and places inside, outside, on grid points and on edges, many of them in the same cells."""
    generator = torch.Generator().manual_seed(size)
    planes = torch.randn(batch, 3, channels, size, size, generator=generator, dtype=torch.float64)
    places = 2.6 * torch.rand(batch, count, 3, generator=generator, dtype=torch.float64) - 1.3
    centres = (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1
    places[:, :size] = centres[:, None]
    places[:, size : size + 3] = torch.tensor([-1.0, 1.0, 0.25], dtype=torch.float64)
    return planes, places


def evaluate(planes: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Features, and the gradient of a sum of them in which every number weighs something else."""
    planes = planes.detach().requires_grad_()
    features = sample_planes(planes, places)
    weights = torch.arange(1.0, features.numel() + 1, dtype=torch.float64).sin().view(features.shape)
    (gradient,) = torch.autograd.grad((features * weights).sum(), planes)
    return features, gradient


@pytest.mark.parametrize(("size", "batch", "channels"), [*((size, 3, CHANNELS) for size in SIZES), (128, 5, 1)])
def test_rows_of_channels_give_what_grid_sample_gives(size, batch, channels, monkeypatch):
    planes, places = draw(size, batch, 4 * max(size, 10), channels)  # 5 x 128^2 cells are more than 16 bits hold
    found = evaluate(planes, places)
    monkeypatch.setattr(plane_lookup, "is_exporting", lambda: True)
    assert_close(found, evaluate(planes, places), atol=1e-12, rtol=1e-12)
    monkeypatch.undo()
    assert_close(found, evaluate(arrange_planes(planes), places), atol=1e-12, rtol=1e-12)


def test_gradients_of_places_are_there_for_cameras_that_learn():
    planes, places = draw(8)
    features = sample_planes(planes, places.requires_grad_())
    (gradient,) = torch.autograd.grad(features.square().sum(), places)
    inside = places.detach().abs().amax(-1) < 0.8
    assert bool((gradient[inside] != 0).any(-1).all())


def test_arranged_planes_are_the_same_numbers_with_channels_side_by_side():
    planes, _ = draw(7)
    arranged = arrange_planes(planes)
    assert torch.equal(arranged, planes)
    assert arranged.stride(2) == 1
    assert arrange_planes(arranged).data_ptr() == arranged.data_ptr()


def test_what_is_not_a_number_reads_no_memory_that_is_not_the_planes():
    planes, places = draw(8)
    places[1, 0] = torch.nan
    features, gradient = evaluate(planes, places)
    assert torch.isnan(features[1, 0]).all()
    assert torch.isfinite(features[[0, 2]]).all()
    assert torch.isfinite(gradient[[0, 2]]).all()


def test_a_plan_for_another_device_looks_planes_up_as_there(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("rows are read on a CPU alone")

    planes, places = draw(8)
    expected = sample_planes(planes, places)
    monkeypatch.setattr(plane_lookup._SampleByRow, "apply", refuse)
    with plane_lookup.look_up_as_on("cuda"):
        assert arrange_planes(planes).is_contiguous()
        assert_close(sample_planes(planes, places), expected, atol=1e-12, rtol=1e-12)
        config = load_config("smoke", ["nerf.field=triplane"])
    StepPlanner(config, device_type="cuda").predict(builders.build_memory_settings(config, "cuda"), between=False)
    with pytest.raises(AssertionError, match="on a CPU alone"):
        StepPlanner(config).predict(builders.build_memory_settings(config, "cpu"), between=False)


@pytest.mark.parametrize("num_cells", [2**16, 2**16 + 1, 300_000])
def test_cells_are_sorted_whether_or_not_16_bits_hold_them(num_cells: int) -> None:
    cells = torch.randint(num_cells, (5000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    cells[:2] = torch.tensor([num_cells - 1, 0])
    assert torch.equal(cells[plane_lookup._sort(cells, num_cells)], cells.sort().values)
