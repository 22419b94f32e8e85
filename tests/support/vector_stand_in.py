"""A MongoDB collection with a vector index that lags: `$vectorSearch` compares with every vector the index has seen.

No server with vector search runs in tests. This stand-in answers the stage as MongoDB documents it: filtered by the
index's fields, at most `limit`, each record fetched from the collection as it is now, which is why a record may come
back without what it was found by. Nor does it forgive what MongoDB does not: another read concern than local, a number
of candidates beside `exact`, a field that is no filter of the index. An index that does not exist finds nothing, and
says no word of it. Like MongoDB's, the index knows nothing of the last writes until it catches up; unlike MongoDB's, it
catches up when a test says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pymongo.errors import OperationFailure
from pymongo.operations import SearchIndexModel
from pymongo.read_concern import ReadConcern

INDEXED = ("vector", "vector_model", "seq", "user_id")


class VectorCollection:
    """A mongomock collection with a vector index.

    Attributes:
        follows: whether the index catches up before every search.
        queryable: whether the index's first building is over.
        misses: user_ids that an approximate search does not come across.
        searches: the `$vectorSearch` stages asked for.
    """

    def __init__(self, collection: Any) -> None:
        self._collection = collection
        self._definition: dict[str, Any] = {}
        self._indexed: dict[Any, dict[str, Any]] = {}
        self.follows = True
        self.queryable = True
        self.misses: set[str] = set()
        self.searches: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collection, name)

    def with_options(self, read_concern: ReadConcern) -> ReadWith:
        return ReadWith(self, read_concern)

    def list_search_indexes(self, name: str) -> list[dict[str, Any]]:
        return [{"name": name, "queryable": self.queryable}] if name in self._definition else []

    def create_search_index(self, model: SearchIndexModel) -> None:
        assert model.document["type"] == "vectorSearch"
        self._definition[model.document["name"]] = model.document["definition"]

    def lose_index(self) -> None:
        self._definition, self._indexed = {}, {}

    def catch_up(self, until: int | None = None) -> None:
        """Let the index see all records, or those up to a place."""
        seen = self._collection.find({} if until is None else {"seq": {"$lte": until}}, dict.fromkeys(INDEXED, 1))
        self._indexed = {record["_id"]: record for record in seen if "vector" in record}

    def search(self, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        search, project = stages[0]["$vectorSearch"], stages[1]["$project"]
        self.searches.append(search)
        if search["index"] not in self._definition:
            return []
        if not self.queryable:
            raise OperationFailure("cannot query the index while in state INITIAL_SYNC")
        if self.follows:
            self.catch_up()
        assert ("exact" in search) != ("numCandidates" in search)
        assert search["limit"] <= search.get("numCandidates", search["limit"]) <= 10_000
        filtered = {field["path"] for field in self._definition[search["index"]]["fields"] if field["type"] == "filter"}
        conditions = [(path, test) for one in search["filter"]["$and"] for path, test in one.items()]
        assert {path for path, _ in conditions} <= filtered
        found = [
            record
            for record in self._indexed.values()
            if all(_fits(record[path], test) for path, test in conditions)
            and (search.get("exact") or record["user_id"] not in self.misses)
        ]
        if not found:
            return []
        cosines = (
            np.array([record["vector"].as_vector().data for record in found]) @ search["queryVector"].as_vector().data
        )
        best = [found[at]["_id"] for at in np.argsort(-cosines, kind="stable")[: search["limit"]]]
        fetched = (self._collection.find_one({"_id": identity}, project) for identity in best)
        return [record for record in fetched if record is not None]


class ReadWith:
    """The collection, read with a concern of its own."""

    def __init__(self, collection: VectorCollection, read_concern: ReadConcern) -> None:
        self._collection = collection
        self._read_concern = read_concern

    def aggregate(self, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self._read_concern.level != "local":
            raise OperationFailure("$vectorSearch cannot run with a readConcern other than 'local'", 72)
        return self._collection.search(stages)


def _fits(value: Any, test: dict[str, Any]) -> bool:
    compare = {"$eq": value.__eq__, "$gt": value.__gt__, "$lte": value.__le__}
    return all(compare[name](bound) is True for name, bound in test.items())
