"""Owns the durable records: MongoDB or one SQLite file, and the pickled templates in them.

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
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import pymongo
from bson.binary import Binary, BinaryVectorDtype
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError
from bson.int64 import Int64
from pymongo.collection import Collection
from pymongo.errors import ConfigurationError, OperationFailure, PyMongoError
from pymongo.operations import SearchIndexModel
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

import template_codec
from errors import FaceError
from sealing import NO_KEYS, Keyring, MissingKeyError
from template_codec import Template

log = logging.getLogger(__name__)

Document: TypeAlias = dict[str, Any]

PAGE = 2000
MAX_SEQ = 2**53
# No date can be written of a moment from here on (seconds since the epoch).
_YEAR_10000 = 253402300800
_DUPLICATE_KEY = 11000
_INDEX_EXISTS = 68
SQLITE_BUSY_SECONDS = 5.0
# Long enough to index and number a large collection of the older form; requests use `open_store`'s `timeout`.
MONGO_PREPARE_SECONDS = 600.0


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
    `name` is what only this place's record is called, whatever becomes of it; for `Store.entries`.
    """

    seq: int
    user_id: str | None = None
    template: Template | None = None
    model: str | None = None
    erases: str | None = None
    unreadable: bool = False
    name: str = field(default="", compare=False)


class Store(Protocol):
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
        """Return the last place of the log, 0 when it is empty."""

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


class Records(Store, Protocol):
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
        """Note that people were verified on a day (days since the epoch, UTC); an earlier note is replaced."""

    def unseen(self, since: float) -> Iterator[str]:
        """Yield who enrolled before `since` (epoch seconds) and was not noted since; nobody of unknown enrolment."""

    def newest_activity(self) -> float | None:
        """Return when somebody last enrolled or was noted (epoch seconds, to the day); None if nobody ever."""

    def documents(self, until: int) -> Iterator[Document]:
        """Yield every record up to place `until` as it is stored, in order: embeddings unread, erasures and all."""

    def notes(self) -> Iterator[tuple[str, int]]:
        """Yield what `note_seen` has noted."""

    def fill(self, documents: Iterable[Document], *, replace: bool) -> int:
        """Write records as `documents` yields them, into an empty store; return how many.

        Args:
            documents: with places 1, 2, 3, ... in order.
            replace: empty the store first.

        Raises:
            StoreNotEmptyError: there is a record in it.
        """


def open_store(
    mongo_uri: str | None,
    *,
    mongo_db: str,
    mongo_collection: str,
    data_dir: Path,
    timeout: float = 5.0,
    keyring: Keyring = NO_KEYS,
) -> Records:
    """Return the store that the settings name, not yet connected: call `prepare` next.

    Args:
        mongo_uri: a MongoDB connection string; the embedded SQLite file when None or empty.
        mongo_db: database name; only with `mongo_uri`.
        mongo_collection: collection name; only with `mongo_uri`.
        data_dir: folder of the SQLite file; only without `mongo_uri`.
        timeout: seconds after which any one MongoDB operation fails.
        keyring: seals the templates that are stored, and opens those that are.

    Raises:
        ValueError: the connection string or a name is not valid. The message repeats nothing of it.
        FaceError: `database_unavailable`, the name of a mongodb+srv string cannot be looked up.
    """
    if not mongo_uri:
        return SqliteStore(data_dir / "faces.sqlite3", keyring)
    try:
        client: pymongo.MongoClient[Document] = pymongo.MongoClient(mongo_uri, timeoutMS=int(timeout * 1000))
        collection = client[mongo_db].get_collection(
            mongo_collection,
            # One text or date that BSON cannot express must not make a whole page of records unreadable.
            CodecOptions(unicode_decode_error_handler="replace", datetime_conversion=DatetimeConversion.DATETIME_AUTO),
            # An entry that a fail-over could take back must neither be acknowledged nor applied.
            write_concern=WriteConcern("majority", j=True),
            read_concern=ReadConcern("majority"),
            read_preference=ReadPreference.PRIMARY,
        )
    except (PyMongoError, ValueError, TypeError) as error:
        if isinstance(error, ConfigurationError) and mongo_uri.startswith("mongodb+srv://"):
            # The driver looks such a name up at once, and words an outage of the name server like a mistake.
            raise FaceError("database_unavailable", headers={"Retry-After": "5"}) from error
        # `from None`: the driver's messages quote parts of the string, which may be the password.
        what = "MONGO_URI" if isinstance(error, (ConfigurationError, ValueError)) else "MONGO_DB or MONGO_COLLECTION"
        raise ValueError(f"{what} is not valid ({type(error).__name__}).") from None
    hosts = mongo_uri.partition("://")[2].partition("/")[0].partition("?")[0].rpartition("@")[2]
    return MongoStore(collection, f"MongoDB {mongo_db}.{mongo_collection} at {hosts}", keyring)


