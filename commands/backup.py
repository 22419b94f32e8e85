"""Owns the backup file: `python app.py backup FILE` and `restore FILE`, consistent while services run.

A file is a line of JSON (what it is, for people), then frames: eight bytes of length, and BSON. A frame holds records
as they are stored (a sealed template stays sealed) or notes of who was seen when; the last frame says how many there
were, and who was erased while the backup was made. Their erasures are restored as entries of the log, so that no
gallery's snapshot of before brings them back either. Then follow a length of zero and the SHA-256 of everything before.
With TEMPLATE_KEYS every frame is sealed to its number in this very file, so that frames can be neither exchanged, left
out nor read.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any

import bson
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument

import bootstrap
from commands.progress import watched
from settings import Settings
from store.encryption import Keyring, SealError
from store.records import Document, RecordStore, StoreNotEmptyError, erasure_of, is_text

logger = logging.getLogger("face_api")

FORMAT = "face-api backup 1"
FRAME_BYTES = 1024 * 1024
MAX_FRAME = 64 * 1024 * 1024
NO_MORE = bytes(8)
PARTIAL = ".face-api-backup-"
# A date that Python cannot express must not make a frame unreadable.
CODEC: CodecOptions[dict[str, Any]] = CodecOptions(datetime_conversion=DatetimeConversion.DATETIME_AUTO)


class BackupError(ValueError):
    """A backup that cannot be restored, or may not be; the message says why."""


def write(store: RecordStore, path: Path, keyring: Keyring) -> int:
    """Write everything up to the log's last place of now, durably and at once or not at all; mode 0600.

    The file is read back before it gets its name.

    Args:
        store: the records; services may go on writing to it.
        path: the file, replaced if it exists.
        keyring: seals the file, if there are keys.

    Returns:
        How many records there are in it.

    Raises:
        BackupError: what was written cannot be read.
        FaceError: `database_unavailable`.
        OSError: the file cannot be written.
    """
    _remove_partial(path.parent)
    until = store.last_place()
    header = {
        "format": FORMAT,
        "id": str(uuid.uuid4()),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "places": until,
        "sealed": bool(keyring),
    }
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            writer = _Writer(file, header, keyring)
            records = 0
            for page in _pages(watched(store.documents(until), until, "records")):
                writer.frame({"records": page})
                records += len(page)
            for notes in _pages({"user_id": user_id, "day": day} for user_id, day in store.notes()):
                writer.frame({"notes": notes})
            # Their records may have been read before they were erased, and their erasures lie behind the last place.
            erased = sorted(set(store.erasures(store.last_place())) - set(store.erasures(until)))
            writer.frame({"end": True, "count": records, "erased": erased})
            writer.close()
            file.flush()
            os.fsync(file.fileno())
            deque(read(Path(temporary), keyring), maxlen=0)
            Path(temporary).replace(path)
        _sync_folder(path.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return records


def _remove_partial(folder: Path) -> None:
    """Remove what killed backups left; one that still runs holds its file's lock."""
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


def read(path: Path, keyring: Keyring) -> Iterator[dict[str, Any]]:
    """Yield the frames' contents, not to be relied on before the last, which has `end`, was followed by no error.

    Raises:
        BackupError: the file is no backup, damaged, cut off, or sealed with a key that is not here.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        sealed, whose, line = _read_header(file, path)
        digest = hashlib.sha256(line)
        number, over = 0, False
        while (length := file.read(8)) != NO_MORE:
            size = int.from_bytes(length, "little")
            frame = file.read(size) if size <= MAX_FRAME else b""
            if len(length) < 8 or len(frame) < size or size > MAX_FRAME:
                raise BackupError(f"{path} is cut off or damaged at its frame {number}")
            try:
                content = bson.decode(keyring.open(frame, _place(whose, number)) if sealed else frame, CODEC)
            except (SealError, BSONError) as error:
                raise BackupError(f"{path} cannot be read at its frame {number}: {error}") from error
            digest.update(length + frame)
            number += 1
            over = "end" in content
            yield content
        # One byte more than there should be: nothing may follow.
        if not over or file.read(33) != digest.digest():
            raise BackupError(f"{path} is damaged: it is not what was written")


def _read_header(file: IO[bytes], path: Path) -> tuple[bool, str, bytes]:
    """Return whether the file is sealed, its id, and the header's line."""
    line = file.readline(4096)
    try:
        header = json.loads(line)
        sealed, whose = bool(header["sealed"]), str(header["id"])
    except (ValueError, KeyError, TypeError) as error:
        raise BackupError(f"{path} is no backup") from error
    if header.get("format") != FORMAT:
        raise BackupError(f"{path} is of another format than this version reads ({FORMAT})")
    return sealed, whose, line


