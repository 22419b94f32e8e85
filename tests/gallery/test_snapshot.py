"""A start from the snapshot gives the same gallery as the log, only sooner; in doubt the log is read."""

from __future__ import annotations

import json
import math
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands.backup.command import restore, write
from errors import FaceError
from gallery import in_memory, snapshot_file, templates
from gallery import snapshot as snapshot_module
from gallery.decisions import Gallery
from gallery.snapshot import ERASURE_FILE, SnapshotFolder
from gallery.snapshot_file import MappedBlock, open_block
from store.encryption import NO_KEYS, SEAL_BYTES, Keyring
from store.records import Enrolment, EnrolmentLog, Entry
from tests.gallery.test_decisions import a_face
from tests.support.databases import Database

D = 64
ROWS = 32
KEYRINGS = {"plain": NO_KEYS, "sealed": Keyring((bytes(range(32)),))}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (templates, snapshot_module, in_memory):
        monkeypatch.setattr(module, "BLOCK_ROWS", ROWS)
    monkeypatch.setattr(snapshot_file, "PAGE_ROWS", 5)
    monkeypatch.setattr(in_memory, "APPLIED_AT_ONCE", 10)
    monkeypatch.setattr(in_memory, "SAVED_AT_ONCE", 8)


class Counted:
    """A store that counts the entries that are read from it."""

    def __init__(self, store: EnrolmentLog) -> None:
        self._store = store
        self.read = 0

    def entries(self, after: int, name: str | None = None) -> Iterator[Entry]:
        for entry in self._store.entries(after, name):
            self.read += 1
            yield entry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def keyring_of(folder: Path) -> Keyring:
    return KEYRINGS[folder.parent.name]


def rows_in(folder: Path) -> bytes:
    """Everything that is in a folder's files, read with its keys."""
    paths = [path for path in folder.iterdir() if path.name not in ("lock", ERASURE_FILE)]
    opened = [open_block(path, D, keyring_of(folder)) for path in paths]
    raw = [path.read_bytes() for path in paths]
    return b"".join([array.tobytes() for block in opened for array in block.arrays.values()] + raw)


RUNNING: list[Started] = []


class Started:
    """A gallery of one process, on its own connection to the database."""

    def __init__(
        self, database: Database, folder: Path, model: str = "m", identity: str = "here", *, load: bool = True
    ) -> None:
        self.store = Counted(database.open())
        snapshot = SnapshotFolder(folder, f"{identity} {model}", D, keyring_of(folder))
        self.gallery = Gallery(self.store, model, D, snapshot=snapshot)
        RUNNING.append(self)
        if load:
            self.gallery.load()

    def ids(self) -> set[str]:
        return {one.user_id for one in self.gallery.candidates(a_face(0), None)}


@pytest.fixture(autouse=True)
def _end_what_runs(_small_blocks: None, folder: Path) -> Iterator[None]:
    """Each gallery that saves has a thread, which keeps it in memory."""
    yield
    while RUNNING:
        RUNNING.pop().gallery.close()


