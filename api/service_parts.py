"""The parts that the API works with, made by bootstrap.py and given to `create_app`."""

from __future__ import annotations

from dataclasses import dataclass

from api.access import Access
from engines.base import Engine
from gallery.decisions import Gallery
from pipeline import Pipeline
from store.audit_log import AuditLog
from store.records import RecordStore
from store.retention import Retention


@dataclass(frozen=True)
class Parts:
    """What the routes work with; all ready but the gallery, which may still be loading.

    Attributes:
        engine: the face model, warmed.
        store: the durable records, prepared.
        gallery: who is enrolled with this model.
        pipeline: takes a photo to its template.
        access: decides who may call.
        audit: is told who did what; None if nobody asks.
        retention: notes who is verified; None if nobody asks.
    """

    engine: Engine
    store: RecordStore
    gallery: Gallery
    pipeline: Pipeline
    access: Access
    audit: AuditLog | None = None
    retention: Retention | None = None
