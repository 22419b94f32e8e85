"""Reads and checks what a request carries: its photos, its fields and its idempotency key."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import re
from collections.abc import Iterable

from flask import Flask, request

from api.multipart import PHOTO_FIELDS, TEXT_FIELDS
from api.request_log import current_record
from challenge.judge import not_attempted, wrong_frame_count
from challenge.steps import MAX_FRAME_BYTES, MAX_FRAMES, ORDERS, Attempt
from errors import FaceError
from settings import Settings
from store.challenges import CHALLENGE_SECONDS, ChallengeStore

logger = logging.getLogger(__name__)

# Room for everything in a form beside the photo: the other fields and the multipart framing.
FORM_ALLOWANCE_BYTES = 64 * 1024
SANE_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
USER_ID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
MAX_DECIMAL_CHARACTERS = 64
# How much an answer repeats of the names that a client gave to its own fields.
MAX_TOLD_NAMES = 5
MAX_TOLD_CHARACTERS = 40

# The form fields of a challenge, which the routes that take one read.
CHALLENGE_FIELDS = ("challenge_id", "frame")

_KNOWN_FIELDS = PHOTO_FIELDS | TEXT_FIELDS


def _without_style(name: str) -> str:
    """A field's letters and digits in one case: hyphens, underscores and brackets depend on the client's habits."""
    return re.sub(r"[\W_]", "", name).casefold()


# `POST /challenges` answers with `frames`, and some clients number the values of a list (`frame[0]`). A client that
# sends frames under such a name would use its challenge up.
_NAMES_OF_FRAMES = ("frames", *(f"{name}{number}" for name in ("frame", "frames") for number in range(MAX_FRAMES + 1)))
_BY_STYLELESS_NAME = {_without_style(name): name for name in _KNOWN_FIELDS} | dict.fromkeys(_NAMES_OF_FRAMES, "frame")


def refuse_fields_in_urls(app: Flask) -> None:
    """Have every route refuse a known field in the query string: no route reads one there."""

    @app.before_request
    def check_query() -> None:
        if request.endpoint is not None:
            _refuse_unread(request.args, read=())


def receive_form(*read: str, off: Iterable[str] = ()) -> None:
    """Read the request's form, from which the route reads the fields `read`.

    A claim that the caller sends must count or be refused: a `userId` that is silently ignored would turn a 1:1
    verification into a search. So a field that only another route reads, or whose name differs from a known one in
    case, hyphens or underscores (or is `frames` or `frame[0]` for `frame`), is refused. All other fields are the
    caller's own and are ignored.

    Args:
        read: the names of those fields.
        off: fields that the route would read if the service were set to it.

    Raises:
        FaceError: `unknown_field`; `bad_request`: the form is malformed; `overloaded`: the disk has no room for a large
            photo.
    """
    try:
        texts, files = request.form, request.files
    except OSError as error:
        logger.warning("A photo could not be kept in UPLOADS_DIR: %s", error.strerror)
        raise FaceError("overloaded", headers={"Retry-After": "5"}) from error
    _refuse_unread(texts, read=TEXT_FIELDS.intersection(read), off=off)
    _refuse_unread(files, read=PHOTO_FIELDS.intersection(read), off=off)


def _refuse_unread(names: Iterable[str], *, read: Iterable[str], off: Iterable[str] = ()) -> None:
    """FaceError `unknown_field` for a name in this place that is known, or nearly, and is not read here."""
    for name in names:
        known = _BY_STYLELESS_NAME.get(_without_style(name or ""))
        if known is None or name in read:
            continue
        sentence, told = ("misplaced_field" if name == known else "misspelt_field"), _printable(name)
        if known in off:
            sentence = "challenges_off"
        raise FaceError("unknown_field", sentence, values={"field": told, "known": known}, fields={"field": told})


def read_upload(field: str, max_bytes: int) -> bytes:
    """Return the bytes of the one file in `field`, at most one more than `max_bytes` of them.

    Raises:
        FaceError: `no_file`, `empty_file`, `bad_request` (several files).
    """
    files = request.files.getlist(field)
    if len(files) > 1:
        raise FaceError("bad_request", "one_photo", values={"field": field})
    if not files:
        raise _no_file(field)
    data = files[0].stream.read(max_bytes + 1)
    files[0].close()
    if not data and not files[0].filename:  # browsers send a file input without a file like this
        raise _no_file(field)
    if not data:
        raise FaceError("empty_file")
    return data


def read_frames() -> list[bytes]:
    """Return the files in the field `frame`, in order, each at most one byte more than a frame may have.

    Raises:
        FaceError: `challenge_failed`: there are none, or more than any challenge takes. That is a client's mistake.
    """
    files = request.files.getlist("frame")
    frames = [file.stream.read(MAX_FRAME_BYTES + 1) for file in files[:MAX_FRAMES]]
    for file in files:
        file.close()
    if not 0 < len(files) <= MAX_FRAMES:
        raise wrong_frame_count(len(files), min(map(len, ORDERS)))
    return frames


def _no_file(field: str) -> FaceError:
    """`no_file`, which names the files that came under other names."""
    others = [name or "" for name in request.files if name not in PHOTO_FIELDS]
    if not others:
        return FaceError("no_file", "no_photo", values={"field": field})
    told = ", ".join(f"'{_printable(name)}'" for name in others[:MAX_TOLD_NAMES])
    return FaceError("no_file", "photo_elsewhere", values={"field": field, "received": told})


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:MAX_TOLD_CHARACTERS])


def read_field(name: str, code: str) -> str | None:
    """Return the one value of a form field, None if it was not sent; FaceError `code` if it was sent twice."""
    values = request.form.getlist(name)
    if len(values) > 1:
        raise FaceError(code, "field_once", values={"field": name})
    return values[0] if values else None


def read_threshold(settings: Settings) -> float:
    """Return the caller's threshold, or the operator's if none was sent; FaceError `invalid_threshold`."""
    text = read_field("threshold", "invalid_threshold")
    if text is None:
        return settings.verify_threshold
    # float() alone would also take nan, infinities, underscores and the digits of every script.
    is_decimal = len(text) <= MAX_DECIMAL_CHARACTERS and DECIMAL.fullmatch(text.strip())
    value = float(text) if is_decimal else math.nan
    if not settings.threshold_floor <= value <= 1.0:
        raise FaceError("invalid_threshold", "threshold_range", values={"floor": f"{settings.threshold_floor:g}"})
    return value


def read_user_id() -> str | None:
    """Return the claimed user_id, None if none was sent; FaceError `invalid_user_id`."""
    text = read_field("user_id", "invalid_user_id")
    return None if text is None else require_user_id(text)


def require_user_id(text: str) -> str:
    """Return the text if it can be a user_id; FaceError `invalid_user_id`."""
    if not USER_ID.fullmatch(text):
        raise FaceError("invalid_user_id")
    return text


def read_request_key(photo: bytes, user_id: str = "") -> str | None:
    """Return by what the store recognises a retry of this request, None without an Idempotency-Key.

    It is the SHA-256 of the caller's API key and the Idempotency-Key, so that two API keys never share one, a full
    stop, and the SHA-256 of the photo, keyed with the Idempotency-Key. The header's text cannot be read from it.

    Args:
        photo: the bytes of the request's photo.
        user_id: the person to whom the photo is added; empty for a sign-up, whose key is another one.

    Raises:
        FaceError: `bad_request`, the header is not usable.
    """
    idempotency_key = request.headers.get("Idempotency-Key")
    if idempotency_key is None:
        return None
    if not SANE_IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise FaceError("bad_request", "idempotency_key")
    api_key = current_record().api_key
    # The API key's hash, not its name: after a revocation the name can be given to somebody else.
    owner = f"{api_key.sha256}\n" if api_key else ""
    person = f"\nphotos of {user_id}" if user_id else ""
    beginning = hashlib.sha256(f"{owner}{idempotency_key}{person}".encode()).hexdigest()
    return f"{beginning}.{hmac.new(idempotency_key.encode(), photo, hashlib.sha256).hexdigest()}"


def challenge_mode(settings: Settings, path: str) -> str:
    """What a route does about challenges: off, accept or require. All but /compare and /verify store a photo."""
    if path == "/compare":
        return settings.challenge
    return settings.challenge_verify if path == "/verify" else settings.challenge_sign_up


def receive_form_with_frames(settings: Settings, *read: str) -> None:
    """Read a form as `receive_form`, with a challenge's fields where the route takes challenges.

    Such a request may be larger by the frames.
    """
    if challenge_mode(settings, request.path) == "off":
        receive_form(*read, off=CHALLENGE_FIELDS)
        return
    request.max_content_length = (request.max_content_length or 0) + MAX_FRAMES * MAX_FRAME_BYTES
    receive_form(*read, *CHALLENGE_FIELDS)


def read_attempt(settings: Settings, store: ChallengeStore) -> Attempt | None:
    """Use the challenge that the request names, and return its steps and the frames; None if none is sent or read.

    The challenge is used up whatever becomes of the request, unless the service is too busy to look at it, or there can
    be nothing to look at: no frames, or too many.

    Args:
        settings: what the route does about challenges.
        store: where the challenges are.

    Raises:
        FaceError: `challenge_required`; `challenge_used`; `challenge_expired`; `challenge_failed`, as `read_frames`;
            `bad_request`: the field is sent twice.
    """
    mode = challenge_mode(settings, request.path)
    if mode == "off":
        return None
    challenge_id = read_field("challenge_id", "bad_request")
    if challenge_id is None and "frame" not in request.files and mode == "accept":
        return None
    if not challenge_id:
        raise not_attempted("challenge_required", {"min": 1})
    frames = read_frames()
    try:
        challenge = store.use_challenge(challenge_id, challenge_owner())
    except FaceError as error:
        if error.code != "challenge_expired":
            raise
        raise not_attempted("challenge_expired", {"max": CHALLENGE_SECONDS}) from error
    return Attempt(challenge_id, challenge.steps, tuple(frames))


def challenge_owner() -> str:
    """Whose challenge it is: the API key's hash, not its name, which another key can get after a revocation."""
    api_key = current_record().api_key
    return api_key.sha256 if api_key else ""
