"""Shows the API's description: `GET /openapi.json`, `GET /docs` and docs/api.md."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

from flask import Flask, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from api import openapi
from api.access import PUBLIC, scope
from api.html_pages import cached, page_answer
from api.openapi import Json
from settings import Settings


def add_description_routes(app: Flask, settings: Settings) -> None:
    """Add the routes that describe the API; to be called when every other route is there."""
    api = openapi.describe(settings, [*routes_of(app), ("GET", "/openapi.json"), ("GET", "/docs")])
    text = json.dumps(api)
    page = functools.cache(lambda: render_page("docs.html", api))  # when somebody first looks at it

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


def render_page(template: str, api: Json) -> str:
    """Render one of html/docs.html and html/api.md from an OpenAPI document of `openapi.describe`."""
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
        for method in openapi.operations_of(item)
    ]
    groups = {tag["name"]: [one for one in operations if tag["name"] in one["tags"]] for tag in api["tags"]}
    codes = [
        {"code": code, "hint": "", "measured": "", **facts, "limit": _limit(facts.get("limit", {}))}
        for code, facts in api["components"]["schemas"]["Code"]["x-codes"].items()
    ]
    sent = [{**one, "place": "request"} for one in api["components"]["parameters"].values()]
    answered = [{"name": name, "place": "response", **one} for name, one in api["components"]["headers"].items()]
    return pages.get_template(template).render(
        api=api, groups=groups, codes=codes, fields=_fields(api), headers=sent + answered
    )


def _limit(limit: dict[str, float]) -> str:
    signs = {"min": "≥\u00a0", "max": "≤\u00a0"}
    return " ".join(f"{signs[side]}{value:g}" for side, value in limit.items())


def _fields(api: Json) -> list[Json]:
    """Every key of every schema, once for all successful answers: there the same key means the same."""
    fields: dict[tuple[str, str], Json] = {}
    for schema_name, schema in api["components"]["schemas"].items():
        properties = schema.get("properties", {})
        place = "answer" if properties.get("status", {}).get("const") == "success" else f"`{schema_name}`"
        for name, one in properties.items():
            if text := openapi.resolved(api, one).get("description"):
                fields.setdefault((place, name), {"name": name, "place": place, "description": text})
    return list(fields.values())


def _operation(api: Json, path: str, method: str, item: Json) -> Json:
    """What the pages show of one operation."""
    operation = item[method]
    form = operation.get("requestBody", {}).get("content", {}).get("multipart/form-data", {}).get("schema", {})
    inputs: list[Json] = [
        {"name": name, "place": "form field", "required": name in form["required"], **schema}
        for name, schema in form.get("properties", {}).items()
    ]
    parameters = [one for one in item["parameters"] if one.get("in") == "path"] + operation.get("parameters", [])
    for parameter in parameters:
        described = openapi.resolved(api, parameter)
        inputs.append({"required": False, "place": described["in"], **described})
    content = operation["responses"]["200"]["content"]
    example = content.get("application/json", {}).get("example")
    return {
        **operation,
        "method": method.upper(),
        "path": path,
        "scope": operation.get("x-scope"),
        "alias": operation.get("x-alias-of"),
        "inputs": inputs,
        "example": _indented(example) if example else "",
        "is_page": "text/html" in content,
        "errors": [(status, one["x-codes"]) for status, one in operation["responses"].items() if "x-codes" in one],
    }


def _indented(answer: Json) -> str:
    """JSON for people: lists of numbers stay on one line."""
    text = json.dumps(answer, indent=2, ensure_ascii=False)
    return re.sub(
        r"\[[\s\d.,]+\]", lambda numbers: "[" + ", ".join(numbers[0][1:-1].replace(",", " ").split()) + "]", text
    )


def _marked(text: str) -> Markup:
    """Markdown's `code` as HTML."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped just before
