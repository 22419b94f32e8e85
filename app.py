"""Owns the service: making the application of its parts, starting it and stopping it."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from flask import Flask
from werkzeug.middleware.proxy_fix import ProxyFix

import bootstrap
from api import description_pages as api_pages
from api import server
from api.access import Access
from api.forms import FORM_ALLOWANCE
from api.metrics import Metrics
from api.pages import add_try_page
from api.responses import log_requests, protect_responses, render_errors
from api.routes import Parts, add_routes
from commands import cli as commands
from engines.base import Engine
from engines.covering import CoveringClassifier, CoveringModel
from engines.liveness import Liveness
from gallery.decisions import Gallery
from photos import decode as images
from photos.decode import Photo
from photos.decoder_pool import Decoders
from pipeline import ModelSlots, Pipeline
from settings import PROJECT, Settings, add_flags
from store.audit_log import AuditLog, folder_of
from store.records import Records
from store.retention import Retention

logger = logging.getLogger("face_api")

# A gallery that loads within this is there before the first request; a larger one answers `not_ready` meanwhile.
LOAD_PATIENCE_S = 2.0


def create_app(
    settings: Settings,
    engine: Engine,
    covering: CoveringClassifier,
    store: Records,
    gallery: Gallery,
    *,
    access: Access | None = None,
    liveness: Liveness | None = None,
    audit: AuditLog | None = None,
    retention: Retention | None = None,
    decode: Callable[..., Photo] = images.decode,
) -> Flask:
    """Make the WSGI application of parts that are ready: a warmed engine, a prepared store, a caught-up gallery.

    Args:
        access: who may call; as the settings say, when omitted.
        liveness: tells a live face from a picture; nothing does, when omitted.
        audit: is told who did what; nobody is, when omitted.
        retention: notes who is verified; nobody does, when omitted.
        decode: reads photos, as `images.decode` does.

    Raises:
        SettingsError: as `Access` does.
    """
    access = access or Access(settings)
    app = Flask("face_api", static_folder=None)
    app.json.ensure_ascii = False  # type: ignore[attr-defined]  # UTF-8: Arabic reads as Arabic with curl, too
    app.url_map.merge_slashes = False  # a redirect would be a page, and this API speaks JSON alone
    app.config["MAX_CONTENT_LENGTH"] = settings.max_file_bytes + FORM_ALLOWANCE
    # The parser reads 64 KiB at a time, of files too, and counts them against this with what it held back before.
    app.config["MAX_FORM_MEMORY_SIZE"] = 2 * FORM_ALLOWANCE
    app.config["MAX_FORM_PARTS"] = 32
    slots = ModelSlots(settings.model_slots, settings.queue_limit)
    pipeline = Pipeline(settings, engine, covering, slots, liveness, decode)
    if settings.trusted_proxies:
        hops = settings.trusted_proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops, x_host=hops)  # type: ignore[method-assign]
    metrics = Metrics(engine.name, pipeline.slots.queue, gallery.status, lambda: audit.lost if audit else 0)
    log_requests(app, metrics)
    render_errors(app, settings.max_file_bytes)
    protect_responses(app)
    if audit is not None:
        audit.guard(app)
    access.guard(app)
    add_routes(app, Parts(settings, engine, store, gallery, pipeline, access, metrics, audit, retention))
    if settings.try_page == "on":
        add_try_page(app)
    api_pages.add_routes(app, settings)  # last: it describes the routes that there are
    return app


def prepare_uploads(folder: Path) -> None:
    """Make `folder` the place of every temporary file of this process, and empty it of a killed process's left-overs.

    The web server and the form parser keep what outgrows memory in nameless files there (mode 0600; gone with
    their last reader, even after a kill); where a file system has no nameless files they are named at random and
    unlinked at once.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left_over in folder.iterdir():
        if left_over.is_file() or left_over.is_symlink():
            left_over.unlink()
    tempfile.tempdir = str(folder)
    with tempfile.TemporaryFile():
        pass  # a folder that cannot be written to is known now, not at the first large photo


def build(settings: Settings, in_the_end: ExitStack) -> Flask:
    """Load and connect everything that the settings name, and announce it in plain words.

    Args:
        settings: what is wanted.
        in_the_end: is given what must be closed after the last request.

    Returns:
        The application; its gallery may still be loading.

    Raises:
        ValueError: a connection string that cannot be parsed.
        SettingsError: as `Access` does.
        FaceError: `database_unavailable`, the store stayed out of reach.
        ModelUnavailable: the model cannot be had.
    """
    access = Access(settings)
    server.require_free(settings.host, settings.port)
    server.return_memory()
    prepare_uploads(settings.uploads_dir)
    decoders = Decoders(settings.model_slots, settings.max_image_pixels)
    in_the_end.callback(decoders.close)
    covering = CoveringModel(PROJECT / "models")
    store = bootstrap.connected_store(settings)
    engine = bootstrap.loaded_engine(settings)
    decoders.require_working()  # they have been starting meanwhile
    liveness = bootstrap.liveness_of(settings)
    server.release_memory()
    gallery = bootstrap.gallery_of(settings, store, engine)

    def load() -> None:
        gallery.load()
        bootstrap.announce(gallery)

    loader = threading.Thread(target=load, name="gallery-load", daemon=True)
    loader.start()
    loader.join(LOAD_PATIENCE_S)
    in_the_end.callback(gallery.close)
    audit = AuditLog(folder_of(settings), settings.audit_days) if settings.audit == "on" else None
    retention = None
    if settings.retention_days:
        retention = Retention(store, settings.retention_days, lambda: int(gallery.status()["enrolled"]), audit)
        retention.start()
        in_the_end.callback(retention.close)
    return create_app(
        settings,
        engine,
        covering,
        store,
        gallery,
        access=access,
        liveness=liveness,
        audit=audit,
        retention=retention,
        decode=decoders.decode,
    )


def serve(settings: Settings) -> int:
    """Run the service until it is told to stop; returns the exit status."""
    # While it starts, too: the first process of a container is left alone by a SIGTERM that it does not handle, and one
    # that a script started in the background by Ctrl-C.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    with ExitStack() as in_the_end:
        app = build(settings, in_the_end)
        if settings.debug:
            logger.info("Ready, for development alone: http://%s:%d", settings.host, settings.port)
            app.run(settings.host, settings.port, debug=True, use_debugger=False, use_reloader=False, threaded=True)
        else:
            server.serve(app, settings)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the service, or one of the operator's commands; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in commands.COMMANDS:
        return commands.run(arguments[0], arguments[1:])
    if arguments and not arguments[0].startswith("-"):
        sys.stderr.write(f"There is no command {arguments[0]!r}.\n{commands.overview()}\n")
        return 2
    parser = argparse.ArgumentParser(
        description="Face recognition API. Each flag is also an environment variable, and a line of .env, in capitals.",
        epilog=commands.overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser)
    return commands.started(vars(parser.parse_args(arguments)), serve)


if __name__ == "__main__":
    raise SystemExit(main())
