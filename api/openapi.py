"""Makes the API's description (OpenAPI 3.1) from openapi.yaml, the settings and the table of codes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from api.request_fields import CHALLENGE_FIELDS, challenge_mode
from errors import CODES
from face_checks import HINTS
from settings import Settings
from version import VERSION

Json = dict[str, Any]

CHECK_CODES = tuple(code for code, (status, _) in CODES.items() if status == 422)
HEADERS_OF_STATUS = {401: ("WWW-Authenticate",), 429: ("Retry-After",), 503: ("Retry-After",)}


def describe(settings: Settings, existing: Iterable[tuple[str, str]] | None = None) -> Json:
    """Describe the API as this service offers it.

    Args:
        settings: where its limits come from.
        existing: the methods and paths that the service has (`("GET", "/users/{user_id}")`); all when omitted.

    Returns:
        The OpenAPI document.

    Raises:
        ValueError: a route exists that is not described, or a code is described that does not exist.
        KeyError: the document names a setting that does not exist.
    """
    api: Json = _filled_in(
        _document(),
        {
            **vars(settings),
            "version": VERSION,
            "max_file_mib": f"{settings.max_file_bytes / 2**20:.3g}",
            "max_megapixels": f"{settings.max_image_pixels / 1e6:.3g}",
        },
    )
    if existing is not None:
        _keep_existing(api["paths"], set(existing))
    _set_challenges(api["paths"], settings)
    groups = {**api.pop("x-error-groups"), "checks": CHECK_CODES}
    for item in api["paths"].values():
        for operation in operations_of(item).values():
            _complete(operation, groups)
        item.setdefault("parameters", []).extend(
            [{"$ref": "#/components/parameters/RequestID"}, {"$ref": "#/components/parameters/Language"}]
        )
    _add_codes(api["components"]["schemas"]["Code"])
    return api


@cache
def _document() -> Json:
    """openapi.yaml as it is; read once, because tests make an application each."""
    document: Json = yaml.load((Path(__file__).parent / "openapi.yaml").read_text("utf-8"), yaml.CSafeLoader)
    return document


def operations_of(item: Json) -> dict[str, Json]:
    """The operations of a path: method in lower case -> operation."""
    return {method: operation for method, operation in item.items() if method != "parameters"}


def resolved(api: Json, value: Json) -> Json:
    """The part of the document that `value` refers to by `$ref`; `value` itself if it is no reference."""
    if "$ref" not in value:
        return value
    found: Any = api
    for key in value["$ref"].removeprefix("#/").split("/"):
        found = found[key]
    return dict(found)


def _filled_in(value: Any, values: Mapping[str, Any]) -> Any:
    """A copy of `value` with every `{{ name }}` in it replaced; a text that is nothing else keeps the value's type."""
    if isinstance(value, dict):
        return {key: _filled_in(inner, values) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled_in(inner, values) for inner in value]
    if not isinstance(value, str):
        return value
    if whole := re.fullmatch(r"\{\{ (\w+) \}\}", value):
        return values[whole[1]]
    return re.sub(r"\{\{ (\w+) \}\}", lambda name: str(values[name[1]]), value)


def _keep_existing(paths: Json, existing: set[tuple[str, str]]) -> None:
    described = {(method.upper(), path) for path, item in paths.items() for method in operations_of(item)}
    if unknown := existing - described:
        raise ValueError(f"these routes are not described in openapi.yaml: {sorted(unknown)}")
    for method, path in described - existing:
        del paths[path][method.lower()]
        if not operations_of(paths[path]):
            del paths[path]


def _set_challenges(paths: Json, settings: Settings) -> None:
    """Take a challenge's fields out of the forms that are read without them, and require them where a route does."""
    for path, item in paths.items():
        form = item.get("post", {}).get("requestBody", {}).get("content", {}).get("multipart/form-data", {})
        fields = form.get("schema", {}).get("properties", {})
        if "challenge_id" not in fields:
            continue
        mode = challenge_mode(settings, path)
        if mode == "require":
            form["schema"]["required"] += CHALLENGE_FIELDS
        elif mode == "off":
            for field in CHALLENGE_FIELDS:
                del fields[field]
            item["post"]["x-errors"].remove("challenge")


def _complete(operation: Json, groups: Mapping[str, Iterable[str]]) -> None:
    """Give an operation what follows from its `x-curl`, `x-scope` and `x-errors`."""
    operation["x-codeSamples"] = [{"lang": "curl", "source": operation.pop("x-curl")}]
    names = [*operation.pop("x-errors", ()), "internal_error"]
    if "x-scope" in operation:
        operation["security"] = [{"bearer": []}, {"apiKey": []}]
        names.append("key")
    codes = {code for name in names for code in groups.get(name, (name,))}
    if unknown := codes - set(CODES):
        raise ValueError(f"openapi.yaml names codes that errors.py does not have: {sorted(unknown)}")
    responses = operation["responses"]
    for response in responses.values():
        response["headers"] = _headers("X-Request-ID") | response.get("headers", {})
    for status in sorted({CODES[code][0] for code in codes}):
        responses[str(status)] = _error_response(status, [code for code in CODES if code in codes])
    responses["default"] = {"$ref": "#/components/responses/NotUnderstood"}


def _error_response(status: int, codes: list[str]) -> Json:
    """The response of one status; `x-codes` are those of `codes` that have it."""
    codes = [code for code in codes if CODES[code][0] == status]
    return {
        "description": ", ".join(f"`{code}`" for code in codes),
        "x-codes": codes,
        "headers": _headers("X-Request-ID", "Content-Language", *HEADERS_OF_STATUS.get(status, ())),
        # The same schema for every error: the generated clients then have one class of it.
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
    }


def _headers(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _add_codes(schema: Json) -> None:
    limits = schema["x-codes"]
    schema["enum"] = list(CODES)
    schema["x-codes"] = {
        code: {
            "status": status,
            "message": message,
            **({"hint": HINTS[code]} if code in HINTS else {}),
            **limits.get(code, {}),
        }
        for code, (status, message) in CODES.items()
    }
