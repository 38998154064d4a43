"""Where planes come from: the synthesis against StyleGAN2's weight demodulation, and what codes and classes change."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from graf.models.plane_sources import STORED_SHARE, ModulatedConvolution, PlaneShape, PlaneSynthesis, PlaneTable

SHAPE = PlaneShape(resolution=20, channels=3, width=6, dim_shape=4, num_classes=3)
CLASSES = torch.tensor([2, 0])


def make_synthesis() -> PlaneSynthesis:
    """A network that has learned something: its output starts at zero."""
    torch.manual_seed(1)
    synthesis = PlaneSynthesis(SHAPE).double()
    torch.nn.init.normal_(synthesis.output)
    return synthesis


def test_scaled_activations_are_modulated_and_demodulated_weights():
    torch.manual_seed(0)
    layer = ModulatedConvolution(5, 7, 3, 4).double()
    torch.nn.init.normal_(layer.bias)
    images, style = torch.randn(2, 5, 6, 6, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    for image, scale, found in zip(images, layer.style(style), layer(images, style), strict=True):
        weight = layer.weight * scale[None, :, None, None]  # StyleGAN2, equation 1
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()  # equation 3
        assert_close(found, functional.conv2d(image[None], weight, layer.bias, padding=1)[0])


def test_a_modulated_layer_keeps_the_variance_of_its_input():
    torch.manual_seed(0)
    layer = ModulatedConvolution(32, 32, 3, 4)
    output = layer(torch.randn(4, 32, 16, 16), 3 * torch.randn(4, 4)).detach()
    assert float(output[..., 1:-1, 1:-1].std()) == pytest.approx(1, rel=0.1)


def test_a_new_network_gives_every_code_the_planes_of_its_class():
    synthesis = PlaneSynthesis(SHAPE)
    planes = synthesis(torch.randn(2, 4), CLASSES)
    assert planes.shape == (2, 3, 3, 20, 20)
    assert_close(planes, synthesis.table.stored[CLASSES] / STORED_SHARE)
    assert torch.equal(planes, synthesis.table(torch.randn(2, 4), CLASSES))


def test_codes_and_classes_change_what_the_network_adds():
    synthesis = make_synthesis()
    torch.nn.init.zeros_(synthesis.table.stored)
    codes = torch.randn(2, 4, dtype=torch.float64)
    planes = synthesis(codes, CLASSES)
    for other in (synthesis(codes + 1, CLASSES), synthesis(codes, CLASSES.flip(0))):
        assert (planes - other).abs().mean() > 0.01 * planes.abs().mean()
    assert_close(synthesis(codes[1:], CLASSES[1:]), planes[1:])  # a batch's rows do not know each other


def test_every_weight_of_the_network_learns():
    synthesis = make_synthesis()
    codes = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    synthesis(codes, CLASSES).square().sum().backward()
    for name, parameter in synthesis.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name
    assert bool((codes.grad != 0).all())


def test_a_table_learns_the_classes_that_it_is_asked_for_alone():
    table = PlaneTable(SHAPE)
    table(torch.randn(2, 4), CLASSES).sum().backward()
    assert table.stored.grad.flatten(1).sum(1).tolist() == pytest.approx([3600 / STORED_SHARE, 0, 3600 / STORED_SHARE])
