"""No order of events breaks the enrolment log: one live template a face, and nothing acknowledged is lost.

Hypothesis drives several galleries on one store through enrolments, erasures, searches, overtaking between decision
and insertion, lost answers, crashes and restarts (from snapshots too), and shrinks whatever breaks the promise.
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
from gallery.decisions import Gallery
from gallery.snapshot import SnapshotFolder
from store.records import Enrolment, EnrolmentLog, Entry
from store.sqlite import SqliteStore

D = 32
FACES = 8
PROCESSES = 3
SAME = 0.8
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
        results = self.galleries[process].enrol_many([photo(face) for face in batch], duplicate_cosine=SAME)
        self.stores[process].overtaken_by = None
        self.acknowledged.update({user_id: face for user_id, face in zip(results, batch, strict=True) if user_id})
        assert set(batch) <= set(self.live().values())

    @precondition(lambda self: self.acknowledged)
    @rule(process=processes, fault=faults, data=st.data())
    def erase(self, process: int, fault: str, data: st.DataObject) -> None:
        user_id = list(self.acknowledged)[data.draw(st.integers(0, len(self.acknowledged) - 1))]
        self.stores[process].fault = fault
        try:
            self.galleries[process].erase(user_id)
        except FaceError as error:
            if error.code != "database_unavailable":
                raise
            if user_id in self.live():
                return
        self.erased.add(user_id)
        del self.acknowledged[user_id]

    @rule(process=processes, face=faces, take=takes)
    def verify(self, process: int, face: int, take: int) -> None:
        found = self.galleries[process].candidates(photo(face, take), 1, SAME)
        expected = {user_id for user_id, whose in self.live().items() if whose == face}
        assert {one.user_id for one in found} == expected

    @rule(number=processes, tidily=st.booleans())
    def restart(self, number: int, tidily: bool) -> None:
        if tidily:
            self.galleries[number].close()
        self.stores[number].close()
        self.stores[number] = self.open()
        self.galleries[number] = self.start(number)

    def live(self) -> dict[str, int]:
        """Whose templates the log holds, read by nobody's code but the store's."""
        people: dict[str, int] = {}
        for entry in self.reader.entries(0):
            if entry.erases is not None:
                people.pop(entry.erases, None)
            elif entry.template is not None and entry.user_id is not None:
                people[entry.user_id] = int(np.argmax(entry.template))
        return people

    @invariant()
    def the_promise(self) -> None:
        if not hasattr(self, "folder"):
            return
        live = self.live()
        assert len(set(live.values())) == len(live), "two live templates of one face"
        assert self.acknowledged.items() <= live.items(), "an acknowledged enrolment is lost"
        assert not self.erased & live.keys(), "an erased person is back"
        places = [entry.seq for entry in self.reader.entries(0)]
        assert places == list(range(1, len(places) + 1)), "a hole in the log"

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
