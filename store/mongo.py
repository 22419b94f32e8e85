"""Owns the records in one MongoDB collection; with `mongo_vectors.py` the only importer of `pymongo`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pymongo
from bson.binary import Binary, BinaryVectorDtype
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError
from bson.int64 import Int64
from pymongo.collection import Collection
from pymongo.errors import ConfigurationError, OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

from engines.base import Template
from errors import FaceError
from store.encryption import NO_KEYS, Keyring
from store.records import (
    MAX_SEQ,
    PAGE,
    YEAR_10000,
    Document,
    Enrolment,
    Entry,
    Person,
    StoredEmbedding,
    StoreNotEmptyError,
    day_of,
    erasure_of,
    is_text,
    moment_of,
    person_of,
    place_of,
    read_embeddings,
    read_log,
    record_of,
    text_of,
    unavailable_on,
)

log = logging.getLogger(__name__)

_DUPLICATE_KEY = 11000
# Long enough to index and number a large collection of the older form; requests use `connect`'s `timeout`.
PREPARE_SECONDS = 600.0

PLACE: Mapping[str, Any] = {"$gte": 1, "$lt": MAX_SEQ}
# Whatever else `seq` may be: absent, null, a text, negative, NaN.
_UNPLACED: Mapping[str, Any] = {"$nor": [{"seq": PLACE}]}
_DAY: Mapping[str, Any] = {"$gte": 1, "$lt": day_of(YEAR_10000)}
# Among the notes of who was seen: that the collection is being filled.
_FILLING = "(filling)"
# What an entry of the log is read from.
FIELDS: Mapping[str, Any] = dict.fromkeys(("user_id", "embedding", "model", "seq", "erases", "deleted_at"), 1)


def connect(uri: str, database: str, collection: str, *, timeout: float, keyring: Keyring = NO_KEYS) -> MongoStore:
    """Return the records in a collection, not yet connected: call `prepare` next.

    Args:
        uri: a MongoDB connection string.
        database, collection: their names.
        timeout: seconds after which any one operation fails.
        keyring: seals the templates that are stored, and opens those that are.

    Raises:
        ValueError: the connection string or a name is not valid. The message repeats nothing of it.
        FaceError: `database_unavailable`, the name of a mongodb+srv string cannot be looked up.
    """
    try:
        client: pymongo.MongoClient[Document] = pymongo.MongoClient(uri, timeoutMS=int(timeout * 1000))
        found = client[database].get_collection(
            collection,
            # One text or date that BSON cannot express must not make a whole page of records unreadable.
            CodecOptions(unicode_decode_error_handler="replace", datetime_conversion=DatetimeConversion.DATETIME_AUTO),
            # An entry that a fail-over could take back must neither be acknowledged nor applied.
            write_concern=WriteConcern("majority", j=True),
            read_concern=ReadConcern("majority"),
            read_preference=ReadPreference.PRIMARY,
        )
    except (PyMongoError, ValueError, TypeError) as error:
        if isinstance(error, ConfigurationError) and uri.startswith("mongodb+srv://"):
            # The driver looks such a name up at once, and words an outage of the name server like a mistake.
            raise FaceError("database_unavailable", headers={"Retry-After": "5"}) from error
        # `from None`: the driver's messages quote parts of the string, which may be the password.
        what = "MONGO_URI" if isinstance(error, (ConfigurationError, ValueError)) else "MONGO_DB or MONGO_COLLECTION"
        raise ValueError(f"{what} is not valid ({type(error).__name__}).") from None
    hosts = uri.partition("://")[2].partition("/")[0].partition("?")[0].rpartition("@")[2]
    return MongoStore(found, f"MongoDB {database}.{collection} at {hosts}", keyring)


class MongoStore:
    """`EnrolmentLog` on one MongoDB collection.

    The collection comes with its concerns set, as `connect` does; `description` is for people. Of the model that
    `vector_model` names, if any, new records carry what MongoDB's own vector index searches.
    """

    def __init__(
        self, collection: Collection[Document], description: str = "MongoDB", keyring: Keyring = NO_KEYS
    ) -> None:
        self.collection = collection
        self._description = description
        self._keyring = keyring
        self._seen = collection.database.get_collection(
            f"{collection.name}_seen",
            write_concern=collection.write_concern,
            read_concern=collection.read_concern,
            read_preference=collection.read_preference,
        )
        self.vector_model: str | None = None

    def prepare(self) -> None:
        self.ping()  # under the short timeout: a server that is down is known at once
        with unavailable_on(PyMongoError, BSONError), pymongo.timeout(PREPARE_SECONDS):
            # Sparse, so that records of the older form have no place rather than the same one.
            self.collection.create_index("seq", unique=True, sparse=True)
            self.collection.create_index("request_key", sparse=True)
            self.collection.create_index("erases", sparse=True)
            try:
                self.collection.create_index("user_id", unique=True)
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
        placed = self.collection.find({"seq": PLACE}, {"_id": 0, "seq": 1}).sort("seq", -1).limit(10)
        start = max((place_of(record["seq"]) or 0 for record in placed), default=0) + 1
        unplaced = list(self.collection.find(_UNPLACED, {"seq": 1}).sort("_id", 1).limit(PAGE))
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
            self.collection.bulk_write(numbering, ordered=True)
        except OperationFailure as error:
            log.info("Stopped there (code %s): another server has given these places.", error.code)
        if self.collection.find_one({"seq": start}, {"_id": 1}) is None:
            raise OperationFailure("older records cannot be given places")
        return True

    def entries(self, after: int, name: str | None = None) -> Iterator[Entry]:
        return read_log(self._page, after, name, self._keyring)

    def _page(self, after: int) -> list[Document]:
        with unavailable_on(PyMongoError, BSONError):
            places = {"seq": {"$gt": after, "$lt": MAX_SEQ}}
            return list(self.collection.find(places, {"_id": 0, **FIELDS}).sort("seq", 1).limit(PAGE).batch_size(PAGE))

    def append(self, seq: int, enrolments: Sequence[Enrolment]) -> int:
        records = [record_of(place, enrolment, self._keyring) for place, enrolment in enumerate(enrolments, seq)]
        for record, enrolment in zip(records, enrolments, strict=True):
            if enrolment.model == self.vector_model:
                record.update(vector_fields(enrolment.template, enrolment.model))
        return self._insert(records)

    def erase(self, seq: int, user_id: str) -> bool:
        if not self._insert([erasure_of(user_id, seq)]):
            return False
        self.finish_erasures(user_id)
        return True

    def _insert(self, records: list[Document]) -> int:
        """Insert records at consecutive places, up to the first that is taken; return how many."""
        # BSON would take the small ones for 32 bits.
        records = [{**record, "seq": Int64(record["seq"])} for record in records]
        with unavailable_on(PyMongoError, BSONError):
            try:
                # Ordered, so that it ends at the first place that is taken: no holes.
                self.collection.insert_many(records, ordered=True)
            except OperationFailure as failure:
                outcome = failure.details or {}
                refused = outcome.get("writeErrors")
                if refused and refused[0].get("code") == _DUPLICATE_KEY and not outcome.get("writeConcernErrors"):
                    return int(refused[0]["index"])
                # Refused for a reason without a number, or not confirmed in time: who has the places decides.
                ours = {record["seq"]: record["user_id"] for record in records}
                held = self.collection.find({"seq": {"$in": list(ours)}}, {"_id": 0, "seq": 1, "user_id": 1})
                holders = {holder["seq"]: holder.get("user_id") for holder in held}
                stored = next((at for at, seq in enumerate(ours) if holders.get(seq) != ours[seq]), len(ours))
                if stored < len(ours) and records[stored]["seq"] not in holders:
                    raise
                return stored
            return len(records)

    def finish_erasures(self, user_id: str | None = None) -> None:
        with unavailable_on(PyMongoError, BSONError):
            erasures = self.collection.find(
                {"erases": {"$exists": True} if user_id is None else user_id}, {"_id": 0, "erases": 1}
            )
            # Texts only: a pattern among the values of `$in` would erase whoever it matches.
            erased = [erasure["erases"] for erasure in erasures if is_text(erasure["erases"])]
            still_there = [{"embedding": {"$exists": True}}, {"vector": {"$exists": True}}]
            for start in range(0, len(erased), PAGE):
                self._seen.delete_many({"_id": {"$in": erased[start : start + PAGE]}})
                self.collection.update_many(
                    {"user_id": {"$in": erased[start : start + PAGE]}, "$or": still_there},
                    {
                        "$unset": {"embedding": "", "request_key": "", "vector": "", "vector_model": ""},
                        "$set": {"deleted_at": time.time()},
                    },
                )

    def last_place(self) -> int:
        with unavailable_on(PyMongoError, BSONError):
            if self._seen.find_one({"_id": _FILLING}) is not None:
                log.critical(
                    "A backup is being restored into this collection, or that was cut off: nothing is decided before "
                    "`python app.py restore FILE --replace` has come to its end."
                )
                raise FaceError("not_ready", headers={"Retry-After": "60"})
            last = self.collection.find_one({"seq": PLACE}, {"_id": 0, "seq": 1}, sort=[("seq", -1)])
        return place_of(last["seq"]) or 0 if last else 0

    def checkpoint(self, seq: int) -> str:
        with unavailable_on(PyMongoError, BSONError):
            record = self.collection.find_one({"seq": seq}, {"_id": 0, "user_id": 1}) or {}
            count = self.collection.count_documents({"seq": {"$gte": 1, "$lte": seq}})
        return f"{count} {record.get('user_id')}"

    def erasures(self, until: int) -> list[str]:
        with unavailable_on(PyMongoError, BSONError):
            erasures = self.collection.find({"erases": {"$exists": True}, "seq": {"$lte": until}}, {"erases": 1})
            return [erasure["erases"] for erasure in erasures if is_text(erasure["erases"])]

    def find_request(self, request_key: str, since: float) -> str | None:
        with unavailable_on(PyMongoError, BSONError):
            record = self.collection.find_one(
                {"request_key": request_key, "timestamp": {"$gte": since}}, {"_id": 0, "user_id": 1}
            )
        return text_of(record.get("user_id")) if record else None

    def find_person(self, user_id: str) -> Person | None:
        alive = {"user_id": user_id, "embedding": {"$exists": True}, "deleted_at": {"$exists": False}}
        with unavailable_on(PyMongoError, BSONError):
            return person_of(self.collection.find_one(alive, {"_id": 0, "user_id": 1, "timestamp": 1, "model": 1}))

    def embeddings(self, after: int) -> Iterator[StoredEmbedding]:
        return read_embeddings(self._page, after)

    def replace_embeddings(self, changes: Sequence[tuple[StoredEmbedding, bytes]]) -> int:
        places = {"seq": {"$in": [stored.seq for stored, _ in changes]}}
        with unavailable_on(PyMongoError, BSONError):
            found = self.collection.find(places, {"_id": 0, "seq": 1, "user_id": 1, "embedding": 1})
            now = {place_of(record["seq"]): (record.get("user_id"), record.get("embedding")) for record in found}
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
            return self.collection.bulk_write(replacing, ordered=False).modified_count if replacing else 0

    def forget_overwritten(self) -> None:
        """Do nothing: what the server's journal and oplog still hold is its own affair."""

    def note_seen(self, user_ids: Iterable[str], day: int) -> None:
        self._note((user_id, day) for user_id in user_ids)

    def _note(self, notes: Iterable[tuple[str, int]]) -> None:
        left = iter(notes)
        while page := dict(islice(left, PAGE)):
            noting = [pymongo.UpdateOne({"_id": one}, {"$set": {"day": day}}, upsert=True) for one, day in page.items()]
            with unavailable_on(PyMongoError, BSONError):
                self._seen.bulk_write(noting, ordered=False)
                # Afterwards: who is erased from now on loses the note with the erasure.
                erased = [one["erases"] for one in self.collection.find({"erases": {"$in": list(page)}}, {"erases": 1})]
                if erased:
                    self._seen.delete_many({"_id": {"$in": erased}})

    def unseen(self, since: float) -> Iterator[str]:
        after = 0
        while True:
            asked = {"seq": {"$gt": after}, "embedding": {"$exists": True}, "timestamp": {"$lt": since}}
            with unavailable_on(PyMongoError, BSONError):
                found = list(self.collection.find(asked, {"user_id": 1, "seq": 1}).sort("seq", 1).limit(PAGE))
                people = [record["user_id"] for record in found if is_text(record.get("user_id"))]
                noted = self._seen.find({"_id": {"$in": people}, "day": {"$gte": day_of(since)}}, {"_id": 1})
                seen = {record["_id"] for record in noted}
            yield from (one for one in people if one not in seen)
            if not found:
                return
            after = found[-1]["seq"]

    def newest_activity(self) -> float | None:
        with unavailable_on(PyMongoError, BSONError):
            placed = {"seq": PLACE, "timestamp": {"$gt": 0, "$lt": YEAR_10000}}
            enrolled = self.collection.find_one(placed, {"timestamp": 1}, sort=[("seq", -1)]) or {}
            noted = self._seen.find_one({"day": _DAY}, {"day": 1}, sort=[("day", -1)]) or {}
        moments = (moment_of(enrolled.get("timestamp")), (place_of(noted.get("day")) or 0) * 86400.0)
        return max(filter(None, moments), default=None)

    def documents(self, until: int) -> Iterator[Document]:
        # What was in the index of this database says nothing about that of another, and the vector is the template.
        left_out = {"_id": 0, "vector": 0, "vector_model": 0, "vector_marks": 0}
        after = 0
        while after < until:
            with unavailable_on(PyMongoError, BSONError):
                places = {"seq": {"$gt": after, "$lte": until}}
                page = list(self.collection.find(places, left_out).sort("seq", 1).limit(500))
            yield from (record for record in page if place_of(record["seq"]) is not None)
            if not page:
                return
            after = page[-1]["seq"]

    def notes(self) -> Iterator[tuple[str, int]]:
        with unavailable_on(PyMongoError, BSONError):
            for note in self._seen.find({"day": _DAY}).batch_size(PAGE):
                day = place_of(note["day"])
                if is_text(note["_id"]) and day is not None:
                    yield note["_id"], day

    def fill(self, documents: Iterable[Document], notes: Iterable[tuple[str, int]], *, replace: bool) -> int:
        with unavailable_on(PyMongoError, BSONError), pymongo.timeout(PREPARE_SECONDS):
            if not replace and self.collection.find_one({}) is not None:
                raise StoreNotEmptyError("the store is not empty")
            self._seen.update_one({"_id": _FILLING}, {"$set": {"since": time.time()}}, upsert=True)
            if replace:
                self.collection.delete_many({})
                self._seen.delete_many({"_id": {"$ne": _FILLING}})
        count = 0
        documents = iter(documents)
        while page := list(islice(documents, 500)):
            inserted = self._insert(page)
            count += inserted
            if inserted < len(page):
                return count
        self._note(notes)
        with unavailable_on(PyMongoError, BSONError):
            self._seen.delete_one({"_id": _FILLING})
        return count

    def ping(self) -> None:
        with unavailable_on(PyMongoError):
            self.collection.database.command("ping")

    def describe(self) -> str:
        return self._description

    def close(self) -> None:
        self.collection.database.client.close()


def vector_fields(template: Template, model: str) -> Document:
    return {"vector": bson_vector(template), "vector_model": model}


def bson_vector(vector: Template) -> Binary:
    return Binary.from_vector(vector.tolist(), BinaryVectorDtype.FLOAT32)
