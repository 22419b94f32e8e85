"""The commands backup and restore: write everybody enrolled to a file, and put a file's people into a store."""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import bootstrap
from commands.backup.backup_file import BackupError, BackupWriter, pages_of, read_frames
from commands.command import Command
from commands.progress import with_progress
from settings import Settings
from store.documents import erasure_of, is_text, removal_of
from store.encryption import Keyring
from store.records import Document, RecordStore, StoreNotEmptyError

logger = logging.getLogger(__name__)

PARTIAL = ".face-api-backup-"


def write(store: RecordStore, path: Path, keyring: Keyring, *, replace: bool = False) -> int:
    """Write every record up to the log's last place of now. The file has mode 0600, and is complete or not there.

    The file is read back before it gets its name.

    Args:
        store: the records; services may go on writing to it.
        path: the file.
        keyring: encrypts the file, if there are keys.
        replace: whether `path` may be an existing file.

    Returns:
        How many records there are in it.

    Raises:
        BackupError: `path` exists, or what was written cannot be read.
        FaceError: `database_unavailable`.
        OSError: the file cannot be written.
    """
    _require_absent(path, replace=replace)
    _remove_partial_files(path.parent)
    until = store.last_place()
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            writer = BackupWriter(file, until, keyring)
            records = 0
            for page in pages_of(with_progress(store.documents(until), until, "records")):
                writer.add_frame({"records": page})
                records += len(page)
            for notes in pages_of({"user_id": user_id, "day": day} for user_id, day in store.notes()):
                writer.add_frame({"notes": notes})
            # Erased or removed meanwhile: the records may have been read before, and the erasures come after `until`.
            now = store.last_place()
            erased = sorted(set(store.erasures(now)) - set(store.erasures(until)))
            removed = sorted(place for place in set(store.removals(now)) - set(store.removals(until)) if place <= until)
            writer.add_frame({"end": True, "count": records, "erased": erased, "removed": removed})
            writer.end()
            file.flush()
            os.fsync(file.fileno())
            deque(read_frames(Path(temporary), keyring), maxlen=0)
            _require_absent(path, replace=replace)
            Path(temporary).replace(path)
        _sync_folder(path.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return records


def _require_absent(path: Path, *, replace: bool) -> None:
    if path.exists() and not replace:
        raise BackupError(f"{path} exists: name another file, or replace it with --replace")


def _remove_partial_files(folder: Path) -> None:
    """Remove the files of killed backups; a running backup holds its file's lock."""
    for left_over in folder.glob(f"{PARTIAL}*"):
        with suppress(OSError), left_over.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left_over.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def restore(store: RecordStore, path: Path, keyring: Keyring, *, replace: bool) -> int:
    """Write a backup's records into a store, after the whole file was checked; returns how many the file holds.

    A gallery's snapshot of before must not bring anybody back who was erased while the backup was made: their erasures
    are restored as entries of the log.

    Raises:
        BackupError: as `read_frames` does, or the store is not empty.
        FaceError: `database_unavailable`. The next attempt needs `replace`, which replaces what was written by then.
        OSError: the file cannot be read.
    """
    deque(read_frames(path, keyring), maxlen=0)
    counted, last, end = 0, 0, {}
    outdated, missing = 0, set()
    for content in read_frames(path, keyring):
        for record in content.get("records", ()):
            counted, last = counted + 1, record["seq"]
            if isinstance(embedding := record.get("embedding"), bytes):
                outdated += not keyring.is_current(embedding)
                missing.add(keyring.missing_key(embedding))
        end = content
    if end["count"] != counted:
        raise BackupError(f"{path} holds {counted} records instead of {end['count']}")
    erased, removed = set(end["erased"]), set(end.get("removed", ()))
    erasures = [erasure_of(user_id, place) for place, user_id in enumerate(end["erased"], last + 1)]
    erasures += [removal_of(place, seq) for seq, place in enumerate(sorted(removed), last + len(erasures) + 1)]

    def items(kind: str) -> Iterator[dict[str, Any]]:
        return (item for content in read_frames(path, keyring) for item in content.get(kind, ()))

    def is_erased(item: dict[str, Any]) -> bool:
        return item.get("seq") in removed or (is_text(item.get("user_id")) and item["user_id"] in erased)

    documents = (_without_template(record) if is_erased(record) else record for record in items("records"))
    notes = ((note["user_id"], note["day"]) for note in items("notes") if not is_erased(note))
    try:
        written = store.fill(with_progress(chain(documents, erasures), last, "records"), notes, replace=replace)
    except StoreNotEmptyError as error:
        raise BackupError(f"{error}: --replace empties it first, and everybody in it is lost") from error
    if written != counted + len(erasures):
        raise BackupError(
            f"only {written} of {counted + len(erasures)} records were written: another process writes to this store"
        )
    for name in missing - {None}:
        logger.warning("There are templates under the key %s: give it in TEMPLATE_KEYS, or nothing is decided", name)
    if keyring and outdated:
        logger.warning("%d templates are plain or under an older key: run `python app.py rotate-keys`", outdated)
    return counted


def _without_template(record: Document) -> Document:
    kept = {name: value for name, value in record.items() if name not in ("embedding", "request_key", "quality")}
    return {**kept, "deleted_at": time.time()}


def _add_backup_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)
    parser.add_argument("--replace", action="store_true", help="replace the file, if it exists")


def _add_restore_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)
    parser.add_argument("--replace", action="store_true", help="empty the store first, if there is anybody in it")


def _run_backup(arguments: argparse.Namespace, settings: Settings) -> int:
    _require_absent(arguments.file, replace=arguments.replace)
    store = bootstrap.connect_store(settings)
    try:
        count = write(store, arguments.file, settings.keyring, replace=arguments.replace)
    finally:
        store.close()
    sys.stderr.write(f"{count} records backed up to {arguments.file}\n")
    if not settings.keyring:
        logger.warning("The backup is not encrypted: TEMPLATE_KEYS is empty")
    return 0


def _run_restore(arguments: argparse.Namespace, settings: Settings) -> int:
    store = bootstrap.connect_store(settings)
    try:
        count = restore(store, arguments.file, settings.keyring, replace=arguments.replace)
    finally:
        store.close()
    sys.stderr.write(f"{count} records restored from {arguments.file}\n")
    return 0


BACKUP = Command("backup", "write everybody enrolled to a file, while services run", _run_backup, _add_backup_arguments)
RESTORE = Command(
    "restore",
    "put a backup's people into a store; stop services first",
    _run_restore,
    _add_restore_arguments,
)
