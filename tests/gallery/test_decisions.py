"""The gallery's promises: exact search, one enrolment a face, and no decision on records that cannot be read."""

from __future__ import annotations

import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.base import Template
from errors import FaceError
from gallery import decisions
from gallery.decisions import Gallery, NewFace
from gallery.in_memory import InMemoryView
from gallery.templates import BLOCK_ROWS, Candidate
from store.records import Enrolment, EnrolmentLog, Entry, Person
from store.sqlite import SqliteStore
from tests.support.databases import Database

D = 64
SAME_FACE = 0.5


def a_face(seed: int = 0, d: int = D) -> Template:
    vector = np.random.default_rng(seed).normal(size=d)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def another_photo(face: Template, cosine: float) -> Template:
    """A template at the given cosine to `face`."""
    aside = a_face(99, len(face))
    aside -= aside.dot(face) * face
    aside /= np.linalg.norm(aside)
    mixed: Template = (cosine * face + np.sqrt(1 - cosine**2) * aside).astype(np.float32)
    return mixed


class TheStore:
    """A store over a plain list, which can be made to fail or to be overtaken."""

    def __init__(self, entries: list[Entry] | None = None) -> None:
        self.log = entries or []
        self.fails = False
        self.before_append: Callable[[], None] = lambda: None
        self.round_trips = 0

    def _work(self) -> None:
        if self.fails:
            raise FaceError("database_unavailable")

    def prepare(self) -> None: ...

    def entries(self, after: int, name: str | None = None) -> Iterator[Entry]:
        self._work()
        yield from self.log[after:]

    def append(self, seq: int, enrolments: Sequence[Enrolment]) -> int:
        self._work()
        self.before_append()
        self.round_trips += 1
        if seq != len(self.log) + 1:
            return 0
        self.log.extend(
            Entry(at, one.user_id, one.template, one.model, removes=one.removes, is_added=one.photo_id is not None)
            for at, one in enumerate(enrolments, seq)
        )
        return len(enrolments)

    def erase(self, seq: int, user_id: str) -> bool:
        self._work()
        self.log.append(Entry(seq, erases=user_id))
        return True

    def remove_photo(self, seq: int, place: int) -> bool:
        self._work()
        self.log.append(Entry(seq, removes=place))
        return True

    def finish_erasures(self, user_id: str | None = None, place: int | None = None) -> None: ...

    def last_place(self) -> int:
        self._work()
        return len(self.log)

    def checkpoint(self, seq: int) -> str:
        self._work()
        return f"{seq} {self.log[seq - 1].user_id if seq <= len(self.log) else None}"

    def erasures(self, until: int) -> list[str]:
        return [entry.erases for entry in self.log[:until] if entry.erases is not None]

    def removals(self, until: int) -> list[int]:
        return [entry.removes for entry in self.log[:until] if entry.removes is not None]

    def find_person(self, user_id: str) -> Person | None:
        raise NotImplementedError(user_id)

    def find_request(self, request_key: str, since: float) -> str | None:
        raise NotImplementedError(request_key, since)

    def ping(self) -> None: ...

    def describe(self) -> str:
        return "a list"

    def close(self) -> None: ...


def a_gallery(store: EnrolmentLog | None = None, **options: Any) -> Gallery:
    return Gallery(store or TheStore(), "m", D, **options)


def enrolled(gallery: Gallery, seed: int = 0, **options: Any) -> str:
    return gallery.enrol(a_face(seed), duplicate_cosine=SAME_FACE, **options)


def in_threads(calls: Sequence[Callable[[], object]]) -> list[Any]:
    """Run the calls at once; return their results, or the codes of their FaceErrors."""
    start = threading.Barrier(len(calls))
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = calls[index]()
        except FaceError as error:
            results[index] = error.code

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# --- search ---


def test_nobody_is_found_in_an_empty_gallery() -> None:
    assert a_gallery().search(a_face()) is None


def test_an_enrolled_person_is_found_by_another_photo_and_alone_by_their_id(database: Database) -> None:
    gallery = a_gallery(database.open())
    ids = [enrolled(gallery, seed) for seed in range(5)]
    assert [str(uuid.UUID(user_id)) for user_id in ids] == ids
    found = gallery.search(another_photo(a_face(3), 0.8))
    assert found is not None
    assert (found.user_id, round(found.cosine, 4)) == (ids[3], 0.8)
    assert gallery.compare(ids[2], a_face(2)) == pytest.approx(1)


