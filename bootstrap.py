"""Puts store, model, gallery and pipeline together as the settings name them."""

from __future__ import annotations

import importlib.util
import logging
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from api import web_server
from api.access import Access
from api.readiness import Readiness
from api.service_parts import Parts
from engines import model_files
from engines.base import Engine
from engines.face_attributes import FaceAttributesModel
from engines.liveness import AddOnLiveness, Liveness
from engines.model_files import ModelUnavailable
from engines.model_slots import ModelSlots
from errors import FaceError
from gallery.decisions import Gallery
from gallery.snapshot import SnapshotFolder
from photos.decoder_pool import Decoders
from pipeline import Pipeline
from settings import PROJECT, Settings
from store.audit_log import AuditLog
from store.encryption import NO_KEYS, Keyring
from store.records import EnrolmentLog, RecordStore
from store.retention import Retention

if TYPE_CHECKING:
    from store.mongo_vectors import MongoVectorIndex

logger = logging.getLogger(__name__)

# How the names of this service's temporary files begin.
UPLOAD_PREFIX = "face-upload-"
# The start waits this long for the gallery. A larger one loads on while requests get `not_ready`.
LOAD_PATIENCE_S = 2.0

AnyStore = TypeVar("AnyStore", bound=EnrolmentLog)


def wait_for_store(connect: Callable[[], AnyStore], patience_s: float) -> AnyStore:
    """Connect and prepare the store; after `patience_s` seconds of failures raise FaceError `database_unavailable`."""
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


def make_store(
    mongo_uri: str | None,
    *,
    mongo_db: str,
    mongo_collection: str,
    data_dir: Path,
    timeout: float = 5.0,
    keyring: Keyring = NO_KEYS,
) -> RecordStore:
    """Make the store that the arguments name, not yet connected: call `prepare` next.

    Args:
        mongo_uri: a MongoDB connection string; the embedded SQLite file when None or empty.
        mongo_db, mongo_collection: names there.
        data_dir: folder of the SQLite file.
        timeout: seconds after which any one MongoDB operation fails.
        keyring: seals and opens the stored templates.

    Raises:
        ValueError, FaceError: as `mongo.connect`.
    """
    # A run on one store does not import the other's libraries.
    if not mongo_uri:
        from store.sqlite import SqliteStore  # noqa: PLC0415

        return SqliteStore(data_dir / "faces.sqlite3", keyring)
    from store import mongo  # noqa: PLC0415

    return mongo.connect(mongo_uri, mongo_db, mongo_collection, timeout=timeout, keyring=keyring)


def connect_store(settings: Settings) -> RecordStore:
    """Connect to the store that the settings name, and prepare it.

    Raises:
        ValueError: a connection string that cannot be parsed.
        FaceError: `database_unavailable`, the store stayed out of reach.
    """

    keyring = settings.keyring

    def connect() -> RecordStore:
        return make_store(
            settings.mongo_uri,
            mongo_db=settings.mongo_db,
            mongo_collection=settings.mongo_collection,
            data_dir=settings.data_dir,
            keyring=keyring,
        )

    # Waiting helps with a server. A file that cannot be opened now cannot be opened in a minute either.
    store = wait_for_store(connect, settings.store_wait_s if settings.mongo_uri else min(5.0, settings.store_wait_s))
    logger.info("Store: %s", store.describe())
    if keyring:
        logger.info("Templates are encrypted at rest; keys, the newest first: %s", ", ".join(keyring.names))
    return store


def load_engine(
    face_model: str,
    *,
    models_dir: Path,
    hub_timeout_s: float,
    threads: int,
    may_fall_back: bool,
    face_detector: str = "auto",
    precision: str = "fp32",
    providers: str = "cpu",
) -> Engine:
    """Load the model that `FACE_MODEL` names, warmed and ready.

    Args:
        face_model: `auto`, `auraface`, `compact`, or the folder of an InsightFace pack.
        models_dir: AuraFace's files lie in its `auraface/` and the compact model's in its `compact/`.
        hub_timeout_s: after this long without an answer the hub counts as unreachable.
        threads: threads of one model run; 0 takes all cores.
        may_fall_back: whether `auto` may take the compact model where AuraFace cannot be had.
        face_detector: `yunet`, `pack` for the model's own, or `auto`: YuNet for AuraFace, a folder's own for a folder.
        precision: of the recogniser.
        providers: what onnxruntime runs the models on.

    Raises:
        ModelUnavailable: with a message for the operator that says what to do.
    """
    prepare_libraries()
    # Commands that need no model do not pay for the imports.
    from engines.compact_pack import IDENTITY, YUNET, compact_pack  # noqa: PLC0415
    from engines.insightface_engine import InsightFaceEngine  # noqa: PLC0415

    load = partial(InsightFaceEngine, threads=threads, precision=precision, providers=providers)
    compact = partial(compact_pack, models_dir / "compact", hub_timeout_s=hub_timeout_s)
    if face_model in ("auto", "auraface"):
        folder, own_detector = models_dir / "auraface", face_detector == "pack"
        wanted = [file for file in model_files.AURAFACE if own_detector or file.task == "recognition"]
        try:
            files = model_files.ensure(folder, wanted, hub_timeout_s=hub_timeout_s)
        except ModelUnavailable as error:
            if face_model == "auraface":
                raise
            _require_fall_back(error, may_fall_back=may_fall_back)
        else:
            with nullcontext() if own_detector else compact(sources=[YUNET]) as yunet:
                return load(folder, files=files | (yunet.files if yunet else {}))
    if face_model in ("auto", "compact"):
        with compact() as pack:
            return load(pack.folder, files=pack.files, identity=IDENTITY)
    folder = Path(face_model).expanduser().resolve()
    with compact(sources=[YUNET]) if face_detector == "yunet" else nullcontext() as yunet:
        return load(folder, files=yunet.files if yunet else None)


