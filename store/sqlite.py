"""Keeps the records in one SQLite file; no other file imports `sqlite3`."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from errors import FaceError
from store.challenges import MAX_KEPT, Challenge, in_time, is_fresh, over
from store.documents import (
    MAX_SEQ,
    PAGE_RECORDS,
    YEAR_10000_S,
    day_of,
    erasure_of,
    find_in,
    is_text,
    name_of,
    person_of,
    read_embeddings,
    read_log,
    record_of,
    removal_of,
    request_keys_of,
    require_place,
)
from store.encryption import NO_KEYS, Keyring
from store.records import Document, Enrolment, Entry, Person, StoredEmbedding, StoreNotEmptyError, unavailable_on

log = logging.getLogger(__name__)

BUSY_SECONDS = 5.0
_LAST_PLACE = "SELECT COALESCE((SELECT seq FROM faces WHERE seq > 0 AND seq < ? ORDER BY seq DESC LIMIT 1), 0) AS last"
# name -> type.
_COLUMNS = {
    "seq": "INTEGER PRIMARY KEY",
    "user_id": "TEXT NOT NULL",
    "embedding": "BLOB",
    "timestamp": "REAL",
    "model": "TEXT",
    "request_key": "TEXT",
    "erases": "TEXT",
    "deleted_at": "REAL",
    "photo_id": "TEXT",
    "removes": "INTEGER",
    "quality": "REAL",
}
_INSERT = f"INSERT INTO faces ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608 - our own
_CREATE_FACES = f"CREATE TABLE IF NOT EXISTS faces ({', '.join(f'{name} {kind}' for name, kind in _COLUMNS.items())})"


@dataclass
class _Lane:
    """A connection that is lent to one thread at a time; None while the file is not open."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    connection: sqlite3.Connection | None = None