def test_search_equals_brute_force_over_several_blocks() -> None:
    d, n = 8, 2 * BLOCK_ROWS + 1000
    faces = np.random.default_rng(1).normal(size=(n, d))
    faces = (faces / np.linalg.norm(faces, axis=1, keepdims=True)).astype(np.float32)
    store = TheStore([Entry(i + 1, str(i), face, "m") for i, face in enumerate(faces)])
    gallery = Gallery(store, "m", d)
    erased = [0, 65_535, 65_536, n - 1]
    for row in erased:
        gallery.erase(str(row))
    live = np.setdiff1d(np.arange(n), erased)
    probes = [*(a_face(seed, d) for seed in range(40)), *faces[[*erased, 5, 65_534, 65_537, n - 2]]]
    for probe in probes:
        cosines = np.vecdot(faces[live], probe)
        best = int(np.argmax(cosines))
        expected = Candidate(str(live[best]), min(float(cosines[best]), 1.0))
        assert gallery.search(probe) == expected


def test_of_equal_templates_the_earliest_enrolled_is_found_wherever_they_stand() -> None:
    crowd = [a_face(seed) for seed in range(1, 8)]
    for first in range(len(crowd)):
        faces = [*crowd[:first], a_face(), *crowd[first:], a_face(), a_face()]
        gallery = a_gallery(TheStore([Entry(i + 1, str(i), face, "m") for i, face in enumerate(faces)]))
        found = gallery.search(a_face())
        assert found is not None
        assert found.user_id == str(first)


def test_a_cosine_never_exceeds_one() -> None:
    gallery = a_gallery()
    for seed in range(50):
        gallery.enrol(a_face(seed), duplicate_cosine=2)
        found = gallery.search(a_face(seed))
        assert found is not None
        assert 0.999999 < found.cosine <= 1


@pytest.mark.parametrize(
    "template",
    [
        np.full(D, np.nan, np.float32),
        np.full(D, np.inf, np.float32),
        np.zeros(D, np.float32),
        a_face() * np.float32(1.01),
        a_face(d=D + 1),
        a_face().reshape(1, D),
    ],
    ids=["NaN", "infinite", "zero", "not normalised", "another dimension", "another shape"],
)
def test_what_is_no_template_can_neither_be_enrolled_nor_searched(template: Template) -> None:
    gallery = a_gallery()
    with pytest.raises(ValueError, match="template"):
        gallery.enrol(template, duplicate_cosine=SAME_FACE)
    with pytest.raises(ValueError, match="template"):
        gallery.search(template)
    assert gallery.status()["last_seq"] == 0


# --- one enrolment a face ---


@pytest.mark.parametrize(("cosine", "duplicate"), [(0.9, True), (0.51, True), (0.49, False), (-0.9, False)])
def test_a_person_who_reaches_the_threshold_is_a_duplicate(database: Database, cosine: float, duplicate: bool) -> None:
    store = database.open()
    gallery = a_gallery(store)
    enrolled(gallery)
    again = another_photo(a_face(), cosine)
    if duplicate:
        with pytest.raises(FaceError, match="duplicate_face"):
            gallery.enrol(again, duplicate_cosine=SAME_FACE)
    else:
        gallery.enrol(again, duplicate_cosine=SAME_FACE)
    assert len(list(store.entries(0))) == (1 if duplicate else 2)


def test_a_threshold_that_is_no_number_refuses() -> None:
    gallery = a_gallery()
    enrolled(gallery)
    with pytest.raises(FaceError, match="duplicate_face"):
        gallery.enrol(a_face(1), duplicate_cosine=float("nan"))


def test_a_changed_photo_of_an_enrolled_person_is_a_duplicate_by_the_face_restored() -> None:
    store = TheStore()
    gallery = a_gallery(store)
    enrolled(gallery)
    changed, restored = another_photo(a_face(), 0.3), [a_face(9), another_photo(a_face(), 0.6)]
    with pytest.raises(FaceError, match="duplicate_face"):
        gallery.enrol(changed, duplicate_cosine=SAME_FACE, restored=restored)
    faces = [NewFace(changed, restored), NewFace(a_face(1)), NewFace(a_face(2), [another_photo(a_face(1), 0.6)])]
    results = gallery.enrol_many(faces, duplicate_cosine=SAME_FACE)
    assert [user_id is None for user_id in results] == [True, False, True]
    assert len(store.log) == 2


def test_of_a_changed_photo_the_template_is_stored_as_it_is() -> None:
    store = TheStore()
    gallery = a_gallery(store)
    gallery.enrol(a_face(), duplicate_cosine=SAME_FACE, restored=[a_face(1)])
    gallery.enrol_many([NewFace(a_face(2), [a_face(3)])], duplicate_cosine=SAME_FACE)
    stored = [entry.template for entry in store.log if entry.template is not None]
    assert [one @ a_face(seed) for one, seed in zip(stored, (0, 2), strict=True)] == pytest.approx([1, 1])


