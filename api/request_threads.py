"""Gives every request a thread, and the probes threads of their own, so that they are answered whatever hangs."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any

logger = logging.getLogger(__name__)

# GET / and GET /health, and the refusals of the web server itself, take no time and wait for nothing.
PROBE_PATHS = ("/", "/health")
PROBE_THREADS = 4


class RequestThreads:
    """Serves the web server's connections, each the first of its requests. Safe for many threads.

    A thread is started when a request needs one. When all are busy, as many requests wait for a thread as there are
    threads; further ones are refused.

    Args:
        most: how many requests without a probe's path may be served at once.

    Raises:
        OSError: not even the first threads can be started.
    """

    def __init__(self, most: int) -> None:
        self._probes = _Pool("probe", PROBE_THREADS, most_waiting=1_000_000)
        self._others = _Pool("request", most, most_waiting=most)
        self.refused = 0
        try:
            for _ in range(PROBE_THREADS):
                self._probes.start_thread()
            self._others.start_thread()
        except RuntimeError as error:
            raise OSError(
                "no thread can be started: raise the limit of processes (ulimit -u, TasksMax=, --pids-limit)"
            ) from error

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
    def __init__(self, name: str, most_threads: int, most_waiting: int) -> None:
        self._name, self._most_threads, self._most_waiting = name, most_threads, most_waiting
        self._changed = threading.Condition()
        self._tasks: deque[Any] = deque()
        self._threads = self._idle = 0

    def start_thread(self) -> None:
        """Start one more thread; RuntimeError if the system has none."""
        threading.Thread(target=self._serve, name=f"{self._name}-{self._threads}", daemon=True).start()
        self._threads += 1

    def add(self, task: Any) -> bool:
        """Have a task served; False if too many wait already."""
        with self._changed:
            if self._idle <= len(self._tasks) and self._threads < self._most_threads:
                try:
                    self.start_thread()
                except RuntimeError:  # the threads that there are have to do
                    if len(self._tasks) >= self._threads:
                        return False
            elif self._idle <= len(self._tasks) and len(self._tasks) >= self._most_waiting:
                return False
            self._tasks.append(task)
            self._changed.notify()
            return True

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not self._tasks:
                    self._changed.wait()
                self._idle -= 1
                task = self._tasks.popleft()
            try:
                task.service()
            except BaseException:
                logger.exception("Unforeseen error while a connection was served")
