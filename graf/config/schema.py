"""Every key of a configuration: its type, default, range and meaning, and which values contradict each other.

Key names follow GRAF's configuration files where they exist. Only composition roots and the trainer unpack a Config;
everything else takes plain arguments.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from graf.config.yaml_dialect import YamlDumper

PATCH_SIZES = (16, 32, 64, 128, 256)
FRAMING_TERMS = 7

_BYTES = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "k": 2**10, "m": 2**20, "g": 2**30}
_BYTES |= {"kb": 10**3, "mb": 10**6, "gb": 10**9}
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(10))}

#: a decay rate of Adam
DecayRate = Annotated[float, Field(ge=0, lt=1)]
#: coefficients of a Fourier series of the azimuth t: 1, cos t, cos 2 t, cos 3 t, sin t, sin 2 t, sin 3 t
FourierSeries = Annotated[tuple[float, ...], Field(min_length=FRAMING_TERMS, max_length=FRAMING_TERMS)]


class Section(BaseModel):
    """A frozen group of keys; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_from_truth(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are not values of this key")  # pydantic would read them as 1 and 0
        return value


class SyntheticConfig(Section):
    """The embedded procedural data set (data.type=synthetic)."""

    count: int = Field(1000, ge=8, description="number of images to render, once")
    seed: int = Field(0, ge=0, description="seed of the objects and of the choice of views")
    instances: int = Field(1, ge=1, description="objects per class, which differ in proportions, colours and features")
    known_instances: int | None = Field(
        None,
        ge=0,
        description="of the training instances of each class, those whose photographs say which one they show; "
        "they have half of the class's photographs; null: all",
    )
    heldout_instances: int = Field(
        0, ge=0, description="of the instances of each class, kept out of training: test and validation in turn"
    )


class FramingConfig(Section):
    """How the photographs of a class are scaled (logarithm) and shifted (right, down; half image sides) by azimuth."""

    log_scale: FourierSeries
    right: FourierSeries
    down: FourierSeries


class RefinedCameras(Section):
    """Cameras that fit the photographs: what a run with data.refine_cameras has learned."""

    fov: float = Field(gt=0, lt=180, description="horizontal field of view, degrees")
    elevations: tuple[float, ...] = Field(min_length=1, description="degrees above the horizon of each height_idx")
    framing: dict[str, FramingConfig] = Field(description="by name of the class")


class DataConfig(Section):
    """Where the photographs come from and which cameras took them."""

    type: Literal["synthetic", "turntable", "transforms", "image_folder"] = Field(
        "synthetic", description="how images and labels are found in datadir; synthetic makes its own"
    )
    datadir: str = Field("data", description="folder of the images, relative to the working directory")
    imsize: int = Field(64, ge=16, le=2048, description="side of the square images, pixels")
    crop: int | None = Field(
        None, ge=1, description="side of the central square of a photograph that is used, pixels; null: the largest"
    )
    white_bkgd: bool = Field(
        True, description="background behind transparent pixels, and of renders: white, else black"
    )
    near: float = Field(2.5, gt=0, description="where rays begin to be sampled, world units from the camera")
    far: float = Field(4.5, gt=0, description="where rays end, world units from the camera")
    radius: float | tuple[float, float] = Field(
        3.5,
        description="distance of the cameras from the origin, world units; [min, max] where poses are sampled; "
        "transforms: that of its poses is used",
    )
    fov: float = Field(30.0, gt=0, lt=180, description="horizontal field of view, degrees")
    umin: float = Field(0.0, ge=0, le=1, description="smallest azimuth / 360 where poses are sampled (image_folder)")
    umax: float = Field(1.0, ge=0, le=1, description="largest azimuth / 360 where poses are sampled (image_folder)")
    vmin: float = Field(
        0.0, ge=0, le=1, description="smallest height v where poses are sampled; polar angle arccos(1-2v)"
    )
    vmax: float = Field(0.45, ge=0, le=1, description="largest height v where poses are sampled (image_folder)")
    v_list: tuple[float, ...] | None = Field(
        None,
        min_length=1,
        description="height v of each height_idx; null: the set's own; a turntable set has none",
    )
    num_views: int = Field(8, ge=1, le=360, description="azimuths of a sample grid, and azimuth bins of the class loss")
    angle_direction: Literal["ccw", "cw"] = Field(
        "ccw", description="sense in which label angles grow, seen from above"
    )
    file_pattern: str | None = Field(
        None, description="regular expression with groups class, angle and optionally height, instance"
    )
    classes: tuple[str, ...] | None = Field(None, description="names of the classes to keep; null keeps all")
    heldout_every: int = Field(
        0, ge=0, description="hold every n-th distinct angle (or image) out, for test and validation in turn; 0: none"
    )
    refine_cameras: bool = Field(
        False, description="learn field of view, elevations and the photographs' framing (turntable, synthetic)"
    )
    refined_cameras: RefinedCameras | None = Field(
        None, description="what a run has learned of them: where refine_cameras starts, or what is used without it"
    )
    max_megapixels: float = Field(
        100.0,
        gt=0,
        le=178,
        description="larger photographs are skipped and reported; decoding takes 4 bytes a pixel, 12 with "
        "transparency or 16 bits and 4 more to turn it upright, of four photographs at once",
    )
    strict: bool = Field(False, description="an unusable file is an error instead of a report")
    cache_mib: int = Field(512, ge=0, description="decoded images are kept in memory up to this size, MiB")
    synthetic: SyntheticConfig = SyntheticConfig()

    @field_validator("radius", mode="before")
    @classmethod
    def _split_graf_range(cls, value: Any) -> Any:
        if isinstance(value, str) and "," in value:  # GRAF writes "9.5,10.5"
            return tuple(float(part) for part in value.split(","))
        return value

    @field_validator("radius")
    @classmethod
    def _radius_in_range(cls, value: float | tuple[float, float]) -> float | tuple[float, float]:
        low, high = value if isinstance(value, tuple) else (value, value)
        if not 0 < low <= high:
            raise ValueError("a distance is positive, and a range is [min, max] with min <= max")
        return value

    @property
    def radius_range(self) -> tuple[float, float]:
        """Smallest and largest distance of the cameras."""
        return self.radius if isinstance(self.radius, tuple) else (self.radius, self.radius)

    @field_validator("v_list")
    @classmethod
    def _heights_in_range(cls, values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if not all(0 <= value <= 1 for value in values or ()):
            raise ValueError("every height lies in [0, 1] (0 from above, 0.5 from the side)")
        return values


class NerfConfig(Section):
    """The radiance field and its sampling along rays."""

    field: str = Field(
        "mlp",
        description="what represents the objects: mlp, GRAF's network; siren, pi-GAN's, of sines that the shape code "
        "modulates; or triplane, features on three planes",
    )
    planes: Literal["table", "synthesis"] = Field(
        "table", description="triplane: stored for each class, or made of the shape code by a convolutional network"
    )
    synthesis_width: int = Field(32, ge=4, description="channels of that network at its two finest sides; twice below")
    plane_resolution: int = Field(64, ge=4, le=1024, description="triplane: features on each side of a plane")
    plane_channels: int = Field(16, ge=1, description="triplane: numbers of a feature")
    decoder_width: int = Field(64, ge=4, description="triplane: hidden units of its decoder")
    colour_components: int = Field(
        6, ge=1, description="triplane: colours at a point that viewing direction and appearance code mix"
    )
    N_samples: int = Field(64, ge=2, description="samples per ray")
    N_importance: int = Field(0, ge=0, description="further samples per ray where the first ones found density")
    netdepth: int = Field(8, ge=1, description="mlp, siren: layers of the density trunk")
    netwidth: int = Field(256, ge=8, description="mlp, siren: units per layer")
    multires: int = Field(10, ge=0, le=16, description="mlp: octaves of the positional encoding of points")
    base_frequency: float = Field(
        1.0, gt=0, description="its first angular frequency: pi in the papers, 1 in GRAF's code"
    )
    multires_views: int = Field(4, ge=0, le=16, description="octaves of the positional encoding of directions")
    use_viewdirs: bool = Field(True, description="colour may depend on the viewing direction")
    jitter: bool = Field(True, description="stratified samples at random places of their bins during training")
    raw_noise_std: float = Field(1.0, ge=0, description="standard deviation of the noise on the raw density")
    decrease_noise: bool = Field(True, description="let that noise fall linearly to 0")
    noise_iterations: int = Field(5000, ge=1, description="iterations until it is 0")
    dim_class: int = Field(32, ge=1, description="mlp, siren: length of the class embedding")
    density: Literal["relu", "softplus"] = Field("relu", description="activation of the raw density")
    density_scale: float = Field(1.0, gt=0, description="factor on the activated density")
    density_bias: float = Field(0.0, description="added to the raw density")
    sphere_prior: float = Field(0.0, ge=0, description="adds sphere_prior (prior_radius - |p|) to the raw density")
    prior_radius: float = Field(0.6, gt=0, description="radius of that soft ball, world units")
    bounding_radius: float | None = Field(None, gt=0, description="nothing exists outside this radius; null: no bound")
    background: Literal["auto", "white", "black", "learned"] = Field(
        "auto", description="colour behind the object; auto follows data.white_bkgd, learned starts there"
    )


class ZDistConfig(Section):
    """The latent codes."""

    type: Literal["gauss", "uniform"] = Field("gauss", description="standard normal, or uniform in [-1, 1]")
    dim: int = Field(256, ge=1, description="length of the whole code")
    dim_appearance: int = Field(128, ge=0, description="its last part, which acts on colour only")


class RaySamplerConfig(Section):
    """The patches that the discriminator sees."""

    N_samples: int = Field(1024, ge=256, description="rays per patch: the square of the patch side")
    min_scale: float = Field(0.25, gt=0, le=1, description="smallest side of a patch as a share of the image")
    max_scale: float = Field(1.0, gt=0, le=1, description="largest side of a patch as a share of the image")
    scale_anneal: float = Field(0.0025, ge=0, description="s_min(it) = exp(-3 scale_anneal it / 1000); 0: at once")
    snap: bool = Field(
        False, description="patches on whole pixels: scales n side / imsize, every pixel of a real patch a photograph's"
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="how photographs are read between pixels; bilinear (GRAF) blurs them"
    )

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return math.isqrt(self.N_samples)


class AugmentConfig(Section):
    """Differentiable augmentation of everything the discriminator sees (Zhao et al., NeurIPS 2020)."""

    colour: float = Field(0.0, ge=0, le=1, description="strength of random brightness, saturation and contrast")
    translation: float = Field(0.0, ge=0, lt=1, description="largest shift as a share of the patch side")
    cutout: float = Field(0.0, ge=0, lt=1, description="side of the blanked square as a share of the patch side")


class DiscriminatorConfig(Section):
    """The patch discriminator."""

    ndf: int = Field(64, ge=4, description="channels after the first layer")
    max_channels: int = Field(512, ge=4, description="largest number of channels")
    norm: Literal["none", "instance"] = Field("instance", description="normalisation of the hidden layers")
    spectral_norm: bool = Field(False, description="spectral normalisation of every layer")
    hflip: bool = Field(False, description="mirror real images at random; contradicts labelled poses")
    azimuth_harmonics: int = Field(6, ge=1, le=32, description="Fourier features of the azimuth")
    condition_maps: int = Field(0, ge=0, description="input channels made from the label, besides projection; 0: none")
    class_loss: float = Field(0.0, ge=0, description="weight of the auxiliary label classification; 0: no head")
    augment: AugmentConfig = AugmentConfig()


class CcsrConfig(Section):
    """Consistency-controlled super-resolution (off unless enabled)."""

    enabled: bool = Field(False, description="train super-resolution; photographs are then read at imsize * scale")
    scale: Literal[2, 4] = Field(2, description="how many times finer its output is")
    start_iteration: int = Field(0, ge=0, description="first iteration that trains it")
    every: int = Field(1, ge=1, description="train it every n-th iteration")
    num_views: int = Field(8, ge=1, le=360, description="learnable latent images on a ring; 1: shared by all views")
    view_mode: Literal["blend", "nearest"] = Field(
        "blend", description="how an angle between two views picks its latent"
    )
    trunk: Literal["conv", "rrdb"] = Field("conv", description="small convolutional network, or ESRGAN's RRDB network")
    features: int = Field(32, ge=4, description="channels of the trunk (ESRGAN: 64)")
    blocks: int = Field(4, ge=1, description="residual blocks of the trunk (ESRGAN: 23)")
    weights: str | None = Field(None, description="ESRGAN weights for the rrdb trunk, e.g. RRDB_ESRGAN_x4.pth")
    freeze_trunk: bool = Field(False, description="train the view latents only")
    kernel: tuple[float, ...] | None = Field(
        None, description="1D weights of the blur before decimation; null: box mean"
    )
    lr: float = Field(5e-4, gt=0, description="learning rate; it falls as training.lr_schedule says")
    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.99), description="decay rates where training.optimizer is adam; restoring is regression, hence momentum"
    )
    alpha_init: float = Field(10.0, ge=0, description="weight of the consistency term at iteration 0")
    alpha_min: float = Field(1.0, ge=0, description="its floor")
    alpha_decay: float = Field(
        1e-3, ge=0, description="its decay per iteration: max(alpha_min, alpha_init exp(-decay it))"
    )
    adversarial: float = Field(0.3, ge=0, description="weight of the adversarial term; 0: none")
    photographs: float = Field(
        10.0, ge=0, description="weight of restoring photographs from their own reductions (L1); 0: none"
    )
    photometric: float = Field(
        0.0, ge=0, description="weight of super-resolved renders' squared distance to photographs they match; 0: none"
    )
    agreement: float = Field(
        0.0, ge=0, description="weight of the agreement of neighbouring views, which takes a second render; 0: none"
    )
    agreement_degrees: float = Field(15.0, gt=0, lt=180, description="angle between those neighbouring views, degrees")
    perceptual: float = Field(
        0.0, ge=0, description="weight of LPIPS to the upsampled render, where lpips is installed"
    )
    supervise_generator: float = Field(
        0.0, ge=0, description="weight of the generator's supervision by SR crops; 0: none"
    )


