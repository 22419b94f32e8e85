"""Owns the gates that a photo passes before recognition: single face, quality, covering; measurements as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from engines.base import MEAN_FACE, Face
from engines.face_attributes import AttributeReader, FaceAttributes
from errors import FaceError
from photos.pixels import Pixels
from photos.resampling import cut_out
from settings import Settings

# The frame that every measure but size and pose is taken in: the face turned upright and scaled so that the eyes'
# centres are 44 pixels apart, which is a little more than the recognisers themselves see (35).
SIDE = 160
EYE_DISTANCE = 44.0
ORIGIN = (79.5, 63.5)
# A copy of the photo with so many pixels between the eyes measures like the photo itself: twice the frame's scale,
# which is what larger ones are brought to first. On 12-megapixel photos the sharpness score then moves by 0.6 (at
# most 3), and no other measure by more; with half as many pixels it moves by 5 (at most 11).
ENOUGH_INTER_EYE = 2 * EYE_DISTANCE

Floats = npt.NDArray[np.float64]
Grey = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Check:
    """One gate's outcome, as the API lists it.

    Attributes:
        code: what a failure is called.
        passed: whether the photo passed; a check that could not be made has not.
        measured: the measure's value, None if it could not be made.
        required: {"min": limit} or {"max": limit}.
        hint: what the person can do; None when passed.
    """

    code: str
    passed: bool
    measured: float | None
    required: dict[str, float]
    hint: str | None


HINTS = {
    "no_face": "Put your face in the middle of the picture, in good light, and look at the camera.",
    "multiple_faces": "Make sure that only your own face is in the picture.",
    "face_too_small": "Come closer to the camera.",
    "face_too_large": "Move a little away from the camera.",
    "face_cut_off": "Move so that your whole face, from forehead to chin, is in the picture.",
    "blurred": "Hold the camera still, wipe its lens, and let it focus on your face.",
    "too_dark": "Find more light, or turn your face towards it.",
    "too_bright": "Move out of the glare, or turn away from the strong light.",
    "low_contrast": "Find better light: your face hardly stands out in the picture.",
    "uneven_light": "Turn so that the light falls on both sides of your face.",
    "head_tilted": "Hold your head upright.",
    "head_turned": "Turn your face towards the camera.",
    "head_raised_or_lowered": "Look straight at the camera, with your chin neither up nor down.",
    "unnatural_colour": "Take a colour photo in white light, without a filter.",
    "distorted": "Send the photo as the camera took it: not stretched or mixed, without filter or compression.",
    "landmarks_hidden": "Make sure that your eyes, nose and mouth can be seen clearly.",
    "mask": "Take off your mask.",
    "sunglasses": "Take off your sunglasses.",
    "face_covered": "Uncover your face: something hides part of it.",
    "eyes_closed": "Keep your eyes open and look at the camera.",
    "not_live": "Take the photo of yourself, not of a picture or a screen, in even light.",
    "liveness_not_assessed": "Leave more space around your face, and hold the camera a little further away.",
}
# What is said instead where it is known which way to go. Left is the person's own, in a photo that is not mirrored,
# as cameras give it to apps and pages; some phones mirror the selfies that they save.
NEARER_HINTS = {
    "light_on_left": "Let more light fall on the left side of your face.",
    "light_on_right": "Let more light fall on the right side of your face.",
    "chin_down": "Lower your chin and look straight at the camera.",
    "chin_up": "Raise your chin and look straight at the camera.",
    "hand": "Take your hand off your face.",
    "glare": "Tilt your head a little until your glasses no longer reflect the light, or take them off.",
}


@dataclass(frozen=True)
class Pose:
    """Head pose in degrees: yaw (turned aside), pitch (positive: lowered), roll (tilted to a shoulder)."""

    yaw: float
    pitch: float
    roll: float


def _alignment(face: Face) -> Floats:
    """The similarity transform from the photo to the frame: least squares over the landmarks, in complex numbers."""
    source = face.landmarks.astype(np.float64) @ np.array([1, 1j])
    target = (MEAN_FACE[:, :2] * EYE_DISTANCE + ORIGIN) @ np.array([1, 1j])
    centred = source - source.mean()
    spread = float((abs(centred) ** 2).sum())
    if not np.isfinite(spread) or spread < 1.0:
        raise ValueError("degenerate landmarks")
    turn = (centred.conj() * (target - target.mean())).sum() / spread
    if abs(turn) < 1e-6:
        raise ValueError("degenerate landmarks")
    shift = target.mean() - turn * source.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def head_pose(face: Face, attributes: FaceAttributes) -> Pose:
    """The head's pose in the photo: what the network sees in the aligned crop, and the turn that aligned it.

    Raises:
        ValueError: the landmarks are degenerate.
    """
    aligned = _alignment(face)
    turn_deg = math.degrees(math.atan2(aligned[1, 0], aligned[0, 0]))
    roll = (attributes.roll - turn_deg + 180) % 360 - 180
    return Pose(yaw=attributes.yaw, pitch=attributes.pitch, roll=roll)


def aligned_face(image: Pixels, face: Face) -> Pixels:
    """Cut the face out upright as uint8[160, 160, 3] BGR, eyes 44 pixels apart; borders are replicated.

    Raises:
        ValueError: the landmarks are degenerate.
    """
    return cut_out(image, _alignment(face), SIDE)


def _inverse(matrix: Floats) -> Floats:
    return np.asarray(cv2.invertAffineTransform(matrix), np.float64)


def _face_region() -> npt.NDArray[np.bool_]:
    """The ellipse over the eyes, nose and mouth in the frame, within which light and sharpness are measured.

    Five landmarks give no face contour; this ellipse is inside the face of nearly everybody: 0.95 inter-eye distances
    to each side, from 0.65 above the eyes to 1.6 below (the chin lies near 1.75).
    """
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    across = (x - ORIGIN[0]) / (0.95 * EYE_DISTANCE)
    down = (y - ORIGIN[1] - 0.475 * EYE_DISTANCE) / (1.125 * EYE_DISTANCE)
    return np.asarray(across**2 + down**2 <= 1.0)


REGION = _face_region()
# The rows and columns that it lies in, and two more on each side, which sharpness compares it with.
_AROUND_REGION = tuple(slice(int(one.min()) - 2, int(one.max()) + 3) for one in np.nonzero(REGION))
# Every second pixel of every second row: enough to tell which share of it is inside the photo, to a five-hundredth.
_REGION_POINTS = 2.0 * np.argwhere(REGION[::2, ::2])[:, ::-1]


def face_in_frame(image: Pixels, face: Face) -> float:
    """Share (0...1) of the face region that lies inside the photo."""
    points = cv2.transform(_REGION_POINTS[None], _inverse(_alignment(face)))[0]
    height, width = image.shape[:2]
    inside = (points >= -0.5).all(axis=1) & (points[:, 0] <= width - 0.5) & (points[:, 1] <= height - 0.5)
    return float(inside.mean())


# The fine detail of 128 sharp photos in each direction (across, down, two diagonals), relative to their contrast.
# Faces have more of it downwards than across; motion blur takes it from one direction alone.
_SHARP_DETAIL = (0.182, 0.283, 0.387, 0.394)
_STEPS = ((0, 2), (2, 0), (2, 2), (2, -2))


def sharpness(grey: Grey) -> float:
    """Sharpness score of the aligned face: 100 as the median sharp photo, 0 without any detail.

    The second difference over two pixels, after the standard's 3x3 Gaussian, in four directions; its mean over the
    face region relative to the luminance's deviation there (so that neither light nor contrast counts) and to the
    direction's own value in sharp photos; the weakest direction decides. Measured on 5,000 blurred, shaken and
    shrunk copies of 128 photos: it ranks them as their similarity to the original does (0.87 by Spearman), where
    the variance of the Laplacian reaches 0.67.
    """
    smooth, region = cv2.GaussianBlur(grey.astype(np.float32), (3, 3), 0)[_AROUND_REGION], REGION[_AROUND_REGION]
    contrast = float(grey[REGION].std())
    if contrast < 1.0:
        return 0.0
    detail = []
    for down, across in _STEPS:
        before, after = np.roll(smooth, (down, across), (0, 1)), np.roll(smooth, (-down, -across), (0, 1))
        detail.append(float(np.abs(2 * smooth - before - after)[region].mean()))
    return 100.0 * min(found / contrast / sharp for found, sharp in zip(detail, _SHARP_DETAIL, strict=True))


def dynamic_range(light: npt.NDArray[np.uint8]) -> float:
    """Entropy in bits (0...8) of the luminance histogram of the face region."""
    share = np.bincount(light, minlength=256) / light.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def _square(aligned: npt.NDArray[np.uint8], across: float, down: float) -> npt.NDArray[np.uint8]:
    """A square of side 0.3 inter-eye distances, that many of them across and down from the point between the eyes."""
    half = 0.15 * EYE_DISTANCE
    x, y = ORIGIN[0] + across * EYE_DISTANCE, ORIGIN[1] + down * EYE_DISTANCE
    return aligned[round(y - half) : round(y + half), round(x - half) : round(x + half)]


def _cheeks(aligned: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The standard's two cheek squares: one beside each eye, half-way between eye line and mouth line."""
    return _square(aligned, -0.5, 0.5), _square(aligned, 0.5, 0.5)


