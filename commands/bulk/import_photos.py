"""The command import: enrols the people of many photos, as fast as the models are; it can be repeated at any time."""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from pathlib import Path

import bootstrap
from commands.bulk.photo_list import Photo, find_photos
from commands.bulk.processing import ProcessedPhoto, one_thread_per_photo, process_photos, stopped_gently
from commands.bulk.report import Report, ReportLine, report_path
from commands.command import Command
from commands.progress import with_progress
from engines.base import Engine, cosine_of
from errors import CODES
from gallery.decisions import Gallery
from settings import Settings
from store.audit_log import AuditLog
from store.records import RecordStore

logger = logging.getLogger(__name__)

BATCH_PHOTOS = 64
# Each photo with one of these codes shows somebody who is enrolled.
ENROLLED_CODES = ("enrolled", "duplicate_face")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser this command's arguments."""
    parser.add_argument(
        "source",
        type=Path,
        help="a folder of photos (with its sub-folders), each of one person; or a .csv file whose first line names its "
        "columns: path (relative to the CSV). Other columns are ignored",
    )
    parser.add_argument(
        "--report",
        type=Path,
        help="CSV with a line for each photo; a repeated run continues where it ends. Each store needs its own "
        "(default: import-report.csv in DATA_DIR)",
    )


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Enrol everybody who is not enrolled yet, while services run, and continue an earlier run.

    Returns:
        0; 1 if no photo of the list shows anybody who is enrolled now.

    Raises:
        ValueError: there are no photos, the list is not one, or the report is another file or another store's.
        FaceError: `database_unavailable`; run it again.
    """
    photos = find_photos(arguments.source)
    settings = one_thread_per_photo(settings)
    store = bootstrap.connect_store(settings)
    engine = bootstrap.loaded_engine(settings)
    gallery = bootstrap.gallery_of(settings, store, engine)
    gallery.load(keep_trying=False)
    audit = bootstrap.open_audit_log(settings)
    try:
        with Report(report_path(arguments.report, settings, "import-report.csv")) as report:
            todo = photos_to_do(photos, report, store, settings)
            logger.info(
                "%d photos, %d of them done by an earlier run. Report: %s",
                len(photos), len(photos) - len(todo), report.path,
            )  # fmt: skip
            importer = Importer(store, engine, gallery, settings, report, audit)
            with stopped_gently() as stopping:
                processed = process_photos(todo, engine, settings, stopping)
                for photo in with_progress(processed, len(todo), "photos"):
                    importer.take(photo)
                importer.finish()
                sys.stdout.write(report.summary())
    finally:
        gallery.close()
        store.close()
    codes = {line.code for photo in photos if (line := report.lines.get(str(photo.path)))}
    return 0 if codes.intersection(ENROLLED_CODES) else 1


def photos_to_do(photos: list[Photo], report: Report, store: RecordStore, settings: Settings) -> list[Photo]:
    """The photos that the report lacks. A refused photo is tried again when another one has its name.

    Raises:
        ValueError: the report belongs to another store; by it everybody would be done already.
    """
    enrolled = {line.path: line.user_id for line in report.lines.values() if line.code == "enrolled"}
    newest = list(enrolled.values())[-100:]
    if newest and not any(store.find_person(user_id) for user_id in newest):
        raise ValueError(
            f"{report.path} is the report of another store: its people are not in the {store.describe()}. "
            "Name another file with --report"
        )
    return [photo for photo in photos if str(photo.path) not in enrolled and not report.has_refused(photo, settings)]


class Importer:
    """Enrols in batches. A photo gets its line in the report when what became of it is durable."""

    def __init__(  # noqa: PLR0917 - what an import works with
        self,
        store: RecordStore,
        engine: Engine,
        gallery: Gallery,
        settings: Settings,
        report: Report,
        audit: AuditLog | None,
    ) -> None:
        self._store, self._gallery, self._report, self._audit = store, gallery, report, audit
        self._duplicate_cosine = cosine_of(settings.duplicate_threshold, engine.cosine_at_half)
        self._batch: list[ProcessedPhoto] = []
        self._path_of = {line.user_id: path for path, line in report.lines.items() if line.code == "enrolled"}

    def take(self, photo: ProcessedPhoto) -> None:
        """Add one photo to the batch; a full batch is enrolled and reported."""
        self._batch.append(photo)
        if len(self._batch) >= BATCH_PHOTOS:
            self.finish()

    def finish(self) -> None:
        """Enrol and report the batch."""
        templates = [photo.template for photo in self._batch if photo.template is not None]
        keys = [request_key(photo.digest) for photo in self._batch if photo.template is not None]
        enrolled = iter(
            self._gallery.enrol_many(templates, duplicate_cosine=self._duplicate_cosine, request_keys=keys)
            if templates
            else []
        )
        lines = []
        for photo in self._batch:
            if photo.error is not None:
                lines.append(_line(photo, photo.error.code, "", photo.error.message))
                continue
            user_id, by = next(enrolled), "(import)"
            if user_id is None:
                # An earlier run may have enrolled this photo and have been killed before it wrote its line.
                user_id, by = self._store.find_request(request_key(photo.digest), 0.0), "(import, found again)"
            if user_id is not None and user_id not in self._path_of:
                if self._audit is not None:
                    self._audit.record("enrol", code="ok", user_id=user_id, key=by)
                self._path_of[user_id] = str(photo.photo.path)
                lines.append(_line(photo, "enrolled", user_id, ""))
            else:
                lines.append(_line(photo, "duplicate_face", "", self._duplicate_message(photo)))
        self._report.add(lines)
        self._batch = []

    def _duplicate_message(self, photo: ProcessedPhoto) -> str:
        best = None if photo.template is None else self._gallery.search(photo.template)
        path = self._path_of.get(best.user_id) if best is not None else None
        return f"the same face as {path}" if path else CODES["duplicate_face"][1]


def request_key(digest: str) -> str:
    """The key under which a photo's enrolment is found again; no Idempotency-Key has the same hash."""
    return hashlib.sha256(f"import of the photo {digest}".encode()).hexdigest()


def _line(photo: ProcessedPhoto, code: str, user_id: str, message: str) -> ReportLine:
    return ReportLine(str(photo.photo.path), photo.digest, code, user_id, message)


IMPORT = Command("import", "enrol the people of a folder of photos, or of a CSV", run, add_arguments)
