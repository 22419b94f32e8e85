"""Names the parts that the API works with; bootstrap.py makes them and gives them to `create_app`."""

from __future__ import annotations

from dataclasses import dataclass

from api.access import Access
from api.readiness import Readiness
from engines.base import Engine
from gallery.decisions import Gallery
from pipeline import Pipeline
from store.audit_log import AuditLog
from store.records import RecordStore
from store.retention import Retention


@dataclass(frozen=True)
class Parts:
    """What the routes work with. All parts are ready, but the gallery may still be loading.

    Attributes:
        engine: the face model, warmed.
        store: the durable records, prepared.
        gallery: who is enrolled with this model.
        pipeline: takes a photo to its template.
        access: decides who may call.
        readiness: tells whether decisions can be made, without waiting for long.
        audit: writes down who did what; None if it is turned off.
        retention: notes who is verified; None if it is turned off.
    """

    engine: Engine
    store: RecordStore
    gallery: Gallery
    pipeline: Pipeline
    access: Access
    readiness: Readiness
    audit: AuditLog | None = None
    retention: Retention | None = None
