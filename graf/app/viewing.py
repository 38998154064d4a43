"""Opens a run for the viewer: its exhibit, and its newer checkpoints while it is trained.

It reads no command line.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from graf.app import builders
from graf.app.loading import TrainedGenerator, open_checkpoint
from graf.app.run_arguments import OpenedRun, open_first, open_run
from graf.app.runs import WEIGHT_SUFFIXES, RunFolder, newest_run
from graf.base.errors import UserError
from graf.config import Config
from graf.data.datasets import PhotoDataset
from graf.evaluation.pictures import Picture, to_uint8
from graf.evaluation.renderer import Renderer
from graf.geometry.rays import Patches
from graf.geometry.views import Views
from graf.runtime.checkpoint import CheckpointError
from graf.runtime.interrupt import Stopped, StopRequest
from graf.runtime.logs import logger, setup_console
from graf.runtime.priority import give_way
from graf.viewer.exhibit import Exhibit, Photograph
from graf.viewer.follow import EVERY, Follower, Signature, sign
from graf.viewer.listening import LOCAL_HOSTS
from graf.viewer.server import ViewerServer, import_viser
from graf.viewer.session import MAX_SEED

#: training cameras of a class that are shown, evenly chosen, and the side of their thumbnails in pixels
CAMERAS_PER_CLASS, THUMBNAIL = 24, 64
MAX_HEIGHT = 2048
#: seconds after which a signal is noticed
STOP_WITHIN = 0.2
#: options of the viewer that mean nothing to a page which is written
SERVED_ONLY = ("follow", "host", "port", "height", "datadir")


@dataclass(frozen=True)
class ViewOptions:
    """What `graf view` is asked for, named as on the command line. Raises UserError for values out of range."""

    run: str | None = None
    truncation: float = 1.0
    device: str = "auto"
    trust: bool = False
    follow: bool = False
    host: str = "127.0.0.1"
    port: int = 8080
    height: int | None = None
    datadir: str | None = None
    html: str | None = None
    seed: int = 0
    resolution: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 1, 65535),
            ("height", 16, MAX_HEIGHT),
            ("seed", 0, MAX_SEED),
            ("resolution", 16, 512),
            ("truncation", 0, 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name}={value}: expected {low} to {high}")
        defaults = {each.name: each.default for each in fields(self)}
        served = [name for name in SERVED_ONLY if getattr(self, name) != defaults[name]]
        if self.html is not None and served:
            raise UserError(f"--{served[0]} and --html: a page that is written is not served; choose one of the two")
        if self.html is None and self.resolution is not None:
            raise UserError("--resolution: is that of the meshes of --html; rows of pictures are --height")
        if self.follow and self.run is not None and Path(self.run).suffix in WEIGHT_SUFFIXES:
            raise UserError(f"--follow {self.run}: expected the folder of a run, a checkpoint does not change")


def view_run(options: ViewOptions) -> int:
    """Serve a run until it is asked to stop, by Ctrl-C or a signal; returns the exit code."""
    # signals are heard before anything is opened: one that ended the program at once would leave its session giving way
    with (
        StopRequest(lambda: "closing the viewer") as request,
        suppress(Stopped),
        running_viewer(options, request) as server,
    ):
        shown = "localhost" if options.host in LOCAL_HOSTS else options.host
        logger.info("open http://%s:%d in a browser; Ctrl-C ends", shown, server.port)
        while request.reason is None:
            time.sleep(STOP_WITHIN)
    return 0


@contextmanager
def running_viewer(options: ViewOptions, request: StopRequest) -> Iterator[ViewerServer]:
    """The page of a run and, with --follow, what brings it new checkpoints; both end with the block. Raises Stopped."""
    setup_console()
    import_viser()  # what is missing is told before a run is opened
    with ExitStack() as stack:
        if options.follow:
            stack.enter_context(give_way())
            opened, seen = open_followed(options, request)
        else:
            opened = open_run(options.run, options.device, options.truncation, options.trust)
            seen = sign([])
        request.leave_if_asked()
        server = ViewerServer(build_exhibit(opened.trained, opened.folder, options), options.host, options.port)
        stack.callback(server.stop)
        if options.host not in LOCAL_HOSTS:
            logger.warning(
                "--host %s: whoever reaches this address can use the viewer: there is no password, and nothing is "
                "encrypted; without --host only this machine can, and `ssh -L %d:localhost:%d` brings it to another",
                options.host,
                server.port,
                server.port,
            )
        if options.follow:
            follower = Follower(opened.folder.saved, seen, lambda: _take_newest(server, opened, options))
            follower.start()
            stack.callback(follower.stop)
        yield server


def open_followed(options: ViewOptions, request: StopRequest) -> tuple[OpenedRun, Signature]:
    """The newest checkpoint of a run in training that can be read, for which it waits, and what was there before.

    On the CPU, unless --device names another: a GPU knows no niceness, and its memory is what training counts on.
    """
    folder = newest_run(Path("results")) if options.run is None else RunFolder(Path(options.run))
    if not folder.config_file.is_file() and not folder.saved():
        raise UserError(f"{folder.path}: no run is there (no config.yaml); start one with graf train, then follow it")
    if not folder.saved():
        logger.info("%s has no checkpoint yet: waiting for the first one (training.save_every)", folder.path)
    device, seen = "cpu" if options.device == "auto" else options.device, sign([])
    while True:
        files = folder.newest_first()
        found = sign(files)
        if found - seen:
            try:
                return open_first(folder, files, device, options.truncation), found
            except CheckpointError as error:
                logger.warning("%s; waiting for the next one", error)
        seen = found
        request.leave_if_asked()
        time.sleep(EVERY)


def _take_newest(server: ViewerServer, opened: OpenedRun, options: ViewOptions) -> None:
    """Show the newest checkpoint instead of the one before it."""
    device = opened.renderer.device
    trained = open_checkpoint(opened.folder.newest_first(), device)
    server.take(replace(trained.renderer, truncation=options.truncation), describe(trained, opened.folder))
    logger.info("%s, iteration %d", trained.file, trained.iteration)


def describe(trained: TrainedGenerator, folder: RunFolder) -> str:
    """The page's title."""
    return f"{folder.path.resolve().name}, iteration {trained.iteration}"


