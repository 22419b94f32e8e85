"""Several photos of a person: what adds one, what removes one, and how a person with several is found."""

from __future__ import annotations

import contextlib
import pickle
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.base import Template
from errors import FaceError
from gallery import templates as templates_module
from gallery.decisions import Gallery, NewFace
from gallery.in_memory import InMemoryView
from gallery.snapshot import SnapshotFolder
from gallery.templates import Candidate, Templates, person_score, search_people
from store.records import Enrolment, Person
from store.sqlite import SqliteStore
from tests.gallery.test_decisions import SAME_FACE, D, a_face, a_gallery, enrolled, in_threads
from tests.support.databases import Database


def a_photo_of(face: int, take: int, cosine: float = 0.8) -> Template:
    """A template at this cosine to `a_face(face)`; two takes differ."""
    aside = a_face(1000 + take)
    aside -= aside.dot(a_face(face)) * a_face(face)
    aside /= np.linalg.norm(aside)
    mixed: Template = (cosine * a_face(face) + np.sqrt(1 - cosine**2) * aside).astype(np.float32)
    return mixed


def add(gallery: Gallery, user_id: str, photo: Template, **options: Any) -> int:
    values = {"match_cosine": SAME_FACE, "duplicate_cosine": SAME_FACE, "max_photos": 5} | options
    return gallery.add_photo(user_id, photo, **values)


def numbers(person: Person | None) -> list[int]:
    assert person is not None
    return [photo.number for photo in person.photos]


def counts(gallery: Gallery) -> tuple[int, int]:
    gallery.refresh()
    status = gallery.status()
    return status["enrolled"], status["photos"]


# --- adding ---


def test_an_added_photo_is_the_persons_in_every_process(database: Database) -> None:
    here, there = a_gallery(database.open()), a_gallery(database.open())
    user_id, other = enrolled(here, 0), enrolled(here, 1)
    assert add(here, user_id, a_photo_of(0, 1)) == 2
    assert add(there, user_id, a_photo_of(0, 2)) == 3
    for gallery in (here, there, a_gallery(database.open())):
        probe = a_photo_of(0, 3)
        cosines = [float(np.vecdot(probe, own)) for own in (a_face(0), a_photo_of(0, 1), a_photo_of(0, 2))]
        found = gallery.search(probe)
        assert found == Candidate(user_id, gallery.compare(user_id, probe))
        assert found.cosine == pytest.approx((max(cosines) + np.mean(cosines)) / 2)
        assert [one.user_id for one in gallery.candidates(a_face(0), None)] == [user_id, other]
        assert counts(gallery) == (2, 3 + 1)
    assert numbers(database.open().find_person(user_id)) == [1, 2, 3]


def test_a_photo_of_another_face_is_no_match_and_is_not_stored(database: Database) -> None:
    gallery = a_gallery(database.open())
    user_id = enrolled(gallery, 0)
    with pytest.raises(FaceError, match="no_match"):
        add(gallery, user_id, a_face(1))
    assert numbers(database.open().find_person(user_id)) == [1]


def test_a_photo_that_shows_somebody_else_as_well_is_a_duplicate(database: Database) -> None:
    gallery = a_gallery(database.open())
    user_id, other = enrolled(gallery, 0), enrolled(gallery, 1)
    both = a_face(0) + a_face(1)
    with pytest.raises(FaceError, match="duplicate_face"):
        add(gallery, user_id, np.asarray(both / np.linalg.norm(both), np.float32))
    assert numbers(database.open().find_person(user_id)) == numbers(database.open().find_person(other)) == [1]


def test_a_photo_of_nobody_enrolled_is_refused(database: Database) -> None:
    gallery = a_gallery(database.open())
    user_id = enrolled(gallery, 0)
    gallery.erase(user_id)
    for unknown in (user_id, "nobody"):
        with pytest.raises(FaceError, match="unknown_user"):
            add(gallery, unknown, a_face(0))


@pytest.mark.parametrize("threshold", [float("nan"), float("inf")])
def test_a_threshold_that_nothing_reaches_adds_nothing(threshold: float) -> None:
    gallery = a_gallery()
    user_id = enrolled(gallery, 0)
    with pytest.raises(FaceError, match="no_match"):
        add(gallery, user_id, a_face(0), match_cosine=threshold)


