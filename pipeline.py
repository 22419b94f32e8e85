"""Takes a photo through the stages to its template: decode, detect, check, embed. Each stage runs at most once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import cv2

import face_checks
from challenge.judge import judge, look_at, require_frame_count
from challenge.steps import MAX_FRAME_BYTES, MAX_FRAME_PIXELS, Attempt
from engines.base import ENOUGH_SIDE, FRAME_SIDE, Engine, Face, Template
from engines.face_attributes import AttributeReader
from engines.liveness import Liveness
from engines.model_slots import NOBODY, Client, ModelSlots
from engines.restoration import restored
from errors import SENTENCES, FaceError
from face_checks import Check, CheckedFace
from photos.decoding_cost import decoding_seconds
from photos.pixels import Photo, Pixels
from settings import Settings


@dataclass
class Trace:
    """Notes about one photo on its way.

    Attributes:
        stages_ms: stage -> milliseconds of wall time.
        figures: `similarity` or `liveness` -> what was measured; None where it could not be.
        quality: of the latest photo that passed every check, as `face_checks.photo_quality`; None before.
        restored: the templates of the face as `restored` gives it, if the photo is to enrol somebody new.
    """

    stages_ms: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float | None] = field(default_factory=dict)
    quality: float | None = None
    restored: Sequence[Template] = ()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.stages_ms[name] = round(1000 * (time.perf_counter() - begun), 1)


@dataclass(frozen=True)
class Analysis:
    """The checks' result for one photo.

    Attributes:
        code: the first failed check's, None if every check passed.
        checks: every check that was made, as the API lists them.
        size: width and height of the upright photo in pixels.
        faces: every face found, widest first, in pixels of that size.
    """

    code: str | None
    checks: list[dict[str, Any]]
    size: tuple[int, int]
    faces: list[Face]


@dataclass(frozen=True)
class Pipeline:
    """From a photo's bytes to the template of its one face. A stage runs only if the one before it passed."""

    settings: Settings
    engine: Engine
    reader: AttributeReader
    slots: ModelSlots
    decode: Callable[..., Photo]
    liveness: Liveness | None = None

    def template(
        self,
        data: bytes,
        trace: Trace | None = None,
        *,
        client: Client = NOBODY,
        enrols: bool = True,
        new_person: bool = False,
        picture: bool = False,
        attempt: Attempt | None = None,
    ) -> Template:
        """Decode, detect, check and embed; then judge the frames of a challenge.

        Args:
            data: an upload's bytes.
            trace: gets the stages' times, the figures and the quality.
            client: who sent the photo; clients take turns.
            enrols: whether the template is to be stored, as in `face_checks.check_photo`.
            new_person: whether the photo is to enrol somebody new: then `trace.restored` is made where it is needed.
            picture: whether the photo may show a picture of a face, such as a card's portrait: then liveness is not
                checked, and the limits are those of `face_checks.limits_for_pictures`.
            attempt: a challenge's steps and the frames that show the person doing them.

        Raises:
            FaceError: the codes of `photos.decode.decode` and `face_checks.check_photo`; `overloaded`;
                `challenge_failed`; `not_live`.
        """
        trace = trace or Trace()
        with self._slot(data, client):
            photo, faces = self._detect(data, trace)
            limits = face_checks.limits_for_pictures(self.settings) if picture else self.settings
            photo, faces = self._enlarge(data, photo, faces, trace, limits)
            found = self._check(photo, faces, None if picture else self.liveness, trace, limits, enrols=enrols)
            with trace.stage("embed"):
                try:
                    template = self.engine.embed(photo.pixels, found.face)
                    trace.restored = self._restored(photo, found) if new_person else ()
                except (ValueError, cv2.error) as error:
                    raise face_checks.cannot_be_embedded(found.checks) from error
            if attempt is not None:
                with trace.stage("challenge"):
                    self._judge_attempt(attempt, template, found.checks, trace)
            trace.quality = face_checks.photo_quality(found.checks)
            return template

    def _restored(self, photo: Photo, found: CheckedFace) -> list[Template]:
        faces = restored(photo.pixels, found.face, found.attributes)
        return [self.engine.embed(part, face) for part, face in faces]

    def _judge_attempt(self, attempt: Attempt, template: Template, checks: list[Check], trace: Trace) -> None:
        """Look at the frames of a challenge; FaceError as `template`, with the photo's checks before the frames'."""
        require_frame_count(attempt)
        pictures = [self._frame(number, data) for number, data in enumerate(attempt.frames, 1)]
        frames = look_at(pictures, self.engine, self.reader)
        outcome = judge(frames, attempt.steps, template, self.engine, self.settings)
        trace.figures.update(outcome.figures)
        if not all(check.passed for check in outcome.checks):
            raise face_checks.refusal([*checks, *outcome.checks])

    def _frame(self, number: int, data: bytes) -> Pixels:
        """One frame, small; a refusal says which frame it was."""
        try:
            photo = self.decode(
                data,
                max_bytes=MAX_FRAME_BYTES,
                max_pixels=min(MAX_FRAME_PIXELS, self.settings.max_image_pixels),
                longest_side=FRAME_SIDE,
            )
        except FaceError as error:
            sentence = f"frame_{error.code}"
            raise FaceError(
                error.code,
                sentence if sentence in SENTENCES else error.sentence,
                values={**error.values, "frame": number, "kibibytes": MAX_FRAME_BYTES // 1024},
                fields={**error.fields, "field": "frame", "frame": number},
                headers=error.headers,
            ) from error
        return photo.pixels

    def unchecked_template(self, data: bytes) -> Template:
        """Decode, detect and embed the widest face without any check, to measure the model alone.

        Raises:
            FaceError: the codes of `photos.decode.decode`; `no_face`; `landmarks_hidden`: the face cannot be aligned.
        """
        trace = Trace()
        with self._slot(data, NOBODY):
            photo, faces = self._detect(data, trace)
            photo, (face,) = self._enlarge(data, photo, faces[:1], trace, self.settings)
            with trace.stage("embed"):
                try:
                    return self.engine.embed(photo.pixels, face)
                except (ValueError, cv2.error) as error:
                    raise FaceError("landmarks_hidden") from error

    def analysis(self, data: bytes, trace: Trace | None = None, *, client: Client = NOBODY) -> Analysis:
        """Decode, detect and check. A photo that fails a check is a result here, not an error.

        Args:
            data, trace, client: as in `template`.

        Raises:
            FaceError: the codes of `photos.decode.decode`; `overloaded`.
        """
        trace = trace or Trace()
        with self._slot(data, client):
            photo, faces = self._detect(data, trace)
            try:
                photo, faces = self._enlarge(data, photo, faces, trace, self.settings)
                found = self._check(photo, faces, self.liveness, trace, self.settings)
                code, checks = None, face_checks.as_json(found.checks)
            except FaceError as refusal:
                if "checks" not in refusal.fields:
                    raise
                code, checks = refusal.code, refusal.fields["checks"]
        shown = photo.turned(-photo.quarter_turns)  # a client shows the file as it lies
        return Analysis(
            code=code,
            checks=checks,
            size=shown.size,
            faces=[face.enlarged(photo.reduced_by).turned(-photo.quarter_turns, photo.size) for face in faces],
        )

    def _slot(self, data: bytes, client: Client) -> AbstractContextManager[None]:
        return self.slots.slot(client, decoding_seconds(data, self.settings.max_image_pixels))

    def _detect(self, data: bytes, trace: Trace) -> tuple[Photo, list[Face]]:
        """The photo, reduced as far as detection allows, and the faces in it."""
        with trace.stage("decode"):
            photo = self._decode(data, ENOUGH_SIDE)
        with trace.stage("detect"):
            faces = self.engine.detect(photo.pixels)
        turns = faces[0].quarter_turns if faces else 0
        if turns:  # the file's picture lies on its side or on its head, and no EXIF says so
            size = photo.pixels.shape[1], photo.pixels.shape[0]
            photo, faces = photo.turned(turns), [face.turned(turns, size) for face in faces]
        return photo, faces

    def _enlarge(
        self, data: bytes, photo: Photo, faces: list[Face], trace: Trace, limits: Settings
    ) -> tuple[Photo, list[Face]]:
        """Decode the photo again, larger, if its one face is too small in the reduced copy to be measured."""
        face, _ = face_checks.require_single_face(faces, limits)
        missing = face_checks.MEASURABLE_INTER_EYE_PX / max(1.0, face.inter_eye)
        if missing <= 1 or photo.reduced_by == 1:
            return photo, faces
        with trace.stage("decode_larger"):
            larger = self._decode(data, missing * max(photo.pixels.shape)).turned(photo.quarter_turns)
        return larger, [one.enlarged(photo.reduced_by / larger.reduced_by) for one in faces]

    def _check(
        self,
        photo: Photo,
        faces: list[Face],
        liveness: Liveness | None,
        trace: Trace,
        limits: Settings,
        *,
        enrols: bool = True,
    ) -> CheckedFace:
        """Make every check, liveness last; raises as `face_checks.check_photo`."""
        with trace.stage("check"):
            found = face_checks.check_photo(photo.pixels, faces, limits, self.reader, photo.reduced_by, enrols=enrols)
        if liveness is not None:
            with trace.stage("liveness"):
                live = face_checks.liveness_check(liveness.score(photo.pixels, found.face), self.settings)
            trace.figures["liveness"] = live.measured
            if self.settings.liveness == "enforce":
                found.checks.append(live)
                if not live.passed:
                    raise face_checks.refusal(found.checks)
        return found

    def _decode(self, data: bytes, longest_side: float) -> Photo:
        limits = self.settings
        return self.decode(
            data, max_bytes=limits.max_file_bytes, max_pixels=limits.max_image_pixels, longest_side=longest_side
        )
