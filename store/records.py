"""What a durable record is, and what every store promises.

The log. Every record has a place `seq` = 1, 2, 3, … in one log, and every process applies the log in that order.
Two rules make an enrolment a single atomic step between any number of processes:

- *One winner a place.* An entry is only ever added at the place after the last one that the adding process has
  applied, and `seq` is unique. A process that decided on an outdated gallery loses the insert.
- *No holes.* No entry ever leaves its place; a hole could be filled by a process that has not seen what follows it.
  So an erasure is an entry of its own, `{user_id: "erased:<uuid>", erases: <user_id>, deleted_at, seq}`, after which
  the erased record, in its old place, loses its embedding. `prepare` finishes erasures that a crash cut in two.

A record is `{user_id, embedding, timestamp, model, seq}`, with `request_key` when the client sent an idempotency key,
with the photo's `quality` where it is known, and with `{vector, vector_model}` where MongoDB's own vector index
searches. A person may have several records, one for each photo. A photo that was added later carries a `photo_id`,
since its user_id does not name this record alone.

A photo is removed as a person is erased: an entry of its own, `{user_id: "removed:<uuid>", removes: <place>,
deleted_at, seq}`, after which the record at that place loses its embedding. An added photo that takes the place of
another one carries `removes` itself, so that this is one entry, too.

`prepare` gives the older plain form `{user_id, embedding, timestamp}` its places. A record that cannot be read keeps
its place as an unreadable entry: it never runs code, never matches, and never stops the service.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from engines.base import Template
from errors import FaceError
from store.challenges import ChallengeStore

log = logging.getLogger(__name__)

Document: TypeAlias = dict[str, Any]


class StoreNotEmptyError(ValueError):
    """`fill` was asked to fill a store that has records in it."""


@dataclass(frozen=True, slots=True)
class Enrolment:
    """What is stored of one photo of a person.

    Args:
        user_id: a fresh UUID4, or that of the person to whom the photo is added.
        template: float32[d], L2-normalised.
        model: the name of the model that made the template.
        timestamp: seconds since the epoch.
        request_key: the hash of the client's Idempotency-Key, for `find_request`.
        photo_id: a fresh UUID4 for a photo that is added to a person; None for the first one.
        removes: the place of the photo whose place this one takes, if any.
        quality: the photo's quality, 0...1; None if it is not known.
    """

    user_id: str
    template: Template
    model: str
    timestamp: float
    request_key: str | None = None
    photo_id: str | None = None
    removes: int | None = None
    quality: float | None = None


@dataclass(frozen=True, slots=True)
class StoredPhoto:
    """One photo of a person, as far as it is stored.

    Attributes:
        number: 1, 2, 3, … in the order of the log; a removed photo's number is never given again.
        seq: its place in the log.
        timestamp: seconds since the epoch, before the year 10000; None if not known.
        model: the model that made the template; None if not known.
        quality: 0...1; None if not known, as for the records of earlier versions.
    """

    number: int
    seq: int
    timestamp: float | None
    model: str | None
    quality: float | None = None


@dataclass(frozen=True, slots=True)
class Person:
    """An enrolled person, with the photos that are not removed, the oldest first; at least one."""

    user_id: str
    photos: tuple[StoredPhoto, ...]

    @property
    def timestamp(self) -> float | None:
        """When the oldest of the photos was enrolled, in seconds since the epoch; None if not known."""
        return self.photos[0].timestamp

    @property
    def model(self) -> str | None:
        """The model that made the oldest template; None if not known."""
        return self.photos[0].model


@dataclass(frozen=True, slots=True)
class StoredEmbedding:
    """An embedding as it is stored, unread, with its place and its person."""

    seq: int
    user_id: str
    model: str | None
    embedding: bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One place in the log: a photo, an erasure (`erases`), a removal (`removes`), or an erased or unreadable record.

    Attributes:
        seq: the place.
        user_id: the person; may be None when `unreadable`.
        template: float32[d], L2-normalised; None unless this is a photo that can be searched.
        model: the model that made the template; None for a record of the older plain form.
        erases: the user_id that this entry erases.
        removes: the place of the photo that this entry removes; this entry may itself be the photo that follows it.
        is_added: whether this photo was added to a person who was enrolled before.
        unreadable: whether the record could not be read.
        name: identifies this place's record, and no other, even after it is erased; for `EnrolmentLog.entries`.
    """

    seq: int
    user_id: str | None = None
    template: Template | None = None
    model: str | None = None
    erases: str | None = None
    removes: int | None = None
    is_added: bool = False
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
            name: the `Entry.name` that the caller found there; None asks for no comparison.

        Raises:
            FaceError: `database_unavailable`; `not_ready` when that place has another record now, or none. Then the
                log is not the one that the caller has applied: perhaps a backup was restored meanwhile.
        """

    def append(self, seq: int, enrolments: Sequence[Enrolment]) -> int:
        """Store enrolments durably at the places from `seq` on, the one after the last that the caller has applied.

        One round trip, however many.

        Returns:
            How many were stored, always the first ones: 0 when another process has taken the place `seq`.

        Raises:
            FaceError: `database_unavailable`. Only the log tells then whether anything was stored.
        """

    def erase(self, seq: int, user_id: str) -> bool:
        """Log at place `seq` that `user_id` is erased, then remove the embeddings. False: the place is taken."""

    def remove_photo(self, seq: int, place: int) -> bool:
        """Log at place `seq` that the photo at `place` is removed, then do it. False: the place `seq` is taken."""

    def finish_erasures(self, user_id: str | None = None, place: int | None = None) -> None:
        """Remove embeddings whose erasure or removal is in the log: of one `user_id`, at one `place`, or all."""

    def last_place(self) -> int:
        """Return the last place of the log, 0 when it is empty; FaceError `not_ready` while `fill` is not finished."""

    def checkpoint(self, seq: int) -> str:
        """Return a text that only this log has up to place `seq`: how many records, and the last one's `Entry.name`."""

    def erasures(self, until: int) -> list[str]:
        """Return the user_ids that the log erases up to place `until`."""

    def removals(self, until: int) -> list[int]:
        """Return the places of the photos that the log removes up to place `until`."""

    def find_request(self, request_key: str, since: float) -> str | None:
        """Return the user_id enrolled under `request_key` at or after `since` (epoch seconds), or None.

        What follows a full stop in the key is a digest of the photo. It is compared, not searched.

        Raises:
            FaceError: `database_unavailable`; `idempotency_conflict`: that request was made with another photo.
        """

    def find_person(self, user_id: str) -> Person | None:
        """Return what is stored of an enrolled person, of any model; None for an unknown or erased one."""

    def ping(self) -> None:
        """Return if the database answers; cheap."""

    def describe(self) -> str:
        """Name the store for people, without credentials."""

    def close(self) -> None:
        """Release the connection."""


