"""GRAF's published settings still give GRAF's algorithm: a step of the trainer against the loop as it was published.

The loop below is written plainly: latents and view directions concatenated at every point, one pass of D after the
other, whole patches at once. Random numbers and D's network are the trainer's.
"""

import copy
import math

import numpy as np
import pytest
import torch
from imageio.v3 import imwrite
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from graf.app import builders
from graf.config import load_config
from graf.models.mlp_field import MLPField
from graf.runtime.amp import Precision
from graf.runtime.randomness import Draws
from graf.training.inputs import FakeInputs
from graf.training.trainer import Trainer

SMALL = (
    *("data.imsize=32", "data.crop=null", "ray_sampler.N_samples=256", "nerf.netwidth=16", "nerf.N_samples=6"),
    *("nerf.multires=4", "z_dist.dim=8", "z_dist.dim_appearance=4", "discriminator.ndf=8", "training.batch_size=3"),
    *("training.fid_every=0", "training.nworkers=0"),
)


def encode(x: Tensor, octaves: int, frequency: float) -> Tensor:
    waves = [wave(2**k * frequency * x) for k in range(octaves) for wave in (torch.sin, torch.cos)]
    return torch.cat([x, *waves], -1)


def run_field(field: MLPField, points: Tensor, directions: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """rgb and density of points (B, N, S, 3) with everything concatenated at every point."""
    shape = field.shape

    def at_points(code: Tensor) -> Tensor:
        return code[:, None, None].expand(*points.shape[:3], -1)

    embedding = field.class_embedding(torch.zeros(len(z), dtype=torch.int64))
    shape_code = at_points(torch.cat([z[:, : shape.dim_shape], embedding], -1))
    appearance = at_points(torch.cat([z[:, shape.dim_shape :], embedding], -1))
    inputs = torch.cat([encode(points, shape.multires, shape.base_frequency), shape_code], -1)
    first = torch.cat([field.trunk_in.weight, field.trunk_in_codes.weight], 1)
    hidden = torch.relu(functional.linear(inputs, first, field.trunk_in.bias))
    for number, layer in enumerate(field.trunk, start=1):
        weight = layer.weight
        if number == shape.skip:
            hidden = torch.cat([hidden, inputs], -1)
            weight = torch.cat([weight, field.trunk_skip.weight, field.trunk_skip_codes.weight], 1)
        hidden = torch.relu(functional.linear(hidden, weight, layer.bias))
    density = torch.relu(field.raw_density(hidden)[..., 0] + noise)
    views = encode(directions, shape.multires_views, shape.base_frequency)[:, :, None].expand(*points.shape[:3], -1)
    joined = torch.cat([field.feature_linear(hidden), appearance, views], -1)
    weight = torch.cat([field.view.weight, field.view_codes.weight, field.view_directions.weight], 1)
    return torch.tanh(field.rgb(torch.relu(functional.linear(joined, weight, field.view.bias)))), density


def render(trainer: Trainer, field: MLPField, fakes: FakeInputs) -> Tensor:
    """Generated patches (B, 3, K, K): rays through a patch, stratified samples, alpha compositing on the background."""
    config, caster = trainer.config, trainer.objective.caster
    size, samples = config.ray_sampler.patch_size, config.nerf.N_samples
    cells = (2 * torch.arange(size) + 1) / size - 1
    x = fakes.patches.centre[:, 0, None, None] + fakes.patches.scale[:, None, None] * cells[None, None, :]
    y = fakes.patches.centre[:, 1, None, None] + fakes.patches.scale[:, None, None] * cells[None, :, None]
    half = math.tan(math.radians(config.data.fov) / 2)
    x, y = torch.broadcast_tensors(x, y)
    camera = torch.stack([x * half, -y * half, -torch.ones_like(x)], -1).flatten(1, 2)
    directions = functional.normalize(camera @ fakes.views.poses[:, :3, :3].mT, dim=-1)
    noise = fakes.noise.of_rays(0, size**2, trainer.generator.sampling)
    near, far = caster.near, caster.far
    t = near + (far - near) * (torch.arange(samples) + noise.jitter) / samples
    points = fakes.views.poses[:, None, None, :3, 3] + t[..., None] * directions[:, :, None]
    rgb, density = run_field(field, points, directions, fakes.z, noise.density)
    edges = torch.cat(
        [torch.full_like(t[..., :1], near), (t[..., 1:] + t[..., :-1]) / 2, torch.full_like(t[..., :1], far)], -1
    )
    alpha = 1 - torch.exp(-density * edges.diff(dim=-1))
    passed = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha], -1), -1)
    colour = ((passed[..., :-1] * alpha)[..., None] * rgb).sum(2) + passed[..., -1:] * trainer.generator.background
    return colour.mT.reshape(len(rgb), 3, size, size)


