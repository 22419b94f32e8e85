"""Owns what a durable record is, and the one log that every record has its place in.

The log. Every record has a place `seq` = 1, 2, 3, … in one log, and every process applies the log in that order.
Two invariants make an enrolment a single atomic step between any number of processes:

- *One winner a place.* An entry is only ever added at the place after the last one that the adding process has
  applied, and `seq` is unique: whoever decided on an outdated gallery loses the insert.
- *No holes.* No entry ever leaves its place; a hole could be filled by a process that has not seen what follows it.
  So an erasure is an entry of its own, `{user_id: "erased:<uuid>", erases: <user_id>, deleted_at, seq}`, after which
  the erased record, in its old place, loses its embedding. `prepare` finishes erasures that a crash cut in two.

A record is `{user_id, embedding, timestamp, model, seq}`, with `request_key` when the client sent an idempotency key,
and with `{vector, vector_model}` where MongoDB's own vector index searches.
The older plain form `{user_id, embedding, timestamp}` is given its places by `prepare`. A record that cannot be read
keeps its place as an unreadable entry: it never runs code, never matches, and never stops the service.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeGuard

from engines.base import Template
from errors import FaceError
from store import template_bytes
from store.encryption import Keyring, MissingKeyError

log = logging.getLogger(__name__)

Document: TypeAlias = dict[str, Any]

PAGE = 2000
MAX_SEQ = 2**53
# No date can be written of a moment from here on (seconds since the epoch).
YEAR_10000 = 253402300800


class StoreNotEmptyError(ValueError):
    """A store that was to be filled, and has records in it."""


@dataclass(frozen=True, slots=True)
class Enrolment:
    """What is stored of one person.

    Args:
        user_id: a fresh UUID4.
        template: float32[d], L2-normalised.
        model: the name of the model that made the template.
        timestamp: seconds since the epoch.
        request_key: identifies the client's request, for `find_request`.
    """

    user_id: str
    template: Template
    model: str
    timestamp: float
    request_key: str | None = None


@dataclass(frozen=True, slots=True)
class Person:
    """What is known of somebody enrolled; `timestamp` (epoch seconds, before the year 10000) and `model` if any."""

    user_id: str
    timestamp: float | None
    model: str | None


@dataclass(frozen=True, slots=True)
class StoredEmbedding:
    """An embedding as it is stored, and whose."""

    seq: int
    user_id: str
    model: str | None
    embedding: bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One place in the log: an enrolment, an erasure (`erases`), or a record that is erased or unreadable.

    `template` is float32[d], L2-normalised; None unless this is an enrolment that can be searched.
    `model` is None for a record of the older plain form. `user_id` may be None when `unreadable`.
    `name` is what only this place's record is called, whatever becomes of it; for `EnrolmentLog.entries`.
    """

    seq: int
    user_id: str | None = None
    template: Template | None = None
    model: str | None = None
    erases: str | None = None
    unreadable: bool = False
    name: str = field(default="", compare=False)


class EnrolmentLog(Protocol):
    """Durable records. Every method but `describe` and `close` raises FaceError `database_unavailable`."""

    def prepare(self) -> None:
        """Create what is missing, give older records their places, finish erasures cut in two. Safe to repeat."""

    def entries(self, after: int, name: str | None = None) -> Iterator[Entry]:
        """Yield the log's entries with seq > `after`, in order; one indexed query when there are none.

        Args:
            after: the last place that the caller has applied.
            name: the `Entry.name` that it found there; None asks for no comparison.

        Raises:
            FaceError: `database_unavailable`; `not_ready` when the place has another record or none: the log is not
                the one that the caller has applied, but a backup, say, that was restored meanwhile.
        """

    def append(self, seq: int, enrolments: Sequence[Enrolment]) -> int:
        """Store enrolments durably at the places from `seq` on, the one after the last that the caller has applied.

        One round trip, however many.

        Returns:
            How many were stored, always the first ones: 0 when somebody else has the place `seq`.

        Raises:
            FaceError: `database_unavailable`; whether anything was stored, only the log will tell.
        """

    def erase(self, seq: int, user_id: str) -> bool:
        """Log at place `seq` that `user_id` is erased, then remove the embedding. False: the place is taken."""

    def finish_erasures(self, user_id: str | None = None) -> None:
        """Remove embeddings whose erasure is in the log: of one `user_id`, or of everybody."""

    def last_place(self) -> int:
        """Return the last place of the log, 0 when it is empty; FaceError `not_ready` while `fill` is not over."""

    def checkpoint(self, seq: int) -> str:
        """Return a text that only this log has up to place `seq`: how many records, and the last one's `Entry.name`."""

    def erasures(self, until: int) -> list[str]:
        """Return whom the log erases up to place `until`."""

    def find_request(self, request_key: str, since: float) -> str | None:
        """Return the user_id enrolled under `request_key` at or after `since` (epoch seconds), or None."""

    def ping(self) -> None:
        """Return if the database answers; cheap."""

    def describe(self) -> str:
        """Name the store for people, without credentials."""

    def close(self) -> None:
        """Release the connection."""