class MongoStore:
    """`Store` on one MongoDB collection.

    The collection comes with its concerns set, as `open_store` does; `description` is for people.
    """

    _PLACE: Mapping[str, Any] = {"$gte": 1, "$lt": MAX_SEQ}
    # Whatever else `seq` may be: absent, null, a text, negative, NaN.
    _UNPLACED: Mapping[str, Any] = {"$nor": [{"seq": _PLACE}]}
    _FIELDS: Mapping[str, Any] = dict.fromkeys(("user_id", "embedding", "model", "seq", "erases", "deleted_at"), 1)

    def __init__(
        self, collection: Collection[Document], description: str = "MongoDB", keyring: Keyring = NO_KEYS
    ) -> None:
        self._collection = collection
        self._description = description
        self._keyring = keyring
        self._seen = collection.database.get_collection(
            f"{collection.name}_seen",
            write_concern=collection.write_concern,
            read_concern=collection.read_concern,
            read_preference=collection.read_preference,
        )
        self._vector_model: str | None = None

    def prepare(self) -> None:
        self.ping()  # under the short timeout: a server that is down is known at once
        with _unavailable_on(PyMongoError, BSONError), pymongo.timeout(MONGO_PREPARE_SECONDS):
            # Sparse, so that records of the older form have no place rather than the same one.
            self._collection.create_index("seq", unique=True, sparse=True)
            self._collection.create_index("request_key", sparse=True)
            self._collection.create_index("erases", sparse=True)
            try:
                self._collection.create_index("user_id", unique=True)
            except OperationFailure as error:
                log.warning(
                    "user_id cannot be made unique in this collection (%s): older records share one or lack it. "
                    "Enrolment is not affected.",
                    error.code,
                )
            while self._number_a_page():
                pass
            self.finish_erasures()

    def _number_a_page(self) -> bool:
        """Give up to PAGE unplaced records the next places; False when there are none.

        Servers that start together agree: each reads the last place first and the records afterwards, in one order,
        so that either both give a record the same place or one of them is refused, and reads again.
        """
        placed = self._collection.find({"seq": self._PLACE}, {"_id": 0, "seq": 1}).sort("seq", -1).limit(10)
        start = max((_place(record["seq"]) or 0 for record in placed), default=0) + 1
        unplaced = list(self._collection.find(self._UNPLACED, {"seq": 1}).sort("_id", 1).limit(PAGE))
        if not unplaced:
            return False
        numbering = [
            pymongo.UpdateOne(
                {"_id": record["_id"], "seq": {"$eq": record["seq"]} if "seq" in record else {"$exists": False}},
                {"$set": {"seq": Int64(seq)}},
            )
            for seq, record in enumerate(unplaced, start)
        ]
        log.info("Giving places in the log to %d older records, from %d.", len(unplaced), start)
        try:
            self._collection.bulk_write(numbering, ordered=True)
        except OperationFailure as error:
            log.info("Stopped there (code %s): another server has given these places.", error.code)
        if self._collection.find_one({"seq": start}, {"_id": 1}) is None:
            raise OperationFailure("older records cannot be given places")
        return True

    def entries(self, after: int, name: str | None = None) -> Iterator[Entry]:
        return _read_log(self._page, after, name, self._keyring)

    def _page(self, after: int) -> list[Document]:
        with _unavailable_on(PyMongoError, BSONError):
            places = {"seq": {"$gt": after, "$lt": MAX_SEQ}}
            return list(
                self._collection.find(places, {"_id": 0, **self._FIELDS}).sort("seq", 1).limit(PAGE).batch_size(PAGE)
            )

    def append(self, seq: int, enrolments: Sequence[Enrolment]) -> int:
        records = [_record(place, enrolment, self._keyring) for place, enrolment in enumerate(enrolments, seq)]
        for record, enrolment in zip(records, enrolments, strict=True):
            if enrolment.model == self._vector_model:
                record.update(_vector_fields(enrolment.template, enrolment.model))
        return self._insert(records)

    def erase(self, seq: int, user_id: str) -> bool:
        if not self._insert([erasure_of(user_id, seq)]):
            return False
        self.finish_erasures(user_id)
        return True

    def _insert(self, records: list[Document]) -> int:
        """Insert records at consecutive places, up to the first that is taken; return how many."""
        with _unavailable_on(PyMongoError, BSONError):
            try:
                # Ordered, so that it ends at the first place that is taken: no holes.
                self._collection.insert_many(records, ordered=True)
            except OperationFailure as failure:
                outcome = failure.details or {}
                refused = outcome.get("writeErrors")
                if refused and refused[0].get("code") == _DUPLICATE_KEY and not outcome.get("writeConcernErrors"):
                    return int(refused[0]["index"])
                # Refused for a reason without a number, or not confirmed in time: who has the places decides.
                ours = {record["seq"]: record["user_id"] for record in records}
                held = self._collection.find({"seq": {"$in": list(ours)}}, {"_id": 0, "seq": 1, "user_id": 1})
                holders = {holder["seq"]: holder.get("user_id") for holder in held}
                stored = next((at for at, seq in enumerate(ours) if holders.get(seq) != ours[seq]), len(ours))
                if stored < len(ours) and records[stored]["seq"] not in holders:
                    raise
                return stored
            return len(records)

    def finish_erasures(self, user_id: str | None = None) -> None:
        with _unavailable_on(PyMongoError, BSONError):
            erasures = self._collection.find(
                {"erases": {"$exists": True} if user_id is None else user_id}, {"_id": 0, "erases": 1}
            )
            # Texts only: a pattern among the values of `$in` would erase whoever it matches.
            erased = [erasure["erases"] for erasure in erasures if isinstance(erasure["erases"], str)]
            still_there = [{"embedding": {"$exists": True}}, {"vector": {"$exists": True}}]
            for start in range(0, len(erased), PAGE):
                self._seen.delete_many({"_id": {"$in": erased[start : start + PAGE]}})
                self._collection.update_many(
                    {"user_id": {"$in": erased[start : start + PAGE]}, "$or": still_there},
                    {
                        "$unset": {"embedding": "", "request_key": "", "vector": "", "vector_model": ""},
                        "$set": {"deleted_at": time.time()},
                    },
                )

    def last_place(self) -> int:
        with _unavailable_on(PyMongoError, BSONError):
            last = self._collection.find_one({"seq": self._PLACE}, {"_id": 0, "seq": 1}, sort=[("seq", -1)])
        return _place(last["seq"]) or 0 if last else 0

    def checkpoint(self, seq: int) -> str:
        with _unavailable_on(PyMongoError, BSONError):
            record = self._collection.find_one({"seq": seq}, {"_id": 0, "user_id": 1}) or {}
            count = self._collection.count_documents({"seq": {"$gte": 1, "$lte": seq}})
        return f"{count} {record.get('user_id')}"

    def erasures(self, until: int) -> list[str]:
        with _unavailable_on(PyMongoError, BSONError):
            erasures = self._collection.find({"erases": {"$exists": True}, "seq": {"$lte": until}}, {"erases": 1})
            return [erasure["erases"] for erasure in erasures if isinstance(erasure["erases"], str)]

    def vector_index(self, model: str, dimension: int, *, exact: bool) -> MongoVectorIndex:
        """Return MongoDB's own vector index of one model's templates; from now on `append` writes what it needs."""
        self._vector_model = model
        return MongoVectorIndex(self._collection, model, dimension, exact=exact)

    def find_request(self, request_key: str, since: float) -> str | None:
        with _unavailable_on(PyMongoError, BSONError):
            record = self._collection.find_one(
                {"request_key": request_key, "timestamp": {"$gte": since}}, {"_id": 0, "user_id": 1}
            )
        return _text(record.get("user_id")) if record else None

    def find_person(self, user_id: str) -> Person | None:
        alive = {"user_id": user_id, "embedding": {"$exists": True}, "deleted_at": {"$exists": False}}
        with _unavailable_on(PyMongoError, BSONError):
            return _person(self._collection.find_one(alive, {"_id": 0, "user_id": 1, "timestamp": 1, "model": 1}))

    def embeddings(self, after: int) -> Iterator[StoredEmbedding]:
        return _read_embeddings(self._page, after)

    def replace_embeddings(self, changes: Sequence[tuple[StoredEmbedding, bytes]]) -> int:
        places = {"seq": {"$in": [stored.seq for stored, _ in changes]}}
        with _unavailable_on(PyMongoError, BSONError):
            found = self._collection.find(places, {"_id": 0, "seq": 1, "user_id": 1, "embedding": 1})
            now = {record["seq"]: (record.get("user_id"), record.get("embedding")) for record in found}
            replacing = [
                pymongo.UpdateOne(
                    # What may come in between is an erasure, after which there is no embedding to replace.
                    {"seq": Int64(stored.seq), "user_id": stored.user_id, "embedding": {"$exists": True}},
                    # The vector is the template once more, unsealed.
                    {"$set": {"embedding": embedding}, "$unset": {"vector": "", "vector_model": ""}},
                )
                for stored, embedding in changes
                if now.get(stored.seq) == (stored.user_id, stored.embedding)
            ]
            return self._collection.bulk_write(replacing, ordered=False).modified_count if replacing else 0

    def forget_overwritten(self) -> None:
        """Do nothing: what the server's journal and oplog still hold is its own affair."""

    def note_seen(self, user_ids: Iterable[str], day: int) -> None:
        notes = [pymongo.UpdateOne({"_id": one}, {"$set": {"day": day}}, upsert=True) for one in user_ids]
        with _unavailable_on(PyMongoError, BSONError):
            if notes:
                self._seen.bulk_write(notes, ordered=False)

    def unseen(self, since: float) -> Iterator[str]:
        after = 0
        while True:
            asked = {"seq": {"$gt": after}, "embedding": {"$exists": True}, "timestamp": {"$lt": since}}
            with _unavailable_on(PyMongoError, BSONError):
                found = list(self._collection.find(asked, {"user_id": 1, "seq": 1}).sort("seq", 1).limit(PAGE))
                people = [record["user_id"] for record in found if isinstance(record.get("user_id"), str)]
                noted = self._seen.find({"_id": {"$in": people}, "day": {"$gte": _day(since)}}, {"_id": 1})
                seen = {record["_id"] for record in noted}
            yield from (one for one in people if one not in seen)
            if not found:
                return
            after = found[-1]["seq"]

    def newest_activity(self) -> float | None:
        with _unavailable_on(PyMongoError, BSONError):
            placed = {"seq": self._PLACE, "timestamp": {"$type": "number"}}
            enrolled = self._collection.find_one(placed, {"timestamp": 1}, sort=[("seq", -1)])
            noted = self._seen.find_one({}, {"day": 1}, sort=[("day", -1)])
        moments = [float(enrolled["timestamp"])] if enrolled else []
        return max([*moments, 86400.0 * noted["day"]] if noted else moments, default=None)

    def documents(self, until: int) -> Iterator[Document]:
        # What was in the index of this database says nothing about that of another, and the vector is the template.
        left_out = {"_id": 0, "vector": 0, "vector_model": 0, "vector_marks": 0}
        after = 0
        while after < until:
            with _unavailable_on(PyMongoError, BSONError):
                places = {"seq": {"$gt": after, "$lte": until}}
                page = list(self._collection.find(places, left_out).sort("seq", 1).limit(500))
            yield from (record for record in page if _place(record["seq"]) is not None)
            if not page:
                return
            after = page[-1]["seq"]

    def notes(self) -> Iterator[tuple[str, int]]:
        with _unavailable_on(PyMongoError, BSONError):
            for note in self._seen.find().batch_size(PAGE):
                yield note["_id"], note["day"]

    def fill(self, documents: Iterable[Document], *, replace: bool) -> int:
        with _unavailable_on(PyMongoError, BSONError), pymongo.timeout(MONGO_PREPARE_SECONDS):
            if replace:
                self._collection.delete_many({})
                self._seen.delete_many({})
            elif self._collection.find_one({}) is not None:
                raise StoreNotEmptyError("the store is not empty")
        count = 0
        page: list[Document] = []
        for document in documents:
            page.append({**document, "seq": Int64(document["seq"])})
            if len(page) == 500:
                count += self._insert(page)
                page = []
        return count + (self._insert(page) if page else 0)

    def ping(self) -> None:
        with _unavailable_on(PyMongoError):
            self._collection.database.command("ping")

    def describe(self) -> str:
        return self._description

    def close(self) -> None:
        self._collection.database.client.close()


