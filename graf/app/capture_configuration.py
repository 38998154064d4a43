"""capture.yaml beside captured photographs: a valid --config that trains them, and what a later capture reads of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graf.app.runs import run_name
from graf.base.errors import UserError
from graf.base.files import write_atomically
from graf.config.loading import ConfigError, read_yaml

INHERITED = "coil100.yaml"  # how real turntables are trained
POSED_INHERITED = "lego128.yaml"  # and photographs with true poses
HELDOUT_EVERY = 6  # data.heldout_every of both
V_LIST_LINE = re.compile(r"^(\s*v_list:\s*)\[[^\]]*\]", re.MULTILINE)


@dataclass(frozen=True)
class SetCamera:
    """The cameras of a set: distance in units of the unit sphere, field of view in degrees, and its heights v.

    masked: whether pictures are transparent around the objects; of a set that is there its pictures tell, and
    data.white_bkgd, which a person may have changed, only without any.
    """

    radius: float
    fov: float
    v_list: Sequence[float]
    masked: bool


def read_set_camera(file: Path) -> SetCamera | None:
    """What capture.yaml says of the cameras; None where there is none yet. Raises ConfigError, UserError."""
    if not file.is_file():
        return None
    data = read_yaml(file).get("data", {})
    try:
        v_list = [float(v) for v in data["v_list"]]
        return SetCamera(float(data["radius"]), float(data["fov"]), v_list, bool(data.get("white_bkgd", False)))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{file}: data.radius, data.fov and data.v_list are needed to add to this set ({error!r}); put them back"
        ) from error


def compose_set_configuration(file: Path, camera: SetCamera, *, many_objects: bool) -> str:
    """What capture.yaml is to hold: what it does where it is there and may have been edited, but for its v_list.

    many_objects: those of a class are told apart by name. Raises UserError.
    """
    v_list = "[" + ", ".join(f"{v:g}" for v in camera.v_list) + "]"
    if not file.is_file():
        return _compose(file.parent, camera, v_list, many_objects)
    text = file.read_bytes().decode("utf-8")
    if read_yaml(file)["data"]["v_list"] == list(camera.v_list):
        return text
    changed, count = V_LIST_LINE.subn(rf"\g<1>{v_list}", text)
    if count != 1:
        raise UserError(f"{file}: data.v_list should be {v_list} now, but stands in no single line; write it there")
    return changed


def write_posed_configuration(file: Path, keys: Mapping[str, float], *, masked: bool, side: int, count: int) -> None:
    """Write capture.yaml for `count` photographs with true poses; `keys` of the section data, such as data.radius.

    Of few the first and the last are held out, since every sixth would leave none for validation.
    """
    folder, are_few = file.parent, count <= HELDOUT_EVERY
    lines = [
        "# Written by graf capture: a --config for graf doctor and graf train.",
        f"inherit_from: {POSED_INHERITED if side >= 128 else INHERITED}",
        f"expname: {_quote(run_name(folder.resolve().name))}",
        "data:",
        "  type: transforms",
        f"  datadir: {_quote(folder.as_posix())}",
        f"  white_bkgd: {'true' if masked else 'false'}",
        "  v_list: null             # heights follow from the poses",
        "  refine_cameras: false",
        *([f"  heldout_every: {count - 1}         # one for test, one for validation"] if are_few else []),
        *(f"  {key.removeprefix('data.')}: {value:g}" for key, value in keys.items()),
        "nerf:",
        "  bounding_radius: 1",
        f"  background: {'white' if masked else 'learned'}",
        *(["training:", "  drop_last: false         # there may be no whole batch"] if are_few else []),
        "",
    ]
    write_atomically(file, "\n".join(lines))


def _compose(folder: Path, camera: SetCamera, v_list: str, many_objects: bool) -> str:
    lines = [
        "# Written by graf capture: a --config for graf doctor and graf train. Later captures change v_list only.",
        f"inherit_from: {INHERITED}",
        f"expname: {_quote(run_name(folder.resolve().name))}",
        "data:",
        "  type: turntable",
        f"  datadir: {_quote(folder.as_posix())}",
        f"  white_bkgd: {'true' if camera.masked else 'false'}",
        f"  radius: {camera.radius:.3f}",
        f"  near: {camera.radius - 1:.3f}",
        f"  far: {camera.radius + 1:.3f}",
        f"  fov: {camera.fov:.2f}             # across a picture",
        f"  v_list: {v_list}",
        "  refine_cameras: true     # elevation and field of view are corrected by training",
    ]
    nerf = ["  background: white"] if camera.masked else []
    if many_objects:
        nerf += ["  planes: synthesis        # several objects of a class", "  colour_components: 9"]
        lines += ["z_dist:", "  dim: 16", "  dim_appearance: 8", "discriminator:", "  augment: {colour: 0}"]
        lines += ["training:", "  reg_param: 0.1", "  instance_prior: 0.02"]
    return "\n".join([*lines, *(["nerf:", *nerf] if nerf else []), ""])


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def next_steps(config_file: Path) -> list[str]:
    """The commands that look at a captured set and train it."""
    name = str(config_file) if re.fullmatch(r"[\w./-]+", str(config_file)) else f'"{config_file}"'
    return [f"look at it:  graf doctor --config {name}", f"train it:    graf train --config {name} --use_amp"]
