"""The judge of a challenge, with the compact model and frames of the packaged astronaut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.turning_faces import as_sent
from bootstrap import load_engine
from challenge.judge import MIN_UNEVEN, Outcome, judge, look_at, require_frame_count
from challenge.motion import Frame, Track
from challenge.steps import CLOSER, LEFT, MAX_FRAMES, ORDERS, RIGHT, STRAIGHT, Attempt
from engines.base import Engine, Template
from engines.face_attributes import FaceAttributes, FaceAttributesModel
from errors import FaceError
from face_checks import NEARER_HINTS
from photos.pixels import Pixels
from settings import PROJECT, Settings
from tests.support.fakes import ScriptedAttributes, packaged_photo
from tests.support.filming import astronaut, frames_of

STEPS = (STRAIGHT, LEFT, CLOSER, RIGHT, LEFT)
Judge = Callable[..., Outcome]
READER = FaceAttributesModel(PROJECT / "models")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("models")
    return load_engine("compact", models_dir=folder, hub_timeout_s=0, threads=1, may_fall_back=False)


@pytest.fixture(scope="module")
def judged(engine: Engine) -> Judge:
    photo, face = astronaut()
    of_the_photo = engine.embed(photo, face)

    def judge_frames(
        frames: Sequence[bytes], steps: Sequence[str] = STEPS, template: Template = of_the_photo
    ) -> Outcome:
        return judge([seen(engine, data) for data in frames], steps, template, engine, Settings())

    return judge_frames


def test_a_frame_is_glanced_at_and_not_read_twice_as_a_photo_is(engine: Engine) -> None:
    class GlancesOnly(ScriptedAttributes):
        def read(self, aligned: Pixels) -> FaceAttributes:
            raise AssertionError(aligned.shape)

    reader = GlancesOnly()
    (frame,) = frames_of([STRAIGHT])
    assert look_at([pixels_of(frame)], engine, reader)[0].attributes is reader.seen


def seen(engine: Engine, data: bytes) -> Frame:
    return look_at([pixels_of(data)], engine, READER)[0]


def pixels_of(data: bytes) -> Pixels:
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), np.uint8)


def failed(outcome: Outcome) -> list[str]:
    """The names of the failed checks, without those that were not made."""
    return [name for name, check in zip(outcome.figures, outcome.checks, strict=True) if not check.passed]


@pytest.mark.parametrize("steps", ORDERS[::5], ids=" ".join)
def test_a_person_who_does_the_steps_passes_every_check(judged: Judge, steps: tuple[str, ...]) -> None:
    outcome = judged(frames_of(steps), steps)
    assert failed(outcome) == []
    codes = [check.code for check in outcome.checks]
    assert codes == ["challenge_failed"] * 7 + ["not_live"] * 3 + ["challenge_failed"]


@pytest.mark.parametrize("what", ["flat", "bent", "folded"])
@pytest.mark.parametrize("turn_deg", [25.0, 40.0, 55.0])
def test_a_print_that_is_turned_and_moved_closer_does_not_pass(judged: Judge, what: str, turn_deg: float) -> None:
    assert failed(judged(frames_of(STEPS, what, turn_deg=turn_deg))) != []


def test_a_print_folded_along_the_nose_is_refused_only_because_its_halves_are_flat(judged: Judge) -> None:
    outcome = judged(frames_of(STEPS, "folded", turn_deg=45.0))
    assert failed(outcome) == ["challenge_folded"]
    (refused,) = [check for check in outcome.checks if not check.passed]
    assert (refused.code, refused.hint) == ("not_live", NEARER_HINTS["challenge_relief"])


def test_every_other_order_of_steps_is_refused(judged: Judge) -> None:
    frames = frames_of(STEPS)
    assert [steps for steps in ORDERS if not failed(judged(frames, steps))] == [STEPS]


def test_frames_out_of_order_are_refused(judged: Judge) -> None:
    frames = frames_of(STEPS)
    frames[1], frames[3] = frames[3], frames[1]
    assert failed(judged(frames)) == ["challenge_steps"]


def test_a_step_that_is_missing_or_not_asked_for_is_refused(judged: Judge) -> None:
    frames = frames_of(STEPS)
    without = judged([*frames[:2], frames_of(STEPS, seed=1)[1], *frames[3:]])
    assert failed(without) == ["challenge_steps"]
    one_more = judged(frames_of([*STEPS, RIGHT]))
    assert failed(one_more) == ["challenge_steps"]


def test_several_frames_of_a_step_are_welcome(judged: Judge) -> None:
    every_twice = [frame for pair in zip(frames_of(STEPS), frames_of(STEPS, seed=1), strict=True) for frame in pair]
    assert "challenge_steps" not in failed(judged(every_twice))


def saved_again(pixels: Pixels, quality: int = 90) -> bytes:
    return bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


def recoloured(pixels: Pixels, curve: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> Pixels:
    """The picture with other light: `curve` of 0...1."""
    return np.asarray(np.clip(255 * curve(pixels / 255), 0, 255), np.uint8)


@pytest.mark.parametrize(
    "changed",
    [
        saved_again,
        lambda frame: saved_again(frame, 85),
        lambda frame: saved_again(np.asarray(cv2.resize(frame, None, fx=1.1, fy=1.1), np.uint8)),
        lambda frame: saved_again(np.asarray(cv2.add(frame, np.full_like(frame, 6)), np.uint8)),
        lambda frame: saved_again(recoloured(frame, lambda light: 1.1 * light - 0.05)),
        lambda frame: saved_again(recoloured(frame, lambda light: 0.7 * light + 0.1), 75),
        lambda frame: saved_again(recoloured(frame, lambda light: light**1.2)),
        lambda frame: saved_again(recoloured(frame, lambda light: light * (1.1, 1.0, 0.9))),
        lambda frame: as_sent(frame, np.random.default_rng(1), quality=90, noise=2),
    ],
    ids=["as it is", "saved again", "larger", "lighter", "contrast", "flat", "gamma", "tinted", "noisier"],
)
@pytest.mark.parametrize("number", [0, -1])
def test_one_frame_sent_twice_is_refused_whatever_was_done_to_it(
    judged: Judge, changed: Callable[[Pixels], bytes], number: int
) -> None:
    frames = frames_of(STEPS)
    twice = changed(pixels_of(frames[number]))
    sent = [twice, *frames] if number == 0 else [*frames, twice]
    assert failed(judged(sent)) == ["challenge_repeated"]


def test_one_turn_sent_for_two_is_refused_though_its_light_is_very_different(judged: Judge) -> None:
    frames = frames_of(STEPS)
    frames[-1] = saved_again(recoloured(pixels_of(frames[1]), lambda light: 1.3 * light - 0.15), 75)
    assert "challenge_repeated" in failed(judged(frames))


def test_a_face_that_moves_by_a_pixel_makes_a_new_frame(judged: Judge) -> None:
    frames = frames_of(STEPS)
    moved = as_sent(np.roll(pixels_of(frames[0]), 1, axis=1), np.random.default_rng(1))
    assert failed(judged([moved, *frames])) == []


def sheared(frame: Pixels) -> Pixels:
    height, width = frame.shape[:2]
    matrix = np.array([[1, 0.08, -0.04 * height], [0, 1, 0]])
    return np.asarray(cv2.warpAffine(frame, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE), np.uint8)


def lit_from_above(frame: Pixels) -> Pixels:
    return np.asarray(np.clip(frame * np.linspace(1.25, 0.75, len(frame))[:, None, None], 0, 255), np.uint8)


@pytest.mark.parametrize(
    "held",
    [lambda frame: frame, sheared, lambda frame: cv2.resize(frame, None, fx=0.9, fy=1), lit_from_above],
    ids=["as it is", "askew", "narrower", "lit from above"],
)
def test_a_side_view_and_its_mirror_image_do_not_show_two_sides(
    judged: Judge, held: Callable[[Pixels], Pixels]
) -> None:
    frames = frames_of(STEPS)
    mirrored = np.ascontiguousarray(pixels_of(frames[1])[:, ::-1])
    frames[STEPS.index(RIGHT)] = as_sent(np.asarray(held(mirrored), np.uint8), np.random.default_rng(1))
    assert "challenge_mirrored" in failed(judged(frames))


def test_sides_without_any_detail_are_not_taken_for_two_sides(engine: Engine) -> None:
    frames = [seen(engine, data) for data in frames_of(STEPS)]
    track = Track(frames)
    assert track.follow(STEPS)
    sides = track.sides()
    assert sides is not None
    assert track.uneven(sides) > MIN_UNEVEN
    without = Track([replace(frame, aligned=np.full((160, 160, 3), 127, np.uint8)) for frame in frames])
    assert without.uneven(sides) == 0.0


def test_a_cut_to_another_place_or_another_light_is_refused(judged: Judge) -> None:
    frames = frames_of(STEPS)
    moved = np.full_like(pixels_of(frames[1]), 127)
    small = cv2.resize(pixels_of(frames[1]), None, fx=0.55, fy=0.55, interpolation=cv2.INTER_AREA)
    moved[-small.shape[0] :, -small.shape[1] :] = small
    dark = (pixels_of(frames[1]) * 0.5).astype(np.uint8)
    random = np.random.default_rng(0)
    for cut, name in ((moved, "challenge_shift"), (dark, "challenge_cut")):
        assert name in failed(judged([frames[0], as_sent(cut, random), *frames[2:]]))


def test_somebody_elses_head_is_refused(judged: Judge, engine: Engine) -> None:
    other = packaged_photo("insightface", "data", "images", "t1.jpg")
    template = engine.embed(other, engine.detect(other)[0])
    assert failed(judged(frames_of(STEPS), template=template)) == ["challenge_person"]


def test_a_frame_between_two_steps_may_miss_the_face_but_no_step_may(judged: Judge) -> None:
    frames = frames_of(STEPS)
    empty = as_sent(np.full((480, 360, 3), 127, np.uint8), np.random.default_rng(0))
    assert failed(judged([*frames[:2], empty, *frames[2:]])) == []
    assert failed(judged([*frames[:2], empty, *frames[3:]])) == ["challenge_faces"]


def test_a_second_person_in_a_frame_is_refused_and_nothing_else_is_measured(judged: Judge) -> None:
    frames = frames_of(STEPS)
    both = np.tile(pixels_of(frames[2]), (1, 2, 1))
    outcome = judged([*frames[:2], as_sent(both, np.random.default_rng(0)), *frames[3:]])
    assert "challenge_alone" in failed(outcome)
    assert len(outcome.checks) == 2


def test_every_failed_check_says_what_to_do_and_the_limit_that_it_missed(judged: Judge) -> None:
    for check in judged(frames_of(STEPS, "flat")).checks:
        assert check.measured is not None
        assert (check.hint is None) == check.passed
        within = check.measured >= check.required.get("min", -np.inf)
        assert (within and check.measured <= check.required.get("max", np.inf)) == check.passed


@pytest.mark.parametrize("count", [0, len(STEPS) - 1, MAX_FRAMES + 1])
def test_too_few_or_too_many_frames_are_refused_before_any_is_decoded(count: int) -> None:
    with pytest.raises(FaceError) as refused:
        require_frame_count(Attempt("", STEPS, (b"",) * count))
    assert refused.value.code == "challenge_failed"
    assert refused.value.fields["checks"][0]["measured"] == count


@pytest.mark.parametrize("slope", [0.0, 0.5])
@pytest.mark.parametrize("number", range(len(STEPS)))
def test_landmarks_on_one_line_are_no_face_that_can_be_followed(engine: Engine, slope: float, number: int) -> None:
    frames = [seen(engine, data) for data in frames_of(STEPS)]
    across = 100 + 20 * np.arange(5, dtype=np.float32)
    face = replace(frames[number].faces[0], landmarks=np.column_stack([across, slope * across]))
    frames[number] = replace(frames[number], faces=[face])
    outcome = judge(frames, STEPS, np.ones(engine.dimension, np.float32), engine, Settings())
    assert failed(outcome) == ["challenge_faces"]


def test_degenerate_landmarks_crash_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [seen(engine, data) for data in frames_of(STEPS)]
    for landmarks in (np.zeros((5, 2)), np.full((5, 2), np.nan), np.tile([[1.0, 2.0]], (5, 1)), -np.ones((5, 2)) * 1e9):
        odd = replace(frames[1].faces[0], landmarks=landmarks.astype(np.float32))
        monkeypatch.setattr(engine, "detect_in_frame", lambda _, odd=odd: [odd])
        broken = [frames[0], *look_at([frames[1].pixels], engine, READER), *frames[2:]]
        outcome = judge(broken, STEPS, np.ones(engine.dimension, np.float32), engine, Settings())
        assert failed(outcome) != []
