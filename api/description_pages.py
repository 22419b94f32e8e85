"""Shows the API's description: `GET /openapi.json`, `GET /docs` and docs/api.md."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from flask import Flask, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from api import openapi
from api.access import PUBLIC, scope
from api.html_pages import cached, page_answer
from api.openapi import Json
from settings import Settings


def add_routes(app: Flask, settings: Settings) -> None:
    """Add the routes that describe the API; to be called when every other route is there."""
    api = openapi.describe(settings, [*routes_of(app), ("GET", "/openapi.json"), ("GET", "/docs")])
    text = json.dumps(api)
    page = functools.cache(lambda: render("docs.html", api))  # when somebody first looks at it

    @app.get("/openapi.json", provide_automatic_options=False)
    @scope(PUBLIC)
    def description() -> Response:
        return cached(text, "application/json", "default-src 'none'")

    @app.get("/docs", provide_automatic_options=False)
    @scope(PUBLIC)
    def docs() -> Response:
        return page_answer(page())


def routes_of(app: Flask) -> list[tuple[str, str]]:
    """The methods and paths that the application has, as the description writes them."""
    return [
        (method, described_path(rule.rule))
        for rule in app.url_map.iter_rules()
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
    ]


def described_path(rule: str) -> str:
    """A route's pattern as the description writes it: `/users/{user_id}`."""
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule)


def render(template: str, api: Json) -> str:
    """Render one of pages/docs.html and pages/api.md from an OpenAPI document of `openapi.describe`."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "html"),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=template.endswith(".html"),
        keep_trailing_newline=True,
    )
    pages.filters["marked"] = _marked
    operations = [
        _operation(api, path, method, item)
        for path, item in api["paths"].items()
        for method in item
        if method != "parameters"
    ]
    groups = {tag["name"]: [one for one in operations if tag["name"] in one["tags"]] for tag in api["tags"]}
    codes = [
        {
            "x-hint": "",
            "x-measured": "",
            **code,
            "limit": " ".join(_SIGNS[key] + f"{value:g}" for key, value in code.get("x-limit", {}).items()),
        }
        for code in api["components"]["schemas"]["Code"]["oneOf"]
    ]
    fields = {"answer": {key: one for operation in operations for key, one in operation["fields"].items()}}
    fields |= {name.lower(): api["components"]["schemas"][name]["properties"] for name in ("Error", "Check", "Face")}
    keys = [
        {"name": name, "place": place, "description": one["description"]}
        for place, properties in fields.items()
        for name, one in properties.items()
        if "description" in one
    ]
    sent = [{**one, "place": "request"} for one in api["components"]["parameters"].values()]
    answered = [{"name": name, "place": "response", **one} for name, one in api["components"]["headers"].items()]
    return pages.get_template(template).render(
        api=api, groups=groups, codes=codes, fields=keys, headers=sent + answered
    )


_SIGNS = {"min": "≥\u00a0", "max": "≤\u00a0"}


def _operation(api: Json, path: str, method: str, item: Json) -> Json:
    operation = item[method]
    form = operation.get("requestBody", {}).get("content", {}).get("multipart/form-data", {}).get("schema", {})
    parameters = [_resolved(api, one) for one in operation.get("parameters", [])]
    parameters += [one for one in item["parameters"] if one.get("in") == "path"]
    inputs: list[Json] = [
        {"name": name, "place": "form field", "required": name in form["required"], **_described(schema)}
        for name, schema in form.get("properties", {}).items()
    ]
    inputs += [
        {"name": one["name"], "place": one["in"], "required": one.get("required"), **_described(one["schema"], one)}
        for one in parameters
    ]
    content = operation["responses"]["200"]["content"]
    answer = content.get("application/json", {})
    errors: list[tuple[str, list[str]]] = [
        (status, response["content"]["application/json"]["schema"]["allOf"][1]["properties"]["code"]["enum"])
        for status, response in operation["responses"].items()
        if status.startswith(("4", "5"))
    ]
    return {
        **operation,
        "method": method.upper(),
        "path": path,
        "scope": operation.get("x-scope"),
        "alias": operation.get("x-alias-of"),
        "inputs": inputs,
        "example": _indented(answer["example"]) if "example" in answer else "",
        "fields": answer.get("schema", {}).get("properties", {}),
        "is_page": "text/html" in content,
        "errors": errors,
    }


def _indented(answer: Json) -> str:
    """JSON for people: lists of numbers stay on one line."""
    text = json.dumps(answer, indent=2, ensure_ascii=False)
    return re.sub(
        r"\[[\s\d.,]+\]", lambda numbers: "[" + ", ".join(numbers[0][1:-1].replace(",", " ").split()) + "]", text
    )


def _resolved(api: Json, one: Json) -> Json:
    found: Any = api
    for part in one["$ref"].lstrip("#/").split("/"):
        found = found[part]
    return dict(found)


def _described(schema: Json, parameter: Json | None = None) -> Json:
    text = (parameter or {}).get("description") or schema.get("description") or ""
    if "minimum" in schema:
        text += f" From {schema['minimum']:g} to {schema['maximum']:g}; {schema['default']:g} if not sent."
    if schema.get("format") == "uuid":
        text = f"{text} A UUID.".strip()
    return {"description": text}


def _marked(text: str) -> Markup:
    """Markdown's `code` as HTML."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped just before
