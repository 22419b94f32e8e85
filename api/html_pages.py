"""Sends HTML pages. Browsers may cache them, and may run only the style and the script inside them."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from flask import Flask, Response, request

from api.access import PUBLIC, scope


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


def add_try_page(app: Flask) -> None:
    """Add `GET /try`, the page that signs up and verifies with a camera or a file."""
    page = (Path(__file__).parent / "html" / "try.html").read_text("utf-8")

    @app.get("/try", provide_automatic_options=False)
    @scope(PUBLIC)
    def try_page() -> Response:
        response = page_answer(page, also="connect-src 'self'; ")
        response.headers["Permissions-Policy"] = "camera=(self)"
        return response
