"""Owns the enrolled templates in memory: exact search, the duplicate check, and enrolment as one decision.

A gallery is what its process has applied of the store's log. Whatever is decided here is decided on a gallery that
was caught up with the log after the question was asked; when the log cannot be read, nothing is decided.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from errors import FaceError
from store import NORM_TOLERANCE, Enrolment, Entry, Store, Template

BLOCK_ROWS = 65_536
REQUEST_KEY_SECONDS = 24 * 3600.0
# Each lost race is somebody else's success, so this many in a row means that something is wrong.
MAX_LOST_RACES = 1000
MAX_WAIT_SECONDS = 10.0
# A log read that takes longer than this is a database that hangs: others are told so at once instead of queueing up
# behind it, so that threads are left to say that the service lives.
MAX_LOG_WAIT_SECONDS = 1.0
UNREADABLE = "unreadable"

Block: TypeAlias = tuple[Template, npt.NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """The best search result; `cosine` lies in -1 to 1."""

    user_id: str
    cosine: float


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The gallery up to the log's place `last`, for readers that take no lock.

    `blocks` hold float32[BLOCK_ROWS, d] rows, each with a flag that it is live; `user_ids` runs parallel to the rows.
    Rows are only ever added behind `count`, and flags only ever cleared.
    """

    blocks: tuple[Block, ...]
    user_ids: list[str]
    count: int
    last: int

    def best(self, probe: Template) -> Candidate | None:
        """Return the live template most like `probe`, the earliest enrolled of equals; None when there is none."""
        best_row, best_cosine = -1, -np.inf
        for start, (rows, live) in zip(range(0, self.count, BLOCK_ROWS), self.blocks, strict=True):
            used = min(BLOCK_ROWS, self.count - start)
            # vecdot, not `@`: it sums each row alike wherever the row stands, so that equal rows score equally.
            cosines = np.vecdot(rows[:used], probe)
            cosines[~live[:used]] = -np.inf
            row = int(np.argmax(cosines))
            if cosines[row] > best_cosine:
                best_row, best_cosine = start + row, float(cosines[row])
        return Candidate(self.user_ids[best_row], min(best_cosine, 1.0)) if best_row >= 0 else None


