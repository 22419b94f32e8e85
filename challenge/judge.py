"""Decides whether the frames of a challenge show the live person of a photo.

A person does random steps before the camera: looks straight, turns to either side, comes closer. The frames must show
every step in order, one person without a cut, and a head: what turns must stand out as a head does, and look otherwise
from the side. docs/liveness.md has the measurements behind every limit here, and what this does not stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

import face_checks
from challenge.motion import Frame, Track, can_be_followed
from challenge.steps import MAX_FRAMES, Attempt
from engines.base import Engine, Face, Template, similarity_of
from engines.face_attributes import AttributeReader
from errors import FaceError
from face_checks import Check
from photos.pixels import Pixels
from settings import Settings

# How far the face stands out, in inter-eye distances (`Track.relief`).
MIN_RELIEF = 0.35
# How much of the nearer half of a turned face no flat picture explains (`Track.unlike_a_fold`). Of 102 people, split by
# a hash of their names: with it 2 of 43 folded prints of the first half still pass and 7 of 51 of the other; 61 of 62
# heads and 58 of 59 (compact model). At 0.012 5 of the 43 and 11 of the 51 pass. At 0.016 with MobileFaceNet 4 of 124
# heads are refused in place of 1.
MIN_UNLIKE_A_FOLD = 0.014
# How unlike the two sides of a face are (`Track.uneven`). Of 51 pairs of a side view and its mirror image, sheared,
# squeezed and lit from the side among them, 49 measure at most 0.016; 99 attempts of honest people at least 0.027.
MIN_UNEVEN = 0.02
# So many of the frames must show the face: a detector misses one now and then between two steps.
MIN_SHARE_WITH_FACE = 0.75
# From one frame to the next the face moves by at most so many inter-eye distances, and grows or shrinks by this factor.
MAX_SHIFT = 3.0
MAX_ZOOM = 2.0
# ... and its mean colour by so much (CIELAB).
MAX_COLOUR_SHIFT = 24.0
# Two frames that differ by less where the face is (`Track.least_difference`) are one frame that was sent twice. Of 40
# people a frame differs by at most 0.56 from itself saved again (JPEG 60), 0.6 to 1.5 times as large, tinted, grey,
# noisier, blurred, with a contrast of 0.7 to 1.1 or a gamma of 0.9 or 1.1; by at least 0.82 where it moved by a pixel
# of 360; and two frames of somebody who does the steps by at least 2.9. One whose light is cut off (contrast 1.25)
# escapes for half of them. A higher limit would refuse people who sit still, and so would one that finds a cropped
# frame.
MIN_DIFFERENCE = 0.6

# Checks whose hint is another one's: what a person has to do is the same.
_HINTS = {"challenge_folded": "challenge_relief"}

# How much lower than the operator's threshold the similarity of the turned frames to the photo may be.
TURNED_SIMILARITY_LOSS = 0.12


@dataclass(frozen=True)
class Outcome:
    """What the frames were found to show.

    Attributes:
        checks: every check that was made, in the order in which a refusal names its reason.
        figures: name -> what was measured, for the log.
    """

    checks: list[Check]
    figures: dict[str, float | None]


def not_attempted(code: str, required: dict[str, float]) -> FaceError:
    """The refusal of a request without a challenge that could be judged."""
    return face_checks.refusal([Check(code, False, None, required, face_checks.HINTS[code])])


def require_frame_count(attempt: Attempt) -> None:
    """FaceError `challenge_failed` if there are fewer frames than steps, or too many."""
    count, least = len(attempt.frames), len(attempt.steps)
    if not least <= count <= MAX_FRAMES:
        raise wrong_frame_count(count, least)


def wrong_frame_count(count: int, least: int) -> FaceError:
    """The refusal of more frames than any challenge takes, or of fewer than `least`."""
    if count > MAX_FRAMES:
        return face_checks.refusal([_check("challenge_failed", count, {"max": MAX_FRAMES}, "challenge_too_many")])
    return face_checks.refusal([_check("challenge_failed", count, {"min": least}, "challenge_frames")])


def look_at(pictures: Sequence[Pixels], engine: Engine, reader: AttributeReader) -> list[Frame]:
    """Find the faces in pictures, each uint8[h, w, 3] BGR, and glance at the widest one's attributes in each."""
    found = [engine.detect_in_frame(pixels) for pixels in pictures]
    crops = [_aligned(pixels, faces) for pixels, faces in zip(pictures, found, strict=True)]
    glances = iter(reader.glance([crop for crop in crops if crop is not None]))
    return [
        Frame(pixels, faces, crop, None if crop is None else next(glances))
        for pixels, faces, crop in zip(pictures, found, crops, strict=True)
    ]