def restore(store: RecordStore, path: Path, keyring: Keyring, *, replace: bool) -> int:
    """Write a backup's records into a store, after the whole file has been checked; returns how many it holds.

    Raises:
        BackupError: as `read` does, or the store is not empty.
        FaceError: `database_unavailable`; what was written by then is replaced by the next attempt with `replace`.
        OSError: the file cannot be read.
    """
    deque(read(path, keyring), maxlen=0)
    counted, last, end = 0, 0, {}
    outdated, missing = 0, set()
    for content in read(path, keyring):
        for record in content.get("records", ()):
            counted, last = counted + 1, record["seq"]
            if isinstance(embedding := record.get("embedding"), bytes):
                outdated += not keyring.is_current(embedding)
                missing.add(keyring.missing(embedding))
        end = content
    if end["count"] != counted:
        raise BackupError(f"{path} holds {counted} records instead of {end['count']}")
    erasures = [erasure_of(user_id, place) for place, user_id in enumerate(end["erased"], last + 1)]

    def items(kind: str) -> Iterator[dict[str, Any]]:
        return (item for content in read(path, keyring) for item in content.get(kind, ()))

    def is_erased(item: dict[str, Any]) -> bool:
        return is_text(item.get("user_id")) and item["user_id"] in erased

    erased = set(end["erased"])
    documents = (_without_template(one) if is_erased(one) else one for one in items("records"))
    notes = ((one["user_id"], one["day"]) for one in items("notes") if not is_erased(one))
    try:
        written = store.fill(watched(chain(documents, erasures), last, "records"), notes, replace=replace)
    except StoreNotEmptyError as error:
        raise BackupError(f"{error}: --replace empties it first, and everybody in it is lost") from error
    if written != counted + len(erasures):
        raise BackupError(
            f"only {written} of {counted} records were written: somebody else writes to this store, or two records of"
            " the backup have the same user_id"
        )
    for name in missing - {None}:
        logger.warning("There are templates under the key %s: give it in TEMPLATE_KEYS, or nothing is decided", name)
    if keyring and outdated:
        logger.warning("%d templates are plain or under an older key: run `python app.py rotate-keys`", outdated)
    return counted


class _Writer:
    def __init__(self, file: IO[bytes], header: dict[str, Any], keyring: Keyring) -> None:
        self._file, self._keyring, self._whose, self._number = file, keyring, str(header["id"]), 0
        self._digest = hashlib.sha256()
        self._put(json.dumps(header).encode() + b"\n")

    def frame(self, content: dict[str, Any]) -> None:
        data = bson.encode(content)
        if self._keyring:
            data = self._keyring.seal(data, _place(self._whose, self._number))
        self._number += 1
        self._put(len(data).to_bytes(8, "little") + data)

    def close(self) -> None:
        self._file.write(NO_MORE + self._digest.digest())

    def _put(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)


def _place(whose: str, number: int) -> str:
    return f"backup {whose} {number}"


def _pages(items: Iterable[dict[str, Any]]) -> Iterator[list[RawBSONDocument]]:
    """Encode items, and yield so many together as fit well into a frame."""
    page: list[RawBSONDocument] = []
    size = 0
    for item in items:
        encoded = bson.encode(item)
        if len(encoded) > MAX_FRAME // 4:
            raise BackupError(f"the record of user_id {item.get('user_id')!r:.100} is too large: erase it first")
        if size + len(encoded) > FRAME_BYTES and page:
            yield page
            page, size = [], 0
        page.append(RawBSONDocument(encoded))
        size += len(encoded)
    if page:
        yield page


def _without_template(record: Document) -> Document:
    kept = {name: value for name, value in record.items() if name not in ("embedding", "request_key")}
    return {**kept, "deleted_at": time.time()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python app.py backup` and `restore`."""
    parser.add_argument("file", type=Path)
    if (parser.prog or "").endswith("restore"):
        parser.add_argument("--replace", action="store_true", help="empty the store first, if there is anybody in it")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Back up or restore."""
    keyring = settings.keyring
    store = bootstrap.connected_store(settings)
    try:
        if hasattr(arguments, "replace"):
            count = restore(store, arguments.file, keyring, replace=arguments.replace)
            sys.stderr.write(f"{count} records restored from {arguments.file}\n")
        else:
            count = write(store, arguments.file, keyring)
            sys.stderr.write(f"{count} records backed up to {arguments.file}\n")
            if not keyring:
                logger.warning("The backup is not encrypted: TEMPLATE_KEYS is empty")
    finally:
        store.close()
    return 0
