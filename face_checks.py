"""Measures and checks a photo before recognition: one face, its quality, what covers it."""

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
from photos.colour import mean_lab
from photos.pixels import Pixels
from photos.resampling import cut_out
from settings import Settings

# The aligned face: turned upright and scaled until the eyes' centres are this far apart, a little more than in the
# recognisers' own input (35). All measures but size and pose are taken in it.
FRAME_SIDE_PX = 160
FRAME_EYE_DISTANCE_PX = 44.0
FRAME_EYE_CENTRE_PX = (79.5, 63.5)
# A reduced copy of a photo with this inter-eye distance, twice the aligned face's, measures like the photo itself. On
# 12-megapixel photos the sharpness score then moves by 0.6 (at most 3), and no other measure by more. With half this
# distance it moves by 5 (at most 11).
MEASURABLE_INTER_EYE_PX = 2 * FRAME_EYE_DISTANCE_PX

# From the eyes to the chin of a mean face, in inter-eye distances: five landmarks give no chin.
CHIN_INTER_EYES = 1.75
# Pixels from 0 to this luminance (of 255) are under-exposed, and from this one on over-exposed (ISO/IEC 29794-5).
MAX_DARK_LUMINANCE = 25
MIN_GLARING_LUMINANCE = 247

Floats = npt.NDArray[np.float64]
Grey = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Check:
    """One gate's outcome, as the API lists it.

    Attributes:
        code: the error code of a failure.
        passed: whether `measured` is within `required`; False if the check could not be made.
        measured: the measured value, None if it could not be measured.
        required: {"min": limit} or {"max": limit}.
        hint: what the person can do; None if passed.
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
    "distorted": (
        "Send the photo as the camera took it, in good light: not stretched, and without filter or strong compression."
    ),
    "mask": "Take off your mask.",
    "sunglasses": "Take off your sunglasses.",
    "face_covered": "Uncover your face: something hides part of it.",
    "landmarks_hidden": "Make sure that your eyes, nose and mouth can be seen clearly.",
    "eyes_closed": "Keep your eyes open and look at the camera.",
    "not_live": "Take the photo of yourself, not of a picture or a screen, in even light.",
    "liveness_not_assessed": "Leave more space around your face, and hold the camera a little further away.",
    "challenge_required": "Do the steps that the app asks for.",
    "challenge_expired": "Begin again, and do the steps within a minute.",
    "challenge_failed": "Do the steps in the order in which the app asks for them.",
}
# Hints that replace a check's own where the direction is known. Left is the person's left in a photo that is not
# mirrored, as cameras give it to apps and pages. Some phones mirror the selfies that they save.
NEARER_HINTS = {
    "light_on_left": "Let more light fall on the left side of your face.",
    "light_on_right": "Let more light fall on the right side of your face.",
    "chin_down": "Lower your chin and look straight at the camera.",
    "chin_up": "Raise your chin and look straight at the camera.",
    "hand": "Take your hand off your face.",
    "glare": "Tilt your head a little until your glasses no longer reflect the light, or take them off.",
    "challenge_frames": "Do every step until the app has seen it, and begin again if it takes too long.",
    "challenge_too_many": "Begin again, and do the steps a little faster: the app sent too many pictures.",
    "challenge_faces": "Keep your whole face in the picture until the last step.",
    "challenge_alone": "Make sure that nobody else is in the picture until the last step.",
    "challenge_steps": "Do each step in its order, far enough, and no other: turn your head by about 30 degrees.",
    "challenge_repeated": "Let the camera run: each picture must be a new one.",
    "challenge_shift": "Keep your face in the same place while you turn it.",
    "challenge_zoom": "Come closer slowly.",
    "challenge_cut": "Stay in the same light, and move slowly.",
    "challenge_relief": "Turn your own head, not a picture or the camera, a little further.",
    "challenge_mirrored": "Turn your own head to both sides, not a picture of it.",
    "challenge_person": "Do the steps yourself, without help, in good light.",
}


@dataclass(frozen=True)
class Pose:
    """Head pose in degrees: yaw (turned aside), pitch (positive: lowered), roll (tilted to a shoulder)."""

    yaw: float
    pitch: float
    roll: float


def _alignment(face: Face) -> Floats:
    """The similarity transform from the photo to the aligned face, by least squares over complex landmarks.

    Raises:
        ValueError: the landmarks are degenerate.
    """
    source = face.landmarks.astype(np.float64) @ np.array([1, 1j])
    target = (MEAN_FACE[:, :2] * FRAME_EYE_DISTANCE_PX + FRAME_EYE_CENTRE_PX) @ np.array([1, 1j])
    centred = source - source.mean()
    spread = float((abs(centred) ** 2).sum())
    if not np.isfinite(spread) or spread < 1.0:
        raise ValueError("degenerate landmarks")
    turn = (centred.conj() * (target - target.mean())).sum() / spread
    if abs(turn) < 1e-6:
        raise ValueError("degenerate landmarks")
    shift = target.mean() - turn * source.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def pose_of(face: Face, attributes: FaceAttributes) -> Pose:
    """The head's pose in the photo: what the network sees in the aligned crop, and the turn that aligned it.

    Steadier than a pose from five landmarks: a photo and its mirror image differ by 0.4, 0.4 and 0.4 degrees of yaw,
    pitch and roll (median of 165 photos), where five landmarks differ by 4.1, 2.8 and 2.4.

    Raises:
        ValueError: the landmarks are degenerate.
    """
    matrix = _alignment(face)
    roll = attributes.roll - math.degrees(math.atan2(matrix[1, 0], matrix[0, 0]))
    return Pose(yaw=attributes.yaw, pitch=attributes.pitch, roll=(roll + 180) % 360 - 180)


def aligned_face(image: Pixels, face: Face) -> Pixels:
    """Cut the face out upright as uint8[160, 160, 3] BGR, eyes 44 pixels apart; borders are replicated.

    Raises:
        ValueError: the landmarks are degenerate.
    """
    return cut_out(image, _alignment(face), FRAME_SIDE_PX)


def _inverse(matrix: Floats) -> Floats:
    return np.asarray(cv2.invertAffineTransform(matrix), np.float64)


def _face_region() -> npt.NDArray[np.bool_]:
    """The ellipse over eyes, nose and mouth in the aligned face, in which light and sharpness are measured.

    Five landmarks give no face contour. This ellipse lies inside nearly every face: 0.95 inter-eye distances to each
    side, from 0.65 above the eyes to 1.6 below (the chin is near 1.75).
    """
    y, x = np.mgrid[0:FRAME_SIDE_PX, 0:FRAME_SIDE_PX]
    across = (x - FRAME_EYE_CENTRE_PX[0]) / (0.95 * FRAME_EYE_DISTANCE_PX)
    down = (y - FRAME_EYE_CENTRE_PX[1] - 0.475 * FRAME_EYE_DISTANCE_PX) / (1.125 * FRAME_EYE_DISTANCE_PX)
    return np.asarray(across**2 + down**2 <= 1.0)


FACE_REGION = _face_region()
# The rows and columns of the region, and two more on each side, which the sharpness measure compares it with.
_AROUND_FACE_REGION = tuple(slice(int(one.min()) - 2, int(one.max()) + 3) for one in np.nonzero(FACE_REGION))
# Every second pixel of every second row gives the share that is inside the photo to a five-hundredth.
_FACE_REGION_POINTS_PX = 2.0 * np.argwhere(FACE_REGION[::2, ::2])[:, ::-1]


def face_in_frame(image: Pixels, face: Face) -> float:
    """Share (0...1) of the face region that lies inside the photo."""
    points = cv2.transform(_FACE_REGION_POINTS_PX[None], _inverse(_alignment(face)))[0]
    height, width = image.shape[:2]
    inside = (points >= -0.5).all(axis=1) & (points[:, 0] <= width - 0.5) & (points[:, 1] <= height - 0.5)
    return float(inside.mean())


# The fine detail of 128 sharp photos in each direction (across, down, two diagonals), relative to their contrast.
# Faces have more detail downwards than across. Motion blur removes it in one direction only.
_SHARP_DETAIL = (0.182, 0.283, 0.387, 0.394)
_DETAIL_STEPS_PX = ((0, 2), (2, 0), (2, 2), (2, -2))


def sharpness(grey: Grey) -> float:
    """Sharpness score of the aligned face: 100 as the median sharp photo, 0 without any detail.

    After the standard's 3x3 Gaussian, the second difference over two pixels is taken in four directions. Its mean over
    the face region is divided by the luminance's deviation there, so that light and contrast do not count, and by the
    same direction's value in sharp photos. The weakest direction decides. On 5,000 blurred, shaken and shrunk copies of
    128 photos the score ranks them as their similarity to the original does (0.87 by Spearman); the variance of the
    Laplacian reaches 0.67.
    """
    smooth, region = (
        cv2.GaussianBlur(grey.astype(np.float32), (3, 3), 0)[_AROUND_FACE_REGION],
        FACE_REGION[_AROUND_FACE_REGION],
    )
    contrast = float(grey[FACE_REGION].std())
    if contrast < 1.0:
        return 0.0
    detail = []
    for down, across in _DETAIL_STEPS_PX:
        before, after = np.roll(smooth, (down, across), (0, 1)), np.roll(smooth, (-down, -across), (0, 1))
        detail.append(float(np.abs(2 * smooth - before - after)[region].mean()))
    return 100.0 * min(found / contrast / sharp for found, sharp in zip(detail, _SHARP_DETAIL, strict=True))


def dynamic_range(light: npt.NDArray[np.uint8]) -> float:
    """Entropy in bits (0...8) of the luminance histogram of the face region."""
    share = np.bincount(light, minlength=256) / light.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def _square(aligned: npt.NDArray[np.uint8], across: float, down: float) -> npt.NDArray[np.uint8]:
    """A square with a side of 0.3 inter-eye distances.

    Args:
        aligned: the aligned face.
        across, down: from the point between the eyes to the square's centre, in inter-eye distances.
    """
    half = 0.15 * FRAME_EYE_DISTANCE_PX
    x, y = (
        FRAME_EYE_CENTRE_PX[0] + across * FRAME_EYE_DISTANCE_PX,
        FRAME_EYE_CENTRE_PX[1] + down * FRAME_EYE_DISTANCE_PX,
    )
    return aligned[round(y - half) : round(y + half), round(x - half) : round(x + half)]


def _cheeks(aligned: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The standard's two cheek squares: below each eye, half-way between eye line and mouth line."""
    return _square(aligned, -0.5, 0.5), _square(aligned, 0.5, 0.5)


