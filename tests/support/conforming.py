"""Checks a response against the API's description."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jsonschema_rs import Draft202012Validator

Json = dict[str, Any]


def assert_described(api: Json, method: str, path: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Hold an answer's status, headers, content type and body against the description of its operation.

    Args:
        api: the OpenAPI document.
        method, path: the operation, with the path's parameters as names: "GET", "/users/{user_id}".
        status, headers, body: the answer; the headers of a mapping that does not mind capitals.
    """
    responses = api["paths"][path][method.lower()]["responses"]
    response = responses.get(str(status), responses["default"])
    for name, reference in response["headers"].items():
        header = api["components"]["headers"][reference["$ref"].rsplit("/", 1)[1]]
        found = headers.get(name)
        assert found is not None or not header.get("required"), f"{name} is missing from a {status}"
        if found is not None:
            value = int(found) if header["schema"]["type"] == "integer" else found
            validate(api, header["schema"], value)
    if status == 304:
        assert body == b""
        return
    ((content_type, content),) = response["content"].items()
    assert headers["Content-Type"].partition(";")[0] == content_type
    validate(api, content["schema"], json.loads(body) if content_type.endswith("json") else body.decode())


def validate(api: Json, schema: Json, value: object) -> None:
    """Hold a value against a schema of the description."""
    whole = {"allOf": [schema], "components": api["components"]}
    Draft202012Validator(whole, validate_formats=True).validate(value)


def shape(value: object) -> object:
    """The keys of an answer, all the way down, and the kinds of what they hold."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__
