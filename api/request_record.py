"""The record of the current request: what its log line, its metrics and its audit line tell."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from flask import g

from pipeline import Trace


@dataclass
class RequestRecord:
    """What is known of one request so far.

    Attributes:
        request_id: the client's own, if it sent a sane one.
        code: of the error that answers it, or `ok`.
        api_key_name: the operator's name for the API key that the request carries; None without one.
        origin_accepted: whether the request's web origin may call; false until that is known.
        user_id: the person that the request is about, as far as it is known.
        failed_checks: the codes of the checks that the photo failed.
        audited: whether the audit log has its line already.
        trace: the stages' times and the checks' figures.
        begun: when the request began, by `time.perf_counter`.
    """

    request_id: str
    code: str = "ok"
    api_key_name: str | None = None
    origin_accepted: bool = False
    user_id: str | None = None
    failed_checks: list[str] = field(default_factory=list)
    audited: bool = False
    trace: Trace = field(default_factory=Trace)
    begun: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Seconds since the request began."""
        return time.perf_counter() - self.begun


def begin_record(request_id: str) -> None:
    """Begin the record of the current request."""
    g.record = RequestRecord(request_id)


def current_record() -> RequestRecord:
    """The record of the current request."""
    record: RequestRecord = g.record
    return record
