"""Templates at rest under TEMPLATE_KEYS: what the database gives away, what cannot be swapped, and rotation."""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bootstrap
from commands import rotate_keys
from engines.base import Template
from errors import FaceError
from gallery.decisions import Gallery
from gallery.templates import Templates
from settings import PROJECT, Settings, SettingsError, load_settings
from store import template_bytes
from store.documents import PAGE_RECORDS
from store.encryption import MAGIC, Keyring, is_sealed, parse_keys
from store.mongo import MongoStore
from store.mongo_vectors import MongoVectorIndex
from store.records import Enrolment, EnrolmentLog, StoredEmbedding
from store.sqlite import SqliteStore
from tests.support.databases import Database
from tests.support.fakes import ScriptedEngine

OLD, NEW = Keyring((bytes(range(32)),)), Keyring((bytes(range(32, 64)),))
BOTH = Keyring((*NEW.keys, *OLD.keys))


def text(keyring: Keyring) -> str:
    return ",".join(base64.b64encode(key).decode() for key in keyring.keys)


def a_template(seed: int) -> Template:
    vector = np.random.default_rng(seed).normal(size=512)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def as_read(seed: int) -> Template:
    """A template as it is read from a store, to the last bit."""
    return template_bytes.decode(template_bytes.encode(a_template(seed), "", "m", NEW), "", "m", NEW)


def started(folder: Path, keyring: Keyring) -> tuple[EnrolmentLog, Gallery]:
    """What a service makes of its settings: its store and its gallery, loaded."""
    settings = Settings(data_dir=folder, template_keys=text(keyring))
    engine = ScriptedEngine()
    engine.dimension = 512
    store = bootstrap.connect_store(settings)
    gallery = bootstrap.gallery_of(settings, store, engine)
    gallery.load()
    return store, gallery


def an_enrolment(seed: int, user_id: str | None = None) -> Enrolment:
    return Enrolment(user_id or f"person-{seed}", a_template(seed), "m", 1000.0 + seed)


def gives_away(folder: Path, template: Template) -> bool:
    """Whether any part of the template, of its pickle or of its 8-bit code lies readable in any file of a folder."""
    files = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    coded = Templates(len(template)).extended(template[None], ["somebody"], [1]).blocks[0].arrays["codes"][0]
    # A record may be cut in two by the edge of a page.
    forms = (template.tobytes(), template.astype(np.float64).tobytes(), coded.tobytes())
    return any(form[at : at + 24] in files for form in forms for at in range(0, len(form) - 24, 128))


def templates_of(database: Database, keyring: Keyring) -> dict[str | None, Template | None]:
    return {entry.user_id: entry.template for entry in database.open(keyring=keyring).entries(0)}


def test_what_is_stored_under_a_key_is_read_with_it(database: Database) -> None:
    database.open(keyring=NEW).append(1, [an_enrolment(1), an_enrolment(2)])
    found = templates_of(database, BOTH)
    for seed in (1, 2):
        template = found[f"person-{seed}"]
        assert template is not None
        assert np.allclose(template, a_template(seed), atol=1e-6)


def test_records_from_before_the_keys_are_still_read(database: Database) -> None:
    database.open().append(1, [an_enrolment(1)])
    assert templates_of(database, NEW)["person-1"] is not None


def test_without_the_key_nothing_is_decided_at_all(database: Database) -> None:
    database.open(keyring=NEW).append(1, [an_enrolment(1)])
    for keyring in (OLD, Keyring()):
        with pytest.raises(FaceError) as refusal:
            templates_of(database, keyring)
        assert refusal.value.code == "not_ready"


def test_a_replica_that_lacks_the_key_enrols_nobody_a_second_time(database: Database) -> None:
    keyless = Gallery(database.open(), "m", 512)
    keyless.enrol(a_template(1), duplicate_cosine=0.5)
    keyed = Gallery(database.open(keyring=NEW), "m", 512)
    keyed.enrol(a_template(2), duplicate_cosine=0.5)
    for seed in (1, 2, 3):
        with pytest.raises(FaceError) as refusal:
            keyless.enrol(a_template(seed), duplicate_cosine=0.5)
        assert refusal.value.code == "not_ready"
    assert len(list(database.open(keyring=NEW).entries(0))) == 2