class SqliteStore:
    """`EnrolmentLog` on one SQLite file (mode 0600), for any number of threads and processes of one machine.

    Every method that reads or writes also raises FaceError `not_ready` once the file was removed or replaced.
    """

    _SCHEMA = (
        # Readers and the writer do not block each other, and each commit is on the disk before it is acknowledged.
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = FULL",
        # An erased template is overwritten, not merely unlinked from its page.
        "PRAGMA secure_delete = ON",
        _CREATE_FACES,
    )
    _INDICES = (
        "CREATE INDEX IF NOT EXISTS faces_user_id ON faces (user_id)",
        "CREATE INDEX IF NOT EXISTS faces_request_key ON faces (request_key) WHERE request_key IS NOT NULL",
        "CREATE INDEX IF NOT EXISTS faces_erases ON faces (erases) WHERE erases > ''",
        "CREATE INDEX IF NOT EXISTS faces_removes ON faces (removes) WHERE removes > 0",
        "CREATE TABLE IF NOT EXISTS seen (user_id TEXT PRIMARY KEY, day INTEGER NOT NULL) WITHOUT ROWID",
        """CREATE TABLE IF NOT EXISTS challenges (
            challenge_id TEXT PRIMARY KEY, owner TEXT NOT NULL, steps TEXT NOT NULL, issued_at REAL NOT NULL,
            used INTEGER NOT NULL) WITHOUT ROWID""",  # when it was used, in seconds since the epoch; 0: not yet
        "CREATE INDEX IF NOT EXISTS challenges_age ON challenges (issued_at)",
        "CREATE INDEX IF NOT EXISTS challenges_owner ON challenges (owner, issued_at)",
    )

    def __init__(self, path: Path, keyring: Keyring = NO_KEYS) -> None:
        self._path = path
        self._keyring = keyring
        # Two connections, so that reading goes on while a writer waits for another process' write lock.
        self._reader, self._writer = _Lane(), _Lane()
        # Device and inode of the open files.
        self._opened: list[tuple[int, int] | None] = []

    def prepare(self) -> None:
        with unavailable_on(sqlite3.Error, OSError), self._reader.lock, self._writer.lock:
            if self._writer.connection is not None:
                return
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Before SQLite opens it: its -wal and -shm files take over this file's mode.
            self._path.touch(mode=0o600)
            self._path.chmod(0o600)
            writer = self._connect()
            try:
                self._execute(writer, self._SCHEMA)
                self._allow_several_photos(writer)
                self._add_quality(writer)
                self._execute(writer, self._INDICES)
                self._number_strays(writer)
                self._reader.connection = self._connect()
            except sqlite3.Error:
                writer.close()
                raise
            self._writer.connection = writer
            self._opened = self._files()
        self.forget_overwritten()  # a killed process may have left its log uncut

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        # One text that is not UTF-8 must not make a whole page of records unreadable.
        connection.text_factory = lambda text: text.decode(errors="replace")
        return connection

    @staticmethod
    def _execute(connection: sqlite3.Connection, statements: Iterable[str]) -> None:
        deadline = time.monotonic() + BUSY_SECONDS
        for statement in statements:
            while True:
                try:
                    connection.execute(statement)
                    break
                except sqlite3.OperationalError as error:
                    # SQLite itself does not wait while another process changes the file to WAL.
                    if "locked" not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)

    @staticmethod
    def _allow_several_photos(connection: sqlite3.Connection) -> None:
        """Copy a table of the older form, in which a user_id is unique, into one of today's form."""

        def is_older() -> bool:
            return "photo_id" not in {column[1] for column in connection.execute("PRAGMA table_info(faces)")}

        if not is_older():
            return
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            if not is_older():
                return  # another process has done it meanwhile
            log.info("Changing the SQLite file, so that a person can have several photos; this copies every record.")
            older = ", ".join(column[1] for column in connection.execute("PRAGMA table_info(faces)"))
            connection.execute("ALTER TABLE faces RENAME TO faces_older")
            connection.execute(_CREATE_FACES)
            connection.execute(f"INSERT INTO faces ({older}) SELECT {older} FROM faces_older")  # noqa: S608 - our own
            connection.execute("DROP TABLE faces_older")

    @staticmethod
    def _add_quality(connection: sqlite3.Connection) -> None:
        """Give a table of the version before the column `quality`; no record is touched."""
        with connection:
            connection.execute("BEGIN IMMEDIATE")  # one process does it, and the others see that it is done
            if "quality" not in {column[1] for column in connection.execute("PRAGMA table_info(faces)")}:
                connection.execute("ALTER TABLE faces ADD COLUMN quality REAL")

    def _number_strays(self, connection: sqlite3.Connection) -> None:
        """Give the records at impossible places, which another program wrote, the places behind the last one."""
        strays = "SELECT seq FROM faces WHERE seq < 1 OR seq >= ? ORDER BY seq"
        if connection.execute(strays, (MAX_SEQ,)).fetchone() is None:
            return
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            places = [place for (place,) in connection.execute(strays, (MAX_SEQ,))]
            log.warning("Giving places in the log to %d records that stood at impossible ones.", len(places))
            (last,) = connection.execute(_LAST_PLACE, (MAX_SEQ,)).fetchone()
            connection.executemany("UPDATE faces SET seq = ? WHERE seq = ?", enumerate(places, last + 1))

    def _files(self) -> list[tuple[int, int] | None]:
        """Return the device and inode of the file and of its write-ahead log, None for a file that is not there."""
        return [_identity(self._path), _identity(self._path.with_name(f"{self._path.name}-wal"))]

    def _require_same_files(self) -> None:
        """Raise `not_ready` if others were put in the files' place: the open ones are gone with the last process."""
        if self._files() != self._opened:
            log.critical(
                "%s or its -wal file was removed or replaced while the service runs, so nothing is decided. Put the "
                "file back or restore a backup, and start the service again.",
                self._path,
            )
            raise FaceError("not_ready", headers={"Retry-After": "60"})

    @contextmanager
    def _borrowed(self, lane: _Lane) -> Iterator[sqlite3.Connection]:
        """Give a connection to one thread, while its files are the ones that were opened."""
        with unavailable_on(sqlite3.Error), lane.lock:
            if lane.connection is None:
                raise sqlite3.OperationalError("the file is not open")
            self._require_same_files()
            yield lane.connection
            # What was written to files that are gone by now must not be acknowledged.
            self._require_same_files()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Give the writing connection to one thread for one transaction, rolled back if anything is raised."""
        with self._borrowed(self._writer) as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection

    def _query(self, sql: str, *values: object) -> list[Document]:
        with self._borrowed(self._reader) as connection, closing(connection.execute(sql, values)) as rows:
            names = [column[0] for column in rows.description]
            return [dict(zip(names, row, strict=True)) for row in rows]

    def entries(self, after: int, name: str | None = None) -> Iterator[Entry]:
        return read_log(self._page, after, name, self._keyring)

    def _page(self, after: int) -> list[Document]:
        return self._query(
            "SELECT user_id, embedding, model, seq, erases, deleted_at, photo_id, removes FROM faces"
            " WHERE seq > ? AND seq < ? ORDER BY seq LIMIT ?",
            after,
            MAX_SEQ,
            PAGE_RECORDS,
        )

    def append(self, seq: int, enrolments: Sequence[Enrolment]) -> int:
        with self._writing() as connection:
            # No other process writes during this transaction: all of the places are free, or the first is taken.
            if not self._is_next(connection, seq):
                return 0
            records = [record_of(at, enrolment, self._keyring) for at, enrolment in enumerate(enrolments, seq)]
            connection.executemany(_INSERT, map(_row, records))
            removed = [enrolment.removes for enrolment in enrolments if enrolment.removes is not None]
            self._wipe(connection, "seq", removed)
        if removed:
            self.forget_overwritten()
        return len(enrolments)

    @staticmethod
    def _wipe(connection: sqlite3.Connection, column: Literal["seq", "user_id"], values: Iterable[object]) -> None:
        connection.executemany(
            f"UPDATE faces SET embedding = NULL, request_key = NULL, quality = NULL, deleted_at = ?"  # noqa: S608
            f" WHERE {column} = ?",
            [(time.time(), value) for value in values],
        )

    @staticmethod
    def _is_next(connection: sqlite3.Connection, seq: int) -> bool:
        """Whether the log ends right before this place; after a backup was restored, it may end earlier."""
        require_place(seq)
        return bool(connection.execute(_LAST_PLACE, (MAX_SEQ,)).fetchone()[0] == seq - 1)

    def erase(self, seq: int, user_id: str) -> bool:
        with self._writing() as connection:
            if not self._is_next(connection, seq):
                return False
            connection.execute(_INSERT, _row(erasure_of(user_id, seq)))
            self._wipe(connection, "user_id", [user_id])
            connection.execute("DELETE FROM seen WHERE user_id = ?", (user_id,))
        self.forget_overwritten()
        return True

    def remove_photo(self, seq: int, place: int) -> bool:
        with self._writing() as connection:
            if not self._is_next(connection, seq):
                return False
            connection.execute(_INSERT, _row(removal_of(place, seq)))
            self._wipe(connection, "seq", [place])
        self.forget_overwritten()
        return True

    def finish_erasures(self, user_id: str | None = None, place: int | None = None) -> None:
        """Do nothing: an erasure or a removal is one transaction here."""

    def last_place(self) -> int:
        return int(self._query(_LAST_PLACE, MAX_SEQ)[0]["last"])

    def checkpoint(self, seq: int) -> str:
        # Counted in the index of user_ids, since the table itself holds all the templates.
        counted = self._query("SELECT COUNT(*) AS n FROM faces INDEXED BY faces_user_id WHERE seq <= ?", seq)
        last = self._query("SELECT user_id, photo_id FROM faces WHERE seq = ?", seq)
        return f"{counted[0]['n']} {name_of(last[0]) if last else None}"

    def erasures(self, until: int) -> list[str]:
        return [
            record["erases"] for record in self._query("SELECT erases FROM faces WHERE erases > '' AND seq <= ?", until)
        ]

    def removals(self, until: int) -> list[int]:
        return [
            record["removes"]
            for record in self._query("SELECT removes FROM faces WHERE removes > 0 AND seq <= ?", until)
        ]

    def find_request(self, request_key: str, since: float) -> str | None:
        sql = "SELECT user_id, request_key FROM faces WHERE request_key >= ? AND request_key < ? AND timestamp >= ?"
        return find_in(self._query(sql, *request_keys_of(request_key), since), request_key)

    def find_person(self, user_id: str) -> Person | None:
        return person_of(user_id, self._query("SELECT * FROM faces WHERE user_id = ? ORDER BY seq", user_id))

    def embeddings(self, after: int) -> Iterator[StoredEmbedding]:
        return read_embeddings(self._page, after)

    def replace_embeddings(self, changes: Sequence[tuple[StoredEmbedding, bytes]]) -> int:
        sql = "UPDATE faces SET embedding = ? WHERE seq = ? AND user_id = ? AND embedding = ?"
        values = [(embedding, stored.seq, stored.user_id, stored.embedding) for stored, embedding in changes]
        with self._writing() as connection:
            done = connection.executemany(sql, values)
        return max(done.rowcount, 0)

    def forget_overwritten(self) -> None:
        with self._borrowed(self._writer) as connection:
            # `secure_delete` clears the pages, but the write-ahead log keeps their old content until it is truncated.
            try:
                busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            except sqlite3.OperationalError:  # the disk is full; verifying and backing up still work
                busy = True
        if busy:
            log.warning(
                "%s-wal cannot be truncated: it holds erased templates until the next start or erasure.", self._path
            )

    def note_seen(self, user_ids: Iterable[str], day: int) -> None:
        # A person who was erased since then leaves no note.
        sql = "REPLACE INTO seen SELECT user_id, ? FROM faces WHERE user_id = ? AND embedding IS NOT NULL LIMIT 1"
        with self._writing() as connection:
            connection.executemany(sql, [(day, user_id) for user_id in user_ids])

    def unseen(self, since: float) -> Iterator[str]:
        sql = (
            "SELECT seq, user_id FROM faces LEFT JOIN seen USING (user_id) WHERE seq > ? AND embedding IS NOT NULL"
            " AND timestamp < ? AND COALESCE(day, 0) < ? AND NOT EXISTS (SELECT 1 FROM faces AS other"
            " WHERE other.user_id = faces.user_id AND other.embedding IS NOT NULL"
            # Each person once, and nobody who was given a photo since, which is a verification.
            " AND (other.seq < faces.seq OR COALESCE(other.timestamp, ?) >= ?)) ORDER BY seq LIMIT ?"
        )
        after = 0
        while records := self._query(sql, after, since, day_of(since), since, since, PAGE_RECORDS):
            yield from (record["user_id"] for record in records)
            after = records[-1]["seq"]

    def newest_activity(self) -> float | None:
        # SQLite sorts every text behind every number.
        enrolled = "SELECT timestamp FROM faces WHERE timestamp > 0 AND timestamp < ? ORDER BY seq DESC LIMIT 1"
        noted = "SELECT 86400.0 * day AS timestamp FROM seen WHERE day > 0 AND day < ? ORDER BY day DESC LIMIT 1"
        moments = self._query(enrolled, YEAR_10000_S) + self._query(noted, day_of(YEAR_10000_S))
        return max((moment["timestamp"] for moment in moments), default=None)

    def add_challenge(self, challenge: Challenge) -> None:
        with self._writing() as connection:
            connection.execute("DELETE FROM challenges WHERE issued_at < ? OR issued_at > ?", over(time.time()))
            connection.execute(
                "DELETE FROM challenges WHERE challenge_id IN (SELECT challenge_id FROM challenges WHERE owner = ?"
                " ORDER BY issued_at DESC LIMIT -1 OFFSET ?)",
                (challenge.owner, MAX_KEPT - 1),
            )
            connection.execute(
                "INSERT INTO challenges VALUES (?, ?, ?, ?, 0)",
                (challenge.challenge_id, challenge.owner, " ".join(challenge.steps), challenge.issued_at),
            )

    def use_challenge(self, challenge_id: str, owner: str) -> Challenge:
        with self._writing() as connection:
            now = time.time()
            first, last = in_time(now)
            row = connection.execute(
                "SELECT steps, issued_at, used FROM challenges WHERE challenge_id = ? AND owner = ?",
                (challenge_id, owner),
            ).fetchone()
            if row is None or not (row[2] or first <= row[1] <= last):
                raise FaceError("challenge_expired")
            if row[2]:
                raise FaceError("challenge_used")
            connection.execute("UPDATE challenges SET used = ? WHERE challenge_id = ?", (now, challenge_id))
        return Challenge(challenge_id, owner, tuple(row[0].split()), row[1])

    def is_in_use(self, challenge_id: str, owner: str) -> bool:
        rows = self._query("SELECT used FROM challenges WHERE challenge_id = ? AND owner = ?", challenge_id, owner)
        return any(is_fresh(row["used"], time.time()) for row in rows)

    def give_back(self, challenge_id: str, owner: str) -> None:
        with self._writing() as connection:
            connection.execute(
                "UPDATE challenges SET used = 0 WHERE challenge_id = ? AND owner = ?", (challenge_id, owner)
            )

    def documents(self, until: int) -> Iterator[Document]:
        after = 0
        while records := self._query(
            "SELECT * FROM faces WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT 500", after, until
        ):
            yield from ({key: value for key, value in record.items() if value is not None} for record in records)
            after = records[-1]["seq"]

    def notes(self) -> Iterator[tuple[str, int]]:
        after = ""
        sql = (
            "SELECT * FROM seen WHERE user_id > ? AND typeof(user_id) = 'text' AND day > 0 AND typeof(day) = 'integer'"
            " ORDER BY user_id LIMIT 5000"
        )
        while notes := self._query(sql, after):
            yield from ((note["user_id"], note["day"]) for note in notes)
            after = notes[-1]["user_id"]

    def fill(self, documents: Iterable[Document], notes: Iterable[tuple[str, int]], *, replace: bool) -> int:
        with self._writing() as connection:
            if replace:
                connection.execute("DELETE FROM faces")
                connection.execute("DELETE FROM seen")
            elif connection.execute("SELECT 1 FROM faces").fetchone():
                raise StoreNotEmptyError("the store is not empty")
            try:
                written = connection.executemany(_INSERT, map(_row, documents)).rowcount
            except sqlite3.IntegrityError as error:
                raise ValueError("two records have the same place") from error
            connection.executemany("REPLACE INTO seen VALUES (?, ?)", notes)
        if replace:
            self.forget_overwritten()
        return written

    def ping(self) -> None:
        self._query("SELECT seq FROM faces LIMIT 1")

    def describe(self) -> str:
        return f"SQLite file {self._path}"

    def close(self) -> None:
        for lane in (self._reader, self._writer):
            with lane.lock:
                if lane.connection is not None:
                    lane.connection.close()
                    lane.connection = None


def _row(document: Document) -> list[object]:
    """Return the values of _COLUMNS, from a record of a database in which a field can hold anything."""
    if not is_text(document.get("user_id")):
        # Such a record is unreadable, and must stay so.
        document = {"seq": document["seq"], "user_id": f"unreadable:{document['seq']}"}
    values = (document.get(column) for column in _COLUMNS)
    return [value if isinstance(value, (str, bytes, float)) or _is_64_bit(value) else None for value in values]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _is_64_bit(value: object) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63
