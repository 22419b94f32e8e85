"""Owns a MongoDB collection with a vector index that lags: `$vectorSearch` by brute force over what the index has seen.

No server with vector search runs in tests. This stand-in answers the stage as MongoDB documents it: filtered by the
index's fields, scored by (1 + cosine) / 2, at most `limit`, each record fetched from the collection as it is now, which
is why a record may come back without what it was found by. Like MongoDB's, the index knows nothing of the last writes
until it catches up; unlike MongoDB's, it catches up when a test says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pymongo.errors import OperationFailure
from pymongo.operations import SearchIndexModel


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

    def list_search_indexes(self, name: str) -> list[dict[str, Any]]:
        return [{"name": name, "queryable": self.queryable}] if name in self._definition else []

    def create_search_index(self, model: SearchIndexModel) -> None:
        assert model.document["type"] == "vectorSearch"
        self._definition[model.document["name"]] = model.document["definition"]

    def catch_up(self, until: int | None = None) -> None:
        """Let the index see all records, or those up to a place."""
        seen = list(self._collection.find({} if until is None else {"seq": {"$lte": until}}))
        self._indexed = {
            record["_id"]: {name: record.get(name) for name in ("vector", "vector_model", "seq", "user_id")}
            for record in seen
            if "vector" in record
        }

    def aggregate(self, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        search, project = stages[0]["$vectorSearch"], stages[1]["$project"]
        self.searches.append(search)
        if not self.queryable or search["index"] not in self._definition:
            raise OperationFailure("the index is not queryable", 27)
        if self.follows:
            self.catch_up()
        filtered = {field["path"] for field in self._definition[search["index"]]["fields"] if field["type"] == "filter"}
        assert set(search["filter"]) <= filtered
        probe = np.array(search["queryVector"].as_vector().data)
        scored = []
        for identity, record in self._indexed.items():
            if not all(_fits(record[path], wanted) for path, wanted in search["filter"].items()):
                continue
            if not search.get("exact") and record["user_id"] in self.misses:
                continue
            vector = np.array(record["vector"].as_vector().data)
            scored.append((float(vector @ probe), identity))
        best = sorted(scored, key=lambda one: -one[0])[: search["limit"]]
        fetched = (self._collection.find_one({"_id": identity}, project) for _, identity in best)
        return [record for record in fetched if record is not None]


def _fits(value: Any, wanted: Any) -> bool:
    if not isinstance(wanted, dict):
        return bool(value == wanted)
    return all({"$gt": value > bound, "$lte": value <= bound}[name] for name, bound in wanted.items())
