"""Frames of the packaged astronaut, who turns her head, and of prints of her: a person, and pictures of one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from benchmarks.turning_faces import (
    ARM_LENGTH,
    FLAT_PIVOT,
    NECK_PIVOT,
    Relief,
    View,
    a_background,
    as_sent,
    filmed,
    folded_print_of,
    plain_head_of,
    print_of,
)
from challenge.steps import CLOSER, LEFT, RIGHT
from engines.base import Face
from photos.pixels import Pixels
from tests.support.fakes import packaged_photo

# Where the compact model finds her landmarks, so that filming needs no model.
_LANDMARKS = ((201.6, 105.5), (245.3, 104.9), (221.0, 127.2), (204.1, 145.4), (242.4, 145.4))
TURN_DEG, NEAR = 30.0, 0.7


def astronaut() -> tuple[Pixels, Face]:
    """The photo, and the face in it."""
    landmarks = np.array(_LANDMARKS, np.float32)
    return packaged_photo("skimage", "data", "astronaut.png"), Face(np.zeros(4, np.float32), 1.0, landmarks)


@cache
def relief_of(what: str) -> Relief:
    """A `head`, a `flat` print, a `bent` one, or a `folded` one that is printed wider."""
    photo, face = astronaut()
    if what == "head":
        return plain_head_of(photo, face)
    if what == "folded":
        return folded_print_of(photo, face, 35.0, widened=True)
    return print_of(photo, face, radius=1.6 if what == "bent" else np.inf)


def frames_of(steps: Sequence[str], what: str = "head", *, turn_deg: float = TURN_DEG, seed: int = 0) -> list[bytes]:
    """One JPEG for each step that the head or print does. Like a person, it never stands quite still."""
    random, distance, frames = np.random.default_rng(seed), ARM_LENGTH, []
    background = a_background(random)
    for step in steps:
        if step == CLOSER:
            distance *= NEAR
        yaw = {LEFT: turn_deg, RIGHT: -turn_deg}.get(step, 0.0)
        pivot = NECK_PIVOT if what == "head" else FLAT_PIVOT
        view = View(yaw=yaw, distance=distance, shift=(random.normal(0, 0.03), random.normal(0, 0.03)), pivot=pivot)
        frames.append(as_sent(filmed(relief_of(what), view, background), random))
    return frames