def test_a_command_that_lacks_the_key_ends_instead_of_waiting_for_it(database: Database) -> None:
    database.open(keyring=NEW).append(1, [an_enrolment(1)])
    with pytest.raises(FaceError, match="not_ready"):
        Gallery(database.open(), "m", 512).load(keep_trying=False)


def test_a_damaged_sealed_record_is_set_aside_and_stops_nobody(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    store = database.open(keyring=NEW)
    store.append(1, [an_enrolment(1), an_enrolment(2)])
    damaged, _ = store.embeddings(0)
    flipped = damaged.embedding[:-1] + bytes([damaged.embedding[-1] ^ 1])
    for blob in (damaged.embedding[:-1], flipped, MAGIC):
        (now, _) = store.embeddings(0)
        store.replace_embeddings([(now, blob)])
        assert [entry.unreadable for entry in store.entries(0)] == [True, False]
    assert "person-1" in caplog.text
    gallery = Gallery(store, "m", 512)
    gallery.load()
    assert (gallery.status()["unreadable"], gallery.status()["enrolled"]) == (1, 1)


def test_a_record_without_a_user_id_stops_nobody_whatever_key_it_claims(database: Database) -> None:
    if database.collection is None:
        pytest.skip("SQLite's user_ids are texts")
    store = database.open(keyring=NEW)
    database.write({"seq": 1, "user_id": 7, "embedding": OLD.seal(b"anything", "anywhere")})
    assert [entry.unreadable for entry in store.entries(0)] == [True]


@pytest.mark.parametrize("timestamp", [1e300, -1e18, 0.0])
def test_a_person_enrolled_at_no_possible_time_is_found_without_one(database: Database, timestamp: float) -> None:
    store = database.open()
    blob = template_bytes.encode(a_template(1), "person-1", "m", Keyring())
    database.write({"seq": 1, "user_id": "person-1", "embedding": blob, "timestamp": timestamp})
    person = store.find_person("person-1")
    assert person is not None
    assert (person.timestamp, person.model) == (None, None)


def test_a_sealed_template_in_somebody_elses_record_never_matches(database: Database) -> None:
    store = database.open(keyring=NEW)
    store.append(1, [an_enrolment(1), an_enrolment(2)])
    victim, thief = store.embeddings(0)
    assert store.replace_embeddings([(victim, thief.embedding)]) == 1
    entries = list(store.entries(0))
    assert [entry.unreadable for entry in entries] == [True, False]
    gallery = Gallery(store, "m", 512)
    with pytest.raises(FaceError):
        gallery.compare("person-1", a_template(2))


def test_a_sealed_template_under_another_models_name_is_no_template() -> None:
    blob = template_bytes.encode(a_template(1), "somebody", "m", NEW)
    with pytest.raises(ValueError, match="place"):
        template_bytes.decode(blob, "somebody", "another", NEW)


@pytest.mark.parametrize(("keyring", "given_away"), [(Keyring(), True), (NEW, False)])
def test_stolen_files_give_no_template_away_neither_of_the_store_nor_of_the_snapshot(
    tmp_path: Path, keyring: Keyring, given_away: bool
) -> None:
    store, gallery = started(tmp_path, keyring)
    gallery.enrol(as_read(1), duplicate_cosine=0.5)
    assert gives_away(tmp_path, as_read(1)) is given_away  # while it runs
    gallery.refresh()
    gallery.close()
    assert gives_away(tmp_path / "gallery", as_read(1)) is given_away
    assert (tmp_path / "gallery" / "tail").stat().st_size > as_read(1).nbytes
    assert not gives_away(tmp_path, as_read(2))
    store.close()


def test_a_plain_template_that_somebody_puts_into_an_encrypted_database_matches_nobody_once_they_are_refused(
    folder: Path,
) -> None:
    assert rotate(folder, BOTH)[0] == 0
    store = SqliteStore(folder / "faces.sqlite3")
    store.prepare()
    store.append(store.last_place() + 1, [an_enrolment(66, "victim")])
    for plain_templates, found in (("read", True), ("refuse", False)):
        settings = Settings(data_dir=folder, template_keys=text(NEW), plain_templates=plain_templates)
        engine = ScriptedEngine()
        engine.name, engine.dimension = "m", 512
        gallery = bootstrap.gallery_of(settings, bootstrap.connect_store(settings), engine)
        gallery.load()
        best = gallery.search(a_template(66))
        assert (best is not None and best.user_id == "victim") is found
        gallery.close()  # ... with a snapshot, which must not bring the victim back
    assert rotate(folder, NEW, plain_templates="refuse")[0] == 1
    assert [is_sealed(stored.embedding) for stored in store.embeddings(0)] == [True] * 4 + [False]
    store.close()


def test_refusing_plain_templates_without_keys_is_refused_at_the_start() -> None:
    with pytest.raises(SettingsError, match="TEMPLATE_KEYS"):
        Settings(plain_templates="refuse")


def test_what_a_service_without_keys_left_on_its_disk_goes_when_keys_come(tmp_path: Path) -> None:
    store, gallery = started(tmp_path, Keyring())
    gallery.enrol(as_read(1), duplicate_cosine=0.5)
    gallery.refresh()
    gallery.close()
    assert gives_away(tmp_path / "gallery", as_read(1))
    store.close()
    store, gallery = started(tmp_path, NEW)
    assert not gives_away(tmp_path / "gallery", as_read(1))
    gallery.close()
    assert (tmp_path / "gallery" / "tail").exists()
    assert not gives_away(tmp_path / "gallery", as_read(1))
    store.close()


def test_an_erased_template_is_gone_from_the_files_while_the_service_runs(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "faces.sqlite3")
    store.prepare()
    store.append(1, [an_enrolment(1), an_enrolment(2)])
    store.erase(3, "person-1")
    assert not gives_away(tmp_path, a_template(1))
    assert gives_away(tmp_path, a_template(2))
    store.close()


def test_a_killed_services_files_forget_the_erased_at_the_next_start(tmp_path: Path) -> None:
    script = (
        "import os, sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "connection.execute('PRAGMA secure_delete = ON')\n"
        "connection.execute('UPDATE faces SET embedding = NULL, deleted_at = 1')\n"
        "os._exit(9)"
    )
    store = SqliteStore(tmp_path / "faces.sqlite3")
    store.prepare()
    store.append(1, [an_enrolment(1)])
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "faces.sqlite3")], check=False)
    assert gives_away(tmp_path, a_template(1))
    next_start = SqliteStore(tmp_path / "faces.sqlite3")
    next_start.prepare()
    assert not gives_away(tmp_path, a_template(1))
    next_start.close()
    store.close()