class VectorSearchMissingError(ValueError):
    """The MongoDB server has no vector search; the message is for the operator."""


class MongoVectorIndex:
    """MongoDB's own vector index (`$vectorSearch`) over the records of one model. Made by `MongoStore.vector_index`.

    The index reads a record's `vector` and `vector_model`, a second form of what `embedding` and `model` say; records
    are always judged by the first form. Every method but `prepare` raises FaceError `database_unavailable` alone.
    """

    def __init__(self, collection: Collection[Document], model: str, dimension: int, *, exact: bool) -> None:
        self._collection = collection
        # The server refuses the stage any other read concern. The index follows what a majority has, so that an
        # enrolment which a fail-over could take back is not in it.
        self._searched = collection.with_options(read_concern=ReadConcern("local"))
        self._model = model
        self._dimension = dimension
        self._exact = exact
        self._name = f"faces_vector_{dimension}"

    def prepare(self) -> None:
        """Create the index unless it is there.

        Raises:
            VectorSearchMissingError: the server knows no vector search, or refuses it.
            FaceError: `database_unavailable`.
        """
        fields: list[Document] = [
            {"type": "vector", "path": "vector", "numDimensions": self._dimension, "similarity": "cosine"},
            {"type": "filter", "path": "vector_model"},
            {"type": "filter", "path": "seq"},
        ]
        with _unavailable_on(PyMongoError):
            with pymongo.timeout(MONGO_PREPARE_SECONDS):
                # For `count` and `held`: they read this index alone.
                has_vector = {"vector_model": {"$exists": True}}
                self._collection.create_index([("vector_model", 1), ("seq", 1)], partialFilterExpression=has_vector)
                self._collection.create_index("vector_marks", sparse=True)
            try:
                if not list(self._collection.list_search_indexes(self._name)):
                    # Those speak of another index.
                    self._collection.update_many({"vector_marks": {"$exists": True}}, {"$unset": {"vector_marks": ""}})
                    self._collection.create_search_index(
                        SearchIndexModel({"fields": fields}, self._name, "vectorSearch")
                    )
            except OperationFailure as error:
                if error.code == _INDEX_EXISTS:
                    return  # another process was quicker
                raise VectorSearchMissingError(
                    "SEARCH=mongodb needs a MongoDB with vector search (Atlas, or a server with mongot) and the right "
                    f"to create its index; this one answers with code {error.code}. Mend that, or take SEARCH=memory."
                ) from error

    def is_queryable(self) -> bool:
        """Return whether the index's first building is over."""
        with _unavailable_on(PyMongoError):
            return any(index.get("queryable") for index in self._collection.list_search_indexes(self._name))

    def count(self) -> int:
        """Return how many records have a vector; takes long where there are many."""
        with _unavailable_on(PyMongoError), pymongo.timeout(MONGO_PREPARE_SECONDS):
            return self._collection.count_documents({"vector_model": self._model})

    def mark(self, whose: str) -> int:
        """Return the last place that `set_mark` was given for `whose`, 0 when there is none."""
        with _unavailable_on(PyMongoError):
            marked = self._collection.find({"vector_marks": whose}, {"_id": 0, "seq": 1})
            return max((_place(record["seq"]) or 0 for record in marked), default=0)

    def set_mark(self, whose: str, place: int) -> None:
        """Keep for the next start that up to `place` the index was seen to hold everybody.

        In the record at that place itself, so that a restored backup never claims more than it has.
        """
        with _unavailable_on(PyMongoError):
            marked = self._collection.update_one({"seq": Int64(place)}, {"$addToSet": {"vector_marks": whose}})
            if marked.matched_count:
                earlier = {"vector_marks": whose, "seq": {"$lt": place}}
                self._collection.update_many(earlier, {"$pull": {"vector_marks": whose}})

    def fill(self, after: int, until: int, belongs: Callable[[Entry], bool]) -> int:
        """Give the records at places `after` + 1 to `until` their vectors where they lack them; return how many.

        Args:
            after: at most a few thousand places before `until`.
            until: the last place looked at.
            belongs: whether a record is one of the model's.
        """
        lacking = {
            "seq": {"$gt": after, "$lte": until},
            "embedding": {"$exists": True},
            "vector_model": {"$ne": self._model},
        }
        with _unavailable_on(PyMongoError, BSONError):
            given = [entry for entry in _present(self._collection.find(lacking, MongoStore._FIELDS)) if belongs(entry)]
            # Only where the embedding still is: whoever is erased meanwhile must not get a vector again.
            filling = [
                pymongo.UpdateOne(
                    {"seq": Int64(entry.seq), "embedding": {"$exists": True}},
                    {"$set": _vector_fields(entry.template, self._model)},
                )
                for entry in given
                if entry.template is not None
            ]
            if filling:
                self._collection.bulk_write(filling)
        return len(filling)

    def held(self, after: int, until: int) -> int:
        """Return the last place, `until` at most, up to which from `after` the index holds every record with a vector.

        The index is asked for exactly these places; at most a few thousand.
        """
        places = {"seq": {"$gt": after, "$lte": until}}
        with _unavailable_on(PyMongoError):
            wanted = self._collection.find({"vector_model": self._model, **places}, {"_id": 0, "seq": 1})
            missing = {_place(record["seq"]) for record in wanted}
        if missing:
            anything = np.eye(1, self._dimension, dtype=np.float32)[0]
            found = self._search(
                anything, until - after, [{"seq": {"$gt": after}}, {"seq": {"$lte": until}}], exact=True
            )
            missing -= {_place(record["seq"]) for record in found}
        return min((place - 1 for place in missing if place is not None), default=until)

    def nearest(self, probe: Template, limit: int, held: int) -> tuple[list[Entry], bool]:
        """Search for the `limit` nearest records.

        Args:
            probe: float32[d], L2-normalised.
            limit: 1 to 10,000.
            held: up to which place the index was seen to hold everybody.

        Returns:
            Those of them that can be read and are not erased, the nearest first, and whether there may be more.

        Raises:
            FaceError: `database_unavailable`, also when the index has lost what it held.
        """
        found = self._search(probe, limit, [], exact=self._exact)
        if not found:
            # MongoDB answers a search in an index that does not exist with no result rather than an error.
            with _unavailable_on(PyMongoError):
                someone = self._collection.find_one({"vector_model": self._model, "seq": {"$gte": 1, "$lte": held}})
            if someone is not None:
                log.error("The vector index finds nobody, though it held %d places: it is gone, or another.", held)
                raise FaceError("database_unavailable", headers={"Retry-After": "5"})
        return [entry for entry in _present(found) if entry.template is not None], len(found) == limit

    def _search(self, probe: Template, limit: int, filters: list[Document], *, exact: bool) -> list[Document]:
        stage: Document = {
            "index": self._name,
            "path": "vector",
            "queryVector": _bson_vector(probe),
            "limit": limit,
            "filter": {"$and": [{"vector_model": {"$eq": self._model}}, *filters]},
            # MongoDB advises 20 candidates for each result, and takes 10,000 at most.
            **({"exact": True} if exact else {"numCandidates": min(20 * limit, 10_000)}),
        }
        fields = {"_id": 0, **MongoStore._FIELDS}
        with _unavailable_on(PyMongoError, BSONError):
            return list(self._searched.aggregate([{"$vectorSearch": stage}, {"$project": fields}]))

    def person(self, user_id: str) -> list[Entry]:
        """Return this user_id's records that are not erased, readable or not; several only in an older collection."""
        with _unavailable_on(PyMongoError, BSONError):
            placed = {"user_id": user_id, "seq": MongoStore._PLACE}
            return _present(self._collection.find(placed, {"_id": 0, **MongoStore._FIELDS}))


