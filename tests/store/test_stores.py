"""The contract that every store keeps, and the faults that only one kind of store can have."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import resource
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mongomock
import numpy as np
import pytest
from bson.code import Code
from bson.int64 import Int64
from pymongo.errors import NetworkTimeout, WriteConcernError

from bootstrap import make_store
from engines.base import Template
from errors import FaceError
from store import documents as store_module
from store import mongo, sqlite
from store.mongo import MongoStore
from store.records import Enrolment, EnrolmentLog, Entry
from store.sqlite import SqliteStore
from tests.support.databases import Database, MongoServer

ROOT = Path(__file__).parents[2]
D = 64


def a_template(seed: int = 0, d: int = D) -> Template:
    vector = np.random.default_rng(seed).normal(size=d)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def an_enrolment(seed: int = 0, **fields: Any) -> Enrolment:
    values = {"user_id": str(uuid.uuid4()), "template": a_template(seed), "model": "m", "timestamp": time.time()}
    return Enrolment(**{**values, **fields})


def with_pages_of(records: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (store_module, mongo, sqlite):
        monkeypatch.setattr(module, "PAGE_RECORDS", records)


def the_log(store: EnrolmentLog, after: int = 0) -> list[Entry]:
    return list(store.entries(after))


def places(store: EnrolmentLog) -> list[int]:
    return [entry.seq for entry in store.entries(0)]


# --- the contract ---


def test_an_enrolment_is_read_back_by_another_store_as_it_was_written(database: Database) -> None:
    written = an_enrolment()
    assert database.open().append(1, [written])
    (entry,) = the_log(database.open())
    assert entry.template is not None
    np.testing.assert_allclose(entry.template, written.template, atol=1e-7)
    assert (entry.template.dtype.name, entry.template.shape) == ("float32", (D,))
    assert (entry.seq, entry.user_id, entry.model) == (1, written.user_id, "m")
    assert (entry.erases, entry.unreadable) == (None, False)


def test_every_process_reads_the_same_bits_of_a_template(database: Database) -> None:
    database.open().append(1, [an_enrolment()])
    first, second = the_log(database.open())[0].template, the_log(database.open())[0].template
    assert first is not None
    assert second is not None
    assert first.tobytes() == second.tobytes()


def test_the_log_is_read_in_order_and_from_any_place(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    with_pages_of(3, monkeypatch)
    store = database.open()
    assert the_log(store) == []
    for seq in range(1, 8):
        assert store.append(seq, [an_enrolment(seq)])
    for after in range(9):
        assert [entry.seq for entry in store.entries(after)] == list(range(after + 1, 8))


def test_a_taken_place_is_refused_and_nothing_is_stored(database: Database) -> None:
    winner, loser = an_enrolment(1), an_enrolment(2)
    assert database.open().append(1, [winner]) == 1
    store = database.open()
    assert store.append(1, [loser]) == 0
    assert store.erase(1, winner.user_id) is False
    assert [(entry.user_id, entry.template is None) for entry in the_log(store)] == [(winner.user_id, False)]


def test_of_many_that_race_for_one_place_exactly_one_wins(database: Database) -> None:
    stores = [database.open() for _ in range(4)]
    start = threading.Barrier(8)
    won: list[int] = []

    def race(store: EnrolmentLog) -> None:
        start.wait()
        won.append(store.append(1, [an_enrolment()]))

    threads = [threading.Thread(target=race, args=(store,)) for store in stores * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [0] * 7 + [1]
    assert places(stores[0]) == [1]


def test_an_erasure_removes_the_template_and_leaves_both_records_in_their_places(database: Database) -> None:
    store, person = database.open(), an_enrolment(request_key="k")
    store.append(1, [person])
    store.append(2, [an_enrolment(2)])
    assert store.erase(3, person.user_id) is True
    erased, other, erasure = the_log(store)
    assert (erased.seq, erased.template, erased.unreadable) == (1, None, False)
    assert (other.seq, other.template is None) == (2, False)
    assert (erasure.seq, erasure.erases, erasure.template) == (3, person.user_id, None)
    assert store.find_request("k", 0) is None


def test_two_processes_may_erase_the_same_person(database: Database) -> None:
    store, person = database.open(), an_enrolment()
    store.append(1, [person])
    assert store.erase(2, person.user_id)
    assert store.erase(3, person.user_id)
    assert places(store) == [1, 2, 3]


def test_a_request_key_finds_its_enrolment_until_it_is_too_old(database: Database) -> None:
    store = database.open()
    person = an_enrolment(request_key="k", timestamp=1000.0)
    store.append(1, [person])
    store.append(2, [an_enrolment(2)])
    assert store.find_request("k", 999.0) == person.user_id
    assert store.find_request("k", 1001.0) is None
    assert store.find_request("another", 0.0) is None


def test_a_request_is_found_again_with_its_photo_alone(database: Database) -> None:
    store = database.open()
    person, longer = an_enrolment(request_key="k.one", timestamp=1000.0), an_enrolment(2, request_key="k1.two")
    assert store.append(1, [person, longer]) == 2
    assert store.find_request("k.one", 0.0) == store.find_request("k", 0.0) == person.user_id
    assert store.find_request("k1.two", 0.0) == longer.user_id
    with pytest.raises(FaceError, match="idempotency_conflict"):
        store.find_request("k.two", 0.0)


def test_preparing_again_changes_nothing(database: Database) -> None:
    store = database.open()
    store.append(1, [an_enrolment()])
    store.prepare()
    database.open().prepare()
    assert places(store) == [1]
    store.ping()


# --- hostile and damaged records ---


class _Runs:
    """Leaves a trace when it is unpickled by a loader that runs what it is told to."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran-code",)


