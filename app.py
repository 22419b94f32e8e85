"""Owns the service: routes, reading uploads, rendering errors, wiring the parts, the command line."""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import os
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

import face_checks
import images
import logs
import server
from covering import CoveringClassifier, CoveringModel
from engine import ENOUGH_SIDE, Engine, Face, Vector, cosine_of, load_engine, similarity_of
from errors import FaceError
from gallery import Gallery
from images import Photo
from settings import PROJECT, Settings, SettingsError, add_flags, load_settings, read_env_file
from snapshot import SnapshotFolder
from store import MongoStore, MongoVectorIndex, Store, open_store
from templates import Candidate
from weights import ModelUnavailable

logger = logging.getLogger("face_api")

CODE_OF_HTTP = {404: "not_found", 405: "method_not_allowed", 413: "file_too_large"}
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,128}")
SANE_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
# A gallery that loads within this is there before the first request; a larger one answers `not_ready` meanwhile.
LOAD_PATIENCE_S = 2.0
# Beside the photo itself: the other fields and the multipart framing.
FORM_ALLOWANCE = 64 * 1024


class ModelSlots:
    """How many photos are in the models at once, and how many requests may wait for that."""

    def __init__(self, slots: int, queue_limit: int) -> None:
        self._free = threading.BoundedSemaphore(slots)
        self._places = threading.BoundedSemaphore(slots + queue_limit)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the bounded queue; FaceError `overloaded` when it is full."""
        if not self._places.acquire(blocking=False):
            raise FaceError("overloaded", headers={"Retry-After": "2"})
        try:
            yield
        finally:
            self._places.release()

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of the slots, waiting for it; only with a place."""
        with self._free:
            yield


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Time one stage of the current request for its log line."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        g.stages[name] = round(1000 * (time.perf_counter() - begun), 1)


@dataclass(frozen=True)
class Pipeline:
    """From a photo's bytes to the template of its one face: each stage once, and only when the one before it passed."""

    settings: Settings
    engine: Engine
    covering: CoveringClassifier
    slots: ModelSlots

    def template(self, data: bytes) -> Vector:
        """Decode, detect, check and embed.

        Raises:
            FaceError: the codes of `images.decode` and `face_checks.check_photo`.
        """
        with self.slots.slot():
            with stage("decode"):
                photo = self._decode(data, ENOUGH_SIDE)
            with stage("detect"):
                faces = self.engine.detect(photo.pixels)
            photo, faces = self._close_enough(data, photo, faces)
            with stage("check"):
                face, checks = face_checks.check_photo(
                    photo.pixels, faces, self.settings, self.covering, photo.reduced_by
                )
            g.figures = {check.code: check.measured for check in checks}
            with stage("embed"):
                try:
                    return self.engine.embed(photo.pixels, face)
                except ValueError as error:
                    raise face_checks.cannot_be_embedded(checks) from error

    def _decode(self, data: bytes, longest_side: float) -> Photo:
        limits = self.settings
        return images.decode(
            data, max_bytes=limits.max_file_bytes, max_pixels=limits.max_image_pixels, longest_side=longest_side
        )

    def _close_enough(self, data: bytes, photo: Photo, faces: list[Face]) -> tuple[Photo, list[Face]]:
        """Decode again, larger, where the one face turned out too small in the reduced copy to be measured."""
        face, _ = face_checks.require_single_face(faces, self.settings)
        missing = face_checks.ENOUGH_INTER_EYE / max(1.0, face.inter_eye)
        if missing <= 1 or photo.reduced_by == 1:
            return photo, faces
        with stage("decode_larger"):
            larger = self._decode(data, missing * max(photo.pixels.shape))
        return larger, [one.enlarged(photo.reduced_by / larger.reduced_by) for one in faces]


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