def illumination_uniformity(grey: Grey) -> float:
    """Illumination uniformity (0...1): the darker cheek square's mean luminance over the lighter's.

    The standard's overlap of the two histograms is 0 for one sharp photo in twenty that verifies perfectly (light
    from one side shifts a histogram as a whole); the ratio of the means says how far.
    """
    darker, lighter = sorted(float(cheek.mean()) for cheek in _cheeks(grey))
    return darker / max(lighter, 1.0)


def darker_on_the_left(grey: Grey) -> bool:
    """Whether the darker cheek is the person's own left one, which is on the right of a photo that is not mirrored."""
    on_the_left, on_the_right = _cheeks(grey)
    return float(on_the_right.mean()) < float(on_the_left.mean())


def colour_distance(aligned: Pixels) -> float:
    """How far the skin's mean CIELAB a*, b* lie from 5...25 and 5...35; 100 for pure grey.

    The standard measures on the two cheek squares. A mask or a beard covers those, and a coloured light covers
    everything: so the forehead and the bridge of the nose are measured as well, and the most natural patch decides.
    The standard's jump to 100 at the first negative a* or b* is left out: skin in cool light, dark skin above all,
    is on either side of 0, and recognised as surely.
    """
    cheeks = np.concatenate([cheek.reshape(-1, 3) for cheek in _cheeks(aligned)])
    forehead = _square(aligned, 0.0, -0.55)
    bridge = _square(aligned, 0.0, 0.25)
    return min(_patch_colour_distance(patch.reshape(-1, 3)) for patch in (cheeks, forehead, bridge))


