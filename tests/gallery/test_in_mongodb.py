"""With SEARCH=mongodb no person is missed because the index lags, and no erased person is found in it."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from typing import Any

import mongomock
import mongomock.collection
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule
from pymongo.errors import AutoReconnect, OperationFailure

from errors import FaceError
from gallery import in_mongodb
from gallery.decisions import Gallery
from gallery.in_mongodb import IndexedCopy
from settings import Settings, SettingsError
from store.mongo import MongoStore
from store.mongo_vectors import MongoVectorIndex, VectorSearchMissingError
from store.records import Enrolment, Entry
from tests.gallery import test_log_model as log_model
from tests.gallery.test_decisions import SAME_FACE, D, a_face, another_photo
from tests.gallery.test_log_model import FaultyStore, LogMachine
from tests.support.databases import BulkBuilder
from tests.support.vector_stand_in import VectorCollection


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mongomock.collection, "BulkOperationBuilder", BulkBuilder)
    monkeypatch.setattr(in_mongodb, "MIN_TAIL_AGE_S", 0.0)
    monkeypatch.setattr(in_mongodb, "SETTLE_SECONDS", 3600.0)
    monkeypatch.setattr(in_mongodb, "LOAD_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(in_mongodb, "PLACES_AT_ONCE", 10)
    monkeypatch.setattr(in_mongodb, "COUNT_SECONDS", 0.0)


@pytest.fixture
def collection() -> VectorCollection:
    return VectorCollection(mongomock.MongoClient()["db"]["faces"])


class Started:
    """One process that searches in the vector index, or in memory."""

    def __init__(
        self,
        collection: VectorCollection,
        *,
        exact: bool = True,
        in_memory: bool = False,
        load: bool = True,
        plain_model: str | None = None,
    ) -> None:
        self.store = MongoStore(collection)  # type: ignore[arg-type]
        self.store.prepare()
        index = None
        if not in_memory:
            index = MongoVectorIndex(self.store, "m", D, exact=exact)
            index.prepare()
        self.gallery = Gallery(self.store, "m", D, plain_model, index=index)
        if load:
            self.gallery.load()

    def enrol(self, seed: int) -> str:
        return self.gallery.enrol(a_face(seed), duplicate_cosine=SAME_FACE)

    def finds(self, seed: int) -> str | None:
        found = self.gallery.candidates(another_photo(a_face(seed), 0.9), 1, SAME_FACE)
        return found[0].user_id if found else None

    def settle(self) -> int:
        """Let the tail be shortened as far as it goes; returns how many it still holds."""
        self.copy.settle()
        return int(self.gallery.status()["in_tail"])

    @property
    def copy(self) -> IndexedCopy:
        copy = self.gallery._copy
        assert isinstance(copy, IndexedCopy)
        return copy


@pytest.fixture
def _nothing_left_to_the_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start waits until everybody is seen in the index."""
    monkeypatch.setattr(in_mongodb, "MAX_TAIL_AT_START", 0)


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


def test_a_person_enrolled_between_search_and_decision_is_seen_though_they_left_the_tail(
    collection: VectorCollection,
) -> None:
    here, there = Started(collection), Started(collection)
    searched = here.copy.caught_up()
    user_id = there.enrol(0)
    assert here.settle() == 0
    found = here.copy.caught_up().search(a_face(0), after=searched.last)
    assert [one.user_id for one in found] == [user_id]


def test_a_person_enrolled_a_moment_ago_stays_in_the_tail(
    collection: VectorCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_mongodb, "MIN_TAIL_AGE_S", 3600.0)
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
    before = Started(collection)
    user_id = before.enrol(0)
    assert before.settle() == 0
    here = Started(collection, load=when == "while it runs")
    collection.follows = False
    collection.insert_one({"user_id": "erased:x", "erases": user_id, "deleted_at": 1.0, "seq": 2})
    if when == "while it starts":
        here.gallery.load()
    assert here.finds(0) is None
    assert not {"embedding", "vector", "vector_model"} & collection.find_one({"seq": 1}).keys()