def log_requests(app: Flask) -> None:
    """Give every request an id, and the log one line for it."""

    @app.before_request
    def begin() -> None:
        sent = request.headers.get("X-Request-ID", "")
        g.request_id = sent if SANE_REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        g.begun = time.perf_counter()
        g.stages, g.figures, g.code = {}, {}, "ok"

    @app.after_request
    def finish(response: Response) -> Response:
        response.headers["X-Request-ID"] = g.request_id
        fields = {
            "request_id": g.request_id,
            "status": response.status_code,
            "code": g.code,
            "ms": round(1000 * (time.perf_counter() - g.begun), 1),
            "stages_ms": g.stages,
            "figures": g.figures,
        }
        # The route's own pattern, never the path that was sent.
        route = request.url_rule.rule if request.url_rule else "(no such route)"
        logger.info(
            "%s %s", request.method, route, extra={logs.FIELDS: {key: one for key, one in fields.items() if one != {}}}
        )
        return response


def render_errors(app: Flask) -> None:
    """Word every error as the API does: its code, one sentence, and nothing of the library that raised it."""

    @app.errorhandler(FaceError)
    def refused(error: FaceError) -> Response:
        return render(error)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        status = error.code or 500
        if status == 413 and (request.content_length or 0) <= app.config["MAX_CONTENT_LENGTH"]:
            status = 400  # too many or too large fields, not too large a photo
        code = CODE_OF_HTTP.get(status, "internal_error" if status >= 500 else "bad_request")
        allowed = error.valid_methods if isinstance(error, MethodNotAllowed) else None
        return render(FaceError(code, headers={"Allow": ", ".join(sorted(allowed))} if allowed else None))

    @app.errorhandler(Exception)
    def unforeseen(error: Exception) -> Response:
        logger.error("unforeseen error", exc_info=error, extra={logs.FIELDS: {"request_id": g.request_id}})
        return render(FaceError("internal_error"))


def render(error: FaceError) -> Response:
    """The one place where an error of the application becomes a response."""
    g.code = error.code
    if "checks" in error.fields:
        g.figures = {check["code"]: check["measured"] for check in error.fields["checks"]}
    body = {"status": "error", "code": error.code, "message": error.message, "request_id": g.request_id}
    response = jsonify({**body, **error.fields})
    response.status_code = error.status
    response.headers.update(error.headers)
    return response


def no_match() -> FaceError:
    """`no_match` as the API words it; RFC 9110 asks for a challenge on every 401."""
    return FaceError("no_match", fields={"verified": False}, headers={"WWW-Authenticate": "FaceMatch"})


def receive_form() -> None:
    """Read the request's form; FaceError `overloaded` when the disk has no room for a large photo."""
    try:
        request.form.keys()
    except OSError as error:
        logger.warning("A photo could not be kept in UPLOADS_DIR: %s", error.strerror)
        raise FaceError("overloaded", headers={"Retry-After": "5"}) from error


def read_upload(field: str, max_bytes: int) -> bytes:
    """Return the bytes of the one file in `field`, at most one more than `max_bytes` of them.

    Raises:
        FaceError: `no_file`, `empty_file`, `bad_request` (several files).
    """
    files = request.files.getlist(field)
    if len(files) > 1:
        raise FaceError("bad_request", f"Send exactly one photo in the field '{field}'.")
    if not files:
        raise FaceError("no_file")
    data = files[0].stream.read(max_bytes + 1)
    files[0].close()
    if not data and not files[0].filename:
        raise FaceError("no_file")
    if not data:
        raise FaceError("empty_file")
    return data


def read_field(name: str, code: str) -> str | None:
    """Return the one value of a form field, None when it was not sent; FaceError `code` when sent twice."""
    values = request.form.getlist(name)
    if len(values) > 1:
        raise FaceError(code, f"Send the field '{name}' once.")
    return values[0] if values else None


def read_threshold(settings: Settings) -> float:
    """Return the caller's threshold, or the operator's; FaceError `invalid_threshold`."""
    text = read_field("threshold", "invalid_threshold")
    if text is None:
        return settings.verify_threshold
    # float() alone would take nan, infinities, underscores and every script's digits.
    value = float(text) if DECIMAL.fullmatch(text.strip()) and len(text) <= 64 else math.nan
    if not settings.threshold_floor <= value <= 1.0:
        raise FaceError(
            "invalid_threshold", f"The threshold must be a number between {settings.threshold_floor:g} and 1."
        )
    return value


