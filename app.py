"""Owns the service: its routes, and starting and stopping it."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import threading
from pathlib import Path

from flask import Flask, Response, g, jsonify

import commands
import server
import wiring
from covering import CoveringClassifier, CoveringModel
from engine import Engine, Vector, cosine_of, similarity_of
from errors import FaceError
from forms import read_idempotency_key, read_threshold, read_upload, read_user_id, receive_form
from gallery import Gallery
from pipeline import ModelSlots, Pipeline, stage
from settings import PROJECT, Settings, add_flags
from store import Store
from templates import Candidate
from web import log_requests, render_errors

logger = logging.getLogger("face_api")

# A gallery that loads within this is there before the first request; a larger one answers `not_ready` meanwhile.
LOAD_PATIENCE_S = 2.0
# Beside the photo itself: the other fields and the multipart framing.
FORM_ALLOWANCE = 64 * 1024


def create_app(
    settings: Settings, engine: Engine, covering: CoveringClassifier, store: Store, gallery: Gallery
) -> Flask:
    """Make the WSGI application of parts that are ready: a warmed engine, a prepared store, a caught-up gallery."""
    app = Flask("face_api", static_folder=None)
    app.url_map.merge_slashes = False  # a redirect would be a page, and this API speaks JSON alone
    app.config["MAX_CONTENT_LENGTH"] = settings.max_file_bytes + FORM_ALLOWANCE
    # The parser reads 64 KiB at a time, of files too, and counts them against this with what it held back before.
    app.config["MAX_FORM_MEMORY_SIZE"] = 2 * FORM_ALLOWANCE
    app.config["MAX_FORM_PARTS"] = 32
    pipeline = Pipeline(settings, engine, covering, ModelSlots(settings.model_slots, settings.queue_limit))
    log_requests(app)
    render_errors(app)

    @app.get("/", provide_automatic_options=False)
    def running() -> Response:
        return jsonify(status="success", message="Face Recognition API is running")

    @app.get("/health", provide_automatic_options=False)
    def health() -> Response:
        gallery.refresh()
        return jsonify(
            status="success",
            message="ready",
            model=engine.name,
            # Which database, but neither path nor host: those are the log's.
            store=store.describe().partition(" ")[0],
            gallery=gallery.status(),
        )

    @app.post("/signUp", provide_automatic_options=False)
    @app.post("/signup", provide_automatic_options=False)
    def sign_up() -> Response:
        # A place comes before all work: whoever is turned away costs those in the queue nothing but the reading.
        with pipeline.slots.place():
            receive_form()
            request_key = read_idempotency_key()
            template = pipeline.template(read_upload("file", settings.max_file_bytes))
        with stage("enrol"):
            user_id = gallery.enrol(
                template,
                duplicate_cosine=cosine_of(settings.duplicate_threshold, engine.cosine_at_half),
                request_key=request_key,
            )
        return jsonify(status="success", message=f"Face stored successfully with user_id: {user_id}", user_id=user_id)

    @app.post("/verify", provide_automatic_options=False)
    def verify() -> Response:
        with pipeline.slots.place():
            receive_form()
            threshold = read_threshold(settings)
            claimed = read_user_id()
            template = pipeline.template(read_upload("file", settings.max_file_bytes))
        with stage("search"):
            candidate = gallery.search(template) if claimed is None else compare(gallery, claimed, template)
        if candidate is None:
            raise no_match()
        similarity = similarity_of(candidate.cosine, engine.cosine_at_half)
        g.figures["similarity"] = round(similarity, 4)
        if similarity < threshold:
            raise no_match()
        return jsonify(
            status="success",
            message=f"Face verified successfully with confidence: {similarity:.2f}",
            verified=True,
            user_id=candidate.user_id,
            similarity=round(similarity, 4),
            threshold=threshold,
        )

    return app


def compare(gallery: Gallery, claimed: str, template: Vector) -> Candidate:
    """Compare 1:1 with a claimed user_id, as it was sent or in its canonical lower case; FaceError `unknown_user`."""
    try:
        return Candidate(claimed, gallery.compare(claimed, template))
    except FaceError as error:
        if error.code != "unknown_user" or claimed == claimed.lower():
            raise
        return Candidate(claimed.lower(), gallery.compare(claimed.lower(), template))


def no_match() -> FaceError:
    """`no_match` as the API words it; RFC 9110 asks for a challenge on every 401."""
    return FaceError("no_match", fields={"verified": False}, headers={"WWW-Authenticate": "FaceMatch"})


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


def build(settings: Settings) -> tuple[Flask, Gallery]:
    """Load and connect everything that the settings name, and announce it in plain words.

    Returns:
        The application, and its gallery, which may still be loading and must be closed in the end.

    Raises:
        ValueError: a connection string that cannot be parsed.
        FaceError: `database_unavailable`, the store stayed out of reach.
        ModelUnavailable: the model cannot be had.
    """
    server.require_free(settings.host, settings.port)
    prepare_uploads(settings.uploads_dir)
    covering = CoveringModel(PROJECT / "models")
    store = wiring.connected_store(settings)
    engine = wiring.loaded_engine(settings)
    gallery = wiring.gallery_of(settings, store, engine)

    def load() -> None:
        gallery.load()
        wiring.announce(gallery)

    loader = threading.Thread(target=load, name="gallery-load", daemon=True)
    loader.start()
    loader.join(LOAD_PATIENCE_S)
    return create_app(settings, engine, covering, store, gallery), gallery


def serve(settings: Settings) -> int:
    """Run the service until it is told to stop; returns the exit status."""
    app, gallery = build(settings)
    try:
        if settings.debug:
            logger.info("Ready, for development alone: http://%s:%d", settings.host, settings.port)
            app.run(settings.host, settings.port, debug=True, use_debugger=False, use_reloader=False, threaded=True)
        else:
            server.serve(app, settings)
    finally:
        gallery.close()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the service, or one of the operator's commands; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in commands.COMMANDS:
        return commands.run(arguments[0], arguments[1:])
    parser = argparse.ArgumentParser(
        description="Face recognition API. Each flag is also an environment variable, and a line of .env, in capitals.",
        epilog=commands.overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser)
    return commands.started(vars(parser.parse_args(arguments)), serve)


if __name__ == "__main__":
    raise SystemExit(main())
