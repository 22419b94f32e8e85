"""Owns what a process keeps of the log where MongoDB's vector index holds the templates: the log's tail, and no more.

The index follows the collection with a lag. So whoever was enrolled at a place that the index has not yet been seen to
return is searched here, in memory, and both results are merged: a search, exact or approximate, misses nobody because
of the lag. A place leaves the tail only after a search that asked the index for exactly that place has found it there,
and not before `KEPT_S` seconds, for servers whose replicas have an index each. Whom the log erases is left out of every
result, whatever the index still holds.

An exact search therefore promises what memory does. An approximate one may miss somebody who is in the index, and so
may enrol a second account: that is the approximation's, and no lag's.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from errors import FaceError
from replica import Ours
from store import Entry, MongoVectorIndex, Store, Template
from templates import BLOCK_ROWS, Candidate, Templates

log = logging.getLogger(__name__)

# Beside the wanted ones: records that were erased a moment ago, and equals.
SPARE_CANDIDATES = 16
MOST_CANDIDATES = 10_000
PLACES_AT_ONCE = 1000
SETTLE_SECONDS = 2.0
KEPT_S = 60.0
LOAD_AGAIN_SECONDS = 1.0
MAX_LOG_WAIT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class IndexedView:
    """The gallery up to the log's place `last`: the index, and in memory the enrolments behind place `settled`."""

    last: int
    settled: int
    tail: Templates
    # The places of the tail's rows, ascending.
    places: tuple[int, ...]
    erased: frozenset[str]
    index: MongoVectorIndex
    people: Callable[[str], list[Entry]]
    ours: Ours

    def search(
        self, probe: Template, k: int | None = 1, least: float = -np.inf, since: IndexedView | None = None
    ) -> list[Candidate]:
        """Return the `k` best candidates (all, for None) of at least the cosine `least`, the best first.

        Given an earlier view, only who was enrolled since need be looked at.

        Raises:
            FaceError: `database_unavailable`.
        """
        recent = since is not None and since.last >= self.settled
        first = bisect.bisect_right(self.places, since.last) if recent and since is not None else 0
        found = {one.user_id: one for one in reversed(self.tail.search(probe, k, least, first))}
        if not recent:
            for one in self._from_index(probe, k, least):
                if one.user_id not in found or found[one.user_id].cosine < one.cosine:
                    found[one.user_id] = one
        return sorted(found.values(), key=lambda one: -one.cosine)[:k]

    def _from_index(self, probe: Template, k: int | None, least: float) -> list[Candidate]:
        limit = SPARE_CANDIDATES + (k or SPARE_CANDIDATES)
        while True:
            entries, more = self.index.nearest(probe, limit)
            found = [self._candidate(entry, probe) for entry in entries if entry.user_id not in self.erased]
            # Enough, or everybody, or everybody that counts.
            if not more or (k is not None and len(found) >= k) or (found and found[-1].cosine < least):
                return [one for one in found if one.cosine >= least]
            if limit == MOST_CANDIDATES:
                log.error("The vector index returns %d candidates and not enough that can be used", limit)
                raise FaceError("database_unavailable", headers={"Retry-After": "5"})
            limit = min(2 * limit, MOST_CANDIDATES)

    def cosine(self, user_id: str, probe: Template) -> float | None:
        """Return the cosine to one person, the best of their templates; None when they have none."""
        if user_id in self.erased:
            return None
        ours = [entry for entry in self.people(user_id) if entry in self.ours]
        return max((self._candidate(entry, probe).cosine for entry in ours), default=None)

    @staticmethod
    def _candidate(entry: Entry, probe: Template) -> Candidate:
        template = np.asarray(entry.template, np.float32)
        return Candidate(entry.user_id or "", min(1.0, float(np.vecdot(template, probe))))


