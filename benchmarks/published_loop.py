"""GRAF as it was published (Schwarz et al. 2020): its setting, and its training loop written as plainly as there.

What benchmarks compare the program with. Nothing here is faster or smaller than it has to be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from graf.app import builders
from graf.app.memory_estimator import imagine_dataset
from graf.config import CONFIG_FOLDER, Config, load_config
from graf.models.discriminator import PatchCondition

CPU = torch.device("cpu")
#: GRAF as published, with R1 per image; CCSR and scores off
PUBLISHED = ("training.fid_every=0", "training.chunk=auto", "data.imsize=256")


def published(patch: int, *overrides: str) -> Config:
    """GRAF's published setting with patches of another size."""
    path = CONFIG_FOLDER / "carla.yaml"
    return load_config(path, [*PUBLISHED, f"ray_sampler.N_samples={patch * patch}", *overrides])


class PlainField(nn.Module):
    """GRAF's network as published: latents and view directions are concatenated at every point."""

    def __init__(self, depth: int = 8, width: int = 256, points: int = 63, views: int = 27, code: int = 128) -> None:
        super().__init__()
        self.points, self.views, self.skip = points, views, depth // 2
        sizes = [points + code] + [width + points + code if i == self.skip else width for i in range(depth - 1)]
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.alpha, self.feature = nn.Linear(width, 1), nn.Linear(width, width)
        self.view, self.rgb = nn.Linear(width + views + code, width // 2), nn.Linear(width // 2, 3)

    def forward(self, points: Tensor, views: Tensor, shape: Tensor, appearance: Tensor) -> Tensor:
        """(P, 63), (P, 27), (P, 128), (P, 128) -> rgb and density (P, 4)."""
        inputs = hidden = torch.cat([points, shape], -1)
        for index, layer in enumerate(self.layers):
            hidden = functional.relu(layer(hidden))
            if index == self.skip:
                hidden = torch.cat([inputs, hidden], -1)
        density = self.alpha(hidden)
        hidden = functional.relu(self.view(torch.cat([self.feature(hidden), views, appearance], -1)))
        return torch.cat([self.rgb(hidden), density], -1)


class PlainLoop:
    """One step of GRAF's published training loop, written as published.

    Dense, float32, concatenated codes, a render of their own for D's fakes, R1 every step, gradients kept and zeroed,
    nothing released before the step ends. D is this project's. `measures` "set_to_none" and "released" each change one.
    """

    def __init__(self, config: Config, measures: Sequence[str] = (), device: torch.device = CPU) -> None:
        dataset_info, self.device = imagine_dataset(config), device
        nerf, self.measures = config.nerf, frozenset(measures)
        self.config, self.batch, self.size = config, config.training.batch_size, config.ray_sampler.patch_size
        self.octaves, self.samples = (nerf.multires, nerf.multires_views), nerf.N_samples
        points, views = (3 * (1 + 2 * octaves) for octaves in self.octaves)
        self.code = config.z_dist.dim // 2
        self.field = PlainField(nerf.netdepth, nerf.netwidth, points, views, self.code)
        self.average = PlainField(nerf.netdepth, nerf.netwidth, points, views, self.code).requires_grad_(False)
        self.discriminator = builders.build_discriminator(config, dataset_info)
        if device != CPU:  # fake tensors, on which this loop is predicted, cannot be moved
            for network in (self.field, self.average, self.discriminator):
                network.to(device)
        self.optimizer_g = torch.optim.RMSprop(self.field.parameters(), lr=5e-4)
        self.optimizer_d = torch.optim.RMSprop(self.discriminator.parameters(), lr=1e-4)
        self.kept: list[Tensor] = []  # what local variables of the published loop keep alive until the step ends

    def step(self) -> None:
        """One update of D, G and the average."""
        to_none = "set_to_none" in self.measures
        self.optimizer_d.zero_grad(set_to_none=to_none)
        real = torch.rand(self.batch, 3, self.size, self.size, device=self.device).requires_grad_()
        real_logits = self._discriminate(real)
        functional.softplus(-real_logits).mean().backward(retain_graph=True)
        (gradient,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
        penalty = gradient.square().flatten(1).sum(1).mean()
        (10 / self.size**2 * penalty).backward()
        with torch.no_grad():
            fake = self.render()
        fake_logits = self._discriminate(fake.requires_grad_())
        functional.softplus(fake_logits).mean().backward()
        self.optimizer_d.step()
        if "released" not in self.measures:
            self.kept += [real_logits, gradient, penalty, fake_logits]
        del real_logits, gradient, penalty, fake, fake_logits, real

        self.discriminator.requires_grad_(False)
        self.optimizer_g.zero_grad(set_to_none=to_none)
        fake = self.render()
        logits = self._discriminate(fake)
        functional.softplus(-logits).mean().backward()
        self.optimizer_g.step()
        self.discriminator.requires_grad_(True)
        with torch.no_grad():
            for mean, weight in zip(self.average.parameters(), self.field.parameters(), strict=True):
                mean.copy_(0.999 * mean + 0.001 * weight)
        self.kept = []

    def render(self) -> Tensor:
        """Patches (B, 3, K, K) of random codes: every activation of every point is kept."""
        rays = self.size**2
        z = torch.randn(self.batch, 2 * self.code, device=self.device)
        directions = functional.normalize(torch.randn(self.batch, rays, 3, device=self.device), dim=-1)
        bins = torch.arange(self.samples, device=self.device)
        t = 2.5 + 2 * (bins + torch.rand(self.batch, rays, self.samples, device=self.device)) / self.samples
        points = directions[:, :, None] * t[..., None]
        flat = (self.batch * rays * self.samples, -1)
        shape, appearance = (
            part[:, None, None].expand(-1, rays, self.samples, -1).reshape(flat) for part in z.chunk(2, dim=1)
        )
        views = directions[:, :, None].expand_as(points)
        encoded = [
            self._encode(part.reshape(flat), octaves)
            for part, octaves in zip((points, views), self.octaves, strict=True)
        ]
        raw = self.field(*encoded, shape, appearance).view(self.batch, rays, self.samples, 4)
        density = functional.relu(raw[..., 3] + torch.randn_like(raw[..., 3]))
        length = torch.cat([t[..., 1:] - t[..., :-1], torch.full_like(t[..., :1], 1e10)], -1)
        alpha = 1 - torch.exp(-density * length)
        passed = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha + 1e-10], -1), -1)[..., :-1]
        weights = alpha * passed
        rgb = (weights[..., None] * torch.sigmoid(raw[..., :3])).sum(-2) + (1 - weights.sum(-1, keepdim=True))
        return (2 * rgb - 1).transpose(1, 2).reshape(self.batch, 3, self.size, self.size)

    @staticmethod
    def _encode(x: Tensor, octaves: int) -> Tensor:
        parts = [x]
        for octave in range(octaves):
            parts += [torch.sin(2**octave * x), torch.cos(2**octave * x)]
        return torch.cat(parts, -1)

    def _discriminate(self, patches: Tensor) -> Tensor:
        count = len(patches)
        nothing = torch.zeros(count, device=self.device)
        condition = PatchCondition(nothing.long(), nothing[:, None].expand(-1, self.discriminator.shape.num_features))
        logits, _ = self.discriminator(patches, condition)
        return logits
