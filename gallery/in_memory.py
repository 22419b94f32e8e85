"""Keeps the in-memory gallery in step with the enrolment log, and counts what is in it.

A decision is made on an `InMemoryView` that was caught up after the question was asked. When the log cannot be read,
there is no view, and so no decision.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

import numpy as np

from engines.base import Template
from errors import FaceError
from gallery.snapshot import SnapshotFolder
from gallery.snapshot_file import Header, SavedBlock
from gallery.templates import BLOCK_ROWS, Block, Candidate, Templates, id_bytes, person_score, search_people
from store.records import EnrolmentLog, Entry

log = logging.getLogger(__name__)

UNREADABLE = "unreadable"
# When reading the log takes longer than this, the database hangs. Other requests are told so at once instead of
# waiting behind the reader, so that threads are left to answer `GET /`.
MAX_LOG_WAIT_SECONDS = 1.0
APPLIED_AT_ONCE = 2000
PROGRESS_SECONDS = 5.0
LOAD_AGAIN_SECONDS = (1, 2, 4, 8, 15)
SAVE_AGAIN_SECONDS = 60.0
# The rows behind the last full block are saved when this many are new. The next start reads at most so many records.
SAVED_AT_ONCE = 8192
# A snapshot's header lists the records of other models. During a change of models they are too many to list.
MAX_SET_ASIDE_SAVED = 50_000
# Erased rows are still scanned. Above this share of them the gallery is read anew, without them.
MAX_ERASED_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class InMemoryView:
    """The gallery up to the log's place `last`, for readers that take no lock.

    Attributes:
        templates: the rows.
        last: the place.
        several: people with more than one row -> how many; grows and shrinks with the log.
        photo_changes: how many photos were added or removed so far.
    """

    templates: Templates
    last: int
    several: Mapping[str, int]
    photo_changes: int = 0

    def search(self, probe: Template, k: int | None = 1, least: float = -np.inf, after: int = 0) -> list[Candidate]:
        """Return the `k` best people (all, for None) whose score is at least `least`, the best first.

        Args:
            probe: float32[d], L2-normalised.
            k: how many at most.
            least: the lowest score that counts.
            after: search only the photos behind this place in the log.
        """
        first = self.templates.first_after(after) if after else 0

        def scores(best: Mapping[str, float]) -> Iterator[Candidate]:
            for user_id, cosine in best.items():
                score = self.cosine(user_id, probe) if user_id in self.several else cosine
                if score is not None:  # erased meanwhile
                    yield Candidate(user_id, score)

        return search_people(lambda n: self.templates.search(probe, n, least, first), scores, k, least)

    def cosine(self, user_id: str, probe: Template) -> float | None:
        """Return the score of one person, see `person_score`; None when they have no template here."""
        found = [self.templates.cosine(row, probe) for row in self.templates.find(user_id)]
        cosines = np.array([cosine for cosine in found if cosine is not None])
        return person_score(cosines) if len(cosines) else None

    def photos(self, user_id: str) -> list[int]:
        """Return the places of a person's photos, in the order of the log."""
        return [self.templates.place(row) for row in self.templates.find(user_id)]


@dataclass(frozen=True, slots=True)
class ModelFilter:
    """Tells which records can be compared with the running model's templates.

    Args:
        model: the running model's name.
        dimension: d of its templates.
        plain_model: the model of records that name none; by default the running model, if the dimension fits.
    """

    model: str
    dimension: int
    plain_model: str | None

    def accepts(self, entry: Entry) -> bool:
        """Whether an entry has a template of the running model."""
        return entry.template is not None and self.other_model(entry.model, len(entry.template)) is None

    def other_model(self, model: str | None, dimension: int) -> str | None:
        """Return the name of the other model that made a template; None for the running model."""
        if model is None:
            model = self.plain_model or (self.model if dimension == self.dimension else "unknown")
        if model == self.model and dimension != self.dimension:
            return f"{model} of {dimension} dimensions"
        return None if model == self.model else model


