"""Who was not verified for RETENTION_DAYS is erased, and nobody by a clock or a setting gone wrong."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import app
from engines.base import Template
from errors import FaceError
from gallery.decisions import Gallery
from store.audit_log import AuditLog, lines_of
from store.documents import DAY_S
from store.records import Enrolment, RecordStore
from store.retention import Retention, RetentionError, due, erase
from tests.support.databases import Database

NOW = time.time()
DAYS = 100


def a_template(seed: int) -> Template:
    vector = np.random.default_rng(seed).normal(size=64)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def enrolled_ago(*days: float) -> list[Enrolment]:
    return [Enrolment(f"person-{n}", a_template(n), "m", NOW - ago * DAY_S) for n, ago in enumerate(days)]


def test_who_enrolled_long_ago_and_was_never_verified_is_due(database: Database) -> None:
    store = database.open()
    store.append(1, enrolled_ago(200, 50, 101, 1))
    assert due(store, DAYS, NOW, 4) == ["person-0", "person-2"]


def test_who_was_verified_since_is_not_due(database: Database) -> None:
    store = database.open()
    store.append(1, enrolled_ago(200, 200, 200, 1))
    store.note_seen(["person-0", "person-1"], int((NOW - 150 * DAY_S) // DAY_S))
    store.note_seen(["person-1"], int((NOW - 5 * DAY_S) // DAY_S))
    assert due(store, DAYS, NOW, 4) == ["person-0", "person-2"]


def test_a_person_is_due_once_and_not_when_a_photo_was_added_since(database: Database) -> None:
    store = database.open()
    store.append(1, enrolled_ago(200, 200, 200, 1))
    older, newer = enrolled_ago(150, 5)
    store.append(5, [replace(older, photo_id="a"), replace(newer, photo_id="b")])
    assert due(store, DAYS, NOW, 4) == ["person-0", "person-2"]
    store.remove_photo(7, 1)
    assert sorted(due(store, DAYS, NOW, 4)) == ["person-0", "person-2"]


def test_who_is_erased_is_not_due_again_and_leaves_no_note(database: Database) -> None:
    store = database.open()
    store.append(1, enrolled_ago(200, 1))
    store.note_seen(["person-0"], int((NOW - 150 * DAY_S) // DAY_S))
    assert erase(store, "person-0", None)
    assert not erase(store, "person-0", None)
    assert due(store, DAYS, NOW, 2) == []
    assert store.newest_activity() == pytest.approx(NOW - DAY_S, abs=1)


def test_a_note_that_comes_after_the_erasure_is_not_kept(database: Database) -> None:
    store = database.open()
    store.append(1, enrolled_ago(200, 1))
    assert erase(store, "person-0", None)
    store.note_seen(["person-0", "person-1"], 20000)
    assert list(store.notes()) == [("person-1", 20000)]


@pytest.mark.parametrize("day", ["yesterday", -1e18, b"", 1e30])
def test_a_note_of_no_possible_day_harms_nobody(database: Database, day: object) -> None:
    store = database.open()
    store.append(1, enrolled_ago(200, 1))
    if database.collection is None:
        with contextlib.closing(sqlite3.connect(database.folder / "faces.sqlite3")) as connection, connection:
            connection.execute("INSERT INTO seen VALUES ('person-1', ?)", (day,))
    else:
        database.collection.database[f"{database.collection.name}_seen"].insert_many(
            [{"_id": "person-1", "day": day}, {}]
        )
    assert store.newest_activity() == pytest.approx(NOW - DAY_S, abs=1)
    assert list(store.notes()) == []
    assert due(store, DAYS, NOW, 2) == ["person-0"]


def test_an_erasure_by_retention_reaches_a_running_gallery(database: Database) -> None:
    store = database.open()
    store.append(1, enrolled_ago(200, 1))
    gallery = Gallery(database.open(), "m", 64)
    assert gallery.compare("person-0", a_template(0)) == pytest.approx(1)
    erase(store, "person-0", None)
    with pytest.raises(FaceError):
        gallery.compare("person-0", a_template(0))


@pytest.mark.parametrize("jump_days", [3650.0, -3650.0])
def test_a_clock_that_jumped_by_years_erases_nobody(database: Database, jump_days: float) -> None:
    store = database.open()
    store.append(1, enrolled_ago(2, 1))
    with pytest.raises(RetentionError, match="clock"):
        due(store, DAYS, NOW + jump_days * DAY_S, 2)


def test_a_sweep_never_takes_more_than_a_small_share(database: Database) -> None:
    store = database.open()
    store.append(1, enrolled_ago(*[200.0] * 11, *[1.0] * 100))
    with pytest.raises(RetentionError, match="11 of 111"):
        due(store, DAYS, NOW, 111)
    assert len(due(store, DAYS, NOW, 1000)) == len(due(store, DAYS, NOW, None)) == 11


class Service:
    """What a service keeps for its retention."""

    def __init__(self, store: RecordStore, folder: Path) -> None:
        self.folder = folder
        self.retention = Retention(store, DAYS, lambda: 1000, AuditLog(folder, 365))


@pytest.fixture
def service(database: Database, tmp_path: Path) -> Callable[[RecordStore], Service]:
    return lambda store: Service(store, tmp_path / "audit")


def test_a_verification_is_noted_at_the_latest_when_the_service_stops(
    database: Database, service: Callable[[RecordStore], Service]
) -> None:
    store = database.open()
    store.append(1, enrolled_ago(200, 200, 1))
    noted = service(store)
    noted.retention.start()
    noted.retention.seen("person-1")
    noted.retention.close()
    assert due(store, DAYS, NOW, 1000) == ["person-0"]


def test_a_sweep_erases_who_is_due_and_tells_the_audit_log(
    database: Database, service: Callable[[RecordStore], Service]
) -> None:
    store = database.open()
    store.append(1, enrolled_ago(200, 200, 1))
    swept = service(store)
    swept.retention.seen("person-1")
    assert swept.retention.sweep() == 1
    assert store.find_person("person-0") is None
    assert [(line["event"], line["user_id"]) for _, line in lines_of(swept.folder)] == [("erase", "person-0")]


def test_notes_of_a_clock_that_was_ahead_stop_no_sweep_any_more_once_an_operator_says_that_it_is_right(
    tmp_path: Path,
) -> None:
    database = Database("sqlite", tmp_path)
    store = database.open()
    store.append(1, enrolled_ago(200, 1))
    store.note_seen(["person-1"], int(NOW // DAY_S) + 9000)
    with pytest.raises(RetentionError, match="--now"):
        due(store, DAYS, NOW, 2)
    assert app.main(["retention", "--now", "--retention-days", str(DAYS), "--data-dir", str(tmp_path)]) == 0
    assert due(store, DAYS, NOW, 2) == []
    assert list(store.notes()) == [("person-1", int(time.time() // DAY_S))]
    database.discard()


def test_the_command_lists_first_and_erases_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = Database("sqlite", tmp_path)
    database.open().append(1, enrolled_ago(200, 1))
    words = ["--retention-days", "100", "--data-dir", str(tmp_path)]
    assert app.main(["retention", "--dry-run", *words]) == 0
    assert capsys.readouterr().out == "person-0\n"
    assert database.open().find_person("person-0") is not None
    assert app.main(["retention", "--now", *words]) == 0
    assert database.open().find_person("person-0") is None
    assert app.main(["retention", "--dry-run", "--data-dir", str(tmp_path)]) == 1
    database.discard()