def test_an_embedding_is_replaced_only_where_it_is_the_one_that_was_read(database: Database) -> None:
    store = database.open(keyring=NEW)
    store.append(1, [an_enrolment(1)])
    (stored,) = store.embeddings(0)
    assert store.replace_embeddings([(replace(stored, embedding=b"another"), b"new")]) == 0
    assert store.replace_embeddings([]) == 0
    store.erase(2, "person-1")
    assert store.replace_embeddings([(stored, stored.embedding)]) == 0
    assert list(store.embeddings(0)) == []


def test_who_is_enrolled_is_found_and_who_is_erased_is_not(database: Database) -> None:
    store = database.open()
    store.append(1, [an_enrolment(1)])
    person = store.find_person("person-1")
    assert person is not None
    assert (person.timestamp, person.model) == (1001.0, "m")
    store.erase(2, "person-1")
    assert store.find_person("person-1") is None
    assert store.find_person("nobody") is None


# --- rotation ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a store with two plain people and two under the old key."""
    for first, keyring in ((1, Keyring()), (3, OLD)):
        store = SqliteStore(tmp_path / "faces.sqlite3", keyring)
        store.prepare()
        store.append(first, [an_enrolment(first), an_enrolment(first + 1)])
        store.close()
    return tmp_path


def rotate(folder: Path, keyring: Keyring, *words: str, plain_templates: str = "read") -> tuple[int, str]:
    """Run the command in this process; returns its exit status and what it said."""
    parser = argparse.ArgumentParser()
    rotate_keys.add_arguments(parser)
    settings = Settings(data_dir=folder, template_keys=text(keyring), plain_templates=plain_templates)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        return rotate_keys.run(parser.parse_args(words), settings), said.getvalue()


