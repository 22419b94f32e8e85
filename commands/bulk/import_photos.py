"""The command import: enrols the people of many photos, as fast as the models are; it can be repeated at any time."""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Iterable
from pathlib import Path

import bootstrap
from commands.bulk.photo_list import Photo, find_photos
from commands.bulk.processing import ProcessedPhoto, one_thread_per_photo, process_photos, stopped_gently
from commands.bulk.report import Report, ReportLine, report_path
from commands.command import Command
from commands.progress import with_progress
from engines.base import Engine, cosine_of
from errors import CODES, FaceError
from gallery.decisions import Gallery, NewFace
from settings import Settings
from store.audit_log import AuditLog
from store.records import RecordStore

logger = logging.getLogger(__name__)

BATCH_PHOTOS = 64
# Each photo with one of these codes shows somebody who is enrolled.
ENROLLED_CODES = ("enrolled", "photo_added", "duplicate_face")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser this command's arguments."""
    parser.add_argument(
        "source",
        type=Path,
        help="a folder of photos (with its sub-folders), each of one person; or a .csv file whose first line names its "
        "columns: path (relative to the CSV), and person, if people have several photos. Other columns are ignored",
    )
    parser.add_argument(
        "--person-folders",
        action=argparse.BooleanOptionalAction,
        help="each sub-folder holds the photos of one person: the first that passes enrols, the others are added "
        "(default: if every photo lies in a sub-folder, and one of these holds several)",
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
    photos = find_photos(arguments.source, person_folders=arguments.person_folders)
    settings = one_thread_per_photo(settings)
    store = bootstrap.connect_store(settings)
    engine = bootstrap.engine_of(settings)
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
            importer.know_people(photos)
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
    done = ("enrolled", "photo_added")
    enrolled = {line.path: line.user_id for line in report.lines.values() if line.code in done}
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
        self._match_cosine = cosine_of(settings.verify_threshold, engine.cosine_at_half)
        self._max_photos = settings.max_photos
        # person -> the user_id under which an earlier photo enrolled them.
        self._user_ids: dict[str, str] = {}
        self._batch: list[ProcessedPhoto] = []
        self._path_of = {line.user_id: path for path, line in report.lines.items() if line.code == "enrolled"}

    def know_people(self, photos: Iterable[Photo]) -> None:
        """Take the people whom earlier runs enrolled from the report."""
        for photo in photos:
            line = self._report.lines.get(str(photo.path))
            if photo.person is not None and line is not None and line.code in ("enrolled", "photo_added"):
                self._user_ids[photo.person] = line.user_id

    def take(self, photo: ProcessedPhoto) -> None:
        """Add one photo to the batch; a full batch is enrolled and reported."""
        self._batch.append(photo)
        if len(self._batch) >= BATCH_PHOTOS:
            self.finish()

    def finish(self) -> None:
        """Enrol and report the batch: one photo of each new person first, then their other photos."""
        waiting, self._batch = self._batch, []
        while waiting:
            firsts = self._first_photos(waiting)
            self._report.add(self._enrol(firsts))
            later = [photo for photo in waiting if photo not in firsts]
            self._report.add(self._add(photo) for photo in later if photo.photo.person in self._user_ids)
            # The photo before these enrolled nobody: try the next one.
            waiting = [photo for photo in later if photo.photo.person not in self._user_ids]

    def _first_photos(self, photos: list[ProcessedPhoto]) -> list[ProcessedPhoto]:
        """Return the photos without those that follow another photo of the same person."""
        seen, firsts = set(self._user_ids), []
        for photo in photos:
            person = photo.photo.person
            if photo.template is None or person is None or person not in seen:
                firsts.append(photo)
            if photo.template is not None and person is not None:
                seen.add(person)
        return firsts

    def _enrol(self, photos: list[ProcessedPhoto]) -> list[ReportLine]:
        """Enrol a person with each of these photos; return the report's lines."""
        faces = [
            NewFace(photo.template, photo.restored, request_key(photo.digest), photo.quality)
            for photo in photos
            if photo.template is not None
        ]
        enrolled = iter(self._gallery.enrol_many(faces, duplicate_cosine=self._duplicate_cosine) if faces else [])
        lines = []
        for photo in photos:
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
                if photo.photo.person is not None:
                    self._user_ids[photo.photo.person] = user_id
                lines.append(_line(photo, "enrolled", user_id, ""))
            else:
                lines.append(_line(photo, "duplicate_face", "", self._duplicate_message(photo)))
        return lines

    def _add(self, photo: ProcessedPhoto) -> ReportLine:
        """Add a photo to its person, who is enrolled; return the report's line."""
        assert photo.template is not None
        user_id = self._user_ids[photo.photo.person or ""]
        person = self._store.find_person(user_id)
        if person is not None and len(person.photos) >= self._max_photos:
            return _line(photo, "not_needed", user_id, f"this person has {len(person.photos)} photos (MAX_PHOTOS)")
        try:
            self._gallery.add_photo(
                user_id,
                photo.template,
                match_cosine=self._match_cosine,
                duplicate_cosine=self._duplicate_cosine,
                max_photos=self._max_photos,
                request_key=request_key(f"{photo.digest} of {user_id}"),
                quality=photo.quality,
            )
        except FaceError as refusal:
            if refusal.status >= 500:  # the machine's fault, not the photo's
                raise
            return _line(photo, refusal.code, user_id, refusal.message)
        if self._audit is not None:
            self._audit.record("add photo", code="ok", user_id=user_id, key="(import)")
        return _line(photo, "photo_added", user_id, "")

    def _duplicate_message(self, photo: ProcessedPhoto) -> str:
        assert photo.template is not None
        probes = (photo.template, *photo.restored)
        found = [best for one in probes if (best := self._gallery.search(one)) is not None]
        path = self._path_of.get(max(found, key=lambda best: best.cosine).user_id) if found else None
        return f"the same face as {path}" if path else CODES["duplicate_face"][1]


def request_key(digest: str) -> str:
    """The key under which a photo's enrolment is found again; no Idempotency-Key has the same hash."""
    return hashlib.sha256(f"import of the photo {digest}".encode()).hexdigest()


def _line(photo: ProcessedPhoto, code: str, user_id: str, message: str) -> ReportLine:
    return ReportLine(str(photo.photo.path), photo.digest, code, user_id, message)


IMPORT = Command("import", "enrol the people of a folder of photos, or of a CSV", run, add_arguments)
