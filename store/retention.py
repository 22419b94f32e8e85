"""Notes the day on which each person was last verified, and erases people not verified for RETENTION_DAYS."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from errors import FaceError
from store.audit_log import AuditLog
from store.documents import DAY_S
from store.records import RecordStore

logger = logging.getLogger(__name__)

NOTE_INTERVAL_S = 60.0
FIRST_SWEEP_AFTER_S = 600.0
# A sweep that would erase a larger share of all people means a wrong clock or setting; an operator must confirm it.
MAX_ERASED_SHARE = 0.05
# So many people may always be erased, however few are enrolled.
ALWAYS_ALLOWED_PEOPLE = 10
# Each lost race is another process' success, so this many in a row means that something is wrong.
MAX_LOST_RACES = 1000


class RetentionError(ValueError):
    """A sweep was refused; the message says why, and what an operator can do."""


def due(store: RecordStore, days: int, now: float, enrolled: int | None) -> list[str]:
    """Return the people to erase: neither enrolled nor verified within the last `days`.

    Args:
        store: the records.
        days: RETENTION_DAYS.
        now: seconds since the epoch, by this machine's clock.
        enrolled: how many people are enrolled; None for no limit.

    Raises:
        RetentionError: the clock seems to be wrong, or too many people would be erased.
        FaceError: `database_unavailable`.
    """
    newest = store.newest_activity()
    if newest is None:
        return []
    if abs(now - newest) > days * DAY_S / 2 and enrolled is not None:
        raise RetentionError(
            f"by this machine's clock nobody was enrolled or verified for {(now - newest) / DAY_S:.0f} days. If the "
            "clock is right, run `python app.py retention --now`"
        )
    people = list(store.unseen(now - days * DAY_S))
    if enrolled is not None and len(people) > max(ALWAYS_ALLOWED_PEOPLE, MAX_ERASED_SHARE * enrolled):
        raise RetentionError(
            f"{len(people)} of {enrolled} people would be erased at once. See who they are with "
            "`python app.py retention --dry-run`; if that is right, run `python app.py retention --now`"
        )
    return people


def erase(store: RecordStore, user_id: str, audit: AuditLog | None, by: str = "(retention)") -> bool:
    """Erase a person while services run; False if the person is not enrolled any more.

    Args:
        store: the records.
        user_id: the person.
        audit: records the erasure.
        by: the name that the audit log records in place of an API key's.

    Raises:
        FaceError: `database_unavailable`; `overloaded`, other processes write to the log too fast.
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
    """Notes who is verified, at most once a day each, and sweeps once a day. Every service process may run one.

    Args:
        store: the records.
        days: RETENTION_DAYS.
        enrolled: returns how many people are enrolled.
        audit: records every erasure.
    """

    def __init__(self, store: RecordStore, days: int, enrolled: Callable[[], int], audit: AuditLog | None) -> None:
        self._store, self._days, self._enrolled, self._audit = store, days, enrolled, audit
        self._lock = threading.Lock()
        self._today = 0
        self._noted: set[str] = set()
        # user_id -> the day to note.
        self._waiting: dict[str, int] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def start(self) -> None:
        """Start to write notes and to sweep, in the background."""
        self._thread.start()

    def seen(self, user_id: str) -> None:
        """Note that a person was verified; written within a minute, or by `close`."""
        with self._lock:
            today = int(time.time() // DAY_S)
            if today != self._today:
                self._today, self._noted = today, set()
            if user_id not in self._noted:
                self._noted.add(user_id)
                self._waiting[user_id] = today

    def close(self) -> None:
        """Write the waiting notes, and stop."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self._flush()

    def _flush(self) -> None:
        """Write the waiting notes; without the lock, since requests must not wait for the store."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        try:
            for day in sorted(set(waiting.values())):
                self._store.note_seen(sorted(user_id for user_id, noted in waiting.items() if noted == day), day)
        except FaceError:
            logger.warning("The notes of who was verified could not be written; trying again")
            with self._lock:
                self._waiting = waiting | self._waiting

    def _run(self) -> None:
        next_sweep = time.monotonic() + FIRST_SWEEP_AFTER_S
        while not self._stopping.wait(NOTE_INTERVAL_S):
            self._flush()
            if time.monotonic() >= next_sweep:
                next_sweep = time.monotonic() + DAY_S
                self.sweep()

    def sweep(self) -> int:
        """Erase the people who are due; return how many. A sweep that cannot be decided is logged and erases nobody."""
        try:
            self._flush()
            with self._lock:
                if self._waiting:
                    return 0  # people whose note could not be written must not be erased for it
            people = due(self._store, self._days, time.time(), self._enrolled())
            erased = sum(erase(self._store, user_id, self._audit) for user_id in people)
        except RetentionError as error:
            logger.error("RETENTION_DAYS: nobody is erased: %s", error)  # noqa: TRY400 - not a fault of the program
            return 0
        except FaceError:
            logger.warning("RETENTION_DAYS: the database cannot be reached; trying again tomorrow")
            return 0
        logger.info("RETENTION_DAYS: %d people erased", erased)
        return erased