def illumination_uniformity(grey: Grey) -> float:
    """Illumination uniformity (0...1): the darker cheek square's mean luminance divided by the lighter's.

    The standard measures the overlap of the two histograms. It is 0 for one sharp photo in twenty that verifies
    perfectly, because light from one side shifts a whole histogram. The ratio of the means says how far.
    """
    darker, lighter = sorted(float(cheek.mean()) for cheek in _cheeks(grey))
    return darker / max(lighter, 1.0)


def darker_on_the_left(grey: Grey) -> bool:
    """Whether the darker cheek is the person's left one, which is on the right of a photo that is not mirrored."""
    left_in_photo, right_in_photo = _cheeks(grey)
    return float(right_in_photo.mean()) < float(left_in_photo.mean())


def colour_distance(aligned: Pixels) -> float:
    """Distance of the skin's mean CIELAB a*, b* from 5...25 and 5...35; 100 for pure grey.

    The standard measures the two cheek squares. A mask or a beard covers them, so the forehead and the bridge of the
    nose are measured too, and the most natural patch decides. The standard's jump to 100 at a negative a* or b* is left
    out: in cool light, skin, dark skin above all, lies on both sides of 0 and is recognised as well.
    """
    cheeks = np.concatenate([cheek.reshape(-1, 3) for cheek in _cheeks(aligned)])
    forehead = _square(aligned, 0.0, -0.55)
    bridge = _square(aligned, 0.0, 0.25)
    return min(_patch_colour_distance(patch.reshape(-1, 3)) for patch in (cheeks, forehead, bridge))