def _require_fall_back(missing: ModelUnavailable, *, may_fall_back: bool) -> None:
    """Say that the compact model takes AuraFace's place, or raise ModelUnavailable where it may not."""
    if not may_fall_back:
        raise ModelUnavailable(
            f"{missing}\nWith MONGO_URI set there is no falling back to a smaller model: a gallery must not mix "
            "models. Make the files available as above, or choose one yourself with FACE_MODEL=compact or "
            "FACE_MODEL=/folder/of/an/InsightFace/pack."
        ) from missing
    logger.warning(
        "AuraFace is not available, so the service runs on the COMPACT model (SFace). It misses more people than "
        "AuraFace does. What was missing: %s",
        missing,
    )


def cosine_at_half_of(model: str) -> float:
    """The `cosine_at_half` of a model by its name in the records; of a model that is none of these, the packs'."""
    from engines.compact_pack import FORMER_IDENTITY, IDENTITY  # noqa: PLC0415 - as above

    known = {one.name: one.cosine_at_half for one in (IDENTITY, FORMER_IDENTITY)}
    return known.get(model.removesuffix("-int8"), 0.5)


def engine_of(settings: Settings) -> Engine:
    """Load the model that the settings name; ModelUnavailable, with what to do, if it cannot be had."""
    engine = load_engine(
        settings.face_model,
        models_dir=settings.models_dir,
        hub_timeout_s=settings.hub_timeout_s,
        threads=settings.model_threads,
        may_fall_back=not settings.mongo_uri,
        face_detector=settings.face_detector,
        precision=settings.embedding_precision,
        providers=settings.ort_providers,
    )
    logger.info("Model: %s", engine.describe())
    return engine


def liveness_of(settings: Settings) -> Liveness | None:
    """Load what tells live faces from pictures, if the settings want it; ModelUnavailable if it cannot be had."""
    if settings.liveness == "off":
        return None
    return AddOnLiveness(settings.models_dir)


def gallery_of(settings: Settings, store: EnrolmentLog, engine: Engine) -> Gallery:
    """Make the gallery of a store's people for a model, not loaded yet; it must be closed in the end.

    Raises:
        ValueError: the settings want MongoDB's vector index, and the server has none.
    """
    plain_model = settings.plain_model or None
    snapshot = SnapshotFolder(
        settings.data_dir / "gallery",
        f"{store.describe()} {engine.name} {engine.dimension} {plain_model} {settings.plain_templates}",
        engine.dimension,
        settings.keyring,
    )
    index = _vector_index(settings, store, engine)
    keeps = settings.gallery_snapshot == "on" and index is None
    if keeps:
        snapshot.discard_outdated()
    else:
        snapshot.discard()
    return Gallery(store, engine.name, engine.dimension, plain_model, snapshot if keeps else None, index)


def _vector_index(settings: Settings, store: EnrolmentLog, engine: Engine) -> MongoVectorIndex | None:
    """Create MongoDB's vector index if the settings want it, else None; ValueError if the server cannot."""
    if settings.search == "memory" or not settings.mongo_uri:
        return None
    from store.mongo import MongoStore  # noqa: PLC0415 - as above
    from store.mongo_vectors import MongoVectorIndex  # noqa: PLC0415

    assert isinstance(store, MongoStore)
    index = MongoVectorIndex(store, engine.name, engine.dimension, exact=settings.search == "mongodb")
    index.prepare()
    return index


def audit_folder(settings: Settings) -> Path:
    """The folder of the audit log."""
    return settings.data_dir / "audit"


def open_audit_log(settings: Settings) -> AuditLog | None:
    """Open the audit log; None if the settings turn it off."""
    return AuditLog(audit_folder(settings), settings.audit_days) if settings.audit == "on" else None


def announce(gallery: Gallery) -> None:
    """Log how many people are enrolled, and which records cannot be used."""
    status = gallery.status()
    logger.info("Gallery: %d people enrolled with this model", status["enrolled"])
    # With SEARCH=mongodb this is not counted, because no process reads every record.
    for model, count in status.get("other_models", {}).items():
        logger.warning(
            "The gallery also holds %d records of another model (%s): they are never compared with this one's. "
            "Run with that model, or enrol these people again.",
            count,
            model,
        )
    if status.get("unreadable"):
        logger.warning("%d records could not be read and are left out of every decision", status["unreadable"])


