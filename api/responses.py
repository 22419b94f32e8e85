"""Owns what every response has in common: its id and log line, its security headers, and how errors are worded."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flask import Flask, Response, current_app, jsonify, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

import logs
from api.metrics import Metrics
from api.request_record import begin_record, current_record
from api.translations import Translations
from errors import FaceError, too_large

logger = logging.getLogger("face_api")

CODE_OF_HTTP = {404: "not_found", 405: "method_not_allowed"}
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,128}")


# An answer of this API is for its caller alone, and no page; pages set a policy of their own.
SECURITY_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def protect_responses(app: Flask) -> None:
    """Give every response the headers that keep browsers from guessing, caching, framing and telling."""

    @app.after_request
    def protect(response: Response) -> Response:
        for name, value in SECURITY_HEADERS.items():
            response.headers.setdefault(name, value)
        if request.is_secure:
            response.headers.setdefault("Strict-Transport-Security", "max-age=31536000")
        return response


def log_requests(app: Flask, metrics: Metrics) -> None:
    """Give every request an id, the log one line for it, and the metrics their numbers."""

    @app.before_request
    def begin() -> None:
        sent = request.headers.get("X-Request-ID", "")
        begin_record(sent if SANE_REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex)

    @app.after_request
    def finish(response: Response) -> Response:
        record = current_record()
        response.headers["X-Request-ID"] = record.request_id
        # The route's own pattern, never the path that was sent.
        route = request.url_rule.rule if request.url_rule else "(no such route)"
        seconds = record.seconds
        metrics.observe(
            method=request.method,
            route=route,
            status=response.status_code,
            code=record.code,
            seconds=seconds,
            stages_ms=record.trace.stages_ms,
        )
        metrics.photo_failed(record.failed_checks)
        fields = {
            "request_id": record.request_id,
            "status": response.status_code,
            "code": record.code,
            "key": record.api_key_name,
            "ms": round(1000 * seconds, 1),
            "stages_ms": record.trace.stages_ms,
            "figures": record.trace.figures,
        }
        logger.info(
            "%s %s",
            request.method,
            route,
            extra={logs.FIELDS: {key: one for key, one in fields.items() if one not in ({}, None)}},
        )
        return response


def render_errors(app: Flask, max_file_bytes: int) -> None:
    """Word every error as the API does: its code, one sentence, and nothing of the library that raised it."""
    app.extensions["translations"] = Translations()

    @app.errorhandler(FaceError)
    def refused(error: FaceError) -> Response:
        return render(error)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        status = error.code or 500
        if status == 413 and (request.content_length or 0) <= (request.max_content_length or 0):
            status = 400  # too many or too large fields, not too large a photo
        if status == 413:
            return render(too_large(max_file_bytes))
        code = CODE_OF_HTTP.get(status, "internal_error" if status >= 500 else "bad_request")
        allowed = error.valid_methods if isinstance(error, MethodNotAllowed) else None
        return render(FaceError(code, headers={"Allow": ", ".join(sorted(allowed))} if allowed else None))

    @app.errorhandler(Exception)
    def unforeseen(error: Exception) -> Response:
        logger.error(
            "unforeseen error", exc_info=error, extra={logs.FIELDS: {"request_id": current_record().request_id}}
        )
        return render(FaceError("internal_error"))


def render(error: FaceError) -> Response:
    """The one place where an error of the application becomes a response."""
    record = current_record()
    record.code = error.code
    if "checks" in error.fields:
        record.trace.figures = {check["code"]: check["measured"] for check in error.fields["checks"]}
        record.failed_checks = [check["code"] for check in error.fields["checks"] if not check["passed"]]
    body = {"status": "error", "code": error.code, "message": error.message, "request_id": record.request_id}
    response = localised({**body, **error.fields}, error.sentence, error.values)
    response.status_code = error.status
    response.headers.update(error.headers)
    return response


def localised(body: Mapping[str, Any], sentence: str, values: Mapping[str, object] = MappingProxyType({})) -> Response:
    """An answer in the language, of those that there are, which the client asks for with `Accept-Language`.

    Args:
        body: the answer in English.
        sentence, values: what its message is made of, as in `errors.english`.
    """
    translations: Translations = current_app.extensions["translations"]
    language = translations.preferred(request.accept_languages)
    response = jsonify(translations.translated(body, language, sentence, values))
    response.content_language.add(language)
    response.vary.add("Accept-Language")
    return response
