"""The gates: what each measures, what it must not mind, and how a refusal is told."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
import pytest

import face_checks
from benchmarks.challenges import head_pose
from engines.base import MEAN_FACE, Face
from engines.face_attributes import FaceAttributes
from errors import FaceError
from face_checks import check_photo, judge, measure, pose_of
from photos.pixels import Pixels
from settings import Settings
from tests.support.fakes import PORTRAIT_FACE, ScriptedAttributes, a_face, a_photo, a_portrait

LIMITS = Settings()
# The order in which api.md lists the reasons of a refusal.
POSES = [(0, 0, 0), (30, 0, 0), (-30, 0, 0), (0, 20, 0), (0, -20, 0), (0, 0, 30)]
ORDER = [
    "multiple_faces",
    "face_too_small",
    "face_too_large",
    "face_cut_off",
    "blurred",
    "too_dark",
    "too_bright",
    "low_contrast",
    "uneven_light",
    "head_tilted",
    "head_turned",
    "head_raised_or_lowered",
    "unnatural_colour",
    "mask",
    "sunglasses",
    "face_covered",
    "landmarks_hidden",
    "eyes_closed",
    "distorted",
]


@pytest.fixture(scope="module")
def portrait() -> Pixels:
    return a_portrait()


def codes_of(
    image: Pixels, face: Face | None = None, seen: FaceAttributes | None = None, limits: Settings = LIMITS
) -> list[str]:
    """The codes of the checks that one face in `image` fails."""
    reader = ScriptedAttributes()
    reader.seen = seen or reader.seen
    try:
        check_photo(image, [face or a_face()], limits, reader)
    except FaceError as error:
        return [check["code"] for check in error.fields["checks"] if not check["passed"]]
    return []


def turned(yaw: float, pitch: float, roll: float) -> Face:
    """A mean face seen from far away after turning it; degrees."""
    y, p, r = np.deg2rad([yaw, pitch, roll])
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(p), -np.sin(p)], [0, np.sin(p), np.cos(p)]])
    about_z = np.array([[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]])
    points = (about_z @ about_x @ about_y @ MEAN_FACE.T).T[:, :2] * 60 + (160, 140)
    return Face(a_face().box, 0.9, points.astype(np.float32))


def test_a_good_photo_passes_every_check_and_each_is_reported_in_the_order_of_the_api() -> None:
    found = check_photo(a_photo(), [a_face()], LIMITS, ScriptedAttributes())
    assert [check.code for check in found.checks] == ORDER
    assert all(check.passed and check.hint is None and check.measured is not None for check in found.checks)
    assert found.face is not None


@pytest.mark.parametrize(("yaw", "pitch", "roll"), POSES)
def test_head_pose_is_recovered_from_five_landmarks_(yaw: float, pitch: float, roll: float) -> None:
    pose = head_pose(turned(yaw, pitch, roll))
    assert (pose.yaw, pose.pitch, pose.roll) == pytest.approx((yaw, pitch, roll), abs=4)


@pytest.mark.parametrize("roll_deg", [-120, -30, 0, 8, 45, 90])
def test_the_roll_is_the_turn_of_the_landmarks_and_what_the_network_still_sees_of_it(roll_deg: float) -> None:
    pose = pose_of(a_face(roll_deg=roll_deg), FaceAttributes(yaw=12, pitch=-7, roll=3))
    assert (pose.yaw, pose.pitch, pose.roll) == pytest.approx((12, -7, roll_deg + 3), abs=0.1)


@pytest.mark.parametrize(
    ("seen", "roll_deg", "code"),
    [
        (FaceAttributes(yaw=60), 0, "head_turned"),
        (FaceAttributes(yaw=-60), 0, "head_turned"),
        (FaceAttributes(pitch=60), 0, "head_raised_or_lowered"),
        (FaceAttributes(), 55, "head_tilted"),
    ],
)
def test_a_head_far_from_upright_and_frontal_is_refused(seen: FaceAttributes, roll_deg: float, code: str) -> None:
    assert codes_of(a_photo(), a_face(roll_deg=roll_deg), seen) == [code]


def hint_of(code: str, image: Pixels, face: Face, limits: Settings = LIMITS, seen: FaceAttributes | None = None) -> str:
    reader = ScriptedAttributes()
    reader.seen = seen or reader.seen
    with pytest.raises(FaceError) as refused:
        check_photo(image, [face], limits, reader)
    (hint,) = [str(check["hint"]) for check in refused.value.fields["checks"] if check["code"] == code]
    return hint


def test_whoever_looks_down_is_told_to_raise_the_chin() -> None:
    down, up, strict = FaceAttributes(pitch=35), FaceAttributes(pitch=-35), Settings(max_pitch_deg=25)
    code, photo, face = "head_raised_or_lowered", a_photo(), a_face()
    assert hint_of(code, photo, face, strict, down) == face_checks.NEARER_HINTS["chin_up"]
    assert hint_of(code, photo, face, strict, up) == face_checks.NEARER_HINTS["chin_down"]


@pytest.mark.parametrize(
    "seen",
    [
        FaceAttributes(stretch=1.01 * LIMITS.max_stretch),
        FaceAttributes(stretch=0.99 / LIMITS.max_stretch),
        FaceAttributes(likeness=LIMITS.min_likeness - 0.01),
        FaceAttributes(damaged=LIMITS.max_damage + 0.01),
    ],
)
def test_a_photo_that_was_changed_to_look_like_nobody_is_refused_as_distorted(seen: FaceAttributes) -> None:
    assert codes_of(a_photo(), seen=seen) == ["distorted"]


def test_shut_eyes_are_refused() -> None:
    assert codes_of(a_photo(), seen=FaceAttributes(eyes_shut=0.99)) == ["eyes_closed"]


def test_who_is_only_compared_may_blink_and_send_a_distorted_photo_and_is_told_what_was_measured() -> None:
    reader = ScriptedAttributes()
    reader.seen = FaceAttributes(eyes_shut=0.99, likeness=-0.5, damaged=0.99)
    checks = check_photo(a_photo(), [a_face()], LIMITS, reader, enrols=False).checks
    assert [check.measured for check in checks if check.code in face_checks.ONLY_FOR_ENROLMENT] == [0.99, -0.5]
    assert all(check.passed and check.hint is None for check in checks)
    assert face_checks.photo_quality(checks) == 0
    reader.seen = FaceAttributes(mask=0.99, eyes_shut=0.99)
    with pytest.raises(FaceError) as refused:
        check_photo(a_photo(), [a_face()], LIMITS, reader, enrols=False)
    assert [check["code"] for check in refused.value.fields["checks"] if not check["passed"]] == ["mask"]


@pytest.mark.parametrize(
    ("seen", "code", "hint"),
    [
        (FaceAttributes(other=0.99, hand=0.9), "face_covered", face_checks.NEARER_HINTS["hand"]),
        (FaceAttributes(hidden=1.0, hand=0.9), "landmarks_hidden", face_checks.NEARER_HINTS["hand"]),
        (FaceAttributes(other=0.99, hand=0.1), "face_covered", face_checks.HINTS["face_covered"]),
        (
            FaceAttributes(other=0.99, hidden=0.9, eyes_hidden=0.9, spectacles=0.9),
            "face_covered",
            face_checks.NEARER_HINTS["glare"],
        ),
        (
            FaceAttributes(other=0.99, hidden=0.9, eyes_hidden=0.1, spectacles=0.9),
            "face_covered",
            face_checks.HINTS["face_covered"],
        ),
        (FaceAttributes(sunglasses=0.4, spectacles=0.9), "sunglasses", face_checks.NEARER_HINTS["glare"]),
        (FaceAttributes(sunglasses=0.99, spectacles=0.6), "sunglasses", face_checks.HINTS["sunglasses"]),
        (FaceAttributes(sunglasses=0.99, spectacles=0.1), "sunglasses", face_checks.HINTS["sunglasses"]),
        (FaceAttributes(eyes_shut=0.99), "eyes_closed", face_checks.HINTS["eyes_closed"]),
    ],
)
def test_the_hint_follows_what_is_seen(seen: FaceAttributes, code: str, hint: str) -> None:
    assert hint_of(code, a_photo(), a_face(), seen=seen) == hint


def test_a_face_in_the_dark_on_its_own_left_is_told_to_light_that_side(portrait: Pixels) -> None:
    on_our_left = np.arange(512)[None, :, None] < 225
    dark_on_our_left = np.where(on_our_left, portrait * 0.06, portrait).astype(np.uint8)
    dark_on_our_right = np.where(on_our_left, portrait, portrait * 0.06).astype(np.uint8)
    assert hint_of("uneven_light", dark_on_our_left, PORTRAIT_FACE) == face_checks.NEARER_HINTS["light_on_right"]
    assert hint_of("uneven_light", dark_on_our_right, PORTRAIT_FACE) == face_checks.NEARER_HINTS["light_on_left"]


@pytest.mark.parametrize(("distance", "roll"), [(30, 0), (60, 20), (300, -15)])
def test_the_aligned_face_has_its_eyes_in_their_places(distance: float, roll: float) -> None:
    size = int(distance * 6)
    face = a_face(distance, (size / 2, size / 2), roll)
    image = np.full((size, size, 3), 90, np.uint8)
    for eye in face.eyes:
        cv2.circle(image, tuple(int(v) for v in eye.round()), int(distance / 8), (255, 255, 255), -1)
    aligned = face_checks.aligned_face(image, face)
    assert aligned.shape == (160, 160, 3)
    rows, columns = np.nonzero(aligned[..., 0] > 180)
    assert rows.mean() == pytest.approx(63.5, abs=1.5)
    assert columns.mean() == pytest.approx(79.5, abs=1.5)
    assert columns.max() - columns.min() == pytest.approx(44 + 11, abs=3)


def test_the_face_region_of_a_rotated_photo_is_in_frame_and_of_a_cropped_one_is_not() -> None:
    photo = a_photo()
    assert face_checks.face_in_frame(photo, a_face(roll_deg=20)) == 1.0
    assert face_checks.face_in_frame(photo, a_face(centre=(0, 140))) == pytest.approx(0.5, abs=0.03)


def test_sharpness_falls_with_blur_in_any_direction_and_not_with_light_or_contrast(portrait: Pixels) -> None:
    grey = cv2.cvtColor(face_checks.aligned_face(portrait, PORTRAIT_FACE), cv2.COLOR_BGR2GRAY)
    sharp = face_checks.sharpness(np.asarray(grey, np.uint8))

    def after(changed: npt.NDArray[np.generic]) -> float:
        return face_checks.sharpness(changed.astype(np.uint8)) / sharp

    assert after(grey * 0.5) == pytest.approx(1, abs=0.1)
    assert after(grey * 0.6 + 80) == pytest.approx(1, abs=0.1)
    assert after(np.asarray(cv2.GaussianBlur(grey, (0, 0), 3))) < 0.4
    assert after(np.asarray(cv2.blur(grey, (9, 1)))) < 0.5
    assert after(np.asarray(cv2.blur(grey, (1, 9)))) < 0.5


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda image: cv2.GaussianBlur(image, (0, 0), 6), "blurred"),
        (lambda image: image * 0.05, "too_dark"),
        (lambda image: image * 2.5, "too_bright"),
        (lambda image: np.full_like(image, 128), "low_contrast"),
        (lambda image: np.where(np.arange(512)[None, :, None] < 225, image * 0.06, image), "uneven_light"),
        (lambda image: image[..., ::-1], "unnatural_colour"),
        (lambda image: np.repeat(image[..., :1], 3, axis=2), "unnatural_colour"),
    ],
    ids=["blur", "dark", "burnt out", "flat", "half in the dark", "blue skin", "monochrome"],
)
def test_a_photo_that_cannot_serve_is_refused_by_the_name_of_its_fault(
    portrait: Pixels, change: Callable[[Pixels], npt.NDArray[np.generic]], code: str
) -> None:
    assert codes_of(portrait, PORTRAIT_FACE) == []
    changed = np.clip(change(portrait), 0, 255).astype(np.uint8)
    assert code in codes_of(changed, PORTRAIT_FACE)


@pytest.mark.parametrize(
    "skin_bgr",
    [(202, 217, 244), (160, 190, 232), (130, 160, 200), (84, 120, 172), (52, 78, 122), (36, 52, 86), (30, 40, 62)],
    ids=["palest", "pale", "light", "olive", "brown", "dark", "darkest"],
)
def test_no_skin_tone_is_refused(skin_bgr: tuple[int, int, int]) -> None:
    grain = np.random.default_rng(3).normal(0, 9, (360, 320, 1))
    assert codes_of(np.clip(np.array(skin_bgr) + grain, 0, 255).astype(np.uint8)) == []


@pytest.mark.parametrize(
    ("seen", "codes"),
    [
        (FaceAttributes(mask=1.0, hidden=LIMITS.max_hidden), ["mask"]),
        (FaceAttributes(sunglasses=1.0, hidden=LIMITS.max_hidden), ["sunglasses"]),
        (FaceAttributes(other=1.0, hidden=LIMITS.max_hidden), ["face_covered"]),
        (FaceAttributes(mask=1.0, sunglasses=1.0), ["mask", "sunglasses"]),
        (FaceAttributes(mask=1.0, hidden=1.0), ["mask", "landmarks_hidden"]),
        (FaceAttributes(hidden=1.0), ["landmarks_hidden"]),
        (
            FaceAttributes(mask=1.0, hidden=1.0, eyes_shut=1.0, likeness=0.0),
            [
                "mask",
                "landmarks_hidden",
                "eyes_closed",
                "distorted",
            ],
        ),
        (FaceAttributes(LIMITS.max_mask, LIMITS.max_sunglasses, LIMITS.max_covered, LIMITS.max_hidden), []),
    ],
)
def test_a_covering_is_refused_by_its_name_and_hidden_landmarks_by_theirs(
    seen: FaceAttributes, codes: list[str]
) -> None:
    assert codes_of(a_photo(), seen=seen) == codes


@pytest.mark.parametrize("mask", [0.0, *(LIMITS.max_mask + beyond for beyond in (-1e-5, 0, 1e-5)), 0.9])
@pytest.mark.parametrize("hidden", [0.5, *(LIMITS.max_hidden + beyond for beyond in (0, 1e-6)), 0.999])
def test_a_check_has_passed_if_and_only_if_what_it_tells_is_within_its_limit(mask: float, hidden: float) -> None:
    covering = ScriptedAttributes()
    covering.seen = FaceAttributes(mask=mask, sunglasses=0.0, other=0.0, hidden=hidden)
    for check in judge(measure(a_photo(), a_face(), covering), LIMITS):
        ((bound, limit),) = check.required.items()
        assert check.measured is not None
        assert check.passed == (check.measured >= limit if bound == "min" else check.measured <= limit), check


def test_a_refusal_names_the_first_failure_and_lists_every_check_with_what_was_measured_and_required() -> None:
    dark = np.clip(a_photo() * 0.05, 0, 255).astype(np.uint8)
    with pytest.raises(FaceError) as caught:
        check_photo(dark, [a_face(inter_eye_distance=12)], LIMITS, ScriptedAttributes())
    checks = {check["code"]: check for check in caught.value.fields["checks"]}
    assert caught.value.code == "face_too_small"
    assert list(checks) == ORDER
    assert checks["face_too_small"]["measured"] == pytest.approx(12, abs=0.5)
    assert checks["face_too_small"]["required"] == {"min": LIMITS.min_inter_eye_px}
    assert checks["face_too_small"]["hint"] == "Come closer to the camera."
    assert not checks["too_dark"]["passed"]


def test_a_face_that_cannot_be_measured_is_refused() -> None:
    face = a_face()
    face.landmarks[:] = np.nan
    assert codes_of(a_photo(), face) == ["landmarks_hidden"]


def test_a_second_face_counts_unless_it_is_much_smaller_than_the_first() -> None:
    person, bystander = [a_face(60), a_face(25)], [a_face(60), a_face(15)]
    with pytest.raises(FaceError, match="multiple_faces"):
        face_checks.require_single_face(person, LIMITS)
    face, check = face_checks.require_single_face(bystander, LIMITS)
    assert face is bystander[0]
    assert check.passed
    with pytest.raises(FaceError, match="multiple_faces"):
        face_checks.require_single_face(bystander, Settings(min_face_ratio=0))


def test_every_code_of_a_check_has_a_hint_and_a_message() -> None:
    from errors import CODES

    challenge = {"challenge_required", "challenge_expired", "challenge_failed"}
    assert {*ORDER, "no_face", "not_live", "liveness_not_assessed", *challenge} == set(face_checks.HINTS)
    assert set(face_checks.HINTS) <= set(CODES)


def test_a_sharper_photo_and_a_straighter_face_have_the_better_quality(portrait: Pixels) -> None:
    def quality(image: Pixels, seen: FaceAttributes | None = None) -> float:
        reader = ScriptedAttributes()
        reader.seen = seen or reader.seen
        return face_checks.photo_quality(check_photo(image, [PORTRAIT_FACE], LIMITS, reader).checks)

    blurred = [np.asarray(cv2.GaussianBlur(portrait, (0, 0), sigma), np.uint8) for sigma in (1.5, 2.0)]
    assert 1 >= quality(portrait) > quality(blurred[0]) > quality(blurred[1]) > 0
    assert quality(portrait, FaceAttributes(yaw=25)) < quality(portrait)
