"""What `graf card` puts into a folder: weights, configuration, pictures, scores and the model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graf import __version__
from graf.app.export_tasks import without_places, write_trained
from graf.app.loading import TrainedGenerator
from graf.app.run_arguments import OpenedRun, output_path
from graf.base.errors import UserError
from graf.base.extras import import_optional
from graf.base.files import create_folder, write_atomically
from graf.config import Config
from graf.evaluation.grids import Showcase, draw_showcase, render_showcase
from graf.evaluation.pictures import Picture, save_png, tile_grid, write_video
from graf.evaluation.renderer import Renderer
from graf.geometry.cameras import elevation_from_height, ring
from graf.runtime.logs import progress_bar
from graf.sharing.model_card import CONFIG_FILE, GRID_FILE, VIDEO_FILE, WEIGHTS_FILE, Choices, Model, write_card
from graf.sharing.records import SCORE_FILES, read_measurements, read_resources

MAX_OBJECTS, VIEWS, VIDEO_COLUMNS, FRAMES_PER_SECOND = 8, 8, 4, 24


@dataclass(frozen=True)
class CardOptions:
    """The choices of the command line; name None: the run's. frames: of the video, 0 for none."""

    name: str | None = None
    license: str = "other"
    datasets: tuple[str, ...] = ()
    seed: int = 0
    frames: int = 48

    def __post_init__(self) -> None:
        if not (self.frames == 0 or 2 <= self.frames <= 10_000):
            raise UserError(f"--frames {self.frames}: expected 0 for no video, or 2 to 10000")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: expected 0 or more")


@dataclass(frozen=True)
class ShownObject:
    """One object of the pictures: class, code (dim_z,) and caption."""

    class_idx: int
    z: Tensor
    caption: str


def write_card_folder(opened: OpenedRun, options: CardOptions, out: str | None) -> str:
    """Make the folder; returns the line to print. Nothing appears before all of it is written."""
    import_optional("huggingface_hub", "share")  # missed before minutes of rendering
    trained, config = opened.trained, opened.renderer.config
    folder = output_path(out, opened, "card")
    shown = choose_objects(trained, options.seed)
    with create_folder(folder) as making:
        write_trained(making / WEIGHTS_FILE, trained)
        write_atomically(making / CONFIG_FILE, without_places(config).to_yaml())
        save_png(making / GRID_FILE, draw_grid(opened.renderer, shown))
        has_video = False
        if options.frames:
            turn = turn_objects(opened.renderer, shown, options.frames)
            frames = progress_bar(turn, desc="video", total=options.frames, unit="frame")
            has_video = write_video(making / VIDEO_FILE, frames, FRAMES_PER_SECOND).name == VIDEO_FILE
        copy_scores(opened.folder.path, making / "scores")
        choices = Choices(options.name or config.expname, options.license, options.datasets)
        results = write_card(making / "README.md", choices, describe_model(opened, shown, has_video))
    upload = f"hf upload YOUR_NAME/{choices.name} {folder}"
    return f"wrote {folder}: {results} scores in its card, licence {choices.license}; to upload it: {upload}"


def choose_objects(trained: TrainedGenerator, seed: int) -> list[ShownObject]:
    """At most MAX_OBJECTS: of each class one that training knows by name, where there is one, and a drawn one."""
    renderer, shown = trained.renderer, []
    names = trained.dataset_info.instance_names if renderer.generator.instances is not None else ()
    for class_idx, class_name in enumerate(renderer.classes):
        number = next((n for n, name in enumerate(names) if name.partition("/")[0] == class_name), None)
        if number is not None:
            z = renderer.instance_codes([number])[0]
            shown.append(ShownObject(class_idx, z, f"{names[number]}, known"))
        shown.append(ShownObject(class_idx, renderer.codes(seed, range(1))[0], f"{class_name}, drawn"))
    return shown[:MAX_OBJECTS]


def draw_grid(renderer: Renderer, shown: list[ShownObject]) -> Picture:
    """Objects in rows, azimuths in columns, super-resolved where the run can."""
    z, classes = torch.stack([item.z for item in shown]), [item.class_idx for item in shown]
    showcase = Showcase.around(z, classes, VIEWS, renderer.default_height)
    columns = [f"{360 * view / VIEWS:.0f}" for view in range(VIEWS)]
    captions = [item.caption for item in shown]
    rows = progress_bar(
        render_showcase(renderer, showcase, super_resolve=renderer.ccsr is not None), desc="grid", total=len(shown)
    )
    pictures = draw_showcase(rows, VIEWS, renderer.caster.near, renderer.caster.far, captions, columns)
    return pictures.get("sr", pictures["rgb"])


def turn_objects(renderer: Renderer, shown: list[ShownObject], frames: int) -> Iterator[Picture]:
    """A turn of all objects, VIDEO_COLUMNS in a row, super-resolved where the run can."""
    z, classes = torch.stack([item.z for item in shown]), torch.tensor([item.class_idx for item in shown])
    for azimuth, height in zip(*ring(frames, renderer.default_height), strict=True):
        views = renderer.cameras.views_at(classes, azimuth.expand(len(z)), height.expand(len(z)))
        renders = renderer.render_views(z, views, super_resolve=renderer.ccsr is not None)
        yield tile_grid(renders.rgb if renders.sr is None else renders.sr, min(VIDEO_COLUMNS, len(z)))


