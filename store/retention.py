"""Retention: notes who was verified when, and erases the people who were not verified for RETENTION_DAYS."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from errors import FaceError
from store.audit_log import AuditLog
from store.records import RecordStore

logger = logging.getLogger("face_api")

DAY = 86400.0
NOTE_EVERY_S = 60.0
FIRST_SWEEP_S = 600.0
# A sweep that would take more than this is a clock or a setting gone wrong, or for an operator to say so.
MAX_SHARE, ALWAYS_ALLOWED = 0.05, 10
MAX_LOST_RACES = 1000


class RetentionError(ValueError):
    """A sweep that is not made; the message says why, and what an operator can do."""


def due(store: RecordStore, days: int, now: float, enrolled: int | None) -> list[str]:
    """Return who is to be erased: not verified for `days`, nor enrolled since.

    Args:
        store: the records.
        days: RETENTION_DAYS.
        now: seconds since the epoch, by this machine's clock.
        enrolled: how many people there are; None asks for no limit.

    Raises:
        RetentionError: the clock seems to be wrong, or they are too many to be right.
        FaceError: `database_unavailable`.
    """
    newest = store.newest_activity()
    if newest is None:
        return []
    if abs(now - newest) > days * DAY / 2 and enrolled is not None:
        raise RetentionError(
            f"by this machine's clock nobody enrolled or was verified for {(now - newest) / DAY:.0f} days: if the clock"
            " is right, run `python app.py retention --now`"
        )
    people = list(store.unseen(now - days * DAY))
    if enrolled is not None and len(people) > max(ALWAYS_ALLOWED, MAX_SHARE * enrolled):
        raise RetentionError(
            f"{len(people)} of {enrolled} people would be erased at once: look at them with "
            "`python app.py retention --dry-run`, and if that is right, run `python app.py retention --now`"
        )
    return people


def erase(store: RecordStore, user_id: str, audit: AuditLog | None, by: str = "(retention)") -> bool:
    """Log a person's erasure, beside any number of services; False if somebody else has erased them already.

    Args:
        store: the records.
        user_id: whom.
        audit: is told of it.
        by: what stands in the audit log in place of an API key's name.

    Raises:
        FaceError: `database_unavailable`; `overloaded`, the log moves too fast.
    """
    for _ in range(MAX_LOST_RACES):
        last = store.last_place()
        if store.find_person(user_id) is None:
            return False
        if store.erase(last + 1, user_id):
            if audit is not None:
                audit.record("erase", code="ok", user_id=user_id, key=by)
            return True
    raise FaceError("overloaded")


class Retention:
    """Notes who is verified, at most once a day each, and sweeps once a day; one of each service is enough and safe.

    Args:
        store: the records.
        days: RETENTION_DAYS.
        enrolled: how many people there are.
        audit: is told of every erasure.
    """

    def __init__(self, store: RecordStore, days: int, enrolled: Callable[[], int], audit: AuditLog | None) -> None:
        self._store, self._days, self._enrolled, self._audit = store, days, enrolled, audit
        self._lock = threading.Lock()
        self._today = 0
        self._noted: set[str] = set()
        self._waiting: set[str] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def start(self) -> None:
        """Begin to write notes and to sweep, in the background."""
        self._thread.start()

    def seen(self, user_id: str) -> None:
        """Note that a person has been verified; written within a minute, or at the stop."""
        with self._lock:
            today = int(time.time() // DAY)
            if today != self._today:
                self._flush()
                self._today, self._noted = today, set()
            if user_id not in self._noted:
                self._noted.add(user_id)
                self._waiting.add(user_id)

    def close(self) -> None:
        """Write what is noted, and stop."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        try:
            self._store.note_seen(sorted(self._waiting), self._today)
        except FaceError:
            logger.warning("Who was verified could not be noted; trying again")
        else:
            self._waiting = set()

    def _run(self) -> None:
        next_sweep = time.monotonic() + FIRST_SWEEP_S
        while not self._stopping.wait(NOTE_EVERY_S):
            with self._lock:
                self._flush()
            if time.monotonic() >= next_sweep:
                next_sweep = time.monotonic() + DAY
                self.sweep()

    def sweep(self) -> int:
        """Erase who is due; returns how many. What cannot be decided is logged and left."""
        try:
            with self._lock:
                self._flush()
                if self._waiting:
                    return 0  # whoever could not be noted must not be erased for it
            people = due(self._store, self._days, time.time(), self._enrolled())
            erased = sum(erase(self._store, user_id, self._audit) for user_id in people)
        except RetentionError as error:
            logger.error("RETENTION_DAYS: nobody is erased: %s", error)  # noqa: TRY400 - no fault of the program's
            return 0
        except FaceError:
            logger.warning("RETENTION_DAYS: the database cannot be reached; trying again tomorrow")
            return 0
        logger.info("RETENTION_DAYS: %d people erased", erased)
        return erased