def build_exhibit(trained: TrainedGenerator, folder: RunFolder, options: ViewOptions) -> Exhibit:
    """A trained generator with what is known of its photographs."""
    renderer, info = trained.renderer, trained.dataset_info
    return Exhibit(
        renderer,
        describe(trained, folder),
        info.instance_names,
        find_photographs(renderer, info, options.datadir),
        options.height or min(4 * renderer.resolution, MAX_HEIGHT),
        options.seed,
    )


def find_photographs(
    renderer: Renderer, info: builders.DatasetInfo, datadir: str | None = None
) -> tuple[Photograph, ...]:
    """Training cameras with their photographs or, where these are not at hand, the labels' cameras alone.

    datadir: where the photographs are, if not in the run's data.datadir.
    """
    config = renderer.config
    # the folder may have got other classes since; that of posed photographs is named after it, and may have moved
    known = {} if config.data.type == "transforms" else {"classes": info.class_names}
    data = config.data.model_copy(update=known if datadir is None else known | {"datadir": datadir})
    config = config.model_copy(update={"data": data})
    try:
        photographs = _open_if_there(config)
    except (UserError, OSError) as error:
        logger.info("training cameras are shown without photographs, which cannot be used: %s", error)
        photographs = None
    if photographs is None or not photographs.poses_known:
        return _cameras_of_labels(renderer, info)
    poses = _find_poses(renderer, builders.build_pose_sampler(config, photographs, renderer.cameras).views)
    found = []
    for class_idx, name in enumerate(info.class_names):
        members = torch.nonzero(photographs.labels[:, 0] == class_idx)[:, 0].tolist()
        members.sort(key=lambda index: photographs.labels[index, 1:3].tolist())
        step = max(1.0, len(members) / CAMERAS_PER_CLASS)
        for place in range(min(CAMERAS_PER_CLASS, len(members))):
            index = members[int(place * step)]
            found.append(Photograph(poses[index], name, _shrink(to_uint8(photographs[index][0]))))
    return tuple(found)


def _open_if_there(config: Config) -> PhotoDataset | None:
    """The photographs, but None where opening them would have to draw the synthetic toys first."""
    if not builders.has_photographs(config):
        root = Path(config.data.datadir).expanduser()
        logger.info("%s: the synthetic photographs are not there: training cameras are shown without them", root)
        return None
    return builders.open_photographs(config)


def _cameras_of_labels(renderer: Renderer, info: builders.DatasetInfo) -> tuple[Photograph, ...]:
    """Where labels place cameras: eight azimuths at each height, the same for every class."""
    if not info.poses_known:
        return ()
    labels = torch.tensor([(0, height, angle, -1) for height in range(len(info.v_list)) for angle in range(0, 360, 45)])
    poses = _find_poses(renderer, renderer.cameras.views_of_labels(labels))
    return tuple(Photograph(pose, name) for name in info.class_names for pose in poses)


def _find_poses(renderer: Renderer, views: Views) -> Tensor:
    """Where the cameras of photographs stand (B, 4, 4), as training renders them: elevations may have been learned."""
    poses, _ = renderer.generator.aim(views.to(renderer.device), Patches.whole(len(views), renderer.device))
    return poses.cpu()


def _shrink(image: Tensor) -> Picture:
    """A thumbnail of a photograph (3, H, W), uint8."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    return np.asarray(picture.resize((THUMBNAIL, THUMBNAIL)))
