"""Opens a run for the viewer: its exhibit, and its newer checkpoints while it is trained.

It reads no command line.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from graf.app import builders
from graf.app.loading import TrainedGenerator, open_checkpoint
from graf.app.run_arguments import OpenedRun, open_run
from graf.app.runs import WEIGHT_SUFFIXES, RunFolder, newest_run
from graf.base.errors import UserError
from graf.config import Config
from graf.data.datasets import PhotoDataset
from graf.data.errors import DataError
from graf.evaluation.pictures import Picture, to_uint8
from graf.runtime.logs import logger, setup_console
from graf.viewer.exhibit import Exhibit, Photograph
from graf.viewer.follow import EVERY, Follower
from graf.viewer.server import LOCAL_HOSTS, ViewerServer, import_viser

#: training cameras of a class that are shown, evenly chosen, and the side of their thumbnails in pixels
CAMERAS_PER_CLASS, THUMBNAIL = 24, 64
#: a viewer of a run in training takes what training leaves of the processor
NICENESS = 10
MAX_HEIGHT = 2048


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
    resolution: int = 128

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 1, 65535),
            ("height", 16, MAX_HEIGHT),
            ("seed", 0, 2**31 - 1),
            ("resolution", 16, 512),
            ("truncation", 0, 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name}={value}: expected {low} to {high}")
        if self.follow and self.html is not None:
            raise UserError("--follow and --html: a page does not follow a run; choose one of the two")
        if self.follow and self.run is not None and Path(self.run).suffix in WEIGHT_SUFFIXES:
            raise UserError(f"--follow {self.run}: expected the folder of a run, a checkpoint does not change")


def view_run(options: ViewOptions) -> int:
    """Serve a run until Ctrl-C; returns the exit code."""
    server, follower = start_viewer(options)
    local = options.host in LOCAL_HOSTS
    logger.info("open http://%s:%d in a browser; Ctrl-C ends", "localhost" if local else options.host, server.port)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return 0
    finally:
        if follower is not None:
            follower.stop()
        server.stop()
    return 0


def start_viewer(options: ViewOptions) -> tuple[ViewerServer, Follower | None]:
    """The running page of a run and, with --follow, what brings it new checkpoints; both want to be stopped."""
    setup_console()
    import_viser()  # what is missing is told before a run is opened
    if options.host not in LOCAL_HOSTS:
        logger.warning(
            "--host %s: whoever reaches this address can use the viewer: there is no password, and nothing is "
            "encrypted; without --host only this machine can, and `ssh -L 8080:localhost:8080` brings it to another",
            options.host,
        )
    if options.follow and hasattr(os, "nice"):
        os.nice(NICENESS)
    opened = open_followed(options) if options.follow else _open(options, options.run)
    server = ViewerServer(build_exhibit(opened.trained, opened.folder, options), options.host, options.port)
    if not options.follow:
        return server, None
    follower = Follower(opened.folder.saved, lambda: _take_newest(server, opened, options))
    follower.start()
    return server, follower


def open_followed(options: ViewOptions) -> OpenedRun:
    """The newest checkpoint of a run in training, for the first of which it waits."""
    folder = newest_run(Path("results")) if options.run is None else RunFolder(Path(options.run))
    if not folder.path.is_dir():
        raise UserError(f"{folder.path}: no run is there; start one with graf train, then follow it")
    if not folder.saved():
        logger.info("%s has no checkpoint yet: waiting for the first one (training.save_every)", folder.path)
    while not folder.saved():
        time.sleep(EVERY)
    return _open(options, str(folder.newest_first()[0]))


def _open(options: ViewOptions, run: str | None) -> OpenedRun:
    return open_run(run, options.device, options.truncation, options.trust)


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
    config = renderer.config
    if options.datadir is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"datadir": options.datadir})})
    return Exhibit(
        renderer,
        describe(trained, folder),
        info.instance_names,
        find_photographs(config, info),
        options.height or min(4 * renderer.resolution, MAX_HEIGHT),
    )


def find_photographs(config: Config, info: builders.DatasetInfo) -> tuple[Photograph, ...]:
    """Training cameras with their photographs or, where these are not at hand, the labels' cameras alone."""
    try:
        photographs = _open_if_there(config)
    except (DataError, OSError) as error:
        logger.info("training cameras are shown without photographs, which cannot be read: %s", error)
        photographs = None
    if photographs is None or not photographs.poses_known:
        return _cameras_of_labels(config, info)
    views = builders.build_pose_sampler(config, photographs, builders.build_cameras(config, info)).views
    found = []
    for class_idx, name in enumerate(photographs.class_names):
        members = torch.nonzero(photographs.labels[:, 0] == class_idx)[:, 0].tolist()
        members.sort(key=lambda index: photographs.labels[index, 1:3].tolist())
        step = max(1.0, len(members) / CAMERAS_PER_CLASS)
        for place in range(min(CAMERAS_PER_CLASS, len(members))):
            index = members[int(place * step)]
            found.append(Photograph(views.poses[index], name, _shrink(to_uint8(photographs[index][0]))))
    return tuple(found)


def _open_if_there(config: Config) -> PhotoDataset | None:
    """The photographs, but None where opening them would have to draw the synthetic toys first."""
    root = Path(config.data.datadir).expanduser()
    if config.data.type == "synthetic" and not any(root.glob("synthetic_*")):
        logger.info("%s: the synthetic photographs are not there: training cameras are shown without them", root)
        return None
    return builders.open_photographs(config)


def _cameras_of_labels(config: Config, info: builders.DatasetInfo) -> tuple[Photograph, ...]:
    """Where labels place cameras: eight azimuths at each height, the same for every class."""
    if not info.poses_known:
        return ()
    cameras = builders.build_cameras(config, info)
    labels = torch.tensor([(0, height, angle, -1) for height in range(len(info.v_list)) for angle in range(0, 360, 45)])
    poses = cameras.views_of_labels(labels).poses
    return tuple(Photograph(pose, name) for name in info.class_names for pose in poses)


def _shrink(image: torch.Tensor) -> Picture:
    """A thumbnail of a photograph (3, H, W), uint8."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    return np.asarray(picture.resize((THUMBNAIL, THUMBNAIL)))