def _patch_colour_distance(pixels: npt.NDArray[np.uint8]) -> float:
    lab = cv2.cvtColor(pixels[:, None].astype(np.float32) / np.float32(255), cv2.COLOR_BGR2LAB)
    a, b = (float(value) for value in lab.reshape(-1, 3).mean(axis=0)[1:])
    if math.hypot(a, b) < 1.0:
        return 100.0
    return math.hypot(max(0.0, 5 - a, a - 25), max(0.0, 5 - b, b - 35))


@dataclass(frozen=True)
class Measurements:
    """Everything measured on one face; units as in the functions that measure, NaN never."""

    inter_eye_px: float
    head_size: float
    in_frame: float
    sharpness: float
    luminance: float
    under_exposure: float
    over_exposure: float
    dynamic_range: float
    uniformity: float
    pose: Pose
    colour_distance: float
    attributes: FaceAttributes
    darker_left: bool

    @property
    def stretch(self) -> float:
        """How many times wider than it was, or higher, the face is against its other side: 1 for an honest photo."""
        return max(self.attributes.stretch, 1 / self.attributes.stretch)


def measure(image: Pixels, face: Face, reader: AttributeReader, reduced_by: int = 1) -> Measurements:
    """Measure one face of uint8[h, w, 3] BGR, the copy of a photo that is `reduced_by` as wide and as high.

    Raises:
        ValueError: the landmarks are degenerate, so that nothing can be measured.
    """
    aligned = aligned_face(image, face)
    attributes = reader.read(aligned)
    pose = head_pose(face, attributes)
    grey = np.asarray(cv2.cvtColor(aligned, cv2.COLOR_BGR2GRAY), np.uint8)
    light = grey[REGION]
    inter_eye = face.inter_eye / max(0.2, math.cos(math.radians(pose.yaw)))
    return Measurements(
        inter_eye_px=reduced_by * inter_eye,
        # Five landmarks give no chin; from the eyes it is 1.75 inter-eye distances down on a mean face.
        head_size=1.75 * inter_eye / image.shape[0],
        in_frame=face_in_frame(image, face),
        sharpness=sharpness(grey),
        luminance=float(light.mean()) / 255.0,
        under_exposure=float((light <= 25).mean()),
        over_exposure=float((light >= 247).mean()),
        dynamic_range=dynamic_range(light),
        uniformity=illumination_uniformity(grey),
        pose=pose,
        colour_distance=colour_distance(aligned),
        attributes=attributes,
        darker_left=darker_on_the_left(grey),
    )


