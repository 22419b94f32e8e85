"""The steps that a face does, from the yaw that the network reads and the size of the face."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from challenge.motion import Frame, Track
from challenge.steps import CLOSER, LEFT, RIGHT, STRAIGHT
from engines.face_attributes import FaceAttributes
from tests.support.fakes import a_face

BLANK = np.full((160, 160, 3), 127, np.uint8)


def followed(yaws: Sequence[float], steps: Sequence[str], sizes: Sequence[float] | None = None) -> list[str]:
    """The steps that are seen in frames of these yaws (degrees; to the person's left is negative) and sizes."""
    frames = [
        Frame(BLANK, [a_face(60.0 * size)], BLANK, FaceAttributes(yaw=yaw))
        for yaw, size in zip(yaws, sizes or [1.0] * len(yaws), strict=True)
    ]
    return [step for step, _ in Track(frames).follow(steps)]


def test_a_turn_is_what_the_network_reads_whatever_the_landmarks_show() -> None:
    steps = (STRAIGHT, LEFT, RIGHT)
    assert followed([0, -25, 25], steps) == list(steps)
    assert followed([0, 25, -25], steps) == [STRAIGHT]


@pytest.mark.parametrize("camera_deg", [-18.0, 0.0, 18.0])
def test_a_turn_is_measured_from_where_the_person_looks_straight(camera_deg: float) -> None:
    steps = (STRAIGHT, RIGHT, STRAIGHT, RIGHT, LEFT)
    yaws = [camera_deg + turn for turn in (0, 22, -3, 25, -24)]
    assert followed(yaws, steps) == list(steps)


def test_a_turn_that_wavers_is_one_turn_and_a_look_back_ends_it() -> None:
    steps = (STRAIGHT, LEFT, STRAIGHT, LEFT, RIGHT)
    assert followed([0, -25, -13, -25, 25], steps) == [STRAIGHT, LEFT]
    assert followed([0, -25, -13, -5, -25, 25], steps) == list(steps)


def test_who_is_only_half_turned_has_not_turned() -> None:
    assert followed([0, -14, 0, 14], (STRAIGHT, LEFT, RIGHT)) == [STRAIGHT]


def test_who_comes_closer_is_near_until_they_have_gone_back() -> None:
    steps = (STRAIGHT, CLOSER, LEFT, RIGHT)
    assert followed([0, 0, -25, 25], steps, [1.0, 1.3, 1.3, 1.2]) == list(steps)
    assert followed([0, 0, 0, -25, 0, 25], steps, [1.0, 1.3, 1.0, 1.0, 1.3, 1.3]) == [STRAIGHT, CLOSER, LEFT]


def test_who_looks_away_at_first_does_no_step() -> None:
    assert followed([35, 0, 60], (STRAIGHT, LEFT, RIGHT)) == []
