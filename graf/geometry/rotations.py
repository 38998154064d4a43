"""Rotations as unit quaternions (w, x, y, z): conversion, and interpolation along great arcs and smooth curves.

q and -q are the same rotation. Matrices act on columns, as those of camera poses do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rotation_from_quaternion(quaternions: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4), of any length but zero."""
    w, x, y, z = functional.normalize(quaternions, dim=-1).unbind(-1)
    rows = (
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], dim=-1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], dim=-1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], dim=-1),
    )
    return torch.stack(rows, dim=-2)


def quaternion_from_rotation(rotations: Tensor) -> Tensor:
    """Unit quaternions (..., 4) with w >= 0 of rotation matrices (..., 3, 3).

    Each of the four numbers can be found from the others; the largest one is, which loses no digits anywhere.
    """
    xx, yy, zz = rotations[..., 0, 0], rotations[..., 1, 1], rotations[..., 2, 2]
    squares = torch.stack([1 + xx + yy + zz, 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz], dim=-1)
    wx = rotations[..., 2, 1] - rotations[..., 1, 2]
    wy = rotations[..., 0, 2] - rotations[..., 2, 0]
    wz = rotations[..., 1, 0] - rotations[..., 0, 1]
    xy = rotations[..., 1, 0] + rotations[..., 0, 1]
    xz = rotations[..., 0, 2] + rotations[..., 2, 0]
    yz = rotations[..., 2, 1] + rotations[..., 1, 2]
    w2, x2, y2, z2 = squares.unbind(-1)
    # row i is 4 q_i q: proportional to q, and longest where q_i is
    products = torch.stack([w2, wx, wy, wz, wx, x2, xy, xz, wy, xy, y2, yz, wz, xz, yz, z2], dim=-1)
    rows = products.unflatten(-1, (4, 4))
    largest = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    quaternions = functional.normalize(rows.gather(-2, largest)[..., 0, :], dim=-1)
    return torch.where(quaternions[..., :1] < 0, -quaternions, quaternions)


def _arc(start: Tensor, end: Tensor, share: Tensor | float) -> Tensor:
    """The arc between two points of the sphere of quaternions, be it the shorter one of the rotations or not."""
    angle = torch.atan2((end - start).norm(), (end + start).norm()) * 2
    if angle < 1e-6:  # the arc is straight to the last digit, and its sine near zero
        return functional.normalize(start + share * (end - start), dim=0)
    return (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / torch.sin(angle)


def unroll(quaternions: Tensor) -> Tensor:
    """The same rotations (N, 4) with the signs for which each is the nearer one to that before it."""
    signs = torch.where((quaternions[1:] * quaternions[:-1]).sum(-1) < 0, -1.0, 1.0).to(quaternions.dtype)
    return torch.cat([quaternions[:1], torch.cumprod(signs, dim=0)[:, None] * quaternions[1:]])


def squad(before: Tensor, start: Tensor, end: Tensor, after: Tensor, share: float) -> Tensor:
    """The rotation at `share` of the way from start to end on a smooth curve through four unit quaternions (4,).

    Shoemake, "Animating rotation with quaternion calculus" (SIGGRAPH course notes 1987): two arcs, blended by a third.
    The speed of rotation is continuous where equally long pieces meet. Signs as `unroll` gives them.
    """
    bent = _arc(_control(before, start, end), _control(start, end, after), share)
    return _arc(_arc(start, end, share), bent, 2 * share * (1 - share))


def _control(before: Tensor, here: Tensor, after: Tensor) -> Tensor:
    """The control point s_i = q_i exp(-(log(q_i^-1 q_i+1) + log(q_i^-1 q_i-1)) / 4)."""
    inverse = _conjugate(here)
    turn = _logarithm(_multiply(inverse, after)) + _logarithm(_multiply(inverse, before))
    return _multiply(here, _exponential(-turn / 4))


def _conjugate(quaternion: Tensor) -> Tensor:
    return torch.cat([quaternion[:1], -quaternion[1:]])


def _multiply(first: Tensor, second: Tensor) -> Tensor:
    w = first[0] * second[0] - (first[1:] * second[1:]).sum()
    vector = first[0] * second[1:] + second[0] * first[1:] + torch.linalg.cross(first[1:], second[1:])
    return torch.cat([w[None], vector])


def _logarithm(quaternion: Tensor) -> Tensor:
    """Half the rotation vector (3,) of a unit quaternion."""
    length = quaternion[1:].norm()
    return quaternion[1:] * (torch.atan2(length, quaternion[0]) / length.clamp(min=1e-12))


def _exponential(half_turn: Tensor) -> Tensor:
    length = half_turn.norm()
    return torch.cat([torch.cos(length)[None], half_turn * (torch.sin(length) / length.clamp(min=1e-12))])