def _at_least(code: str, measured: float, low: float, hint: str | None = None) -> Check:
    return _check(code, measured, {"min": low}, measured >= low, hint)


def _at_most(code: str, measured: float, high: float, hint: str | None = None) -> Check:
    return _check(code, measured, {"max": high}, measured <= high, hint)


def _check(
    code: str, measured: float | None, required: dict[str, float], passed: bool, hint: str | None = None
) -> Check:
    shown = None if measured is None else round(measured, 4)
    return Check(code, passed, shown, required, None if passed else hint or HINTS[code])


# From this probability a hint names a hand, or spectacles that reflect the light.
CLEAR_HINT = 0.5


def judge(found: Measurements, limits: Settings) -> list[Check]:
    """Hold one face's measurements against the settings, in the order in which a refusal names its reason."""
    seen = found.attributes
    hand = NEARER_HINTS["hand"] if seen.hand >= CLEAR_HINT else None
    glare = NEARER_HINTS["glare"] if seen.spectacles >= CLEAR_HINT else None
    named = (
        _at_most("mask", seen.mask, limits.max_mask),
        _at_most("sunglasses", seen.sunglasses, limits.max_sunglasses, glare),
        _at_most("face_covered", seen.other, limits.max_covered, hand or glare),
    )
    light = NEARER_HINTS["light_on_left" if found.darker_left else "light_on_right"]
    chin = NEARER_HINTS["chin_up" if found.pose.pitch > 0 else "chin_down"]
    # What a named covering hides is told by that name; this check speaks where nothing nameable hides the landmarks.
    is_named = not all(check.passed for check in named)
    hidden = {"max": limits.max_hidden}
    shut = {"max": limits.max_eyes_shut}
    return [
        _at_least("face_too_small", found.inter_eye_px, limits.min_inter_eye_px),
        _at_most("face_too_large", found.head_size, limits.max_head_size),
        _at_least("face_cut_off", found.in_frame, limits.min_face_in_frame),
        _at_least("blurred", found.sharpness, limits.min_sharpness),
        _worst(
            _at_least("too_dark", found.luminance, limits.min_luminance),
            _at_most("too_dark", found.under_exposure, limits.max_under_exposure),
        ),
        _worst(
            _at_most("too_bright", found.luminance, limits.max_luminance),
            _at_most("too_bright", found.over_exposure, limits.max_over_exposure),
        ),
        _at_least("low_contrast", found.dynamic_range, limits.min_dynamic_range),
        _at_least("uneven_light", found.uniformity, limits.min_uniformity, light),
        _at_most("head_tilted", abs(found.pose.roll), limits.max_roll_deg),
        _at_most("head_turned", abs(found.pose.yaw), limits.max_yaw_deg),
        _at_most("head_raised_or_lowered", abs(found.pose.pitch), limits.max_pitch_deg, chin),
        _at_most("unnatural_colour", found.colour_distance, limits.max_colour_distance),
        _worst(
            _at_most("distorted", found.stretch, limits.max_stretch),
            _at_least("distorted", seen.likeness, limits.min_likeness),
            _at_most("distorted", seen.blend, limits.max_blend),
        ),
        _check("landmarks_hidden", seen.hidden, hidden, seen.hidden <= limits.max_hidden or is_named, glare),
        *named,
        # Eyes behind dark lenses are told by their name.
        _check("eyes_closed", seen.eyes_shut, shut, seen.eyes_shut <= limits.max_eyes_shut or not named[1].passed),
    ]


