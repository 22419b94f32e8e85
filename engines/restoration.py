"""Undoes what may have been done to a photo, so that the duplicate search knows its person all the same."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from engines.base import Face
from engines.face_attributes import FaceAttributes
from photos.pixels import Pixels
from photos.resampling import halved

# From this measured stretch on, the face is looked for unstretched, too. 14 in 100 photos that nobody stretched measure
# as much.
MIN_STRETCH_TO_UNDO = 1.1
# Below this estimated likeness, in 9 of 100 clean photos, the face is looked for smoothed, too. Of the distorted copies
# that would enrol (benchmarks/distorted_copies.py), 3 in 100 are found so with the compact model, and 9 with a
# MobileFaceNet pack; with MAX_DAMAGE=1 it is 28 and 20. No copy is taken for somebody else for it with the compact
# model, and 2 in 1,000 with the pack.
MAX_LIKENESS_TO_SMOOTH = 0.8
# The deviation of the Gaussian, in inter-eye distances: one pixel of the recognisers' own input.
SMOOTHING = 1 / 35
# What is cut out around the face, in sides of its box to every side: the recogniser's crop and more.
_AROUND_BOX = 0.5
# The picture is halved while the face keeps this inter-eye distance, twice that of the recognisers' input. So a large
# photo costs as little as a small one.
_INTER_EYE_PX = 70.0


def restored(image: Pixels, face: Face, seen: FaceAttributes) -> list[tuple[Pixels, Face]]:
    """The face as it may have been before somebody changed its photo; nothing for most photos.

    Args:
        image: uint8[h, w, 3] BGR.
        face: the face in `image`.
        seen: what the network reads in the face: how it is stretched, and how much of its likeness is left.

    Returns:
        Parts of the photo, each uint8[h, w, 3] with the face in it: unstretched, then smoothed (and unstretched).

    Raises:
        cv2.error: the face lies outside the photo, or its eyes in one point.
    """
    is_stretched = seen.distortion >= MIN_STRETCH_TO_UNDO
    has_lost_likeness = seen.likeness < MAX_LIKENESS_TO_SMOOTH
    if not is_stretched and not has_lost_likeness:
        return []
    part, in_part = _around(image, face)
    found = []
    if is_stretched:
        part, in_part = _unstretched(part, in_part, seen.stretch)
        found.append((part, in_part))
    if has_lost_likeness:
        found.append((_smoothed(part, in_part), in_part))
    return found


def _around(image: Pixels, face: Face) -> tuple[Pixels, Face]:
    around = _AROUND_BOX * float((face.box[2:] - face.box[:2]).max())
    size = np.array(image.shape[1::-1])
    left, top = np.clip(face.box[:2] - around, 0, size - 1).astype(int)
    right, bottom = np.clip(np.ceil(face.box[2:] + around), (left + 1, top + 1), size).astype(int)
    in_part = replace(face, box=face.box - (left, top, left, top), landmarks=face.landmarks - (left, top))
    by, part = halved(image[top:bottom, left:right], _INTER_EYE_PX / max(1.0, face.inter_eye))
    return part, in_part.enlarged(1 / by)


def _unstretched(image: Pixels, face: Face, stretch: float) -> tuple[Pixels, Face]:
    factors = np.array([stretch**-0.5, stretch**0.5])
    straight = cv2.resize(image, None, fx=factors[0], fy=factors[1], interpolation=cv2.INTER_LINEAR)
    return np.asarray(straight, np.uint8), face.enlarged(factors)


def _smoothed(image: Pixels, face: Face) -> Pixels:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), SMOOTHING * face.inter_eye), np.uint8)