def _patch_colour_distance(pixels: npt.NDArray[np.uint8]) -> float:
    _, a, b = (float(value) for value in mean_lab(pixels))
    if math.hypot(a, b) < 1.0:
        return 100.0
    return math.hypot(max(0.0, 5 - a, a - 25), max(0.0, 5 - b, b - 35))


@dataclass(frozen=True)
class Measurements:
    """All measures of one face, in the units of the functions that measure them; never NaN."""

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


def measure(image: Pixels, face: Face, reader: AttributeReader, reduced_by: int = 1) -> Measurements:
    """Measure one face.

    Args:
        image: uint8[h, w, 3], BGR: a photo, or a reduced copy of it.
        face: the face in `image`.
        reader: tells what covers the face, and the rest of `FaceAttributes`.
        reduced_by: how many times as wide and as high the photo itself is.

    Raises:
        ValueError: the landmarks are degenerate, so that nothing can be measured.
    """
    aligned = aligned_face(image, face)
    attributes = reader.read(aligned)
    pose = pose_of(face, attributes)
    grey = np.asarray(cv2.cvtColor(aligned, cv2.COLOR_BGR2GRAY), np.uint8)
    light = grey[FACE_REGION]
    inter_eye = face.inter_eye / max(0.2, math.cos(math.radians(pose.yaw)))
    return Measurements(
        inter_eye_px=reduced_by * inter_eye,
        head_size=CHIN_INTER_EYES * inter_eye / image.shape[0],
        in_frame=face_in_frame(image, face),
        sharpness=sharpness(grey),
        luminance=float(light.mean()) / 255.0,
        under_exposure=float((light <= MAX_DARK_LUMINANCE).mean()),
        over_exposure=float((light >= MIN_GLARING_LUMINANCE).mean()),
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
    (limit,) = required.values()
    shown = None if measured is None else round(measured, 4)
    if measured is not None and not passed and shown == limit:  # a failure must not read like the limit itself
        shown = (math.floor if measured < limit else math.ceil)(measured * 1e4) / 1e4
    return Check(code, passed, shown, required, None if passed else hint or HINTS[code])


# From this probability on a hint names a hand, or spectacles that reflect the light.
CLEAR_HINT_PROBABILITY = 0.5


def judge(found: Measurements, limits: Settings) -> list[Check]:
    """Compare one face's measurements with the limits, in the order in which a refusal names its reason."""
    seen = found.attributes
    hand = NEARER_HINTS["hand"] if seen.hand >= CLEAR_HINT_PROBABILITY else None
    glare = NEARER_HINTS["glare"] if seen.spectacles >= CLEAR_HINT_PROBABILITY else None
    # Spectacles are no reason for what hides the nose or the mouth.
    cover = hand or (glare if seen.eyes_hidden >= seen.hidden else None)
    light = NEARER_HINTS["light_on_left" if found.darker_left else "light_on_right"]
    chin = NEARER_HINTS["chin_up" if found.pose.pitch > 0 else "chin_down"]
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
        _at_most("mask", seen.mask, limits.max_mask),
        # Sunglasses are a little spectacles, too. Of 148 hard ones 23 reach the probability for the other hint, and one
        # is rather spectacles than sunglasses.
        _at_most(
            "sunglasses", seen.sunglasses, limits.max_sunglasses, glare if seen.spectacles > seen.sunglasses else None
        ),
        _at_most("face_covered", seen.other, limits.max_covered, cover),
        # After them, because a covering with a name hides landmarks, too, and its name says more.
        _at_most("landmarks_hidden", seen.hidden, limits.max_hidden, cover),
        _at_most("eyes_closed", seen.eyes_shut, limits.max_eyes_shut),
        # Last: whatever else is wrong with a photo costs likeness, too.
        _worst(
            _at_most("distorted", seen.distortion, limits.max_stretch),
            _at_least("distorted", seen.likeness, limits.min_likeness),
            _at_most("distorted", seen.damaged, limits.max_damage),
        ),
    ]


