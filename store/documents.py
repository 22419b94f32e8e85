"""Turns records into stored documents and back, and reads the log out of them page by page.

A field of a document may hold anything, since other programs may write to the collection. Each reader here takes what
it understands and gives None, or an unreadable entry, for the rest.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeGuard, overload

from errors import FaceError
from store import template_bytes
from store.encryption import Keyring, MissingKeyError
from store.records import Document, Enrolment, Entry, Person, StoredEmbedding, StoredPhoto

log = logging.getLogger(__name__)

PAGE_RECORDS = 2000
MAX_SEQ = 2**53
# Dates cannot be written from this moment on (seconds since the epoch).
YEAR_10000_S = 253402300800
DAY_S = 86400.0

ReadPage = Callable[[int], Sequence[Document]]


def record_of(seq: int, enrolment: Enrolment, keyring: Keyring) -> Document:
    """Return the document of an enrolment at place `seq`, its template sealed where there are keys."""
    record: Document = {
        "user_id": enrolment.user_id,
        "embedding": template_bytes.encode(enrolment.template, enrolment.user_id, enrolment.model, keyring),
        "timestamp": enrolment.timestamp,
        "model": enrolment.model,
        "seq": seq,
    }
    optional = {name: getattr(enrolment, name) for name in ("request_key", "photo_id", "removes", "quality")}
    return record | {name: value for name, value in optional.items() if value is not None}


def erasure_of(user_id: str, seq: int) -> Document:
    """Return the document that says at place `seq` that a person is erased."""
    # Unique like every user_id, and no UUID, so that a reader of the older form does not take it for a person.
    return {"user_id": f"erased:{uuid.uuid4()}", "erases": user_id, "deleted_at": time.time(), "seq": seq}


def removal_of(place: int, seq: int) -> Document:
    """Return the document that says at place `seq` that the photo at `place` is removed."""
    return {"user_id": f"removed:{uuid.uuid4()}", "removes": place, "deleted_at": time.time(), "seq": seq}


def name_of(record: Document) -> str:
    """Return the `Entry.name` of a document."""
    photo_id = record.get("photo_id")
    return photo_id if is_text(photo_id) else str(record.get("user_id"))


def entry_of(record: Document, seq: int, keyring: Keyring) -> Entry:
    """Return the log's entry that a document at place `seq` stands for.

    Raises:
        FaceError: `not_ready`, the template is sealed with an encryption key that is not here.
    """
    name, removes = name_of(record), place_of(record.get("removes"))
    erases, user_id, model = record.get("erases"), record.get("user_id"), record.get("model")
    if is_text(erases):
        return Entry(seq, erases=erases, name=name)
    if record.get("embedding") is None and record.get("deleted_at") is not None:
        return Entry(seq, removes=removes, name=name)
    reason = "its user_id or model is no text"
    if is_text(user_id) and (model is None or is_text(model)):
        try:
            template = template_bytes.decode(record.get("embedding"), user_id, model, keyring)
            is_added = record.get("photo_id") is not None
            return Entry(seq, user_id, template, model, removes=removes, is_added=is_added, name=name)
        except MissingKeyError as error:
            # Without this template the duplicate check cannot tell whether a person is enrolled already.
            log.critical(
                "The record of user_id %.100r cannot be opened, so nothing is decided: %s. Add that key to "
                "TEMPLATE_KEYS; docs/operating.md says what to do if the key is lost for ever.",
                user_id,
                error,
            )
            raise FaceError("not_ready", headers={"Retry-After": "60"}) from error
        except ValueError as error:
            reason = str(error)
    # `r`: a line break in the user_id must not forge a line of the log.
    log.warning("The record of user_id %.100r (seq %d) is unreadable and left out: %s.", user_id, seq, reason)
    return Entry(seq, text_of(user_id), removes=removes, unreadable=True, name=name)


def person_of(user_id: str, records: Iterable[Document]) -> Person | None:
    """Return the person of all documents of a user_id, in the order of the log; None if every photo is removed."""
    photos = tuple(
        StoredPhoto(
            number,
            int(record["seq"]),
            timestamp_of(record.get("timestamp")),
            text_of(record.get("model")),
            quality_of(record.get("quality")),
        )
        for number, record in enumerate(records, 1)
        if record.get("embedding") is not None and record.get("deleted_at") is None
    )
    return Person(user_id, photos) if photos else None


def request_keys_of(request_key: str) -> tuple[str, str]:
    """The first key with the same beginning as `request_key` up to a full stop, and the first one after all such."""
    beginning = request_key.partition(".")[0]
    return beginning, f"{beginning}/"  # the character after the full stop


def find_in(records: Sequence[Document], request_key: str) -> str | None:
    """The user_id of the record that a request left, None without records; raises as `EnrolmentLog.find_request`."""
    digest = request_key.partition(".")[2]
    for record in records:
        stored_digest = str(record.get("request_key")).partition(".")[2]
        if not digest or stored_digest in ("", digest):
            return text_of(record.get("user_id"))
    if records:
        raise FaceError("idempotency_conflict")
    return None


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is a text, and not BSON's code, a kind of `str` that no dict takes as a key."""
    return type(value) is str


