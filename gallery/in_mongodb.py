"""Owns what a process holds when MongoDB's vector index holds the templates: the log's tail, and no more.

The index follows the collection with a lag. So everybody behind the place `settled` is searched here, in memory, and
both results are merged. `settled` moves past a place when

- the index, asked for exactly that place, has returned it, and
- the place was read `KEPT_S` seconds ago, because the servers of a replica set may have an index each, and the next
  search may be answered by another one than the one that was asked.

It is kept in the store for the next start (`set_mark`), so that nothing is ever taken to be in the index unseen. Hence
a search misses nobody because of the lag, and an exact one decides as memory does. An approximate one may miss somebody
who is in the index, and so enrol a second account: that is the approximation's doing, and no lag's.

What the index returns are the records as they are now, whatever it still holds of them. The erased have no embedding
any more, since a process applies an erasure only after it has seen to that.
"""

from __future__ import annotations

import bisect
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.base import Template
from errors import FaceError
from gallery.in_memory import Ours
from gallery.templates import BLOCK_ROWS, Candidate, Templates
from store.records import EnrolmentLog, Entry

if TYPE_CHECKING:
    from store.mongo_vectors import MongoVectorIndex

log = logging.getLogger(__name__)

# Beside the wanted ones: records that were erased a moment ago, and equals.
SPARE_CANDIDATES = 16
MOST_CANDIDATES = 10_000
PLACES_AT_ONCE = 1000
# So many places may be left to the tail at a start, rather than waited for in the index.
TAIL_AT_START = 10_000
KEPT_S = 60.0
SETTLE_SECONDS = 2.0
COUNT_SECONDS = 60.0
LOAD_AGAIN_SECONDS = 1.0
MAX_LOG_WAIT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class IndexedView:
    """The gallery up to the log's place `last`: the index up to `settled`, and in memory who was enrolled behind it."""

    last: int
    settled: int
    tail: Templates
    # The places of the tail's rows, ascending.
    places: tuple[int, ...]
    index: MongoVectorIndex
    ours: Ours

    def search(
        self, probe: Template, k: int | None = 1, least: float = -np.inf, since: IndexedView | None = None
    ) -> list[Candidate]:
        """Return the `k` best candidates (all, for None) of at least the cosine `least`, the best first.

        Given an earlier view, only who was enrolled since need be looked at.

        Raises:
            FaceError: `database_unavailable`, also when there are more than 10,000 candidates.
        """
        if since is not None and since.last >= self.settled:
            return self.tail.search(probe, k, least, bisect.bisect_right(self.places, since.last))
        best: dict[str, Candidate] = {}
        for one in self._from_index(probe, k, least) + self.tail.search(probe, k, least):
            # Twice found: in the index and the tail, or in several records of an older collection.
            if one.user_id not in best or best[one.user_id].cosine < one.cosine:
                best[one.user_id] = one
        return sorted(best.values(), key=lambda one: -one.cosine)[:k]

    def _from_index(self, probe: Template, k: int | None, least: float) -> list[Candidate]:
        limit = SPARE_CANDIDATES + (k or SPARE_CANDIDATES)
        while True:
            entries, more = self.index.nearest(probe, limit, self.settled)
            found = self._candidates(entries, probe)
            # Enough, or everybody, or everybody that counts.
            if not more or (k is not None and len(found) >= k) or (found and found[-1].cosine < least):
                return [one for one in found if one.cosine >= least]
            if limit == MOST_CANDIDATES:
                log.error("The vector index returns %d candidates and not enough that can be used", limit)
                raise FaceError("database_unavailable", headers={"Retry-After": "5"})
            limit = min(2 * limit, MOST_CANDIDATES)

    def cosine(self, user_id: str, probe: Template) -> float | None:
        """Return the cosine to one person, the best of their templates; None when they have none."""
        found = self._candidates(self.index.person(user_id), probe)
        return found[0].cosine if found else None

    def _candidates(self, entries: list[Entry], probe: Template) -> list[Candidate]:
        """Compare with those records that are ours; the best first, and of equals the earliest enrolled first."""
        ours = [(entry, entry.template) for entry in entries if entry.template is not None and entry in self.ours]
        if not ours:
            return []
        # As `templates` does, so that a template scores the same in the tail and in the index.
        cosines = np.vecdot(np.stack([template for _, template in ours]), probe)
        scored = sorted(zip(-cosines, [entry for entry, _ in ours], strict=True), key=lambda one: (one[0], one[1].seq))
        return [Candidate(entry.user_id or "", min(1.0, -float(negative))) for negative, entry in scored]


