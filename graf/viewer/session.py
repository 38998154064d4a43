"""What one client has chosen: the object, how it is shown, and the keyframes of its camera path.

Each client has its own; nothing here knows of a browser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from graf.base.errors import UserError
from graf.evaluation.camera_paths import CameraPath, Keyframe
from graf.evaluation.renderer import Renderer
from graf.viewer.drawing import AS_TRAINED, BACKGROUNDS, MODES, Look
from graf.viewer.viewpoints import Viewpoint

#: how far a step leads away from a code: a share of a new one, so that codes stay distributed as they were
STEP_SHARE = 0.35
#: the parts of a code that can be changed by themselves
PARTS = ("shape", "appearance")
MAX_SEED = 2**31 - 1
#: what stands in the place of an instance's name while a drawn object is shown
DRAWN = "drawn"


@dataclass
class Session:
    """The choices of one client of a renderer.

    instances: names of the objects that the run knows, class/name; look: what is seen; seed: of what is drawn;
    instance: the known object that was chosen, DRAWN where none is; first: the code that was chosen (dim_z,); other:
    that of `other_seed`, towards which `share` in [0, 1] leads; keyframes: of its path.
    """

    renderer: Renderer
    instances: Sequence[str] = ()
    seed: int = 0
    share: float = 0.0
    keyframes: list[Keyframe] = field(default_factory=list)
    drawn: int = field(default=0, init=False)  # codes that were drawn besides the seed's own
    instance: str = field(default=DRAWN, init=False)
    other_seed: int = field(init=False)
    look: Look = field(init=False)
    first: Tensor = field(init=False)
    other: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.other_seed = (self.seed + 1) % (MAX_SEED + 1)
        self.first, self.other = (self.renderer.codes(seed, range(1))[0] for seed in (self.seed, self.other_seed))
        self.look = Look(self.renderer.classes[0], self.first)

    # ------------------------------------------------------------------------------------------------ the object

    def choose_class(self, name: str) -> None:
        """Show the same code as another class. Raises UserError for an unknown one."""
        self.look = replace(self.look, class_name=self.renderer.classes[self.renderer.class_index(name)])

    def choose_seed(self, seed: int) -> None:
        """Show the object that a seed names."""
        self.seed, self.drawn, self.instance = seed, 0, DRAWN
        self._show(self.renderer.codes(seed, range(1))[0])

    def choose_other(self, seed: int) -> None:
        """Interpolate towards the object that another seed names."""
        self.other_seed, self.other = seed, self.renderer.codes(seed, range(1))[0]
        self._show(self.first)

    def choose_instance(self, name: str) -> None:
        """Show an object that training knows, as its class, or DRAWN: the seed's. Raises UserError for another name."""
        if name == DRAWN:
            self.choose_seed(self.seed)
            return
        if name not in self.known_instances():
            raise UserError(f"instance {name!r}: expected one of {', '.join(self.known_instances()) or 'none'}")
        class_name = name.partition("/")[0]
        if class_name in self.renderer.classes:
            self.choose_class(class_name)
        self.instance = name
        self._show(self._learned_code())

    def known_instances(self) -> list[str]:
        """The names that `choose_instance` takes, besides DRAWN."""
        return list(self.instances) if self.renderer.generator.instances is not None else []

    def draw_part(self, part: str, step: bool = False) -> None:
        """Another shape or appearance, out of PARTS: a new one, or with `step` one nearby."""
        self.drawn, self.instance = self.drawn + 1, DRAWN
        new = self.renderer.codes(self.seed, range(self.drawn, self.drawn + 1))[0]
        if step:  # variances add up to what they were
            new = (1 - STEP_SHARE**2) ** 0.5 * self.first + STEP_SHARE * new
            if self.renderer.uniform_z:
                new = new.clamp(-1, 1)
        chosen = torch.arange(len(new)) < self.renderer.generator.field.dim_shape
        self._show(torch.where(chosen if part == "shape" else ~chosen, new, self.first))

    def interpolate(self, share: float) -> None:
        """Show what lies at `share` in [0, 1] of the straight line from the object to the second one."""
        self.share = share
        self._show(self.first)

    def _learned_code(self) -> Tensor:
        """The code (dim_z,) of the known object that is shown."""
        return self.renderer.instance_codes([list(self.instances).index(self.instance)])[0]

    def _show(self, first: Tensor) -> None:
        self.first = first
        self.look = replace(self.look, z=first + self.share * (self.other - first))

    # ------------------------------------------------------------------------------------------------ how it is shown

    def modes(self) -> list[str]:
        """The modes that this run has."""
        return [mode for mode in MODES if mode != "super-resolved" or self.renderer.ccsr is not None]

    def choose_mode(self, mode: str) -> None:
        """Show colour, depth ... Raises UserError for a mode that this run does not have."""
        if mode not in self.modes():
            raise UserError(f"mode {mode!r}: expected one of {', '.join(self.modes())}")
        self.look = replace(self.look, mode=mode)

    def choose_samples(self, num_samples: int) -> None:
        """So many samples per ray, besides importance samples."""
        self.look = replace(self.look, num_samples=num_samples)

    def choose_background(self, background: str) -> None:
        """Another colour behind the object. Raises UserError for an unknown one."""
        if background not in (AS_TRAINED, *BACKGROUNDS):
            raise UserError(f"background {background!r}: expected {AS_TRAINED}, {', '.join(BACKGROUNDS)}")
        self.look = replace(self.look, background=background)

    @property
    def num_samples(self) -> int:
        """Samples per ray, besides importance samples."""
        return self.look.num_samples or (self.renderer.sampling or self.renderer.generator.sampling).coarse

    # ------------------------------------------------------------------------------------------------ the path

    def add_keyframe(self, viewpoint: Viewpoint) -> None:
        """Let the camera path pass here, with the object as it is shown."""
        pose, look = viewpoint.camera_to_world, self.look
        self.keyframes.append(Keyframe(pose, viewpoint.fov, look.class_name, look.z))

    def path(self, seconds: float, closed: bool, aspect: float) -> CameraPath:
        """The path through the keyframes, `seconds` from each to the next. Raises UserError with fewer than two."""
        return CameraPath(tuple(self.keyframes), seconds, closed, aspect)

    # ------------------------------------------------------------------------------------------------ a newer generator

    def take(self, renderer: Renderer) -> None:
        """Go on with newer weights of the same run: choices stay; a known object has the code that it has by now."""
        self.renderer = renderer
        if self.instance != DRAWN:
            self._show(self._learned_code())
