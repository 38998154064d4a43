"""What makes a step fast changes nothing that is learned: fifty steps in float64, beside those of the plainest form."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graf.models import ccsr, mlp_field, plane_lookup, plane_sources, triplane_field
from graf.models.discriminator import Collapse, ConvolutionWithMaps
from graf.models.field import RadianceField
from graf.training.inputs import InputSampler, StepInputs
from graf.training.trainer import Trainer

STEPS = 50
SUPER_RESOLUTION = (
    *("data.imsize=16", "ccsr.enabled=true", "ccsr.every=2", "ccsr.features=4", "ccsr.blocks=1"),
    *("ccsr.photographs=1", "ccsr.photometric=10", "ccsr.adversarial=0.1"),
)
PLANES = (
    *("nerf.field=triplane", "nerf.planes=synthesis", "nerf.plane_resolution=12", "nerf.plane_channels=4"),
    *("nerf.synthesis_width=4", "nerf.decoder_width=8", "nerf.colour_components=2", "nerf.N_importance=4"),
    *("ray_sampler.snap=true", "training.match_views=true", "training.photometric=20", "training.share_fakes=true"),
    *("training.optimizer=adam", "training.opacity=0.1", "training.instance_prior=0.02"),
    "discriminator.condition_maps=4",
)
CASES = {
    "tri-planes": (*PLANES, *SUPER_RESOLUTION),
    "MLP": (),
    "MLP, kept": ("training.memory_strategy=dense", "training.chunk=100"),
}
STRATEGIES = {"tri-planes": "dense", "MLP": "deferred", "MLP, kept": "dense"}


def linear_relu(
    x: Tensor, weight: Tensor, shares: Tensor, again: tuple[Tensor, Tensor] | None = None, *others: Any
) -> Tensor:
    return torch.relu(functional.linear(x, weight) + shares + (0 if again is None else functional.linear(*again)))


def decode(features: Tensor, weight: Tensor, bias: Tensor, head: Tensor, head_bias: Tensor) -> Tensor:
    return torch.relu(features @ weight.mT + bias) @ head.mT + head_bias


def modulate(self: Any, images: Tensor, style: Tensor) -> Tensor:
    """A convolution for each image, whose weights its style scales and then makes of unit length (StyleGAN2, eq. 3)."""
    weights = self.weight * self.style(style)[:, None, :, None, None]
    weights = weights * torch.rsqrt(weights.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    found = [functional.conv2d(image[None], weight, padding=1) for image, weight in zip(images, weights, strict=True)]
    return torch.cat(found) + self.bias[:, None, None]


def convolve_with_maps(self: Any, patches: Tensor, maps: Tensor) -> Tensor:
    maps = maps[:, :, None, None].expand(-1, -1, *patches.shape[2:])
    return nn.Conv2d.forward(self, torch.cat([patches, maps.to(patches.dtype)], dim=1))


def write_plainly(patch: pytest.MonkeyPatch) -> None:
    """Replace everything that only makes steps fast."""
    patch.setattr(mlp_field, "linear_relu", linear_relu)
    patch.setattr(mlp_field.MLPField, "forward_visible", RadianceField.forward_visible)  # every point
    patch.setattr(triplane_field, "decode", decode)
    patch.setattr(plane_sources.ModulatedConvolution, "forward", modulate)
    patch.setattr(plane_lookup, "is_exporting", lambda: True)  # asks for grid_sample
    patch.setattr(ConvolutionWithMaps, "forward", convolve_with_maps)
    patch.setattr(Collapse, "forward", lambda self, x: nn.Conv2d.forward(self, x).flatten(1))
    for module in (plane_sources, ccsr):
        patch.setattr(module, "for_convolution", lambda tensor, dtype: tensor.to(dtype))


class Float64Inputs:
    """A trainer's inputs with every number in float64."""

    def __init__(self, inputs: InputSampler) -> None:
        self.inputs = inputs

    def draw(self, *arguments: Any) -> StepInputs:
        return self.inputs.draw(*arguments).map(lambda part: part.double() if part.is_floating_point() else part)


def learn(trainer: Trainer, batches: Any) -> list[dict[str, float]]:
    """The losses of every step."""
    averages = [average.module for average in trainer.averages.values()]
    for module in [*(player.network for player in trainer.players), *averages]:
        module.double()
    trainer.inputs = Float64Inputs(trainer.inputs)  # type: ignore[assignment]
    curves = []
    for images, labels in batches:
        statistics = trainer.step(images, labels)
        curves.append({name: float(value) for name, value in statistics.items() if name.startswith("loss")})
    return curves


@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_have_the_losses_of_the_plainest_form(case, make_trainer, batches, monkeypatch):
    fast = make_trainer(*CASES[case])
    assert fast.memory.strategy == STRATEGIES[case]
    found = learn(fast, batches(STEPS))
    with monkeypatch.context() as patch:
        write_plainly(patch)
        plain = make_trainer(*CASES[case])
        plain.use(replace(plain.memory, strategy="dense", chunk=64))  # few rays beside as many as fit
        expected = learn(plain, batches(STEPS))
    assert any("loss_sr" in losses for losses in expected) == ("ccsr.enabled=true" in CASES[case])
    assert expected[0] != expected[-1]
    for step, (losses, exact) in enumerate(zip(found, expected, strict=True)):
        assert losses == pytest.approx(exact, rel=1e-9), step