def test_beyond_the_largest_number_the_oldest_photo_goes_everywhere(database: Database, tmp_path: Path) -> None:
    snapshot = SnapshotFolder(tmp_path / "snapshot", "", D)
    gallery = a_gallery(database.open(), snapshot=snapshot)
    gallery.load()
    user_id = enrolled(gallery, 0)
    gallery.refresh()
    gallery.close()
    first = a_face(0).tobytes()
    assert first in b"".join(path.read_bytes() for path in (tmp_path / "snapshot").iterdir())
    assert [add(gallery, user_id, a_photo_of(0, take), max_photos=3) for take in range(1, 5)] == [2, 3, 3, 3]
    assert first not in b"".join(path.read_bytes() for path in (tmp_path / "snapshot").iterdir())
    assert numbers(database.open().find_person(user_id)) == [3, 4, 5]
    assert [stored.seq for stored in database.open().embeddings(0)] == [3, 4, 5]
    kept = [float(np.vecdot(a_face(0), a_photo_of(0, take))) for take in (2, 3, 4)]
    for one in (gallery, a_gallery(database.open())):
        assert one.compare(user_id, a_face(0)) == pytest.approx(person_score(np.array(kept)))
        assert counts(one) == (1, 3)


def test_photos_that_are_added_at_once_all_count_and_are_never_too_many(database: Database) -> None:
    galleries = [a_gallery(database.open()) for _ in range(3)]
    user_id = enrolled(galleries[0], 0)
    calls = [partial(add, galleries[take % 3], user_id, a_photo_of(0, take), max_photos=4) for take in range(6)]
    assert sorted(in_threads(calls)) == [2, 3, 4, 4, 4, 4]
    assert len(numbers(database.open().find_person(user_id))) == 4
    assert len(list(database.open().entries(0))) == 7


def test_the_same_request_adds_its_photo_once(database: Database) -> None:
    here, there = a_gallery(database.open()), a_gallery(database.open())
    user_id, other = enrolled(here, 0), enrolled(here, 1)
    assert add(here, user_id, a_photo_of(0, 1), request_key="k") == 2
    assert add(there, user_id, a_photo_of(0, 1), request_key="k") == 2
    with pytest.raises(FaceError, match="idempotency_conflict"):
        add(there, other, a_face(1), request_key="k")


def test_who_is_found_by_an_added_photo_alone_is_a_duplicate(database: Database) -> None:
    gallery = a_gallery(database.open())
    user_id = enrolled(gallery, 0)
    add(gallery, user_id, a_photo_of(0, 1, 0.6))
    with pytest.raises(FaceError, match="duplicate_face"):
        enrolled(gallery, 0)
    with pytest.raises(FaceError, match="duplicate_face"):
        gallery.enrol(a_photo_of(0, 1, 0.6), duplicate_cosine=SAME_FACE)
    assert gallery.enrol_many([NewFace(a_photo_of(0, 1, 0.6))], duplicate_cosine=SAME_FACE) == [None]


