"""The generator: latent code, class and rays in; colour, depth and opacity out, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from graf.base.tensors import TensorBatch
from graf.geometry.rays import Patches, Rays, cut_chunks
from graf.geometry.views import Views
from graf.geometry.volume_rendering import NO_NOISE, FieldFunction, NoiseSource, RaySampling, Render, render_rays
from graf.models.camera_refinement import CameraRefinement
from graf.models.field import RadianceField
from graf.models.occupied_points import OccupiedPoints
from graf.runtime.activation_checkpointing import ChunkRunner, call_chunk, evaluate_chunks
from graf.runtime.memory_settings import SMALLEST_CHUNK, MemorySettings, halve_chunk
from graf.runtime.randomness import Draws

#: Instances' codes are stored at this share of their value: each is met in one step of many, and Adam's steps are as
#: long as the learning rate, which is made for weights.
STORED_SHARE = 0.1
BACKGROUNDS = {"white": 1.0, "black": -1.0}


class Generator(nn.Module):
    """A radiance field seen through a volume renderer.

    background: "white" or "black"; with learn_background it is where one colour for the whole collection starts.
    num_instances: objects that are known by number, each with a code of its own that is learned (generative latent
    optimisation, Bojanowski et al., ICML 2018).
    chunk: the most rays that are rendered at once, a part of one image or whole images (graf.geometry.rays.cut_chunks);
    strategy: which of their activations are kept for the backward pass (graf.runtime.activation_checkpointing).
    :meth:`use` changes both at any time.
    cameras: what is learned of the photographs' cameras; None where they are as given.
    make_runner: called with the rays of each chunk of a rendering; what it returns executes them.
    """

    def __init__(
        self,
        field: RadianceField,
        sampling: RaySampling,
        background: str = "white",
        learn_background: bool = False,
        num_instances: int = 0,
        chunk: int = 4096,
        cameras: CameraRefinement | None = None,
    ) -> None:
        super().__init__()
        if background not in BACKGROUNDS:
            raise ValueError(f"background={background!r}: expected one of {', '.join(BACKGROUNDS)}")
        self.field = field
        self.sampling = sampling
        self.cameras = cameras
        self.chunk = chunk
        self.strategy = "dense"
        self.make_runner: Callable[[Sequence[int]], ChunkRunner] = _call_every_chunk
        colour = torch.full((3,), BACKGROUNDS[background])
        if learn_background:
            self.background = nn.Parameter(colour)
        else:
            self.register_buffer("background", colour)
        self.instances = nn.Parameter(STORED_SHARE * torch.randn(num_instances, field.dim_z)) if num_instances else None

    def codes(self, z: Tensor, instance: Tensor) -> Tensor:
        """The codes (B, dim_z) of known instances (B,), and z (B, dim_z) where instance is -1, of an unknown one."""
        if self.instances is None:
            return z
        return torch.where(instance[:, None] < 0, z, self.instances[instance.clamp(min=0)] / STORED_SHARE)

    @property
    def background_colour(self) -> Tensor:
        """The background (3,), inside of [-1, 1]; its gradient is that before clipping, so that it can return."""
        return self.background + (self.background.clamp(-1, 1) - self.background).detach()

    @property
    def dim_z(self) -> int:
        """Length of the latent code."""
        return self.field.dim_z

    def use(self, settings: MemorySettings) -> None:
        """Render in these chunks and with this strategy from now on."""
        self.strategy, self.chunk = settings.strategy, settings.chunk

    def halve_chunk(self) -> str | None:
        """Render half as many rays at once from now on; says what changed, None where that would no longer help."""
        before = self.chunk
        if before <= SMALLEST_CHUNK:
            return None
        self.chunk = halve_chunk(before)
        return f"training.chunk {before} -> {self.chunk}"

    def aim(self, views: Views, patches: Patches) -> tuple[Tensor, Patches]:
        """Poses (B, 4, 4) and the patches of their image planes that patches of B views are rendered from."""
        if self.cameras is None:
            return views.poses, patches
        aimed: tuple[Tensor, Patches] = self.cameras(views, patches)
        return aimed

    def forward(
        self,
        z: Tensor,
        class_idx: Tensor,
        rays: Rays,
        noise: NoiseSource = NO_NOISE,
        sampling: RaySampling | None = None,
    ) -> Render:
        """Render `rays` (B x N) of the objects z (B, dim_z) of class class_idx (B,), int64.

        noise: makes the random numbers of each chunk of rays; without it samples sit in the middle of their bins and
        nothing is added to the density. sampling: another number of samples than in training. Returns float32
        rgb (B, N, 3) in [-1, 1], z-depth (B, N, 1) and opacity (B, N, 1).
        """
        codes: TensorBatch = self.field.prepare(z, class_idx)
        sampling = self.sampling if sampling is None else sampling
        chunks, count = cut_chunks(len(z), rays.per_image, self.chunk), len(codes.tensors())
        # on a CPU alone: of a GPU each chunk would have to be waited for, to know how many points it has
        is_repeated = self.strategy == "deferred" and torch.is_grad_enabled() and z.device.type == "cpu"
        occupied = OccupiedPoints(rays, sampling) if is_repeated else None

        def render_chunk(number: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            chunk = chunks[number]
            own_codes = codes.with_tensors(tensors[:count])[chunk.images]
            own_rays = rays.with_tensors(tensors[count:])[chunk.images].slice(chunk.start, chunk.stop)

            def evaluate(points: Tensor, directions: Tensor, density_noise: Tensor | None) -> tuple[Tensor, Tensor]:
                return self.field.forward_visible(points, directions, own_codes, density_noise)

            field: FieldFunction = evaluate
            if occupied is not None:
                field = (occupied.recall if torch.is_grad_enabled() else occupied.note)(evaluate, chunk)
            drawn = noise[chunk.images].of_rays(chunk.start, chunk.stop, sampling)
            found = render_rays(field, own_rays, sampling, drawn, self.background_colour)
            return tuple(part.flatten(0, 1)[None] for part in found.tensors())

        parameters = [*self.field.point_parameters(), self.background]
        runner = self.make_runner([chunk.size for chunk in chunks])
        shared = (*codes.tensors(), *rays.tensors())
        parts = evaluate_chunks(render_chunk, len(chunks), shared, parameters, self.strategy, runner)
        return Render(*(part.view(len(z), rays.per_image, -1) for part in parts))


def draw_latents(draws: Draws, purpose: str, dim_z: int, uniform: bool) -> Tensor:
    """Latent codes z (images, dim_z) on the CPU: standard normal, or uniform in [-1, 1]."""
    return draws.uniform(purpose, dim_z) * 2 - 1 if uniform else draws.normal(purpose, dim_z)


def _call_every_chunk(sizes: Sequence[int]) -> ChunkRunner:
    return call_chunk
