"""The format of a backup file, and how one is written and read.

A file begins with a line of JSON that says what it is, for people. Frames follow: eight bytes of length, and BSON. A
frame holds records as they are stored (an encrypted template stays encrypted), or notes of who was verified when. The
last frame says how many records there are, and who was erased while the backup was made. After it come a length of
zero and the SHA-256 of everything before.

With TEMPLATE_KEYS every frame is encrypted and bound to its number in this one file: nobody without a key can read,
exchange or remove a frame.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import bson
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument

from store.encryption import Keyring, SealError

FORMAT = "face-api backup 1"
FRAME_BYTES = 1024 * 1024
MAX_FRAME_BYTES = 64 * 1024 * 1024
END_OF_FRAMES = bytes(8)
# A date that Python cannot express must not make a frame unreadable.
CODEC: CodecOptions[dict[str, Any]] = CodecOptions(datetime_conversion=DatetimeConversion.DATETIME_AUTO)


class BackupError(ValueError):
    """A backup that cannot be written or restored; the message says why."""


class BackupWriter:
    """Writes one backup file: the header at once, then frames, then the end.

    Args:
        file: open for writing bytes.
        places: the last place of the log that the backup holds.
        keyring: encrypts the frames, if there are keys.
    """

    def __init__(self, file: IO[bytes], places: int, keyring: Keyring) -> None:
        self._file, self._keyring, self._id, self._frames = file, keyring, str(uuid.uuid4()), 0
        self._digest = hashlib.sha256()
        header = {
            "format": FORMAT,
            "id": self._id,
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "places": places,
            "sealed": bool(keyring),
        }
        self._put(json.dumps(header).encode() + b"\n")

    def add_frame(self, content: dict[str, Any]) -> None:
        data = bson.encode(content)
        if self._keyring:
            data = self._keyring.seal(data, _frame_name(self._id, self._frames))
        self._frames += 1
        self._put(len(data).to_bytes(8, "little") + data)

    def end(self) -> None:
        self._file.write(END_OF_FRAMES + self._digest.digest())

    def _put(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)


def read_frames(path: Path, keyring: Keyring) -> Iterator[dict[str, Any]]:
    """Yield the frames' contents.

    The whole file is only known to be good when the frame with `end` was yielded and the iteration ended without an
    error.

    Raises:
        BackupError: the file is no backup, damaged, cut off, or encrypted with a key that is not in `keyring`.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        sealed, backup_id, line = _read_header(file, path)
        digest = hashlib.sha256(line)
        number, ended = 0, False
        while (length := file.read(8)) != END_OF_FRAMES:
            size = int.from_bytes(length, "little")
            frame = file.read(size) if size <= MAX_FRAME_BYTES else b""
            if len(length) < 8 or len(frame) < size or size > MAX_FRAME_BYTES:
                raise BackupError(f"{path} is cut off or damaged at its frame {number}")
            try:
                content = bson.decode(keyring.open(frame, _frame_name(backup_id, number)) if sealed else frame, CODEC)
            except (SealError, BSONError) as error:
                raise BackupError(f"{path} cannot be read at its frame {number}: {error}") from error
            digest.update(length + frame)
            number += 1
            ended = "end" in content
            yield content
        # One byte more than the digest's 32: nothing may follow it.
        if not ended or file.read(33) != digest.digest():
            raise BackupError(f"{path} is damaged: it is not what was written")


def _read_header(file: IO[bytes], path: Path) -> tuple[bool, str, bytes]:
    """Return whether the file is encrypted, its id, and the header's line."""
    line = file.readline(4096)
    try:
        header = json.loads(line)
        sealed, backup_id = bool(header["sealed"]), str(header["id"])
    except (ValueError, KeyError, TypeError) as error:
        raise BackupError(f"{path} is no backup") from error
    if header.get("format") != FORMAT:
        raise BackupError(f"{path} has another format than this version reads ({FORMAT})")
    return sealed, backup_id, line


def _frame_name(backup_id: str, number: int) -> str:
    return f"backup {backup_id} {number}"


def pages_of(items: Iterable[dict[str, Any]]) -> Iterator[list[RawBSONDocument]]:
    """Encode items, and yield together as many as fit into a frame of about FRAME_BYTES."""
    page: list[RawBSONDocument] = []
    size = 0
    for item in items:
        encoded = bson.encode(item)
        if len(encoded) > MAX_FRAME_BYTES // 4:
            raise BackupError(f"the record of user_id {item.get('user_id')!r:.100} is too large: erase it first")
        if size + len(encoded) > FRAME_BYTES and page:
            yield page
            page, size = [], 0
        page.append(RawBSONDocument(encoded))
        size += len(encoded)
    if page:
        yield page
