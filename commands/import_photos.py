"""Owns `python app.py import`: enrolling the people of many photos, at the models' own pace, however often begun."""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from pathlib import Path

import bootstrap
from commands import bulk
from commands.bulk import Line, Made, Photo, Report
from commands.progress import watched
from engines.base import Engine, cosine_of
from errors import CODES
from gallery.decisions import Gallery
from settings import Settings
from store.records import RecordStore

logger = logging.getLogger("face_api")

AT_ONCE = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python app.py import`."""
    parser.add_argument("source", type=Path, help="a folder of photos, one person each, or a CSV with their paths")
    parser.add_argument(
        "--report",
        type=Path,
        default=Path("import-report.csv"),
        help="CSV that says what became of each photo (import-report.csv), and where to go on: give each store its own",
    )


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Enrol everybody who is not enrolled yet, beside running services; go on where an earlier run ended.

    Raises:
        ValueError: there are no photos, or the report is another file or another store's.
        FaceError: `database_unavailable`; run it again.
    """
    photos = bulk.photos_of(arguments.source)
    settings = bulk.one_thread_each(settings)
    store = bootstrap.connected_store(settings)
    engine = bootstrap.loaded_engine(settings)
    gallery = bootstrap.gallery_of(settings, store, engine)
    gallery.load(keep_trying=False)
    try:
        with Report(arguments.report) as report:
            todo = still_to_do(photos, report, store, settings)
            logger.info("%d photos, %d of them done by an earlier run", len(photos), len(photos) - len(todo))
            importer = Importer(store, engine, gallery, settings, report)
            for made in watched(bulk.made_of(todo, engine, settings), len(todo), "photos"):
                importer.take(made)
            importer.finish()
            sys.stdout.write(report.counts())
    finally:
        gallery.close()
        store.close()
    return 0


def still_to_do(photos: list[Photo], report: Report, store: RecordStore, settings: Settings) -> list[Photo]:
    """Leave out the photos that the report has; a refused one is tried again when another lies under its name.

    Raises:
        ValueError: the report is another store's, by which everybody would be done already.
    """
    enrolled = {line.path: line.user_id for line in report.lines.values() if line.code == "enrolled"}
    some = list(enrolled.values())[-100:]
    if some and not any(store.find_person(user_id) for user_id in some):
        raise ValueError(
            f"{report.path} is the report of another store: whom it calls enrolled is not in the {store.describe()}. "
            "Name another file with --report"
        )
    return [photo for photo in photos if str(photo.path) not in enrolled and not report.refused(photo, settings)]


class Importer:
    """Enrols in batches, and reports a photo only when what became of it is durable."""

    def __init__(
        self, store: RecordStore, engine: Engine, gallery: Gallery, settings: Settings, report: Report
    ) -> None:
        self._store, self._gallery, self._report = store, gallery, report
        self._duplicate_cosine = cosine_of(settings.duplicate_threshold, engine.cosine_at_half)
        self._batch: list[Made] = []
        self._path_of = {line.user_id: path for path, line in report.lines.items() if line.code == "enrolled"}

    def take(self, made: Made) -> None:
        """Take one photo in; it is reported with its batch."""
        self._batch.append(made)
        if len(self._batch) >= AT_ONCE:
            self.finish()

    def finish(self) -> None:
        """Enrol and report what has been taken in so far."""
        templates = [made.template for made in self._batch if made.template is not None]
        keys = [request_key(made.digest) for made in self._batch if made.template is not None]
        enrolled = iter(
            self._gallery.enrol_many(templates, duplicate_cosine=self._duplicate_cosine, request_keys=keys)
            if templates
            else []
        )
        lines = []
        for made in self._batch:
            if made.error is not None:
                lines.append(_line(made, made.error.code, "", made.error.message))
                continue
            # Who is enrolled by this very photo already: a run before was ended between enrolling and reporting.
            user_id = next(enrolled) or self._store.find_request(request_key(made.digest), 0.0)
            if user_id is not None and user_id not in self._path_of:
                self._path_of[user_id] = str(made.photo.path)
                lines.append(_line(made, "enrolled", user_id, ""))
            else:
                lines.append(_line(made, "duplicate_face", "", self._like_whom(made)))
        self._report.add(lines)
        self._batch = []

    def _like_whom(self, made: Made) -> str:
        best = None if made.template is None else self._gallery.search(made.template)
        path = self._path_of.get(best.user_id) if best is not None else None
        return f"the same face as {path}" if path else CODES["duplicate_face"][1]


def request_key(digest: str) -> str:
    """By what a photo's enrolment is found again; no Idempotency-Key hashes to it."""
    return hashlib.sha256(f"import of the photo {digest}".encode()).hexdigest()


def _line(made: Made, code: str, user_id: str, message: str) -> Line:
    return Line(str(made.photo.path), made.digest, code, user_id, message)