NORMAL = a_template()
HOSTILE: dict[str, object] = {
    "runs a program": pickle.dumps(_Runs()),
    "runs a program, protocol 2": pickle.dumps(_Runs(), protocol=2),
    "runs a program, protocol 0": pickle.dumps(_Runs(), protocol=0),
    "runs a program from within an array": pickle.dumps(np.array([_Runs()], dtype=object)),
    "runs a program beside an array": pickle.dumps((NORMAL, _Runs())),
    "imports by name": b"cos\nsystem\n(S'touch ran-code'\ntR.",
    "imports by the obsolete opcode": b"(S'touch ran-code'\nios\nsystem\n.",
    "reaches through a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x11f2py.os.system   \x93.",
    "array of objects": pickle.dumps(np.array([1.0, None], dtype=object)),
    "object dtype over float bytes": pickle.dumps(NORMAL, protocol=4).replace(b"\x8c\x02f4", b"\x8c\x02O8"),
    "array of records": pickle.dumps(np.zeros(4, dtype=[("a", "f4")])),
    "claims a shape beyond its bytes": pickle.dumps(NORMAL, protocol=3).replace(b"K\x01K@\x85", b"K\x01K\xff\x85"),
    "alters a stand-in": b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93(K\x01K\x02K\x03K\x04K\x05tb.",
    "memory bomb": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "hashing bomb": b"\x80\x04})" + b"2\x86" * 60 + b"Ns.",
    "another encoding": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R.",
    "not an array": pickle.dumps([0.1] * D),
    "NaN": pickle.dumps(np.full(D, np.nan, np.float32)),
    "one NaN": pickle.dumps(np.where(np.arange(D) == 3, np.float32(np.nan), NORMAL)),
    "infinite": pickle.dumps(np.full(D, np.inf, np.float32)),
    "beyond every norm": pickle.dumps(np.full(D, 1e300)),
    "zero": pickle.dumps(np.zeros(D, np.float32)),
    "not normalised": pickle.dumps(NORMAL * np.float32(1.01)),
    "whole numbers": pickle.dumps(np.eye(1, D, dtype=np.int32)[0]),
    "two vectors": pickle.dumps(NORMAL.reshape(2, -1)),
    "no vector": pickle.dumps(np.float32(1.0).reshape(())),
    "empty array": pickle.dumps(np.zeros(0, np.float32)),
    "too large": pickle.dumps(a_template(d=20_000)),
    "cut off": pickle.dumps(NORMAL)[:-40],
    "no pickle": b"\x00\x01\x02",
    "empty": b"",
    "a text": "gASV",
    "a number": 7,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_or_damaged_embedding_keeps_its_place_and_never_runs(
    database: Database, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    store = database.open()
    database.write({"user_id": "u\n1", "embedding": HOSTILE[kind], "timestamp": 1.0, "model": "m", "seq": 1})
    store.append(2, [an_enrolment()])
    with caplog.at_level(logging.WARNING):
        bad, good = the_log(store)
    assert bad == Entry(1, "u\n1", unreadable=True)
    assert good.template is not None
    assert not (tmp_path / "ran-code").exists()
    assert r"'u\n1' (seq 1)" in caplog.text


@pytest.mark.parametrize(
    "fields",
    [
        {"user_id": 5},
        {"user_id": None},
        {"user_id": {"$gt": ""}},
        {"model": 5},
        {"embedding": None},
        {"erases": 5, "embedding": b""},
        {"user_id": Code("x")},
        {"model": Code("x")},
        {"erases": Code("x"), "embedding": b""},
    ],
)
def test_a_record_with_a_field_of_the_wrong_type_is_unreadable(
    mongo_database: Database, fields: dict[str, Any]
) -> None:
    if mongo_database.kind == "mongodb" and any(isinstance(value, Code) for value in fields.values()):
        pytest.skip("the stand-in server makes a text of it")
    store = mongo_database.open()
    record = {"user_id": "u", "embedding": pickle.dumps(NORMAL), "timestamp": 1.0, "model": "m", "seq": 1}
    mongo_database.write({**record, **fields})
    (entry,) = the_log(store)
    assert (entry.seq, entry.unreadable, entry.template) == (1, True, None)


def test_a_strange_timestamp_or_a_whole_float_as_place_does_no_harm(mongo_database: Database) -> None:
    store = mongo_database.open()
    embedding = pickle.dumps(NORMAL)
    mongo_database.write({"user_id": "a", "embedding": embedding, "timestamp": "yesterday", "seq": 1.0})
    mongo_database.write({"user_id": "b", "embedding": embedding, "seq": 1.5})
    store.append(2, [an_enrolment()])
    assert [(entry.seq, entry.template is None) for entry in the_log(store)] == [(1, False), (2, False)]
    assert type(the_log(store)[0].seq) is int


def _as_numpy_1(blob: bytes) -> bytes:
    """Rewrite a NumPy 2 pickle to the module paths and lengths that NumPy 1 writes."""
    for name in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        old = name.replace(b"_core", b"core")
        blob = blob.replace(b"\x8c%c%s" % (len(name), name), b"\x8c%c%s" % (len(old), old))
        blob = blob.replace(b"c%s\n" % name, b"c%s\n" % old)
    if blob[2:3] == pickle.FRAME:
        blob = blob[:3] + struct.pack("<Q", len(blob) - 11) + blob[11:]
    assert b"_core" not in blob
    return blob


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("numpy_1", [False, True])
@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f4"])
@pytest.mark.parametrize("shape", [(512,), (1, 512), (128,)])
def test_vectors_pickled_by_either_numpy_and_any_protocol_are_read(
    protocol: int, numpy_1: bool, dtype: str, shape: tuple[int, ...]
) -> None:
    vector = a_template(d=shape[-1]).astype(dtype).reshape(shape)
    blob = pickle.dumps(vector, protocol=protocol)
    if numpy_1:
        blob = _as_numpy_1(blob)
    database = Database("mongomock", Path())
    store = MongoStore(database.collection)
    database.write({"user_id": "u", "embedding": blob, "timestamp": 1.0, "seq": 1})
    (entry,) = the_log(store)
    assert entry.template is not None
    np.testing.assert_allclose(entry.template, vector.ravel(), atol=1e-7)


# --- MongoDB: the older plain form, crashes, dead servers ---


def plain(user_id: object, seed: int = 0, **fields: Any) -> dict[str, Any]:
    return {"user_id": user_id, "embedding": pickle.dumps(a_template(seed)), "timestamp": 1.0, **fields}


def test_records_of_the_older_form_get_places_after_the_last_in_the_order_of_their_ids(
    mongo_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_pages_of(4, monkeypatch)
    mongo_database.open().append(1, [an_enrolment(user_id="new")])
    for i in range(10):
        mongo_database.write(plain(f"u{i}", i))
    store = mongo_database.open()
    assert [(entry.seq, entry.user_id, entry.model) for entry in the_log(store)] == [
        (1, "new", "m"),
        *((i + 2, f"u{i}", None) for i in range(10)),
    ]
    assert store.append(12, [an_enrolment()])


@pytest.mark.parametrize("seq", ["text", None, 0, -4])
def test_what_is_no_place_is_replaced_by_one(mongo_database: Database, seq: object) -> None:
    mongo_database.write(plain("u", seq=seq))
    assert places(mongo_database.open()) == [1]


def test_servers_that_start_together_give_older_records_the_same_gapless_places(
    mongo_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_pages_of(7, monkeypatch)
    if mongo_database.kind == "mongomock":
        pytest.skip("mongomock's updates are not safe among threads")
    for i in range(60):
        mongo_database.write(plain(f"u{i}", i))
    stores = [mongo_database.open(prepare=False) for _ in range(3)]
    threads = [threading.Thread(target=store.prepare) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in stores:
        assert [(entry.seq, entry.user_id) for entry in the_log(store)] == [(i + 1, f"u{i}") for i in range(60)]


class Intercepted:
    """A collection whose method `name` is replaced; everything else is its own."""

    def __init__(self, collection: Any, name: str, method: Callable[..., Any]) -> None:
        self._collection = collection
        setattr(self, name, method)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collection, name)


def test_a_server_overtaken_between_reading_and_numbering_agrees_with_the_one_that_overtook_it(
    mongo_database: Database,
) -> None:
    for i in range(5):
        mongo_database.write(plain(f"u{i}", i))

    raw, overtaking = mongo_database.collection, [True]

    def overtaken(numbering: Any, ordered: bool) -> Any:
        if overtaking.pop():
            overtaking.append(False)
            assert mongo_database.open().append(6, [an_enrolment(user_id="new")])
            mongo_database.write(plain("late"))
        return raw.bulk_write(numbering, ordered=ordered)

    collection: Any = Intercepted(raw, "bulk_write", overtaken)
    slow = MongoStore(collection)
    slow.prepare()
    everybody = ["u0", "u1", "u2", "u3", "u4", "new", "late"]
    assert [(entry.seq, entry.user_id) for entry in the_log(slow)] == list(enumerate(everybody, 1))


def test_older_records_that_share_a_user_id_are_one_person_and_those_without_prevent_no_start(
    mongo_database: Database,
) -> None:
    for i, record in enumerate([plain("same", 1), plain("same", 2), plain(None, 3), plain("u", 4)]):
        mongo_database.write({**record, "timestamp": 1.0 + i})
    store = mongo_database.open()
    person = store.find_person("same")
    assert person is not None
    assert [(photo.number, photo.seq, photo.timestamp) for photo in person.photos] == [(1, 1, 1.0), (2, 2, 2.0)]
    assert [entry.user_id for entry in the_log(store)] == ["same", "same", None, "u"]
    assert store.append(5, [an_enrolment()])
    assert not store.append(5, [an_enrolment()])


def test_an_erasure_that_a_crash_cut_in_two_is_finished_at_the_next_start(mongo_database: Database) -> None:
    store, person, other = mongo_database.open(), an_enrolment(request_key="k"), an_enrolment(2)
    store.append(1, [person])
    store.append(2, [other])
    mongo_database.write({"user_id": "erased:x", "erases": person.user_id, "deleted_at": 1.0, "seq": Int64(3)})
    # A pattern in this place must not erase the people whom it matches.
    mongo_database.write({"user_id": "erased:y", "erases": {"$regex": ""}, "deleted_at": 1.0, "seq": Int64(4)})
    mongo_database.open()
    erased = mongo_database.collection.find_one({"user_id": person.user_id})
    assert "embedding" not in erased
    assert "request_key" not in erased
    assert [entry.template is None for entry in the_log(store)] == [True, False, True, True]


def test_an_insert_whose_answer_is_lost_is_never_claimed_stored_and_shows_in_the_log() -> None:
    raw: Any = mongomock.MongoClient()["db"]["faces"]

    def loses_the_answer(records: list[dict[str, Any]], **_: Any) -> None:
        raw.insert_many(records)
        raise NetworkTimeout("lost")

    collection: Any = Intercepted(raw, "insert_many", loses_the_answer)
    store, person = MongoStore(collection), an_enrolment()
    with pytest.raises(FaceError, match="database_unavailable"):
        store.append(1, [person])
    assert [entry.user_id for entry in the_log(store)] == [person.user_id]


def test_a_dead_server_is_unavailable_and_its_return_is_noticed(mortal_mongo_server: MongoServer) -> None:
    server = mortal_mongo_server
    store = make_store(server.uri, mongo_db="db", mongo_collection="faces", data_dir=Path(), timeout=0.5)
    store.prepare()
    assert store.append(1, [an_enrolment()])
    server.kill()
    for call in (
        store.ping,
        store.prepare,
        lambda: the_log(store),
        lambda: store.append(2, [an_enrolment()]),
        lambda: store.erase(2, "u"),
        lambda: store.find_request("k", 0),
    ):
        with pytest.raises(FaceError) as caught:
            call()
        assert (caught.value.code, caught.value.headers) == ("database_unavailable", {"Retry-After": "5"})
    server.start()
    for _ in range(20):
        with contextlib.suppress(FaceError):
            store.ping()
            break
    assert places(store) == [1]
    assert store.append(2, [an_enrolment()])
    store.close()


def test_what_mongodb_acknowledges_is_journalled_by_a_majority_and_what_is_applied_is_too() -> None:
    store = make_store("mongodb://127.0.0.1:1", mongo_db="db", mongo_collection="faces", data_dir=Path())
    assert isinstance(store, MongoStore)
    assert store.collection.write_concern.document == {"w": "majority", "j": True}
    assert store.collection.read_concern.document == {"level": "majority"}
    store.close()


def test_the_description_and_the_errors_name_hosts_but_no_credentials(tmp_path: Path) -> None:
    def opened(uri: str | None) -> EnrolmentLog:
        return make_store(uri, mongo_db="db", mongo_collection="faces", data_dir=tmp_path)

    store = opened("mongodb://user:p%40ss@one:27017,two:27018/db?replicaSet=rs")
    assert store.describe() == "MongoDB db.faces at one:27017,two:27018"
    store.close()
    assert opened(None).describe() == opened("").describe() == f"SQLite file {tmp_path / 'faces.sqlite3'}"
    for uri in (
        "mongodb://user:secret@x@host",
        "mongodb://user:secret/@host",
        "mongodb+srv://user:secret@x@host",
        "mongodb://host:secret",
    ):
        # A mistake, and no outage that the start waits for.
        with pytest.raises(ValueError, match="MONGO_URI is not valid") as caught:
            opened(uri)
        assert "secret" not in str(caught.value)
        assert caught.value.__suppress_context__


# --- SQLite ---


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_file_that_is_removed_or_replaced_under_a_running_store_decides_nothing_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, how: str
) -> None:
    path = tmp_path / "faces.sqlite3"
    store, another = SqliteStore(path), SqliteStore(path)
    store.prepare()
    another.prepare()
    store.append(1, [an_enrolment()])
    another.close()
    assert places(store) == [1]
    aside = (tmp_path / f"faces.sqlite3{suffix}").rename(tmp_path / "aside")
    if how == "replaced":
        (tmp_path / f"faces.sqlite3{suffix}").write_bytes(aside.read_bytes())
    for decide in (lambda: places(store), lambda: store.append(2, [an_enrolment()]), lambda: store.erase(2, "x")):
        with pytest.raises(FaceError, match="not_ready"):
            decide()
    assert "removed or replaced" in caplog.text
    aside.rename(tmp_path / f"faces.sqlite3{suffix}")
    assert places(store) == [1]
    store.close()


def test_what_was_written_to_a_file_that_is_gone_by_then_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "faces.sqlite3"
    store = SqliteStore(path)
    store.prepare()

    def removed_meanwhile(*values: Any) -> Any:
        path.unlink()
        return store_module.record_of(*values)

    monkeypatch.setattr(sqlite, "record_of", removed_meanwhile)
    with pytest.raises(FaceError, match="not_ready"):
        store.append(1, [an_enrolment()])
    store.close()


def test_while_another_process_holds_the_write_lock_reading_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 60.0)
    path = tmp_path / "faces.sqlite3"
    store = SqliteStore(path)
    store.prepare()
    store.append(1, [an_enrolment()])
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        writer = threading.Thread(target=store.append, args=(2, [an_enrolment()]))
        writer.start()
        while not store._writer.lock.locked():
            time.sleep(0.01)
        assert places(store) == [1]
        assert store.last_place() == 1
        assert writer.is_alive()
        other.rollback()
    writer.join()
    assert places(store) == [1, 2]
    store.close()


def test_a_record_at_an_impossible_place_stops_nobody_and_gets_a_place_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "faces.sqlite3"
    store = SqliteStore(path)
    store.prepare()
    store.append(1, [an_enrolment()])
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        for seq in (-1, 2**63 - 1):
            copied = "SELECT ?, ?, embedding, timestamp, model FROM faces WHERE seq = 1"
            other.execute(f"INSERT INTO faces (seq, user_id, embedding, timestamp, model) {copied}", (seq, str(seq)))
    assert places(store) == [1]
    assert store.append(store.last_place() + 1, [an_enrolment()]) == 1
    store.close()
    store.prepare()
    assert [entry.user_id for entry in the_log(store)][2:] == ["-1", str(2**63 - 1)]
    assert places(store) == [1, 2, 3, 4]
    store.close()


def test_behind_a_record_at_the_very_last_place_nothing_is_decided(database: Database) -> None:
    store = database.open()
    store.append(1, [an_enrolment()])
    (blob,) = (stored.embedding for stored in store.embeddings(0))
    database.write({"seq": 2**53 - 1, "user_id": "by hand", "embedding": blob, "timestamp": 1.0, "model": "m"})
    last = store.last_place()
    assert last == 2**53 - 1
    with pytest.raises(FaceError, match="not_ready"):
        store.append(last + 1, [an_enrolment()])
    with pytest.raises(FaceError, match="not_ready"):
        store.erase(last + 1, "by hand")


def test_only_the_owner_may_read_the_file_and_what_lies_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    store = SqliteStore(folder / "faces.sqlite3")
    store.prepare()
    store.append(1, [an_enrolment()])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == dict.fromkeys(("faces.sqlite3", "faces.sqlite3-wal", "faces.sqlite3-shm"), 0o600)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    store.close()


def test_an_erased_template_is_gone_from_the_file(tmp_path: Path) -> None:
    store, person = SqliteStore(tmp_path / "faces.sqlite3"), an_enrolment()
    store.prepare()
    store.append(1, [person])
    store.erase(2, person.user_id)
    store.close()
    assert person.template.tobytes() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_processes_that_start_together_on_a_new_file_all_start(tmp_path: Path) -> None:
    stores = [SqliteStore(tmp_path / "faces.sqlite3") for _ in range(16)]
    failures: list[FaceError] = []

    def prepare(store: SqliteStore) -> None:
        try:
            store.prepare()
        except FaceError as error:
            failures.append(error)

    threads = [threading.Thread(target=prepare, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for store in stores:
        store.close()


@pytest.mark.parametrize("trouble", ["not prepared", "closed", "no database", "folder is a file"])
def test_a_file_that_cannot_be_used_is_unavailable(tmp_path: Path, trouble: str) -> None:
    store = SqliteStore(tmp_path / "folder" / "faces.sqlite3")
    if trouble == "closed":
        store.prepare()
        store.close()
    elif trouble == "no database":
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "faces.sqlite3").write_bytes(b"no database" * 1000)
    elif trouble == "folder is a file":
        (tmp_path / "folder").write_bytes(b"")
    call = store.prepare if trouble in ("no database", "folder is a file") else store.ping
    with pytest.raises(FaceError, match="database_unavailable"):
        call()


def test_a_full_disk_is_unavailable_and_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "faces.sqlite3")
    store.prepare()
    store.append(1, [an_enrolment()])
    assert store._writer.connection is not None
    (pages,) = store._writer.connection.execute("PRAGMA page_count").fetchone()
    store._writer.connection.execute(f"PRAGMA max_page_count = {pages}")

    def fill() -> None:
        for seq in range(2, 100):
            assert store.append(seq, [an_enrolment()])

    with pytest.raises(FaceError, match="database_unavailable") as caught:
        fill()
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    last = places(store)[-1]
    store._writer.connection.execute("PRAGMA max_page_count = 100000")
    assert store.append(last + 1, [an_enrolment()])
    assert places(store) == list(range(1, last + 2))
    store.close()


def test_a_start_and_a_backup_on_a_full_disk_find_everybody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "faces.sqlite3"
    killed = SqliteStore(path)  # it leaves its write-ahead log behind
    killed.prepare()
    for seq in range(1, 30):
        killed.append(seq, [an_enrolment()])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, limits[1]))
    try:
        store = SqliteStore(path)
        store.prepare()
        assert len(list(store.documents(29))) == 29
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "holds erased templates" in caplog.text
    assert store.append(30, [an_enrolment()])
    store.close()
    killed.close()


ENROLS_FOR_EVER = """
import sys, numpy as np
from pathlib import Path
from store.sqlite import SqliteStore
from store.records import Enrolment
store = SqliteStore(Path(sys.argv[1]))
store.prepare()
template = np.eye(1, 512, dtype=np.float32)[0]
seq = max((entry.seq for entry in store.entries(0)), default=0)
while True:
    seq += 1
    assert store.append(seq, [Enrolment(f"user {seq}", template, "m", 1.0)])
    print(seq, flush=True)
"""


def test_what_sqlite_acknowledged_survives_a_kill_in_mid_write(tmp_path: Path) -> None:
    path = tmp_path / "faces.sqlite3"
    acknowledged = 0
    for wanted in (5, 40):
        with subprocess.Popen(
            [sys.executable, "-c", ENROLS_FOR_EVER, path], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            for _ in range(wanted):
                acknowledged = int(child.stdout.readline())
            child.send_signal(signal.SIGKILL)
            acknowledged = max([acknowledged, *(int(line) for line in child.stdout if line.endswith("\n"))])
        store = SqliteStore(path)
        store.prepare()
        found = the_log(store)
        assert [entry.seq for entry in found] == list(range(1, len(found) + 1))
        assert len(found) >= acknowledged
        assert not any(entry.unreadable for entry in found)
        store.close()


# --- a batch, and what a snapshot asks ---


def test_a_batch_takes_consecutive_places_and_none_when_the_first_is_taken(database: Database) -> None:
    store = database.open()
    people = [an_enrolment(seed) for seed in range(3)]
    assert store.append(1, people) == 3
    assert [entry.user_id for entry in store.entries(0)] == [one.user_id for one in people]
    assert store.append(3, [an_enrolment(4), an_enrolment(5)]) == 0
    assert places(store) == [1, 2, 3]
    assert store.last_place() == 3


def test_a_batch_ends_at_the_first_place_that_is_taken_and_leaves_no_hole(mongo_database: Database) -> None:
    store = mongo_database.open()
    mongo_database.write({"user_id": "other", "erases": "x", "deleted_at": 1.0, "seq": 3})
    people = [an_enrolment(seed) for seed in range(4)]
    assert store.append(1, people) == 2
    assert [record["user_id"] for record in mongo_database.collection.find().sort("seq")] == [
        people[0].user_id,
        people[1].user_id,
        "other",
    ]


def test_a_batch_of_which_the_end_cannot_be_seen_is_not_claimed() -> None:
    raw: Any = mongomock.MongoClient()["db"]["faces"]

    def is_not_confirmed(records: list[dict[str, Any]], **_: Any) -> None:
        raw.insert_many(records[:1])
        raise WriteConcernError("waiting for a majority timed out", 64)

    store = MongoStore(cast("Any", Intercepted(raw, "insert_many", is_not_confirmed)))
    with pytest.raises(FaceError, match="database_unavailable"):
        store.append(1, [an_enrolment(1), an_enrolment(2)])


def test_a_checkpoint_tells_logs_apart_by_their_length_their_last_record_and_what_was_taken_out(
    database: Database,
) -> None:
    store = database.open()
    assert store.last_place() == 0
    store.append(1, [an_enrolment(seed) for seed in range(4)])
    checkpoint = store.checkpoint(3)
    assert checkpoint == database.open().checkpoint(3)
    assert checkpoint not in (store.checkpoint(2), store.checkpoint(4), store.checkpoint(5))
    remove(database, 2)
    assert store.checkpoint(3) != checkpoint


def test_the_log_names_whom_it_erases_up_to_a_place(database: Database) -> None:
    store = database.open()
    people = [an_enrolment(seed) for seed in range(3)]
    store.append(1, people)
    store.erase(4, people[2].user_id)
    store.erase(5, people[0].user_id)
    assert store.erasures(3) == []
    assert store.erasures(4) == [people[2].user_id]
    assert sorted(store.erasures(9)) == sorted([people[0].user_id, people[2].user_id])


def remove(database: Database, seq: int) -> None:
    """Take a record out by hand, as an operator might."""
    if database.collection is not None:
        database.collection.delete_one({"seq": seq})
        return
    with contextlib.closing(sqlite3.connect(database.folder / "faces.sqlite3")) as connection, connection:
        connection.execute("DELETE FROM faces WHERE seq = ?", (seq,))