def copy_scores(run: Path, folder: Path) -> None:
    """Copy the files that scores are taken from, those of eval/ under names of their own."""
    for name in SCORE_FILES:
        if (run / name).is_file():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(run / name, folder / name.replace("/", "_"))


def describe_model(opened: OpenedRun, shown: list[ShownObject], has_video: bool) -> Model:
    """Everything that the card says, out of the checkpoint and the run's files."""
    trained, renderer = opened.trained, opened.renderer
    config: Config = renderer.config
    drawn = f"truncation {renderer.truncation:g}" if renderer.truncation < 1 else "no truncation"
    known = "; known ones are objects that training photographs show by name" if _has_known(shown) else ""
    elevation = elevation_from_height(renderer.default_height)
    cameras = f"Cameras stand {elevation:.0f} degrees above the horizon, {renderer.cameras.radius:g} units away."
    return Model(
        classes=renderer.classes,
        iteration=trained.iteration,
        facts=_list_facts(trained),
        training=_list_training(trained),
        data=_describe_data(trained) + _describe_exchange(trained) + _describe_tuning(trained),
        data_name=_name_data(config),
        data_type=config.data.type,
        tags=[config.nerf.field, *(["super-resolution"] if renderer.ccsr is not None else [])],
        pictures=f"Drawn objects come out of random codes ({drawn}){known}. {cameras}",
        video=has_video,
        measurements=read_measurements(opened.folder.path, trained.iteration),
        resources=read_resources(opened.folder.path, trained.iteration, config.training.batch_size),
    )


def _has_known(shown: list[ShownObject]) -> bool:
    return any(item.caption.endswith(", known") for item in shown)


def _list_facts(trained: TrainedGenerator) -> list[tuple[str, str]]:
    renderer, config = trained.renderer, trained.renderer.config
    generator, instances = renderer.generator, len(trained.dataset_info.instance_names)
    planes = f", planes: {config.nerf.planes}" if config.nerf.field == "triplane" else ""
    field = generator.field
    facts = [
        ("field", f"{config.nerf.field}{planes}"),
        ("parameters of the generator", f"{sum(parameter.numel() for parameter in generator.parameters()):,}"),
        ("codes", f"{field.dim_shape} numbers for shape, {field.dim_appearance} for appearance"),
        ("renders", f"{config.data.imsize} x {config.data.imsize} pixels as trained; any size can be asked for"),
        ("samples per ray", f"{renderer.sampling.total if renderer.sampling else generator.sampling.total}"),
        ("averaged weights", f"decay {config.training.model_average_beta:g}"),
    ]
    if generator.instances is not None:
        facts.insert(3, ("objects known by name", f"{instances}"))
    if renderer.ccsr is not None:
        facts.append(("super-resolution", f"by {renderer.ccsr.scale} (CCSR)"))
    return facts


def _list_training(trained: TrainedGenerator) -> list[tuple[str, str]]:
    training = trained.renderer.config.training
    rows = [
        ("iterations", f"{trained.iteration:,} of {training.max_iterations:,}"),
        ("images per update", f"{training.batch_size}"),
        ("program", f"graf {__version__} made this folder"),
    ]
    names = {"device": "hardware", "precision": "precision", "torch": "torch"}
    rows += [(names.get(name, name), value) for name, value in trained.machine.items()]
    return rows if trained.machine else [*rows, ("hardware", "not recorded by the version that trained")]


def _name_data(config: Config) -> str:
    return "toys drawn by graf" if config.data.type == "synthetic" else Path(config.data.datadir).name


def _describe_data(trained: TrainedGenerator) -> str:
    config, info = trained.renderer.config, trained.dataset_info
    data = config.data
    if data.type == "synthetic":
        made = data.synthetic
        return (
            f"Procedural toys that graf draws itself (`data.type: synthetic`): {made.count} images, objects per class: "
            f"{made.instances}, seed {made.seed}. There are no photographs: where scores speak of them, these "
            "images are meant."
        )
    poses = "known cameras" if info.poses_known else "unknown cameras"
    return (
        f"Photographs with {poses} (`data.type: {data.type}`), in a folder that was called `{_name_data(config)}`. "
        "They are not part of this folder. This card knows nothing of their origin; they may have owners, and licences "
        "of their own."
    )


def _describe_exchange(trained: TrainedGenerator) -> str:
    """A sentence on photographs that were exchanged while the run went on; nothing where they were not."""
    if not trained.photographs.get("exchanged"):
        return ""
    return (
        " The run went on with other photographs than it began with, so training may have seen some of its validation "
        "and test photographs."
    )


def _describe_tuning(trained: TrainedGenerator) -> str:
    """A sentence on the photograph that the weights were tuned to; nothing where they were not."""
    if not trained.tuned:
        return ""
    return (
        f" After training the weights were tuned to one photograph (`graf invert --tune`), called "
        f"`{trained.tuned.get('photograph')}`, of whose origin this card knows nothing either."
    )
