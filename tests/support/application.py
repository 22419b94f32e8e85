"""The application with parts of a test's own choosing."""

from __future__ import annotations

from flask import Flask

from api.access import Access
from api.readiness import Readiness
from api.service_parts import Parts
from app import create_app
from engines.base import Engine
from engines.face_attributes import AttributeReader
from engines.liveness import Liveness
from engines.model_slots import ModelSlots
from gallery.decisions import Gallery
from photos.decode import decode
from pipeline import Pipeline
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
    slots = ModelSlots(settings.model_slots, settings.queue_wait_s, settings.photo_requests)
    pipeline = Pipeline(settings, engine, reader, slots, decode, liveness)
    readiness = Readiness(gallery.refresh, patience_s=10.0)  # a busy machine is no hanging database
    return create_app(settings, Parts(engine, store, gallery, pipeline, Access(settings), readiness, audit))