def prepare_libraries() -> None:
    """Set up the libraries that run the models; to be called before the first of them is loaded."""
    # From 1.32 on onnxruntime reports to Microsoft and keeps a device id in the home folder, unless this is set before
    # it is loaded (its Privacy.md).
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    # InsightFace imports it by way of scikit-image and uses nothing of it: 0.2 s of a start, and 16 MiB.
    _import_when_used("scipy.spatial")
    import cv2  # noqa: PLC0415 - commands that need no model do not pay for it

    # A photo is no larger than 1600 pixels here, and several are on their way at once: waking a second thread for each
    # small step takes a tenth of a request's CPU time more.
    cv2.setNumThreads(1)


@contextmanager
def explaining_missing_threads() -> Iterator[None]:
    """Turn Python's error for a thread that cannot be started into an OSError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        raise OSError(
            "no thread can be started: raise the limit of processes (ulimit -u, TasksMax=, --pids-limit)"
        ) from error


def forbid_core_dumps() -> None:
    """Leave no core dump of this process and its children: it would hold keys, templates and photos."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The limit does not hold for a dump that Linux pipes to a program; without memory in it, such a dump is harmless.
    with suppress(OSError):
        Path("/proc/self/coredump_filter").write_text("0", "ascii")


def _import_when_used(name: str) -> None:
    """Have a part of a package, such as `scipy.spatial`, run when something of it is first used, not when imported.

    Who imports it gets the module itself, as `importlib.util.LazyLoader` makes it.
    """
    package, _, part = name.rpartition(".")
    if name in sys.modules or importlib.util.find_spec(package) is None:
        return
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    setattr(sys.modules[package], part, module)  # `from package import part` looks there first


def prepare_uploads(folder: Path) -> None:
    """Make `folder` the place of this process's temporary files, and delete those that a killed process left there.

    The web server and the form parser put there what is too large for memory, in nameless files (mode 0600), which
    vanish with their last reader, even after a kill. On a file system without nameless files they get a random name
    after UPLOAD_PREFIX and are unlinked at once. Only files named like that are deleted.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left_over in folder.glob(f"{UPLOAD_PREFIX}*"):
        if left_over.is_file() and not left_over.is_symlink():
            left_over.unlink()
    tempfile.tempdir, tempfile.template = str(folder), UPLOAD_PREFIX
    with tempfile.TemporaryFile():
        pass  # a folder that cannot be written to is known now, not at the first large photo


def announce_risks(settings: Settings) -> None:
    """Say in one line each what the settings leave open; `Access` says it of a service without API keys."""
    level = logging.INFO if settings.is_local else logging.WARNING
    if not settings.keyring:
        logger.log(level, "Templates are not encrypted at rest: TEMPLATE_KEYS is empty")
    challenges = {settings.challenge, settings.challenge_sign_up, settings.challenge_verify}
    if settings.liveness != "enforce" and challenges != {"require"}:
        told = "A good photograph of a person passes for the person: LIVENESS is %s, and a route needs no challenge"
        logger.log(level, told, settings.liveness)


def build_parts(settings: Settings, at_the_end: ExitStack) -> Parts:
    """Load and connect everything that the settings name, and log what it is.

    Args:
        settings: what the operator set.
        at_the_end: is given what must be closed after the last request.

    Returns:
        The parts; the gallery may still be loading.

    Raises:
        ValueError: a connection string that cannot be parsed.
        SettingsError: as `Access` does.
        FaceError: `database_unavailable`, the store stayed out of reach.
        ModelUnavailable: the model cannot be had.
    """
    access = Access(settings)
    announce_risks(settings)
    web_server.require_free(settings.host, settings.port)
    web_server.return_memory()
    prepare_uploads(settings.uploads_dir)
    decoders = Decoders(settings.model_slots, settings.max_image_pixels)
    at_the_end.callback(decoders.close)
    prepare_libraries()
    reader = FaceAttributesModel(PROJECT / "models")
    store = connect_store(settings)
    engine = engine_of(settings)
    decoders.require_working()  # they started while the model was loading
    liveness = liveness_of(settings)
    web_server.release_memory()
    gallery = gallery_of(settings, store, engine)

    def load() -> None:
        gallery.load()
        announce(gallery)

    loader = threading.Thread(target=load, name="gallery-load", daemon=True)
    loader.start()
    loader.join(LOAD_PATIENCE_S)
    at_the_end.callback(gallery.close)
    audit = open_audit_log(settings)
    retention = None
    if settings.retention_days:
        retention = Retention(store, settings.retention_days, lambda: int(gallery.status()["enrolled"]), audit)
        retention.start()
        at_the_end.callback(retention.close)
    slots = ModelSlots(settings.model_slots, settings.queue_wait_s, settings.photo_requests)
    pipeline = Pipeline(settings, engine, reader, slots, decoders.decode, liveness)
    return Parts(engine, store, gallery, pipeline, access, Readiness(gallery.refresh), audit, retention)