def still_to_do(folder: Path, keyring: Keyring) -> int:
    store = SqliteStore(folder / "faces.sqlite3", keyring)
    store.prepare()
    try:
        return sum(not keyring.is_current(stored.embedding) for stored in store.embeddings(0))
    finally:
        store.close()


def test_a_rotation_puts_everybody_under_the_newest_key_and_repeats_in_peace(folder: Path) -> None:
    assert rotate(folder, BOTH, "--check") == (
        1,
        "4 are to be put under the newest key, 0 are under it, 0 unreadable\n",
    )
    assert still_to_do(folder, BOTH) == 4
    assert rotate(folder, BOTH) == (0, "4 were put under the newest key, 0 are under it, 0 unreadable\n")
    assert rotate(folder, BOTH) == (0, "0 were put under the newest key, 4 are under it, 0 unreadable\n")
    assert rotate(folder, BOTH, "--check")[0] == 0
    store = SqliteStore(folder / "faces.sqlite3", NEW)
    store.prepare()
    for entry, seed in zip(store.entries(0), (1, 2, 3, 4), strict=True):
        assert entry.template is not None
        assert np.allclose(entry.template, a_template(seed), atol=1e-6)
    store.close()


def test_a_rotation_leaves_nothing_readable_in_the_files_while_a_service_runs(folder: Path) -> None:
    service = SqliteStore(folder / "faces.sqlite3", BOTH)
    service.prepare()
    assert [gives_away(folder, a_template(seed)) for seed in (1, 2, 3, 4)] == [True, True, False, False]
    assert rotate(folder, BOTH)[0] == 0
    assert not any(gives_away(folder, a_template(seed)) for seed in (1, 2, 3, 4))
    service.close()


def test_a_rotation_takes_away_the_vectors_that_mongodbs_index_searched(database: Database) -> None:
    if database.collection is None:
        pytest.skip("SQLite has no vectors")
    plain = MongoStore(database.collection)
    MongoVectorIndex(plain, "m", 512, exact=True)
    plain.append(1, [an_enrolment(1)])
    assert "vector" in database.collection.find_one({"seq": 1})
    (stored,) = plain.embeddings(0)
    sealed = template_bytes.reseal(stored.embedding, stored.user_id, stored.model, NEW)
    assert sealed is not None
    assert plain.replace_embeddings([(stored, sealed)]) == 1
    assert database.collection.find_one({"seq": 1}).keys() & {"vector", "vector_model"} == set()


def test_people_under_a_lost_key_are_erased_only_by_its_name(folder: Path) -> None:
    lost, another = OLD.names[0], Keyring((b"x" * 32,)).names[0]
    assert rotate(folder, NEW, "--erase-lost", another)[0] == 1
    assert still_to_do(folder, NEW) == 2
    assert "2 are to be erased" in rotate(folder, NEW, "--check", "--erase-lost", lost)[1]
    assert still_to_do(folder, NEW) == 2
    assert rotate(folder, NEW, "--erase-lost", lost)[0] == 0
    assert still_to_do(folder, NEW) == 0
    audited = "".join(path.read_text() for path in (folder / "audit").iterdir())
    assert [audited.count(f"person-{seed}") for seed in (1, 2, 3, 4)] == [0, 0, 1, 1]
    store = SqliteStore(folder / "faces.sqlite3", NEW)
    store.prepare()
    gallery = Gallery(store, "m", 512)
    gallery.load()
    assert gallery.status()["enrolled"] == 2
    assert store.find_person("person-3") is None
    store.close()


def test_of_a_person_with_several_photos_only_those_under_a_lost_key_go(folder: Path) -> None:
    store = SqliteStore(folder / "faces.sqlite3", NEW)
    store.prepare()
    store.append(store.last_place() + 1, [replace(an_enrolment(3), photo_id="under the new key")])
    store.close()
    assert rotate(folder, NEW, "--erase-lost", OLD.names[0])[0] == 0
    store.prepare()
    person = store.find_person("person-3")
    assert person is not None
    assert [photo.number for photo in person.photos] == [2]
    assert store.find_person("person-4") is None
    store.close()


def test_a_rotation_that_lacks_a_key_says_which_and_for_how_many(folder: Path) -> None:
    status, said = rotate(folder, NEW)
    assert (status, said[:10]) == (1, "2 were put")
    assert said.endswith(f"\n2 are under the key {OLD.names[0]}, which TEMPLATE_KEYS does not hold\n")