def test_an_erasure_whose_vector_cannot_be_removed_is_not_passed_over(
    collection: VectorCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Started(collection)
    user_id = here.enrol(0)
    assert here.settle() == 0
    collection.insert_one({"user_id": "erased:x", "erases": user_id, "deleted_at": 1.0, "seq": 2})

    def fails(user_id: str | None = None) -> None:
        raise FaceError("database_unavailable")

    with monkeypatch.context() as broken:
        broken.setattr(here.store, "finish_erasures", fails)
        for _ in range(2):
            with pytest.raises(FaceError, match="database_unavailable"):
                here.finds(0)
    assert here.finds(0) is None


def test_what_an_older_release_erased_loses_its_vector_at_the_next_start(collection: VectorCollection) -> None:
    user_id = Started(collection).enrol(0)
    collection.insert_one({"user_id": "erased:x", "erases": user_id, "deleted_at": 1.0, "seq": 2})
    collection.update_one({"seq": 1}, {"$unset": {"embedding": ""}, "$set": {"deleted_at": 1.0}})
    Started(collection, in_memory=True)
    assert "vector" not in collection.find_one({"seq": 1})


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


def test_somebody_who_is_erased_while_being_given_a_vector_gets_none(collection: VectorCollection) -> None:
    in_memory = Started(collection, in_memory=True)
    user_id = in_memory.enrol(0)

    def is_erased_meanwhile(_: Entry) -> bool:
        in_memory.gallery.erase(user_id)
        return True

    MongoVectorIndex(in_memory.store, "m", D, exact=True).fill(0, 1, is_erased_meanwhile)
    assert "vector" not in collection.find_one({"user_id": user_id})


@pytest.mark.usefixtures("_nothing_left_to_the_tail")
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
    user_id = Started(collection, in_memory=True).enrol(0)
    collection.queryable = False
    here = Started(collection, load=False)
    assert here.copy._load() is False
    with pytest.raises(FaceError, match="not_ready"):
        here.finds(0)
    collection.queryable = True
    here.gallery.load()
    assert here.finds(0) == user_id
    here.gallery.close()


def test_a_start_that_is_stopped_while_it_waits_decides_nothing(collection: VectorCollection) -> None:
    collection.queryable = False
    here = Started(collection, load=False)
    loading = threading.Thread(target=here.gallery.load)
    loading.start()
    here.gallery.close()
    loading.join()
    with pytest.raises(FaceError, match="not_ready"):
        here.finds(0)


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

    def search(self, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.error is not None:
            raise self.error
        return super().search(stages)


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


def test_an_index_that_is_gone_decides_nothing_though_it_answers(collection: VectorCollection) -> None:
    here = Started(collection)
    here.enrol(0)
    assert here.settle() == 0
    collection.lose_index()
    for decide, seed in ((here.finds, 0), (here.enrol, 0), (here.enrol, 1)):
        with pytest.raises(FaceError, match="database_unavailable"):
            decide(seed)
    assert Started(collection).finds(0) is not None
    assert here.finds(0) is not None


def test_an_index_that_is_made_anew_is_not_believed_before_it_is_seen_to_hold_everybody(
    collection: VectorCollection,
) -> None:
    here = Started(collection)
    people = [here.enrol(seed) for seed in range(12)]
    assert here.settle() == 0
    collection.lose_index()
    collection.follows = False
    there = Started(collection)
    assert there.settle() == 12
    assert [there.finds(seed) for seed in range(12)] == people


@pytest.mark.parametrize("tail_at_start", [0, 1000])
def test_later_places_in_the_index_do_not_vouch_for_earlier_ones_that_got_their_vectors_late(
    collection: VectorCollection, monkeypatch: pytest.MonkeyPatch, tail_at_start: int
) -> None:
    monkeypatch.setattr(in_mongodb, "MAX_TAIL_AT_START", tail_at_start)
    in_memory = Started(collection, in_memory=True)
    people = [in_memory.enrol(seed) for seed in range(12)]
    dying = MongoStore(collection)  # type: ignore[arg-type]
    index = MongoVectorIndex(dying, "m", D, exact=True)
    assert dying.append(13, [Enrolment(f"u{seed}", a_face(seed), "m", 1.0) for seed in range(12, 30)])
    # The index sees the later ones, and then a process gives the earlier ones their vectors and dies.
    collection.catch_up()
    collection.follows = False
    assert index.fill(0, 12, lambda _: True) == 12
    here = Started(collection, load=False)
    assert here.copy._load() is bool(tail_at_start)
    if not tail_at_start:
        collection.catch_up()
        assert here.copy._load()
    assert [here.finds(seed) for seed in range(12)] == people


def test_a_start_reads_no_more_of_the_log_than_what_was_not_yet_seen_in_the_index(
    collection: VectorCollection,
) -> None:
    here = Started(collection)
    people = [here.enrol(seed) for seed in range(25)]
    assert here.settle() == 0
    people += [here.enrol(seed) for seed in range(25, 30)]
    there = Started(collection)
    assert there.gallery.status()["in_tail"] == 5
    assert [there.finds(seed) for seed in range(30)] == people
    assert collection.count_documents({"vector_marks": {"$ne": None}}) == 1


def test_a_start_that_counts_other_records_as_its_own_looks_at_all_of_them(collection: VectorCollection) -> None:
    here = Started(collection, plain_model="other")
    for seed in range(12):
        here.enrol(seed)
    collection.update_one({"seq": 4}, {"$unset": {"model": "", "vector": "", "vector_model": ""}})
    assert here.settle() == 0
    assert here.finds(3) is None
    there = Started(collection)
    assert there.settle() == 0
    assert there.finds(3) is not None
    assert here.finds(3) is None


def test_a_record_without_a_proper_place_gives_its_vector_to_nobody_else(collection: VectorCollection) -> None:
    in_memory = Started(collection, in_memory=True)
    user_id = in_memory.enrol(0)
    collection.insert_one({"user_id": "u", "embedding": pickle.dumps(a_face(1)), "model": "m", "seq": 1.5})
    in_memory.enrol(2)
    here = Started(collection)
    assert here.settle() == 0
    assert here.finds(0) == user_id
    assert here.finds(1) is None


def test_the_tail_stays_short_however_many_enrol_while_the_index_follows(collection: VectorCollection) -> None:
    here = Started(collection)
    longest = 0
    for seed in range(60):
        here.enrol(seed)
        if seed % 5 == 4:
            longest = max(longest, here.gallery.status()["in_tail"])
            assert here.settle() == 0
    assert longest <= 5
    assert here.gallery.status()["enrolled"] == 60


@pytest.mark.parametrize("started_again", [False, True])
def test_a_log_that_was_replaced_decides_nothing(collection: VectorCollection, started_again: bool) -> None:
    here = Started(collection)
    for seed in range(12):
        here.enrol(seed)
    here.gallery.refresh()
    here.settle()
    if started_again:
        here = Started(collection)
    records = list(collection.find({"seq": {"$lte": 3}}, {"_id": 0}))
    here.store.fill(records, [], replace=True)
    with pytest.raises(FaceError, match="not_ready"):
        here.enrol(20)
    assert here.store.last_place() == 3


def test_a_server_without_vector_search_is_named_in_a_sentence() -> None:
    class Without(VectorCollection):
        def list_search_indexes(self, name: str) -> Iterator[dict[str, Any]]:  # type: ignore[override]
            raise OperationFailure("no such command", 59)

    store = MongoStore(Without(mongomock.MongoClient()["db"]["faces"]))  # type: ignore[arg-type]
    with pytest.raises(VectorSearchMissingError, match="needs a MongoDB with vector search"):
        MongoVectorIndex(store, "m", D, exact=True).prepare()


def test_a_vector_index_needs_a_mongodb() -> None:
    with pytest.raises(SettingsError, match="SEARCH=mongodb needs a MongoDB"):
        Settings(search="mongodb")


class IndexedLogMachine(LogMachine):
    """The same promise where two processes search in an index that lags, and one on the same collection in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.collection = VectorCollection(mongomock.MongoClient()["db"]["faces"])
        self.collection.follows = False
        self.seen = 0

    def open(self) -> FaultyStore:
        return FaultyStore(MongoStore(self.collection))  # type: ignore[arg-type]

    def start(self, number: int) -> Gallery:
        if number == 2:
            return super().start(number)
        inner = self.stores[number]._store
        assert isinstance(inner, MongoStore)
        index = MongoVectorIndex(inner, "m", log_model.D, exact=True)
        index.prepare()
        gallery = Gallery(self.stores[number], "m", log_model.D, index=index)
        gallery.load()
        return gallery

    def statuses(self) -> list[dict[str, Any]]:
        return [self.galleries[2].status()]  # the others count now and then

    @rule(until=st.integers(1, 60))
    def the_index_catches_up(self, until: int) -> None:
        self.seen = max(self.seen, until)
        self.collection.catch_up(self.seen)

    @rule(process=st.integers(0, 1))
    def settle(self, process: int) -> None:
        copy = self.galleries[process]._copy
        assert isinstance(copy, IndexedCopy)
        copy.settle()


def test_no_order_of_events_breaks_the_log_where_an_index_that_lags_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_mongodb, "PLACES_AT_ONCE", 3)
    monkeypatch.setattr(in_mongodb, "BLOCK_ROWS", log_model.ROWS)
    # The rule `settle` does it. Between two threads mongomock's updates are not atomic, and no order could be repeated.
    monkeypatch.setattr(in_mongodb, "SETTLE_SECONDS", 3600.0)
    log_model.run(IndexedLogMachine)


@pytest.mark.parametrize("settled", [True, False], ids=["in the index", "in the tail"])
def test_a_better_photo_adds_itself_once(collection: VectorCollection, settled: bool) -> None:
    here = Started(collection)
    user_id = here.gallery.enrol(a_face(0), duplicate_cosine=SAME_FACE, quality=0.5)
    here.gallery.refresh()
    assert not settled or here.settle() == 0
    rules: dict[str, Any] = {"match_cosine": SAME_FACE, "duplicate_cosine": SAME_FACE, "max_photos": 5}
    photo = another_photo(a_face(0), 0.9)
    added = [here.gallery.add_better_photo(user_id, photo, quality=quality, **rules) for quality in (0.4, 0.6, 0.6)]
    assert added == [None, 2, None]
