"""The steps of a challenge: what they are called, and how they are drawn."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from itertools import product

# The steps, as the API names them. Left and right are the person's own, in frames that are not mirrored.
STRAIGHT, LEFT, RIGHT, CLOSER = "look_straight", "turn_left", "turn_right", "come_closer"
# So many actions follow the first look: both sides, and coming closer once.
ACTIONS = 4

MAX_FRAMES = 12
# Bounds of one frame: a JPEG of 1280 x 720 has about 150 KiB.
MAX_FRAME_BYTES = 256 * 1024
MAX_FRAME_PIXELS = 2_100_000


def _all_orders() -> list[tuple[str, ...]]:
    """Every order of steps: first a look, then the actions, and a look between two turns to one side."""
    orders = []
    for actions in product((LEFT, RIGHT, CLOSER), repeat=ACTIONS):
        if actions.count(CLOSER) != 1 or not {LEFT, RIGHT} <= set(actions):
            continue
        steps = [STRAIGHT]
        for action in actions:
            steps += [STRAIGHT, action] if steps[-1] == action else [action]
        orders.append(tuple(steps))
    return orders


ORDERS = _all_orders()


def draw_steps() -> tuple[str, ...]:
    """Draw the steps of a challenge: each of `ORDERS` is as likely as any other."""
    return secrets.choice(ORDERS)


@dataclass(frozen=True)
class Attempt:
    """A challenge's steps, and the frames that were sent for them, as files."""

    challenge_id: str
    steps: tuple[str, ...]
    frames: tuple[bytes, ...]
