"""The routes: what each one reads, decides and answers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from flask import Flask, Response, jsonify, request

from api.access import PUBLIC, scope
from api.metrics import Metrics
from api.request_fields import (
    FORM_ALLOWANCE_BYTES,
    challenge_owner,
    read_attempt,
    read_request_key,
    read_threshold,
    read_upload,
    read_user_id,
    receive_form,
    receive_form_with_frames,
    require_user_id,
)
from api.request_log import audit_request, current_record
from api.responses import localised
from api.service_parts import Parts
from challenge.steps import MAX_FRAMES, Attempt, draw_steps
from engines.base import Engine, Template, cosine_of, similarity_of
from errors import FaceError, english
from gallery.decisions import Gallery
from gallery.templates import Candidate
from settings import Settings
from store.challenges import CHALLENGE_SECONDS, new_challenge
from store.documents import utc
from store.records import Person

logger = logging.getLogger(__name__)

# A verified photo is added by itself only if its similarity is so far above the threshold. At 0.5 + 0.15 none of 12,828
# comparisons between 30 people matched (the highest similarity was 0.46), and 69 % of the matches of one person did
# (compact model). docs/concepts.md says what it is good for.
UPDATE_MARGIN = 0.15
# A client that tries five times, as in docs/clients.md, outlasts `store.challenges.IN_USE_SECONDS`, and is told then
# that the challenge is used up.
RETRY_RUNNING_S = "4"


def add_routes(app: Flask, settings: Settings, parts: Parts, metrics: Metrics) -> None:
    """Add every route of the API to `app`."""
    _add_monitoring(app, parts, metrics)
    _add_enrolment(app, settings, parts, metrics)
    _add_comparison(app, settings, parts, metrics)
    _add_people(app, parts)
    _add_photos(app, settings, parts)
    _add_challenges(app, settings, parts)


def _add_monitoring(app: Flask, parts: Parts, metrics: Metrics) -> None:

    @app.get("/", provide_automatic_options=False)
    @scope(PUBLIC)
    def running() -> Response:
        return jsonify(status="success", message="Face Recognition API is running")

    @app.get("/health", provide_automatic_options=False)
    @scope(PUBLIC)
    def health() -> Response:
        parts.readiness.require()
        return jsonify(
            status="success",
            message="ready",
            model=parts.engine.name,
            # The kind of database, but neither its path nor its host, which are for the log.
            store=parts.store.describe().partition(" ")[0],
            gallery=parts.gallery.status(),
        )

    @app.get("/metrics", provide_automatic_options=False)
    @scope("ops")
    def metrics_page() -> Response:
        text, content_type = metrics.text()
        return Response(text, content_type=content_type)


def _add_enrolment(app: Flask, settings: Settings, parts: Parts, metrics: Metrics) -> None:
    engine, gallery, pipeline = parts.engine, parts.gallery, parts.pipeline

    @app.post("/signUp", provide_automatic_options=False)
    @app.post("/signup", provide_automatic_options=False)
    @scope("app")
    def sign_up() -> Response:
        record = current_record()
        # The place comes first: a request that gets none is refused before its form is read.
        with pipeline.slots.place():
            with record.trace.stage("read"):
                receive_form_with_frames(settings, "file")
                photo = read_upload("file", settings.max_file_bytes)
            request_key = read_request_key(photo)
            earlier = earlier_answer(parts, request_key)
            if earlier is not None:
                return signed_up(earlier)
            attempt = enrolling_attempt(settings, parts, request_key)
            with settled(parts, attempt):
                template = pipeline.template(
                    photo, record.trace, client=record.client, new_person=True, attempt=attempt
                )
        with record.trace.stage("enrol"), settled(parts, attempt):
            user_id = gallery.enrol(
                template,
                duplicate_cosine=cosine_of(settings.duplicate_threshold, engine.cosine_at_half),
                restored=record.trace.restored,
                request_key=request_key,
                quality=record.trace.quality,
            )
        return signed_up(user_id)

    def signed_up(user_id: str) -> Response:
        current_record().user_id = user_id
        return jsonify(status="success", message=f"Face stored successfully with user_id: {user_id}", user_id=user_id)

    @app.post("/verify", provide_automatic_options=False)
    @scope("app")
    def verify() -> Response:
        record = current_record()
        with pipeline.slots.place():
            with record.trace.stage("read"):
                receive_form_with_frames(settings, "file", "threshold", "user_id")
            threshold = read_threshold(settings)
            record.user_id = claimed = read_user_id()
            photo = read_upload("file", settings.max_file_bytes)
            if claimed is not None:
                # Before the challenge is used up: the answer says to send the same again.
                parts.access.require_unlocked(claimed.lower())
            attempt = read_attempt(settings, parts.store)
            with settled(parts, attempt, claimed):
                template = pipeline.template(photo, record.trace, client=record.client, attempt=attempt, enrols=False)
        with record.trace.stage("search"):
            if claimed is None:
                candidate = gallery.search(template)
            else:
                parts.access.count_claim(claimed.lower())
                candidate = compare_claimed(gallery, claimed, template)
        if candidate is None:
            raise no_match()
        similarity, matched = _judge(parts.engine, metrics, candidate.cosine, threshold)
        if not matched:
            raise no_match()
        record.user_id = candidate.user_id
        if parts.retention is not None:
            parts.retention.seen(candidate.user_id)
        if claimed is not None:
            parts.access.forget_claims(claimed.lower())
        # Where storing a photo requires a challenge, a verification without one stores none.
        is_proved = attempt is not None or settings.challenge_sign_up != "require"
        if settings.update_template == "on_verify" and is_proved:
            _update_person(settings, parts, candidate, template, threshold)
        return jsonify(
            status="success",
            message=f"Face verified successfully with confidence: {similarity:.2f}",
            verified=True,
            user_id=candidate.user_id,
            similarity=similarity,
            threshold=threshold,
        )


def _update_person(
    settings: Settings, parts: Parts, candidate: Candidate, template: Template, threshold: float
) -> None:
    """Add the verified photo to the person if it matches far above the threshold and is better than those kept.

    The verification is answered alike, whatever becomes of the photo here.

    Args:
        settings: their thresholds and MAX_PHOTOS count as for a photo that a client adds.
        parts: of them the gallery and the audit log.
        candidate: the person who was verified, and the score.
        template: of the verified photo.
        threshold: the similarity that the verification asked for.
    """
    record, half = current_record(), parts.engine.cosine_at_half
    match_cosine = cosine_of(max(threshold, settings.verify_threshold) + UPDATE_MARGIN, half)
    quality = record.trace.quality
    if quality is None or not candidate.cosine >= match_cosine:
        return
    try:
        with record.trace.stage("update"):
            photos = parts.gallery.add_better_photo(
                candidate.user_id,
                template,
                match_cosine=match_cosine,
                duplicate_cosine=cosine_of(settings.duplicate_threshold, half),
                max_photos=settings.max_photos,
                quality=quality,
            )
    except FaceError as error:
        logger.warning("The photo of a verified person is not added to them: %s", error.code)
        return
    if photos is not None and parts.audit is not None:
        audit_request(parts.audit, "update", "ok")


def _add_challenges(app: Flask, settings: Settings, parts: Parts) -> None:
    if {settings.challenge, settings.challenge_sign_up, settings.challenge_verify} == {"off"}:
        return  # no route takes one

    @app.post("/challenges", provide_automatic_options=False)
    @scope("app")
    def issue_challenge() -> Response:
        receive_form()
        challenge = new_challenge(challenge_owner(), draw_steps())
        parts.store.add_challenge(challenge)
        return jsonify(
            status="success",
            message="Do the steps in order before the camera, and send the frames with the photo.",
            challenge_id=challenge.challenge_id,
            steps=challenge.steps,
            expires_in=int(CHALLENGE_SECONDS),
            frames={"min": len(challenge.steps), "max": MAX_FRAMES},
        )


def _add_comparison(app: Flask, settings: Settings, parts: Parts, metrics: Metrics) -> None:
    pipeline = parts.pipeline

    @contextmanager
    def named(field: str) -> Iterator[None]:
        """Have a refusal name the field of the photo that it is about."""
        try:
            yield
        except FaceError as error:
            error.fields.setdefault("field", field)
            raise

    def photo_in(field: str) -> bytes:
        with named(field):
            return read_upload(field, settings.max_file_bytes)

    @app.post("/compare", provide_automatic_options=False)
    @scope("app")
    def compare() -> Response:
        record = current_record()
        request.max_content_length = 2 * settings.max_file_bytes + FORM_ALLOWANCE_BYTES
        with pipeline.slots.place():
            with record.trace.stage("read"):
                receive_form_with_frames(settings, "file1", "file2", "threshold")
            threshold = read_threshold(settings)
            # Both photos are there before a challenge is used up.
            person, picture = photo_in("file1"), photo_in("file2")
            with named("file1"):
                attempt = read_attempt(settings, parts.store)
            with settled(parts, attempt):
                with named("file1"):
                    one = pipeline.template(person, record.trace, client=record.client, attempt=attempt, enrols=False)
                with named("file2"):
                    other = pipeline.template(picture, record.trace, client=record.client, enrols=False, picture=True)
        similarity, match = _judge(parts.engine, metrics, float(np.vecdot(one, other)), threshold)
        sentence = "faces_match" if match else "faces_differ"
        return localised(
            {
                "status": "success",
                "message": english(sentence),
                "match": match,
                "similarity": similarity,
                "threshold": threshold,
            },
            sentence,
        )

    @app.post("/analyze", provide_automatic_options=False)
    @scope("app")
    def analyze() -> Response:
        record = current_record()
        with pipeline.slots.place():
            with record.trace.stage("read"):
                receive_form("file")
            photo = read_upload("file", settings.max_file_bytes)
            found = pipeline.analysis(photo, record.trace, client=record.client)
        record.note_checks(found.checks)
        sentence = found.code or "accepted"
        return localised(
            {
                "status": "success",
                "message": english(sentence),
                "accepted": found.code is None,
                "code": found.code,
                "checks": found.checks,
                "image": dict(zip(("width", "height"), found.size, strict=True)),
                "faces": [
                    {
                        "box": [round(float(one), 1) for one in face.box],
                        "landmarks": [[round(float(one), 1) for one in point] for point in face.landmarks],
                        "score": round(face.score, 3),
                    }
                    for face in found.faces
                ],
            },
            sentence,
        )


def _add_people(app: Flask, parts: Parts) -> None:
    @app.get("/users/<user_id>", provide_automatic_options=False)
    @scope("ops")
    def user(user_id: str) -> Response:
        receive_form()
        person = enrolled_person(parts, user_id)
        return jsonify(
            status="success",
            message="This person is enrolled.",
            user_id=person.user_id,
            enrolled_at=utc(person.timestamp),
            model=person.model,
            photos=len(person.photos),
            photo_list=[
                {"number": photo.number, "enrolled_at": utc(photo.timestamp), "model": photo.model}
                for photo in person.photos
            ],
        )

    @app.delete("/users/<user_id>", provide_automatic_options=False)
    @scope("ops")
    def erase(user_id: str) -> Response:
        record = current_record()
        receive_form()
        person = parts.store.find_person(require_user_id(user_id)) or parts.store.find_person(user_id.lower())
        record.user_id = person.user_id if person else user_id
        with record.trace.stage("erase"):
            parts.gallery.erase(record.user_id)
        receipt = None if parts.audit is None else audit_request(parts.audit, "erase", "ok")
        record.audited = True
        return jsonify(
            status="success",
            message="This person is erased.",
            user_id=record.user_id,
            erased_at=utc(time.time()),
            receipt=receipt,
        )


def _add_photos(app: Flask, settings: Settings, parts: Parts) -> None:
    gallery, pipeline, half = parts.gallery, parts.pipeline, parts.engine.cosine_at_half

    @app.post("/users/<user_id>/photos", provide_automatic_options=False)
    @scope("app")
    def add_photo(user_id: str) -> Response:
        record = current_record()
        with pipeline.slots.place():
            with record.trace.stage("read"):
                receive_form_with_frames(settings, "file")
                photo = read_upload("file", settings.max_file_bytes)
            person = enrolled_person(parts, user_id)
            request_key = read_request_key(photo, person.user_id)
            parts.access.require_unlocked(person.user_id.lower())
            if earlier_answer(parts, request_key) == person.user_id:
                person = enrolled_person(parts, user_id)  # with the photo that has been added meanwhile
                return added(person, len(person.photos))
            attempt = enrolling_attempt(settings, parts, request_key)
            with settled(parts, attempt, person.user_id):
                template = pipeline.template(photo, record.trace, client=record.client, attempt=attempt)
        with record.trace.stage("enrol"), settled(parts, attempt):
            # A caller may not try faces until one of them matches: failures count as in a 1:1 verification.
            parts.access.count_claim(person.user_id.lower())
            try:
                photos = gallery.add_photo(
                    person.user_id,
                    template,
                    match_cosine=cosine_of(settings.verify_threshold, half),
                    duplicate_cosine=cosine_of(settings.duplicate_threshold, half),
                    max_photos=settings.max_photos,
                    request_key=request_key,
                    quality=record.trace.quality,
                )
            except FaceError as error:
                if error.code == "no_match":
                    raise no_match() from error
                raise
        parts.access.forget_claims(person.user_id.lower())
        if parts.retention is not None:
            parts.retention.seen(person.user_id)
        return added(person, photos)

    def added(person: Person, photos: int) -> Response:
        return jsonify(
            status="success", message="The photo is added to this person.", user_id=person.user_id, photos=photos
        )

    @app.delete("/users/<user_id>/photos/<int:number>", provide_automatic_options=False)
    @scope("ops")
    def remove_photo(user_id: str, number: int) -> Response:
        receive_form()
        person = enrolled_person(parts, user_id)
        with current_record().trace.stage("erase"):
            photos = gallery.remove_photo(person.user_id, number)
        return jsonify(
            status="success", message="The photo is removed from this person.", user_id=person.user_id, photos=photos
        )


def earlier_answer(parts: Parts, request_key: str | None) -> str | None:
    """The user_id that an earlier attempt of this request got, if any: no challenge and no photo can change it."""
    return None if request_key is None else parts.gallery.enrolled_by(request_key)


def enrolling_attempt(settings: Settings, parts: Parts, request_key: str | None) -> Attempt | None:
    """Use the challenge of a request that stores a photo; raises as `read_attempt`.

    A retry sends the challenge that its first attempt has used. While that attempt may still run, the retry is told
    `overloaded`: to send the same again.
    """
    try:
        return read_attempt(settings, parts.store)
    except FaceError as error:
        if error.code != "challenge_used" or request_key is None:
            raise
        if not parts.store.is_in_use(request.form["challenge_id"], challenge_owner()):
            raise
        raise FaceError("overloaded", "still_running", headers={"Retry-After": RETRY_RUNNING_S}) from error


@contextmanager
def settled(parts: Parts, attempt: Attempt | None, claimed: str | None = None) -> Iterator[None]:
    """Give a challenge back if the service is too busy for it, and count one that fails as a failed 1:1 comparison.

    Args:
        parts: of them the store and the lock-out.
        attempt: the challenge in use; without one nothing is done.
        claimed: the person whom the frames should show, if one is claimed.
    """
    try:
        yield
    except FaceError as error:
        if attempt is not None:
            if error.code == "overloaded":
                # The client has learned nothing, and is told to send the same again.
                parts.store.give_back(attempt.challenge_id, challenge_owner())
            elif error.code in ("challenge_failed", "not_live") and claimed is not None:
                parts.access.count_claim(claimed.lower())
        raise


def enrolled_person(parts: Parts, user_id: str) -> Person:
    """Return the person of a user_id, as it was sent or in lower case; FaceError `invalid_user_id`, `unknown_user`."""
    current_record().user_id = require_user_id(user_id)
    person = parts.store.find_person(user_id) or parts.store.find_person(user_id.lower())
    if person is None:
        raise FaceError("unknown_user")
    current_record().user_id = person.user_id
    return person


def _judge(engine: Engine, metrics: Metrics, cosine: float, threshold: float) -> tuple[float, bool]:
    """The similarity as the API shows it, and whether it is a match.

    It is rounded to four decimals, away from the threshold where needed: 0.49996 does not match at 0.5, so it is not
    shown as 0.5.
    """
    exact = similarity_of(cosine, engine.cosine_at_half)
    matched, shown = exact >= threshold, round(exact, 4)
    if matched != (shown >= threshold):
        shown = (math.ceil if matched else math.floor)(exact * 1e4) / 1e4
    current_record().trace.figures["similarity"] = shown
    metrics.compared(request.url_rule.rule if request.url_rule else "", exact, accepted=matched)
    return shown, matched


def compare_claimed(gallery: Gallery, claimed: str, template: Template) -> Candidate:
    """Compare 1:1 with the claimed user_id, as sent or in lower case; FaceError `unknown_user`."""
    try:
        return Candidate(claimed, gallery.compare(claimed, template))
    except FaceError as error:
        if error.code != "unknown_user" or claimed == claimed.lower():
            raise
        return Candidate(claimed.lower(), gallery.compare(claimed.lower(), template))


def no_match() -> FaceError:
    """The error `no_match`; RFC 9110 asks for a challenge with every 401."""
    return FaceError("no_match", fields={"verified": False}, headers={"WWW-Authenticate": "FaceMatch"})
