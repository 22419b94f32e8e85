"""Owns a photo's way through the models: how many at once, in which stages, and how long each took."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cv2

import face_checks
from engines.base import ENOUGH_SIDE, Engine, Face, Template
from engines.face_attributes import AttributeReader
from engines.liveness import Liveness
from errors import FaceError
from face_checks import Check
from photos import decode as images
from photos.decode import Photo
from settings import Settings


class ModelSlots:
    """How many photos are in the models at once, and how many requests may wait for that, in the order of asking."""

    def __init__(self, slots: int, queue_limit: int) -> None:
        self._slots, self._places = slots, slots + queue_limit
        self._lock = threading.Lock()
        self._in_place = self._in_slot = 0
        self._waiting: deque[threading.Event] = deque()

    def queue(self) -> tuple[int, int]:
        """How many wait for a slot, and how many hold one."""
        with self._lock:
            return max(0, self._in_place - self._in_slot), self._in_slot

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the bounded queue; FaceError `overloaded` when it is full."""
        with self._lock:
            if self._in_place == self._places:
                raise FaceError("overloaded", headers={"Retry-After": "2"})
            self._in_place += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_place -= 1

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of the slots, waiting for it; only with a place."""
        turn = threading.Event()
        with self._lock:
            if self._in_slot < self._slots:
                self._in_slot += 1
                turn.set()
            else:
                self._waiting.append(turn)
        try:
            turn.wait()
            yield
        finally:
            with self._lock:
                if not turn.is_set():  # interrupted while it waited
                    self._waiting.remove(turn)
                elif self._waiting:
                    # Handed on, not given back: a semaphore lets whoever comes just then in before those who wait.
                    self._waiting.popleft().set()
                else:
                    self._in_slot -= 1


@dataclass
class Trace:
    """What is kept of one photo's way: how long each stage took, and what the checks measured.

    Attributes:
        stages_ms: stage -> milliseconds of wall time.
        figures: check or comparison -> what was measured; None where it could not be.
    """

    stages_ms: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float | None] = field(default_factory=dict)

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
    """What the checks make of one photo.

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
    """From a photo's bytes to the template of its one face: each stage once, and only when the one before it passed."""

    settings: Settings
    engine: Engine
    reader: AttributeReader
    slots: ModelSlots
    liveness: Liveness | None = None
    decode: Callable[..., Photo] = images.decode

    def template(self, data: bytes, trace: Trace | None = None, *, picture: bool = False) -> Template:
        """Decode, detect, check and embed.

        Args:
            data: an upload's bytes.
            trace: is told of the stages and figures.
            picture: whether it may show a picture of a face, such as a card's portrait: liveness is not asked then.

        Raises:
            FaceError: the codes of `images.decode` and `face_checks.check_photo`.
        """
        trace = trace or Trace()
        with self.slots.slot():
            photo, faces = self._found(data, trace)
            photo, faces = self._close_enough(data, photo, faces, trace)
            face, checks = self._checked(photo, faces, None if picture else self.liveness, trace)
            with trace.stage("embed"):
                try:
                    return self.engine.embed(photo.pixels, face)
                except ValueError as error:
                    raise face_checks.cannot_be_embedded(checks) from error

    def unchecked_template(self, data: bytes) -> Template:
        """Decode, detect and embed the widest face, whatever the checks would say of it: to measure the model alone.

        Raises:
            FaceError: the codes of `images.decode`, `no_face`, and `landmarks_hidden`: nothing to embed.
        """
        trace = Trace()
        with self.slots.slot():
            photo, faces = self._found(data, trace)
            photo, (face,) = self._close_enough(data, photo, faces[:1], trace)
            with trace.stage("embed"):
                try:
                    return self.engine.embed(photo.pixels, face)
                except (ValueError, cv2.error) as error:
                    raise FaceError("landmarks_hidden") from error

    def analysis(self, data: bytes, trace: Trace | None = None) -> Analysis:
        """Decode, detect and check; a photo that the checks refuse is an answer here, not an error.

        Raises:
            FaceError: the codes of `images.decode`.
        """
        trace = trace or Trace()
        with self.slots.slot():
            photo, faces = self._found(data, trace)
            try:
                photo, faces = self._close_enough(data, photo, faces, trace)
                _, passed = self._checked(photo, faces, self.liveness, trace)
                code, checks = None, face_checks.as_json(passed)
            except FaceError as refusal:
                if "checks" not in refusal.fields:
                    raise
                code, checks = refusal.code, refusal.fields["checks"]
                trace.figures.update({check["code"]: check["measured"] for check in checks})
        return Analysis(
            code=code,
            checks=checks,
            size=photo.size,
            faces=[face.enlarged(photo.reduced_by) for face in faces],
        )

    def _checked(
        self, photo: Photo, faces: list[Face], liveness: Liveness | None, trace: Trace
    ) -> tuple[Face, list[Check]]:
        """Pass the photo through every gate, liveness last; raises as `face_checks.check_photo`."""
        with trace.stage("check"):
            face, checks = face_checks.check_photo(photo.pixels, faces, self.settings, self.reader, photo.reduced_by)
        figures = {check.code: check.measured for check in checks}
        if liveness is not None:
            with trace.stage("liveness"):
                live = face_checks.liveness_check(liveness.score(photo.pixels, face), self.settings)
            figures["liveness"] = live.measured
            if self.settings.liveness == "enforce":
                checks.append(live)
                if not live.passed:
                    raise face_checks.refusal(checks)
        trace.figures.update(figures)
        return face, checks

    def _found(self, data: bytes, trace: Trace) -> tuple[Photo, list[Face]]:
        """The photo, reduced as far as detection allows, and the faces in it."""
        with trace.stage("decode"):
            photo = self._decode(data, ENOUGH_SIDE)
        with trace.stage("detect"):
            return photo, self.engine.detect(photo.pixels)

    def _decode(self, data: bytes, longest_side: float) -> Photo:
        limits = self.settings
        return self.decode(
            data, max_bytes=limits.max_file_bytes, max_pixels=limits.max_image_pixels, longest_side=longest_side
        )

    def _close_enough(self, data: bytes, photo: Photo, faces: list[Face], trace: Trace) -> tuple[Photo, list[Face]]:
        """Decode again, larger, where the one face turned out too small in the reduced copy to be measured."""
        face, _ = face_checks.require_single_face(faces, self.settings)
        missing = face_checks.ENOUGH_INTER_EYE / max(1.0, face.inter_eye)
        if missing <= 1 or photo.reduced_by == 1:
            return photo, faces
        with trace.stage("decode_larger"):
            larger = self._decode(data, missing * max(photo.pixels.shape))
        return larger, [one.enlarged(photo.reduced_by / larger.reduced_by) for one in faces]
