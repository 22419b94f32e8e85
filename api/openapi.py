"""Owns the API's description (OpenAPI 3.1), made of the tables and settings that the service itself follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from api.request_fields import SANE_IDEMPOTENCY_KEY, USER_ID
from api.request_log import SANE_REQUEST_ID
from engines.covering import Covering
from errors import CODES, english
from face_checks import HINTS, Check, Measurements, Pose, judge
from settings import Settings

Json = dict[str, Any]

CHECK_CODES = tuple(code for code, (status, _) in CODES.items() if status == 422)
# What every route that takes a photo can answer before the photo is checked.
PHOTO_CODES = (
    *("no_file", "empty_file", "unreadable_image", "bad_request", "unknown_field"),
    *("file_too_large", "image_too_large", "unsupported_format", "overloaded"),
)
GALLERY_CODES = ("database_unavailable", "not_ready")

AN_ID = "0e6d5b0c-9d0e-4c64-9d3a-2f1f5f0f6a3e"
WHEN = "2026-11-23T10:00:00Z"


@dataclass(frozen=True)
class Route:
    """One route as its callers see it.

    Attributes:
        group: under which heading it stands.
        summary, text: what it is for, in one line and in as many as it needs (Markdown).
        answer: what a success holds: an example of it; or a text's content type.
        curl: the arguments of a curl call that shows it, after the key and before the address.
        codes: every code of its own that it can answer, besides those of every route.
        scope: the API keys' scope that it asks for; None asks for none.
        form: the form's fields -> schema; `required` names those that must be sent.
        headers: the request headers that it reads, of `components.parameters`.
    """

    group: str
    summary: str
    text: str
    answer: Json | str
    curl: str = ""
    codes: tuple[str, ...] = ()
    scope: str | None = None
    form: Mapping[str, Json] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()


def _routes(settings: Settings) -> dict[tuple[str, str], Route]:
    photo = {
        "type": "string",
        "contentMediaType": "application/octet-stream",
        "description": f"The photo: JPEG, PNG, WebP or HEIC, judged by its content; at most {_mib(settings)} MiB and "
        f"{_megapixels(settings)} megapixels.",
    }
    threshold = {
        "type": "number",
        "minimum": settings.threshold_floor,
        "maximum": 1,
        "default": settings.verify_threshold,
        "description": "The similarity from which it is a match. Can be raised above the operator's, and lowered to "
        "the operator's floor.",
    }
    user_id = {**_USER_ID, "description": "Compare with this person alone (1:1)."}
    example_check = {"code": "blurred", "passed": True, "measured": 96.4, "required": {"min": 32.0}, "hint": None}
    sign_up = Route(
        "People",
        "Sign somebody up",
        "Enrols the one face of a photo, unless that face is enrolled already (`409`). With an `Idempotency-Key` a "
        "retry after a lost answer is safe: for 24 hours the same key answers what the first, successful attempt did.",
        {"status": "success", "message": f"Face stored successfully with user_id: {AN_ID}", "user_id": AN_ID},
        "-F file=@me.jpg",
        (*PHOTO_CODES, *CHECK_CODES, *GALLERY_CODES, "duplicate_face", "idempotency_conflict"),
        "app",
        {"file": photo},
        ("file",),
        ("IdempotencyKey",),
    )
    return {
        ("GET", "/"): Route(
            "Operation",
            "Is it running?",
            "Liveness: asks neither the database nor the models.",
            {"status": "success", "message": "Face Recognition API is running"},
        ),
        ("POST", "/signUp"): sign_up,
        ("POST", "/signup"): replace(
            sign_up, summary="Sign somebody up (alias)", text="The same as `/signUp`, for clients that write it so."
        ),
        ("POST", "/verify"): Route(
            "People",
            "Recognise somebody",
            "Says who is in the photo, or with `user_id` whether it is that person; writes nothing. Nobody who is "
            "similar enough is `401 no_match`.",
            {
                "status": "success",
                "message": "Face verified successfully with confidence: 0.94",
                "verified": True,
                "user_id": AN_ID,
                "similarity": 0.9412,
                "threshold": settings.verify_threshold,
            },
            "-F file=@me-again.jpg",
            (
                *(*PHOTO_CODES, *CHECK_CODES, *GALLERY_CODES),
                *("invalid_threshold", "invalid_user_id", "no_match", "unknown_user"),
            ),
            "app",
            {"file": photo, "threshold": threshold, "user_id": user_id},
            ("file",),
        ),
        ("POST", "/compare"): Route(
            "Photos",
            "Compare two photos",
            "Says whether two photos, a selfie and a portrait on a card perhaps, show one person; stores nothing. A "
            "refusal names the photo in `field`. Where liveness is enforced, `file1` must show a live face, and "
            "`file2` may show a picture.",
            {
                "status": "success",
                "message": english("faces_match"),
                "match": True,
                "similarity": 0.9412,
                "threshold": settings.verify_threshold,
            },
            "-F file1=@me.jpg -F file2=@me-again.jpg",
            (*PHOTO_CODES, *CHECK_CODES, "invalid_threshold"),
            "app",
            {"file1": photo, "file2": photo, "threshold": threshold},
            ("file1", "file2"),
        ),
        ("POST", "/analyze"): Route(
            "Photos",
            "Check a photo",
            "Makes the checks alone, for a capture screen's guidance; stores nothing. A photo that the checks refuse "
            "is a `200` with `accepted: false`, the first failed check's `code`, and what to do in `checks`. Boxes "
            "and landmarks are in pixels of the upright photo.",
            {
                "status": "success",
                "message": english("accepted"),
                "accepted": True,
                "code": None,
                "checks": [example_check],
                "image": {"width": 720, "height": 960},
                "faces": [
                    {
                        "box": [210.0, 250.5, 510.0, 640.0],
                        "landmarks": [[290.0, 400.0], [430.0, 400.5], [360.0, 470.0], [300.0, 550.0], [420.0, 550.5]],
                        "score": 0.91,
                    }
                ],
            },
            "-F file=@me.jpg",
            PHOTO_CODES,
            "app",
            {"file": photo},
            ("file",),
        ),
        ("GET", "/users/{user_id}"): Route(
            "People",
            "Is this person enrolled?",
            "Since when, and by which model.",
            {
                "status": "success",
                "message": "This person is enrolled.",
                "user_id": AN_ID,
                "enrolled_at": WHEN,
                "model": "auraface-v1",
            },
            codes=("invalid_user_id", "unknown_field", "unknown_user", "not_found", *GALLERY_CODES),
            scope="ops",
        ),
        ("DELETE", "/users/{user_id}"): Route(
            "People",
            "Erase a person",
            "Erases the template in the database and in every process. The receipt says so, for the operator's files.",
            {
                "status": "success",
                "message": "This person is erased.",
                "user_id": AN_ID,
                "erased_at": WHEN,
                "receipt": "9f0c2b4e6a815d37",
            },
            "-X DELETE",
            ("invalid_user_id", "unknown_field", "unknown_user", "not_found", "overloaded", *GALLERY_CODES),
            "ops",
        ),
        ("GET", "/health"): Route(
            "Operation",
            "Is it ready?",
            "Readiness: model, store and gallery, with counts; `503` until everything is there. While a large "
            "gallery loads, `gallery` says how far it is.",
            {
                "status": "success",
                "message": "ready",
                "model": "auraface-v1",
                "store": "MongoDB",
                "gallery": {"model": "auraface-v1", "enrolled": 1204, "last_seq": 1310},
            },
            codes=GALLERY_CODES,
        ),
        ("GET", "/metrics"): Route(
            "Operation", "Figures for Prometheus", "In its text format.", "text/plain", scope="ops"
        ),
        ("GET", "/openapi.json"): Route(
            "Documentation",
            "This description",
            "OpenAPI 3.1; the same until the service starts anew, so it carries an `ETag`.",
            "application/json",
        ),
        ("GET", "/docs"): Route(
            "Documentation", "This description, to read", "A page without any outside resource.", "text/html"
        ),
        ("GET", "/try"): Route(
            "Documentation", "Try it", "A page with camera or file: guidance, sign up, verify.", "text/html"
        ),
    }


def describe(settings: Settings, existing: Iterable[tuple[str, str]] | None = None) -> Json:
    """Describe the API as this service offers it.

    Args:
        settings: where its limits come from.
        existing: the methods and paths that the service has (`("GET", "/users/{user_id}")`); all when omitted.

    Returns:
        The OpenAPI document.

    Raises:
        ValueError: a route exists that is not described.
    """
    routes = _routes(settings)
    paths: dict[str, Json] = {}
    for method, path in routes if existing is None else sorted(existing, key=list(routes).index):
        paths.setdefault(path, _parameters(path))[method.lower()] = _operation(method, path, routes[method, path])
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Face Recognition API",
            "version": "1",
            "summary": "Signs people up by their face and recognises them again.",
            "description": _introduction(settings),
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": name, "description": text}
            for name, text in (
                ("People", "Enrolling, recognising and erasing."),
                ("Photos", "Questions about photos alone; nothing is stored."),
                ("Operation", "For load balancers, monitors and operators."),
                ("Documentation", "For people."),
            )
        ],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same keys."},
            },
            "headers": _HEADERS,
            "parameters": _PARAMETERS,
            "schemas": _schemas(settings),
        },
    }


def limits_of_checks(settings: Settings) -> dict[str, dict[str, float]]:
    """Check code -> its limit, {"min": …} or {"max": …}, as the checks themselves state it for these settings."""
    nothing = Measurements(
        *(0.0,) * 9,
        pose=Pose(0.0, 0.0, 0.0),
        colour_distance=0.0,
        covering=Covering(0.0, 0.0, 0.0, 0.0),
        darker_left=False,
    )
    found: list[Check] = judge(nothing, settings)
    return {
        "no_face": {"min": 1},
        "multiple_faces": {"max": 1},
        **{check.code: check.required for check in found},
        **({"not_live": {"min": settings.min_liveness}} if settings.liveness == "enforce" else {}),
    }


def _mib(settings: Settings) -> str:
    return f"{settings.max_file_bytes / 2**20:.3g}"


def _megapixels(settings: Settings) -> str:
    return f"{settings.max_image_pixels / 1e6:.3g}"


def _introduction(settings: Settings) -> str:
    return (
        "Every error is `{status, code, message, request_id}`: decide by `code`, which never changes; `message` is for "
        "people, may be reworded, and comes in the language that `Accept-Language` asks for where there is a "
        "translation. Keys that are not described here may be added at any time.\n\n"
        "Photos are form-data fields (`multipart/form-data`): JPEG, PNG, WebP or HEIC by content, at most "
        f"{_mib(settings)} MiB and {_megapixels(settings)} megapixels; EXIF orientation is applied, and animated files "
        "give their first frame. A similarity is at most 1 and higher is closer; from "
        f"{settings.verify_threshold:g} on it is a match unless the request sends a `threshold` of its own.\n\n"
        "Send an API key as `Authorization: Bearer …` or `X-API-Key: …`; a service that has no keys serves its own "
        "machine alone and asks for none. On `429` and `503` wait as many seconds as `Retry-After` says, then send the "
        "same request again."
    )


_USER_ID = {"type": "string", "format": "uuid", "pattern": f"^{USER_ID.pattern}$", "examples": [AN_ID]}
_HEADERS: Json = {
    "X-Request-ID": {
        "required": True,
        "description": "The request's own if it sent a sane one, else a new one; the service's log has it.",
        "schema": {"type": "string", "pattern": f"^{SANE_REQUEST_ID.pattern}$"},
    },
    "Content-Language": {
        "description": "The language of `message` and of the hints.",
        "schema": {"type": "string", "examples": ["en", "ar"]},
    },
    "Retry-After": {
        "required": True,
        "description": "Seconds to wait before the next attempt.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {
        "required": True,
        "description": "`FaceMatch` where the face was not recognised, `Bearer` where an API key is missing.",
        "schema": {"type": "string"},
    },
    "ETag": {
        "required": True,
        "description": "Of the description: with it in `If-None-Match` an unchanged one is answered `304`.",
        "schema": {"type": "string"},
    },
}
_PARAMETERS: Json = {
    "RequestID": {
        "name": "X-Request-ID",
        "in": "header",
        "description": "An id of yours for this request; one that is not sane is replaced, not refused.",
        "schema": {"type": "string", "examples": ["signup-7f3a"]},
    },
    "Language": {
        "name": "Accept-Language",
        "in": "header",
        "description": "Languages for messages and hints, the preferred first.",
        "schema": {"type": "string", "examples": ["ar, en;q=0.8"]},
    },
    "IdempotencyKey": {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "A random text, the same for every attempt at one sign-up.",
        "schema": {"type": "string", "pattern": f"^{SANE_IDEMPOTENCY_KEY.pattern}$", "examples": ["5f0c2a9e-signup"]},
    },
}


def _parameters(path: str) -> Json:
    shared: list[Json] = [{"$ref": "#/components/parameters/RequestID"}, {"$ref": "#/components/parameters/Language"}]
    if "{user_id}" in path:
        shared.append({"name": "user_id", "in": "path", "required": True, "schema": _USER_ID})
    return {"parameters": shared}


def _operation(method: str, path: str, route: Route) -> Json:
    operation: Json = {
        "operationId": f"{method}_{path.strip('/') or 'root'}".translate(str.maketrans("/.", "__", "{}")).lower(),
        "tags": [route.group],
        "summary": route.summary,
        "description": route.text,
        "responses": _responses(route),
    }
    if path == "/signup":
        operation.update({"operationId": "post_signup_alias", "x-alias-of": "/signUp"})
    if route.headers:
        operation["parameters"] = [{"$ref": f"#/components/parameters/{name}"} for name in route.headers]
    if route.form:
        files = {name for name, schema in route.form.items() if "contentMediaType" in schema}
        form: Json = {"type": "object", "properties": dict(route.form), "required": list(route.required)}
        encoding = {name: {"contentType": "image/jpeg, image/png, image/webp, image/heic"} for name in sorted(files)}
        operation["requestBody"] = {
            "required": True,
            "content": {"multipart/form-data": {"schema": form, "encoding": encoding}},
        }
    key = ""
    if route.scope:
        operation["security"] = [{"bearer": []}, {"apiKey": []}]
        operation["x-scope"] = route.scope
        key = ' -H "Authorization: Bearer $API_KEY"'
    address = "http://127.0.0.1:5000" + path.replace("{user_id}", AN_ID)
    operation["x-codeSamples"] = [
        {"lang": "curl", "source": f"curl{key}{' ' if route.curl else ''}{route.curl} {address}"}
    ]
    return operation


def _responses(route: Route) -> Json:
    always = {"X-Request-ID": {"$ref": "#/components/headers/X-Request-ID"}}
    worded = {**always, "Content-Language": {"$ref": "#/components/headers/Content-Language"}}
    if isinstance(route.answer, str):
        content: Json = {route.answer: {"schema": {"type": "object" if route.answer.endswith("json") else "string"}}}
    else:
        content = {"application/json": {"schema": _answer_schema(route.answer), "example": route.answer}}
    success: Json = {"description": "Done.", "headers": always, "content": content}
    responses: dict[str, Json] = {"200": success}
    if route.answer == "application/json":
        success["headers"] = {**always, "ETag": {"$ref": "#/components/headers/ETag"}}
        responses["304"] = {"description": "What `If-None-Match` names is still so.", "headers": always}
    of_keys = ("unauthorized", "forbidden", "rate_limited", "not_ready") if route.scope else ()
    codes_of: dict[int, list[str]] = {}
    for code, (status, _) in CODES.items():
        if code in {*route.codes, *of_keys, "internal_error"}:
            codes_of.setdefault(status, []).append(code)
    for status, codes in codes_of.items():
        headers = dict(worded)
        if status in {429, 503}:
            headers["Retry-After"] = {"$ref": "#/components/headers/Retry-After"}
        if status == 401:
            headers["WWW-Authenticate"] = {"$ref": "#/components/headers/WWW-Authenticate"}
        narrowed = {"properties": {"code": {"enum": codes}}, **({"required": ["checks"]} if status == 422 else {})}
        schema = {"allOf": [{"$ref": "#/components/schemas/Error"}, narrowed]}
        responses[str(status)] = {
            "description": ", ".join(f"`{code}`" for code in codes),
            "headers": headers,
            "content": {"application/json": {"schema": schema}},
        }
    responses["default"] = {
        "description": "What every address may answer to a request that is none: `bad_request`, `method_not_allowed`, "
        "`file_too_large`, `overloaded`.",
        "headers": worded,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    return responses


def _answer_schema(answer: Json) -> Json:
    return {
        "type": "object",
        "required": list(answer),
        "properties": {key: {"const": "success"} if key == "status" else _PROPERTIES[key] for key in answer},
    }


_CHECKS: Json = {
    "type": "array",
    "description": "Every check that was made, in the order in which they decide.",
    "items": {"$ref": "#/components/schemas/Check"},
}
_NUMBER: Json = {"type": "number"}
# What the keys of successful answers hold; the same key means the same everywhere.
_PROPERTIES: Mapping[str, Json] = {
    "message": {"type": "string", "description": "One sentence for people."},
    "user_id": {**_USER_ID, "description": "Who it is: a random UUID, given at sign-up."},
    "verified": {"const": True, "description": "The similarity reaches the threshold."},
    "match": {"type": "boolean", "description": "Whether the similarity reaches the threshold."},
    "similarity": {"type": "number", "maximum": 1, "description": "To four decimals; higher is closer."},
    "threshold": {"type": "number", "maximum": 1, "description": "The similarity that was needed."},
    "accepted": {"type": "boolean", "description": "Whether every check passed."},
    "code": {"enum": [None, *CHECK_CODES], "description": "The first failed check's; null where all passed."},
    "checks": _CHECKS,
    "image": {
        "type": "object",
        "description": "Width and height of the upright photo, which boxes and landmarks are measured on.",
        "required": ["width", "height"],
        "properties": {"width": {"type": "integer"}, "height": {"type": "integer"}},
    },
    "faces": {
        "type": "array",
        "description": "Where the faces are, the widest first.",
        "items": {"$ref": "#/components/schemas/Face"},
    },
    "enrolled_at": {"type": "string", "format": "date-time", "description": "When the person signed up, UTC."},
    "erased_at": {"type": "string", "format": "date-time", "description": "UTC."},
    "receipt": {
        "type": ["string", "null"],
        "pattern": "^[0-9a-f]+$",
        "description": "The audit log's proof of it; null without one.",
    },
    "model": {
        "type": "string",
        "description": "What made the templates; those of different models are never compared.",
    },
    "store": {"type": "string", "description": "Which database."},
    "gallery": {
        "type": "object",
        "description": "How many people are enrolled with this model, and where the log ends.",
        "required": ["model", "enrolled", "last_seq"],
    },
}


def _what_is_measured(settings: Settings) -> dict[str, str]:
    """Check code -> what its `measured` is, on the face; two checks have a second limit, the worse of both is told."""
    probability = "probability, 0 to 1"
    return {
        "no_face": "faces found",
        "multiple_faces": "faces found",
        "face_too_small": "pixels of the photo between the eyes, divided by cos(yaw)",
        "face_too_large": "eyes to chin / height of the photo",
        "face_cut_off": "share inside the photo, 0 to 1",
        "blurred": "sharpness; 100 is a usual sharp photo",
        "too_dark": f"mean luminance, 0 to 1; or share of pixels up to 25 of 255, ≤ {settings.max_under_exposure:g}",
        "too_bright": f"mean luminance, 0 to 1; or share of pixels from 247 of 255, ≤ {settings.max_over_exposure:g}",
        "low_contrast": "entropy of the luminance, 0 to 8 bits",
        "uneven_light": "darker cheek / lighter cheek, 0 to 1",
        "head_tilted": "roll, degrees",
        "head_turned": "yaw, degrees",
        "head_raised_or_lowered": "pitch, degrees",
        "unnatural_colour": "distance of CIELAB a*, b* from natural skin",
        "landmarks_hidden": f"{probability}; a mask or sunglasses that hide them are told by their own check alone",
        "mask": probability,
        "sunglasses": probability,
        "face_covered": probability,
        "not_live": probability,
    }


def _schemas(settings: Settings) -> Json:
    limits, measured = limits_of_checks(settings), _what_is_measured(settings)
    return {
        "Error": {
            "type": "object",
            "required": ["status", "code", "message", "request_id"],
            "properties": {
                "status": {"const": "error"},
                "code": {"$ref": "#/components/schemas/Code", "description": "What went wrong; it never changes."},
                "message": {"type": "string", "description": "One sentence that a person can act on."},
                "request_id": {"type": "string", "description": "As in `X-Request-ID`."},
                "checks": {**_CHECKS, "description": "With `422`: every check that was made, in order."},
                "verified": {"const": False, "description": "With `no_match`."},
                "field": {"enum": ["file1", "file2"], "description": "With `/compare`: which photo it is about."},
                "gallery": {"type": "object", "description": "With `not_ready`: how far the gallery is loaded."},
            },
        },
        "Check": {
            "type": "object",
            "required": ["code", "passed", "measured", "required", "hint"],
            "properties": {
                "code": {"enum": list(CHECK_CODES), "description": "What a failure is called."},
                "passed": {"type": "boolean", "description": "A check that could not be made has not."},
                "measured": {
                    "type": ["number", "null"],
                    "description": "In the unit that the table of codes names; null if it could not be made.",
                },
                "required": {
                    "type": "object",
                    "description": "The limit: `min` or `max`.",
                    "properties": {"min": _NUMBER, "max": _NUMBER},
                    "minProperties": 1,
                    "maxProperties": 1,
                    "additionalProperties": False,
                },
                "hint": {"type": ["string", "null"], "description": "What the person can do; null when passed."},
            },
        },
        "Face": {
            "type": "object",
            "required": ["box", "landmarks", "score"],
            "properties": {
                "box": {
                    **{"type": "array", "items": _NUMBER, "minItems": 4, "maxItems": 4},
                    "description": "Left, top, right, bottom; may reach outside the photo.",
                },
                "landmarks": {
                    **{"type": "array", "minItems": 5, "maxItems": 5},
                    "items": {"type": "array", "items": _NUMBER, "minItems": 2, "maxItems": 2},
                    "description": "Five points [x, y]; which ones depends on the model.",
                },
                "score": {"type": "number", "description": "The detector's; comparable within one model."},
            },
        },
        "Code": {
            "type": "string",
            "description": "What went wrong. A code never changes: decide by it.",
            "oneOf": [
                {
                    "const": code,
                    "description": message,
                    "x-status": status,
                    **({"x-hint": HINTS[code]} if code in HINTS else {}),
                    **({"x-limit": limits[code], "x-measured": measured[code]} if code in limits else {}),
                }
                for code, (status, message) in CODES.items()
            ],
        },
    }