class InMemoryCopy:
    """The templates of one model in this process' memory, and counts of all other records.

    Args:
        store: the records; prepared.
        searchable: tells which templates are searched; others are counted, never compared.
        snapshot: keeps templates on local disk; None for no snapshot.
    """

    def __init__(self, store: EnrolmentLog, searchable: ModelFilter, snapshot: SnapshotFolder | None) -> None:
        self._store = store
        self._searchable = searchable
        self._snapshot = snapshot
        # People with more than one photo -> how many; complete once `_counted`.
        self._several: dict[str, int] = {}
        self._more_photos = 0
        self._counted = False
        self._view = InMemoryView(Templates(searchable.dimension), 0, self._several)
        # The `Entry.name` at the last applied place. If it changes, the store has another log.
        self._last_name: str | None = None
        self._last_erasure: tuple[int, str] | None = None
        # Item i: the last place in the log that is in the full block i of the view.
        self._full_at: list[int] = []
        self._live = 0
        self._set_aside: dict[str, list[tuple[int, str]]] = {}
        self._set_aside_counts: Counter[str] = Counter()
        self._log_lock = threading.Lock()
        self._reads_begun = 0
        self._read_began_at = 0.0
        self._read_failed = False
        self._loading = False
        # While loading: the last place of the log, and the place up to which the snapshot was read.
        self._last_place_to_load = 0
        self._restored = 0
        self._save_wanted = threading.Event()
        self._saver: threading.Thread | None = None
        # The row count, and the place in the log, up to which the snapshot holds the view.
        self._saved_rows = 0
        self._saved_until = 0
        self._save_again_at = 0.0
        self._closing = False

    # --- catching up ---

    def caught_up(self, lost_races: int = 0) -> InMemoryView:
        """Return a view that holds everything the log held when this was called.

        Args:
            lost_races: how often the caller's append was refused in a row.

        Raises:
            FaceError: `database_unavailable`; `not_ready` while loading.
        """
        if self._loading:
            raise FaceError("not_ready", fields={"gallery": self.progress()}, headers={"Retry-After": "5"})
        if lost_races:
            # The winner's entry can be read only when a majority of the servers has it, which takes a moment. The wait
            # is short and always equal: growing waits would let one process enrol at full rate and starve the losers.
            time.sleep(0.0005)
        begun_before = self._reads_begun
        if self._log_lock.locked() and time.monotonic() - self._read_began_at > MAX_LOG_WAIT_SECONDS:
            raise _no_log()
        if not self._log_lock.acquire(timeout=MAX_LOG_WAIT_SECONDS):
            raise _no_log()
        try:
            if self._reads_begun > begun_before:
                # Another thread began to read the log after this call, and has finished: that serves this call too.
                # So no thread waits for more than two timeouts when the store is down.
                if self._read_failed:
                    raise _no_log()
                return self._view
            self._read_log()
            return self._view
        finally:
            self._log_lock.release()

    def _read_log(self, after_each_batch: Callable[[], None] = lambda: None) -> None:
        """Apply the log's new entries; with the log's lock held."""
        self._reads_begun += 1
        self._read_began_at = time.monotonic()
        self._read_failed = True
        batch: list[Entry] = []
        try:
            for entry in self._store.entries(self._view.last, self._last_name):
                if entry.removes is None and self._searchable.accepts(entry):
                    batch.append(entry)
                    if len(batch) < APPLIED_AT_ONCE:
                        continue
                    self._add(batch)
                    after_each_batch()
                else:
                    self._add(batch)
                    self._apply_other(entry)
                batch = []
        finally:
            self._add(batch)
        if not self._counted:
            self._count_photos()
        self._read_failed = False
        if self._view.templates.count - self._saved_rows >= SAVED_AT_ONCE:
            self._save_wanted.set()

    def _add(self, entries: list[Entry]) -> None:
        """Add enrolments of the running model."""
        if not entries:
            return
        before = self._view.templates.count
        vectors = np.stack([entry.template for entry in entries if entry.template is not None])
        user_ids = [entry.user_id or "" for entry in entries]
        templates = self._view.templates.extended(vectors, user_ids, [entry.seq for entry in entries])
        for row in range(before, templates.count):
            if (row + 1) % BLOCK_ROWS == 0:
                self._full_at.append(entries[row - before].seq)
        self._live += len(entries)
        # A record of the older form may be another photo of a person, too. The first read counts them all at its end.
        repeated = {entry.user_id or "" for entry in entries if entry.is_added or entry.model is None}
        for user_id in repeated if self._counted else ():
            self._note_photos(user_id, len(templates.find(user_id)))
        changes = self._view.photo_changes + sum(entry.is_added for entry in entries)
        self._view = replace(self._view, templates=templates, last=entries[-1].seq, photo_changes=changes)
        self._last_name = entries[-1].name or None

    def _apply_other(self, entry: Entry) -> None:
        if entry.erases is not None:
            self._last_erasure = (entry.seq, entry.name)
            self._drop(entry.erases)
        elif entry.unreadable:
            self._set_aside_record(entry, UNREADABLE)
        elif entry.template is not None:
            other_model = self._searchable.other_model(entry.model, len(entry.template))
            if other_model is None:
                self._add([entry])
            else:
                self._set_aside_record(entry, other_model)
        if entry.removes is not None:
            # After the new photo was added: a person whose only photo is replaced is never without one.
            self._last_erasure = (entry.seq, entry.name)
            self._drop_photos({entry.removes})
            self._view = replace(self._view, photo_changes=self._view.photo_changes + 1)
        self._view = replace(self._view, last=entry.seq)
        self._last_name = entry.name or None

    def _set_aside_record(self, entry: Entry, reason: str) -> None:
        self._set_aside_counts[reason] += 1
        # Nobody can ask to erase a record without a user_id; it still counts.
        self._set_aside.setdefault(entry.user_id or "", []).append((entry.seq, reason))

    def _drop(self, user_id: str) -> None:
        self._set_aside_counts.subtract(reason for _, reason in self._set_aside.pop(user_id, ()))
        for row in self._view.templates.find(user_id):
            self._wipe(row)
        self._note_photos(user_id, 0)

    def _drop_photos(self, places: set[int]) -> None:
        """Remove the photos at these places."""
        templates = self._view.templates
        for row in [row for place in places if (row := templates.row_at(place)) is not None]:
            user_id = templates.user_id(row) or ""
            self._wipe(row)
            self._note_photos(user_id, len(templates.find(user_id)))
        for user_id, records in list(self._set_aside.items()):
            left = [(seq, reason) for seq, reason in records if seq not in places]
            if len(left) < len(records):
                self._set_aside_counts.subtract(reason for seq, reason in records if seq in places)
                self._set_aside[user_id] = left
                if not left:
                    del self._set_aside[user_id]

    def _note_photos(self, user_id: str, count: int) -> None:
        """Note how many photos a person has now."""
        self._more_photos += max(count, 1) - self._several.pop(user_id, 1)
        if count > 1:
            self._several[user_id] = count

    def _count_photos(self) -> None:
        """Find the people who have several photos, among all."""
        self._several.clear()
        self._several.update(self._view.templates.people_with_several())
        self._more_photos = sum(self._several.values()) - len(self._several)
        self._counted = True

    def _wipe(self, row: int) -> None:
        block = self._view.templates.blocks[row // BLOCK_ROWS]
        if isinstance(block, SavedBlock):
            self._note_erasure()
        block.wipe(row % BLOCK_ROWS)
        self._live -= 1
        if self._snapshot is not None and not isinstance(block, SavedBlock):
            self._lose_tail(self._snapshot)

    def _note_erasure(self) -> None:
        if self._snapshot is not None and self._last_erasure is not None:
            try:
                self._snapshot.note_erasure(*self._last_erasure)
            except OSError as error:
                log.warning("The snapshot's newest erasure cannot be noted (%s)", error)

    def knows(self, user_id: str) -> bool:
        """Return whether this user_id has a record that is not erased, of any model."""
        return user_id in self._set_aside or bool(self._view.templates.find(user_id))

    # --- loading ---

    def load(self, *, keep_trying: bool) -> None:
        """Load from the snapshot and the log; afterwards keep the snapshot up to date. As `Gallery.load`."""
        self._loading = True
        begun = time.monotonic()
        for pause in chain(LOAD_AGAIN_SECONDS, repeat(LOAD_AGAIN_SECONDS[-1])):
            try:
                self._last_place_to_load = self._store.last_place()
                if self._view.last == 0:
                    self._restore()
                self._read_log(self._loading_reporter())
                break
            except FaceError as error:
                if not keep_trying:
                    raise
                log.warning("The gallery cannot be loaded (%s). Trying again in %d s.", error.code, pause)
                time.sleep(pause)
        log.info(
            "The gallery holds %d people, loaded in %.1f s", self._live - self._more_photos, time.monotonic() - begun
        )
        if self._snapshot is not None:
            self._saver = threading.Thread(target=self._save_when_wanted, name="gallery-snapshot", daemon=True)
            self._saver.start()
        self._loading = False

    def _loading_reporter(self) -> Callable[[], None]:
        reported_at = time.monotonic()

        def report() -> None:
            nonlocal reported_at
            if time.monotonic() - reported_at >= PROGRESS_SECONDS:
                reported_at = time.monotonic()
                log.info("Loading the gallery: place %d of %d in the log", self._view.last, self._last_place_to_load)
            if len(self._full_at) > self._saved_rows // BLOCK_ROWS:
                # At once, so that memory never holds more than one block of float32 rows.
                self._save()

        return report

    def _restore(self) -> None:
        """Load the snapshot, if the store confirms that it belongs to its log."""
        if self._snapshot is None:
            return
        blocks = []
        for block in self._snapshot.load():
            blocks.append(block)
            self._restored = block.header.last
        if not blocks:
            return
        header = blocks[-1].header
        count = sum(block.header.count for block in blocks)
        erased = sum(len(block.erased(block.header.count)) for block in blocks)
        if self._store.checkpoint(header.last) != header.checkpoint or not self._knows_erasure(self._snapshot):
            log.warning("The snapshot does not belong to the store's log: the gallery is read anew")
        elif erased > MAX_ERASED_SHARE * count:
            log.info("%d of the snapshot's %d rows are erased: the gallery is read anew", erased, count)
        else:
            self._full_at = [block.header.last for block in blocks if block.header.count == BLOCK_ROWS]
            full = tuple(blocks[: len(self._full_at)])
            tail = tuple(Block.with_room(block, self._searchable.dimension) for block in blocks[len(full) :])
            templates = Templates(self._searchable.dimension, full + tail, count)
            self._view = replace(self._view, templates=templates, last=header.last)
            self._last_name = header.checkpoint.partition(" ")[2]
            self._saved_rows, self._saved_until = count, header.last
            self._live = count - erased
            self._set_aside = {
                user_id: [(seq, reason) for seq, reason in records] for user_id, records in header.set_aside.items()
            }
            self._set_aside_counts.update(reason for records in self._set_aside.values() for _, reason in records)
            self._drop_all(self._store.erasures(header.last))
            self._drop_photos(set(self._store.removals(header.last)))
            self._count_photos()
            log.info(
                "The snapshot holds the gallery up to place %d of %d in the log", header.last, self._last_place_to_load
            )
            return
        self._restored = 0
        with suppress(OSError):
            self._snapshot.discard()

    def _knows_erasure(self, snapshot: SnapshotFolder) -> bool:
        """Whether the log has the newest erasure that reached the snapshot; a restored backup may lack it."""
        place, name = snapshot.last_erasure()
        return not place or self._store.checkpoint(place).partition(" ")[2] == name

    def _drop_all(self, erased: list[str]) -> None:
        for user_id in self._set_aside.keys() & set(erased):
            self._drop(user_id)
        ids = {id_bytes(user_id) for user_id in erased}
        for index, block in enumerate(self._view.templates.blocks):
            for offset in block.find_any(ids, self._view.templates.used(index)):
                self._wipe(index * BLOCK_ROWS + offset)

    def progress(self) -> dict[str, int]:
        """Return how far loading has come, in places of the log."""
        applied = max(self._view.last, self._restored)
        return {"applied": applied, "of": max(self._last_place_to_load, applied)}

    # --- saving ---

    def _save_when_wanted(self) -> None:
        while True:
            self._save_wanted.wait()
            self._save_wanted.clear()
            if self._closing:
                return
            self._save()

    def close(self) -> None:
        """Write what is missing in the snapshot, so that the next start reads no record twice."""
        if self._saver is None:
            return
        self._closing = True
        self._save_wanted.set()
        self._saver.join()
        self._save()

    def _save(self) -> None:
        """Write what is missing in the snapshot; holds the log's lock only before and after writing, not meanwhile."""
        if self._snapshot is None or time.monotonic() < self._save_again_at:
            return
        try:
            if len(self._set_aside) <= MAX_SET_ASIDE_SAVED:
                self._note_erasure()
                while self._save_full_block(self._snapshot):
                    pass
                self._save_tail(self._snapshot)
        except (OSError, FaceError) as error:
            log.warning("The snapshot cannot be written (%s). The next start will read more records.", error)
            self._save_again_at = time.monotonic() + SAVE_AGAIN_SECONDS

    def _save_full_block(self, snapshot: SnapshotFolder) -> bool:
        """Save the first full block that is only in memory, and search it in its file afterwards."""
        with self._log_lock:
            blocks = self._view.templates.blocks[: len(self._full_at)]
            index = next((at for at, block in enumerate(blocks) if not isinstance(block, SavedBlock)), None)
            if index is None:
                return False
            block, erased = blocks[index], set(blocks[index].erased(BLOCK_ROWS))
            fields = self._header_fields(index, BLOCK_ROWS, self._full_at[index])
        saved = snapshot.save(block, self._header(snapshot, fields))
        with self._log_lock:
            for offset in set(block.erased(BLOCK_ROWS)) - erased:
                saved.wipe(offset)
            templates = self._view.templates
            changed = (*templates.blocks[:index], saved, *templates.blocks[index + 1 :])
            self._view = replace(self._view, templates=replace(templates, blocks=changed))
        return True

    def _save_tail(self, snapshot: SnapshotFolder) -> None:
        """Save the rows behind the last full block."""
        with self._log_lock:
            templates, last = self._view.templates, self._view.last
            index, count = divmod(templates.count, BLOCK_ROWS)
            if not count or last == self._saved_until:
                return
            block, erased = templates.blocks[index], templates.blocks[index].erased(count)
            fields = self._header_fields(index, count, last)
        snapshot.save_tail(block, self._header(snapshot, fields))
        with self._log_lock:
            self._saved_until, self._saved_rows = last, templates.count
            if block.erased(count) != erased:
                self._lose_tail(snapshot)

    def _lose_tail(self, snapshot: SnapshotFolder) -> None:
        """Remove the tail's file, since it holds an erased person, and have it written anew."""
        snapshot.drop_tail()
        self._saved_until = 0
        self._save_wanted.set()

    def _header_fields(self, index: int, count: int, last: int) -> dict[str, Any]:
        """Collect the header's fields for a block that ends at place `last`; with the log's lock held."""
        aside = {
            user_id: [(seq, reason) for seq, reason in records if seq <= last]
            for user_id, records in self._set_aside.items()
        }
        blocks = self._view.templates.blocks
        before = blocks[index - 1] if index else None
        return {
            "index": index,
            "count": count,
            "last": last,
            "previous": before.header.digest if isinstance(before, SavedBlock) else "",
            "set_aside": {user_id: records for user_id, records in aside.items() if records},
            "texts": {str(offset): text for offset, text in blocks[index].texts.items() if offset < count},
        }

    def _header(self, snapshot: SnapshotFolder, fields: dict[str, Any]) -> Header:
        return snapshot.header(checkpoint=self._store.checkpoint(fields["last"]), **fields)

    def status(self) -> dict[str, Any]:
        """Return counts for people and monitors, as of the last catching up, without asking the store."""
        counts = dict(self._set_aside_counts)
        unreadable = counts.pop(UNREADABLE, 0)
        return {
            "model": self._searchable.model,
            "enrolled": self._live - self._more_photos,
            "photos": self._live,
            "other_models": {model: count for model, count in counts.items() if count},
            "unreadable": unreadable,
            "last_seq": self._view.last,
        }


def _no_log() -> FaceError:
    return FaceError("database_unavailable", headers={"Retry-After": "5"})
