"""Notes what happens to the current request, and writes its log line, its metrics and its audit line."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flask import Flask, Response, g, request

import logs
from api.api_keys import ApiKey
from api.metrics import Metrics
from engines.model_slots import NOBODY, Client
from pipeline import Trace
from store.audit_log import AuditLog

logger = logging.getLogger(__name__)

# The endpoints that leave a line, and how the line calls them. Photo analysis and monitoring leave none.
EVENTS = {
    "sign_up": "enrol",
    "verify": "verify",
    "compare": "compare",
    "user": "look up",
    "erase": "erase",
    "add_photo": "add photo",
    "remove_photo": "remove photo",
}
REFUSED_CODES = ("unauthorized", "forbidden")
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,128}")


@dataclass
class RequestRecord:
    """The facts about one request so far.

    Attributes:
        request_id: the client's own X-Request-ID if it is sane, else a fresh one.
        code: the code of the error in the answer, or `ok`.
        api_key: the API key in the request; None without one.
        client: the API key and the network of the caller, for taking turns.
        origin_accepted: whether the request's web origin may call; False until that is known.
        user_id: the person that the request is about; None until that is known.
        failed_checks: the checks that the photo failed, code -> what was measured; None where nothing could be.
        audited: whether the audit log has this request's own line already.
        trace: the stages' times, the similarity and the liveness.
        begun: when the request began, by `time.perf_counter`.
    """

    request_id: str
    code: str = "ok"
    api_key: ApiKey | None = None
    client: Client = NOBODY
    origin_accepted: bool = False
    user_id: str | None = None
    failed_checks: dict[str, float | None] = field(default_factory=dict)
    audited: bool = False
    trace: Trace = field(default_factory=Trace)
    begun: float = field(default_factory=time.perf_counter)

    @property
    def api_key_name(self) -> str | None:
        """The operator's name for the API key; None without one."""
        return self.api_key.name if self.api_key else None

    def note_checks(self, checks: Iterable[Mapping[str, Any]]) -> None:
        """Note which of a photo's checks have failed.

        Args:
            checks: as the API lists them.
        """
        self.failed_checks |= {check["code"]: check["measured"] for check in checks if not check["passed"]}

    @property
    def seconds(self) -> float:
        """Seconds since the request began."""
        return time.perf_counter() - self.begun


def current_record() -> RequestRecord:
    """The record of the current request."""
    record: RequestRecord = g.record
    return record


def log_requests(app: Flask, metrics: Metrics) -> None:
    """Give every request an id and a record; write one log line and the metrics when it is answered."""

    @app.before_request
    def begin() -> None:
        sent = request.headers.get("X-Request-ID", "")
        g.record = RequestRecord(sent if SANE_REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex)

    @app.after_request
    def finish(response: Response) -> Response:
        record = current_record()
        response.headers["X-Request-ID"] = record.request_id
        # The route's pattern, because a client could put anything into the path.
        route = request.url_rule.rule if request.url_rule else "(no such route)"
        seconds = record.seconds
        metrics.observe(
            method=request.method,
            route=route,
            status=response.status_code,
            code=record.code,
            seconds=seconds,
            stages_ms=record.trace.stages_ms,
        )
        metrics.photo_failed(list(record.failed_checks))
        fields = {
            "request_id": record.request_id,
            "status": response.status_code,
            "code": record.code,
            "key": record.api_key_name,
            "address": request.remote_addr,
            "user_id": record.user_id,
            "ms": round(1000 * seconds, 1),
            "stages_ms": record.trace.stages_ms,
            "failed_checks": record.failed_checks,
            **record.trace.figures,
        }
        shown = {name: value for name, value in fields.items() if value not in ({}, None)}
        logger.info("%s %s", request.method, route, extra={logs.FIELDS: shown})
        return response


def audit_requests(app: Flask, audit: AuditLog) -> None:
    """Write a line for every request that `EVENTS` names, and for refused API keys, of these so many a minute.

    A request that is refused for its rate or its web origin leaves no line, because anybody could fill the disk so.
    """

    @app.after_request
    def note(response: Response) -> Response:
        record = current_record()
        event = EVENTS.get(request.endpoint or "", "call" if record.code in REFUSED_CODES else None)
        turned_away = not record.origin_accepted or (record.code == "rate_limited" and record.user_id is None)
        if event is not None and not turned_away and not record.audited:
            audit_request(audit, event, record.code)
        return response


def audit_request(audit: AuditLog, event: str, code: str) -> str | None:
    """Write a line about the current request; returns the line's SHA-256, as `AuditLog.record` does."""
    record = current_record()
    write = audit.record_refusal if code in REFUSED_CODES else audit.record
    return write(
        event,
        code=code,
        user_id=record.user_id,
        key=record.api_key_name,
        address=request.remote_addr,
        request_id=record.request_id,
    )
