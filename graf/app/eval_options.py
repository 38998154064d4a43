"""What an evaluation can be asked for, with the defaults; it imports no torch, so that --help answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from graf.config import ConfigError

#: what can be asked for, in the order in which it is done -> (its function, what it makes)
ACTIONS = {
    "grid": ("graf.app.eval_tasks:write_grids", "grid of views per class: rgb, depth, opacity"),
    "rotation": ("graf.app.eval_tasks:write_rotation", "video of a full turn"),
    "elevation": ("graf.app.eval_tasks:write_elevation", "video from the lowest to the highest camera and back"),
    "shape_appearance": ("graf.app.eval_tasks:write_shape_appearance", "grid of shape codes x appearance codes"),
    "interpolate": ("graf.app.eval_tasks:write_interpolation", "video from object to object"),
    "fid_kid": ("graf.app.eval_tasks:write_fid_kid", "FID and KID against the photographs, as JSON and CSV"),
    "consistency": ("graf.app.eval_tasks:write_consistency", "how well super-resolved views agree, as JSON"),
    "path": ("graf.app.eval_tasks:write_camera_path", "video along a camera path that graf view saved"),
    "heldout": ("graf.app.eval_tasks:write_heldout", "PSNR and KID at the labels held out of training"),
}


@dataclass(frozen=True)
class EvalOptions:
    """The choices of one evaluation, named as on the command line. Raises ConfigError for values out of range.

    run: the folder that results go to, by default that of the checkpoint; checkpoint: the file, by default the run's
    best one; without either the newest run of `outdir`. trust: take a file that lies in no run folder and that an old
    torch cannot read safely. actions: keys of ACTIONS; path: file of a camera path, which the action of that name
    needs. heights: values v in [0, 1]; elevations: the same in degrees, one of the two at most.
    """

    run: str | None = None
    outdir: str = "results"
    checkpoint: str | None = None
    trust: bool = False
    actions: Sequence[str] = ("grid", "rotation")
    classes: Sequence[str] | None = None
    seed: int | None = None
    objects: int = 1
    truncation: float = 1.0
    sr: bool = False
    views: int = 8
    heights: Sequence[float] | None = None
    elevations: Sequence[float] | None = None
    frames: int = 72
    fps: int = 24
    num_images: int | None = None
    resolution: int | None = None
    device: str = "auto"
    chunk: int | None = None
    datadir: str | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("views", 1, 360),
            ("frames", 2, 100_000),
            ("seed", 0, 2**31),
            ("objects", 1, 10_000),
            ("truncation", 0, 1),
            ("resolution", 8, 8192),
            ("fps", 1, 240),
            ("num_images", 2, 10**7),
            ("chunk", 1, inf),
            ("heights", 0, 1),
            ("elevations", -90, 90),
        ):
            given = getattr(self, name)
            for value in given if isinstance(given, Sequence) else [] if given is None else [given]:
                if not low <= value <= high:
                    allowed = f"at least {low}" if high == inf else f"{low} to {high}"
                    raise ConfigError(f"--{name}={value}: expected {allowed}")
        whole = " and ".join(f"--{name}" for name in ("fid_kid", "heldout") if name in self.actions)
        if self.classes is not None and whole:
            raise ConfigError(f"--classes: expected none with {whole}, which measures all classes; start it without")
