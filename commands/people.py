"""Reads everybody who is enrolled, for the commands that list or count people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from commands.progress import with_progress
from engines.base import Template
from store import template_bytes
from store.documents import text_of, timestamp_of
from store.encryption import Keyring, MissingKeyError
from store.records import RecordStore

UNREADABLE = "(unreadable)"


@dataclass(frozen=True)
class EnrolledPerson:
    """One photo of a person, as it is stored; a person may have several.

    Attributes:
        user_id: the person's id.
        number: the photo's `StoredPhoto.number`.
        timestamp: seconds since the epoch; None if it is not known.
        model: the name of the model that made the template; None if the record names none.
        template: float32[d]; None if it cannot be read.
    """

    user_id: str
    number: int
    timestamp: float | None
    model: str | None
    template: Template | None


@dataclass
class Counts:
    """What a store holds: people, photos by model, erasures, and the first and last photo (seconds since the epoch)."""

    people: set[str] = field(default_factory=set)
    models: Counter[str] = field(default_factory=Counter)
    erasures: int = 0
    first: float | None = None
    last: float | None = None


def enrolled_people(store: RecordStore, keyring: Keyring, counts: Counts | None = None) -> Iterator[EnrolledPerson]:
    """Yield every photo of everybody enrolled, in the order of the log, and count them in `counts`.

    Raises:
        FaceError: `database_unavailable`.
    """
    counts = counts or Counts()
    # user_id -> how many photos so far, with those that are removed.
    photos: Counter[str] = Counter()
    last = store.last_place()
    for document in with_progress(store.documents(last), last, "records"):
        if document.get("erases") is not None:
            counts.erasures += 1
            continue
        user_id, model = document.get("user_id"), document.get("model")
        photos[str(user_id)] += 1
        if document.get("embedding") is None and document.get("deleted_at") is not None:
            continue
        template, counted_as = None, str(model or "(none named)")
        try:
            template = template_bytes.decode(document.get("embedding"), user_id, model, keyring)
        except MissingKeyError as error:
            counted_as = f"(a template {error})"
        except ValueError:
            counted_as = UNREADABLE
        enrolled_at = timestamp_of(document.get("timestamp"))
        if enrolled_at is not None:
            counts.first = min(enrolled_at, counts.first or enrolled_at)
            counts.last = max(enrolled_at, counts.last or enrolled_at)
        counts.people.add(str(user_id))
        counts.models[counted_as] += 1
        yield EnrolledPerson(str(user_id), photos[str(user_id)], enrolled_at, text_of(model), template)
