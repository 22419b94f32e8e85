"""Sends HTML pages. Browsers may cache them, and may run only the style and the script inside them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

from flask import Flask, Response, request

from api.access import PUBLIC, scope
from errors import CODES, SENTENCES
from face_checks import HINTS, NEARER_HINTS
from settings import Settings


def page_answer(page: str, *, also: str = "") -> Response:
    """Answer with a page that has one inline style and one inline script.

    Args:
        page: the HTML.
        also: more directives for its Content-Security-Policy, such as `connect-src 'self'`.
    """
    digests = {
        tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for tag, text in re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL)
    }
    policy = (
        f"default-src 'none'; style-src 'sha256-{digests['style']}'; script-src 'sha256-{digests['script']}'; "
        f"{also}base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return cached(page, "text/html; charset=utf-8", policy)


def cached(body: str, content_type: str, policy: str) -> Response:
    """Answer with a text that stays the same while the service runs; 304 if the client has it already."""
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    response = Response(body, content_type=content_type, headers=headers)
    response.add_etag()
    response.make_conditional(request)
    return response


def add_try_page(app: Flask, settings: Settings) -> None:
    """Add `GET /try`, the page that signs up and verifies with a camera or a file."""
    page = try_page_html(updates_people=settings.update_template != "off")

    @app.get("/try", provide_automatic_options=False)
    @scope(PUBLIC)
    def try_page() -> Response:
        response = page_answer(page, also="connect-src 'self'; ")
        response.headers["Permissions-Policy"] = "camera=(self)"
        return response


def try_page_html(*, updates_people: bool = False) -> str:
    """The page of `GET /try`, with its style, its script and the texts of every language in it.

    Args:
        updates_people: whether the page must say that a verified photo may add itself to the person.
    """
    style, script = (read_page_file(f"try.{kind}") for kind in ("css", "js"))
    texts = json.dumps(page_texts(), ensure_ascii=False).replace("<", "\\u003c")
    page = read_page_file("try.html").replace("{{ style }}", style)
    page = page.replace("{{ privacy }}", "privacyOfUpdates" if updates_people else "privacy")
    return page.replace("{{ script }}", f"const TEXTS = {texts};\n{script}")


def page_texts() -> dict[str, dict[str, dict[str, str]]]:
    """What the page of `GET /try` and the service say, by language, kind of text and name.

    The page needs the service's sentences too: it shows an answer again in another language, without asking again.
    """
    english = {
        **json.loads(read_page_file("try_texts.json")),
        "messages": {code: message for code, (_, message) in CODES.items()} | dict(SENTENCES),
        "hints": {**HINTS, **NEARER_HINTS},
    }
    others = sorted((Path(__file__).parent / "languages").glob("*.json"))
    return {"en": english, **{path.stem: json.loads(path.read_text("utf-8")) for path in others}}


def read_page_file(name: str) -> str:
    """Read a file of html/."""
    return (Path(__file__).parent / "html" / name).read_text("utf-8")
