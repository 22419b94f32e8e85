"""Owns what a request carries: its photo, its fields and its headers, read and checked."""

from __future__ import annotations

import hashlib
import logging
import math
import re

from flask import request

from api.request_record import current_record
from errors import FaceError
from settings import Settings

logger = logging.getLogger("face_api")

# Beside the photo itself: the other fields and the multipart framing.
FORM_ALLOWANCE = 64 * 1024
SANE_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
USER_ID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)


def receive_form() -> None:
    """Read the request's form; FaceError `overloaded` when the disk has no room for a large photo."""
    try:
        request.form.keys()
    except OSError as error:
        logger.warning("A photo could not be kept in UPLOADS_DIR: %s", error.strerror)
        raise FaceError("overloaded", headers={"Retry-After": "5"}) from error


def read_upload(field: str, max_bytes: int) -> bytes:
    """Return the bytes of the one file in `field`, at most one more than `max_bytes` of them.

    Raises:
        FaceError: `no_file`, `empty_file`, `bad_request` (several files).
    """
    files = request.files.getlist(field)
    if len(files) > 1:
        raise FaceError("bad_request", "one_photo", values={"field": field})
    none = FaceError("no_file", "no_photo", values={"field": field})
    if not files:
        raise none
    data = files[0].stream.read(max_bytes + 1)
    files[0].close()
    if not data and not files[0].filename:
        raise none
    if not data:
        raise FaceError("empty_file")
    return data


def read_field(name: str, code: str) -> str | None:
    """Return the one value of a form field, None when it was not sent; FaceError `code` when sent twice."""
    values = request.form.getlist(name)
    if len(values) > 1:
        raise FaceError(code, "field_once", values={"field": name})
    return values[0] if values else None


def read_threshold(settings: Settings) -> float:
    """Return the caller's threshold, or the operator's; FaceError `invalid_threshold`."""
    text = read_field("threshold", "invalid_threshold")
    if text is None:
        return settings.verify_threshold
    # float() alone would take nan, infinities, underscores and every script's digits.
    value = float(text) if DECIMAL.fullmatch(text.strip()) and len(text) <= 64 else math.nan
    if not settings.threshold_floor <= value <= 1.0:
        raise FaceError("invalid_threshold", "threshold_range", values={"floor": f"{settings.threshold_floor:g}"})
    return value


def read_user_id() -> str | None:
    """Return the claimed user_id, None when none was sent; FaceError `invalid_user_id`."""
    text = read_field("user_id", "invalid_user_id")
    return None if text is None else user_id_of(text)


def user_id_of(text: str) -> str:
    """Return what a client calls a user_id; FaceError `invalid_user_id`."""
    if not USER_ID.fullmatch(text):
        raise FaceError("invalid_user_id")
    return text


def read_idempotency_key() -> str | None:
    """Return what is stored of the Idempotency-Key header (its SHA-256), None when none was sent.

    Two API keys never meet in one: else the holder of one could ask for the other's sign-ups.
    """
    sent = request.headers.get("Idempotency-Key")
    if sent is None:
        return None
    if not SANE_IDEMPOTENCY_KEY.fullmatch(sent):
        raise FaceError("bad_request", "idempotency_key")
    whose = current_record().api_key_name
    return hashlib.sha256((f"{whose}\n{sent}" if whose else sent).encode()).hexdigest()
