"""Writes the audit lines of requests: which requests leave one, and what it says."""

from __future__ import annotations

from flask import Flask, Response, request

from api.request_log import current_record
from store.audit_log import AuditLog

# The endpoints that leave a line, and what the line calls them. An analysed photo and a monitor's visit leave none.
EVENTS = {
    "sign_up": "enrol",
    "verify": "verify",
    "compare": "compare",
    "user": "look up",
    "erase": "erase",
}
REFUSED = ("unauthorized", "forbidden")


def audit_requests(app: Flask, audit: AuditLog) -> None:
    """Write a line for every request that `EVENTS` names, and for every refused API key.

    A request that a rate limit or a web origin turns away leaves no line: else anybody could fill the disk.
    """

    @app.after_request
    def note(response: Response) -> Response:
        record = current_record()
        event = EVENTS.get(request.endpoint or "", "call" if record.code in REFUSED else None)
        turned_away = not record.origin_accepted or (record.code == "rate_limited" and record.user_id is None)
        if event is not None and not turned_away and not record.audited:
            audit_request(audit, event, record.code)
        return response


def audit_request(audit: AuditLog, event: str, code: str) -> str | None:
    """Write a line about the current request; returns the line's SHA-256, as `AuditLog.record` does."""
    record = current_record()
    record.audited = True
    return audit.record(
        event,
        code=code,
        user_id=record.user_id,
        key=record.api_key_name,
        address=request.remote_addr,
        request_id=record.request_id,
    )
