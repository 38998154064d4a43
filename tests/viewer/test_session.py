"""What a client chooses: each choice changes what it names and nothing else."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from graf.base.errors import UserError
from graf.geometry.cameras import pose_from_angles
from graf.viewer.session import DRAWN, MAX_SEED, Session
from graf.viewer.viewpoints import Viewpoint

NAMES = ("car/0", "car/1", "duck/0", "mug/0")
SHAPE = slice(0, 3)
APPEARANCE = slice(3, 5)


@pytest.fixture
def session(renderer) -> Session:
    return Session(renderer, NAMES)


def test_a_seed_names_the_object_that_sample_would_show(session, renderer):
    session.choose_seed(7)
    session.choose_class("duck")
    assert torch.equal(session.look.z, renderer.codes(7, range(1))[0])
    assert session.look.class_name == "duck"


@pytest.mark.parametrize(("part", "changed", "kept"), [("shape", SHAPE, APPEARANCE), ("appearance", APPEARANCE, SHAPE)])
@pytest.mark.parametrize("step", [False, True])
def test_drawing_a_part_of_the_code_leaves_the_other(session, part, changed, kept, step):
    before = session.look.z
    session.draw_part(part, step)
    assert torch.equal(session.look.z[kept], before[kept])
    assert not torch.equal(session.look.z[changed], before[changed])


def test_what_is_drawn_depends_on_the_seed_and_the_number_of_draws_alone(renderer):
    found = []
    for _ in range(2):
        session = Session(renderer)
        session.choose_seed(3)
        session.draw_part("shape")
        session.draw_part("appearance", step=True)
        found.append(session.look.z)
    assert torch.equal(*found)


def test_steps_are_short_and_keep_the_distribution_of_codes(renderer):
    session = Session(renderer)
    lengths, values = [], []
    for _ in range(300):
        before = session.look.z
        session.draw_part("shape", step=True)
        lengths.append((session.look.z - before)[SHAPE].norm())
        values.append(session.look.z[SHAPE])
    random = (renderer.codes(0, range(300)) - renderer.codes(1, range(300)))[:, SHAPE].norm(dim=1).mean()
    assert torch.stack(lengths).mean() < 0.5 * random
    assert torch.cat(values).std() == pytest.approx(1, abs=0.2)


def test_steps_stay_in_the_range_of_uniform_codes(renderer):
    session = Session(replace(renderer, uniform_z=True))
    for _ in range(50):
        session.draw_part("shape", step=True)
        session.draw_part("appearance", step=True)
        assert session.look.z.abs().max() <= 1


def test_interpolation_leads_along_a_straight_line_to_the_second_object(session, renderer):
    session.choose_seed(1)
    session.choose_other(2)
    one, other = renderer.codes(1, range(1))[0], renderer.codes(2, range(1))[0]
    for share in (0.0, 0.25, 1.0):
        session.interpolate(share)
        assert_close(session.look.z, one + share * (other - one))
    session.choose_seed(4)  # the line begins at the new object
    assert_close(session.look.z, other)


def test_the_second_object_is_that_of_the_second_seed_from_the_start(renderer):
    session = Session(renderer, NAMES, seed=4)
    assert session.other_seed == 5
    session.interpolate(1.0)
    assert_close(session.look.z, renderer.codes(5, range(1))[0])
    assert Session(renderer, seed=MAX_SEED).other_seed == 0


def test_a_known_object_brings_its_code_and_its_class(session, renderer):
    session.choose_instance("duck/0")
    assert session.look.class_name == "duck"
    assert_close(session.look.z, renderer.instance_codes([2])[0])
    session.choose_instance(DRAWN)
    assert_close(session.look.z, renderer.codes(0, range(1))[0])


def test_what_is_not_there_is_refused(session, renderer):
    with pytest.raises(UserError, match="class 'boat'"):
        session.choose_class("boat")
    with pytest.raises(UserError, match="instance 'duck/9': expected one of car/0"):
        session.choose_instance("duck/9")
    with pytest.raises(UserError, match="mode 'smell'"):
        session.choose_mode("smell")
    with pytest.raises(UserError, match="background 'pink'"):
        session.choose_background("pink")
    with pytest.raises(UserError, match="at least two keyframes"):
        session.path(1.0, False, 1.0)
    with pytest.raises(UserError, match="mode 'super-resolved'"):
        Session(replace(renderer, ccsr=None)).choose_mode("super-resolved")


def test_keyframes_keep_camera_and_object(session):
    poses = pose_from_angles(torch.tensor([0.0, 0.3]), torch.tensor([0.3, 0.3]), 3.5)
    for class_name, pose in zip(("car", "duck"), poses, strict=True):
        session.choose_class(class_name)
        session.draw_part("shape")
        session.add_keyframe(Viewpoint(pose, 25.0, 1.5))
    path = session.path(2.0, True, 1.5)
    assert [keyframe.class_name for keyframe in path.keyframes] == ["car", "duck"]
    assert torch.equal(path.keyframes[1].code, session.look.z)
    assert torch.equal(path.keyframes[0].camera_to_world, poses[0])
    assert (path.keyframes[0].fov, path.aspect, path.closed) == (25.0, 1.5, True)


def test_two_sessions_share_nothing_that_changes(renderer):
    one, other = Session(renderer, NAMES), Session(renderer, NAMES)
    one.choose_class("duck")
    one.draw_part("shape")
    one.keyframes.append(None)  # type: ignore[arg-type]
    assert other.look.class_name == "car"
    assert torch.equal(other.look.z, renderer.codes(0, range(1))[0])
    assert other.keyframes == []


def test_a_known_object_has_the_code_that_newer_weights_gave_it_and_what_was_drawn_keeps_its_own(session, renderer):
    newer = replace(renderer, generator=copy.deepcopy(renderer.generator))
    newer.generator.instances.data += 1
    session.choose_instance("duck/0")
    session.take(newer)
    assert_close(session.look.z, newer.instance_codes([2])[0])
    assert not torch.equal(session.look.z, renderer.instance_codes([2])[0])
    session.draw_part("appearance")
    assert session.instance == DRAWN
    look = session.look
    session.take(renderer)
    assert session.look is look


def test_newer_weights_leave_what_was_chosen(session, renderer):
    session.choose_class("mug")
    session.draw_part("shape")
    look = session.look
    session.take(replace(renderer))
    assert session.look is look