def wait_for(path: Path, _running: Started) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def enrol(store: EnrolmentLog, seeds: range, model: str = "m") -> list[str]:
    people = [Enrolment(f"00000000-0000-4000-8000-{seed:012}", a_face(seed), model, 1.0) for seed in seeds]
    assert store.append(store.last_place() + 1, people) == len(people)
    return [one.user_id for one in people]


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Where the snapshot lies: sealed beside one kind of database, plain beside the others, as files know of none."""
    database = request.getfixturevalue("database") if "database" in request.fixturenames else None
    return tmp_path / ("sealed" if database and database.kind == "mongomock" else "plain") / "gallery"


@pytest.mark.parametrize("n", [1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS, 3 * ROWS + 7])
def test_after_a_stop_the_next_start_reads_only_what_came_since(database: Database, folder: Path, n: int) -> None:
    people = enrol(database.open(), range(n))
    first = Started(database, folder)
    assert (first.ids(), first.store.read) == (set(people), n)
    first.gallery.close()
    people += enrol(database.open(), range(n, n + 3))
    second = Started(database, folder)
    assert (second.ids(), second.store.read) == (set(people), 3)
    for seed in range(n + 3):
        found = second.gallery.search(a_face(seed))
        assert found is not None
        assert found.user_id == people[seed]
    assert second.gallery.status() == Started(database, folder.with_name("none")).gallery.status()


def test_after_a_kill_the_full_blocks_are_there(database: Database, folder: Path) -> None:
    people = enrol(database.open(), range(2 * ROWS + 7))
    wait_for(folder / "tail", Started(database, folder))  # ... which is never closed
    again = Started(database, folder)
    assert again.ids() == set(people)
    assert again.store.read <= ROWS


def test_who_enrols_while_the_service_runs_is_in_the_snapshot_of_its_stop(database: Database, folder: Path) -> None:
    here = Started(database, folder)
    people = [here.gallery.enrol(a_face(seed), duplicate_cosine=0.9) for seed in range(ROWS + 5)]
    here.gallery.refresh()
    here.gallery.close()
    again = Started(database, folder)
    assert (again.ids(), again.store.read) == (set(people), 0)


@pytest.mark.parametrize("when", ["before the stop", "while nobody runs"])
@pytest.mark.parametrize("row", [0, ROWS - 1, ROWS, 2 * ROWS + 3])
def test_who_was_erased_never_comes_back_with_a_snapshot(database: Database, folder: Path, row: int, when: str) -> None:
    people = enrol(database.open(), range(2 * ROWS + 7))
    here = Started(database, folder)
    here.gallery.close()
    if when == "before the stop":
        here.gallery.erase(people[row])
        here.gallery.refresh()
    else:
        Gallery(database.open(), "m", D).erase(people[row])
    again = Started(database, folder)
    assert again.ids() == set(people) - {people[row]}
    assert again.gallery.status()["enrolled"] == len(people) - 1
    with pytest.raises(FaceError, match="unknown_user"):
        again.gallery.compare(people[row], a_face(row))


@pytest.mark.parametrize("row", [0, ROWS + 1])
def test_an_erased_template_is_gone_from_the_files_too(database: Database, folder: Path, row: int) -> None:
    people = enrol(database.open(), range(ROWS + 7))
    here = Started(database, folder)
    here.gallery.close()
    assert a_face(row).tobytes() in rows_in(folder)
    here.gallery.erase(people[row])
    # At once: the answer to the request that erases must not come before the template is gone.
    assert a_face(row).tobytes() not in rows_in(folder)
    # What stays is as good as it was.
    assert Started(database, folder).store.read <= ROWS


def test_two_processes_of_one_machine_share_a_snapshot_and_erase_in_it(database: Database, folder: Path) -> None:
    people = enrol(database.open(), range(2 * ROWS))
    one, other = Started(database, folder), Started(database, folder)
    one.gallery.erase(people[3])
    other.gallery.erase(people[4])
    for gallery in (one, other):
        assert gallery.ids() == set(people) - {people[3], people[4]}
        assert gallery.gallery.status()["enrolled"] == 2 * ROWS - 2
    third = Started(database, folder)
    assert third.ids() == set(people) - {people[3], people[4]}
    assert third.store.read <= 2


def damaged(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("at", [0.0, 0.001, 0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", ["block-000000", "block-000001", "tail"])
def test_a_damaged_file_is_read_anew_from_the_store(database: Database, folder: Path, name: str, at: float) -> None:
    people = enrol(database.open(), range(2 * ROWS + 7))
    Started(database, folder).gallery.close()
    damaged(folder / name, at)
    again = Started(database, folder)
    assert again.ids() == set(people)
    again.gallery.close()
    healed = Started(database, folder)
    assert (healed.ids(), healed.store.read) == (set(people), 0)


@pytest.mark.parametrize("harm", ["empty", "cut off", "longer", "missing", "of another place", "no file"])
def test_a_file_that_is_not_what_it_was_is_read_anew(database: Database, folder: Path, harm: str) -> None:
    people = enrol(database.open(), range(2 * ROWS + 7))
    Started(database, folder).gallery.close()
    path = folder / "block-000000"
    whole = path.read_bytes()
    if harm == "empty":
        path.write_bytes(b"")
    elif harm == "cut off":
        path.write_bytes(whole[:-1])
    elif harm == "longer":
        path.write_bytes(whole + b"x")
    elif harm == "of another place":
        path.write_bytes((folder / "block-000001").read_bytes())
    else:
        path.unlink()
        if harm == "no file":
            path.mkdir()
    assert Started(database, folder).ids() == set(people)


@pytest.mark.parametrize(("model", "identity"), [("other", "here"), ("m", "elsewhere")])
def test_a_snapshot_of_another_gallery_is_not_used(database: Database, folder: Path, model: str, identity: str) -> None:
    enrol(database.open(), range(ROWS + 3))
    Started(database, folder).gallery.close()
    again = Started(database, folder, model, identity)
    assert again.store.read == ROWS + 3
    assert len(again.ids()) == (0 if model == "other" else ROWS + 3)


def test_a_snapshot_of_a_log_that_the_store_does_not_have_is_not_used(tmp_path: Path, folder: Path) -> None:
    """A database restored from an older backup, or begun anew, under the same name."""
    before, after = Database("sqlite", tmp_path / "a"), Database("sqlite", tmp_path / "b")
    enrol(before.open(), range(ROWS + 3))
    Started(before, folder).gallery.close()
    people = enrol(after.open(), range(100, 100 + ROWS + 3))
    assert Started(after, folder).ids() == set(people)
    assert Started(Database("sqlite", tmp_path / "c"), folder).ids() == set()


def test_a_gallery_that_is_mostly_erased_is_read_anew_without_the_erased(database: Database, folder: Path) -> None:
    people = enrol(database.open(), range(ROWS))
    here = Started(database, folder)
    here.gallery.close()  # the block is in its file now
    for user_id in people[: ROWS // 2]:
        here.gallery.erase(user_id)
    here.gallery.refresh()
    again = Started(database, folder)
    assert again.ids() == set(people[ROWS // 2 :])
    assert again.store.read == ROWS + ROWS // 2


def test_records_that_are_set_aside_are_counted_after_a_start_from_the_snapshot(
    database: Database, folder: Path
) -> None:
    store = database.open()
    theirs = enrol(store, range(5), model="theirs")
    enrol(store, range(5, 5 + ROWS))
    nan = np.full(D, np.nan, np.float32).tobytes()
    database.write({"user_id": "bad", "embedding": nan, "timestamp": 1.0, "model": "m", "seq": 5 + ROWS + 1})
    Started(database, folder).gallery.close()
    again = Started(database, folder)
    status = again.gallery.status()
    assert (status["enrolled"], status["other_models"], status["unreadable"]) == (ROWS, {"theirs": 5}, 1)
    again.gallery.erase(theirs[0])
    again.gallery.erase("bad")
    again.gallery.refresh()
    status = again.gallery.status()
    assert (status["other_models"], status["unreadable"]) == ({"theirs": 4}, 0)


def test_user_ids_of_the_older_form_survive_in_the_snapshot(database: Database, folder: Path) -> None:
    store = database.open()
    store.append(1, [Enrolment(f"older {seed}", a_face(seed), "m", 1.0) for seed in range(ROWS + 2)])
    Started(database, folder).gallery.close()
    again = Started(database, folder)
    assert again.store.read == 0
    assert again.ids() == {f"older {seed}" for seed in range(ROWS + 2)}
    again.gallery.erase("older 0")
    assert again.gallery.compare("older 1", a_face(1)) > 0.9


def test_only_the_owner_may_read_the_snapshot(database: Database, folder: Path) -> None:
    enrol(database.open(), range(ROWS + 2))
    Started(database, folder).gallery.close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = [path for path in folder.iterdir() if path.name not in ("lock", ERASURE_FILE)]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert {path.name for path in files} == {"block-000000", "tail"}


@pytest.mark.parametrize("trouble", ["a file in its place", "no room"])
def test_a_snapshot_that_cannot_be_written_stops_nothing(
    database: Database, folder: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble == "no room":

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
    else:
        folder.parent.mkdir()
        folder.write_text("in the way")
    people = enrol(database.open(), range(ROWS + 2))
    here = Started(database, folder)
    people.append(here.gallery.enrol(a_face(1000), duplicate_cosine=0.9))
    assert here.ids() == set(people)
    here.gallery.close()
    assert not folder.is_dir() or not [path for path in folder.iterdir() if path.name not in ("lock", ERASURE_FILE)]


def test_a_file_in_which_nobody_can_be_erased_any_more_is_removed(
    database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = enrol(database.open(), range(ROWS))
    here = Started(database, folder)

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    here.gallery.close()
    monkeypatch.setattr(os, "pwrite", broken)
    here.gallery.erase(people[0])
    assert here.ids() == set(people[1:])
    assert not (folder / "block-000000").exists()


def test_a_person_erased_while_a_block_is_written_is_erased_in_it(
    database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = enrol(database.open(), range(ROWS))
    write = snapshot_file.write_block

    def erased_meanwhile(descriptor: int, block: templates.Block, *rest: Any) -> None:
        write(descriptor, block, *rest)
        if people[2] not in database.open().erasures(ROWS + 1):
            Gallery(database.open(), "m", D).erase(people[2])
        here.gallery.refresh()

    here = Started(database, folder, load=False)
    monkeypatch.setattr(snapshot_module, "write_block", erased_meanwhile)
    here.gallery.load()
    here.gallery.close()
    assert here.ids() == set(people) - {people[2]}
    assert a_face(2).tobytes() not in rows_in(folder)


def test_a_search_reads_rows_and_codes_from_a_plain_file(database: Database, tmp_path: Path) -> None:
    folder = tmp_path / "plain" / "gallery"
    enrol(database.open(), range(ROWS))
    Started(database, folder).gallery.close()
    block = MappedBlock(folder / "block-000000", D)
    assert not block.arrays["rows"].flags.owndata
    assert not block.arrays["rows"].flags.writeable
    assert json.loads(block.header.to_bytes())["count"] == ROWS


# --- sealed ---


def test_processes_that_erase_in_one_page_of_a_sealed_file_never_bring_each_others_back(
    database: Database, tmp_path: Path
) -> None:
    folder = tmp_path / "sealed" / "gallery"
    enrol(database.open(), range(ROWS))
    Started(database, folder).gallery.close()
    ahead, behind = (open_block(folder / "block-000000", D, KEYRINGS["sealed"]) for _ in range(2))
    ahead.wipe(1)
    ahead.wipe(2)
    behind.wipe(1)
    assert [a_face(seed).tobytes() in rows_in(folder) for seed in range(4)] == [True, False, False, True]
    assert [bool(ahead.arrays[name][1].any()) for name in ("rows", "codes", "heads")] == [False] * 3


def test_a_page_of_another_sealed_file_is_not_believed(database: Database, tmp_path: Path) -> None:
    folder = tmp_path / "sealed" / "gallery"
    people = enrol(database.open(), range(ROWS))
    path = folder / "block-000000"
    Started(database, folder).gallery.close()
    first = path.read_bytes()
    path.unlink()
    Started(database, folder).gallery.close()
    second = path.read_bytes()
    row = sum(dtype.itemsize * math.prod(shape) for dtype, shape in templates.layout(D, 1).values())
    last_page = ROWS % snapshot_file.PAGE_ROWS * row + SEAL_BYTES
    path.write_bytes(second[:-last_page] + first[-last_page:])
    again = Started(database, folder)
    assert (again.ids(), again.store.read) == (set(people), ROWS)


def test_plain_files_and_those_under_older_keys_are_removed_where_there_are_keys(
    database: Database, tmp_path: Path
) -> None:
    old, new = KEYRINGS["sealed"], Keyring((b"n" * 32, *KEYRINGS["sealed"].keys))
    enrol(database.open(), range(ROWS + 3))
    for keyring, kinds in ((NO_KEYS, "plain"), (old, "sealed")):
        folder = tmp_path / kinds / "gallery"
        Started(database, folder).gallery.close()
        (folder / "new-left-over").write_bytes(a_face(1).tobytes())
        SnapshotFolder(folder, "here m", D, keyring).discard_outdated()
        assert {path.name for path in folder.iterdir()} == {"lock", "block-000000", "tail"}
        SnapshotFolder(folder, "here m", D, new).discard_outdated()
        assert {path.name for path in folder.iterdir()} == {"lock"}


@pytest.mark.parametrize("row", [0, ROWS + 1])
def test_who_was_erased_after_a_backup_is_there_again_once_it_is_restored(
    database: Database, folder: Path, row: int, tmp_path: Path
) -> None:
    people = enrol(database.open(), range(2 * ROWS))
    here = Started(database, folder)
    here.gallery.close()
    write(database.open(), tmp_path / "backup", NO_KEYS)
    here = Started(database, folder)
    here.gallery.erase(people[row])
    here.gallery.refresh()
    here.gallery.close()
    restore(database.open(), tmp_path / "backup", NO_KEYS, replace=True)
    assert Started(database, folder).ids() == set(people)


def test_a_damaged_note_of_the_newest_erasure_is_no_note_that_the_log_confirms(
    database: Database, folder: Path
) -> None:
    people = enrol(database.open(), range(2 * ROWS))
    Started(database, folder).gallery.close()
    here = Started(database, folder)
    here.gallery.erase(people[3])
    here.gallery.refresh()
    here.gallery.close()
    assert Started(database, folder).store.read < ROWS
    (folder / ERASURE_FILE).write_bytes(b"\xff 12")
    assert Started(database, folder).store.read > ROWS


def test_a_file_of_another_version_is_read_anew(
    database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = enrol(database.open(), range(ROWS))
    with monkeypatch.context() as other_version:
        other_version.setattr(snapshot_file.Header, "to_bytes", lambda self: json.dumps({"rows": self.count}).encode())
        Started(database, folder).gallery.close()
    assert Started(database, folder).ids() == set(people)
