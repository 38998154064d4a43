"""Quaternions against matrices, closed forms and finite differences."""

import math

import torch
from torch.nn import functional
from torch.testing import assert_close

from graf.geometry.rotations import quaternion_from_rotation, rotation_from_quaternion, squad, unroll


def random_quaternions(count: int) -> torch.Tensor:
    quaternions = functional.normalize(torch.randn(count, 4, dtype=torch.float64), dim=-1)
    return torch.where(quaternions[:, :1] < 0, -quaternions, quaternions)


def about_z(degrees: float) -> torch.Tensor:
    half = math.radians(degrees) / 2
    return torch.tensor([math.cos(half), 0, 0, math.sin(half)], dtype=torch.float64)


def test_a_quaternion_turns_a_vector_as_the_matrix_exponential_does():
    axis = functional.normalize(torch.randn(3, dtype=torch.float64), dim=0)
    for angle in (0.0, 0.3, 2.0, math.pi, 5.0):
        x, y, z = angle * axis
        skew = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
        quaternion = torch.cat([torch.tensor([math.cos(angle / 2)]).double(), math.sin(angle / 2) * axis])
        assert_close(rotation_from_quaternion(quaternion), torch.linalg.matrix_exp(skew))


def test_matrices_become_quaternions_and_back_wherever_the_largest_number_is():
    quaternions = torch.cat([random_quaternions(500), torch.eye(4, dtype=torch.float64), about_z(179.999)[None]])
    assert_close(quaternion_from_rotation(rotation_from_quaternion(quaternions)), quaternions, atol=1e-12, rtol=0)


def test_unrolled_quaternions_are_the_same_rotations_and_neighbours():
    quaternions = torch.stack([about_z(degrees) for degrees in range(0, 720, 50)])
    signs = torch.where(torch.rand(len(quaternions), 1) < 0.5, -1.0, 1.0)
    unrolled = unroll(signs * quaternions)
    assert_close(rotation_from_quaternion(unrolled), rotation_from_quaternion(quaternions))
    assert ((unrolled[1:] * unrolled[:-1]).sum(-1) > 0).all()


def test_squad_passes_through_its_rotations_with_one_speed_on_both_sides():
    corners = unroll(random_quaternions(5))
    first = lambda share: squad(*corners[:4], share)  # noqa: E731
    second = lambda share: squad(*corners[1:], share)  # noqa: E731
    assert_close(first(0.0), corners[1])
    assert_close(first(1.0), corners[2])
    small = 1e-5
    arriving, leaving = (first(1.0) - first(1 - small)) / small, (second(small) - second(0.0)) / small
    assert_close(arriving, leaving, rtol=1e-3, atol=1e-3)


def test_squad_of_an_even_turn_is_an_even_turn():
    corners = [about_z(degrees) for degrees in (0, 60, 120, 180)]
    for share in (0.1, 0.5, 0.8):
        assert_close(squad(*corners, share), about_z(60 + 60 * share))
