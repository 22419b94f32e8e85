"""Owns the routes: what each one reads, decides and answers."""

from __future__ import annotations

import math
import time

import numpy as np
from flask import Flask, Response, jsonify, request

from api.access import PUBLIC, scope
from api.metrics import Metrics
from api.request_audit import audit_request
from api.request_fields import (
    FORM_ALLOWANCE_BYTES,
    read_request_key,
    read_threshold,
    read_upload,
    read_user_id,
    receive_form,
    require_user_id,
)
from api.request_log import current_record
from api.responses import localised
from api.service_parts import Parts
from engines.base import Engine, Template, cosine_of, similarity_of
from errors import FaceError, english
from gallery.decisions import Gallery
from gallery.templates import Candidate
from settings import Settings


def add_routes(app: Flask, settings: Settings, parts: Parts, metrics: Metrics) -> None:
    """Give `app` every route of the API."""
    _add_monitoring(app, parts, metrics)
    _add_enrolment(app, settings, parts, metrics)
    _add_comparison(app, settings, parts, metrics)
    _add_people(app, parts)


def _add_monitoring(app: Flask, parts: Parts, metrics: Metrics) -> None:
    @app.get("/", provide_automatic_options=False)
    @scope(PUBLIC)
    def running() -> Response:
        return jsonify(status="success", message="Face Recognition API is running")

    @app.get("/health", provide_automatic_options=False)
    @scope(PUBLIC)
    def health() -> Response:
        parts.gallery.refresh()
        return jsonify(
            status="success",
            message="ready",
            model=parts.engine.name,
            # Which database, but neither path nor host: those are the log's.
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
        # A place comes before all work: whoever is turned away costs those in the queue nothing but the reading.
        with pipeline.slots.place():
            with record.trace.stage("read"):
                receive_form("file")
                photo = read_upload("file", settings.max_file_bytes)
            request_key = read_request_key(photo)
            template = pipeline.template(photo, record.trace)
        with record.trace.stage("enrol"):
            user_id = gallery.enrol(
                template,
                duplicate_cosine=cosine_of(settings.duplicate_threshold, engine.cosine_at_half),
                request_key=request_key,
            )
        record.user_id = user_id
        return jsonify(status="success", message=f"Face stored successfully with user_id: {user_id}", user_id=user_id)

    @app.post("/verify", provide_automatic_options=False)
    @scope("app")
    def verify() -> Response:
        record = current_record()
        with pipeline.slots.place():
            with record.trace.stage("read"):
                receive_form("file", "threshold", "user_id")
            threshold = read_threshold(settings)
            record.user_id = claimed = read_user_id()
            template = pipeline.template(read_upload("file", settings.max_file_bytes), record.trace)
        with record.trace.stage("search"):
            if claimed is None:
                candidate = gallery.search(template)
            else:
                parts.access.count_claim(claimed.lower())
                candidate = compare_claimed(gallery, claimed, template)
        if candidate is None:
            raise no_match()
        similarity, matched = _compared(parts.engine, metrics, candidate.cosine, threshold)
        if not matched:
            raise no_match()
        record.user_id = candidate.user_id
        if parts.retention is not None:
            parts.retention.seen(candidate.user_id)
        if claimed is not None:
            parts.access.forget_claims(claimed.lower())
        return jsonify(
            status="success",
            message=f"Face verified successfully with confidence: {similarity:.2f}",
            verified=True,
            user_id=candidate.user_id,
            similarity=similarity,
            threshold=threshold,
        )


def _add_comparison(app: Flask, settings: Settings, parts: Parts, metrics: Metrics) -> None:
    pipeline = parts.pipeline

    def template_of(field: str, *, picture: bool = False) -> Template:
        """The template of one of several photos; a refusal says which."""
        try:
            return pipeline.template(
                read_upload(field, settings.max_file_bytes), current_record().trace, picture=picture
            )
        except FaceError as error:
            error.fields["field"] = field
            raise

    @app.post("/compare", provide_automatic_options=False)
    @scope("app")
    def compare() -> Response:
        record = current_record()
        request.max_content_length = 2 * settings.max_file_bytes + FORM_ALLOWANCE_BYTES
        with pipeline.slots.place():
            with record.trace.stage("read"):
                receive_form("file1", "file2", "threshold")
            threshold = read_threshold(settings)
            one, other = template_of("file1"), template_of("file2", picture=True)
        similarity, match = _compared(parts.engine, metrics, float(np.vecdot(one, other)), threshold)
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
            found = pipeline.analysis(read_upload("file", settings.max_file_bytes), record.trace)
        record.failed_checks = [check["code"] for check in found.checks if not check["passed"]]
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
        current_record().user_id = require_user_id(user_id)
        person = parts.store.find_person(user_id) or parts.store.find_person(user_id.lower())
        if person is None:
            raise FaceError("unknown_user")
        return jsonify(
            status="success",
            message="This person is enrolled.",
            user_id=person.user_id,
            enrolled_at=None if person.timestamp is None else utc(person.timestamp),
            model=person.model,
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
        return jsonify(
            status="success",
            message="This person is erased.",
            user_id=record.user_id,
            erased_at=utc(time.time()),
            receipt=receipt,
        )


def _compared(engine: Engine, metrics: Metrics, cosine: float, threshold: float) -> tuple[float, bool]:
    """The similarity as the API tells it, and whether it is a match.

    It is told to four decimals, rounded to the side of the threshold that it is on: 0.49996 is no match at 0.5, and so
    is not told as 0.5.
    """
    exact = similarity_of(cosine, engine.cosine_at_half)
    matched, told = exact >= threshold, round(exact, 4)
    if matched != (told >= threshold):
        told = (math.ceil if matched else math.floor)(exact * 1e4) / 1e4
    current_record().trace.figures["similarity"] = told
    metrics.compared(request.url_rule.rule if request.url_rule else "", exact, accepted=matched)
    return told, matched


def utc(moment: float) -> str:
    """A moment (seconds since the epoch) as ISO 8601 writes it, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def compare_claimed(gallery: Gallery, claimed: str, template: Template) -> Candidate:
    """Compare 1:1 with a claimed user_id, as it was sent or in its canonical lower case; FaceError `unknown_user`."""
    try:
        return Candidate(claimed, gallery.compare(claimed, template))
    except FaceError as error:
        if error.code != "unknown_user" or claimed == claimed.lower():
            raise
        return Candidate(claimed.lower(), gallery.compare(claimed.lower(), template))


def no_match() -> FaceError:
    """`no_match` as the API words it; RFC 9110 asks for a challenge on every 401."""
    return FaceError("no_match", fields={"verified": False}, headers={"WWW-Authenticate": "FaceMatch"})
