"""Gives every request a thread, and the probes threads of their own, so that they are answered whatever hangs."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any

logger = logging.getLogger(__name__)

# GET / and GET /health, and the refusals of the web server itself, take no time and wait for nothing.
PROBE_PATHS = ("/", "/health")
PROBE_THREADS = 4
# While the oldest request has waited for a thread for so long, something hangs, and no further one may wait.
LONGEST_WAIT_S = 2.0


class RequestThreads:
    """Serves the web server's connections, each the first of its requests. Safe for many threads.

    A thread is started when a request needs one. When all are busy, requests wait for one; when one of them has waited
    for LONGEST_WAIT_S, further ones are refused.

    Args:
        most: how many requests without a probe's path may be served at once.

    Raises:
        RuntimeError: not even the first threads can be started.
    """

    def __init__(self, most: int) -> None:
        self._probes = _Pool("probe", PROBE_THREADS, longest_wait_s=math.inf)
        self._others = _Pool("request", most, LONGEST_WAIT_S)
        self.refused = 0
        for _ in range(PROBE_THREADS):
            self._probes.start_thread()
        self._others.start_thread()

    def add(self, connection: Any, refusal: Any) -> None:
        """Have the connection's first request served, or `refusal` sent instead if all threads are busy.

        Args:
            connection: a channel of the web server, its `requests_lock` held.
            refusal: the web server's error for it.
        """
        request = connection.requests[0]
        if not request.error and not (request.path in PROBE_PATHS and request.command in ("GET", "HEAD")):
            if self._others.add(connection):
                return
            self.refused += 1
            request.error = refusal
        self._probes.add(connection)


class _Pool:
    def __init__(self, name: str, most_threads: int, longest_wait_s: float) -> None:
        self._name, self._most_threads, self._longest_wait_s = name, most_threads, longest_wait_s
        self._changed = threading.Condition()
        self._tasks: deque[tuple[float, Any]] = deque()  # each with the time at which it came
        self._threads = self._busy = 0

    def start_thread(self) -> None:
        """Start one more thread; RuntimeError if the system has none."""
        threading.Thread(target=self._serve, name=f"{self._name}-{self._threads}", daemon=True).start()
        self._threads += 1

    def add(self, task: Any) -> bool:
        """Have a task served; False if one before it waits too long already."""
        now = time.monotonic()
        with self._changed:
            if len(self._tasks) >= self._threads - self._busy and self._threads < self._most_threads:
                # Without one more thread, the task waits for one of those that exist.
                with suppress(RuntimeError):
                    self.start_thread()
            if self._tasks and now - self._tasks[0][0] > self._longest_wait_s:
                return False
            self._tasks.append((now, task))
            self._changed.notify()
            return True

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._tasks:
                    self._changed.wait()
                _, task = self._tasks.popleft()
                self._busy += 1
            try:
                task.service()
            except BaseException:
                logger.exception("Unforeseen error while a connection was served")
            with self._changed:
                self._busy -= 1
