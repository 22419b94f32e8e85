"""Backups: made while people enrol, read only if they are whole, restored to what they were."""

from __future__ import annotations

import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bson.datetime_ms import DatetimeMS

import app
from commands.backup import backup_file
from commands.backup.backup_file import BackupError, read_frames
from commands.backup.command import PARTIAL, restore, write
from engines.base import Template
from errors import FaceError
from gallery.decisions import Gallery
from gallery.snapshot import SnapshotFolder
from settings import PROJECT
from store.encryption import NO_KEYS, Keyring
from store.records import Document, Enrolment, RecordStore
from store.sqlite import SqliteStore
from tests.support.databases import Database
from tests.support.running import ASTRONAUT, Service

KEYS = Keyring((bytes(range(32)),))


def a_template(seed: int) -> Template:
    vector = np.random.default_rng(seed).normal(size=64)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def people(*seeds: int) -> list[Enrolment]:
    return [Enrolment(f"person-{seed}", a_template(seed), "m", 1000.0 + seed, f"request-{seed}") for seed in seeds]


def an_empty_store(folder: Path, keyring: Keyring = NO_KEYS) -> SqliteStore:
    store = SqliteStore(folder / uuid.uuid4().hex / "faces.sqlite3", keyring)
    store.prepare()
    return store


@pytest.fixture(params=[NO_KEYS, KEYS], ids=["plain", "sealed"])
def keyring(request: pytest.FixtureRequest) -> Keyring:
    keyring: Keyring = request.param
    return keyring


@pytest.fixture
def full(database: Database, keyring: Keyring) -> RecordStore:
    """A store with two living people, one erased, and a note."""
    store = database.open(keyring=keyring)
    store.append(1, people(1, 2, 3))
    store.erase(4, "person-2")
    store.note_seen(["person-1"], 20000)
    return store


def test_what_is_restored_is_what_was_backed_up(full: RecordStore, keyring: Keyring, tmp_path: Path) -> None:
    assert write(full, tmp_path / "backup", keyring) == 4
    other = an_empty_store(tmp_path, keyring)
    assert restore(other, tmp_path / "backup", keyring, replace=False) == 4
    for mine, theirs in zip(full.entries(0), other.entries(0), strict=True):
        assert (mine.seq, mine.user_id, mine.model, mine.erases) == (
            theirs.seq, theirs.user_id, theirs.model, theirs.erases,
        )  # fmt: skip
        assert (mine.template is None) == (theirs.template is None)
        if mine.template is not None and theirs.template is not None:
            assert np.array_equal(mine.template, theirs.template)
    assert list(other.notes()) == [("person-1", 20000)]
    assert other.find_request("request-3", 0) == "person-3"
    assert Gallery(other, "m", 64).enrol(a_template(9), duplicate_cosine=0.5)


def test_a_backup_is_for_the_operators_eyes_alone(full: RecordStore, keyring: Keyring, tmp_path: Path) -> None:
    path = tmp_path / "backup"
    write(full, path, keyring)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (b"person-1" in path.read_bytes()) is not bool(keyring)
    assert list(tmp_path.glob(f"{PARTIAL}*")) == []


def test_every_cut_and_every_flipped_bit_is_noticed_before_anything_is_written(
    full: RecordStore, keyring: Keyring, tmp_path: Path
) -> None:
    path = tmp_path / "backup"
    write(full, path, keyring)
    whole = path.read_bytes()
    other = an_empty_store(tmp_path, keyring)
    flips = {*np.random.default_rng(1).integers(len(whole), size=150).tolist(), *range(len(whole) - 250, len(whole))}
    spoilt = [whole[:length] for length in range(0, len(whole), 37)] + [whole + b"x"]
    spoilt += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in flips]
    for data in spoilt:
        path.write_bytes(data)
        with pytest.raises(BackupError):
            restore(other, path, keyring, replace=False)
    assert other.last_place() == 0