def _worst(*checks: Check) -> Check:
    """The first failed one of several checks of one code; the first one if all passed."""
    return next((check for check in checks if not check.passed), checks[0])


# The largest distance that two colours of CIELAB's a*, b* plane can have from skin in an 8-bit picture.
MAX_COLOUR_DISTANCE_OF_A_PICTURE = 150.0
# How much of a selfie's least inter-eye distance and sharpness a portrait on a card must have. Of 2,565 cards
# (benchmarks/cards.py, compact model) 57 of the 76 with 12 to 16 pixels match their selfie, and 12 of the 13 with a
# sharpness of 24 to 32, most of them under glare. Compared with other people's selfies, 2,581 times, none of these
# reaches a cosine of 0.41; of all cards, 72,355 times, none reaches 0.43; 0.47 is a match. With a MobileFaceNet pack
# at 0.38, 2 of 3,219 comparisons of cards with 12 to 16 pixels match, 14 of 9,193 of larger ones.
SHARE_FOR_PICTURES = 0.75


def limits_for_pictures(limits: Settings) -> Settings:
    """The limits for a picture of a picture, such as a card.

    Its widest face counts, and its colours may be any: identity cards carry a second, smaller portrait, and portraits
    in grey or in one tint. It may be smaller and less sharp. What covers the face counts as in a selfie: of
    2,520 cards (compact model) `face_covered` refuses 58, all with coarse lines over the portrait. Of 280 such cards
    53 match.
    """
    return replace(
        limits,
        min_face_ratio=1.0,
        max_colour_distance=MAX_COLOUR_DISTANCE_OF_A_PICTURE,
        min_inter_eye_px=SHARE_FOR_PICTURES * limits.min_inter_eye_px,
        min_sharpness=SHARE_FOR_PICTURES * limits.min_sharpness,
    )


