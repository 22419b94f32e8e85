"""No order of events breaks the enrolment log: one live template a face, and nothing acknowledged is lost.

Hypothesis drives several galleries on one store through enrolments, added and removed photos, erasures, searches,
overtaking between decision and insertion, lost answers, crashes and restarts (from snapshots too), and shrinks whatever
breaks the promise.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engines.base import Template
from errors import FaceError
from gallery import in_memory, templates
from gallery import snapshot as snapshot_module
from gallery.decisions import Gallery, NewFace
from gallery.snapshot import SnapshotFolder
from store.records import Enrolment, EnrolmentLog, Entry
from store.sqlite import SqliteStore

D = 32
FACES = 8
PROCESSES = 3
SAME = 0.8
MAX_PHOTOS = 3
ROWS = 4
# More of them find no more than a handful does, until somebody changes the log: then run a thousand.
EXAMPLES = int(os.environ.get("LOG_MODEL_EXAMPLES", "20"))


def photo(face: int, take: int = 0) -> Template:
    """A template: two takes of one face are alike (0.9), two faces are not."""
    aside = np.zeros(D)
    aside[FACES + take] = np.sqrt(1 - 0.95)
    vector = aside.copy()
    vector[face] = np.sqrt(0.95)
    return vector.astype(np.float32)


class FaultyStore:
    """A store whose next insertion can be overtaken, or whose answer can get lost after or before the fact."""

    def __init__(self, store: EnrolmentLog) -> None:
        self._store = store
        self._store.prepare()
        self.overtaken_by: Any = None
        self.fault = ""

    def append(self, seq: int, enrolments: Sequence[Enrolment]) -> int:
        return int(self._insert(lambda: self._store.append(seq, enrolments)))

    def erase(self, seq: int, user_id: str) -> bool:
        return bool(self._insert(lambda: self._store.erase(seq, user_id)))

    def remove_photo(self, seq: int, place: int) -> bool:
        return bool(self._insert(lambda: self._store.remove_photo(seq, place)))

    def _insert(self, insertion: Any) -> Any:
        overtake, self.overtaken_by = self.overtaken_by, None
        if overtake is not None:
            overtake()
        fault, self.fault = self.fault, ""
        if fault == "lost before":
            raise FaceError("database_unavailable")
        result = insertion()
        if fault == "lost after":
            raise FaceError("database_unavailable")
        return result

    def entries(self, after: int, name: str | None = None) -> Iterator[Entry]:
        return self._store.entries(after, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


faces = st.integers(0, FACES - 1)
takes = st.integers(0, 3)
processes = st.integers(0, PROCESSES - 1)
faults = st.sampled_from(["", "", "lost before", "lost after"])


class LogMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.patch = pytest.MonkeyPatch()
        for module in (templates, snapshot_module, in_memory):
            self.patch.setattr(module, "BLOCK_ROWS", ROWS)
        self.patch.setattr(in_memory, "SAVED_AT_ONCE", 2)
        # Crashes here are of processes, not of the machine.
        self.patch.setattr(os, "fsync", lambda _: None)
        self.folder = tempfile.TemporaryDirectory()
        self.reader = self.open()
        self.stores: list[FaultyStore] = []
        self.galleries: list[Gallery] = []
        # user_id -> face, of those whose enrolment was acknowledged and whose erasure was not asked for.
        self.acknowledged: dict[str, int] = {}
        self.erased: set[str] = set()
        # The places of photos whose removal, or whose replacement, was acknowledged.
        self.removed: set[int] = set()
        for number in range(PROCESSES):
            self.stores.append(self.open())
            self.galleries.append(self.start(number))

    def open(self) -> FaultyStore:
        return FaultyStore(SqliteStore(Path(self.folder.name) / "faces.sqlite3"))

    def start(self, number: int) -> Gallery:
        # Two processes share a machine, and so a snapshot.
        machine = SnapshotFolder(Path(self.folder.name) / f"machine{number // 2}", "", D)
        gallery = Gallery(self.stores[number], "m", D, snapshot=machine)
        gallery.load()
        return gallery

    def enrol_at(self, process: int, face: int, take: int, key: str | None = None, fault: str = "") -> None:
        self.stores[process].fault = fault
        try:
            user_id = self.galleries[process].enrol(photo(face, take), duplicate_cosine=SAME, request_key=key)
        except FaceError as error:
            if error.code == "duplicate_face":
                assert face in self.live().values()
            elif error.code != "database_unavailable":
                raise
        else:
            self.acknowledged[user_id] = face
        self.stores[process].fault = ""

    @rule(process=processes, face=faces, take=takes, fault=faults)
    def enrol(self, process: int, face: int, take: int, fault: str) -> None:
        self.enrol_at(process, face, take, fault=fault)

    @rule(process=processes, face=faces, key=st.sampled_from("ab"), fault=faults)
    def enrol_and_try_again(self, process: int, face: int, key: str, fault: str) -> None:
        """A client that lost the answer sends the same again, to another process."""
        self.enrol_at(process, face, 0, f"{key}{face}", fault)
        self.enrol_at((process + 1) % PROCESSES, face, 0, f"{key}{face}")
        assert face in self.live().values()

    @rule(process=processes, mine=faces, theirs=faces, take=takes)
    def enrol_overtaken(self, process: int, mine: int, theirs: int, take: int) -> None:
        self.stores[process].overtaken_by = lambda: self.enrol_at((process + 1) % PROCESSES, theirs, take)
        self.enrol_at(process, mine, 0)
        self.stores[process].overtaken_by = None

    @rule(process=processes, batch=st.lists(faces, min_size=1, max_size=5), other=faces, overtaken=st.booleans())
    def enrol_many(self, process: int, batch: list[int], other: int, overtaken: bool) -> None:
        if overtaken:
            self.stores[process].overtaken_by = lambda: self.enrol_at((process + 1) % PROCESSES, other, 1)
        results = self.galleries[process].enrol_many([NewFace(photo(face)) for face in batch], duplicate_cosine=SAME)
        self.stores[process].overtaken_by = None
        self.acknowledged.update({user_id: face for user_id, face in zip(results, batch, strict=True) if user_id})
        assert set(batch) <= set(self.live().values())

    def add_photo_at(self, process: int, user_id: str, face: int, take: int, fault: str = "") -> None:
        before = self.photos_of(user_id)
        is_theirs = self.acknowledged[user_id] == face
        self.stores[process].fault = fault
        try:
            count = self.galleries[process].add_photo(
                user_id, photo(face, take), match_cosine=SAME, duplicate_cosine=SAME, max_photos=MAX_PHOTOS
            )
        except FaceError as error:
            if error.code not in (["database_unavailable"] if is_theirs else ["no_match", "duplicate_face"]):
                raise
        else:
            now = self.photos_of(user_id)
            assert is_theirs
            assert count == len(now) <= MAX_PHOTOS
            assert np.array_equal(now[max(now)], photo(face, take))
            self.removed |= before.keys() - now.keys()
        self.stores[process].fault = ""

    @precondition(lambda self: self.acknowledged)
    @rule(process=processes, take=takes, fault=faults, data=st.data())
    def add_photo(self, process: int, take: int, fault: str, data: st.DataObject) -> None:
        user_id = self.somebody(data)
        self.add_photo_at(process, user_id, self.acknowledged[user_id], take, fault)

    @precondition(lambda self: self.acknowledged)
    @rule(process=processes, face=faces, data=st.data())
    def add_a_photo_of_anybody(self, process: int, face: int, data: st.DataObject) -> None:
        self.add_photo_at(process, self.somebody(data), face, 0)

    @precondition(lambda self: self.acknowledged)
    @rule(process=processes, how=st.sampled_from(["add", "remove", "erase"]), data=st.data())
    def add_photo_overtaken(self, process: int, how: str, data: st.DataObject) -> None:
        """Another process changes the same person between the decision and the insertion."""
        user_id = self.somebody(data)
        face, other = self.acknowledged[user_id], (process + 1) % PROCESSES

        def overtake() -> None:
            if how == "add":
                self.add_photo_at(other, user_id, face, 1)
            elif how == "remove":
                self.remove_photo_at(other, user_id, 0)
            else:
                self.erase_at(other, user_id)

        self.stores[process].overtaken_by = overtake
        try:
            self.galleries[process].add_photo(
                user_id, photo(face, 2), match_cosine=SAME, duplicate_cosine=SAME, max_photos=MAX_PHOTOS
            )
        except FaceError as error:
            if (how, error.code) != ("erase", "unknown_user"):
                raise
        self.stores[process].overtaken_by = None

    @precondition(lambda self: self.acknowledged)
    @rule(process=processes, which=st.integers(0, MAX_PHOTOS - 1), fault=faults, data=st.data())
    def remove_photo(self, process: int, which: int, fault: str, data: st.DataObject) -> None:
        self.remove_photo_at(process, self.somebody(data), which, fault)

    def remove_photo_at(self, process: int, user_id: str, which: int, fault: str = "") -> None:
        person = self.reader.find_person(user_id)
        before = self.photos_of(user_id)
        assert [one.seq for one in person.photos] == sorted(before)
        removed = person.photos[which % len(person.photos)]
        self.stores[process].fault = fault
        try:
            left = self.galleries[process].remove_photo(user_id, removed.number)
        except FaceError as error:
            if error.code != ("last_photo" if len(before) == 1 else "database_unavailable"):
                raise
        else:
            assert self.photos_of(user_id).keys() == before.keys() - {removed.seq}
            assert left == len(before) - 1
            self.removed.add(removed.seq)
        self.stores[process].fault = ""

    def somebody(self, data: st.DataObject) -> str:
        return list(self.acknowledged)[data.draw(st.integers(0, len(self.acknowledged) - 1))]

    @precondition(lambda self: self.acknowledged)
    @rule(process=processes, fault=faults, data=st.data())
    def erase(self, process: int, fault: str, data: st.DataObject) -> None:
        self.erase_at(process, self.somebody(data), fault)

    def erase_at(self, process: int, user_id: str, fault: str = "") -> None:
        self.stores[process].fault = fault
        try:
            self.galleries[process].erase(user_id)
        except FaceError as error:
            if error.code != "database_unavailable":
                raise
            if user_id in self.live():
                return
        finally:
            self.stores[process].fault = ""
        self.erased.add(user_id)
        del self.acknowledged[user_id]

    @rule(process=processes, face=faces, take=takes)
    def verify(self, process: int, face: int, take: int) -> None:
        found = self.galleries[process].candidates(photo(face, take), 1, SAME)
        expected = {user_id for user_id, whose in self.live().items() if whose == face}
        assert {one.user_id for one in found} == expected
        for one in found:
            cosines = [float(np.vecdot(own, photo(face, take))) for own in self.photos_of(one.user_id).values()]
            assert one.cosine == pytest.approx((max(cosines) + np.mean(cosines)) / 2, abs=1e-6)

    @rule(number=processes, tidily=st.booleans())
    def restart(self, number: int, tidily: bool) -> None:
        if tidily:
            self.galleries[number].close()
        self.stores[number].close()
        self.stores[number] = self.open()
        self.galleries[number] = self.start(number)

    def photos(self) -> dict[str, dict[int, Template]]:
        """The templates that the log holds, by person and place, read by nobody's code but the store's."""
        people: dict[str, dict[int, Template]] = {}
        for entry in self.reader.entries(0):
            if entry.erases is not None:
                people.pop(entry.erases, None)
            if entry.template is not None and entry.user_id is not None:
                people.setdefault(entry.user_id, {})[entry.seq] = entry.template
            for own in people.values():
                own.pop(entry.removes or 0, None)
        return {user_id: own for user_id, own in people.items() if own}

    def photos_of(self, user_id: str) -> dict[int, Template]:
        return self.photos().get(user_id, {})

    def live(self) -> dict[str, int]:
        """Whose faces the log holds; every photo of a person shows the same face."""
        people = {}
        for user_id, own in self.photos().items():
            (people[user_id],) = {int(np.argmax(template)) for template in own.values()}
        return people

    @invariant()
    def the_promise(self) -> None:
        if not hasattr(self, "folder"):
            return
        live = self.live()
        assert len(set(live.values())) == len(live), "two live templates of one face"
        assert self.acknowledged.items() <= live.items(), "an acknowledged enrolment is lost"
        assert not self.erased & live.keys(), "an erased person is back"
        photos = self.photos()
        assert not self.removed & {place for own in photos.values() for place in own}, "a removed photo is back"
        assert all(len(own) <= MAX_PHOTOS for own in photos.values()), "too many photos of a person"
        places = [entry.seq for entry in self.reader.entries(0)]
        assert places == list(range(1, len(places) + 1)), "a hole in the log"
        for status in self.statuses():
            if status["last_seq"] == len(places):
                counts = (status["enrolled"], status["photos"])
                assert counts == (len(live), sum(map(len, photos.values()))), "a gallery counts others"

    def statuses(self) -> list[dict[str, Any]]:
        return [gallery.status() for gallery in self.galleries]

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            for gallery, store in zip(self.galleries, self.stores, strict=True):
                gallery.close()
                store.close()
            self.patch.undo()
            self.folder.cleanup()


def run(machine: type[LogMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_no_order_of_events_breaks_the_log() -> None:
    run(LogMachine)
