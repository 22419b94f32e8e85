"""Notes what happens to the current request, and writes its log line and its metrics."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field

from flask import Flask, Response, g, request

import logs
from api.api_keys import ApiKey
from api.metrics import Metrics
from pipeline import Trace

logger = logging.getLogger(__name__)

SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,128}")


@dataclass
class RequestRecord:
    """The facts about one request so far.

    Attributes:
        request_id: the client's own X-Request-ID if it is sane, else a fresh one.
        code: the code of the error in the answer, or `ok`.
        api_key: the API key in the request; None without one.
        origin_accepted: whether the request's web origin may call; False until that is known.
        user_id: the person that the request is about; None until that is known.
        failed_checks: the codes of the checks that the photo failed.
        audited: whether the audit log has this request's line already.
        trace: the stages' times and the checks' figures.
        begun: when the request began, by `time.perf_counter`.
    """

    request_id: str
    code: str = "ok"
    api_key: ApiKey | None = None
    origin_accepted: bool = False
    user_id: str | None = None
    failed_checks: list[str] = field(default_factory=list)
    audited: bool = False
    trace: Trace = field(default_factory=Trace)
    begun: float = field(default_factory=time.perf_counter)

    @property
    def api_key_name(self) -> str | None:
        """The operator's name for the API key; None without one."""
        return self.api_key.name if self.api_key else None

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
        metrics.photo_failed(record.failed_checks)
        fields = {
            "request_id": record.request_id,
            "status": response.status_code,
            "code": record.code,
            "key": record.api_key_name,
            "ms": round(1000 * seconds, 1),
            "stages_ms": record.trace.stages_ms,
            "figures": record.trace.figures,
        }
        shown = {name: value for name, value in fields.items() if value not in ({}, None)}
        logger.info("%s %s", request.method, route, extra={logs.FIELDS: shown})
        return response
