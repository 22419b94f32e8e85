"""Owns giving out HTML pages: cached by their content, and allowed to load what is in them and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from flask import Flask, Response, request

from api.access import PUBLIC, scope


def page_answer(page: str, *, also: str = "") -> Response:
    """Answer with a page whose one style and one script are inline.

    Args:
        page: the HTML.
        also: further directives of its Content-Security-Policy, such as `connect-src 'self'`.
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
    """Answer with something that only changes with the service: 304 for whoever has it."""
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    response = Response(body, content_type=content_type, headers=headers)
    response.add_etag()
    response.make_conditional(request)
    return response


def add_try_page(app: Flask) -> None:
    """Add `GET /try`: camera or file, guidance, sign up, verify."""
    page = (Path(__file__).parent / "html" / "try.html").read_text("utf-8")

    @app.get("/try", provide_automatic_options=False)
    @scope(PUBLIC)
    def try_page() -> Response:
        response = page_answer(page, also="connect-src 'self'; ")
        response.headers["Permissions-Policy"] = "camera=(self)"
        return response