class RecordStore(EnrolmentLog, Protocol):
    """What routes and commands ask of a store, beside the log."""

    def find_person(self, user_id: str) -> Person | None:
        """Return what is stored of somebody who is enrolled, of whatever model; None for nobody, and the erased."""

    def embeddings(self, after: int) -> Iterator[StoredEmbedding]:
        """Yield every record that has an embedding and a place > `after`, in order, unread."""

    def replace_embeddings(self, changes: Sequence[tuple[StoredEmbedding, bytes]]) -> int:
        """Put other embeddings into at most a few thousand records, and take away the `vector` of each.

        Returns:
            How many: a record that is erased by now, or whose embedding is not the one that was read, stays as it is.
        """

    def forget_overwritten(self) -> None:
        """Take what was overwritten or erased out of the store's own files, as far as that is in its hands."""

    def note_seen(self, user_ids: Iterable[str], day: int) -> None:
        """Note that people were verified on a day (days since the epoch, UTC); an earlier note is replaced.

        Whoever is erased by now leaves none.
        """

    def unseen(self, since: float) -> Iterator[str]:
        """Yield who enrolled before `since` (epoch seconds) and was not noted since; nobody of unknown enrolment."""

    def newest_activity(self) -> float | None:
        """Return when somebody last enrolled or was noted (epoch seconds, to the day); None if nobody ever."""

    def documents(self, until: int) -> Iterator[Document]:
        """Yield every record up to place `until` as it is stored, in order: embeddings unread, erasures and all."""

    def notes(self) -> Iterator[tuple[str, int]]:
        """Yield what `note_seen` has noted."""

    def fill(self, documents: Iterable[Document], notes: Iterable[tuple[str, int]], *, replace: bool) -> int:
        """Write records and notes as `documents` and `notes` yield them, into an empty store; return how many records.

        Until all are written, `last_place` raises `not_ready` in whoever starts meanwhile, or after it was cut off.

        Args:
            documents: with places 1, 2, 3, ... in order.
            notes: read after the documents.
            replace: empty the store first.

        Raises:
            StoreNotEmptyError: there is a record in it.
            ValueError: two records have the same user_id, and the store cannot hold that.
        """


@contextmanager
def unavailable_on(*errors: type[Exception]) -> Iterator[None]:
    """Turn a driver's errors into the one error that clients know."""
    try:
        yield
    except errors as error:
        log.warning("The database failed: %s: %.200s", type(error).__name__, error)
        raise FaceError("database_unavailable", headers={"Retry-After": "5"}) from error


def erasure_of(user_id: str, seq: int) -> Document:
    """The record that says at a place of the log that somebody is erased."""
    # Unique like every user_id, and no UUID, so that nobody who reads the older form takes it for a person.
    return {"user_id": f"erased:{uuid.uuid4()}", "erases": user_id, "deleted_at": time.time(), "seq": seq}