@pytest.mark.parametrize("name", ["carla", "celeba"])
def test_a_step_with_published_settings_is_a_step_of_the_published_loop(name, tmp_path):
    numbers = np.random.default_rng(0)
    for number in range(4):
        imwrite(tmp_path / f"{number}.png", numbers.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    config = load_config(f"{name}.yaml", [f"data.datadir={tmp_path}", *SMALL])
    photographs = builders.open_photographs(config)
    info = builders.describe_dataset(config, photographs)
    sampler = builders.build_pose_sampler(config, photographs, builders.build_cameras(config, info))
    trainer = builders.build_trainer(config, info, sampler, Precision("cpu", None), torch.device("cpu"))
    field, discriminator = copy.deepcopy(trainer.generator.field), copy.deepcopy(trainer.discriminator)
    images = torch.stack([photographs[index][0] for index in range(3)])
    labels = torch.zeros(3, 4, dtype=torch.int64)
    inputs = trainer.inputs.draw(Draws(config.seed, 0, range(3)), images, labels, trainer.settings_at(0))

    # the discriminator, with R1 in every step; GRAF weighs it by rays, this project by images
    cut = inputs.reals.patches
    cells = (2 * torch.arange(16) + 1) / 16 - 1
    grid = torch.stack(torch.meshgrid(cells, cells, indexing="xy"), -1)[None] * cut.scale[:, None, None, None]
    grid = grid + cut.centre[:, None, None]
    mirrored = inputs.reals.mirrored if config.discriminator.hflip else torch.zeros(3, dtype=torch.bool)
    photos = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    real = functional.grid_sample(photos, grid, padding_mode="border", align_corners=False)
    real.requires_grad_()
    logits = discriminator(real, inputs.reals.condition)[0]
    (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    penalty = config.training.reg_param * gradient.square().sum() / 3
    with torch.no_grad():
        fake = render(trainer, field, inputs.fakes_of_d)
    fake_logits = discriminator(fake, inputs.fakes_of_d.condition)[0]
    (functional.softplus(-logits).mean() + functional.softplus(fake_logits).mean() + penalty).backward()
    torch.optim.RMSprop(discriminator.parameters(), lr=1e-4, alpha=0.99, eps=1e-8).step()
    # the generator
    discriminator.requires_grad_(False)
    fake = render(trainer, field, inputs.fakes_g)
    functional.softplus(-discriminator(fake, inputs.fakes_g.condition)[0]).mean().backward()
    before = copy.deepcopy(field)
    torch.optim.RMSprop(field.parameters(), lr=5e-4, alpha=0.99, eps=1e-8).step()

    statistics = trainer.step(images, labels)
    assert_close(statistics["penalty"] * config.training.reg_param, penalty.detach(), rtol=1e-4, atol=1e-9)
    compared = 0
    for mine, plain in ((trainer.discriminator, discriminator), (trainer.generator.field, field)):
        largest = max(float(theirs.grad.abs().max()) for theirs in plain.parameters())
        for (key, ours), theirs in zip(mine.named_parameters(), plain.parameters(), strict=True):
            # a first step of RMSprop is 10 lr sign(gradient): where a gradient is nothing but rounding, so is its sign
            clear = theirs.grad.abs() > 1e-4 * largest
            assert_close(ours[clear], theirs[clear], atol=2e-6, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
            compared += int(clear.sum())
    assert compared > 0.5 * sum(parameter.numel() for parameter in [*field.parameters(), *discriminator.parameters()])
    weights = dict(trainer.average.module.field.named_parameters())
    beta = min(0.999, 1 / 10)
    for key, start in before.named_parameters():
        moved = dict(trainer.generator.field.named_parameters())[key]
        assert_close(weights[key], beta * start + (1 - beta) * moved, atol=1e-6, rtol=0)
