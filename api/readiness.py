"""Answers quickly whether decisions can be made, even while the database hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from errors import FaceError

# How long an answer waits for the database.
PATIENCE_S = 0.1
# A database that has not answered for so long is called unreachable; until then its last answer counts.
SLOW_S = 3.0


class Readiness:
    """Asks whether decisions can be made, in a thread of its own and once at a time. Safe for many threads.

    Args:
        ask: returns if they can; raises FaceError if not; may take long.
        patience_s: how long `require` waits for it.
    """

    def __init__(self, ask: Callable[[], None], patience_s: float = PATIENCE_S) -> None:
        self._ask = ask
        self._patience_s = patience_s
        self._answered = threading.Condition()
        self._answers = 0
        self._last: FaceError | None = FaceError("not_ready", headers={"Retry-After": "5"})
        self._asked_at: float | None = None  # by time.monotonic; None while nothing is being asked

    def require(self) -> None:
        """Return if decisions can be made; FaceError if not, or if the database does not answer."""
        with self._answered:
            if self._asked_at is None:
                try:
                    threading.Thread(target=self._find_out, name="readiness", daemon=True).start()
                except RuntimeError as error:  # no thread is left
                    raise FaceError("overloaded", headers={"Retry-After": "5"}) from error
                self._asked_at = time.monotonic()
            before, waited = self._answers, time.monotonic() - self._asked_at
            if (
                not self._answered.wait_for(lambda: self._answers > before, self._patience_s - waited)
                and waited > SLOW_S
            ):
                raise FaceError("database_unavailable", headers={"Retry-After": "5"})
            last = self._last
        if last is not None:
            raise FaceError(
                last.code, last.sentence, values=last.values, fields=last.fields, headers=last.headers
            ) from last

    def _find_out(self) -> None:
        answer: FaceError | None = FaceError("internal_error")
        try:
            self._ask()
            answer = None
        except FaceError as error:
            answer = error
        finally:
            with self._answered:
                self._last, self._asked_at = answer, None
                self._answers += 1
                self._answered.notify_all()
