"""Searches MongoDB's vector index, and keeps only the newest part of the log, the tail, in this process' memory.

The index follows the collection with a lag. So this process searches everybody behind the place `settled` in memory,
and merges both results. `settled` moves past a place when

- the index was asked for exactly that place, and returned it, and
- the place was read at least `MIN_TAIL_AGE_S` seconds ago, because each server of a replica set may have an index of
  its own, and another server may answer the next search.

`settled` is kept in the store for the next start (`set_mark`), so that no process ever assumes that a record is in the
index without having seen it there. So a search misses nobody because of the lag, and an exact search decides as memory
does. An approximate search may miss a person who is in the index, and so enrol a second account. The approximation
causes that, not the lag.

The index returns the records as they are now, even if the index itself holds an older state. An erased record has no
embedding any more, since a process makes sure of that before it applies the erasure.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.base import Template
from errors import FaceError
from gallery.in_memory import ModelFilter
from gallery.templates import BLOCK_ROWS, Candidate, Templates, person_score, search_people
from store.records import EnrolmentLog, Entry

if TYPE_CHECKING:
    from store.mongo_vectors import MongoVectorIndex

log = logging.getLogger(__name__)

# Asked for beside the wanted candidates, in place of records that were erased a moment ago or score equally.
SPARE_CANDIDATES = 16
MAX_CANDIDATES = 10_000
PLACES_AT_ONCE = 1000
# At a start, so many places may be searched in the tail, instead of waiting until the index has them.
MAX_TAIL_AT_START = 10_000
MIN_TAIL_AGE_S = 60.0
SETTLE_SECONDS = 2.0
COUNT_SECONDS = 60.0
LOAD_AGAIN_SECONDS = 1.0
MAX_LOG_WAIT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class IndexedView:
    """The gallery up to the log's place `last`: the index up to `settled`, and the tail in memory behind it.

    `photo_changes` counts the photos that were added or removed so far.
    """

    last: int
    settled: int
    tail: Templates
    index: MongoVectorIndex
    searchable: ModelFilter
    photo_changes: int = 0

    def search(self, probe: Template, k: int | None = 1, least: float = -np.inf, after: int = 0) -> list[Candidate]:
        """Return the `k` best people (all, for None) whose score is at least `least`, the best first.

        Args:
            probe: float32[d], L2-normalised.
            k: how many at most.
            least: the lowest score that counts.
            after: the photos up to this place in the log may be left out.

        Raises:
            FaceError: `database_unavailable`, also when there are more than 10,000 candidates.
        """
        in_tail_alone = after > 0 and after >= self.settled
        first = self.tail.first_after(after)

        def rows(n: int | None) -> list[Candidate]:
            found = self.tail.search(probe, n, least, first)
            if not in_tail_alone:
                # A photo may be found twice, in the index and in the tail.
                found = sorted(self._from_index(probe, n, least) + found, key=lambda one: -one.cosine)
            return found[:n]

        return search_people(rows, lambda best: self._scores(list(best), probe), k, least)

    def _from_index(self, probe: Template, k: int | None, least: float) -> list[Candidate]:
        limit = min(SPARE_CANDIDATES + (k or SPARE_CANDIDATES), MAX_CANDIDATES)
        while True:
            entries, more = self.index.nearest(probe, limit, self.settled)
            found = self._candidates(entries, probe)
            # There are enough, or these are all, or all others score too low.
            if not more or (k is not None and len(found) >= k) or (found and found[-1].cosine < least):
                return [one for one in found if one.cosine >= least]
            if limit == MAX_CANDIDATES:
                log.error("The vector index returned %d candidates, and too few of them can be used", limit)
                raise FaceError("database_unavailable", headers={"Retry-After": "5"})
            limit = min(2 * limit, MAX_CANDIDATES)

    def cosine(self, user_id: str, probe: Template) -> float | None:
        """Return the score of one person, see `person_score`; None when they have no template."""
        return next((one.cosine for one in self._scores([user_id], probe)), None)

    def _scores(self, user_ids: Sequence[str], probe: Template) -> Iterator[Candidate]:
        cosines: dict[str, list[float]] = {}
        for one in self._candidates(self.index.photos_of(user_ids), probe):
            cosines.setdefault(one.user_id, []).append(one.cosine)
        for user_id in user_ids:  # in their order; without those who were erased meanwhile
            if user_id in cosines:
                yield Candidate(user_id, person_score(np.array(cosines[user_id])))

    def photos(self, user_id: str) -> list[int]:
        """Return the places of a person's photos, in the order of the log."""
        return sorted(entry.seq for entry in self.index.photos_of([user_id]) if self.searchable.accepts(entry))

    def _candidates(self, entries: list[Entry], probe: Template) -> list[Candidate]:
        """Compare with the records of the running model; the best first, and of equals the earliest enrolled first."""
        found = [one for one in entries if self.searchable.accepts(one)]
        if not found:
            return []
        # `vecdot` as in `templates`, so that a template scores the same in the tail and in the index.
        cosines = np.vecdot(np.stack([entry.template for entry in found if entry.template is not None]), probe)
        scored = sorted(zip(-cosines, found, strict=True), key=lambda one: (one[0], one[1].seq))
        return [Candidate(entry.user_id or "", min(1.0, -float(negative))) for negative, entry in scored]


