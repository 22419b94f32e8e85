"""The application with parts of a test's own choosing."""

from __future__ import annotations

from flask import Flask

from api.access import Access
from api.service_parts import Parts
from app import create_app
from engines.base import Engine
from engines.face_attributes import AttributeReader
from engines.liveness import Liveness
from gallery.decisions import Gallery
from pipeline import ModelSlots, Pipeline
from settings import Settings
from store.audit_log import AuditLog
from store.records import RecordStore


def make_app(
    settings: Settings,
    engine: Engine,
    reader: AttributeReader,
    store: RecordStore,
    gallery: Gallery,
    *,
    liveness: Liveness | None = None,
    audit: AuditLog | None = None,
) -> Flask:
    """The WSGI application on these parts; it decodes photos in this process."""
    slots = ModelSlots(settings.model_slots, settings.queue_limit)
    pipeline = Pipeline(settings, engine, reader, slots, liveness)
    return create_app(settings, Parts(engine, store, gallery, pipeline, Access(settings), audit))