class RecordStore(EnrolmentLog, ChallengeStore, Protocol):
    """What routes and commands ask of a store, beside the log."""

    def embeddings(self, after: int) -> Iterator[StoredEmbedding]:
        """Yield every record that has an embedding and a place > `after`, in order, unread."""

    def replace_embeddings(self, changes: Sequence[tuple[StoredEmbedding, bytes]]) -> int:
        """Put other embeddings into at most a few thousand records, and remove the `vector` of each.

        Returns:
            How many were replaced. A record that was erased meanwhile, or whose embedding is not the one that was
            read, stays as it is.
        """

    def forget_overwritten(self) -> None:
        """Remove what was overwritten or erased from the store's own files, as far as the store controls them."""

    def note_seen(self, user_ids: Iterable[str], day: int) -> None:
        """Note that people were verified on a day (days since the epoch, UTC); an earlier note is replaced.

        A person who was erased meanwhile leaves no note.
        """

    def unseen(self, since: float) -> Iterator[str]:
        """Yield the people who enrolled before `since` (epoch seconds) and were not noted since.

        A person whose enrolment time is not known is never yielded.
        """

    def newest_activity(self) -> float | None:
        """Return when a person was last enrolled or noted (epoch seconds, to the day); None if that never happened."""

    def documents(self, until: int) -> Iterator[Document]:
        """Yield every record up to place `until` as it is stored, in order: embeddings unread, erasures included."""

    def notes(self) -> Iterator[tuple[str, int]]:
        """Yield the notes of `note_seen`: user_id and day."""

    def fill(self, documents: Iterable[Document], notes: Iterable[tuple[str, int]], *, replace: bool) -> int:
        """Write records and notes as `documents` and `notes` yield them, into an empty store; return how many records.

        Until all are written, `last_place` raises `not_ready`: a process that starts meanwhile, or after a `fill`
        that was cut off, decides nothing.

        Args:
            documents: with places 1, 2, 3, ... in order.
            notes: read after the documents.
            replace: empty the store first.

        Raises:
            StoreNotEmptyError: there is a record in it.
            ValueError: two records have the same place.
        """


@contextmanager
def unavailable_on(*errors: type[Exception]) -> Iterator[None]:
    """Turn a driver's errors into the one error that clients know."""
    try:
        yield
    except errors as error:
        log.warning("The database failed: %s: %.200s", type(error).__name__, error)
        raise FaceError("database_unavailable", headers={"Retry-After": "5"}) from error