def test_a_rotation_without_keys_is_refused_so_that_nothing_is_ever_decrypted_for_good(folder: Path) -> None:
    with pytest.raises(SettingsError, match="TEMPLATE_KEYS"):
        rotate(folder, Keyring())


def test_a_new_key_is_one_that_template_keys_takes(folder: Path) -> None:
    keys = {rotate(folder, Keyring(), "--new-key")[1] for _ in range(2)}
    assert len(keys) == 2
    assert parse_keys(",".join(keys))


def test_a_rotation_that_is_killed_goes_on_where_it_ended(tmp_path: Path) -> None:
    killed_at_its_second_page = (
        "import os, signal, sys; from commands import cli; from store.sqlite import SqliteStore;"
        "replace = SqliteStore.replace_embeddings;"
        "SqliteStore.replace_embeddings = lambda self, changes: replace(self, changes)"
        " if changes[0][0].seq == 1 else os.kill(os.getpid(), signal.SIGKILL);"
        "sys.exit(cli.run('rotate-keys', []))"
    )
    store = SqliteStore(tmp_path / "faces.sqlite3")
    store.prepare()
    store.append(1, [an_enrolment(seed) for seed in range(1, PAGE_RECORDS + 101)])
    environment = {**os.environ, "DATA_DIR": str(tmp_path), "TEMPLATE_KEYS": text(NEW), "MONGO_URI": ""}
    killed = subprocess.run(
        [sys.executable, "-c", killed_at_its_second_page], check=False, cwd=PROJECT, env=environment
    )
    assert (killed.returncode, still_to_do(tmp_path, NEW)) == (-signal.SIGKILL, 100)
    assert rotate(tmp_path, NEW)[1].startswith(f"100 were put under the newest key, {PAGE_RECORDS} are")
    assert not any(gives_away(tmp_path, a_template(seed)) for seed in (1, PAGE_RECORDS, PAGE_RECORDS + 100))
    store.close()


def test_a_rotation_brings_nobody_back_who_is_erased_after_it_has_read_of_them(
    database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = database.open(keyring=BOTH)
    store.append(1, [an_enrolment(seed) for seed in (1, 2, 3)])
    store.append(4, [an_enrolment(4)])
    gallery = Gallery(database.open(keyring=BOTH), "m", 512)
    gallery.load()

    class ErasingInBetween:
        """The store, in which a running service erases somebody between a rotation's reading and its writing."""

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def replace_embeddings(self, changes: Sequence[tuple[StoredEmbedding, bytes]]) -> int:
            gallery.erase("person-2")
            return store.replace_embeddings(changes)

    newest = Keyring((b"n" * 32, *BOTH.keys))
    monkeypatch.setattr(bootstrap, "connect_store", lambda _settings: ErasingInBetween())
    arguments = argparse.Namespace(new_key=False, check=False, erase_lost=None)
    assert rotate_keys.run(arguments, Settings(template_keys=text(newest), data_dir=tmp_path)) == 0
    database_now = database.open(keyring=newest)
    left = list(database_now.embeddings(0))
    assert {stored.user_id for stored in left} == {"person-1", "person-3", "person-4"}
    assert all(newest.is_current(stored.embedding) for stored in left)
    assert database_now.find_person("person-2") is None
    with pytest.raises(FaceError):
        gallery.compare("person-2", a_template(2))


# --- settings ---


def test_keys_that_are_none_are_refused_at_the_start_without_being_shown() -> None:
    with pytest.raises(SettingsError, match="TEMPLATE_KEYS") as refusal:
        load_settings({}, {"TEMPLATE_KEYS": "hunter2"}, None)
    assert "hunter2" not in str(refusal.value)


def test_settings_that_are_printed_show_no_keys_and_no_password() -> None:
    settings = Settings(
        template_keys=text(NEW), mongo_uri="mongodb://me:hunter2@db", limits_storage="redis://:hunter2@l"
    )
    assert text(NEW) not in repr(settings)
    assert "hunter2" not in repr(settings)


def test_keys_and_mongodbs_index_exclude_each_other() -> None:
    with pytest.raises(SettingsError, match="TEMPLATE_KEYS"):
        Settings(template_keys=text(NEW), search="mongodb", mongo_uri="mongodb://db")