class IndexedCopy:
    """The log's tail in memory, and the way to MongoDB's vector index, which answers this process' searches.

    Args:
        store: the records; prepared.
        searchable: tells which templates are searched.
        index: the vector index, created.
    """

    def __init__(self, store: EnrolmentLog, searchable: ModelFilter, index: MongoVectorIndex) -> None:
        self._store, self._searchable, self._index = store, searchable, index
        self._view = IndexedView(0, 0, Templates(searchable.dimension), index, searchable)
        # As in `InMemoryCopy`.
        self._last_name: str | None = None
        # A mark is valid only for these settings: with others, other records belong into the index.
        self._mark_name = f"{searchable.model} {searchable.dimension} {searchable.plain_model}"
        self._marked = 0
        # Up to this place every record that should have a vector has one.
        self._filled = 0
        # (monotonic seconds, the last place read then); and the last place that was read MIN_TAIL_AGE_S ago.
        self._reads: deque[tuple[float, int]] = deque()
        self._old_enough = 0
        self._log_lock = threading.Lock()
        self._loaded = False
        self._last_place_to_load = 0
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
        removed: list[int] = []
        last, name = self._view.last, self._last_name
        try:
            for entry in self._store.entries(last, name):
                if entry.erases is not None:
                    if self._loaded:
                        # The process that logged the erasure may have been killed before it removed the embedding.
                        self._store.finish_erasures(entry.erases)
                    erased.append(entry.erases)
                elif self._searchable.accepts(entry):
                    added.append(entry)
                if entry.removes is not None:
                    if self._loaded:
                        self._store.finish_erasures(place=entry.removes)
                    removed.append(entry.removes)
                last, name = entry.seq, entry.name or None
        finally:
            self._extend(added, erased, removed, last)
            self._last_name = name

    def _extend(self, added: list[Entry], erased: list[str], removed: list[int], last: int) -> None:
        tail = self._view.tail
        if added:
            vectors = np.stack([entry.template for entry in added if entry.template is not None])
            tail = tail.extended(vectors, [entry.user_id or "" for entry in added], [entry.seq for entry in added])
        gone = [row for user_id in erased for row in tail.find(user_id)]
        gone += [row for place in removed if (row := tail.row_at(place)) is not None]
        for row in gone:
            tail.blocks[row // BLOCK_ROWS].wipe(row % BLOCK_ROWS)
        photos_added = sum(entry.is_added for entry in added)
        self._enrolled += len(added) - photos_added
        changes = self._view.photo_changes + photos_added + len(removed)
        self._view = replace(self._view, last=last, tail=tail, photo_changes=changes)

    def knows(self, user_id: str) -> bool:
        """Return whether this user_id has a record that is not erased, of any model."""
        return bool(self._index.photos_of([user_id]))

    # --- loading ---

    def load(self, *, keep_trying: bool) -> None:
        """Wait until the index can be searched and is filled, and read the log's tail.

        Call it before any other method but `status` and `progress`.
        """
        while not self._closed.is_set():
            try:
                if self._load():
                    self._settler = threading.Thread(target=self._settle_until_closed, name="gallery-tail", daemon=True)
                    self._settler.start()
                    return
                log.info("Waiting for MongoDB's vector index; records have vectors up to place %d", self._filled)
            except FaceError:
                if not keep_trying:
                    raise
                log.warning("The vector index cannot be read. Trying again.")
            self._closed.wait(LOAD_AGAIN_SECONDS)

    def _load(self) -> bool:
        """Continue loading; return whether it is finished."""
        if not self._index.is_queryable():
            return False
        self._last_place_to_load = self._store.last_place()
        if not self._filled:
            self._marked = self._filled = self._index.mark(self._mark_name)
            self._view = replace(self._view, last=self._marked, settled=self._marked)
        until = self._last_place_to_load - MAX_TAIL_AT_START
        if self._view.settled < until:
            if self._fill(until) > PLACES_AT_ONCE:
                return False  # that took long, and the log has grown meanwhile
            self._closed.wait(MIN_TAIL_AGE_S)
            self._settle(until)
            if self._view.settled < until:
                return False
        with self._log_lock:
            self._view = replace(self._view, last=max(self._view.last, self._view.settled))
            self._last_name = None
            if self._view.last:
                self._last_name = next((one.name for one in self._store.entries(self._view.last - 1)), None)
            self._read_log()
        # At any place; `_read_log` finishes the erasures that are logged from now on.
        self._store.finish_erasures()
        self._count()
        self._loaded = True
        return True

    def progress(self) -> dict[str, int]:
        """Return the place up to which records have vectors, while loading."""
        return {"applied": self._filled, "of": max(self._last_place_to_load, self._filled)}

    # --- the tail ---

    def settle(self) -> None:
        """Remove from the tail the records that the index was seen to hold, once they are old enough.

        Raises:
            FaceError: `database_unavailable`.
        """
        last = self.caught_up().last
        # Processes that search in memory enrol without a vector.
        self._fill(last)
        self._reads.append((time.monotonic(), last))
        while self._reads and self._reads[0][0] <= time.monotonic() - MIN_TAIL_AGE_S:
            self._old_enough = self._reads.popleft()[1]
        self._settle(self._old_enough)
        if time.monotonic() >= self._count_again_at:
            self._count()

    def _fill(self, until: int) -> int:
        """Add the missing vectors to the records up to `until`; return how many."""
        given = 0
        while self._filled < until:
            end = min(self._filled + PLACES_AT_ONCE, until)
            given += self._index.fill(self._filled, end, self._searchable.accepts)
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
            self._index.set_mark(self._mark_name, settled)
            self._marked = settled

    def _shorten(self, settled: int) -> None:
        """Keep only the rows behind the place `settled`; with the log's lock held."""
        older, tail = self._view.tail, Templates(self._searchable.dimension)
        rows = range(older.first_after(settled), older.count)
        live = {row: user_id for row in rows if (user_id := older.user_id(row)) is not None}
        if live:
            vectors = np.stack([older.template(row) for row in live])
            tail = tail.extended(vectors, list(live.values()), [older.place(row) for row in live])
        self._view = replace(self._view, settled=settled, tail=tail)

    def _settle_until_closed(self) -> None:
        while not self._closed.wait(SETTLE_SECONDS):
            try:
                self.settle()
            except FaceError as error:
                log.info("The tail cannot be shortened now: %s", error.code)

    def _count(self) -> None:
        begun = time.monotonic()
        self._enrolled = self._index.count()
        # Counting a hundred million takes half a minute. At most a twentieth of the time is spent on counting.
        self._count_again_at = time.monotonic() + max(COUNT_SECONDS, 20 * (time.monotonic() - begun))

    def status(self) -> dict[str, Any]:
        """Return figures for people and monitors, without asking the store.

        `enrolled` was counted in the last minutes; `in_tail` is how many are searched in memory. Unreadable records and
        those of other models are not counted, since no process reads all records.
        """
        view = self._view
        return {
            "model": self._searchable.model,
            "enrolled": self._enrolled,
            "last_seq": view.last,
            "in_tail": view.tail.count,
        }

    def close(self) -> None:
        """Stop shortening the tail."""
        self._closed.set()
        if self._settler is not None:
            self._settler.join()
