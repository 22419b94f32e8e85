"""The steps of a challenge: random, with both sides and one approach, and never the same for long."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from challenge.steps import CLOSER, LEFT, MAX_FRAMES, ORDERS, RIGHT, STRAIGHT, draw_steps


def actions_of(steps: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(step for step in steps if step != STRAIGHT)


def test_a_replay_of_another_challenge_fits_one_in_24() -> None:
    assert len(ORDERS) == 24
    assert len({actions_of(steps) for steps in ORDERS}) == 24


@pytest.mark.parametrize("steps", ORDERS, ids=" ".join)
def test_every_order_begins_straight_and_has_both_sides_and_one_approach(steps: tuple[str, ...]) -> None:
    assert steps[0] == STRAIGHT
    assert {LEFT, RIGHT} <= set(steps)
    assert steps.count(CLOSER) == 1
    assert all(one != other for one, other in pairwise(steps))
    assert len(steps) <= MAX_FRAMES // 2


def test_each_order_is_drawn_about_as_often_as_any_other() -> None:
    drawn = Counter(draw_steps() for _ in range(4800))
    assert set(drawn) == set(ORDERS)
    assert max(drawn.values()) < 300  # 200 expected: seven standard deviations