class Gallery:
    """The templates of one model, for any number of threads.

    Every method but `status` first applies what the log has gained, and raises FaceError `database_unavailable`
    when it cannot.

    Args:
        store: the records; prepared.
        model: the running model's name. Templates of another model are counted, never compared.
        dimension: d of its templates.
        plain_model: the model of records that name none; by default the running one if their dimension is its own.
    """

    def __init__(self, store: Store, model: str, dimension: int, plain_model: str | None = None) -> None:
        self._store = store
        self._model = model
        self._dimension = dimension
        self._plain_model = plain_model
        self._snapshot = _Snapshot((), [], 0, 0)
        self._rows: dict[str, tuple[int, ...]] = {}
        self._set_aside: dict[str, list[str]] = {}
        self._set_aside_counts: Counter[str] = Counter()
        self._log_lock = threading.Lock()
        self._reads_begun = 0
        self._read_began_at = 0.0
        self._read_failed = False
        self._decision_lock = threading.Lock()

    def refresh(self) -> None:
        """Apply what the log has gained; all of it, however much, at the first call."""
        self._caught_up()

    def search(self, probe: Template) -> Candidate | None:
        """Return the best candidate of the whole gallery (1:N), or None when nobody is enrolled.

        Args:
            probe: float32[d], L2-normalised; ValueError otherwise.
        """
        probe = self._checked(probe)
        return self._caught_up().best(probe)

    def compare(self, user_id: str, probe: Template) -> float:
        """Return the cosine of `probe` to one person (1:1), the best of their templates; FaceError `unknown_user`.

        Args:
            user_id: whom the probe claims to be.
            probe: float32[d], L2-normalised; ValueError otherwise.
        """
        probe = self._checked(probe)
        snapshot = self._caught_up()
        cosines = []
        for row in self._rows.get(user_id, ()):
            if row >= snapshot.count:  # enrolled since
                continue
            block, offset = divmod(row, BLOCK_ROWS)
            rows, live = snapshot.blocks[block]
            template: Template = rows[offset].copy()
            # After the copy: erasing clears the flag before it clears the row.
            if live[offset]:
                cosines.append(min(1.0, float(np.vecdot(template, probe))))
        if not cosines:
            raise FaceError("unknown_user")
        return max(cosines)

    def enrol(self, template: Template, *, duplicate_cosine: float, request_key: str | None = None) -> str:
        """Enrol a person unless they are enrolled already, as one decision among all processes on the store.

        Args:
            template: float32[d], L2-normalised; ValueError otherwise.
            duplicate_cosine: from this cosine up, the best candidate is the same person.
            request_key: identifies the client's request; one that enrolled somebody within 24 hours answers alike.

        Returns:
            The user_id given to the person.

        Raises:
            FaceError: `duplicate_face`; `database_unavailable`, after which the person may be enrolled or not;
                `overloaded`.
        """
        template = self._checked(template)
        with self._deciding():
            for attempt in range(MAX_LOST_RACES):
                snapshot = self._caught_up(attempt)
                # Looked up after catching up: whatever the search below can find, this has found if it is the same
                # request's.
                if request_key is not None:
                    earlier = self._store.find_request(request_key, time.time() - REQUEST_KEY_SECONDS)
                    if earlier is not None and self._knows(earlier):
                        return earlier
                candidate = snapshot.best(template)
                # `not <`, so that a threshold that is no number refuses.
                if candidate is not None and not candidate.cosine < duplicate_cosine:
                    raise FaceError("duplicate_face")
                enrolment = Enrolment(str(uuid.uuid4()), template, self._model, time.time(), request_key)
                if self._store.append(snapshot.last + 1, enrolment):
                    return enrolment.user_id
        raise _overloaded()

    def erase(self, user_id: str) -> None:
        """Erase a person, of whatever model, here and in every process.

        Raises:
            FaceError: `unknown_user`; `database_unavailable`, after which to ask again is safe; `overloaded`.
        """
        with self._deciding():
            for attempt in range(MAX_LOST_RACES):
                snapshot = self._caught_up(attempt)
                if not self._knows(user_id):
                    # Perhaps because an erasure got as far as the log and no further.
                    self._store.finish_erasures(user_id)
                    raise FaceError("unknown_user")
                if self._store.erase(snapshot.last + 1, user_id):
                    return
        raise _overloaded()

    def status(self) -> dict[str, Any]:
        """Return counts for people and monitors, as of the last refresh, without asking the store."""
        counts = dict(self._set_aside_counts)
        unreadable = counts.pop(UNREADABLE, 0)
        return {
            "model": self._model,
            "enrolled": len(self._rows),
            "other_models": {model: count for model, count in counts.items() if count},
            "unreadable": unreadable,
            "last_seq": self._snapshot.last,
        }

    def _checked(self, template: Template) -> Template:
        # One NaN would win every search silently, and a vector of another length would be no cosine.
        if template.shape != (self._dimension,) or not abs(float(np.linalg.norm(template)) - 1) <= NORM_TOLERANCE:
            raise ValueError(f"not one L2-normalised template of {self._dimension} dimensions")
        return np.ascontiguousarray(template, np.float32)

    def _knows(self, user_id: str) -> bool:
        return user_id in self._rows or user_id in self._set_aside

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        """One decision at a time: threads of one process would only lose races to each other."""
        if not self._decision_lock.acquire(timeout=MAX_WAIT_SECONDS):
            raise _overloaded()
        try:
            yield
        finally:
            self._decision_lock.release()

    def _caught_up(self, lost_races: int = 0) -> _Snapshot:
        """Return a snapshot that holds everything the log held when this was called."""
        if lost_races:
            # The winner's entry may take a moment until a majority of the servers has it and it can be read. A short
            # and equal wait: growing ones would let one process enrol at full rate and starve those that lost.
            time.sleep(0.0005)
        begun_before = self._reads_begun
        if self._log_lock.locked() and time.monotonic() - self._read_began_at > MAX_LOG_WAIT_SECONDS:
            raise _no_log()
        if not self._log_lock.acquire(timeout=MAX_LOG_WAIT_SECONDS):
            raise _no_log()
        try:
            if self._reads_begun > begun_before:
                # Another thread's read of the log, begun after this call and now over, serves this call as well; and
                # when the store is down, nobody waits for more than two timeouts.
                if self._read_failed:
                    raise _no_log()
                return self._snapshot
            self._reads_begun += 1
            self._read_began_at = time.monotonic()
            self._read_failed = True
            for entry in self._store.entries(self._snapshot.last):
                self._snapshot = self._applied(entry)
            self._read_failed = False
            return self._snapshot
        finally:
            self._log_lock.release()

    def _applied(self, entry: Entry) -> _Snapshot:
        """Apply one entry, holding the log's lock, and return the snapshot that includes it."""
        blocks, user_ids, count = self._snapshot.blocks, self._snapshot.user_ids, self._snapshot.count
        if entry.erases is not None:
            self._drop(entry.erases)
        elif entry.unreadable:
            self._set_apart(entry.user_id, UNREADABLE)
        elif entry.user_id is not None and entry.template is not None:
            stranger = self._strangers_model(entry.model, len(entry.template))
            if stranger is not None:
                self._set_apart(entry.user_id, stranger)
            else:
                if count == len(blocks) * BLOCK_ROWS:
                    rows = np.empty((BLOCK_ROWS, self._dimension), np.float32)
                    blocks = (*blocks, (rows, np.zeros(BLOCK_ROWS, np.bool_)))
                rows, live = blocks[-1]
                rows[count % BLOCK_ROWS] = entry.template
                live[count % BLOCK_ROWS] = True
                user_ids.append(entry.user_id)
                # In an older collection one user_id may stand for several templates; each of them is searched.
                self._rows[entry.user_id] = (*self._rows.get(entry.user_id, ()), count)
                count += 1
        return _Snapshot(blocks, user_ids, count, entry.seq)

    def _strangers_model(self, model: str | None, dimension: int) -> str | None:
        """Return under which name a template is set aside; None when it is to be searched."""
        if model is None:
            model = self._plain_model or (self._model if dimension == self._dimension else "unknown")
        if model == self._model and dimension != self._dimension:
            return f"{model} of {dimension} dimensions"
        return None if model == self._model else model

    def _set_apart(self, user_id: str | None, reason: str) -> None:
        self._set_aside_counts[reason] += 1
        if user_id is not None:
            self._set_aside.setdefault(user_id, []).append(reason)

    def _drop(self, user_id: str) -> None:
        self._set_aside_counts.subtract(self._set_aside.pop(user_id, ()))
        for row in self._rows.pop(user_id, ()):
            block, offset = divmod(row, BLOCK_ROWS)
            rows, live = self._snapshot.blocks[block]
            # The flag first: a search that is under way must not see half a row.
            live[offset] = False
            rows[offset] = 0


def _no_log() -> FaceError:
    return FaceError("database_unavailable", headers={"Retry-After": "5"})


def _overloaded() -> FaceError:
    return FaceError("overloaded", headers={"Retry-After": "1"})