def test_threads_that_race_to_enrol_one_face_enrol_it_once(database: Database) -> None:
    gallery = a_gallery(database.open())
    results = in_threads([lambda: enrolled(gallery) for _ in range(16)])
    assert results.count("duplicate_face") == 15
    assert gallery.status()["last_seq"] == len(list(database.open().entries(0))) == 1


def test_processes_that_race_to_enrol_two_faces_enrol_each_once(database: Database) -> None:
    galleries = [a_gallery(database.open()) for _ in range(4)]
    calls = [partial(enrolled, gallery, seed) for gallery in galleries for seed in (0, 1, 0, 1)]
    results = in_threads(calls)
    assert results.count("duplicate_face") == 14
    assert [entry.seq for entry in database.open().entries(0)] == [1, 2]


def test_people_enrolled_at_once_by_several_processes_are_all_enrolled(database: Database) -> None:
    galleries = [a_gallery(database.open()) for _ in range(4)]
    calls = [partial(enrolled, gallery, 10 * i + j) for i, gallery in enumerate(galleries) for j in range(4)]
    ids = in_threads(calls)
    assert len(set(ids)) == 16
    for gallery in galleries:
        gallery.refresh()
        assert gallery.status()["enrolled"] == 16
    assert [entry.seq for entry in database.open().entries(0)] == list(range(1, 17))


def test_who_is_overtaken_by_the_same_face_searches_again_before_deciding() -> None:
    store = TheStore()
    slow, fast = a_gallery(store), a_gallery(store)

    def overtaken() -> None:
        store.before_append = lambda: None
        enrolled(fast)

    store.before_append = overtaken
    with pytest.raises(FaceError, match="duplicate_face"):
        enrolled(slow)
    assert len(store.log) == 1


def test_a_store_that_refuses_every_place_is_given_up_as_overloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "MAX_LOST_RACES", 5)
    store = TheStore()
    monkeypatch.setattr(store, "append", lambda *_: 0)
    with pytest.raises(FaceError, match="overloaded"):
        enrolled(a_gallery(store))


def test_a_process_that_missed_an_erasure_and_an_enrolment_cannot_enrol_the_face_again(database: Database) -> None:
    """Why an erasure leaves no hole in the log.

    Two people are enrolled. A stale process has seen just that when another erases the last of them and enrols a new
    face. Had the erasure freed place 2, or moved it to the end, then the stale process could fill the hole.
    """
    stale_store = database.open()
    stale, current = a_gallery(stale_store), a_gallery(database.open())
    enrolled(current, 0)
    last = enrolled(current, 1)
    stale.refresh()
    current.erase(last)
    enrolled(current, 2)
    for place in (1, 2, 3, 4):
        assert not stale_store.append(place, [Enrolment(str(uuid.uuid4()), a_face(2), "m", 0.0)])
    with pytest.raises(FaceError, match="duplicate_face"):
        enrolled(stale, 2)
    assert [entry.seq for entry in stale_store.entries(0)] == [1, 2, 3, 4]


# --- a retry after a lost answer ---


def test_the_same_request_key_answers_what_its_first_attempt_answered(database: Database) -> None:
    gallery = a_gallery(database.open())
    first = enrolled(gallery, request_key="k")
    assert enrolled(gallery, request_key="k") == first
    assert enrolled(a_gallery(database.open()), request_key="k") == first
    with pytest.raises(FaceError, match="duplicate_face"):
        enrolled(gallery, request_key="another")
    with pytest.raises(FaceError, match="duplicate_face"):
        enrolled(gallery)


def test_the_answer_of_an_earlier_request_is_forgotten_with_its_person() -> None:
    """An erasure that was cut off leaves the request's key in the store; nobody is let in by it."""
    store = TheStore()
    gallery = a_gallery(store)
    user_id = gallery.enrol(a_face(), duplicate_cosine=SAME_FACE)
    store.find_request = lambda request_key, since: user_id  # type: ignore[method-assign]
    assert gallery.enrolled_by("key") == user_id
    store.erase(2, user_id)
    assert gallery.enrolled_by("key") is None


def test_attempts_of_one_request_at_once_all_answer_alike(database: Database) -> None:
    galleries = [a_gallery(database.open()) for _ in range(4)]
    calls = [partial(enrolled, gallery, request_key="k") for gallery in galleries * 2]
    answers = in_threads(calls)
    assert len(set(answers)) == 1
    assert uuid.UUID(answers[0])