def read_user_id() -> str | None:
    """Return the claimed user_id, None when none was sent; FaceError `invalid_user_id`."""
    text = read_field("user_id", "invalid_user_id")
    if text is None:
        return None
    if not re.fullmatch(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", text, re.ASCII):
        raise FaceError("invalid_user_id")
    return text


def read_idempotency_key() -> str | None:
    """Return what is stored of the Idempotency-Key header (its SHA-256), None when none was sent."""
    sent = request.headers.get("Idempotency-Key")
    if sent is None:
        return None
    if not SANE_IDEMPOTENCY_KEY.fullmatch(sent):
        raise FaceError("bad_request", "The Idempotency-Key must be 1 to 255 visible ASCII characters.")
    return hashlib.sha256(sent.encode()).hexdigest()


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


def wait_for_store(connect: Callable[[], Store], patience_s: float) -> Store:
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

    def connect() -> Store:
        return open_store(
            settings.mongo_uri,
            mongo_db=settings.mongo_db,
            mongo_collection=settings.mongo_collection,
            data_dir=settings.data_dir,
        )

    # A file that cannot be opened now will not be openable in a minute: only a server is waited for that long.
    store = wait_for_store(connect, settings.store_wait_s if settings.mongo_uri else min(5.0, settings.store_wait_s))
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
    logger.info("Store: %s", store.describe())
    plain_model = settings.plain_model or None
    snapshot = SnapshotFolder(
        settings.data_dir / "gallery",
        f"{store.describe()} {engine.name} {engine.dimension} {plain_model}",
        engine.dimension,
    )
    index = vector_index(settings, store, engine)
    keeps = settings.gallery_snapshot == "on" and index is None
    if not keeps:
        snapshot.discard()
    gallery = Gallery(store, engine.name, engine.dimension, plain_model, snapshot if keeps else None, index)

    def load() -> None:
        gallery.load()
        announce(gallery)

    loader = threading.Thread(target=load, name="gallery-load", daemon=True)
    loader.start()
    loader.join(LOAD_PATIENCE_S)
    return create_app(settings, engine, covering, store, gallery), gallery


def vector_index(settings: Settings, store: Store, engine: Engine) -> MongoVectorIndex | None:
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


def main(arguments: list[str] | None = None) -> int:
    """Run the service until it is told to stop; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Face recognition API. Every flag is also an environment variable, and a line of .env, in capitals."
    )
    add_flags(parser)
    flags = vars(parser.parse_args(arguments))
    # The hub's own library reads its settings (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN) from the environment.
    try:
        for key, value in read_env_file().items():
            if key.startswith("HF_") and value:
                os.environ.setdefault(key, value)
        settings = load_settings(flags)
    except SettingsError as error:
        parser.exit(2, f"Settings: {error}\n")
    logs.configure(settings.log_format, "DEBUG" if settings.debug else settings.log_level)
    try:
        app, gallery = build(settings)
        try:
            if settings.debug:
                logger.info("Ready, for development alone: http://%s:%d", settings.host, settings.port)
                app.run(settings.host, settings.port, debug=True, use_debugger=False, use_reloader=False, threaded=True)
            else:
                server.serve(app, settings)
        finally:
            gallery.close()
    except ModelUnavailable as error:
        logger.critical("The face model is not available. %s", error)
        return 1
    except FaceError:
        logger.critical(
            "The database stayed out of reach, so the service does not start. %s",
            f"Check the server and MONGO_URI; STORE_WAIT_S ({settings.store_wait_s:g}) is how long it is waited for."
            if settings.mongo_uri
            else f"Check that DATA_DIR ({settings.data_dir}) can be written to and its disk is not full.",
        )
        return 1
    except (OSError, ValueError) as error:
        logger.critical("The service ends: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.info("Stopped before it was ready")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