def require_single_face(faces: Sequence[Face], limits: Settings) -> tuple[Face, Check]:
    """The one face of the photo, and the passed check of their number.

    Args:
        faces: widest first, as an engine returns them.
        limits: the settings' limits.

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


# Who is compared only may blink, and the recogniser decides how much a photo still says. These checks are made and told
# then, and pass.
ONLY_FOR_ENROLMENT = frozenset({"eyes_closed", "distorted"})


@dataclass(frozen=True)
class CheckedFace:
    """The photo's one face, the passed checks, and what the network reads in the face."""

    face: Face
    checks: list[Check]
    attributes: FaceAttributes


def check_photo(
    image: Pixels,
    faces: Sequence[Face],
    limits: Settings,
    reader: AttributeReader,
    reduced_by: int = 1,
    *,
    enrols: bool = True,
) -> CheckedFace:
    """Make all checks of one photo.

    Args:
        image: uint8[h, w, 3], BGR, upright; a reduced copy has at least `MEASURABLE_INTER_EYE_PX` between the eyes.
        faces: the faces that the engine found in it, widest first.
        limits: the settings' limits.
        reader: tells what covers the face, and the rest of `FaceAttributes`.
        reduced_by: how many times as wide and as high the photo itself is.
        enrols: whether the photo is to be stored; otherwise `ONLY_FOR_ENROLMENT` refuses nobody.

    Raises:
        FaceError: status 422 with the first failed check's code, and all checks in `fields["checks"]`.
    """
    face, alone = require_single_face(faces, limits)
    try:
        found = measure(image, face, reader, reduced_by)
        checks = [alone, *judge(found, limits)]
    except (ValueError, cv2.error) as error:
        raise refusal([alone, _check("landmarks_hidden", None, {"max": limits.max_hidden}, False)]) from error
    if not enrols:
        checks = [replace(one, passed=True, hint=None) if one.code in ONLY_FOR_ENROLMENT else one for one in checks]
    if not all(check.passed for check in checks):
        raise refusal(checks)
    return CheckedFace(face, checks, found.attributes)


def _within_limit(check: Check) -> bool:
    ((bound, limit),) = check.required.items()
    return check.measured is not None and (check.measured <= limit if bound == "max" else check.measured >= limit)


def photo_quality(checks: Sequence[Check]) -> float:
    """How good a photo is for being compared with others, 0...1 (higher is better), from its passed checks.

    The sharpness score (100, a usual photo, counts like more) times the cosines of yaw and pitch: a sharp face that
    looks at the camera. No setting enters, so figures of different days can be compared. `sharpness` has the
    measurement of its part. Of 165 press photos of 30 people, which are all sharp, the best photo of each person missed
    1 of 103 others, and the worst photo missed 3; the figure and the mean similarity have a rank correlation of 0.14.
    A photo that `ONLY_FOR_ENROLMENT` would have refused has the quality 0: it is better than no stored one.
    """
    if not all(_within_limit(check) for check in checks):
        return 0.0
    measured = {check.code: check.measured or 0.0 for check in checks}
    turned = math.cos(math.radians(measured["head_turned"])) * math.cos(
        math.radians(measured["head_raised_or_lowered"])
    )
    return min(1.0, measured["blurred"] / 100) * max(0.0, turned)


def liveness_check(score: float | None, settings: Settings) -> Check:
    """The liveness check of a face.

    Args:
        score: the probability that the face is live; None, which fails, if it could not be assessed.
        settings: their MIN_LIVENESS is the lowest probability of a live face.
    """
    required = {"min": settings.min_liveness}
    if score is None:
        return Check("liveness_not_assessed", False, None, required, HINTS["liveness_not_assessed"])
    passed = score >= settings.min_liveness
    return Check("not_live", passed, round(score, 4), required, None if passed else HINTS["not_live"])


def cannot_be_embedded(checks: Sequence[Check]) -> FaceError:
    """The refusal of a face that passed all checks but whose landmarks cannot be aligned."""
    unmeasured = next(check for check in checks if check.code == "landmarks_hidden")
    failed = _check("landmarks_hidden", None, unmeasured.required, False)
    return refusal([failed if check is unmeasured else check for check in checks])


def refusal(checks: Sequence[Check]) -> FaceError:
    """The error that refuses a photo; at least one of its checks has failed."""
    first = next(check for check in checks if not check.passed)
    return FaceError(first.code, fields={"checks": as_json(checks)})


def as_json(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """The checks as the API lists them."""
    return [dict(vars(check)) for check in checks]
