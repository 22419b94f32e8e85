"""Creates, fills and searches MongoDB's own vector index over the records of one model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pymongo
from bson.errors import BSONError
from bson.int64 import Int64
from pymongo.errors import OperationFailure, PyMongoError
from pymongo.operations import SearchIndexModel
from pymongo.read_concern import ReadConcern

from engines.base import Template
from errors import FaceError
from store.documents import PAGE_RECORDS, entry_of, place_of
from store.encryption import NO_KEYS
from store.mongo import ENTRY_FIELDS, HAS_PLACE, PREPARE_SECONDS, MongoStore, bson_vector, vector_fields
from store.records import Document, Entry, unavailable_on

log = logging.getLogger(__name__)

_INDEX_EXISTS = 68


class VectorSearchMissingError(ValueError):
    """The MongoDB server has no vector search; the message tells the operator what to do."""


class MongoVectorIndex:
    """MongoDB's own vector index (`$vectorSearch`) over the records of one model.

    The index reads a record's `vector` and `vector_model`, copies of its `embedding` and `model`; a comparison always
    uses the originals. Making this object has the store add both to its new records. Every method but `prepare` raises
    no other error than FaceError `database_unavailable`.
    """

    def __init__(self, store: MongoStore, model: str, dimension: int, *, exact: bool) -> None:
        store.vector_model = model
        self._collection = collection = store.collection
        # The server allows `$vectorSearch` no other read concern. The index holds only what a majority has, so an
        # enrolment that a fail-over could roll back is not in it.
        self._searched = collection.with_options(read_concern=ReadConcern("local"))
        self._model = model
        self._dimension = dimension
        self._exact = exact
        self._name = f"faces_vector_{dimension}"

    def prepare(self) -> None:
        """Create the index if it is missing.

        Raises:
            VectorSearchMissingError: the server has no vector search, or refuses it.
            FaceError: `database_unavailable`.
        """
        fields: list[Document] = [
            {"type": "vector", "path": "vector", "numDimensions": self._dimension, "similarity": "cosine"},
            {"type": "filter", "path": "vector_model"},
            {"type": "filter", "path": "seq"},
        ]
        with unavailable_on(PyMongoError):
            with pymongo.timeout(PREPARE_SECONDS):
                # `count` and `held` read nothing but this index.
                has_vector = {"vector_model": {"$exists": True}}
                self._collection.create_index([("vector_model", 1), ("seq", 1)], partialFilterExpression=has_vector)
                self._collection.create_index("vector_marks", sparse=True)
                self._collection.create_index("photo_id", sparse=True)
            try:
                if not list(self._collection.list_search_indexes(self._name)):
                    # The marks describe an index that is gone.
                    self._collection.update_many({"vector_marks": {"$exists": True}}, {"$unset": {"vector_marks": ""}})
                    self._collection.create_search_index(
                        SearchIndexModel({"fields": fields}, self._name, "vectorSearch")
                    )
            except OperationFailure as error:
                if error.code == _INDEX_EXISTS:
                    return  # another process has created it meanwhile
                raise VectorSearchMissingError(
                    "SEARCH=mongodb needs a MongoDB with vector search (Atlas, or a server with mongot) and the right "
                    f"to create its index; this one answers with code {error.code}. Change that, or set SEARCH=memory."
                ) from error

    def is_queryable(self) -> bool:
        """Return whether the index has been built, so that it can be searched."""
        with unavailable_on(PyMongoError):
            return any(index.get("queryable") for index in self._collection.list_search_indexes(self._name))

    def count(self) -> int:
        """Return how many people have a vector; slow when there are many."""
        with unavailable_on(PyMongoError), pymongo.timeout(PREPARE_SECONDS):
            photos = self._collection.count_documents({"vector_model": self._model})
            added: Counter[str] = Counter()
            # Read, not counted by the server: the people with several photos are few.
            for photo in self._collection.find(
                {"photo_id": {"$exists": True}, "vector_model": self._model}, {"user_id": 1}
            ):
                added[photo["user_id"]] += 1
            people = list(added)
            for start in range(0, len(people), PAGE_RECORDS):
                first = {"user_id": {"$in": people[start : start + PAGE_RECORDS]}, "photo_id": {"$exists": False}}
                for photo in self._collection.find({**first, "vector_model": self._model}, {"user_id": 1}):
                    added[photo["user_id"]] += 1
            return photos - sum(added.values()) + len(added)

    def mark(self, name: str) -> int:
        """Return the last place that `set_mark` was given for the mark `name`, 0 when there is none."""
        with unavailable_on(PyMongoError):
            marked = self._collection.find({"vector_marks": name}, {"_id": 0, "seq": 1})
            return max((place_of(record["seq"]) or 0 for record in marked), default=0)

    def set_mark(self, name: str, place: int) -> None:
        """Remember for the next start that the index was seen to hold everybody up to `place`.

        The mark is kept in the record at that place, so that a restored backup never claims more than it has.
        """
        with unavailable_on(PyMongoError):
            marked = self._collection.update_one({"seq": Int64(place)}, {"$addToSet": {"vector_marks": name}})
            if marked.matched_count:
                earlier = {"vector_marks": name, "seq": {"$lt": place}}
                self._collection.update_many(earlier, {"$pull": {"vector_marks": name}})

    def fill(self, after: int, until: int, belongs: Callable[[Entry], bool]) -> int:
        """Add the missing vectors to the records at places `after` + 1 to `until`; return how many.

        Args:
            after: at most a few thousand places before `until`.
            until: the last place looked at.
            belongs: whether a record belongs to the model.
        """
        lacking = {
            "seq": {"$gt": after, "$lte": until},
            "embedding": {"$exists": True},
            "vector_model": {"$ne": self._model},
        }
        with unavailable_on(PyMongoError, BSONError):
            given = [entry for entry in _present(self._collection.find(lacking, ENTRY_FIELDS)) if belongs(entry)]
            # Only where the embedding still is: a person who is erased meanwhile must not get a vector again.
            filling = [
                pymongo.UpdateOne(
                    {"seq": Int64(entry.seq), "embedding": {"$exists": True}},
                    {"$set": vector_fields(entry.template, self._model)},
                )
                for entry in given
                if entry.template is not None
            ]
            if filling:
                self._collection.bulk_write(filling)
        return len(filling)

    def held(self, after: int, until: int) -> int:
        """Return the last place, `until` at most, up to which from `after` the index holds every record with a vector.

        Asks the index for exactly these places; at most a few thousand.
        """
        places = {"seq": {"$gt": after, "$lte": until}}
        with unavailable_on(PyMongoError):
            wanted = self._collection.find({"vector_model": self._model, **places}, {"_id": 0, "seq": 1})
            missing = {place_of(record["seq"]) for record in wanted}
        if missing:
            anything = np.eye(1, self._dimension, dtype=np.float32)[0]
            found = self._search(
                anything, until - after, [{"seq": {"$gt": after}}, {"seq": {"$lte": until}}], exact=True
            )
            missing -= {place_of(record["seq"]) for record in found}
        return min((place - 1 for place in missing if place is not None), default=until)

    def nearest(self, probe: Template, limit: int, held: int) -> tuple[list[Entry], bool]:
        """Search for the `limit` nearest records.

        Args:
            probe: float32[d], L2-normalised.
            limit: 1 to 10,000.
            held: the place up to which the index was seen to hold everybody.

        Returns:
            The records among them that can be read and are not erased, the nearest first; and whether there may be
            more.

        Raises:
            FaceError: `database_unavailable`, also when the index has lost what it held.
        """
        found = self._search(probe, limit, [], exact=self._exact)
        if not found:
            # For an index that does not exist, MongoDB returns no result instead of an error.
            with unavailable_on(PyMongoError):
                someone = self._collection.find_one({"vector_model": self._model, "seq": {"$gte": 1, "$lte": held}})
            if someone is not None:
                log.error("The vector index finds nobody, although it held %d places: it is gone or replaced.", held)
                raise FaceError("database_unavailable", headers={"Retry-After": "5"})
        return [entry for entry in _present(found) if entry.template is not None], len(found) == limit

    def _search(self, probe: Template, limit: int, filters: list[Document], *, exact: bool) -> list[Document]:
        stage: Document = {
            "index": self._name,
            "path": "vector",
            "queryVector": bson_vector(probe),
            "limit": limit,
            "filter": {"$and": [{"vector_model": {"$eq": self._model}}, *filters]},
            # MongoDB advises 20 candidates for each result, and allows 10,000.
            **({"exact": True} if exact else {"numCandidates": min(20 * limit, 10_000)}),
        }
        fields = {"_id": 0, **ENTRY_FIELDS}
        with unavailable_on(PyMongoError, BSONError):
            return list(self._searched.aggregate([{"$vectorSearch": stage}, {"$project": fields}]))

    def photos_of(self, user_ids: Sequence[str]) -> list[Entry]:
        """Return the records of people that are not erased, readable or not."""
        with unavailable_on(PyMongoError, BSONError):
            placed = {"user_id": {"$in": list(user_ids)}, "seq": HAS_PLACE}
            return _present(self._collection.find(placed, {"_id": 0, **ENTRY_FIELDS}))


def _present(records: Iterable[Document]) -> list[Entry]:
    """Return the enrolments among these records, readable or not; without erasures and erased records."""
    placed = ((record, place_of(record.get("seq"))) for record in records)
    # Without encryption keys: settings.py refuses TEMPLATE_KEYS with this index, which needs plain vectors.
    entries = [entry_of(record, place, NO_KEYS) for record, place in placed if place is not None]
    return [entry for entry in entries if entry.template is not None or entry.unreadable]
