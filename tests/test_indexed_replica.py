"""Owns what SEARCH=mongodb promises: nobody is missed because an index lags, and nobody erased is found in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mongomock
import mongomock.collection
import numpy as np
import pytest
from conftest import _BulkBuilder
from pymongo.errors import AutoReconnect, OperationFailure
from test_gallery import SAME_FACE, D, a_face, another_photo
from vector_stand_in import VectorCollection

import indexed_replica
from errors import FaceError
from gallery import Gallery
from indexed_replica import IndexedReplica
from settings import Settings, SettingsError
from store import Enrolment, MongoStore, VectorSearchMissingError


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mongomock.collection, "BulkOperationBuilder", _BulkBuilder)
    monkeypatch.setattr(indexed_replica, "KEPT_S", 0.0)
    monkeypatch.setattr(indexed_replica, "SETTLE_SECONDS", 3600.0)
    monkeypatch.setattr(indexed_replica, "LOAD_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(indexed_replica, "PLACES_AT_ONCE", 10)


@pytest.fixture
def collection() -> VectorCollection:
    return VectorCollection(mongomock.MongoClient()["db"]["faces"])


class Started:
    """One process that searches in the vector index, or in memory."""

    def __init__(
        self, collection: VectorCollection, *, exact: bool = True, in_memory: bool = False, load: bool = True
    ) -> None:
        self.store = MongoStore(collection)  # type: ignore[arg-type]
        self.store.prepare()
        index = None
        if not in_memory:
            index = self.store.vector_index("m", D, exact=exact)
            index.prepare()
        self.gallery = Gallery(self.store, "m", D, index=index)
        if load:
            self.gallery.load()

    def enrol(self, seed: int) -> str:
        return self.gallery.enrol(a_face(seed), duplicate_cosine=SAME_FACE)

    def finds(self, seed: int) -> str | None:
        found = self.gallery.candidates(another_photo(a_face(seed), 0.9), 1, SAME_FACE)
        return found[0].user_id if found else None

    def settle(self) -> int:
        """Let the tail be shortened as far as it goes; returns how many it still holds."""
        replica = self.gallery._replica
        assert isinstance(replica, IndexedReplica)
        for _ in range(20):
            replica.settle()
        return int(self.gallery.status()["in_tail"])


def test_people_are_found_in_the_index_when_the_tail_holds_nobody(collection: VectorCollection) -> None:
    here = Started(collection)
    people = [here.enrol(seed) for seed in range(25)]
    here.gallery.refresh()
    assert here.settle() == 0
    assert [here.finds(seed) for seed in range(25)] == people
    assert here.finds(98) is None
    found = here.gallery.search(a_face(3))
    assert found is not None
    assert found.cosine == float(np.vecdot(a_face(3), a_face(3)))
    with pytest.raises(FaceError, match="duplicate_face"):
        here.enrol(7)


@pytest.mark.parametrize("seen", [0, 5, 25])
def test_an_index_that_lags_lets_no_duplicate_through_and_misses_nobody(
    collection: VectorCollection, seen: int
) -> None:
    collection.follows = False
    here, there = Started(collection), Started(collection)
    people = [(here, there)[seed % 2].enrol(seed) for seed in range(25)]
    collection.catch_up(seen)
    for one in (here, there, Started(collection)):
        one.gallery.refresh()
        assert one.settle() == 25 - seen
        assert [one.finds(seed) for seed in range(25)] == people
        for seed in range(25):
            with pytest.raises(FaceError, match="duplicate_face"):
                one.enrol(seed)


def test_a_place_that_the_index_leaves_out_keeps_the_tail_from_there(collection: VectorCollection) -> None:
    collection.follows = False
    here = Started(collection)
    people = [here.enrol(seed) for seed in range(8)]
    collection.catch_up()
    left_out = collection.find_one({"seq": 4})["_id"]
    del collection._indexed[left_out]
    here.gallery.refresh()
    assert here.settle() == 5
    assert here.finds(3) == people[3]
    collection.catch_up()
    assert here.settle() == 0
    assert here.finds(3) == people[3]


def test_whoever_enrolled_a_moment_ago_stays_in_the_tail(
    collection: VectorCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed_replica, "KEPT_S", 3600.0)
    here = Started(collection)
    here.enrol(0)
    here.gallery.refresh()
    assert here.settle() == 1


@pytest.mark.parametrize("settled", [True, False])
def test_an_erased_person_is_never_found_though_the_index_still_holds_them(
    collection: VectorCollection, settled: bool
) -> None:
    here, there = Started(collection), Started(collection)
    people = [here.enrol(seed) for seed in range(5)]
    for one in (here, there):
        one.gallery.refresh()
        if settled:
            assert one.settle() == 0
    collection.catch_up()
    collection.follows = False
    here.gallery.erase(people[2])
    for one in (here, there, Started(collection)):
        assert one.finds(2) is None
        with pytest.raises(FaceError, match="unknown_user"):
            one.gallery.compare(people[2], a_face(2))
        with pytest.raises(FaceError, match="unknown_user"):
            one.gallery.erase(people[2])
    again = there.enrol(2)
    assert here.finds(2) == again
    assert "vector" not in collection.find_one({"user_id": people[2]})


@pytest.mark.parametrize("when", ["while it runs", "while it starts"])
def test_an_erasure_that_got_no_further_than_the_log_holds(collection: VectorCollection, when: str) -> None:
    user_id = Started(collection).enrol(0)
    here = Started(collection, load=when == "while it runs")
    collection.insert_one({"user_id": "erased:x", "erases": user_id, "deleted_at": 1.0, "seq": 2})
    if when == "while it starts":
        here.gallery.load()
    assert here.finds(0) is None


def test_many_erased_records_do_not_crowd_out_the_living(collection: VectorCollection) -> None:
    here = Started(collection)
    crowd = [here.store.append(seed + 1, [Enrolment(f"u{seed}", a_face(0), "m", 1.0)]) for seed in range(60)]
    assert len(crowd) == 60
    living = here.gallery.enrol(another_photo(a_face(0), 0.7), duplicate_cosine=2)
    here.gallery.refresh()
    assert here.settle() == 0
    collection.follows = False
    for seed in range(60):
        here.gallery.erase(f"u{seed}")
    assert here.finds(0) == living


def test_records_from_a_process_that_searches_in_memory_are_given_vectors(collection: VectorCollection) -> None:
    indexed, in_memory = Started(collection), Started(collection, in_memory=True)
    people = [(indexed, in_memory)[seed % 2].enrol(seed) for seed in range(12)]
    indexed.gallery.refresh()
    assert [indexed.finds(seed) for seed in range(12)] == people
    assert indexed.settle() == 0
    assert [indexed.finds(seed) for seed in range(12)] == people
    assert collection.count_documents({"vector": {"$exists": True}}) == 12
    in_memory.gallery.erase(people[1])
    assert indexed.finds(1) is None
    assert "vector" not in collection.find_one({"user_id": people[1]})


def test_a_collection_from_before_is_filled_at_the_start_and_other_models_are_left_alone(
    collection: VectorCollection,
) -> None:
    before = Started(collection, in_memory=True)
    people = [before.enrol(seed) for seed in range(25)]
    before.store.append(26, [Enrolment("theirs", a_face(50), "other", 1.0)])
    here = Started(collection)
    assert here.gallery.status()["in_tail"] == 0
    assert [here.finds(seed) for seed in range(25)] == people
    assert here.finds(50) is None
    assert here.gallery.status()["enrolled"] == 25
    with pytest.raises(FaceError, match="unknown_user"):
        here.gallery.compare("theirs", a_face(50))
    here.gallery.erase("theirs")


def test_while_the_index_is_built_nothing_is_decided_and_then_it_goes_on(collection: VectorCollection) -> None:
    collection.queryable = False
    store = MongoStore(collection)  # type: ignore[arg-type]
    store.prepare()
    index = store.vector_index("m", D, exact=True)
    index.prepare()
    gallery = Gallery(store, "m", D, index=index)
    replica = gallery._replica
    assert isinstance(replica, IndexedReplica)
    assert replica._load() is False
    with pytest.raises(FaceError, match="not_ready"):
        gallery.search(a_face())
    collection.queryable = True
    gallery.load()
    assert gallery.search(a_face()) is None
    gallery.close()


def test_an_approximate_search_is_asked_for_as_such_and_may_miss_somebody(collection: VectorCollection) -> None:
    here = Started(collection, exact=False)
    people = [here.enrol(seed) for seed in range(5)]
    here.gallery.refresh()
    assert here.settle() == 0
    assert here.finds(1) == people[1]
    assert "numCandidates" in collection.searches[-1]
    assert "exact" not in collection.searches[-1]
    collection.misses = {people[1]}
    assert here.finds(1) is None


def test_all_candidates_from_a_similarity_up_are_found_in_index_and_tail(collection: VectorCollection) -> None:
    here = Started(collection)
    alike = [
        here.gallery.enrol(another_photo(a_face(0), cosine), duplicate_cosine=2)
        for cosine in np.linspace(0.6, 0.99, 40)
    ]
    here.enrol(1)
    here.gallery.refresh()
    collection.catch_up(20)
    collection.follows = False
    assert here.settle() == 21
    found = here.gallery.candidates(a_face(0), None, 0.59)
    assert [one.user_id for one in found] == alike[::-1]
    assert [one.user_id for one in here.gallery.candidates(a_face(0), 3)] == alike[:-4:-1]


class Broken(VectorCollection):
    """A collection whose vector search does not answer."""

    error: Exception | None = None

    def aggregate(self, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.error is not None:
            raise self.error
        return super().aggregate(stages)


def test_a_search_that_fails_decides_nothing() -> None:
    collection = Broken(mongomock.MongoClient()["db"]["faces"])
    here = Started(collection)
    here.enrol(0)
    for error in (AutoReconnect("gone"), OperationFailure("index not found", 27)):
        collection.error = error
        with pytest.raises(FaceError, match="database_unavailable"):
            here.finds(0)
        with pytest.raises(FaceError, match="database_unavailable"):
            here.enrol(1)
    collection.error = None
    assert here.enrol(1)


def test_a_server_without_vector_search_is_named_in_a_sentence() -> None:
    class Without(VectorCollection):
        def list_search_indexes(self, name: str) -> Iterator[dict[str, Any]]:  # type: ignore[override]
            raise OperationFailure("no such command", 59)

    store = MongoStore(Without(mongomock.MongoClient()["db"]["faces"]))  # type: ignore[arg-type]
    with pytest.raises(VectorSearchMissingError, match="needs a MongoDB with vector search"):
        store.vector_index("m", D, exact=True).prepare()


def test_a_vector_index_needs_a_mongodb() -> None:
    with pytest.raises(SettingsError, match="SEARCH=mongodb needs a MongoDB"):
        Settings(search="mongodb")