def test_frames_of_two_backups_cannot_be_mixed(full: RecordStore, keyring: Keyring, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write(full, one, keyring)
    write(full, other, keyring)
    mixed = one.read_bytes().partition(b"\n")[0] + b"\n" + other.read_bytes().partition(b"\n")[2]
    one.write_bytes(mixed)
    with pytest.raises(BackupError):
        list(read_frames(one, keyring))


def test_a_sealed_backup_needs_its_key(tmp_path: Path) -> None:
    store = an_empty_store(tmp_path, KEYS)
    store.append(1, people(1))
    write(store, tmp_path / "backup", KEYS)
    for wrong in (NO_KEYS, Keyring((bytes(32),))):
        with pytest.raises(BackupError):
            restore(an_empty_store(tmp_path), tmp_path / "backup", wrong, replace=False)


def test_a_store_with_people_in_it_is_replaced_only_when_told(
    full: RecordStore, database: Database, keyring: Keyring, tmp_path: Path
) -> None:
    write(full, tmp_path / "backup", keyring)
    full.append(5, people(5))
    with pytest.raises(BackupError, match="--replace"):
        restore(full, tmp_path / "backup", keyring, replace=False)
    assert full.find_person("person-5") is not None
    assert restore(full, tmp_path / "backup", keyring, replace=True) == 4
    assert full.find_person("person-5") is None
    assert full.last_place() == 4


@pytest.mark.parametrize("enrolled_after_the_restore", [0, 2])
def test_a_service_that_runs_while_a_backup_is_restored_decides_nothing_any_more(
    database: Database, tmp_path: Path, enrolled_after_the_restore: int
) -> None:
    store, gallery = database.open(), Gallery(database.open(), "m", 64)
    store.append(1, people(1))
    write(store, tmp_path / "backup", NO_KEYS)
    store.append(2, people(2, 3))
    gallery.refresh()
    restore(store, tmp_path / "backup", NO_KEYS, replace=True)
    for place in range(2, 2 + enrolled_after_the_restore):
        store.append(place, people(2 * place))
    for decision in (
        gallery.refresh,
        lambda: gallery.search(a_template(1)),
        lambda: gallery.compare("person-2", a_template(2)),
        lambda: gallery.erase("person-1"),
        lambda: gallery.enrol(a_template(6), duplicate_cosine=0.5),
    ):
        with pytest.raises(FaceError, match="not_ready"):
            decision()
    assert store.last_place() == 1 + enrolled_after_the_restore


def test_whoever_decided_before_a_restore_cannot_write_behind_the_end_of_the_restored_log(tmp_path: Path) -> None:
    store = an_empty_store(tmp_path)
    store.append(1, people(1))
    write(store, tmp_path / "backup", NO_KEYS)
    store.append(2, people(2, 3))
    restore(store, tmp_path / "backup", NO_KEYS, replace=True)
    assert store.append(4, people(4)) == 0
    assert not store.erase(4, "person-1")
    assert [entry.seq for entry in store.entries(0)] == [1]


class ErasingMeanwhile(SqliteStore):
    """A store in which somebody is erased right after their record was read."""

    def notes(self) -> Iterator[tuple[str, int]]:
        self.erase(self.last_place() + 1, "person-1")
        return super().notes()


class NotedBeforeErased(SqliteStore):
    """A store in which somebody is erased right after the note on them was read."""

    def notes(self) -> Iterator[tuple[str, int]]:
        yield from super().notes()
        self.erase(self.last_place() + 1, "person-1")


def test_who_is_erased_while_the_backup_is_made_does_not_come_back(tmp_path: Path) -> None:
    store = ErasingMeanwhile(tmp_path / "faces.sqlite3")
    store.prepare()
    store.append(1, people(1, 2))
    write(store, tmp_path / "backup", NO_KEYS)
    other = an_empty_store(tmp_path)
    restore(other, tmp_path / "backup", NO_KEYS, replace=False)
    assert [(entry.user_id, entry.erases) for entry in other.entries(0)] == [
        (None, None),
        ("person-2", None),
        (None, "person-1"),
    ]
    store.close()


def test_not_even_a_snapshot_of_before_brings_them_back(tmp_path: Path) -> None:
    store = ErasingMeanwhile(tmp_path / "faces.sqlite3")
    store.prepare()
    store.append(1, people(1, 2))
    elsewhere = Gallery(store, "m", 64, snapshot=SnapshotFolder(tmp_path / "gallery", "", 64))
    elsewhere.load()
    elsewhere.close()
    write(store, tmp_path / "backup", NO_KEYS)
    restore(store, tmp_path / "backup", NO_KEYS, replace=True)
    again = Gallery(store, "m", 64, snapshot=SnapshotFolder(tmp_path / "gallery", "", 64))
    again.load()
    assert {one.user_id for one in again.candidates(a_template(1), None)} == {"person-2"}
    again.close()
    store.close()


def test_who_is_erased_while_the_backup_is_made_leaves_no_note(tmp_path: Path) -> None:
    store = NotedBeforeErased(tmp_path / "faces.sqlite3")
    store.prepare()
    store.append(1, people(1, 2))
    store.note_seen(["person-1", "person-2"], 20000)
    write(store, tmp_path / "backup", NO_KEYS)
    other = an_empty_store(tmp_path)
    restore(other, tmp_path / "backup", NO_KEYS, replace=False)
    assert list(other.notes()) == [("person-2", 20000)]
    store.close()


def test_what_mongodbs_vector_index_knows_of_one_database_is_not_carried_to_another(
    mongo_database: Database, tmp_path: Path
) -> None:
    store = mongo_database.open()
    store.append(1, people(1))
    mongo_database.collection.update_one(
        {"seq": 1}, {"$set": {"vector": [1.0], "vector_model": "m", "vector_marks": ["m"]}}
    )
    write(store, tmp_path / "backup", NO_KEYS)
    restore(store, tmp_path / "backup", NO_KEYS, replace=True)
    assert set(mongo_database.collection.find_one({"seq": 1})) == {
        "_id", "seq", "user_id", "embedding", "timestamp", "model", "request_key",
    }  # fmt: skip


def test_a_field_and_a_place_that_nobody_reads_spoil_no_backup(mongo_database: Database, tmp_path: Path) -> None:
    store = mongo_database.open()
    store.append(1, people(1))
    if mongo_database.kind != "mongodb":  # the stand-in server itself stumbles over it
        mongo_database.collection.update_one({"seq": 1}, {"$set": {"date": DatetimeMS(2**60)}})
    mongo_database.write({"user_id": "nowhere", "seq": 0.5})
    assert write(store, tmp_path / "backup", NO_KEYS) == 1
    assert restore(an_empty_store(tmp_path), tmp_path / "backup", NO_KEYS, replace=False) == 1


def test_records_that_together_outgrow_a_frame_spoil_no_backup(
    database: Database, keyring: Keyring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_file, "MAX_FRAME_BYTES", 4 * 2**20)
    store = database.open(keyring=keyring)
    for place in range(1, 9):
        database.write({"seq": place, "user_id": f"huge-{place}", "embedding": bytes(1_000_000)})
    store.append(9, people(9))
    assert write(store, tmp_path / "backup", keyring) == 9
    other = an_empty_store(tmp_path, keyring)
    assert restore(other, tmp_path / "backup", keyring, replace=False) == 9
    assert [entry.unreadable for entry in other.entries(0)] == [True] * 8 + [False]


def test_a_record_that_no_frame_holds_is_named(
    full: RecordStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_file, "MAX_FRAME_BYTES", 400)
    with pytest.raises(BackupError, match="person-1"):
        write(full, tmp_path / "backup", NO_KEYS)
    assert list(tmp_path.glob(f"{PARTIAL}*")) == []


@pytest.mark.parametrize(
    "strange",
    [{"user_id": ["a"]}, {"user_id": 2**40}, {"timestamp": {"a": 1}}, {"model": ["m"]}, {"erases": {"$gt": ""}}],
)
def test_a_record_whose_fields_can_be_anything_is_restored_as_an_unreadable_one(
    mongo_database: Database, strange: dict[str, Any], tmp_path: Path
) -> None:
    store = mongo_database.open()
    store.append(1, people(1))
    mongo_database.write({"seq": 2, "user_id": "strange", "embedding": b"", "timestamp": 1.0, "model": "m"} | strange)
    write(store, tmp_path / "backup", NO_KEYS)
    for other in (store, an_empty_store(tmp_path)):
        assert restore(other, tmp_path / "backup", NO_KEYS, replace=True) == 2
        assert [(entry.seq, entry.unreadable) for entry in other.entries(0)] == [(1, False), (2, True)]


def test_two_records_of_one_place_are_told_of_where_they_cannot_both_be_held(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the same place"):
        an_empty_store(tmp_path).fill([{"seq": 1, "user_id": "u"}, {"seq": 1, "user_id": "v"}], [], replace=False)


def test_several_photos_of_a_person_are_backed_up_and_restored(database: Database, tmp_path: Path) -> None:
    store = database.open()
    store.append(1, people(1, 2))
    better = replace(people(1)[0], photo_id="b", removes=1, quality=0.75)
    store.append(3, [replace(people(1)[0], photo_id="a"), better])
    store.append(5, [replace(people(2)[0], photo_id="c")])
    store.remove_photo(6, 3)
    write(store, tmp_path / "backup", NO_KEYS)
    assert restore(store, tmp_path / "backup", NO_KEYS, replace=True) == 6
    other = an_empty_store(tmp_path)
    assert restore(other, tmp_path / "backup", NO_KEYS, replace=False) == 6
    for restored in (store, other):
        assert [stored.seq for stored in restored.embeddings(0)] == [2, 4, 5]
        person = restored.find_person(better.user_id)
        assert person is not None
        assert [photo.quality for photo in person.photos] == [0.75]
        gallery = Gallery(restored, "m", 64)
        gallery.refresh()
        assert (gallery.status()["enrolled"], gallery.status()["photos"]) == (2, 3)
        assert [(entry.seq, entry.removes) for entry in restored.entries(0) if entry.removes] == [(4, 1), (6, 3)]
    other.close()


class RemovingMeanwhile(SqliteStore):
    """A store in which a photo is removed while the notes are read, which is after the records."""

    def notes(self) -> Iterator[tuple[str, int]]:
        yield from super().notes()
        self.remove_photo(self.last_place() + 1, 1)


def test_a_photo_that_is_removed_while_the_backup_is_made_does_not_come_back(tmp_path: Path) -> None:
    store = RemovingMeanwhile(tmp_path / "faces.sqlite3")
    store.prepare()
    store.append(1, people(1))
    store.append(2, [replace(people(2)[0], user_id="person-1", photo_id="a")])
    write(store, tmp_path / "backup", NO_KEYS)
    other = an_empty_store(tmp_path)
    restore(other, tmp_path / "backup", NO_KEYS, replace=False)
    assert [stored.seq for stored in other.embeddings(0)] == [2]
    assert [entry.removes for entry in other.entries(0)] == [None, None, 1]
    other.close()
    store.close()


def test_what_a_restored_backup_still_wants_of_the_keys_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, plain = Keyring((bytes(32),)), an_empty_store(tmp_path)
    plain.append(1, people(1))
    sealed = an_empty_store(tmp_path, older)
    sealed.append(1, people(1))
    for source, keyring, told in (
        (plain, KEYS, "1 templates are plain or under an older key"),
        (sealed, Keyring((*KEYS.keys, *older.keys)), "1 templates are plain or under an older key"),
        (sealed, KEYS, f"under the key {older.names[0]}"),
    ):
        caplog.clear()
        write(source, tmp_path / "backup", keyring, replace=True)
        restore(an_empty_store(tmp_path, keyring), tmp_path / "backup", keyring, replace=False)
        assert told in caplog.text


KILLED = """
import sys, time
from pathlib import Path
from commands.backup.command import write
from store.encryption import NO_KEYS
from store.sqlite import SqliteStore

class Slow(SqliteStore):
    def notes(self):
        print("half of it is written", flush=True)
        time.sleep(60)
        return super().notes()

store = Slow(Path(sys.argv[1]))
store.prepare()
write(store, Path(sys.argv[2]), NO_KEYS, replace=True)
"""


def test_a_backup_that_is_killed_leaves_the_one_before_and_the_next_one_clears_up(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "faces.sqlite3")
    store.prepare()
    store.append(1, people(1))
    path = tmp_path / "backup"
    write(store, path, NO_KEYS)
    before = path.read_bytes()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "faces.sqlite3"), str(path)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        running = list(tmp_path.glob(f"{PARTIAL}*"))
        write(store, tmp_path / "another", NO_KEYS)
        assert list(tmp_path.glob(f"{PARTIAL}*")) == running
        process.kill()
    assert path.read_bytes() == before
    write(store, path, NO_KEYS, replace=True)
    assert len(running) == 1
    assert list(tmp_path.glob(f"{PARTIAL}*")) == []
    store.close()


def test_a_restore_that_breaks_off_in_the_middle_leaves_an_sqlite_store_as_it_was(tmp_path: Path) -> None:
    store = an_empty_store(tmp_path)
    store.append(1, people(1, 2))

    def broken() -> Iterator[Document]:
        yield {"seq": 1, "user_id": "somebody else"}
        raise OSError("the file cannot be read any more")

    with pytest.raises(OSError, match="any more"):
        store.fill(broken(), [], replace=True)
    assert [entry.user_id for entry in store.entries(0)] == ["person-1", "person-2"]


def test_nobody_decides_on_a_restore_that_was_cut_off_on_mongodb_until_it_is_done_again(
    mongo_database: Database, tmp_path: Path
) -> None:
    store = mongo_database.open()
    store.append(1, people(1, 2))
    store.note_seen(["person-1"], 20000)
    write(store, tmp_path / "backup", NO_KEYS)

    def broken() -> Iterator[Document]:
        yield from list(store.documents(1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.fill(broken(), [], replace=True)
    started = mongo_database.open()
    with pytest.raises(FaceError, match="not_ready"):
        started.last_place()  # what a gallery asks first
    with pytest.raises(FaceError, match="not_ready"):
        write(started, tmp_path / "a part", NO_KEYS)
    restore(mongo_database.open(), tmp_path / "backup", NO_KEYS, replace=True)
    assert started.last_place() == 2
    assert list(started.notes()) == [("person-1", 20000)]


def test_a_backup_beside_enrolments_holds_a_beginning_of_the_log_without_a_hole(
    database: Database, tmp_path: Path
) -> None:
    store = database.open()
    gallery = Gallery(database.open(), "m", 64)
    over = threading.Event()

    def enrol() -> None:
        for seed in range(10_000):
            if over.is_set():
                return
            gallery.enrol(a_template(seed), duplicate_cosine=0.99)

    thread = threading.Thread(target=enrol)
    thread.start()
    try:
        for _ in range(3):
            count = write(store, tmp_path / "backup", NO_KEYS, replace=True)
            records = [
                one for content in read_frames(tmp_path / "backup", NO_KEYS) for one in content.get("records", ())
            ]
            assert [record["seq"] for record in records] == list(range(1, count + 1))
    finally:
        over.set()
        thread.join()


def test_the_commands_move_people_from_one_database_to_another(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "one" / "faces.sqlite3")
    store.prepare()
    store.append(1, people(1, 2))
    file = str(tmp_path / "backup")
    assert app.main(["backup", file, "--data-dir", str(tmp_path / "one")]) == 0
    before = (tmp_path / "backup").read_bytes()
    assert app.main(["backup", file, "--data-dir", str(tmp_path / "one")]) == 1
    assert (tmp_path / "backup").read_bytes() == before
    assert app.main(["backup", file, "--replace", "--data-dir", str(tmp_path / "one")]) == 0
    assert app.main(["restore", file, "--data-dir", str(tmp_path / "two")]) == 0
    assert app.main(["restore", file, "--data-dir", str(tmp_path / "two")]) == 1
    assert app.main(["restore", file, "--replace", "--data-dir", str(tmp_path / "two")]) == 0
    other = SqliteStore(tmp_path / "two" / "faces.sqlite3")
    other.prepare()
    assert [entry.user_id for entry in other.entries(0)] == ["person-1", "person-2"]


@pytest.mark.slow
def test_a_restored_backup_is_served_whatever_the_snapshot_of_before_says(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.start()
    data = ["--data-dir", str(tmp_path / "data")]
    assert app.main(["backup", str(tmp_path / "empty"), *data]) == 0
    assert service.post("/signUp", ASTRONAUT).status_code == 200
    assert app.main(["backup", str(tmp_path / "full"), *data]) == 0
    service.stop()
    for file, status in (("empty", 401), ("full", 200)):
        assert app.main(["restore", str(tmp_path / file), "--replace", *data]) == 0
        service.start()
        assert service.post("/verify", ASTRONAUT).status_code == status
        service.stop()