class IndexedCopy:
    """The replica of a process whose searches MongoDB answers.

    Args:
        store: the records; prepared.
        ours: whose templates are searched.
        index: the vector index, created.
    """

    def __init__(self, store: EnrolmentLog, ours: Ours, index: MongoVectorIndex) -> None:
        self._store, self._ours, self._index = store, ours, index
        self._view = IndexedView(0, 0, Templates(ours.dimension), (), index, ours)
        # As in `InMemoryCopy`.
        self._last_name: str | None = None
        # Whose marks: with other settings there are other records that should be in the index.
        self._whose = f"{ours.model} {ours.dimension} {ours.plain_model}"
        self._marked = 0
        # Up to this place every record that should have a vector has one.
        self._filled = 0
        # (when, how far the log was read then), for `KEPT_S`; and how far it was read that long ago.
        self._read: deque[tuple[float, int]] = deque()
        self._ripe = 0
        self._log_lock = threading.Lock()
        self._loaded = False
        self._goal = 0
        self._enrolled = 0
        self._count_again_at = 0.0
        self._closed = threading.Event()
        self._settler: threading.Thread | None = None

    # --- catching up ---

    def caught_up(self, lost_races: int = 0) -> IndexedView:
        """Return a view that holds everything the log held when this was called.

        Args:
            lost_races: how often the caller's append was refused in a row.

        Raises:
            FaceError: `database_unavailable`; `not_ready` until loaded.
        """
        if not self._loaded:
            raise FaceError("not_ready", fields={"gallery": self.progress()}, headers={"Retry-After": "5"})
        if lost_races:
            time.sleep(0.0005)  # as in `InMemoryCopy.caught_up`
        if not self._log_lock.acquire(timeout=MAX_LOG_WAIT_SECONDS):
            raise FaceError("database_unavailable", headers={"Retry-After": "5"})
        try:
            self._read_log()
            return self._view
        finally:
            self._log_lock.release()

    def _read_log(self) -> None:
        added: list[Entry] = []
        erased: list[str] = []
        last, name = self._view.last, self._last_name
        try:
            for entry in self._store.entries(last, name):
                if entry.erases is not None:
                    if self._loaded:
                        # Whoever logged it may have got no further, and the index would return the record whole.
                        self._store.finish_erasures(entry.erases)
                    erased.append(entry.erases)
                elif entry in self._ours:
                    added.append(entry)
                last, name = entry.seq, entry.name or None
        finally:
            self._extend(added, erased, last)
            self._last_name = name

    def _extend(self, added: list[Entry], erased: list[str], last: int) -> None:
        tail = self._view.tail
        if added:
            vectors = np.stack([entry.template for entry in added if entry.template is not None])
            tail = tail.extended(vectors, [entry.user_id or "" for entry in added])
        for user_id in erased:
            for row in tail.find(user_id):
                tail.blocks[row // BLOCK_ROWS].wipe(row % BLOCK_ROWS)
        self._enrolled += len(added)
        places = self._view.places + tuple(entry.seq for entry in added)
        self._view = replace(self._view, last=last, tail=tail, places=places)

    def knows(self, user_id: str) -> bool:
        """Return whether this user_id has a record that is not erased, of whatever model."""
        return bool(self._index.person(user_id))

    # --- loading ---

    def load(self, *, keep_trying: bool) -> None:
        """Wait until the index can be searched and holds what it should, and read the log's tail.

        To be called before any other method but `status` and `progress`.
        """
        while not self._closed.is_set():
            try:
                if self._load():
                    self._settler = threading.Thread(target=self._settle_for_ever, name="gallery-tail", daemon=True)
                    self._settler.start()
                    return
                log.info("Waiting for MongoDB's vector index; vectors are given up to place %d", self._filled)
            except FaceError:
                if not keep_trying:
                    raise
                log.warning("The vector index cannot be read. Trying again.")
            self._closed.wait(LOAD_AGAIN_SECONDS)

    def _load(self) -> bool:
        """Go on loading; return whether it is done."""
        if not self._index.is_queryable():
            return False
        self._goal = self._store.last_place()
        if not self._filled:
            self._marked = self._filled = self._index.mark(self._whose)
            self._view = replace(self._view, last=self._marked, settled=self._marked)
        until = self._goal - TAIL_AT_START
        if self._view.settled < until:
            if self._fill(until) > PLACES_AT_ONCE:
                return False  # however long that took, the log has grown
            self._closed.wait(KEPT_S)
            self._settle(until)
            if self._view.settled < until:
                return False
        with self._log_lock:
            self._view = replace(self._view, last=max(self._view.last, self._view.settled))
            self._last_name = None
            if self._view.last:
                self._last_name = next((one.name for one in self._store.entries(self._view.last - 1)), None)
            self._read_log()
        # Of whatever place; what is logged from now on is finished as it is read.
        self._store.finish_erasures()
        self._count()
        self._loaded = True
        return True

    def progress(self) -> dict[str, int]:
        """Return up to which place of the log vectors are given, while loading."""
        return {"applied": self._filled, "of": max(self._goal, self._filled)}

    # --- the tail ---

    def settle(self) -> None:
        """Take out of the tail whom the index was seen to hold for long enough.

        Raises:
            FaceError: `database_unavailable`.
        """
        last = self.caught_up().last
        # Processes that search in memory enrol without a vector.
        self._fill(last)
        self._read.append((time.monotonic(), last))
        while self._read and self._read[0][0] <= time.monotonic() - KEPT_S:
            self._ripe = self._read.popleft()[1]
        self._settle(self._ripe)
        if time.monotonic() >= self._count_again_at:
            self._count()

    def _fill(self, until: int) -> int:
        """Give records up to `until` their vectors where they lack them; return how many."""
        given = 0
        while self._filled < until:
            end = min(self._filled + PLACES_AT_ONCE, until)
            given += self._index.fill(self._filled, end, self._ours.__contains__)
            self._filled = end
        return given

    def _settle(self, until: int) -> None:
        """Move `settled` towards `until`, as far as the index holds everybody."""
        settled = self._view.settled
        while settled < until:
            end = min(settled + PLACES_AT_ONCE, until)
            settled = self._index.held(settled, end)
            if settled < end:
                break
        if settled > self._view.settled:
            with self._log_lock:
                self._shorten(settled)
        if settled >= self._marked + PLACES_AT_ONCE:
            self._index.set_mark(self._whose, settled)
            self._marked = settled

    def _shorten(self, settled: int) -> None:
        """Keep only who was enrolled behind `settled`; with the log's lock held."""
        view, blocks = self._view, self._view.tail.blocks
        rows = range(bisect.bisect_right(view.places, settled), view.tail.count)
        live = [
            (row, user_id) for row, user_id in ((row, view.tail.user_id(row)) for row in rows) if user_id is not None
        ]
        tail = Templates(self._ours.dimension)
        if live:
            vectors = np.stack([blocks[row // BLOCK_ROWS].arrays["rows"][row % BLOCK_ROWS] for row, _ in live])
            tail = tail.extended(vectors, [user_id for _, user_id in live])
        self._view = replace(view, settled=settled, tail=tail, places=tuple(view.places[row] for row, _ in live))

    def _settle_for_ever(self) -> None:
        while not self._closed.wait(SETTLE_SECONDS):
            try:
                self.settle()
            except FaceError as error:
                log.info("The tail is kept for now: %s", error.code)

    def _count(self) -> None:
        begun = time.monotonic()
        self._enrolled = self._index.count()
        # Counting a hundred million takes half a minute: no more than a twentieth of the time is spent on it.
        self._count_again_at = time.monotonic() + max(COUNT_SECONDS, 20 * (time.monotonic() - begun))

    def status(self) -> dict[str, Any]:
        """Return figures for people and monitors, without asking the store.

        `enrolled` was counted in the last minutes; `in_tail` is how many are searched in memory. Records that cannot be
        read, or are another model's, are not counted: no process has read them all.
        """
        view = self._view
        return {
            "model": self._ours.model,
            "enrolled": self._enrolled,
            "last_seq": view.last,
            "in_tail": len(view.places),
        }

    def close(self) -> None:
        """Stop looking after the tail."""
        self._closed.set()
        if self._settler is not None:
            self._settler.join()
