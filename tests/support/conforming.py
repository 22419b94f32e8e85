"""Checks a response against the API's description."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jsonschema_rs import Draft202012Validator

from api.openapi import resolved

Json = dict[str, Any]


def assert_described(api: Json, method: str, path: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Hold an answer's status, headers, content type and body against the description of its operation.

    Args:
        api: the OpenAPI document.
        method, path: the operation, with the path's parameters as names: "GET", "/users/{user_id}".
        status, headers, body: the answer; the headers of a mapping that does not mind capitals.
    """
    responses = api["paths"][path][method.lower()]["responses"]
    response = resolved(api, responses.get(str(status), responses["default"]))
    for name, reference in response["headers"].items():
        header = resolved(api, reference)
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
    if not content_type.endswith("json"):
        validate(api, content["schema"], body.decode())
        return
    answer: Json = json.loads(body)
    validate(api, content["schema"], answer)
    codes = api["components"]["schemas"]["Code"]["enum"]
    if status >= 400:
        assert answer["code"] in response.get("x-codes", codes)
        assert ("checks" in answer) == (status == 422)
    assert {check["code"] for check in answer.get("checks", ())} <= set(codes)


def validate(api: Json, schema: Json, value: object) -> None:
    """Hold a value against a schema of the description."""
    whole = {"allOf": [schema], "components": api["components"]}
    Draft202012Validator(whole, validate_formats=True).validate(value)


def shape(value: object) -> object:
    """The keys of an answer, all the way down, and the kinds of their values."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__
