"""Keeps the records in one MongoDB collection; only this file and `mongo_vectors.py` import `pymongo`."""

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
from pymongo.errors import ConfigurationError, InvalidURI, OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

from engines.base import Template
from errors import FaceError
from store.challenges import MAX_KEPT, Challenge, in_time, is_fresh, over
from store.documents import (
    DAY_S,
    MAX_SEQ,
    PAGE_RECORDS,
    YEAR_10000_S,
    day_of,
    erasure_of,
    find_in,
    is_text,
    name_of,
    person_of,
    place_of,
    read_embeddings,
    read_log,
    record_of,
    removal_of,
    request_keys_of,
    require_place,
    timestamp_of,
)
from store.encryption import NO_KEYS, Keyring
from store.records import Document, Enrolment, Entry, Person, StoredEmbedding, StoreNotEmptyError, unavailable_on

log = logging.getLogger(__name__)

_DUPLICATE_KEY = 11000
# Long enough to index and number a large collection of the older form; requests use `connect`'s `timeout`.
PREPARE_SECONDS = 600.0

HAS_PLACE: Mapping[str, Any] = {"$gte": 1, "$lt": MAX_SEQ}
# `seq` may be anything else: absent, null, a text, negative, NaN.
_HAS_NO_PLACE: Mapping[str, Any] = {"$nor": [{"seq": HAS_PLACE}]}
_IS_DAY: Mapping[str, Any] = {"$gte": 1, "$lt": day_of(YEAR_10000_S)}
# The `_id` of a note, among those of who was seen: `fill` has begun and has not finished.
_FILLING = "(filling)"
# The fields that an entry of the log is read from.
ENTRY_FIELDS: Mapping[str, Any] = dict.fromkeys(
    ("user_id", "embedding", "model", "seq", "erases", "deleted_at", "photo_id", "removes"), 1
)


def connect(uri: str, database: str, collection: str, *, timeout: float, keyring: Keyring = NO_KEYS) -> MongoStore:
    """Return the store of a collection, not yet connected: call `prepare` next.

    Args:
        uri: a MongoDB connection string.
        database, collection: their names.
        timeout: seconds after which any one operation fails.
        keyring: seals and opens the stored templates.

    Raises:
        ValueError: the connection string or a name is not valid. The message quotes no part of it.
        FaceError: `database_unavailable`, the name in a mongodb+srv string cannot be looked up.
    """
    try:
        client: pymongo.MongoClient[Document] = pymongo.MongoClient(uri, timeoutMS=int(timeout * 1000))
        found = client[database].get_collection(
            collection,
            # One text or date that cannot be decoded must not make a whole page of records unreadable.
            CodecOptions(unicode_decode_error_handler="replace", datetime_conversion=DatetimeConversion.DATETIME_AUTO),
            # A fail-over can roll back an entry that no majority has: it is neither acknowledged nor applied.
            write_concern=WriteConcern("majority", j=True),
            read_concern=ReadConcern("majority"),
            read_preference=ReadPreference.PRIMARY,
        )
    except (PyMongoError, ValueError, TypeError) as error:
        unresolved = isinstance(error, ConfigurationError) and not isinstance(error, InvalidURI)
        if unresolved and uri.startswith("mongodb+srv://"):
            # The driver looks such a name up at once, and reports an outage of the name server as a wrong setting.
            raise FaceError("database_unavailable", headers={"Retry-After": "5"}) from error
        # `from None`: the driver's messages quote parts of the string, which may be the password.
        what = "MONGO_URI" if isinstance(error, (ConfigurationError, ValueError)) else "MONGO_DB or MONGO_COLLECTION"
        raise ValueError(f"{what} is not valid ({type(error).__name__}).") from None
    hosts = uri.partition("://")[2].partition("/")[0].partition("?")[0].rpartition("@")[2]
    return MongoStore(found, f"MongoDB {database}.{collection} at {hosts}", keyring)