def text_of(value: object) -> str | None:
    """Return a text, None for anything else."""
    return value if is_text(value) else None


def place_of(seq: object) -> int | None:
    """Return a record's place; None for a fraction, a truth value, a list and the like."""
    if isinstance(seq, int) and not isinstance(seq, bool):
        return int(seq)
    # JSON tools write whole numbers as floats.
    return int(seq) if isinstance(seq, float) and seq.is_integer() else None


def timestamp_of(value: object) -> float | None:
    """Return a timestamp in seconds since the epoch; None if it is missing or outside the years 1970-9999."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < YEAR_10000_S:
        return float(value)
    return None


@overload
def utc(moment: float) -> str: ...
@overload
def utc(moment: None) -> None: ...
def utc(moment: float | None) -> str | None:
    """A moment (seconds since the epoch) as ISO 8601 writes it, to the second; None for None."""
    return None if moment is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def quality_of(value: object) -> float | None:
    """Return a photo's quality; None for anything but a number from 0 to 1."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1 else None


def require_place(seq: int) -> None:
    """Raise FaceError `not_ready` if `seq` is no place that can be read again: the log must not go on there."""
    if seq >= MAX_SEQ:
        log.critical(
            "Nothing is decided: a record was written by hand at the place %d, and no place can follow it. "
            "Correct that record's seq.",
            seq - 1,
        )
        raise FaceError("not_ready", headers={"Retry-After": "60"})


def day_of(timestamp: float) -> int:
    """Return the day of a timestamp, counted from the epoch (UTC)."""
    return int(timestamp // DAY_S)


def read_embeddings(read_page: ReadPage, after: int) -> Iterator[StoredEmbedding]:
    """Yield the embeddings of the pages behind place `after`, as `RecordStore.embeddings`."""
    while records := read_page(after):
        for record in records:
            place, user_id, embedding = place_of(record["seq"]), record.get("user_id"), record.get("embedding")
            if place is not None and is_text(user_id) and isinstance(embedding, bytes):
                yield StoredEmbedding(place, user_id, text_of(record.get("model")), embedding)
        places = [place for place in (place_of(record["seq"]) for record in records) if place is not None]
        if not places:
            return
        after = places[-1]


def read_log(read_page: ReadPage, after: int, name: str | None, keyring: Keyring) -> Iterator[Entry]:
    """Yield the entries of the pages behind place `after`, as `EnrolmentLog.entries`."""
    # The known record is read in the same query as what follows it, so that nothing changes between the two.
    at = after if name is None else after - 1
    while True:
        records = read_page(at)
        before = at
        for record in records:
            place = place_of(record["seq"])
            if place is None:
                log.warning("A record with the place %.100r is left out.", record["seq"])
                continue
            if name is not None and (place, name_of(record)) != (after, name):
                break
            if name is None:
                yield entry_of(record, place, keyring)
            name = None
            at = place
        if name is not None:
            log.critical(
                "The log's place %d has another record than before, or none: a backup was restored, or records were "
                "removed by hand. Nothing is decided until this process is started again.",
                after,
            )
            raise FaceError("not_ready", headers={"Retry-After": "60"})
        if len(records) < PAGE_RECORDS or at == before:
            return
