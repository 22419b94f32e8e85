"""Owns `python app.py reembed`: everybody's templates by a new model, side by side with the running service.

The new templates go into a store of their own (another collection, or another folder), under the same user_ids. The
service goes on with the older model until it is started with the new FACE_MODEL and the new store's name.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path

import bootstrap
from commands import bulk
from commands.bulk import Line, Made, Photo, Report
from commands.progress import watched
from engines.base import Engine
from settings import Settings, SettingsError
from store.records import Enrolment, RecordStore

logger = logging.getLogger("face_api")

MAX_LOST_RACES = 1000
SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python app.py reembed`."""
    parser.add_argument("source", type=Path, help="a folder of photos named <user_id>.jpg, or a CSV of path,user_id")
    parser.add_argument("--into-collection", help="with MongoDB: the new collection")
    parser.add_argument("--into-folder", type=Path, help="with SQLite: the new DATA_DIR")
    parser.add_argument("--report", type=Path, default=Path("reembed-report.csv"), help="what became of each photo")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Bring the new store up to date with the one that is served; repeat it until nothing is left, then switch over.

    Raises:
        SettingsError: it is not said where to.
        ValueError: there are no photos, or the report is another file.
        FaceError: `database_unavailable`; run it again.
    """
    target = _target(arguments, settings)
    photos = bulk.photos_of(arguments.source)
    old, new = bootstrap.connected_store(settings), bootstrap.connected_store(target)
    try:
        engine = bootstrap.loaded_engine(bulk.one_thread_each(settings))
        with Report(arguments.report) as report:
            left = bring_up_to_date(old, new, photos, engine, bulk.one_thread_each(settings), report)
            sys.stdout.write(report.counts())
    finally:
        old.close()
        new.close()
    where = f"MONGO_COLLECTION={target.mongo_collection}" if settings.mongo_uri else f"DATA_DIR={target.data_dir}"
    sys.stdout.writelines(f"{user_id}: enrolled, and not in the new store\n" for user_id in left[:SHOWN])
    sys.stdout.write(f"{len(left)} people are enrolled and not in the new store.\n")
    sys.stdout.write(f"To switch over, start the service with FACE_MODEL={settings.face_model} and {where}.\n")
    return 1 if left else 0


def bring_up_to_date(  # noqa: PLR0917 - from where, to where, by what
    old: RecordStore, new: RecordStore, photos: list[Photo], engine: Engine, settings: Settings, report: Report
) -> list[str]:
    """Add who is missing in the new store, and erase who is erased in the older one; returns who is still missing."""
    people = {stored.user_id for stored in old.embeddings(0)}
    there = {stored.user_id for stored in new.embeddings(0)}
    for user_id in there - people:
        while new.find_person(user_id) is not None and not new.erase(new.last_place() + 1, user_id):
            pass
    there &= people
    todo = [
        photo
        for photo in photos
        if (whose := _whose(photo)) in people and whose not in there and not report.refused(photo, settings)
    ]
    for made in watched(bulk.made_of(todo, engine, settings), len(todo), "photos"):
        user_id = _whose(made.photo)
        code, message = "reembedded", ""
        if made.template is None:
            code, message = (made.error.code, made.error.message) if made.error else ("internal_error", "")
        elif user_id in there:
            code = "another_photo_was_taken"
        elif _added(old, new, made, user_id, engine.name):
            there.add(user_id)
        else:
            code = "unknown_user"
        report.add([Line(str(made.photo.path), made.digest, code, user_id, message)])
    return sorted(people - there)


def _added(old: RecordStore, new: RecordStore, made: Made, user_id: str, model: str) -> bool:
    """Store one template under a user_id that is still enrolled; False if it is not any more."""
    assert made.template is not None
    for _ in range(MAX_LOST_RACES):
        person = old.find_person(user_id)
        if person is None:
            return False
        enrolment = Enrolment(user_id, made.template, model, person.timestamp or time.time())
        if new.append(new.last_place() + 1, [enrolment]):
            return True
    return False


def _whose(photo: Photo) -> str:
    return photo.label or photo.path.stem


def _target(arguments: argparse.Namespace, settings: Settings) -> Settings:
    if settings.mongo_uri:
        if not arguments.into_collection or arguments.into_collection == settings.mongo_collection:
            raise SettingsError("give the new collection with --into-collection")
        return replace(settings, mongo_collection=arguments.into_collection)
    if arguments.into_folder is None or arguments.into_folder.resolve() == settings.data_dir:
        raise SettingsError("give the new DATA_DIR with --into-folder")
    return replace(settings, data_dir=arguments.into_folder.resolve())
