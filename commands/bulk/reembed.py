"""The command reembed: makes everybody's templates with a new model, while the service runs on the old one.

The new templates go into a store of their own (another collection, or another folder), under the same user_ids. The
service keeps its model until it is started with the new FACE_MODEL and the new store's name.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import uuid
from collections import Counter
from dataclasses import replace
from pathlib import Path

import bootstrap
from commands.bulk.photo_list import Photo, find_photos
from commands.bulk.processing import ProcessedPhoto, one_thread_per_photo, process_photos, stopped_gently
from commands.bulk.report import Report, ReportLine, report_path
from commands.command import Command
from commands.progress import with_progress
from engines.base import Engine
from settings import Settings, SettingsError
from store.records import Enrolment, RecordStore

logger = logging.getLogger(__name__)

MAX_LOST_RACES = 1000
MAX_SHOWN_PEOPLE = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser this command's arguments."""
    parser.add_argument(
        "source",
        type=Path,
        help="a folder of photos named <user_id>.jpg, or a .csv file whose first line names its columns: path "
        "(relative to the CSV), user_id",
    )
    parser.add_argument("--into-collection", help="with MongoDB: the new collection")
    parser.add_argument("--into-folder", type=Path, help="with SQLite: the new DATA_DIR")
    parser.add_argument(
        "--report",
        type=Path,
        help="CSV with a line for each photo (default: reembed-report.csv in the present DATA_DIR)",
    )


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Bring the new store up to date with the one that is served; repeat it until nobody is missing.

    FACE_MODEL (or --face-model) is the new model here.

    Returns:
        0 when everybody is in the new store; 1 otherwise.

    Raises:
        SettingsError: the new store is not given, or FACE_MODEL is the model that everybody has already.
        ValueError: there are no photos, the report is another file, or the new store holds another model's people.
        FaceError: `database_unavailable`; run it again.
    """
    target = _target(arguments, settings)
    photos = find_photos(arguments.source)
    old, new = bootstrap.connect_store(settings), bootstrap.connect_store(target)
    try:
        settings = one_thread_per_photo(settings)
        engine = bootstrap.engine_of(settings)
        require_change_of_model(old, new, engine.name)
        with Report(report_path(arguments.report, settings, "reembed-report.csv")) as report:
            missing = bring_up_to_date(old, new, photos, engine, settings, report)
            sys.stdout.write(report.summary())
        ready = people_by_model(new)[engine.name]
    finally:
        old.close()
        new.close()
    sys.stdout.writelines(f"{user_id}: enrolled, and not in the new store\n" for user_id in missing[:MAX_SHOWN_PEOPLE])
    sys.stdout.write(f"{ready} people are in the new store with {engine.name}, {len(missing)} are not there yet.\n")
    if ready:
        where = f"MONGO_COLLECTION={target.mongo_collection}" if settings.mongo_uri else f"DATA_DIR={target.data_dir}"
        model = f"FACE_MODEL={settings.face_model}"
        if settings.face_detector != "auto":
            model += f", FACE_DETECTOR={settings.face_detector}"
        if settings.embedding_precision != "fp32":
            model += f", EMBEDDING_PRECISION={settings.embedding_precision}"
        sys.stdout.write(f"To switch over, start the service with {model} and {where}.\n")
    else:
        sys.stdout.write("Do not switch over: nobody could be verified.\n")
    return 1 if missing or not ready else 0


def people_by_model(store: RecordStore) -> Counter[str]:
    """How many people the store holds with each model; "" stands for records that name none."""
    return Counter(model for _, model in {(stored.user_id, stored.model or "") for stored in store.embeddings(0)})


def require_change_of_model(old: RecordStore, new: RecordStore, model: str) -> None:
    """Log which model is the old one and which the new one.

    Raises:
        SettingsError: `model` is the model that everybody has already.
        ValueError: nobody is enrolled, or the new store holds people of another model.
    """
    present, target = people_by_model(old), people_by_model(new)
    if not present:
        raise ValueError("nobody is enrolled")
    if set(present) == {model}:
        raise SettingsError(
            f"everybody is enrolled with {model} already, and FACE_MODEL names this model: give the new one with "
            "--face-model"
        )
    others = sorted(set(target) - {model})
    if others:
        raise ValueError(
            f"the new store holds people of another model ({', '.join(others)}) than {model}: give an empty store"
        )
    counts = ", ".join(f"{count} people with {name or 'no named model'}" for name, count in present.most_common())
    logger.info("The served store holds %s. The new templates are made with %s", counts, model)


def bring_up_to_date(  # noqa: PLR0917 - from where, to where, with what
    old: RecordStore, new: RecordStore, photos: list[Photo], engine: Engine, settings: Settings, report: Report
) -> list[str]:
    """Add everybody who is missing in the new store, erase who was erased in the old one; return who is missing.

    A person gets as many photos as there are in the old store, as far as `photos` has so many of them.
    """
    people = Counter(stored.user_id for stored in old.embeddings(0))
    there = Counter(stored.user_id for stored in new.embeddings(0))
    for user_id in there.keys() - people.keys():
        while new.find_person(user_id) is not None and not new.erase(new.last_place() + 1, user_id):
            pass
        del there[user_id]
    done = {path for path, line in report.lines.items() if line.code == "reembedded" and line.user_id in there}
    known = [photo for photo in photos if _user_id_of(photo) in people]
    if len(known) < len(photos):
        logger.warning("%d photos are skipped: nobody is enrolled under their user_id", len(photos) - len(known))
    todo = [
        photo
        for photo in known
        if there[_user_id_of(photo)] < people[_user_id_of(photo)]
        and str(photo.path) not in done
        and not report.has_refused(photo, settings)
    ]
    with stopped_gently() as stopping:
        for processed in with_progress(process_photos(todo, engine, settings, stopping), len(todo), "photos"):
            user_id = _user_id_of(processed.photo)
            code, message = "reembedded", ""
            if processed.error is not None:
                code, message = processed.error.code, processed.error.message
            elif there[user_id] >= people[user_id]:
                code = "another_photo_was_taken"
            elif _add(old, new, processed, there[user_id], engine.name):
                there[user_id] += 1
            else:
                code = "unknown_user"
            report.add([ReportLine(str(processed.photo.path), processed.digest, code, user_id, message)])
    return sorted(user_id for user_id in people if not there[user_id])


def _add(old: RecordStore, new: RecordStore, processed: ProcessedPhoto, earlier: int, model: str) -> bool:
    """Store one more template of a person with `earlier` photos; False if the person was erased meanwhile."""
    assert processed.template is not None
    user_id = _user_id_of(processed.photo)
    for _ in range(MAX_LOST_RACES):
        person = old.find_person(user_id)
        if person is None:
            return False
        timestamp = person.photos[min(earlier, len(person.photos) - 1)].timestamp or time.time()
        photo_id = str(uuid.uuid4()) if earlier else None
        enrolment = Enrolment(
            user_id, processed.template, model, timestamp, photo_id=photo_id, quality=processed.quality
        )
        if new.append(new.last_place() + 1, [enrolment]):
            return True
    return False


def _user_id_of(photo: Photo) -> str:
    return photo.user_id or photo.path.stem


def _target(arguments: argparse.Namespace, settings: Settings) -> Settings:
    if settings.mongo_uri:
        if not arguments.into_collection or arguments.into_collection == settings.mongo_collection:
            raise SettingsError("give the new collection with --into-collection")
        return replace(settings, mongo_collection=arguments.into_collection)
    if arguments.into_folder is None or arguments.into_folder.resolve() == settings.data_dir:
        raise SettingsError("give the new DATA_DIR with --into-folder")
    return replace(settings, data_dir=arguments.into_folder.resolve())


REEMBED = Command("reembed", "make everybody's templates with a new model, in a second store", run, add_arguments)
