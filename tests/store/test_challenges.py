"""Challenges in every store: used once among all processes, in time, by their owner."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import pytest

import store.mongo
import store.sqlite
from errors import FaceError
from store.challenges import CHALLENGE_SECONDS, CLOCK_SKEW_S, IN_USE_SECONDS, KEPT_SECONDS, new_challenge
from store.records import RecordStore
from store.sqlite import SqliteStore
from tests.support.databases import Database

STEPS = ("look_straight", "turn_left", "turn_right")
OWNER = "a" * 64


def code_of_use(opened: RecordStore, challenge_id: str, owner: str = OWNER) -> str:
    try:
        opened.use_challenge(challenge_id, owner)
    except FaceError as error:
        return error.code
    return "ok"


def test_a_challenge_is_used_by_another_process_than_the_one_that_issued_it(database: Database) -> None:
    challenge = new_challenge(OWNER, STEPS)
    database.open().add_challenge(challenge)
    assert database.open().use_challenge(challenge.challenge_id, OWNER) == challenge


def test_a_challenge_is_used_once(database: Database) -> None:
    opened, challenge = database.open(), new_challenge(OWNER, STEPS)
    opened.add_challenge(challenge)
    answers = [code_of_use(opened, challenge.challenge_id) for _ in range(3)]
    assert answers == ["ok", "challenge_used", "challenge_used"]


def test_a_challenge_that_is_given_back_is_used_once_more_in_its_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, challenge = database.open(), new_challenge(OWNER, STEPS)
    opened.add_challenge(challenge)
    opened.use_challenge(challenge.challenge_id, OWNER)
    opened.give_back(challenge.challenge_id, "b" * 64)
    assert code_of_use(opened, challenge.challenge_id) == "challenge_used"
    opened.give_back(challenge.challenge_id, OWNER)
    assert [code_of_use(opened, challenge.challenge_id) for _ in range(2)] == ["ok", "challenge_used"]
    opened.give_back(challenge.challenge_id, OWNER)
    monkeypatch.setattr(time, "time", lambda: challenge.issued_at + CHALLENGE_SECONDS + 1)
    assert code_of_use(opened, challenge.challenge_id) == "challenge_expired"


def test_of_many_that_race_for_one_challenge_exactly_one_may_use_it(database: Database) -> None:
    challenge = new_challenge(OWNER, STEPS)
    stores = [database.open() for _ in range(4)]
    stores[0].add_challenge(challenge)
    answers: list[str] = []
    together = threading.Barrier(len(stores))

    def race(opened: RecordStore) -> None:
        together.wait()
        answers.append(code_of_use(opened, challenge.challenge_id))

    threads = [threading.Thread(target=race, args=(opened,)) for opened in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == ["challenge_used"] * 3 + ["ok"]


def test_another_api_key_neither_uses_a_challenge_nor_uses_it_up(database: Database) -> None:
    opened, challenge = database.open(), new_challenge(OWNER, STEPS)
    opened.add_challenge(challenge)
    others = [code_of_use(opened, challenge.challenge_id, owner) for owner in ("b" * 64, "")]
    assert others == ["challenge_expired"] * 2
    assert code_of_use(opened, challenge.challenge_id) == "ok"


@pytest.mark.parametrize("challenge_id", ["", "x" * 32, "' OR 1=1 --", "\0"])
def test_an_unknown_challenge_is_expired(database: Database, challenge_id: str) -> None:
    assert code_of_use(database.open(), challenge_id) == "challenge_expired"


@pytest.mark.parametrize(
    ("jump_s", "expected"),
    [
        (CHALLENGE_SECONDS - 5, "ok"),
        (CHALLENGE_SECONDS + 1, "challenge_expired"),
        (-CLOCK_SKEW_S + 2, "ok"),
        (-CLOCK_SKEW_S - 1, "challenge_expired"),
        (-1e6, "challenge_expired"),
        (1e6, "challenge_expired"),
    ],
)
def test_a_challenge_ends_with_its_time_whichever_way_the_clock_jumps(
    database: Database, monkeypatch: pytest.MonkeyPatch, jump_s: float, expected: str
) -> None:
    opened, challenge = database.open(), new_challenge(OWNER, STEPS)
    opened.add_challenge(challenge)
    monkeypatch.setattr(time, "time", lambda: challenge.issued_at + jump_s)
    assert code_of_use(opened, challenge.challenge_id) == expected


def test_a_process_with_a_wrong_clock_does_not_use_a_challenge_up(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, challenge = database.open(), new_challenge(OWNER, STEPS)
    opened.add_challenge(challenge)
    with monkeypatch.context() as wrong:
        wrong.setattr(time, "time", lambda: challenge.issued_at - 3600)
        assert code_of_use(opened, challenge.challenge_id) == "challenge_expired"
    assert [code_of_use(opened, challenge.challenge_id) for _ in range(2)] == ["ok", "challenge_used"]


def test_a_challenge_is_in_use_for_some_seconds_after_its_use(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, challenge = database.open(), new_challenge(OWNER, STEPS)
    opened.add_challenge(challenge)
    assert not opened.is_in_use(challenge.challenge_id, OWNER)
    assert code_of_use(opened, challenge.challenge_id) == "ok"
    assert opened.is_in_use(challenge.challenge_id, OWNER)
    assert not opened.is_in_use(challenge.challenge_id, "b" * 64)
    assert not opened.is_in_use("unknown", OWNER)
    used = time.time()
    monkeypatch.setattr(time, "time", lambda: used + IN_USE_SECONDS + 1)
    assert not opened.is_in_use(challenge.challenge_id, OWNER)


@pytest.mark.parametrize("jump_s", [KEPT_SECONDS + 1, -KEPT_SECONDS - 1])
def test_what_is_long_over_is_removed_with_the_next_challenge(
    database: Database, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    opened, old = database.open(), new_challenge(OWNER, STEPS)
    opened.add_challenge(old)
    assert code_of_use(opened, old.challenge_id) == "ok"
    monkeypatch.setattr(time, "time", lambda: old.issued_at + jump_s)
    opened.add_challenge(new_challenge("b" * 64, STEPS))
    assert code_of_use(opened, old.challenge_id) == "challenge_expired"


def test_an_owner_has_a_bounded_number_of_challenges_and_takes_no_other_owners_place(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.sqlite, "MAX_KEPT", 3)
    monkeypatch.setattr(store.mongo, "MAX_KEPT", 3)
    opened, times = database.open(), itertools.count(time.time() - 10)
    monkeypatch.setattr(time, "time", lambda: next(times))
    others = new_challenge("b" * 64, STEPS)
    opened.add_challenge(others)
    ours = [new_challenge(OWNER, STEPS) for _ in range(5)]
    for challenge in ours:
        opened.add_challenge(challenge)
    monkeypatch.undo()
    answers = [code_of_use(opened, challenge.challenge_id) for challenge in ours]
    assert answers == ["challenge_expired"] * 2 + ["ok"] * 3
    assert code_of_use(opened, others.challenge_id, "b" * 64) == "ok"


def test_ids_are_long_random_and_never_the_same() -> None:
    ids = {new_challenge(OWNER, STEPS).challenge_id for _ in range(100)}
    assert len(ids) == 100
    assert all(len(one) == 32 for one in ids)


def test_a_challenge_outlives_the_process_that_issued_it_and_stays_used_after_the_next(tmp_path: Path) -> None:
    challenge = new_challenge(OWNER, STEPS)
    for expected in (None, "ok", "challenge_used"):
        opened = SqliteStore(tmp_path / "faces.sqlite3")
        opened.prepare()
        if expected is None:
            opened.add_challenge(challenge)
        else:
            assert code_of_use(opened, challenge.challenge_id) == expected
        opened.close()
