"""Cameras that fit the photographs of a turntable, learned beside the object from the photometric gradient.

Labels tell the azimuth of a photograph. Its elevation and the field of view are estimates of whoever wrote the
configuration, and a set that crops and scales each photograph to its object (COIL-100: to full height) frames every
view differently. What is wrong with them is learned, as BARF (Lin et al., ICCV 2021) learns poses:

* a factor on the focal length, one for the set,
* an angle by which the cameras of each height stand higher,
* for each class a scale and a shift of its photographs: what a camera sees at x, a photograph shows at scale x + shift.
  Both are Fourier series of the azimuth, smooth enough to hold at angles that were kept out of training.

Two rules say which view gets what. The lens is every camera's. Elevation and framing are the photographs': views that
are named by labels (`Views.photographed`), in training, validation, scores and the held-out measurement. A camera that
someone places (grids, videos, `Renderer.sample` and `render`) stands where it is asked to, and does not zoom.

Some of it cannot be told from another object: a larger one, for example, from a larger scale. The penalty, which draws
every number towards the given cameras, decides; higher harmonics have to earn more. One render serves all terms of the
generator's loss, so all of them move the cameras; on COIL-100 the photometric gradient is ten times the next one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graf.geometry.cameras import raise_cameras
from graf.geometry.rays import Patches
from graf.geometry.views import Views

#: terms of the Fourier series besides the constant one: cos k t and sin k t for k = 1 .. NUM_HARMONICS
NUM_HARMONICS = 3
#: Numbers are stored at this multiple of their value: a step of Adam, which is as long as the learning rate, then moves
#: them a third as far as weights, 0.06 degrees or 0.1% of scale at 3e-3; the trainer moves them in every fourth step.
STORED_FACTOR = 3.0
#: weight of the penalty in the generator's loss: at 1 it hides most of the scale that COIL-100's photographs differ by
PENALTY = 0.1


class CameraRefinement(nn.Module):
    """Corrections of the cameras of photographs; new ones change nothing.

    lens: log of the factor on the focal length, (); elevation (num_heights,): radians; framing (num_classes, 3,
    1 + 2 NUM_HARMONICS): Fourier coefficients of log-scale, shift to the right and shift downwards, in units of the
    image plane, in the order 1, cos t, cos 2 t, ..., sin t, sin 2 t, ... All are stored at STORED_FACTOR times that.
    """

    def __init__(self, num_classes: int, num_heights: int) -> None:
        super().__init__()
        self.lens = nn.Parameter(torch.zeros(()))
        self.elevation = nn.Parameter(torch.zeros(num_heights))
        self.framing = nn.Parameter(torch.zeros(num_classes, 3, 1 + 2 * NUM_HARMONICS))

    def forward(self, views: Views, patches: Patches) -> tuple[Tensor, Patches]:
        """Poses (B, 4, 4), and the patches of their image planes that the patches of B views show; differentiable."""
        factor = torch.exp(self.lens / STORED_FACTOR)
        if not views.photographed:
            return views.poses, Patches(patches.scale / factor, patches.centre / factor)
        log_scale, *shift = self.framing_at(views.class_idx, views.u).unbind(1)
        factor = factor * torch.exp(log_scale)
        centre = (patches.centre - torch.stack(shift, dim=1)) / factor[:, None]
        elevation = self.elevation[views.labels[:, 1]] / STORED_FACTOR
        return raise_cameras(views.poses, elevation), Patches(patches.scale / factor, centre)

    def framing_at(self, class_idx: Tensor, u: Tensor) -> Tensor:
        """Log-scale and shift (B, 3) of photographs of classes (B,) from azimuths u (B,)."""
        turns = 2 * math.pi * u[:, None] * torch.arange(1, NUM_HARMONICS + 1, device=u.device)
        waves = torch.cat([torch.ones_like(u)[:, None], torch.cos(turns), torch.sin(turns)], dim=1)
        return (self.framing[class_idx] * waves[:, None]).sum(-1) / STORED_FACTOR

    def penalty(self) -> Tensor:
        """PENALTY times the sum of squares of all numbers, those of harmonic k weighted by 1 + k^2; a scalar."""
        squares = torch.arange(NUM_HARMONICS + 1, device=self.framing.device).square()
        weights = 1 + torch.cat([squares, squares[1:]])
        total = self.lens.square() + self.elevation.square().sum() + (weights * self.framing.square()).sum()
        return PENALTY * total / STORED_FACTOR**2
