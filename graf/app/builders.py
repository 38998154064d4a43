"""Config -> objects, for train.py and eval.py alike."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from graf.app.refined_cameras import build_camera_refinement
from graf.config import PATCH_SIZES, Config, ConfigError, DataConfig, Section, batch_too_large
from graf.data.datasets import DataSettings, PhotoDataset, PosedPhotographs, is_at_hand, open_dataset
from graf.data.downsampled import DownsampledPhotographs
from graf.data.errors import DataError
from graf.data.images import square_side
from graf.data.labels import balance_instances
from graf.data.loader import Batches, BatchOrder, DecodedBatches, make_loader
from graf.data.shapes import CLASS_NAMES
from graf.data.synthetic import render_views
from graf.evaluation.consistency import ConsistencyTask
from graf.evaluation.extractor import Extractor, choose_extractor
from graf.evaluation.fidelity import FidelityProtocol
from graf.evaluation.renderer import Renderer
from graf.evaluation.scoring import ValidationTask
from graf.geometry.cameras import Intrinsics
from graf.geometry.rays import RayCaster
from graf.geometry.views import Cameras, PoseRanges, PoseSampler, Views
from graf.geometry.volume_rendering import RaySampling, Render
from graf.models.ccsr import CCSR, BoxProjection, ConvTrunk, KernelProjection, UnitRange, ViewLatents
from graf.models.density import DensityLaw
from graf.models.discriminator import DiscriminatorShape, PatchDiscriminator
from graf.models.field import RadianceField
from graf.models.generator import Generator
from graf.models.mlp_field import MLPField, MLPShape
from graf.models.rrdb import RRDBTrunk, load_esrgan_weights
from graf.models.siren_field import SirenField, SirenShape
from graf.models.triplane_field import TriplaneField, TriplaneShape
from graf.runtime.amp import Precision
from graf.runtime.distributed import Processes
from graf.runtime.logs import info_once, warn_once
from graf.runtime.memory import read_usable_memory
from graf.runtime.memory_settings import SMALLEST_CHUNK, MemorySettings
from graf.runtime.randomness import derive_seed, preserve_rng, seed_everything
from graf.training.trainer import Trainer

Settings = TypeVar("Settings")


#: photographs of the validation split that a run is measured on
NUM_VALIDATION = 48
#: of a device's usable memory, for the photographs
PIXEL_SHARE = 0.05
#: of the true pictures that renders are compared with: no more memory than for one of 64 x 64
TRUE_PIXELS_AT_ONCE = 4096
#: Numbers of a field's widest layer that are computed at once. On a CPU as many as caches hold, of tri-planes more, of
#: which every chunk adds up a gradient of whole planes; on a GPU so many that launching what computes them is cheap.
CPU_NUMBERS_AT_ONCE, CPU_NUMBERS_AT_ONCE_OF_PLANES, GPU_NUMBERS_AT_ONCE = 3 * 2**20, 2**23, 2**26


@dataclass(frozen=True)
class DatasetInfo:
    """What the photographs say about the world; a checkpoint carries it, so that renders need no photographs.

    fov in degrees; poses_known: whether every photograph has a known camera; instance_names: those that labels number;
    radius: mean distance of the cameras from the origin where true poses tell it, None: it is data.radius.
    """

    class_names: tuple[str, ...]
    v_list: tuple[float, ...]
    fov: float
    poses_known: bool
    instance_names: tuple[str, ...] = ()
    radius: float | None = None


def open_photographs(config: Config, subset: str = "train") -> PhotoDataset:
    """The data set of a configuration. subset: "train", "validation", "test" or "all"."""
    photographs = open_dataset(_data_settings(config, subset))
    if photographs.poses is not None:
        _check_scale(config, photographs.poses)
    if config.ccsr.enabled:
        _check_resolution(config, photographs)
    return photographs


def has_photographs(config: Config) -> bool:
    """Whether the photographs are there to be opened: the synthetic ones may have to be rendered first."""
    return is_at_hand(_data_settings(config, "train"))


def _data_settings(config: Config, subset: str) -> DataSettings:
    values = config.data.model_dump() | {"radius": mean_radius(config.data), "imsize": config.photo_size}
    return DataSettings.from_mapping(values, subset)


def _check_scale(config: Config, poses: Tensor) -> None:
    """Refuse poses (N, 4, 4) from which no ray is sampled near the origin, where the object has to be."""
    data, distances = config.data, poses[:, :3, 3].norm(dim=1)
    seen = ((distances > data.near) & (distances < data.far)).float().mean()
    if seen < 0.5:
        raise ConfigError(
            f"data.near={data.near:g}, data.far={data.far:g}: the cameras stand {distances.min():.3g} to "
            f"{distances.max():.3g} from the origin, so that most of their rays are not sampled there; scale the "
            "poses, or set near and far to less and more than these distances"
        )


def _check_resolution(config: Config, photographs: PhotoDataset) -> None:
    """Photographs that have to be enlarged teach super-resolution their blur: say how many, refuse if all are so."""
    data, scale, wanted = config.data, config.ccsr.scale, config.photo_size
    sides = [square_side(size, data.crop) for size in photographs.report.sizes.elements()]
    number, total = sum(side < wanted for side in sides), len(sides)
    if not number:
        return
    text = f"{number} of {total} photographs are smaller than super-resolved images, {wanted} x {wanted} pixels"
    if number == total:
        largest = max(sides) // scale
        smaller = f"set data.imsize to at most {largest}, " if largest >= PATCH_SIZES[0] else ""
        raise ConfigError(
            f"data.imsize={data.imsize}, ccsr.scale={scale}: {text}, the largest square is {max(sides)}; {smaller}"
            "lower ccsr.scale, or set ccsr.enabled=false"
        )
    warn_once(f"{text}: they are enlarged, and super-resolution learns their blur")


def check_batch_size(config: Config, num_images: int) -> None:
    """Raise ConfigError when a batch could never be filled."""
    if config.training.drop_last and config.training.batch_size > num_images:
        raise ConfigError(batch_too_large(config.training.batch_size, num_images))


def build_loader(
    config: Config,
    photographs: PhotoDataset,
    start_iteration: int = 0,
    pin_memory: bool = False,
    share: Callable[[int], range] = range,
    local_size: int = 1,
) -> DataLoader[tuple[Tensor, ...]]:
    """Endless batches of photographs with their labels, and poses of their own, beginning with that of an iteration.

    share: which places of each batch; local_size: processes of this machine, each of which has a loader.
    """
    training = config.training
    return make_loader(
        photographs if photographs.poses is None else PosedPhotographs(photographs, photographs.poses),
        training.batch_size,
        nworkers=training.nworkers,
        drop_last=training.drop_last,
        seed=config.seed,
        start_iteration=start_iteration,
        pin_memory=pin_memory,
        repeats=_count_showings(config, photographs),
        share=share,
        processes=local_size,
    )


def open_batches(
    config: Config,
    photographs: PhotoDataset,
    start_iteration: int,
    device: torch.device,
    share: Callable[[int], range] = range,
    local_size: int = 1,
) -> AbstractContextManager[Iterator[tuple[Any, ...]]]:
    """The batches of :func:`build_loader`, as a run takes them: decoded photographs need no loader.

    They are kept on the device where they take a small share of its memory and nobody has said how much is to be used.
    """
    training, pixels = config.training, photographs.pixels
    if pixels is None:
        pin_memory = device.type == "cuda"
        return Batches(build_loader(config, photographs, start_iteration, pin_memory, share, local_size))
    if training.memory_budget is None and pixels.nbytes <= PIXEL_SHARE * (read_usable_memory(device) or 0):
        pixels = pixels.to(device)
    repeats = _count_showings(config, photographs)
    order = BatchOrder(repeats, training.batch_size, training.drop_last, config.seed, start_iteration, share)
    return DecodedBatches(pixels, photographs.labels, order, device, photographs.poses)


def _count_showings(config: Config, photographs: PhotoDataset) -> Sequence[int]:
    """How often an epoch shows each photograph."""
    return balance_instances(photographs.labels) if config.training.match_views else [1] * len(photographs)


def describe_dataset(config: Config, dataset: PhotoDataset) -> DatasetInfo:
    """What the photographs of a data set say about the world."""
    fov = config.data.fov
    if dataset.fov is not None and abs(dataset.fov - fov) > 1e-3:
        info_once(f"data.fov={fov}: the data set states {dataset.fov:.3f} degrees, which is used instead")
        fov = dataset.fov
    v_list = tuple(dataset.v_list)
    if not dataset.poses_known and config.data.v_list is None:  # nothing names a height: show the middle of the range
        v_list = ((config.data.vmin + config.data.vmax) / 2,)
    radius = None
    if dataset.poses is not None:
        radius = dataset.poses[:, :3, 3].norm(dim=1).mean().item()
        if abs(radius - mean_radius(config.data)) > 0.01 * radius:
            info_once(f"data.radius={config.data.radius}: the poses' mean is {radius:.3f}, which is used instead")
    names, instance_names = tuple(dataset.class_names), tuple(dataset.instance_names)
    return DatasetInfo(names, v_list, fov, dataset.poses_known, instance_names, radius)


def mean_radius(data: DataConfig) -> float:
    """The distance of the cameras as configured, of a range its middle."""
    return sum(data.radius_range) / 2


def build_cameras(config: Config, dataset_info: DatasetInfo) -> Cameras:
    """How labels become cameras."""
    radius = mean_radius(config.data) if dataset_info.radius is None else dataset_info.radius
    return Cameras(radius, tuple(dataset_info.v_list), config.data.angle_direction)


def build_caster(config: Config, dataset_info: DatasetInfo) -> RayCaster:
    """The camera model and the range in which rays are sampled."""
    data = config.data
    intrinsics = Intrinsics.from_fov(data.imsize, dataset_info.fov)
    return RayCaster(intrinsics, data.near, data.far, config.nerf.bounding_radius)


def build_pose_sampler(config: Config, dataset: PhotoDataset, cameras: Cameras) -> PoseSampler:
    """The distribution of classes and cameras from which generated images take theirs."""
    data = config.data
    ranges = None if dataset.poses_known else PoseRanges(data.umin, data.umax, data.vmin, data.vmax, *data.radius_range)
    return PoseSampler(dataset.labels, cameras, poses=dataset.poses, ranges=ranges)


def build_renderer(
    config: Config,
    dataset_info: DatasetInfo,
    precision: Precision,
    device: torch.device,
    generator: Generator,
    ccsr: CCSR | None = None,
) -> Renderer:
    """Renders whole images at the generator's resolution, and super-resolves them where there is a `ccsr`."""
    sampling = None
    if config.evaluation.N_samples is not None:
        sampling = RaySampling(config.evaluation.N_samples, config.nerf.N_importance)
    return Renderer(
        generator=generator,
        ccsr=ccsr,
        caster=build_caster(config, dataset_info),
        precision=precision,
        device=device,
        resolution=config.data.imsize,
        cameras=build_cameras(config, dataset_info),
        classes=tuple(dataset_info.class_names),
        uniform_z=config.z_dist.type == "uniform",
        sampling=sampling,
        config=config,
    )