def record_of(seq: int, enrolment: Enrolment, keyring: Keyring) -> Document:
    record: Document = {
        "user_id": enrolment.user_id,
        "embedding": template_bytes.encode(enrolment.template, enrolment.user_id, enrolment.model, keyring),
        "timestamp": enrolment.timestamp,
        "model": enrolment.model,
        "seq": seq,
    }
    if enrolment.request_key is not None:
        record["request_key"] = enrolment.request_key
    return record


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is a text, and not BSON's code, a kind of `str` that no dict takes as a key."""
    return type(value) is str


def text_of(value: object) -> str | None:
    return value if is_text(value) else None


def place_of(seq: object) -> int | None:
    """Return a record's place; None for what is none, such as a fraction, a truth value or a list."""
    # JSON tools write whole numbers as floats.
    return int(seq) if isinstance(seq, (int, float)) and not isinstance(seq, bool) and seq == int(seq) else None


def day_of(moment: float) -> int:
    return int(moment // 86400)


def moment_of(timestamp: object) -> float | None:
    """Return a record's timestamp; None for what is no moment that a date can be written of."""
    if isinstance(timestamp, (int, float)) and not isinstance(timestamp, bool) and 0 < timestamp < YEAR_10000:
        return float(timestamp)
    return None


def person_of(record: Document | None) -> Person | None:
    if record is None or not is_text(record.get("user_id")):
        return None
    return Person(record["user_id"], moment_of(record.get("timestamp")), text_of(record.get("model")))


def read_embeddings(page: Callable[[int], Sequence[Document]], after: int) -> Iterator[StoredEmbedding]:
    while records := page(after):
        for record in records:
            place, user_id, embedding = place_of(record["seq"]), record.get("user_id"), record.get("embedding")
            if place is not None and is_text(user_id) and isinstance(embedding, bytes):
                yield StoredEmbedding(place, user_id, text_of(record.get("model")), embedding)
        places = [place for place in (place_of(record["seq"]) for record in records) if place is not None]
        if not places:
            return
        after = places[-1]


def read_log(
    page: Callable[[int], Sequence[Document]], after: int, name: str | None, keyring: Keyring
) -> Iterator[Entry]:
    # In the same query as what follows, so that nothing can be exchanged between the two.
    at = after if name is None else after - 1
    while True:
        records = page(at)
        before = at
        for record in records:
            place = place_of(record["seq"])
            if place is None:
                log.warning("A record with the place %.100r is left out.", record["seq"])
                continue
            if name is not None and (place, str(record.get("user_id"))) != (after, name):
                break
            if name is None:
                yield entry_of(record, place, keyring)
            name = None
            at = place
        if name is not None:
            log.critical(
                "The log's place %d has another record than before, or none: a backup was restored, or records were "
                "taken out by hand. Nothing is decided until this process is started again.",
                after,
            )
            raise FaceError("not_ready", headers={"Retry-After": "60"})
        if len(records) < PAGE or at == before:
            return


def entry_of(record: Document, seq: int, keyring: Keyring) -> Entry:
    name = str(record.get("user_id"))
    erases, user_id, model = record.get("erases"), record.get("user_id"), record.get("model")
    if is_text(erases):
        return Entry(seq, erases=erases, name=name)
    if record.get("embedding") is None and record.get("deleted_at") is not None:
        return Entry(seq, name=name)
    reason = "its user_id or model is no text"
    if is_text(user_id) and (model is None or is_text(model)):
        try:
            template = template_bytes.decode(record.get("embedding"), user_id, model, keyring)
            return Entry(seq, user_id, template, model, name=name)
        except MissingKeyError as error:
            # Whether somebody is enrolled already could not be decided any more: nothing is, until the key is here.
            log.critical(
                "The record of user_id %.100r cannot be opened, so nothing is decided: %s. Give that key; "
                "docs/operating.md says what to do if it is lost for ever.",
                user_id,
                error,
            )
            raise FaceError("not_ready", headers={"Retry-After": "60"}) from error
        except ValueError as error:
            reason = str(error)
    # `r`: a line break in the user_id must not forge a line of the log.
    log.warning("The record of user_id %.100r (seq %d) is unreadable and left out: %s.", user_id, seq, reason)
    return Entry(seq, text_of(user_id), unreadable=True, name=name)
