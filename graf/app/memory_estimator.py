"""Predicts the memory of a configuration's step by rehearsing it on tensors without data.

The real networks, optimisers and trainer run one real step on fake tensors, which have shapes and no data
(fake_tensors.py), while a LiveTensorMeter counts the bytes that they would hold. Nothing is allocated, so
neither photographs nor a GPU are needed. Small control tensors (labels, poses, an image's random numbers) are real,
since code branches on them. rehearsal.py runs the step, memory_planner.py chooses what fits a budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from graf.app import builders
from graf.app.builders import DatasetInfo
from graf.app.fake_tensors import FakeTensorMeter, build_fake
from graf.app.rehearsal import (
    FakeNoise,
    FewChunks,
    PhasePeak,
    PhaseRecorder,
    RehearsedTrainer,
    drop_gradients,
    leave_gradients,
)
from graf.config import Config
from graf.data.datasets import DEFAULT_V_LIST
from graf.data.shapes import CLASS_NAMES
from graf.evaluation.consistency import ConsistencyTask, measure_ring
from graf.evaluation.extractor import OFFLINE_DIMENSIONS, OfflineFeatures
from graf.evaluation.grids import colour_showcase
from graf.evaluation.renderer import Renderer, Renders
from graf.evaluation.rings import Ring
from graf.evaluation.scoring import RENDER_BATCH
from graf.geometry.cameras import ring
from graf.geometry.rays import Patches, count_rays_at_once
from graf.geometry.views import PoseRanges, PoseSampler
from graf.geometry.volume_rendering import Render
from graf.geometry.warping import SurfaceView
from graf.models.plane_lookup import look_up_as_on
from graf.runtime.amp import Precision
from graf.runtime.live_tensors import count_bytes
from graf.runtime.memory_settings import MemorySettings

#: of Inception: length of its pooled features, bytes of its weights, and those that an image of its size needs besides
#: itself; torchvision's has the same layout, whose import would take longer than all the rest
INCEPTION_DIMENSIONS, INCEPTION_BYTES, INCEPTION_BYTES_OF_IMAGE = 2048, 95_476_752, 13_829_760


@dataclass(frozen=True)
class Plan:
    """The predicted peaks of one step and of what happens between steps, bytes of live tensors, by phase."""

    settings: MemorySettings
    phases: dict[str, PhasePeak]

    @property
    def peak(self) -> int:
        """Bytes of live tensors at the worst moment."""
        return max(phase.peak for phase in self.phases.values())


def imagine_dataset(config: Config) -> DatasetInfo:
    """A data set without photographs: what the configuration knows, else one class, which hardly matters to memory."""
    data = config.data
    names = data.classes or (tuple(CLASS_NAMES) if data.type == "synthetic" else ("object",))
    return DatasetInfo(tuple(names), data.v_list or DEFAULT_V_LIST, data.fov, data.type != "image_folder")


class StepPlanner:
    """Predicts the peaks of one configuration under any settings; networks are built once.

    device_type: "cpu", "cuda" or "mps". Images that wait on the host take room beside the others on the CPU alone.
    """

    def __init__(
        self,
        config: Config,
        dataset_info: DatasetInfo | None = None,
        precision: Precision | None = None,
        device_type: str = "cpu",
    ) -> None:
        self.device_type = device_type
        # Whatever may happen in some step has to happen in the one that is rehearsed, which is iteration 0.
        ccsr = config.ccsr.model_copy(update={"start_iteration": 0, "perceptual": 0.0, "weights": None})
        self.config = config.model_copy(update={"ccsr": ccsr})
        self.dataset_info = imagine_dataset(config) if dataset_info is None else dataset_info
        self.meter = FakeTensorMeter()
        self._steps: dict[MemorySettings, dict[str, PhasePeak]] = {}
        self._between: dict[tuple[str, int], PhasePeak] = {}
        is_half = config.training.use_amp if precision is None else precision.dtype is not None
        # float16 needs as many bytes as bfloat16, and a CPU's autocast knows only the latter
        self.precision = Precision("cpu", torch.bfloat16 if is_half else None)
        labels = torch.tensor([(number, 0, 0, -1) for number in range(len(self.dataset_info.class_names))])
        cameras, data = builders.build_cameras(self.config, self.dataset_info), config.data
        ranges = PoseRanges(data.umin, data.umax, data.vmin, data.vmax, *data.radius_range)
        self.pose_sampler = PoseSampler(labels, cameras, ranges=None if self.dataset_info.poses_known else ranges)
        with build_fake():
            self.trainer = self._build_trainer()
        with self._running() as meter:
            meter.track(*self.trainer.owners)
            leave_gradients(self.trainer.players)
            for player in self.trainer.players:  # optimisers get their states in their first step
                player.optimizer.step()
            drop_gradients(self.trainer.players)

    @contextmanager
    def _running(self) -> Iterator[FakeTensorMeter]:
        with look_up_as_on(self.device_type), self.meter as meter:
            yield meter

    def _build_trainer(self) -> RehearsedTrainer:
        trainer = builders.build_trainer(
            self.config,
            self.dataset_info,
            self.pose_sampler,
            self.precision,
            torch.device("cpu"),
            pretrained=False,
            kind=RehearsedTrainer,
        )
        assert isinstance(trainer, RehearsedTrainer)
        trainer.inputs = FakeNoise(trainer.inputs)  # type: ignore[assignment]
        for generator in (trainer.generator, trainer.averaged_networks[0]):
            generator.make_runner = partial(FewChunks, self.meter, generator)
        return trainer

    def predict(self, settings: MemorySettings, between: bool = True) -> Plan:
        """The peaks of one step with these settings; `between`: also of sampling and scoring."""
        rays = self.config.ray_sampler.N_samples
        at_once = count_rays_at_once(settings.micro_batch_size, rays, settings.chunk)
        key = replace(settings, chunk=at_once)  # chunks up to the next whole image render alike
        if key not in self._steps:
            sampler, numbers = self.pose_sampler, torch.arange(self.config.training.batch_size)
            with self._running() as meter:
                self._steps[key] = self.trainer.rehearse(meter, key, sampler.views.labels[numbers % len(sampler)])
        more = self._predict_between(settings) if between else {}
        return Plan(settings, self._steps[key] | more)

    def _predict_between(self, settings: MemorySettings) -> dict[str, PhasePeak]:
        """Sampling depends on the chunk alone, scoring, but for its renders, on nothing that a budget changes."""
        tasks = {"sample": (("sample", settings.chunk), self._sample)}
        if self.config.training.fid_every:
            tasks["score"] = (("score", 0), self._score)
        self.trainer.use(settings)
        with self._running() as meter:
            leave_gradients(self.trainer.players)
            for name, (key, task) in tasks.items():
                if key not in self._between:
                    recorder = PhaseRecorder(meter, self.trainer)
                    with recorder.phase(name):
                        task()
                    self._between[key] = recorder.phases[name]
            drop_gradients(self.trainer.players)
        return {name: self._between[key] for name, (key, _) in tasks.items()}

    def _sample(self) -> None:
        """One image for a grid or a score, beside what waits meanwhile; on the CPU also a grid's row being coloured."""
        generator, ccsr = self.trainer.averaged_networks
        renderer: Renderer = builders.build_renderer(
            self.config, self.dataset_info, self.precision, torch.device("cpu"), generator, ccsr
        )
        waiting = self._reserve(max(self._waiting()))
        renderer.render_random(self.pose_sampler, 0, range(1), super_resolve=ccsr is not None)
        del waiting
        if self.device_type == "cpu":
            training = self.config.training
            done = self._reserve((training.sample_objects - 1) * self.config.data.num_views * self._bytes_drawn)
            colour_showcase(self._imagine_renders(self.config.data.num_views), 0.0, 1.0)
            del done

    def _waiting(self) -> list[int]:
        """Bytes in use while the last image of a grid, of a batch to score, of a ring of views is rendered.

        On the CPU the others of its kind wait there too; scoring keeps the extractor, and on the CPU features.
        """
        training, columns, on_host = self.config.training, self.config.data.num_views, self.device_type == "cpu"
        others = (columns - 1) * self._bytes_rendered + (training.sample_objects - 1) * columns * self._bytes_drawn
        found = [others if on_host else 0]
        if training.fid_every:
            batch = self.config.evaluation.batch_size * 3 * self.config.photo_size**2
            others = (RENDER_BATCH - 1) * self._bytes_rendered + batch + self._bytes_of_features
            found.append(self._bytes_of_extractor + (others if on_host else 0))
            if self.config.ccsr.enabled and on_host:
                found.append((ConsistencyTask.num_views - 1) * self._bytes_rendered)
        return found

    @property
    def _bytes_of_features(self) -> int:
        """Of all images; of photographs as many are assumed as images are generated."""
        evaluation = self.config.evaluation
        dimensions = OFFLINE_DIMENSIONS if evaluation.feature_extractor == "offline" else INCEPTION_DIMENSIONS
        return 2 * evaluation.num_images * dimensions * 4

    @cached_property
    def _bytes_of_extractor(self) -> int:
        if self.config.evaluation.feature_extractor == "offline":
            return count_bytes(OfflineFeatures().state_dict().values())
        return INCEPTION_BYTES

    @property
    def _bytes_rendered(self) -> int:
        """Of one image with depth and opacity, and of its super-resolution."""
        fine = self.config.photo_size if self.config.ccsr.enabled else 0
        return 4 * (5 * self.config.data.imsize**2 + 3 * fine**2)

    @property
    def _bytes_drawn(self) -> int:
        """Of what a grid shows of one image."""
        fine = self.config.photo_size if self.config.ccsr.enabled else 0
        return 9 * self.config.data.imsize**2 + 6 * fine**2

    def _imagine_renders(self, count: int) -> Renders:
        side, fine = self.config.data.imsize, self.config.photo_size
        sr = torch.empty(count, 3, fine, fine) if self.config.ccsr.enabled else None
        plane = (count, 1, side, side)
        return Renders(torch.empty(count, 3, side, side), torch.empty(plane), torch.empty(plane), sr)

    @staticmethod
    def _reserve(count: int) -> Tensor:
        """So many bytes that are in use for as long as the result is kept."""
        return torch.empty(count, dtype=torch.uint8)

    def _score(self) -> None:
        """One batch through the feature extractor; on the CPU also the consistency of a ring of views.

        There the features of all images and a few rendered ones wait too.
        """
        if self.device_type != "cpu":
            self._extract_features()
            return
        if self.config.ccsr.enabled:
            self._measure_ring()
        waiting = self._reserve(self._bytes_of_features + RENDER_BATCH * 3 * self.config.photo_size**2)
        self._extract_features()
        del waiting

    def _measure_ring(self) -> None:
        """Two views of a ring of super-resolved images with their truth, beside the others' images."""
        side, fine = self.config.data.imsize, self.config.photo_size
        # of a view: the render, the surface's depth, SR, the truth; made of it: bicubic and clipped SR
        bytes_of_view = self._bytes_rendered + 4 * (side**2 + 3 * fine**2 + 2 * side**2) + 4 * 2 * 3 * fine**2
        others = self._reserve((ConsistencyTask.num_views - 2) * bytes_of_view)
        renders, caster = self._imagine_renders(2), builders.build_caster(self.config, self.dataset_info)
        assert renders.sr is not None
        plane = (2, 1, side, side)
        truth = Render(torch.empty_like(renders.sr), torch.empty(plane), torch.empty(plane))
        poses = self.pose_sampler.cameras.views_at(torch.zeros(2).long(), *ring(2, 0.25)).poses
        surface = SurfaceView.from_render(renders, poses, Patches.whole(2), caster)
        ccsr = self.trainer.averaged_networks[1]
        assert ccsr is not None
        measure_ring(Ring(surface, renders.sr, truth), caster.intrinsics, down=ccsr.down)
        del others

    def _extract_features(self) -> None:
        """One batch; of Inception it is known what the images need, as soon as they have its size."""
        evaluation, side = self.config.evaluation, self.config.photo_size
        images = torch.empty(evaluation.batch_size, 3, side, side, dtype=torch.uint8)
        with torch.no_grad():
            if evaluation.feature_extractor == "offline":
                extractor = OfflineFeatures()
                self.meter.track(extractor)
                extractor(images)
                return
            weights = self._reserve(INCEPTION_BYTES)
            resized = nn.functional.interpolate(images.float(), (299, 299), mode="bilinear")
            self.meter.expect(len(resized) * INCEPTION_BYTES_OF_IMAGE)
            del weights
