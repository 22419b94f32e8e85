"""Counts and times for Prometheus: requests, connections, stages, the queue, the gallery, checks, similarities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

DURATION_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SIMILARITY_BUCKETS = tuple(round(-0.2 + 0.05 * step, 2) for step in range(25))


class Metrics:
    """The metrics of one application, in a registry of its own.

    Args:
        model: the running model's name.
        queue: gives how many requests wait for a model slot, and how many hold one.
        gallery: gives the gallery's status, as `Gallery.status` does.
        audit_lost: gives how many lines the audit log could not write.
    """

    def __init__(
        self,
        model: str,
        queue: Callable[[], tuple[int, int]],
        gallery: Callable[[], Mapping[str, Any]],
        audit_lost: Callable[[], int],
    ):
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "face_requests", "Requests answered", ["method", "route", "status", "code"], registry=self._registry
        )
        self._closed = Counter(
            "face_connections_closed", "Connections that the web server closed by itself", ["reason"],
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "face_request_seconds", "Time to the answer", ["route"], buckets=DURATION_BUCKETS_S, registry=self._registry
        )
        self._stages = Histogram(
            "face_stage_seconds",
            "Time in one stage of a request",
            ["stage"],
            buckets=DURATION_BUCKETS_S,
            registry=self._registry,
        )
        self._failed = Counter(
            "face_checks_failed", "Checks that a photo failed; one photo may fail several", ["check"],
            registry=self._registry,
        )  # fmt: skip
        self._similarities = Histogram(
            "face_similarity", "Similarity of the best candidate", ["route", "accepted"], buckets=SIMILARITY_BUCKETS,
            registry=self._registry,
        )  # fmt: skip
        self._registry.register(_CurrentState(model, queue, gallery, audit_lost))
        ProcessCollector(registry=self._registry)

    def observe(
        self, *, method: str, route: str, status: int, code: str, seconds: float, stages_ms: Mapping[str, float]
    ) -> None:
        """Count one answered request.

        Args:
            method: the HTTP method; all unknown ones count as `other`.
            route: the route's pattern, not the path that the client sent.
            status: of the answer.
            code: of the error, or `ok`.
            seconds: to the answer.
            stages_ms: stage -> milliseconds.
        """
        method = method if method in ("GET", "POST", "DELETE", "OPTIONS", "HEAD") else "other"
        self._requests.labels(method, route, str(status), code).inc()
        self._seconds.labels(route).observe(seconds)
        for stage, milliseconds in stages_ms.items():
            self._stages.labels(stage).observe(milliseconds / 1000)

    def refused(self, status: int, code: str) -> None:
        """Count a request that the web server answered by itself with this error; the application never saw it."""
        self._requests.labels("other", "(web server)", str(status), code).inc()

    def connection_closed(self, reason: str) -> None:
        """Count a connection that the web server closed by itself, for one of its few reasons."""
        self._closed.labels(reason).inc()

    def photo_failed(self, checks: list[str]) -> None:
        """Count the codes of the checks that one photo failed."""
        for check in checks:
            self._failed.labels(check).inc()

    def compared(self, route: str, similarity: float, *, accepted: bool) -> None:
        """Count the similarity (-1...1) of one comparison."""
        self._similarities.labels(route, "yes" if accepted else "no").observe(similarity)

    def text(self) -> tuple[bytes, str]:
        """All metrics in Prometheus' text format, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _CurrentState(Collector):
    """The metrics that are read from the service when Prometheus asks."""

    def __init__(
        self,
        model: str,
        queue: Callable[[], tuple[int, int]],
        gallery: Callable[[], Mapping[str, Any]],
        audit_lost: Callable[[], int],
    ) -> None:
        self._model, self._queue, self._gallery, self._audit_lost = model, queue, gallery, audit_lost

    def collect(self) -> Iterator[Any]:
        waiting, running = self._queue()
        yield GaugeMetricFamily("face_queue_waiting", "Requests that wait for a model slot", value=waiting)
        yield GaugeMetricFamily("face_slots_used", "Photos in the models now", value=running)
        status = self._gallery()
        yield GaugeMetricFamily("face_gallery_enrolled", "People of the running model", value=status["enrolled"])
        if "photos" in status:
            yield GaugeMetricFamily("face_gallery_photos", "Photos of these people", value=status["photos"])
        yield GaugeMetricFamily("face_log_place", "Last place of the enrolment log applied", value=status["last_seq"])
        yield GaugeMetricFamily(
            "face_gallery_unreadable", "Records that cannot be read", value=status.get("unreadable") or 0
        )
        yield CounterMetricFamily(
            "face_audit_lost", "Lines that the audit log could not write", value=self._audit_lost()
        )
        yield InfoMetricFamily("face_model", "The running model", value={"name": self._model})
