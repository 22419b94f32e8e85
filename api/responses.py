"""Turns answers and errors into JSON in the client's language, with the headers that every response has."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flask import Flask, Response, current_app, jsonify, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

import logs
from api.request_log import current_record
from api.translations import Translations
from errors import FaceError, too_large

logger = logging.getLogger(__name__)

CODE_OF_HTTP_STATUS = {404: "not_found", 405: "method_not_allowed"}

# Defaults for JSON answers: only the caller may read them, and no browser may show them as a page. HTML pages set their
# own policy.
SECURITY_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def protect_responses(app: Flask) -> None:
    """Give every response headers that stop browsers from guessing types, caching, framing and sending referrers."""

    @app.after_request
    def protect(response: Response) -> Response:
        for name, value in SECURITY_HEADERS.items():
            response.headers.setdefault(name, value)
        if request.is_secure:
            response.headers.setdefault("Strict-Transport-Security", "max-age=31536000")
        return response


def answer_errors(app: Flask, max_file_bytes: int) -> None:
    """Answer every error in the API's words: its code and one sentence, and nothing from the library that raised it."""
    app.extensions["translations"] = Translations()

    @app.errorhandler(FaceError)
    def refused(error: FaceError) -> Response:
        return error_response(error)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        status = error.code or 500
        if status == 413 and (request.content_length or 0) <= (request.max_content_length or 0):
            status = 400  # the form has too many or too large fields; the photo is not too large
        if status == 413:
            most_bytes = request.max_content_length or 0
            takes_more = most_bytes > (app.config["MAX_CONTENT_LENGTH"] or 0)  # two photos, or frames beside the photo
            return error_response(too_large(max_file_bytes, most_bytes if takes_more else None))
        code = CODE_OF_HTTP_STATUS.get(status, "internal_error" if status >= 500 else "bad_request")
        allowed = error.valid_methods if isinstance(error, MethodNotAllowed) else None
        return error_response(FaceError(code, headers={"Allow": ", ".join(sorted(allowed))} if allowed else None))

    @app.errorhandler(Exception)
    def unforeseen(error: Exception) -> Response:
        request_id = current_record().request_id
        logger.error("Unforeseen error", exc_info=error, extra={logs.FIELDS: {"request_id": request_id}})
        return error_response(FaceError("internal_error"))


def error_response(error: FaceError) -> Response:
    """The response for an error; no other place makes one."""
    record = current_record()
    record.code = error.code
    if "checks" in error.fields:
        record.note_checks(error.fields["checks"])
    body = {"status": "error", "code": error.code, "message": error.message, "request_id": record.request_id}
    response = localised({**body, **error.fields}, error.sentence, error.values)
    response.status_code = error.status
    response.headers.update(error.headers)
    return response


def localised(body: Mapping[str, Any], sentence: str, values: Mapping[str, object] = MappingProxyType({})) -> Response:
    """A JSON answer in the language that the client prefers by `Accept-Language`, English if there is no translation.

    Args:
        body: the answer in English.
        sentence, values: the sentence behind its message, as in `errors.english`.
    """
    translations: Translations = current_app.extensions["translations"]
    language = translations.preferred(request.accept_languages)
    response = jsonify(translations.translated(body, language, sentence, values))
    response.content_language.add(language)
    response.vary.add("Accept-Language")
    return response