def test_a_photo_that_another_process_adds_between_search_and_decision_counts(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = a_gallery(database.open()), a_gallery(database.open())
    user_id = enrolled(here, 0)
    probe = a_photo_of(0, 7, 0.45)
    assert here.compare(user_id, probe) < SAME_FACE
    append = here._store.append

    def overtaken(*arguments: Any) -> int:
        monkeypatch.undo()
        add(there, user_id, a_photo_of(0, 7, 0.9))
        return append(*arguments)

    monkeypatch.setattr(here._store, "append", overtaken)
    with pytest.raises(FaceError, match="duplicate_face"):
        here.enrol(probe, duplicate_cosine=SAME_FACE)


# --- a better photo adds itself ---


def add_better(gallery: Gallery, user_id: str, photo: Template, quality: float, **options: Any) -> int | None:
    values = {"match_cosine": SAME_FACE, "duplicate_cosine": SAME_FACE, "max_photos": 5} | options
    return gallery.add_better_photo(user_id, photo, quality=quality, **values)


def qualities(database: Database, user_id: str) -> list[float | None]:
    person = database.open().find_person(user_id)
    assert person is not None
    return [photo.quality for photo in person.photos]


def test_only_a_photo_that_is_better_than_every_kept_one_is_added(database: Database) -> None:
    here, there = a_gallery(database.open()), a_gallery(database.open())
    user_id = enrolled(here, 0, quality=0.5)
    add(here, user_id, a_photo_of(0, 1), quality=0.7)
    assert add_better(there, user_id, a_photo_of(0, 2), 0.6) is None
    assert add_better(there, user_id, a_photo_of(0, 2), 0.7) is None
    assert add_better(there, user_id, a_photo_of(0, 2), 0.8) == 3
    assert add_better(here, user_id, a_photo_of(0, 3), 0.8) is None
    assert qualities(database, user_id) == [0.5, 0.7, 0.8]


def test_a_photo_of_unknown_quality_counts_as_the_worst(database: Database) -> None:
    gallery = a_gallery(database.open())
    user_id = enrolled(gallery, 0)
    assert add_better(gallery, user_id, a_photo_of(0, 1), 0.1) == 2
    assert qualities(database, user_id) == [None, 0.1]


def test_a_removed_photo_and_one_of_another_model_do_not_count(database: Database) -> None:
    gallery, store = a_gallery(database.open()), database.open()
    user_id = enrolled(gallery, 0, quality=0.3)
    add(gallery, user_id, a_photo_of(0, 1), quality=0.9)
    gallery.remove_photo(user_id, 2)
    store.append(4, [Enrolment(user_id, a_face(5), "another", 1.0, photo_id="x", quality=0.9)])
    assert add_better(gallery, user_id, a_photo_of(0, 2), 0.5) == 2
    assert qualities(database, user_id) == [0.3, 0.9, 0.5]


def test_a_better_photo_keeps_to_the_rules_of_every_added_photo(database: Database) -> None:
    gallery = a_gallery(database.open())
    user_id, other = enrolled(gallery, 0), enrolled(gallery, 1)
    both = a_face(0) + a_face(1)
    for photo, code in ((a_face(2), "no_match"), (both / np.linalg.norm(both), "duplicate_face")):
        with pytest.raises(FaceError, match=code):
            add_better(gallery, user_id, np.asarray(photo, np.float32), 1.0)
    assert numbers(database.open().find_person(other)) == [1]
    assert [add_better(gallery, user_id, a_photo_of(0, n), n / 10, max_photos=2) for n in (1, 2, 3)] == [2, 2, 2]
    assert qualities(database, user_id) == [0.2, 0.3]


def test_of_equally_good_photos_that_come_at_once_one_is_added(database: Database) -> None:
    galleries = [a_gallery(database.open()) for _ in range(3)]
    user_id = enrolled(galleries[0], 0, quality=0.5)
    calls = [partial(add_better, galleries[n % 3], user_id, a_photo_of(0, n), 0.8) for n in range(6)]
    assert sorted(map(str, in_threads(calls))) == ["2"] + ["None"] * 5
    assert qualities(database, user_id) == [0.5, 0.8]


def test_of_photos_that_come_at_once_the_best_is_never_lost(database: Database) -> None:
    galleries = [a_gallery(database.open()) for _ in range(3)]
    user_id = enrolled(galleries[0], 0, quality=0.05)
    calls = [partial(add_better, galleries[n % 3], user_id, a_photo_of(0, n), n / 10) for n in range(1, 7)]
    added = sum(result is not None for result in in_threads(calls))
    kept = [quality or 0.0 for quality in qualities(database, user_id)]
    assert kept == sorted(kept)  # each was better than those before it
    assert kept[-1] == 0.6
    assert len(list(database.open().entries(0))) == 1 + added


# --- removing ---


def test_a_removed_photo_is_gone_and_its_number_is_never_given_again(database: Database) -> None:
    gallery = a_gallery(database.open())
    user_id = enrolled(gallery, 0)
    for take in (1, 2):
        add(gallery, user_id, a_photo_of(0, take))
    assert gallery.remove_photo(user_id, 1) == 2
    with pytest.raises(FaceError, match="unknown_photo"):
        gallery.remove_photo(user_id, 1)
    assert gallery.remove_photo(user_id, 3) == 1
    add(gallery, user_id, a_photo_of(0, 3))
    assert numbers(database.open().find_person(user_id)) == [2, 4]
    kept = np.array([np.vecdot(a_face(0), a_photo_of(0, take)) for take in (1, 3)])
    for one in (gallery, a_gallery(database.open())):
        assert one.compare(user_id, a_face(0)) == pytest.approx(person_score(kept))
        assert counts(one) == (1, 2)


def test_the_last_photo_stays(database: Database) -> None:
    gallery = a_gallery(database.open())
    user_id = enrolled(gallery, 0)
    with pytest.raises(FaceError, match="last_photo"):
        gallery.remove_photo(user_id, 1)
    add(gallery, user_id, a_photo_of(0, 1))
    calls = [partial(gallery.remove_photo, user_id, 1), partial(a_gallery(database.open()).remove_photo, user_id, 2)]
    assert sorted(map(str, in_threads(calls))) == ["1", "last_photo"]
    assert gallery.compare(user_id, a_face(0)) > SAME_FACE
    with pytest.raises(FaceError, match="unknown_user"):
        gallery.remove_photo("nobody", 1)


def test_an_erasure_takes_every_photo(database: Database) -> None:
    here, there = a_gallery(database.open()), a_gallery(database.open())
    user_id = enrolled(here, 0)
    for take in (1, 2):
        add(here, user_id, a_photo_of(0, take))
    there.erase(user_id)
    for gallery in (here, there, a_gallery(database.open())):
        assert gallery.search(a_photo_of(0, 2)) is None
        assert counts(gallery) == (0, 0)
    assert list(database.open().embeddings(0)) == []
    assert database.open().find_person(user_id) is None


def test_a_removal_that_a_crash_cut_in_two_is_finished_at_the_next_start(mongo_database: Database) -> None:
    gallery = a_gallery(mongo_database.open())
    user_id = enrolled(gallery, 0)
    add(gallery, user_id, a_photo_of(0, 1))
    mongo_database.write({"user_id": "removed:x", "removes": 1, "deleted_at": 1.0, "seq": 3})
    assert counts(gallery) == counts(a_gallery(mongo_database.open())) == (1, 1)
    assert [stored.seq for stored in mongo_database.open().embeddings(0)] == [2]


@pytest.mark.parametrize("removes", [float("nan"), float("inf"), 0, -1, 2, 99, "1", True, None, 2**63 - 1])
def test_a_strange_removal_removes_nothing(mongo_database: Database, removes: object) -> None:
    if mongo_database.kind == "mongodb" and isinstance(removes, float):
        pytest.skip("the stand-in server makes a text of it")
    gallery = a_gallery(mongo_database.open())
    user_id = enrolled(gallery, 0)
    mongo_database.write({"user_id": "removed:x", "removes": removes, "deleted_at": 1.0, "seq": 2})
    for one in (gallery, a_gallery(mongo_database.open())):
        assert counts(one) == (1, 1)
        assert one.compare(user_id, a_face(0)) > SAME_FACE


# --- older data, and starts ---


def test_older_records_of_one_user_id_are_one_person_who_can_be_given_more_photos(mongo_database: Database) -> None:
    for take in (1, 2):
        mongo_database.write({"user_id": "u", "embedding": pickle.dumps(a_photo_of(0, take)), "timestamp": 1.0})
    gallery = a_gallery(mongo_database.open())
    assert counts(gallery) == (1, 2)
    assert add(gallery, "u", a_photo_of(0, 3)) == 3
    assert gallery.remove_photo("u", 1) == 2
    assert numbers(mongo_database.open().find_person("u")) == [2, 3]


def test_an_older_record_that_comes_while_a_gallery_runs_counts_as_another_photo(mongo_database: Database) -> None:
    gallery = a_gallery(mongo_database.open())
    user_id = enrolled(gallery, 0)
    assert counts(gallery) == (1, 1)
    mongo_database.write({"user_id": user_id, "embedding": pickle.dumps(a_photo_of(0, 1)), "timestamp": 1.0})
    mongo_database.open()  # it gives the record its place
    assert counts(gallery) == (1, 2)
    assert gallery.compare(user_id, a_face(0)) == pytest.approx(0.95)


def test_a_collection_of_an_earlier_version_loses_its_unique_index(mongo_database: Database) -> None:
    mongo_database.collection.create_index("user_id", unique=True)
    gallery = a_gallery(mongo_database.open())
    user_id = enrolled(gallery, 0)
    assert add(gallery, user_id, a_photo_of(0, 1)) == 2


def test_a_file_of_an_earlier_version_is_changed_once_and_keeps_everybody(tmp_path: Path) -> None:
    path = tmp_path / "faces.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as older, older:
        older.execute(
            "CREATE TABLE faces (seq INTEGER PRIMARY KEY, user_id TEXT NOT NULL UNIQUE, embedding BLOB, timestamp REAL,"
            " model TEXT, request_key TEXT, erases TEXT, deleted_at REAL)"
        )
        older.execute("CREATE INDEX faces_request_key ON faces (request_key) WHERE request_key IS NOT NULL")
        older.execute("CREATE INDEX faces_erases ON faces (erases) WHERE erases > ''")
        blob = pickle.dumps(a_face(0))
        older.execute("INSERT INTO faces VALUES (1, 'u', ?, 5.0, 'm', 'k', NULL, NULL)", (blob,))
        older.execute("INSERT INTO faces VALUES (2, 'gone', NULL, 6.0, 'm', NULL, NULL, 7.0)")
        older.execute("INSERT INTO faces VALUES (3, 'erased:x', NULL, NULL, NULL, NULL, 'gone', 7.0)")
    stores = [SqliteStore(path) for _ in range(3)]
    in_threads([store.prepare for store in stores])
    gallery = a_gallery(stores[0])
    assert add(gallery, "u", a_photo_of(0, 1)) == 2
    documents = list(stores[1].documents(9))
    assert documents[0] == {"seq": 1, "user_id": "u", "embedding": blob, "timestamp": 5.0, "model": "m",
                            "request_key": "k"}  # fmt: skip
    assert [(one.get("erases"), one["user_id"]) for one in documents[1:3]] == [(None, "gone"), ("gone", "erased:x")]
    assert stores[2].find_request("k", 0.0) == "u"
    for store in stores:
        store.close()


def test_a_file_of_the_version_before_qualities_gets_its_column_and_keeps_everybody(tmp_path: Path) -> None:
    path = tmp_path / "faces.sqlite3"
    first = SqliteStore(path)
    first.prepare()
    user_id = enrolled(a_gallery(first), 0)
    first.close()
    with contextlib.closing(sqlite3.connect(path)) as older, older:
        older.execute("ALTER TABLE faces DROP COLUMN quality")
    stores = [SqliteStore(path) for _ in range(3)]
    in_threads([store.prepare for store in stores])
    assert add_better(a_gallery(stores[0]), user_id, a_photo_of(0, 1), 0.4) == 2
    person = stores[1].find_person(user_id)
    assert person is not None
    assert [photo.quality for photo in person.photos] == [None, 0.4]
    for store in stores:
        store.close()


@pytest.mark.parametrize("strange", [-0.1, 1.1, "0.5", True, [0.5], float("nan")])
def test_a_strange_quality_is_unknown(mongo_database: Database, strange: object) -> None:
    if mongo_database.kind == "mongodb" and strange != strange:
        pytest.skip("the stand-in server refuses it")
    mongo_database.write({"user_id": "u", "embedding": pickle.dumps(a_face(0)), "quality": strange})
    mongo_database.open()
    assert qualities(mongo_database, "u") == [None]


def test_an_erased_photo_leaves_no_quality(database: Database) -> None:
    gallery = a_gallery(database.open())
    user_id = enrolled(gallery, 0, quality=0.5)
    add(gallery, user_id, a_photo_of(0, 1), quality=0.6)
    gallery.remove_photo(user_id, 1)
    assert ["quality" in document for document in database.open().documents(3)] == [False, True, False]
    gallery.erase(user_id)
    assert not any("quality" in document for document in database.open().documents(9))


@pytest.mark.parametrize("tidily", [True, False])
def test_a_start_from_the_snapshot_knows_every_photo(database: Database, tmp_path: Path, tidily: bool) -> None:
    def started() -> Gallery:
        gallery = a_gallery(database.open(), snapshot=SnapshotFolder(tmp_path / "snapshot", "", D))
        gallery.load()
        return gallery

    first = started()
    user_id = enrolled(first, 0)
    enrolled(first, 1)
    add(first, user_id, a_photo_of(0, 1))
    first.close()
    elsewhere = a_gallery(database.open())
    add(elsewhere, user_id, a_photo_of(0, 2))
    elsewhere.remove_photo(user_id, 1)
    second = started()
    assert counts(second) == (2, 3)
    elsewhere.remove_photo(user_id, 2)
    if tidily:
        second.refresh()
        second.close()
    third = started()
    assert counts(third) == (2, 2)
    assert third.compare(user_id, a_face(0)) == pytest.approx(float(np.vecdot(a_face(0), a_photo_of(0, 2))))


def test_another_record_of_the_same_person_at_the_last_place_is_noticed(mongo_database: Database) -> None:
    gallery = a_gallery(mongo_database.open())
    user_id = enrolled(gallery, 0)
    add(gallery, user_id, a_photo_of(0, 1))
    gallery.refresh()
    # A backup from before is restored, and the person adds another photo.
    mongo_database.collection.delete_one({"seq": 2})
    add(a_gallery(mongo_database.open()), user_id, a_photo_of(0, 2))
    with pytest.raises(FaceError, match="not_ready"):
        gallery.refresh()


# --- search ---


@pytest.mark.parametrize("k", [1, 2, 5, None])
@pytest.mark.parametrize("least", [-1.0, 0.2])
def test_a_search_of_people_is_what_scoring_everybody_is(
    k: int | None, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates_module, "BLOCK_ROWS", 16)
    rng = np.random.default_rng(0)
    user_ids = [f"person-{rng.integers(30)}" for _ in range(100)]
    vectors = rng.normal(size=(100, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = Templates(8).extended(vectors, user_ids, range(1, 101))
    view = InMemoryView(rows, 100, rows.people_with_several())
    assert view.several == {one: user_ids.count(one) for one in user_ids if user_ids.count(one) > 1}
    probes = rng.normal(size=(30, 8)).astype(np.float32)
    for probe in probes / np.linalg.norm(probes, axis=1, keepdims=True):
        own = {one: vectors[[at for at, other in enumerate(user_ids) if other == one]] for one in set(user_ids)}
        scores = {one: person_score(np.vecdot(templates, probe)) for one, templates in own.items()}
        expected = sorted((one for one in scores if scores[one] >= least), key=lambda one: -scores[one])[:k]
        assert [one.user_id for one in view.search(probe, k, least)] == expected
        assert [one.cosine for one in view.search(probe, k, least)] == pytest.approx(
            [scores[one] for one in expected], abs=1e-6
        )


def test_a_search_asks_for_more_rows_only_where_photos_of_one_person_fill_the_first_ones() -> None:
    asked: list[int | None] = []
    rows = [Candidate("several", 0.9), Candidate("several", 0.8), Candidate("one", 0.7)]

    def find_rows(n: int | None) -> list[Candidate]:
        asked.append(n)
        return rows[:n]

    def scores(best: Any) -> list[Candidate]:
        return [Candidate(one, {"several": 0.6, "one": 0.7}[one]) for one in best]

    assert search_people(find_rows, scores, 1, -1.0) == [Candidate("one", 0.7)]
    assert asked == [1, 4]
    asked.clear()
    assert search_people(find_rows, lambda best: [Candidate(*one) for one in best.items()], 1, -1.0) == rows[:1]
    assert asked == [1]


def test_one_photo_scores_as_its_cosine() -> None:
    cosine = np.array([np.float32(0.1) + np.float32(0.2)])
    assert person_score(cosine) == float(cosine[0])