def real_images(photographs: PhotoDataset, ccsr: CCSR | None) -> dict[str, Any]:
    """What each output is scored against: photographs at the render's resolution and, with CCSR, at its own."""
    if ccsr is None:
        return {"render": photographs}
    projection = copy.deepcopy(ccsr.projection).cpu()
    name = f"{type(projection).__name__}{projection.scale}{getattr(projection, 'taps', '')}"
    return {"render": DownsampledPhotographs(photographs, projection.down, name), "sr": photographs}


def build_consistency(
    config: Config, dataset_info: DatasetInfo, renderer: Renderer, classes: Sequence[int]
) -> ConsistencyTask:
    """The consistency measurement of a run: one object per class, median height; synthetic data know the truth."""
    synthetic = config.data.type == "synthetic" and config.data.synthetic.instances == 1
    return ConsistencyTask(
        renderer=renderer,
        classes=classes,
        v=renderer.default_height,
        seed=config.evaluation.seed,
        truth=partial(_render_truth, config, dataset_info) if synthetic else None,
    )


def _render_truth(
    config: Config, dataset_info: DatasetInfo, class_idx: int, views: Views, low: int, high: int
) -> Render:
    """A synthetic object as it really looks: colours at `high`, depth and mask at `low` resolution."""
    known = config.data.synthetic
    toy = CLASS_NAMES.index(dataset_info.class_names[class_idx])

    def render(side: int) -> tuple[Tensor, Tensor, Tensor]:
        intrinsics = Intrinsics.from_fov(side, dataset_info.fov)
        few_by_few = (  # which needs less memory
            render_views(toy, poses, intrinsics, seed=known.seed, white_bkgd=config.data.white_bkgd)
            for poses in views.poses.split(max(1, TRUE_PIXELS_AT_ONCE // side**2))
        )
        rgb, depth, mask = (torch.cat(images) for images in zip(*few_by_few, strict=True))
        return rgb, depth, mask

    images, _, _ = render(high)
    _, depth, mask = render(low)
    return Render(images, depth, mask)


def build_validation(config: Config, renderer: Renderer, split: str = "validation") -> ValidationTask | None:
    """What a run is measured on while it trains: photographs of a split of known views; None where there are none.

    At most NUM_VALIDATION of them, evenly chosen among those whose object the generator knows.
    """
    if config.data.type == "image_folder":
        return None
    try:
        photographs = open_photographs(config, split)
    except DataError as error:
        info_once(f"nothing is measured on the {split} split: {error}")
        return None
    real = real_images(photographs, renderer.ccsr)["render"]
    known = torch.nonzero(shows_known_object(renderer.generator, photographs.labels))[:, 0].tolist()
    chosen = known[:: -(-len(known) // NUM_VALIDATION)] if known else []
    if not chosen:
        info_once(
            f"nothing is measured on the {split} split: it shows no known instance; hold out photographs of some "
            "(data.heldout_every)"
        )
        return None
    images = torch.stack([real[index][0] for index in chosen])
    return ValidationTask(renderer, images, build_pose_sampler(config, photographs, renderer.cameras).select(chosen))


def shows_known_object(generator: Generator, labels: Tensor) -> Tensor:
    """Which of the photographs with labels (N, 4) show an object that the generator can be asked for: bool (N,).

    All where it has no codes of instances, and so one object for each class.
    """
    return labels[:, 3] >= 0 if generator.instances is not None else torch.ones(len(labels), dtype=torch.bool)


def build_protocol(config: Config) -> FidelityProtocol:
    """How FID and KID are computed."""
    return _fill(FidelityProtocol, config.evaluation)


def find_extractor(config: Config) -> Extractor:
    """The feature extractor of FID and KID."""
    evaluation = config.evaluation
    return choose_extractor(evaluation.feature_extractor, evaluation.inception_weights, evaluation.download)


def _fill(kind: type[Settings], section: Section, **others: Any) -> Settings:
    """A dataclass of settings out of the keys of the same names in a section, and of others."""
    names = {item.name for item in fields(kind)} - others.keys()  # type: ignore[arg-type]
    return kind(**{name: getattr(section, name) for name in names}, **others)


def _build_mlp(config: Config, num_classes: int) -> RadianceField:
    nerf = config.nerf
    return MLPField(_fill_shape(MLPShape, config, num_classes, depth=nerf.netdepth, width=nerf.netwidth))


def _build_siren(config: Config, num_classes: int) -> RadianceField:
    nerf = config.nerf
    return SirenField(_fill_shape(SirenShape, config, num_classes, depth=nerf.netdepth, width=nerf.netwidth))


def _build_triplane(config: Config, num_classes: int) -> RadianceField:
    return TriplaneField(_fill_shape(TriplaneShape, config, num_classes, extent=config.nerf.bounding_radius))


def _fill_shape(kind: type[Settings], config: Config, num_classes: int, **others: Any) -> Settings:
    """The sizes of a field: what all fields have, keys of `nerf` of the same names, and others."""
    dim_appearance = config.z_dist.dim_appearance
    return _fill(
        kind,
        config.nerf,
        dim_shape=config.z_dist.dim - dim_appearance,
        dim_appearance=dim_appearance,
        num_classes=num_classes,
        density=_build_density_law(config),
        **others,
    )


def _build_density_law(config: Config) -> DensityLaw:
    nerf = config.nerf
    return DensityLaw(
        activation=nerf.density,
        scale=nerf.density_scale,
        bias=nerf.density_bias,
        sphere_prior=nerf.sphere_prior,
        prior_radius=nerf.prior_radius,
        bounding_radius=nerf.bounding_radius,
    )


#: the values of nerf.field
FIELDS: dict[str, Callable[[Config, int], RadianceField]] = {
    "mlp": _build_mlp,
    "siren": _build_siren,
    "triplane": _build_triplane,
}


def check_field(config: Config) -> None:
    """Raise ConfigError for a nerf.field that is none of FIELDS."""
    if config.nerf.field not in FIELDS:
        raise ConfigError(f"nerf.field={config.nerf.field!r}: expected one of {', '.join(FIELDS)}")


def build_generator(config: Config, dataset_info: DatasetInfo) -> Generator:
    """The generator of a configuration, with weights that depend on config.seed alone.

    Instances get codes where the photometric term teaches them.
    """
    num_instances = len(dataset_info.instance_names) if config.training.photometric else 0
    nerf = config.nerf
    check_field(config)
    background = nerf.background
    learn_background = background == "learned"
    if background in ("auto", "learned"):
        background = "white" if config.data.white_bkgd else "black"
    with _seeded_weights(config.seed, "generator"):
        sampling = RaySampling(nerf.N_samples, nerf.N_importance)
        field = FIELDS[nerf.field](config, len(dataset_info.class_names))
        cameras = build_camera_refinement(config.data, dataset_info)
        generator = Generator(
            field, sampling, background, learn_background, num_instances=num_instances, cameras=cameras
        )
    generator.use(build_memory_settings(config, "cpu"))  # who moves it elsewhere says so again
    return generator


def build_memory_settings(config: Config, device_type: str) -> MemorySettings:
    """How a step fits into memory as configured; `auto` stands for what it means without a budget."""
    training, strategy = config.training, config.training.memory_strategy
    return MemorySettings(
        micro_batch_size=training.batch_size if training.micro_batch_size == "auto" else training.micro_batch_size,
        strategy=choose_strategy(config, device_type) if strategy == "auto" else strategy,
        chunk=choose_chunk(config, device_type) if training.chunk == "auto" else training.chunk,
    )


def choose_strategy(config: Config, device_type: str) -> str:
    """The strategy where nobody has said how much memory there is: one that is fast and cannot surprise.

    With empty points "deferred" takes about a seventh more time than "dense", in a tenth of the memory or less.
    """
    return "deferred" if gains_from_empty_points(config, device_type) else "dense"


def gains_from_empty_points(config: Config, device_type: str) -> bool:
    """Whether rendering again, for gradients, is so much less work that little is gained by keeping everything.

    It is where a ReLU leaves half of all points without density (graf.models.occupied_points), as it does unless a bias
    fills the world, and where a point takes so much to compute that picking it costs nothing beside. Further samples
    are all computed again, so that little is gained with them.
    """
    nerf = config.nerf
    has_empty_points = nerf.density == "relu" and not nerf.N_importance
    return device_type == "cpu" and has_empty_points and nerf.field in ("mlp", "siren")


def choose_chunk(config: Config, device_type: str) -> int:
    """Rays that are rendered at once where nobody has said how many, the fewer the wider the field.

    A power of two, or one and a half times one.
    """
    nerf, numbers = config.nerf, GPU_NUMBERS_AT_ONCE
    has_planes = nerf.field == "triplane"
    if device_type == "cpu":
        numbers = CPU_NUMBERS_AT_ONCE_OF_PLANES if has_planes else CPU_NUMBERS_AT_ONCE
    width = nerf.decoder_width if has_planes else nerf.netwidth
    rays = numbers // (width * max(nerf.N_samples, nerf.N_importance))
    power = 2 ** int(math.log2(max(rays, 2)))
    return max(SMALLEST_CHUNK, 3 * power // 2 if 3 * power // 2 <= rays else power)


def build_discriminator(config: Config, dataset_info: DatasetInfo) -> PatchDiscriminator:
    """The discriminator of a configuration, with weights that depend on config.seed alone."""
    discriminator = config.discriminator
    groups: tuple[int, ...] = ()
    if discriminator.class_loss > 0:
        groups = (len(dataset_info.class_names),)
        if dataset_info.poses_known:
            groups += (len(dataset_info.v_list), config.data.num_views)
    shape = _fill(
        DiscriminatorShape,
        discriminator,
        size=config.ray_sampler.patch_size,
        spectral=discriminator.spectral_norm,
        num_classes=len(dataset_info.class_names),
        condition_pose=dataset_info.poses_known,
        label_groups=groups,
    )
    with _seeded_weights(config.seed, "discriminator"):
        return PatchDiscriminator(shape)


def build_ccsr(config: Config, pretrained: bool = True, trust: bool = False) -> CCSR | None:
    """The super-resolution module of a configuration, with weights that depend on config.seed alone; None without one.

    pretrained: read ccsr.weights, which a module that is about to be restored from a checkpoint does not need; trust:
    as in :func:`load_esrgan_weights`.
    """
    ccsr = config.ccsr
    if not ccsr.enabled:
        return None
    with _seeded_weights(config.seed, "ccsr"):
        trunk: ConvTrunk | UnitRange
        if ccsr.trunk == "conv":
            trunk = ConvTrunk(ccsr.scale, ccsr.features, ccsr.blocks)
        else:
            rrdb = RRDBTrunk(ccsr.scale, ccsr.features, ccsr.features // 2, ccsr.blocks)
            if pretrained and ccsr.weights is not None:
                load_esrgan_weights(rrdb, ccsr.weights, trust)
            trunk = UnitRange(rrdb)
        if ccsr.freeze_trunk:
            trunk.requires_grad_(False)
        latents = ViewLatents(ccsr.num_views, 3, config.data.imsize, ccsr.view_mode)
        projection = BoxProjection(ccsr.scale) if ccsr.kernel is None else KernelProjection(ccsr.scale, ccsr.kernel)
        return CCSR(trunk, latents, projection)


def build_trainer(
    config: Config,
    dataset_info: DatasetInfo,
    pose_sampler: PoseSampler,
    precision: Precision,
    device: torch.device,
    pretrained: bool = True,
    processes: Processes | None = None,
    trust: bool = False,
    kind: type[Trainer] = Trainer,
) -> Trainer:
    """The networks of a configuration, on `device`, and the trainer that plays them against each other.

    pretrained, trust: as in :func:`build_ccsr`; processes: those that train together, one by default; kind: of trainer.
    """
    ccsr = build_ccsr(config, pretrained, trust)
    generator = build_generator(config, dataset_info)
    discriminator = build_discriminator(config, dataset_info)
    for network in (generator, discriminator, ccsr):
        if network is not None and device.type != "cpu":  # the memory estimator's fake ones cannot be moved
            network.to(device)
    memory, caster = build_memory_settings(config, device.type), build_caster(config, dataset_info)
    return kind(config, memory, generator, discriminator, caster, pose_sampler, precision, device, ccsr, processes)


@contextmanager
def _seeded_weights(seed: int, network: str) -> Iterator[None]:
    """torch's initialisers draw from the global generator: seed it by purpose and put it back."""
    with preserve_rng():
        seed_everything(derive_seed(seed, f"weights/{network}"))
        yield