def test_a_request_key_is_forgotten_after_a_day_and_with_its_person(database: Database) -> None:
    store = database.open()
    gallery = a_gallery(store)
    store.append(1, [Enrolment("old", a_face(), "m", time.time() - 25 * 3600, "k")])
    with pytest.raises(FaceError, match="duplicate_face"):
        enrolled(gallery, request_key="k")
    erased = enrolled(gallery, 1, request_key="erased")
    gallery.erase(erased)
    assert enrolled(gallery, 1, request_key="erased") != erased


# --- erasure ---


def test_an_erased_person_is_gone_from_every_process_and_may_enrol_again(database: Database) -> None:
    here, there = a_gallery(database.open()), a_gallery(database.open())
    user_id, other = enrolled(here, 0), enrolled(here, 1)
    there.refresh()
    here.erase(user_id)
    for gallery in (here, there, a_gallery(database.open())):
        found = gallery.search(a_face(0))
        assert found is not None
        assert (found.user_id, gallery.status()["enrolled"]) == (other, 1)
        with pytest.raises(FaceError, match="unknown_user"):
            gallery.compare(user_id, a_face(0))
        with pytest.raises(FaceError, match="unknown_user"):
            gallery.erase(user_id)
    assert enrolled(there, 0) != user_id


def test_an_erased_template_is_not_kept_in_memory() -> None:
    gallery = a_gallery()
    user_id = enrolled(gallery)
    gallery.refresh()
    view = gallery._copy.caught_up()
    assert isinstance(view, InMemoryView)
    (block,) = view.templates.blocks
    assert block.arrays["rows"][0].any()
    assert block.arrays["codes"][0].any()
    gallery.erase(user_id)
    gallery.refresh()
    assert not any(array[0].any() for name, array in block.arrays.items() if name not in ("residuals", "places"))


def test_asking_again_finishes_an_erasure_that_got_no_further_than_the_log(mongo_database: Database) -> None:
    gallery = a_gallery(mongo_database.open())
    user_id = enrolled(gallery)
    mongo_database.write({"user_id": "erased:x", "erases": user_id, "deleted_at": 1.0, "seq": 2})
    with pytest.raises(FaceError, match="unknown_user"):
        gallery.erase(user_id)
    assert "embedding" not in mongo_database.collection.find_one({"user_id": user_id})


# --- other models, older and damaged records ---


def test_a_record_of_another_model_or_dimension_is_counted_and_never_compared(database: Database) -> None:
    store = database.open()
    store.append(1, [Enrolment("theirs", a_face(0), "other", 0.0)])
    store.append(2, [Enrolment("longer", a_face(0, 2 * D), "m", 0.0)])
    gallery = a_gallery(store)
    assert gallery.search(a_face(0)) is None
    ours = enrolled(gallery, 0)
    gallery.refresh()
    assert gallery.status() == {
        "model": "m",
        "enrolled": 1,
        "photos": 1,
        "other_models": {"other": 1, f"m of {2 * D} dimensions": 1},
        "unreadable": 0,
        "last_seq": 3,
    }
    with pytest.raises(FaceError, match="unknown_user"):
        gallery.compare("theirs", a_face(0))
    gallery.erase("theirs")
    gallery.refresh()
    assert "other" not in gallery.status()["other_models"]
    assert gallery.compare(ours, a_face(0)) > 0.5


@pytest.mark.parametrize(
    ("plain_model", "d", "counted"),
    [
        (None, D, {}),
        (None, 2 * D, {"unknown": 1}),
        ("m", D, {}),
        ("m", 2 * D, {f"m of {2 * D} dimensions": 1}),
        ("older", D, {"older": 1}),
    ],
)
def test_a_record_without_a_model_belongs_to_the_model_that_is_named_or_fits(
    mongo_database: Database, plain_model: str | None, d: int, counted: dict[str, int]
) -> None:
    mongo_database.write({"user_id": "u", "embedding": pickle.dumps(a_face(0, d)), "timestamp": 1.0})
    gallery = a_gallery(mongo_database.open(), plain_model=plain_model)
    found = gallery.search(a_face(0))
    assert (found.user_id if found else None) == (None if counted else "u")
    assert gallery.status()["other_models"] == counted


