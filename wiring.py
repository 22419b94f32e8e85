"""Owns putting the parts together as the settings name them: store, engine, gallery."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from engine import CompactEngine, Engine, load_engine
from errors import FaceError
from gallery import Gallery
from liveness import AddOnLiveness, Liveness
from sealing import parse_keys
from settings import Settings
from snapshot import SnapshotFolder
from store import MongoStore, MongoVectorIndex, Records, Store, open_store
from weights import ModelUnavailable

logger = logging.getLogger("face_api")

AnyStore = TypeVar("AnyStore", bound=Store)


def wait_for_store(connect: Callable[[], AnyStore], patience_s: float) -> AnyStore:
    """Connect and prepare the store, trying again for `patience_s` seconds; FaceError `database_unavailable` then."""
    deadline = time.monotonic() + patience_s
    pause = 0.5
    while True:
        try:
            store = connect()
            store.prepare()
        except FaceError as error:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            reason = type(error.__cause__).__name__
            logger.warning("The database cannot be reached (%s); trying again, for %.0f s more", reason, left)
            time.sleep(min(pause, max(left, 0.1)))
            pause = min(5.0, pause * 2)
        else:
            return store


def connected_store(settings: Settings) -> Records:
    """Connect to the store that the settings name, and prepare it.

    Raises:
        ValueError: a connection string that cannot be parsed.
        FaceError: `database_unavailable`, the store stayed out of reach.
    """

    keyring = parse_keys(settings.template_keys)

    def connect() -> Records:
        return open_store(
            settings.mongo_uri,
            mongo_db=settings.mongo_db,
            mongo_collection=settings.mongo_collection,
            data_dir=settings.data_dir,
            keyring=keyring,
        )

    # A file that cannot be opened now will not be openable in a minute: only a server is waited for that long.
    store = wait_for_store(connect, settings.store_wait_s if settings.mongo_uri else min(5.0, settings.store_wait_s))
    logger.info("Store: %s", store.describe())
    if keyring:
        logger.info("Templates are encrypted at rest; keys, the newest first: %s", ", ".join(keyring.names))
    return store


def loaded_engine(settings: Settings) -> Engine:
    """Load the model that the settings name; ModelUnavailable, with what to do, if it cannot be had."""
    engine = load_engine(
        settings.face_model,
        models_dir=settings.models_dir,
        hub_timeout_s=settings.hub_timeout_s,
        threads=settings.model_threads,
        may_fall_back=not settings.mongo_uri,
        precision=settings.embedding_precision,
        providers=settings.ort_providers,
    )
    logger.info("Model: %s", engine.describe())
    return engine


def liveness_of(settings: Settings, engine: Engine) -> Liveness | None:
    """Load what tells live faces from pictures, if the settings want it; ModelUnavailable if it cannot be had."""
    if settings.liveness == "off":
        return None
    if isinstance(engine, CompactEngine):
        raise ModelUnavailable(
            "LIVENESS aligns faces by the landmarks of InsightFace's packs, and the compact model has others: take "
            "LIVENESS=off, or a pack."
        )
    return AddOnLiveness(settings.models_dir, settings.min_liveness)


def gallery_of(settings: Settings, store: Store, engine: Engine) -> Gallery:
    """Make the gallery of a store's people for a model, not loaded yet; it must be closed in the end.

    Raises:
        ValueError: the settings want MongoDB's vector index, and the server has none.
    """
    plain_model = settings.plain_model or None
    snapshot = SnapshotFolder(
        settings.data_dir / "gallery",
        f"{store.describe()} {engine.name} {engine.dimension} {plain_model}",
        engine.dimension,
        parse_keys(settings.template_keys),
    )
    index = _vector_index(settings, store, engine)
    keeps = settings.gallery_snapshot == "on" and index is None
    if keeps:
        snapshot.discard_outdated()
    else:
        snapshot.discard()
    return Gallery(store, engine.name, engine.dimension, plain_model, snapshot if keeps else None, index)


def _vector_index(settings: Settings, store: Store, engine: Engine) -> MongoVectorIndex | None:
    """Return MongoDB's vector index, created, if the settings want it; ValueError where the server has none."""
    if settings.search == "memory" or not isinstance(store, MongoStore):
        return None
    index = store.vector_index(engine.name, engine.dimension, exact=settings.search == "mongodb")
    index.prepare()
    return index


def announce(gallery: Gallery) -> None:
    """Say how many people are enrolled, and what in the gallery cannot be used."""
    status = gallery.status()
    logger.info("Gallery: %d people enrolled with this model", status["enrolled"])
    # Counted by those who read every record: with SEARCH=mongodb nobody does.
    for model, count in status.get("other_models", {}).items():
        logger.warning(
            "The gallery also holds %d records of another model (%s): they are never compared with this one's. "
            "Run with that model, or enrol these people again.",
            count,
            model,
        )
    if status.get("unreadable"):
        logger.warning("%d records could not be read and are left out of every decision", status["unreadable"])