class IndexedReplica:
    """The replica of a process whose searches MongoDB answers.

    Args:
        store: the records; prepared.
        ours: whose templates are searched.
        index: the vector index, created.
    """

    def __init__(self, store: Store, ours: Ours, index: MongoVectorIndex) -> None:
        self._store, self._ours, self._index = store, ours, index
        self._view = IndexedView(0, 0, Templates(ours.dimension), (), frozenset(), index, store.person, ours)
        # When each place of the tail was applied.
        self._applied_at: dict[int, float] = {}
        self._log_lock = threading.Lock()
        self._loaded = False
        self._goal = 0
        self._filled = 0
        # Places that were given a vector while loading, and have not been seen in the index yet.
        self._awaited: list[int] = []
        self._enrolled = 0
        self._closed = threading.Event()
        self._settler: threading.Thread | None = None

    def caught_up(self, lost_races: int = 0) -> IndexedView:
        """Return a view that holds everything the log held when this was called.

        Raises:
            FaceError: `database_unavailable`; `not_ready` until loaded.
        """
        if not self._loaded:
            raise FaceError("not_ready", fields={"gallery": self.progress()}, headers={"Retry-After": "5"})
        if lost_races:
            time.sleep(0.0005)
        if not self._log_lock.acquire(timeout=MAX_LOG_WAIT_SECONDS):
            raise FaceError("database_unavailable", headers={"Retry-After": "5"})
        try:
            self._read_log()
            return self._view
        finally:
            self._log_lock.release()

    def _read_log(self) -> None:
        added: list[Entry] = []
        erased: set[str] = set()
        last = self._view.last
        try:
            for entry in self._store.entries(last):
                last = entry.seq
                if entry.erases is not None:
                    erased.add(entry.erases)
                elif entry in self._ours:
                    added.append(entry)
        finally:
            self._extend(added, erased, last)

    def _extend(self, added: list[Entry], erased: set[str], last: int) -> None:
        view, tail = self._view, self._view.tail
        if added:
            vectors = np.stack([entry.template for entry in added if entry.template is not None])
            tail = tail.extended(vectors, [entry.user_id or "" for entry in added])
            self._applied_at.update((entry.seq, time.monotonic()) for entry in added)
        for user_id in erased:
            for row in tail.find(user_id):
                tail.blocks[row // BLOCK_ROWS].wipe(row % BLOCK_ROWS)
        self._enrolled += len(added) - len(erased)
        places = view.places + tuple(entry.seq for entry in added)
        self._view = replace(view, last=last, tail=tail, places=places, erased=view.erased | erased)

    def knows(self, user_id: str) -> bool:
        """Return whether this user_id has a record that is not erased, of whatever model."""
        return user_id not in self._view.erased and bool(self._store.person(user_id))

    def settle(self) -> None:
        """Take out of the tail what the index is seen to hold, giving vectors to records that lack them.

        Raises:
            FaceError: `database_unavailable`.
        """
        view = self._view
        until = min(view.last, view.settled + PLACES_AT_ONCE)
        if until == view.settled:
            return
        # Another process that searches in memory enrols without a vector.
        self._index.fill(view.settled, until, self._ours.__contains__)
        seen = self._index.places(view.settled, until)
        fresh = time.monotonic() - KEPT_S
        for row, place in enumerate(view.places):
            if place > until:
                break
            if self._applied_at[place] > fresh or (place not in seen and view.tail.user_id(row) is not None):
                until = place - 1
                break
        with self._log_lock:
            self._shorten(until)

    def _shorten(self, until: int) -> None:
        """Keep only the places behind `until` in the tail; with the log's lock held."""
        view = self._view
        first = bisect.bisect_right(view.places, until)
        kept = [(row, view.tail.user_id(row)) for row in range(first, view.tail.count)]
        live = [(row, user_id) for row, user_id in kept if user_id is not None]
        tail = Templates(self._ours.dimension)
        if live:
            blocks = view.tail.blocks
            vectors = np.stack([blocks[row // BLOCK_ROWS].arrays["rows"][row % BLOCK_ROWS] for row, _ in live])
            tail = tail.extended(vectors, [user_id for _, user_id in live])
        places = tuple(view.places[row] for row, _ in live)
        self._applied_at = {place: self._applied_at[place] for place in places}
        self._view = replace(view, settled=until, tail=tail, places=places)

    def load(self) -> None:
        """Wait until the index can be searched and holds what it should, and read the log's tail.

        To be called before any other method but `status` and `progress`.
        """
        while not self._closed.is_set():
            try:
                if self._load():
                    break
                log.info("Waiting for MongoDB's vector index: place %d of %d", self._filled, self._goal)
            except FaceError:
                log.warning("The vector index cannot be read. Trying again.")
            self._closed.wait(LOAD_AGAIN_SECONDS)
        self._loaded = True
        self._settler = threading.Thread(target=self._settle_for_ever, name="gallery-tail", daemon=True)
        self._settler.start()

    def _load(self) -> bool:
        """Return whether the index holds everything up to some place near the log's end; the tail begins behind it."""
        self._goal = self._store.last_place()
        # An erasure that is in the log, and got no further, must not leave a template that the index returns.
        self._store.finish_erasures()
        if not self._index.is_queryable():
            return False
        while self._filled < self._goal:
            end, given = self._index.fill(self._filled, self._goal, self._ours.__contains__)
            self._awaited += given
            self._filled = end
        # A vector that was given late comes late, whatever its place.
        while self._awaited:
            first = self._awaited[0] - 1
            held = self._index.places(first, first + PLACES_AT_ONCE)
            if self._awaited[0] not in held:
                return False
            self._awaited = [place for place in self._awaited if place not in held]
        # For the others the index follows the collection's changes in order: once a whole page of places is there, so
        # is what lies before it.
        settled = self._goal
        while settled > 0:
            after = max(0, settled - PLACES_AT_ONCE)
            wanted = itertools.takewhile(lambda entry, until=settled: entry.seq <= until, self._store.entries(after))  # type: ignore[misc]
            lacking = {entry.seq for entry in wanted if entry in self._ours}
            if not lacking - self._index.places(after, settled):
                break
            settled = after
        with self._log_lock:
            self._enrolled = self._index.count()
            self._view = replace(self._view, last=settled, settled=settled)
            self._read_log()
        return True

    def _settle_for_ever(self) -> None:
        while not self._closed.wait(SETTLE_SECONDS):
            try:
                self.settle()
            except FaceError as error:
                log.info("The tail is kept for now: %s", error.code)

    def progress(self) -> dict[str, int]:
        """Return how far loading is, in places of the log."""
        return {"applied": self._filled, "of": max(self._goal, self._filled)}

    def status(self) -> dict[str, Any]:
        """Return counts for people and monitors, as of the last catching up, without asking the store."""
        view = self._view
        return {
            "model": self._ours.model,
            "enrolled": self._enrolled,
            "other_models": {},
            "unreadable": 0,
            "last_seq": view.last,
            "in_tail": len(view.places),
        }

    def close(self) -> None:
        """Stop looking after the tail."""
        self._closed.set()
        if self._settler is not None:
            self._settler.join()