def test_damaged_records_are_counted_and_the_rest_is_served(database: Database) -> None:
    store = database.open()
    nan = pickle.dumps(np.full(D, np.nan, np.float32))
    database.write({"user_id": "bad", "embedding": nan, "timestamp": 1.0, "model": "m", "seq": 1})
    gallery = a_gallery(store)
    user_id = enrolled(gallery)
    found = gallery.search(a_face())
    assert found is not None
    assert (found.user_id, gallery.status()["unreadable"]) == (user_id, 1)
    gallery.erase("bad")
    gallery.refresh()
    assert gallery.status()["unreadable"] == 0


def test_several_templates_under_one_user_id_are_all_searched_and_erased_together() -> None:
    gallery = a_gallery(TheStore([Entry(i + 1, "same", a_face(i), "m") for i in range(3)]))
    for seed in range(3):
        found = gallery.search(a_face(seed))
        assert found is not None
        cosines = [float(np.vecdot(a_face(i), a_face(seed))) for i in range(3)]
        assert found == Candidate("same", gallery.compare("same", a_face(seed)))
        assert found.cosine == pytest.approx((1 + np.mean(cosines)) / 2)
    assert (gallery.status()["enrolled"], gallery.status()["photos"]) == (1, 3)
    gallery.erase("same")
    assert gallery.search(a_face(2)) is None


# --- a store that fails ---


def test_when_the_log_cannot_be_read_nothing_is_decided() -> None:
    store = TheStore()
    gallery = a_gallery(store)
    user_id = enrolled(gallery)
    gallery.refresh()
    store.fails = True
    for call in (
        gallery.refresh,
        lambda: gallery.search(a_face()),
        lambda: gallery.compare(user_id, a_face(0)),
        lambda: enrolled(gallery, 1),
        lambda: gallery.erase(user_id),
    ):
        with pytest.raises(FaceError, match="database_unavailable"):
            call()
    store.fails = False
    assert gallery.search(a_face()) == Candidate(user_id, 1.0)


def test_threads_that_wait_for_a_failing_read_share_its_failure() -> None:
    store = TheStore()
    reads: list[int] = []
    release = threading.Event()

    def entries(after: int, name: str | None = None) -> Iterator[Entry]:
        reads.append(after)
        release.wait()
        raise FaceError("database_unavailable")

    store.entries = entries  # type: ignore[method-assign]
    gallery = a_gallery(store)
    threading.Timer(0.2, release.set).start()
    assert in_threads([gallery.refresh] * 20) == ["database_unavailable"] * 20
    assert len(reads) < 20


def test_what_was_read_before_a_failure_is_kept_and_the_rest_follows() -> None:
    faces = [Entry(i + 1, str(i), a_face(i), "m") for i in range(4)]
    store = TheStore(faces)
    gallery = a_gallery(store)

    def breaks_off(after: int, name: str | None = None) -> Iterator[Entry]:
        yield from faces[after : after + 2]
        raise FaceError("database_unavailable")

    whole, store.entries = store.entries, breaks_off  # type: ignore[method-assign]
    with pytest.raises(FaceError):
        gallery.refresh()
    store.entries = whole  # type: ignore[method-assign]
    gallery.refresh()
    assert (gallery.status()["enrolled"], gallery.status()["last_seq"]) == (4, 4)


def test_searches_while_others_enrol_and_erase_find_whom_they_should() -> None:
    gallery = a_gallery()
    stable = enrolled(gallery, 0)
    over = threading.Event()

    def churn() -> None:
        for seed in range(1, 150):
            user_id = enrolled(gallery, seed)
            if seed % 2:
                gallery.erase(user_id)
        over.set()

    def look() -> set[str]:
        found = set()
        while not over.is_set():
            candidate = gallery.search(another_photo(a_face(0), 0.95))
            assert candidate is not None
            found.add(candidate.user_id)
            assert gallery.compare(stable, a_face(0)) <= 1
        return found

    results = in_threads([churn, look, look, look])
    assert results[1:] == [{stable}] * 3


def test_while_a_database_hangs_everybody_else_is_told_so_instead_of_waiting_for_it(tmp_path: Path) -> None:
    class HangingStore(SqliteStore):
        hangs, asked = threading.Event(), threading.Event()

        def entries(self, after: int, name: str | None = None) -> Iterator[Entry]:
            self.asked.set()
            assert self.hangs.wait(30)
            return super().entries(after, name)

    store = HangingStore(tmp_path / "faces.sqlite3")
    store.prepare()
    gallery = a_gallery(store)
    first = threading.Thread(target=gallery.refresh)
    first.start()
    assert store.asked.wait(30)
    for _ in range(20):
        with pytest.raises(FaceError, match="database_unavailable"):
            gallery.refresh()
    store.hangs.set()
    first.join(30)
    gallery.refresh()
    store.close()