class MongoStore:
    """`EnrolmentLog` on one MongoDB collection.

    Args:
        collection: with its read and write concerns set, as `connect` does.
        description: names the store for people.
        keyring: seals and opens the stored templates.

    Attributes:
        vector_model: new records of this model carry the vector that MongoDB's own index searches; None for none.
    """

    def __init__(
        self, collection: Collection[Document], description: str = "MongoDB", keyring: Keyring = NO_KEYS
    ) -> None:
        self.collection = collection
        self._description = description
        self._keyring = keyring
        self._seen = self._beside("seen")
        self._challenges = self._beside("challenges")
        self.vector_model: str | None = None

    def _beside(self, name: str) -> Collection[Document]:
        """Return another collection, next to that of the records and with its concerns."""
        return self.collection.database.get_collection(
            f"{self.collection.name}_{name}",
            write_concern=self.collection.write_concern,
            read_concern=self.collection.read_concern,
            read_preference=self.collection.read_preference,
        )

    def prepare(self) -> None:
        self.ping()  # with the short timeout, so that a server that is down is reported at once
        with unavailable_on(PyMongoError, BSONError), pymongo.timeout(PREPARE_SECONDS):
            # Sparse, so that records of the older form have no place instead of all having the same one.
            self.collection.create_index("seq", unique=True, sparse=True)
            self.collection.create_index("request_key", sparse=True)
            self.collection.create_index("erases", sparse=True)
            self._challenges.create_index("issued_at")
            self._challenges.create_index([("owner", 1), ("issued_at", -1)])
            self.collection.create_index("removes", sparse=True)
            for name, index in self.collection.index_information().items():
                if index["key"] == [("user_id", 1)] and index.get("unique"):
                    # Made by an earlier version, in which a person had one photo.
                    self.collection.drop_index(name)
            self.collection.create_index("user_id")
            while self._number_a_page():
                pass
            self.finish_erasures()

    def _number_a_page(self) -> bool:
        """Give up to PAGE_RECORDS unplaced records the next places; False when there are none.

        Processes that start together agree: each reads the last place first and the records afterwards, in the same
        order. So two processes give a record the same place, or the server refuses one of them, which reads again.
        """
        placed = self.collection.find({"seq": HAS_PLACE}, {"_id": 0, "seq": 1}).sort("seq", -1).limit(10)
        start = max((place_of(record["seq"]) or 0 for record in placed), default=0) + 1
        unplaced = list(self.collection.find(_HAS_NO_PLACE, {"seq": 1}).sort("_id", 1).limit(PAGE_RECORDS))
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
            log.info("Stopped there (code %s): another process has given these places.", error.code)
        if self.collection.find_one({"seq": start}, {"_id": 1}) is None:
            raise OperationFailure("the older records did not get their places")
        return True

    def entries(self, after: int, name: str | None = None) -> Iterator[Entry]:
        return read_log(self._page, after, name, self._keyring)

    def _page(self, after: int) -> list[Document]:
        with unavailable_on(PyMongoError, BSONError):
            places = {"seq": {"$gt": after, "$lt": MAX_SEQ}}
            found = self.collection.find(places, {"_id": 0, **ENTRY_FIELDS}).sort("seq", 1)
            return list(found.limit(PAGE_RECORDS).batch_size(PAGE_RECORDS))

    def append(self, seq: int, enrolments: Sequence[Enrolment]) -> int:
        records = [record_of(place, enrolment, self._keyring) for place, enrolment in enumerate(enrolments, seq)]
        for record, enrolment in zip(records, enrolments, strict=True):
            if enrolment.model == self.vector_model:
                record.update(vector_fields(enrolment.template, enrolment.model))
        stored = self._insert(records)
        for enrolment in enrolments[:stored]:
            if enrolment.removes is not None:
                self.finish_erasures(place=enrolment.removes)
        return stored

    def erase(self, seq: int, user_id: str) -> bool:
        if not self._insert([erasure_of(user_id, seq)]):
            return False
        self.finish_erasures(user_id)
        return True

    def remove_photo(self, seq: int, place: int) -> bool:
        if not self._insert([removal_of(place, seq)]):
            return False
        self.finish_erasures(place=place)
        return True

    def _insert(self, records: list[Document]) -> int:
        """Insert records at consecutive places, up to the first that is taken; return how many."""
        require_place(records[-1]["seq"])
        # PyMongo would store small numbers in 32 bits.
        records = [{**record, "seq": Int64(record["seq"])} for record in records]
        with unavailable_on(PyMongoError, BSONError):
            try:
                # Ordered, so that inserting stops at the first place that is taken: no holes.
                self.collection.insert_many(records, ordered=True)
            except OperationFailure as failure:
                outcome = failure.details or {}
                refused = outcome.get("writeErrors")
                if refused and refused[0].get("code") == _DUPLICATE_KEY and not outcome.get("writeConcernErrors"):
                    return int(refused[0]["index"])
                # Refused for another reason, or not confirmed in time: see which process has the places now.
                ours = {record["seq"]: name_of(record) for record in records}
                fields = {"_id": 0, "seq": 1, "user_id": 1, "photo_id": 1}
                held = self.collection.find({"seq": {"$in": list(ours)}}, fields)
                holders = {holder["seq"]: name_of(holder) for holder in held}
                stored = next((at for at, seq in enumerate(ours) if holders.get(seq) != ours[seq]), len(ours))
                if stored < len(ours) and records[stored]["seq"] not in holders:
                    raise
                return stored
            return len(records)

    def finish_erasures(self, user_id: str | None = None, place: int | None = None) -> None:
        with unavailable_on(PyMongoError, BSONError):
            if place is None:
                erasures = self.collection.find(
                    {"erases": {"$exists": True} if user_id is None else user_id}, {"_id": 0, "erases": 1}
                )
                # Texts only: a regular expression among the values of `$in` would erase everybody it matches.
                erased = [erasure["erases"] for erasure in erasures if is_text(erasure["erases"])]
                self._wipe("user_id", erased)
            if user_id is None:
                self._wipe("seq", self.removals(MAX_SEQ) if place is None else [place])

    def _wipe(self, field: str, values: Sequence[object]) -> None:
        """Remove the embeddings of the records with these values of `user_id` or `seq`."""
        still_there = [{"embedding": {"$exists": True}}, {"vector": {"$exists": True}}]
        for start in range(0, len(values), PAGE_RECORDS):
            page = {"$in": values[start : start + PAGE_RECORDS]}
            if field == "user_id":
                self._seen.delete_many({"_id": page})
            self.collection.update_many(
                {field: page, "$or": still_there},
                {
                    "$unset": dict.fromkeys(("embedding", "request_key", "quality", "vector", "vector_model"), ""),
                    "$set": {"deleted_at": time.time()},
                },
            )

    def last_place(self) -> int:
        with unavailable_on(PyMongoError, BSONError):
            if self._seen.find_one({"_id": _FILLING}) is not None:
                log.critical(
                    "A backup is being restored into this collection, or a restore was cut off. Nothing is decided "
                    "until `python app.py restore FILE --replace` has finished."
                )
                raise FaceError("not_ready", headers={"Retry-After": "60"})
            last = self.collection.find_one({"seq": HAS_PLACE}, {"_id": 0, "seq": 1}, sort=[("seq", -1)])
        return place_of(last["seq"]) or 0 if last else 0

    def checkpoint(self, seq: int) -> str:
        with unavailable_on(PyMongoError, BSONError):
            record = self.collection.find_one({"seq": seq}, {"_id": 0, "user_id": 1, "photo_id": 1}) or {}
            count = self.collection.count_documents({"seq": {"$gte": 1, "$lte": seq}})
        return f"{count} {name_of(record)}"

    def erasures(self, until: int) -> list[str]:
        with unavailable_on(PyMongoError, BSONError):
            erasures = self.collection.find({"erases": {"$exists": True}, "seq": {"$lte": until}}, {"erases": 1})
            return [erasure["erases"] for erasure in erasures if is_text(erasure["erases"])]

    def removals(self, until: int) -> list[int]:
        with unavailable_on(PyMongoError, BSONError):
            removals = self.collection.find({"removes": {"$exists": True}, "seq": {"$lte": until}}, {"removes": 1})
            return [place for removal in removals if (place := place_of(removal["removes"])) is not None]

    def find_request(self, request_key: str, since: float) -> str | None:
        with unavailable_on(PyMongoError, BSONError):
            first, end = request_keys_of(request_key)
            records = self.collection.find(
                {"request_key": {"$gte": first, "$lt": end}, "timestamp": {"$gte": since}},
                {"_id": 0, "user_id": 1, "request_key": 1},
            )
            return find_in(list(records), request_key)

    def find_person(self, user_id: str) -> Person | None:
        fields = dict.fromkeys(("seq", "timestamp", "model", "embedding", "deleted_at", "quality"), 1)
        with unavailable_on(PyMongoError, BSONError):
            return person_of(user_id, self.collection.find({"user_id": user_id, "seq": HAS_PLACE}, fields).sort("seq"))

    def embeddings(self, after: int) -> Iterator[StoredEmbedding]:
        return read_embeddings(self._page, after)

    def replace_embeddings(self, changes: Sequence[tuple[StoredEmbedding, bytes]]) -> int:
        places = {"seq": {"$in": [stored.seq for stored, _ in changes]}}
        with unavailable_on(PyMongoError, BSONError):
            found = self.collection.find(places, {"_id": 0, "seq": 1, "user_id": 1, "embedding": 1})
            now = {place_of(record["seq"]): (record.get("user_id"), record.get("embedding")) for record in found}
            replacing = [
                pymongo.UpdateOne(
                    # A person may be erased in between; then there is no embedding to replace.
                    {"seq": Int64(stored.seq), "user_id": stored.user_id, "embedding": {"$exists": True}},
                    # The vector is an unsealed copy of the template.
                    {"$set": {"embedding": embedding}, "$unset": {"vector": "", "vector_model": ""}},
                )
                for stored, embedding in changes
                if now.get(stored.seq) == (stored.user_id, stored.embedding)
            ]
            return self.collection.bulk_write(replacing, ordered=False).modified_count if replacing else 0

    def forget_overwritten(self) -> None:
        """Do nothing: the server itself controls its journal and oplog."""

    def note_seen(self, user_ids: Iterable[str], day: int) -> None:
        self._note((user_id, day) for user_id in user_ids)

    def _note(self, notes: Iterable[tuple[str, int]]) -> None:
        left = iter(notes)
        while page := dict(islice(left, PAGE_RECORDS)):
            noting = [pymongo.UpdateOne({"_id": one}, {"$set": {"day": day}}, upsert=True) for one, day in page.items()]
            with unavailable_on(PyMongoError, BSONError):
                self._seen.bulk_write(noting, ordered=False)
                # After writing: `finish_erasures` removes the notes of people who are erased from now on.
                erased = [one["erases"] for one in self.collection.find({"erases": {"$in": list(page)}}, {"erases": 1})]
                if erased:
                    self._seen.delete_many({"_id": {"$in": erased}})

    def unseen(self, since: float) -> Iterator[str]:
        after = 0
        while True:
            asked = {"seq": {"$gt": after}, "embedding": {"$exists": True}, "timestamp": {"$lt": since}}
            with unavailable_on(PyMongoError, BSONError):
                found = list(self.collection.find(asked, {"user_id": 1, "seq": 1}).sort("seq", 1).limit(PAGE_RECORDS))
                people = self._last_photo_before(since, found)
                noted = self._seen.find({"_id": {"$in": people}, "day": {"$gte": day_of(since)}}, {"_id": 1})
                seen = {record["_id"] for record in noted}
            yield from (one for one in people if one not in seen)
            if not found:
                return
            after = found[-1]["seq"]

    def _last_photo_before(self, since: float, found: Sequence[Document]) -> list[str]:
        """Return the people of some records, each of them at their first photo, without those with a photo since then.

        To add a photo is a verification.
        """
        people = {record["user_id"] for record in found if is_text(record.get("user_id"))}
        of_them = {"user_id": {"$in": list(people)}, "seq": HAS_PLACE, "embedding": {"$exists": True}}
        first: dict[str, object] = {}
        for photo in self.collection.find(of_them, {"user_id": 1, "seq": 1, "timestamp": 1}).sort("seq", -1):
            first[photo["user_id"]] = photo["seq"]
            if (timestamp_of(photo.get("timestamp")) or since) >= since:
                people.discard(photo["user_id"])
        return [one["user_id"] for one in found if one.get("user_id") in people and first[one["user_id"]] == one["seq"]]

    def newest_activity(self) -> float | None:
        with unavailable_on(PyMongoError, BSONError):
            placed = {"seq": HAS_PLACE, "timestamp": {"$gt": 0, "$lt": YEAR_10000_S}}
            enrolled = self.collection.find_one(placed, {"timestamp": 1}, sort=[("seq", -1)]) or {}
            noted = self._seen.find_one({"day": _IS_DAY}, {"day": 1}, sort=[("day", -1)]) or {}
        times = (timestamp_of(enrolled.get("timestamp")), (place_of(noted.get("day")) or 0) * DAY_S)
        return max(filter(None, times), default=None)

    def add_challenge(self, challenge: Challenge) -> None:
        first, last = over(time.time())
        kept = {
            "_id": challenge.challenge_id,
            "owner": challenge.owner,
            "steps": list(challenge.steps),
            "issued_at": challenge.issued_at,
            "used": False,  # then the moment, in seconds since the epoch
        }
        with unavailable_on(PyMongoError, BSONError):
            self._challenges.delete_many({"$or": [{"issued_at": {"$lt": first}}, {"issued_at": {"$gt": last}}]})
            too_many = self._challenges.find({"owner": challenge.owner}, {"_id": 1}).sort("issued_at", -1)
            oldest = [one["_id"] for one in too_many.skip(MAX_KEPT - 1)]
            if oldest:
                self._challenges.delete_many({"_id": {"$in": oldest}})
            self._challenges.insert_one(kept)

    def use_challenge(self, challenge_id: str, owner: str) -> Challenge:
        ours, now = {"_id": challenge_id, "owner": owner}, time.time()
        first, last = in_time(now)
        usable = {**ours, "used": False, "issued_at": {"$gte": first, "$lte": last}}
        with unavailable_on(PyMongoError, BSONError):
            found = self._challenges.find_one_and_update(usable, {"$set": {"used": now}})
            if found is None:
                used = self._challenges.find_one({**ours, "used": {"$ne": False}}, {"_id": 1}) is not None
                raise FaceError("challenge_used" if used else "challenge_expired")
        return Challenge(challenge_id, owner, tuple(found["steps"]), found["issued_at"])

    def is_in_use(self, challenge_id: str, owner: str) -> bool:
        with unavailable_on(PyMongoError, BSONError):
            found = self._challenges.find_one({"_id": challenge_id, "owner": owner}, {"used": 1})
        return found is not None and is_fresh(found["used"], time.time())

    def give_back(self, challenge_id: str, owner: str) -> None:
        with unavailable_on(PyMongoError, BSONError):
            self._challenges.update_one({"_id": challenge_id, "owner": owner}, {"$set": {"used": False}})

    def documents(self, until: int) -> Iterator[Document]:
        # The marks describe this database's own index, and the vector is only a copy of the template.
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
            for note in self._seen.find({"day": _IS_DAY}).batch_size(PAGE_RECORDS):
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
    """Return the fields that MongoDB's vector index reads."""
    return {"vector": bson_vector(template), "vector_model": model}


def bson_vector(vector: Template) -> Binary:
    """Return float32[d] as a BSON vector."""
    return Binary.from_vector(vector.tolist(), BinaryVectorDtype.FLOAT32)
