"""Keeps the records in one SQLite file; no other file imports `sqlite3`."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from store.documents import (
    PAGE_RECORDS,
    YEAR_10000_S,
    day_of,
    erasure_of,
    find_in,
    is_text,
    person_of,
    read_embeddings,
    read_log,
    record_of,
    request_keys_of,
)
from store.encryption import NO_KEYS, Keyring
from store.records import Document, Enrolment, Entry, Person, StoredEmbedding, StoreNotEmptyError, unavailable_on

log = logging.getLogger(__name__)

BUSY_SECONDS = 5.0
_COLUMNS = ("seq", "user_id", "embedding", "timestamp", "model", "request_key", "erases", "deleted_at")


class SqliteStore:
    """`EnrolmentLog` on one SQLite file (mode 0600), for any number of threads and processes of one machine."""

    _SCHEMA = (
        # Readers and the writer do not block each other, and each commit is on the disk before it is acknowledged.
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = FULL",
        # An erased template is overwritten, not merely unlinked from its page.
        "PRAGMA secure_delete = ON",
        """CREATE TABLE IF NOT EXISTS faces (
            seq INTEGER PRIMARY KEY, user_id TEXT NOT NULL UNIQUE, embedding BLOB, timestamp REAL, model TEXT,
            request_key TEXT, erases TEXT, deleted_at REAL)""",
        "CREATE INDEX IF NOT EXISTS faces_request_key ON faces (request_key) WHERE request_key IS NOT NULL",
        "CREATE INDEX IF NOT EXISTS faces_erases ON faces (erases) WHERE erases > ''",
        "CREATE TABLE IF NOT EXISTS seen (user_id TEXT PRIMARY KEY, day INTEGER NOT NULL) WITHOUT ROWID",
    )

    def __init__(self, path: Path, keyring: Keyring = NO_KEYS) -> None:
        self._path = path
        self._keyring = keyring
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def prepare(self) -> None:
        with unavailable_on(sqlite3.Error, OSError), self._lock:
            if self._connection is not None:
                return
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Before SQLite opens it: its -wal and -shm files take over this file's mode.
            self._path.touch(mode=0o600)
            self._path.chmod(0o600)
            connection = sqlite3.connect(
                self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            # One text that is not UTF-8 must not make a whole page of records unreadable.
            connection.text_factory = lambda text: text.decode(errors="replace")
            try:
                self._create(connection)
            except sqlite3.Error:
                connection.close()
                raise
            self._connection = connection
        self.forget_overwritten()  # a killed process may have left its log uncut

    def _create(self, connection: sqlite3.Connection) -> None:
        deadline = time.monotonic() + BUSY_SECONDS
        for statement in self._SCHEMA:
            while True:
                try:
                    connection.execute(statement)
                    break
                except sqlite3.OperationalError as error:
                    # SQLite itself does not wait while another process changes the file to WAL.
                    if "locked" not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        """Give the connection to one thread for one transaction, rolled back if anything is raised."""
        with unavailable_on(sqlite3.Error), self._lock:
            if self._connection is None:
                raise sqlite3.OperationalError("the file is not open")
            with self._connection:
                self._connection.execute(begin)
                yield self._connection

    def _query(self, sql: str, *values: object) -> list[Document]:
        with self._transaction("BEGIN") as connection, closing(connection.execute(sql, values)) as rows:
            names = [column[0] for column in rows.description]
            return [dict(zip(names, row, strict=True)) for row in rows]

    def entries(self, after: int, name: str | None = None) -> Iterator[Entry]:
        return read_log(self._page, after, name, self._keyring)

    def _page(self, after: int) -> list[Document]:
        return self._query(
            "SELECT user_id, embedding, model, seq, erases, deleted_at FROM faces WHERE seq > ? ORDER BY seq LIMIT ?",
            after,
            PAGE_RECORDS,
        )

    def append(self, seq: int, enrolments: Sequence[Enrolment]) -> int:
        with self._transaction("BEGIN IMMEDIATE") as connection:
            # No other process writes during this transaction: all of the places are free, or the first is taken.
            if not self._is_next(connection, seq):
                return 0
            connection.executemany(
                "INSERT INTO faces (seq, user_id, embedding, timestamp, model, request_key)"
                " VALUES (:seq, :user_id, :embedding, :timestamp, :model, :request_key)",
                [
                    {"request_key": None, **record_of(at, enrolment, self._keyring)}
                    for at, enrolment in enumerate(enrolments, seq)
                ],
            )
        return len(enrolments)

    @staticmethod
    def _is_next(connection: sqlite3.Connection, seq: int) -> bool:
        """Whether the log ends right before this place; after a backup was restored, it may end earlier."""
        return bool(connection.execute("SELECT COALESCE(MAX(seq), 0) = ? FROM faces", (seq - 1,)).fetchone()[0])

    def erase(self, seq: int, user_id: str) -> bool:
        with self._transaction("BEGIN IMMEDIATE") as connection:
            if not self._is_next(connection, seq):
                return False
            connection.execute(
                "INSERT INTO faces (seq, user_id, erases, deleted_at) VALUES (:seq, :user_id, :erases, :deleted_at)",
                erasure_of(user_id, seq),
            )
            connection.execute(
                "UPDATE faces SET embedding = NULL, request_key = NULL, deleted_at = ? WHERE user_id = ?",
                (time.time(), user_id),
            )
            connection.execute("DELETE FROM seen WHERE user_id = ?", (user_id,))
        self.forget_overwritten()
        return True

    def finish_erasures(self, user_id: str | None = None) -> None:
        """Do nothing: `erase` is one transaction here."""

    def last_place(self) -> int:
        return int(self._query("SELECT COALESCE(MAX(seq), 0) AS last FROM faces")[0]["last"])

    def checkpoint(self, seq: int) -> str:
        # Counted in the index of user_ids, since the table itself holds all the templates.
        counted = self._query("SELECT COUNT(*) AS n FROM faces INDEXED BY sqlite_autoindex_faces_1 WHERE seq <= ?", seq)
        last = self._query("SELECT user_id FROM faces WHERE seq = ?", seq)
        return f"{counted[0]['n']} {last[0]['user_id'] if last else None}"

    def erasures(self, until: int) -> list[str]:
        return [
            record["erases"] for record in self._query("SELECT erases FROM faces WHERE erases > '' AND seq <= ?", until)
        ]

    def find_request(self, request_key: str, since: float) -> str | None:
        sql = "SELECT user_id, request_key FROM faces WHERE request_key >= ? AND request_key < ? AND timestamp >= ?"
        return find_in(self._query(sql, *request_keys_of(request_key), since), request_key)

    def find_person(self, user_id: str) -> Person | None:
        sql = "SELECT user_id, timestamp, model FROM faces WHERE user_id = ? AND embedding IS NOT NULL"
        return next((person_of(record) for record in self._query(sql, user_id)), None)

    def embeddings(self, after: int) -> Iterator[StoredEmbedding]:
        return read_embeddings(self._page, after)

    def replace_embeddings(self, changes: Sequence[tuple[StoredEmbedding, bytes]]) -> int:
        sql = "UPDATE faces SET embedding = ? WHERE seq = ? AND user_id = ? AND embedding = ?"
        values = [(embedding, stored.seq, stored.user_id, stored.embedding) for stored, embedding in changes]
        with self._transaction("BEGIN IMMEDIATE") as connection:
            done = connection.executemany(sql, values)
        return max(done.rowcount, 0)

    def forget_overwritten(self) -> None:
        with unavailable_on(sqlite3.Error), self._lock:
            if self._connection is None:
                raise sqlite3.OperationalError("the file is not open")
            # `secure_delete` clears the pages, but the write-ahead log keeps their old content until it is truncated.
            try:
                busy, *_ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            except sqlite3.OperationalError:  # the disk is full; verifying and backing up still work
                busy = True
        if busy:
            log.warning(
                "%s-wal cannot be truncated: it holds erased templates until the next start or erasure.", self._path
            )

    def note_seen(self, user_ids: Iterable[str], day: int) -> None:
        # A person who was erased since then leaves no note.
        sql = "REPLACE INTO seen SELECT user_id, ? FROM faces WHERE user_id = ? AND embedding IS NOT NULL"
        with self._transaction("BEGIN IMMEDIATE") as connection:
            connection.executemany(sql, [(day, user_id) for user_id in user_ids])

    def unseen(self, since: float) -> Iterator[str]:
        sql = (
            "SELECT seq, user_id FROM faces LEFT JOIN seen USING (user_id) WHERE seq > ? AND embedding IS NOT NULL"
            " AND timestamp < ? AND COALESCE(day, 0) < ? ORDER BY seq LIMIT ?"
        )
        after = 0
        while records := self._query(sql, after, since, day_of(since), PAGE_RECORDS):
            yield from (record["user_id"] for record in records)
            after = records[-1]["seq"]

    def newest_activity(self) -> float | None:
        # SQLite sorts every text behind every number.
        enrolled = "SELECT timestamp FROM faces WHERE timestamp > 0 AND timestamp < ? ORDER BY seq DESC LIMIT 1"
        noted = "SELECT 86400.0 * day AS timestamp FROM seen WHERE day > 0 AND day < ? ORDER BY day DESC LIMIT 1"
        moments = self._query(enrolled, YEAR_10000_S) + self._query(noted, day_of(YEAR_10000_S))
        return max((moment["timestamp"] for moment in moments), default=None)

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
        sql = f"INSERT INTO faces ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608 - ours
        with self._transaction("BEGIN IMMEDIATE") as connection:
            if replace:
                connection.execute("DELETE FROM faces")
                connection.execute("DELETE FROM seen")
            elif connection.execute("SELECT 1 FROM faces").fetchone():
                raise StoreNotEmptyError("the store is not empty")
            try:
                written = connection.executemany(sql, map(_row, documents)).rowcount
            except sqlite3.IntegrityError as error:
                raise ValueError("two records have the same place or user_id, which SQLite cannot hold") from error
            connection.executemany("REPLACE INTO seen VALUES (?, ?)", notes)
        if replace:
            self.forget_overwritten()
        return written

    def ping(self) -> None:
        self._query("SELECT seq FROM faces LIMIT 1")

    def describe(self) -> str:
        return f"SQLite file {self._path}"

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


def _row(document: Document) -> list[object]:
    """Return the values of _COLUMNS, from a record of a database in which a field can hold anything."""
    if not is_text(document.get("user_id")):
        # Such a record is unreadable, and must stay so.
        document = {"seq": document["seq"], "user_id": f"unreadable:{document['seq']}"}
    values = (document.get(column) for column in _COLUMNS)
    return [value if isinstance(value, (str, bytes, float)) or _is_64_bit(value) else None for value in values]


def _is_64_bit(value: object) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63