def _aligned(pixels: Pixels, faces: Sequence[Face]) -> Pixels | None:
    """The widest face cut out; None where there is none that can be."""
    try:
        return face_checks.aligned_face(pixels, faces[0]) if faces else None
    except (ValueError, cv2.error):  # degenerate landmarks
        return None


def judge(
    frames: Sequence[Frame], steps: Sequence[str], template: Template, engine: Engine, settings: Settings
) -> Outcome:
    """Judge the frames of a challenge.

    Args:
        frames: in order.
        steps: the challenge's.
        template: of the photo, whose person the frames must show.
        engine: embeds two of the frames, if all else is well.
        settings: how similar one person must be, and which faces count.

    Returns:
        The checks; after one that makes the others meaningless, those are left out.
    """
    counts = [_faces_that_count(frame, settings) for frame in frames]
    seen = [frame for frame, count in zip(frames, counts, strict=True) if count == 1]
    most = max(counts)
    least = max(len(steps), math.ceil(MIN_SHARE_WITH_FACE * len(frames)))
    checks = [
        _check("challenge_failed", len(seen), {"min": least}, "challenge_faces"),
        _check("challenge_failed", most, {"max": 1}, "challenge_alone"),
    ]
    figures: dict[str, float | None] = {"challenge_faces": len(seen), "challenge_alone": most}
    if not all(check.passed for check in checks):
        return Outcome(checks, figures)
    track = Track(seen)
    followed = track.follow(steps)
    measures = [
        ("challenge_failed", "challenge_steps", float(len(followed)), {"min": float(len(steps))}),
        ("challenge_failed", "challenge_repeated", track.least_difference(), {"min": MIN_DIFFERENCE}),
        ("challenge_failed", "challenge_shift", track.largest_shift(), {"max": MAX_SHIFT}),
        ("challenge_failed", "challenge_zoom", track.largest_zoom(), {"max": MAX_ZOOM}),
        ("challenge_failed", "challenge_cut", track.largest_colour_shift(), {"max": MAX_COLOUR_SHIFT}),
    ]
    sides = track.sides()
    if sides is None:
        measures.append(("not_live", "challenge_relief", 0.0, {"min": MIN_RELIEF}))
    elif len(followed) == len(steps):
        measures += [
            ("not_live", "challenge_relief", track.relief(sides), {"min": MIN_RELIEF}),
            ("not_live", "challenge_folded", track.unlike_a_fold(sides), {"min": MIN_UNLIKE_A_FOLD}),
            ("not_live", "challenge_mirrored", track.uneven(sides), {"min": MIN_UNEVEN}),
        ]
    checks += [_check(code, measured, required, hint) for code, hint, measured, required in measures]
    figures |= {hint: round(measured, 4) for _, hint, measured, _ in measures}
    if all(check.passed for check in checks) and sides is not None:
        lowest = settings.verify_threshold - TURNED_SIMILARITY_LOSS
        similarity = _similarity([seen[track.clearest(side)] for side in sides], template, engine)
        checks.append(_check("challenge_failed", similarity, {"min": round(lowest, 4)}, "challenge_person"))
        figures["challenge_person"] = round(similarity, 4)
    return Outcome(checks, figures)


def _check(code: str, measured: float, required: dict[str, float], hint: str) -> Check:
    passed = measured >= required["min"] if "min" in required else measured <= required["max"]
    return Check(
        code, passed, round(measured, 4), required, None if passed else face_checks.NEARER_HINTS[_HINTS.get(hint, hint)]
    )


def _faces_that_count(frame: Frame, settings: Settings) -> int:
    """How many faces count in the frame, as in a photo; 0 for one that cannot be measured."""
    try:
        face, _ = face_checks.require_single_face(frame.faces, settings)
    except FaceError as refusal:
        return int(refusal.fields["checks"][0]["measured"])
    return int(frame.attributes is not None and can_be_followed(face))


def _similarity(frames: Sequence[Frame], template: Template, engine: Engine) -> float:
    """The mean similarity of the frames' faces to the photo's; -1 if one cannot be embedded.

    The frames are turned ones, since a photograph can give the straight ones.
    """
    try:
        cosines = [float(engine.embed(frame.pixels, frame.faces[0]) @ template) for frame in frames]
    except (ValueError, cv2.error):
        return -1.0
    return similarity_of(float(np.mean(cosines)), engine.cosine_at_half)