def _worst(*checks: Check) -> Check:
    """The first of several checks of one code that failed, else the first."""
    return next((check for check in checks if not check.passed), checks[0])


def require_single_face(faces: Sequence[Face], limits: Settings) -> tuple[Face, Check]:
    """The one face of the photo, and the check that found it alone.

    Args:
        faces: widest first, as an engine returns them.

    Raises:
        FaceError: `no_face`, `multiple_faces`.
    """
    if not faces:
        raise refusal([_check("no_face", 0.0, {"min": 1}, False)])
    widths = [float(face.box[2] - face.box[0]) for face in faces]
    counted = sum(width >= limits.min_face_ratio * widths[0] for width in widths)
    check = _check("multiple_faces", float(counted), {"max": 1}, counted == 1)
    if not check.passed:
        raise refusal([check])
    return faces[0], check


def check_photo(
    image: Pixels,
    faces: Sequence[Face],
    limits: Settings,
    reader: AttributeReader,
    reduced_by: int = 1,
) -> tuple[Face, list[Check]]:
    """Pass one photo through every gate.

    Args:
        image: uint8[h, w, 3], BGR, upright; at least `ENOUGH_INTER_EYE` between the eyes if it is a reduced copy.
        faces: what the engine found in it, widest first.
        limits: the settings' limits.
        reader: tells what covers the face, and the rest of `FaceAttributes`.
        reduced_by: how many times as wide and as high the photo itself is.

    Returns:
        The photo's one face, fit to be embedded, and the checks that it passed.

    Raises:
        FaceError: status 422 with the first failed check's code, and all checks in `fields["checks"]`.
    """
    face, alone = require_single_face(faces, limits)
    try:
        checks = [alone, *judge(measure(image, face, reader, reduced_by), limits)]
    except (ValueError, cv2.error) as error:
        raise refusal([alone, _check("landmarks_hidden", None, {"max": limits.max_hidden}, False)]) from error
    if not all(check.passed for check in checks):
        raise refusal(checks)
    return face, checks


def liveness_check(score: float | None, settings: Settings) -> Check:
    """The liveness check of a face.

    Args:
        score: the probability that the face is live; None if it could not be judged, which has not passed.
        settings: MIN_LIVENESS is the least probability of a live face.
    """
    required = {"min": settings.min_liveness}
    if score is None:
        return Check("liveness_not_assessed", False, None, required, HINTS["liveness_not_assessed"])
    passed = score >= settings.min_liveness
    return Check("not_live", passed, round(score, 4), required, None if passed else HINTS["not_live"])


def cannot_be_embedded(checks: Sequence[Check]) -> FaceError:
    """The refusal of a face that passed the gates but whose landmarks align to nothing."""
    return refusal([replace(check, passed=False) if check.code == "landmarks_hidden" else check for check in checks])


def refusal(checks: Sequence[Check]) -> FaceError:
    """The error that a photo is refused with, of which at least one check has failed."""
    first = next(check for check in checks if not check.passed)
    return FaceError(first.code, fields={"checks": as_json(checks)})


def as_json(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """The checks as the API lists them."""
    return [dict(vars(check)) for check in checks]