class TrainingConfig(Section):
    """The loop."""

    outdir: str = Field("results", description="folder of all runs; this one is outdir/expname")
    batch_size: int = Field(
        8, ge=1, description="images per update; micro_batch_size lowers memory without changing it"
    )
    max_iterations: int = Field(100_000, ge=1, description="length of the run and horizon of the schedules, iterations")
    max_minutes: float | None = Field(None, gt=0, description="stop (and save) after this many minutes; null: no limit")
    nworkers: int = Field(0, ge=0, description="processes that load images which are not in memory; at most 4")
    drop_last: bool = Field(True, description="leave out the incomplete last batch of an epoch")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto | cpu | cuda | cuda:N | mps")
    chunk: Literal["auto"] | PositiveInt = Field(
        "auto",
        description="most rays rendered at once, of one image or of whole ones; auto: as many as a CPU's caches hold "
        "or a GPU's launches want, by the field's width and samples, or fewer that fit memory_budget",
    )
    micro_batch_size: Literal["auto"] | PositiveInt = Field(
        "auto", description="images on the device at once; auto: as many as fit"
    )
    memory_strategy: Literal["auto", "dense", "checkpoint", "deferred"] = Field(
        "auto",
        description="which activations of rendering are kept: all (dense), those of one chunk, or none before D's "
        "gradient (deferred); auto: dense, or, for mlp and siren with density relu and no N_importance on a CPU, "
        "deferred: points without density are left out of the backward pass there, so that it is nearly as fast",
    )
    empty_cache: Literal["phase", "never"] | PositiveInt = Field(
        "phase",
        description="give cached memory back after sampling, scoring and saving; never; or every n-th iteration",
    )
    memory_budget: str | None = Field(
        None, description="8GiB, or auto (what is free): choose what is auto of the three keys above; null: no limit"
    )
    deterministic: bool = Field(
        False, description="CUDA: sums in one order where torch can, slower; on a CPU every run is deterministic"
    )
    use_amp: bool = Field(False, description="mixed precision where the device gains from it")
    amp_dtype: Literal["auto", "float16", "bfloat16"] = Field(
        "auto",
        description="its half-precision type; auto: bfloat16 where the device gains from it, else float16 on CUDA",
    )
    gan_type: Literal["standard", "hinge", "wgan"] = Field("standard", description="loss of the game")
    reg_type: Literal["none", "real", "wgangp"] = Field(
        "real", description="real: R1 penalty; wgangp: gradient penalty"
    )
    reg_param: float = Field(10.0, ge=0, description="its weight: reg_param E ||gradient||^2, per image")
    reg_every: int = Field(1, ge=1, description="apply it every n-th step with n times the weight (lazy)")
    share_fakes: bool = Field(
        False,
        description="D and G step use the same fake patches: a render less per step, and drawn codes that differ less",
    )
    match_views: bool = Field(False, description="generated patches take labels and places of the batch's photographs")
    photometric: float = Field(
        0.0, ge=0, description="weight of the squared distance of renders to photographs of the same view; 0: none"
    )
    photometric_min: float = Field(0.0, ge=0, description="its floor, where photometric is not 0")
    photometric_decay: float = Field(
        0.0, ge=0, description="its decay per iteration: max(photometric_min, photometric exp(-decay it))"
    )
    instance_prior: float = Field(
        0.1, ge=0, description="weight of the squared numbers of known instances' codes, which z is drawn like"
    )
    opacity: float = Field(0.0, ge=0, description="weight of the mean opacity, which clears fog; 0: none")
    optimizer: Literal["rmsprop", "adam"] = Field("rmsprop", description="RMSprop (alpha .99) or Adam (betas)")
    betas: tuple[DecayRate, DecayRate] = Field((0.0, 0.99), description="Adam's decay rates")
    lr_g: float = Field(5e-4, gt=0, description="learning rate of the generator")
    lr_d: float = Field(1e-4, gt=0, description="learning rate of the discriminator")
    lr_batch_size: PositiveInt | None = Field(
        None, description="batch_size that lr_g, lr_d and ccsr.lr are written for, which scale_lr starts from"
    )
    scale_lr: Literal["none", "linear", "sqrt"] = Field(
        "none",
        description="these rates follow the batch: times batch_size / lr_batch_size, or times its square root, which "
        "suits rmsprop and adam",
    )
    lr_schedule: Literal["constant", "multistep", "step", "exponential", "cosine", "points"] = Field(
        "multistep", description="how learning rates change; points: as lr_points say"
    )
    lr_anneal: float = Field(0.5, gt=0, le=1, description="factor of multistep, step and exponential; the cosine's end")
    lr_anneal_every: tuple[PositiveInt, ...] = Field(
        (50_000, 100_000, 200_000),
        min_length=1,
        description="multistep: the iterations; step, exponential: the period; one number without lr_schedule: step",
    )
    lr_decay_start: float = Field(0.0, ge=0, lt=1, description="cosine: share of max_iterations that stays constant")
    lr_points: tuple[tuple[NonNegativeInt, NonNegativeFloat], ...] | None = Field(
        None,
        min_length=1,
        description="points: pairs of an iteration and the factor on the rates there, as in [[0, 0], [500, 1], "
        "[20000, 0.1]]; constant before the first and after the last; without lr_schedule: points",
    )
    lr_interpolation: Literal["linear", "log"] = Field(
        "linear", description="points: between two of them the factor is linear in the iteration, or its logarithm is"
    )
    lr_warmup: int = Field(0, ge=0, description="iterations of linear warm-up in front of any schedule")
    grad_clip: Literal["none", "norm", "value"] = Field("none", description="gradient clipping, after unscaling")
    grad_clip_at: float = Field(1.0, gt=0, description="the largest norm or value")
    model_average_beta: float = Field(0.999, ge=0, lt=1, description="EMA of the generator's weights; 0: none")
    monitoring: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        ("tensorboard",), description="where scalars and sample grids go besides metrics.jsonl"
    )
    print_every: int = Field(10, ge=1, description="iterations between log lines")
    layer_norms: bool = Field(
        False, description="gradient norms of every layer in the log too, as grad_norm_g/field.planes"
    )
    sample_every: int = Field(500, ge=0, description="iterations between sample grids (denser at the start); 0: none")
    sample_objects: int = Field(4, ge=1, description="rows of a sample grid")
    fid_every: int = Field(5000, ge=0, description="iterations between FID/KID scores; 0: none")
    save_every: float = Field(900.0, gt=0, description="seconds between checkpoints")
    backup_every: int = Field(
        100_000, ge=0, description="iterations between checkpoints that are kept for ever; 0: none"
    )
    keep_checkpoints: int = Field(3, ge=1, description="how many of the timed checkpoints are kept")
    process_timeout: float = Field(
        1800.0, gt=0, description="several processes: seconds that they wait for one that does not answer"
    )
    sync_check_every: int = Field(
        500, ge=0, description="several processes: iterations between checks that all hold the same weights; 0: none"
    )
    save_best: Literal["fid", "kid", "psnr"] = Field(
        "fid", description="the score that decides model_best.pt; psnr: on the validation split"
    )

    @field_validator("memory_budget")
    @classmethod
    def _budget_readable(cls, value: str | None) -> str | None:
        if value not in (None, "auto"):
            parse_bytes(str(value))
        return value

    @model_validator(mode="before")
    @classmethod
    def _infer_schedule(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "lr_schedule" not in values:
            if values.get("lr_points") is not None:
                return {**values, "lr_schedule": "points"}
            # GRAF's lr_anneal_every is a list of milestones in a string, or the period of a step schedule
            period = values.get("lr_anneal_every")
            if isinstance(period, int) and not isinstance(period, bool):
                return {**values, "lr_schedule": "step"}
        return values

    @field_validator("lr_points")
    @classmethod
    def _points_make_a_curve(cls, points: tuple[tuple[int, float], ...] | None) -> tuple[tuple[int, float], ...] | None:
        for (before, _), (after, _) in pairwise(points or ()):
            if after <= before:
                raise ValueError(f"iteration {after} comes after {before}: iterations increase from point to point")
        if points is not None and not any(factor for _, factor in points):
            raise ValueError("every factor is 0, so that nothing would ever be learned; 1 stands for the whole rate")
        return points

    @field_validator("monitoring", mode="before")
    @classmethod
    def _split_graf_names(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("lr_anneal_every", mode="before")
    @classmethod
    def _split_graf_list(cls, value: Any) -> Any:
        if isinstance(value, str):  # GRAF writes "50000,100000,200000"
            return tuple(int(part) for part in value.split(","))
        return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


class EvaluationConfig(Section):
    """Samples, FID / KID, and what eval.py renders."""

    feature_extractor: Literal["auto", "inception", "offline"] = Field(
        "auto", description="auto: Inception where its weights can be found, else the fixed offline network"
    )
    inception_weights: str | None = Field(None, description="file of the Inception weights; null: torch hub's cache")
    download: bool = Field(True, description="try to download missing Inception weights before training starts")
    N_samples: int | None = Field(
        None, ge=2, description="samples per ray of samples, scores and eval.py; null: as in nerf"
    )
    num_images: int = Field(1000, ge=2, description="generated images per score")
    kid_subset_size: int = Field(1000, ge=2, description="images per KID subset, at most those on either side")
    kid_subsets: int = Field(100, ge=1, description="KID subsets")
    batch_size: int = Field(32, ge=1, description="images per pass of the extractor")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the codes and labels of generated images")


class Config(Section):
    """Everything about one run."""

    expname: str = Field(
        "default", min_length=1, max_length=100, pattern=r"^\w[\w.\-]*$", description="name of the run's folder"
    )
    seed: int = Field(0, ge=0, description="every random number of the run derives from it")
    data: DataConfig = DataConfig()
    nerf: NerfConfig = NerfConfig()
    z_dist: ZDistConfig = ZDistConfig()
    ray_sampler: RaySamplerConfig = RaySamplerConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    ccsr: CcsrConfig = CcsrConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("expname")
    @classmethod
    def _is_a_folder_everywhere(cls, value: str) -> str:
        if value.endswith(".") or is_device(value):
            raise ValueError("Windows has no such folder: it ends in a dot, or is the name of a device; choose another")
        return value

    @model_validator(mode="after")
    def _check_contradictions(self) -> Config:
        problems = list(_contradictions(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def photo_size(self) -> int:
        """Side of the photographs that training reads: high resolution where super-resolution is trained."""
        return self.data.imsize * (self.ccsr.scale if self.ccsr.enabled else 1)

    @property
    def run_folder(self) -> Path:
        """outdir/expname, with ~ for the home folder."""
        return Path(os.path.expanduser(self.training.outdir)) / self.expname

    def to_yaml(self) -> str:
        """The whole configuration as YAML that `load_config` reads back to an equal Config."""
        return str(yaml.dump(self.model_dump(mode="json"), Dumper=YamlDumper, sort_keys=False, width=120))


def _contradictions(config: Config) -> Iterator[str]:
    """Values that are fine one by one and not together, a line each."""
    data, rays, training = config.data, config.ray_sampler, config.training
    if data.near >= data.far:
        yield f"data.near={data.near}: must be smaller than data.far={data.far}"
    for low, high in (("umin", "umax"), ("vmin", "vmax")):
        if getattr(data, low) > getattr(data, high):
            yield f"data.{low}={getattr(data, low)}: must not exceed data.{high}={getattr(data, high)}"
    if data.heldout_every == 1:
        yield "data.heldout_every=1: would leave nothing to train on; 0 holds nothing out, 6 every sixth"
    if isinstance(data.radius, tuple) and data.type != "image_folder":
        yield (
            f"data.radius={list(data.radius)}: a range is only for data.type=image_folder, whose poses are sampled; "
            f"data.type={data.type} needs one number"
        )
    if config.z_dist.dim_appearance >= config.z_dist.dim:
        yield (
            f"z_dist.dim_appearance={config.z_dist.dim_appearance}: must be smaller than "
            f"z_dist.dim={config.z_dist.dim}, of which it is a part; the rest is the shape code"
        )
    side = rays.patch_size
    if side * side != rays.N_samples or side not in PATCH_SIZES:
        nearest = min(PATCH_SIZES, key=lambda size: abs(size - math.sqrt(rays.N_samples)))
        reason = "is not a perfect square" if side * side != rays.N_samples else f"is a patch of side {side}"
        yield (
            f"ray_sampler.N_samples={rays.N_samples}: {reason}; the discriminator takes patches of side "
            f"{', '.join(map(str, PATCH_SIZES))}; try {nearest * nearest}"
        )
    elif side > data.imsize:
        yield (
            f"ray_sampler.N_samples={rays.N_samples}: a patch of side {side} does not fit into "
            f"data.imsize={data.imsize}"
        )
    if rays.min_scale > rays.max_scale:
        yield f"ray_sampler.min_scale={rays.min_scale}: must not exceed max_scale={rays.max_scale}"
    if config.discriminator.class_loss and config.discriminator.condition_maps:
        yield "discriminator.condition_maps: would tell the class head the class; with class_loss > 0 set it to 0"
    if config.nerf.field == "triplane" and config.nerf.bounding_radius is None:
        yield "nerf.field=triplane: its planes need an extent; set nerf.bounding_radius, for example to 1"
    if training.photometric and not training.match_views:
        yield (
            f"training.photometric={training.photometric:g}: compares renders with photographs of the same view; set "
            "training.match_views=true too"
        )
    if config.ccsr.enabled and config.ccsr.photometric and not training.photometric:
        yield (
            f"ccsr.photometric={config.ccsr.photometric:g}: compares with photographs what training.photometric brings "
            "near them, and that is 0; set training.photometric=20 and training.match_views=true, or leave it out"
        )
    for name, is_set in (
        ("refine_cameras", data.refine_cameras),
        ("refined_cameras", data.refined_cameras is not None),
    ):
        if is_set and data.type not in ("turntable", "synthetic"):
            yield (
                f"data.{name}: corrects cameras that follow from labels, as of data.type=turntable or synthetic; "
                f"data.type={data.type} has its own, so leave it out"
            )
    if data.refine_cameras and not training.photometric:
        yield (
            "data.refine_cameras=true: learns from the distance of renders to photographs, and training.photometric=0; "
            "set training.photometric=20 and training.match_views=true, or leave it out"
        )
    if training.save_best == "psnr" and data.type == "image_folder":
        yield (
            "training.save_best=psnr: compares with photographs whose views are known, and data.type=image_folder has "
            "none; use save_best=kid"
        )
    yield from _rate_contradictions(training)
    yield from _ccsr_contradictions(config.ccsr)
    if config.ccsr.enabled and training.reg_type == "wgangp":
        yield "training.reg_type=wgangp: does not cover super-resolved crops; with ccsr.enabled use reg_type=real"
    if training.reg_type == "wgangp" and training.gan_type != "wgan":
        yield "training.reg_type=wgangp: needs training.gan_type=wgan; try reg_type=real"
    if config.discriminator.hflip and data.type != "image_folder":
        yield "discriminator.hflip=true: mirrored images contradict their labels; only for data.type=image_folder"
    if data.crop is not None and data.type == "synthetic":
        yield f"data.crop={data.crop}: the synthetic set is made as it is used; set data.imsize and data.fov"
    if data.type == "synthetic" and training.drop_last and training.batch_size > data.synthetic.count:
        yield batch_too_large(training.batch_size, data.synthetic.count)


def _rate_contradictions(training: TrainingConfig) -> Iterator[str]:
    points = training.lr_points
    if points is None and training.lr_schedule == "points":
        yield "training.lr_schedule=points: needs training.lr_points, for example [[0, 0], [500, 1], [20000, 0.1]]"
    if points is not None and training.lr_schedule != "points":
        yield (
            f"training.lr_points: are followed by training.lr_schedule=points, found lr_schedule="
            f"{training.lr_schedule}; set it to points, or leave the points out"
        )
    zeros = [iteration for iteration, factor in points or () if factor == 0]
    if training.lr_interpolation == "log" and zeros:
        yield (
            f"training.lr_points: the factor at iteration {zeros[0]} is 0, which has no logarithm; with "
            "training.lr_interpolation=log write a small one, such as 0.001, or use lr_interpolation=linear"
        )
    if training.scale_lr != "none" and training.lr_batch_size is None:
        yield (
            f"training.scale_lr={training.scale_lr}: needs training.lr_batch_size, the batch that the learning rates "
            f"are written for; set it, for example to {training.batch_size}"
        )


def _ccsr_contradictions(ccsr: CcsrConfig) -> Iterator[str]:
    if ccsr.kernel is not None and len(ccsr.kernel) % 2:
        yield f"ccsr.kernel: {len(ccsr.kernel)} weights; scale {ccsr.scale} needs an even number of them"
    if ccsr.kernel is not None and abs(sum(ccsr.kernel) - 1) > 1e-6:
        yield f"ccsr.kernel: the weights sum to {sum(ccsr.kernel):g}; a blur keeps brightness: make it 1"
    if ccsr.weights is not None and ccsr.trunk != "rrdb":
        yield f"ccsr.weights={ccsr.weights!r}: only for ccsr.trunk=rrdb, found ccsr.trunk={ccsr.trunk}"
    if ccsr.freeze_trunk and ccsr.weights is None:
        yield "ccsr.freeze_trunk=true: an untrained trunk would stay untrained; set ccsr.weights too"


def is_device(name: str) -> bool:
    """Whether a file of that name would be a device on Windows, as aux and con.txt are."""
    return name.partition(".")[0].upper() in _DEVICES


def parse_bytes(text: str) -> int:
    """Bytes of "8GiB", "800 MiB", "1.5G" (GiB) or "8GB" (10^9). Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    if match is None or match.group(2).lower() not in _BYTES or not 0 < float(match.group(1)) < 1e12:
        raise ValueError("expected a number above 0 with a unit, as in 8GiB or 800MiB, or auto, or null")
    return round(float(match.group(1)) * _BYTES[match.group(2).lower()])


def batch_too_large(batch_size: int, num_images: int) -> str:
    """The message for a batch that the data set can never fill."""
    return (
        f"training.batch_size={batch_size}: the data set has {num_images} images, so with training.drop_last=true no "
        f"batch is ever complete; try training.batch_size={num_images} or training.drop_last=false"
    )