class SqliteStore:
    """`Store` on one SQLite file (mode 0600), for any number of threads and processes of one machine."""

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
        with _unavailable_on(sqlite3.Error, OSError), self._lock:
            if self._connection is not None:
                return
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Before SQLite opens it: its -wal and -shm files take over this file's mode.
            self._path.touch(mode=0o600)
            self._path.chmod(0o600)
            connection = sqlite3.connect(
                self._path, timeout=SQLITE_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            # One text that is no UTF-8 must not make a whole page of records unreadable.
            connection.text_factory = lambda text: text.decode(errors="replace")
            try:
                self._create(connection)
            except sqlite3.Error:
                connection.close()
                raise
            self._connection = connection
        self.forget_overwritten()  # a killed process may have left its log uncut

    def _create(self, connection: sqlite3.Connection) -> None:
        deadline = time.monotonic() + SQLITE_BUSY_SECONDS
        for statement in self._SCHEMA:
            while True:
                try:
                    connection.execute(statement)
                    break
                except sqlite3.OperationalError as error:
                    # SQLite's own waiting does not cover the change to WAL, which another process may be making.
                    if "locked" not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        """Lend the connection to one thread for one transaction, rolled back when anything is raised."""
        with _unavailable_on(sqlite3.Error), self._lock:
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
        return _read_log(self._page, after, name, self._keyring)

    def _page(self, after: int) -> list[Document]:
        return self._query(
            "SELECT user_id, embedding, model, seq, erases, deleted_at FROM faces WHERE seq > ? ORDER BY seq LIMIT ?",
            after,
            PAGE,
        )

    def append(self, seq: int, enrolments: Sequence[Enrolment]) -> int:
        with self._transaction("BEGIN IMMEDIATE") as connection:
            # Nobody else writes meanwhile: all of the places are free, or the first is taken.
            if not self._is_next(connection, seq):
                return 0
            connection.executemany(
                "INSERT INTO faces (seq, user_id, embedding, timestamp, model, request_key)"
                " VALUES (:seq, :user_id, :embedding, :timestamp, :model, :request_key)",
                [
                    {"request_key": None, **_record(at, enrolment, self._keyring)}
                    for at, enrolment in enumerate(enrolments, seq)
                ],
            )
        return len(enrolments)

    @staticmethod
    def _is_next(connection: sqlite3.Connection, seq: int) -> bool:
        """Whether the log ends right before this place; where a backup was restored meanwhile it may end earlier."""
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
        # Counted in the index of user_ids: the table itself holds all the templates.
        counted = self._query("SELECT COUNT(*) AS n FROM faces INDEXED BY sqlite_autoindex_faces_1 WHERE seq <= ?", seq)
        last = self._query("SELECT user_id FROM faces WHERE seq = ?", seq)
        return f"{counted[0]['n']} {last[0]['user_id'] if last else None}"

    def erasures(self, until: int) -> list[str]:
        return [
            record["erases"] for record in self._query("SELECT erases FROM faces WHERE erases > '' AND seq <= ?", until)
        ]

    def find_request(self, request_key: str, since: float) -> str | None:
        sql = "SELECT user_id FROM faces WHERE request_key = ? AND timestamp >= ?"
        records = self._query(sql, request_key, since)
        return _text(records[0]["user_id"]) if records else None

    def find_person(self, user_id: str) -> Person | None:
        sql = "SELECT user_id, timestamp, model FROM faces WHERE user_id = ? AND embedding IS NOT NULL"
        return next((_person(record) for record in self._query(sql, user_id)), None)

    def embeddings(self, after: int) -> Iterator[StoredEmbedding]:
        return _read_embeddings(self._page, after)

    def replace_embeddings(self, changes: Sequence[tuple[StoredEmbedding, bytes]]) -> int:
        sql = "UPDATE faces SET embedding = ? WHERE seq = ? AND user_id = ? AND embedding = ?"
        values = [(embedding, stored.seq, stored.user_id, stored.embedding) for stored, embedding in changes]
        with self._transaction("BEGIN IMMEDIATE") as connection:
            done = connection.executemany(sql, values)
        return max(done.rowcount, 0)

    def forget_overwritten(self) -> None:
        with _unavailable_on(sqlite3.Error), self._lock:
            if self._connection is None:
                raise sqlite3.OperationalError("the file is not open")
            # `secure_delete` clears the pages, but the write-ahead log has them as they were until it is cut.
            busy, *_ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            log.warning(
                "%s-wal is in use and still holds what was erased: the next start or erasure cuts it.", self._path
            )

    def note_seen(self, user_ids: Iterable[str], day: int) -> None:
        with self._transaction("BEGIN IMMEDIATE") as connection:
            connection.executemany("REPLACE INTO seen VALUES (?, ?)", [(user_id, day) for user_id in user_ids])

    def unseen(self, since: float) -> Iterator[str]:
        sql = (
            "SELECT seq, user_id FROM faces LEFT JOIN seen USING (user_id) WHERE seq > ? AND embedding IS NOT NULL"
            " AND timestamp < ? AND COALESCE(day, 0) < ? ORDER BY seq LIMIT ?"
        )
        after = 0
        while records := self._query(sql, after, since, _day(since), PAGE):
            yield from (record["user_id"] for record in records)
            after = records[-1]["seq"]

    def newest_activity(self) -> float | None:
        enrolled = "SELECT timestamp FROM faces WHERE timestamp IS NOT NULL ORDER BY seq DESC LIMIT 1"
        moments = [record["timestamp"] for record in self._query(enrolled)]
        moments += [86400.0 * record["day"] for record in self._query("SELECT day FROM seen ORDER BY day DESC LIMIT 1")]
        return max(moments, default=None)

    def documents(self, until: int) -> Iterator[Document]:
        after = 0
        while records := self._query(
            "SELECT * FROM faces WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT 500", after, until
        ):
            yield from ({key: value for key, value in record.items() if value is not None} for record in records)
            after = records[-1]["seq"]

    def notes(self) -> Iterator[tuple[str, int]]:
        after = ""
        while notes := self._query("SELECT * FROM seen WHERE user_id > ? ORDER BY user_id LIMIT 5000", after):
            yield from ((note["user_id"], note["day"]) for note in notes)
            after = notes[-1]["user_id"]

    def fill(self, documents: Iterable[Document], *, replace: bool) -> int:
        columns = ("seq", "user_id", "embedding", "timestamp", "model", "request_key", "erases", "deleted_at")
        sql = f"INSERT INTO faces ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608 - ours
        with self._transaction("BEGIN IMMEDIATE") as connection:
            if replace:
                connection.execute("DELETE FROM faces")
                connection.execute("DELETE FROM seen")
            elif connection.execute("SELECT 1 FROM faces").fetchone():
                raise StoreNotEmptyError("the store is not empty")
            rows = ([document.get(column) for column in columns] for document in documents)
            written = connection.executemany(sql, rows).rowcount
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


@contextmanager
def _unavailable_on(*errors: type[Exception]) -> Iterator[None]:
    """Turn a driver's errors into the one error that clients know."""
    try:
        yield
    except errors as error:
        log.warning("The database failed: %s: %.200s", type(error).__name__, error)
        raise FaceError("database_unavailable", headers={"Retry-After": "5"}) from error


def erasure_of(user_id: str, seq: int) -> Document:
    """The record that says at a place of the log that somebody is erased."""
    # Unique like every user_id, and no UUID, so that nobody who reads the older form takes it for a person.
    return {"user_id": f"erased:{uuid.uuid4()}", "erases": user_id, "deleted_at": time.time(), "seq": Int64(seq)}


def _vector_fields(template: Template, model: str) -> Document:
    return {"vector": _bson_vector(template), "vector_model": model}


def _bson_vector(vector: Template) -> Binary:
    return Binary.from_vector(vector.tolist(), BinaryVectorDtype.FLOAT32)


def _present(records: Iterable[Document]) -> list[Entry]:
    """The enrolments among these records, readable or not; without erasures and the erased."""
    placed = ((record, _place(record.get("seq"))) for record in records)
    # No keys: settings.py refuses them together with MongoDB's index, which needs the vectors as they are.
    entries = [_entry(record, place, NO_KEYS) for record, place in placed if place is not None]
    return [entry for entry in entries if entry.template is not None or entry.unreadable]


def _record(seq: int, enrolment: Enrolment, keyring: Keyring) -> Document:
    record: Document = {
        "user_id": enrolment.user_id,
        "embedding": template_codec.encode(enrolment.template, enrolment.user_id, enrolment.model, keyring),
        "timestamp": enrolment.timestamp,
        "model": enrolment.model,
        "seq": Int64(seq),
    }
    if enrolment.request_key is not None:
        record["request_key"] = enrolment.request_key
    return record


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _place(seq: object) -> int | None:
    """Return a record's place; None for what is none, such as a fraction, a truth value or a list."""
    # JSON tools write whole numbers as floats.
    return int(seq) if isinstance(seq, (int, float)) and not isinstance(seq, bool) and seq == int(seq) else None


def _day(moment: float) -> int:
    return int(moment // 86400)


def _person(record: Document | None) -> Person | None:
    if record is None or not isinstance(record.get("user_id"), str):
        return None
    moment: Any = record.get("timestamp")
    known = isinstance(moment, (int, float)) and not isinstance(moment, bool) and 0 < moment < _YEAR_10000
    return Person(record["user_id"], float(moment) if known else None, _text(record.get("model")))


def _read_embeddings(page: Callable[[int], Sequence[Document]], after: int) -> Iterator[StoredEmbedding]:
    while records := page(after):
        for record in records:
            place, user_id, embedding = _place(record["seq"]), record.get("user_id"), record.get("embedding")
            if place is not None and isinstance(user_id, str) and isinstance(embedding, bytes):
                yield StoredEmbedding(place, user_id, _text(record.get("model")), embedding)
        places = [place for place in (_place(record["seq"]) for record in records) if place is not None]
        if not places:
            return
        after = places[-1]


def _read_log(
    page: Callable[[int], Sequence[Document]], after: int, name: str | None, keyring: Keyring
) -> Iterator[Entry]:
    # In the same query as what follows, so that nothing can be exchanged between the two.
    at = after if name is None else after - 1
    while True:
        records = page(at)
        before = at
        for record in records:
            place = _place(record["seq"])
            if place is None:
                log.warning("A record with the place %.100r is left out.", record["seq"])
                continue
            if name is not None and (place, str(record.get("user_id"))) != (after, name):
                break
            if name is None:
                yield _entry(record, place, keyring)
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


def _entry(record: Document, seq: int, keyring: Keyring) -> Entry:
    name = str(record.get("user_id"))
    erases, user_id, model = record.get("erases"), record.get("user_id"), record.get("model")
    if isinstance(erases, str):
        return Entry(seq, erases=erases, name=name)
    if record.get("embedding") is None and record.get("deleted_at") is not None:
        return Entry(seq, name=name)
    reason = "its user_id or model is no text"
    if isinstance(user_id, str) and (model is None or isinstance(model, str)):
        try:
            template = template_codec.decode(record.get("embedding"), user_id, model, keyring)
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
    return Entry(seq, _text(user_id), unreadable=True, name=name)
