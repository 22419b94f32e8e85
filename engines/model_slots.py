"""Decides which photo gets to the models next: a few at once, in turns between clients, none after too long a wait."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from errors import FaceError

# Who sends photos: the hash of an API key and an address, either may be empty. API keys take turns, and within one API
# key its addresses do.
Client: TypeAlias = tuple[str, str]
NOBODY: Client = ("", "")

# How long the models take for a photo until that has been measured: many threads' first photos come at once.
FIRST_MODEL_SECONDS = 0.25
# The weight of the newest photo in the mean: the last ten or so count.
NEWEST_WEIGHT = 0.1
# A waiting photo that others overtook gives up after this many times the longest wait.
PATIENCE = 2.0


@dataclass(eq=False)
class _Turn:
    """One photo that waits for a slot or holds one."""

    client: Client
    seconds: float
    granted: threading.Event = field(default_factory=threading.Event)
    begun: float = 0.0

    def seconds_left(self) -> float:
        return max(0.0, self.seconds - (time.monotonic() - self.begun))


class ModelSlots:
    """The models' slots, and the queue for them. Safe for many threads.

    Clients take turns by time: the next slot goes to the waiting client that has had the least of the models lately, so
    that one who sends a flood, or photos that are slow to decode, makes nobody else wait for more than a turn.

    Args:
        slots: how many photos may be in the models at once.
        longest_wait_s: a photo that would wait longer is refused at once.
        most_places: how many requests may be in line or in the models, because each holds a thread; None: any number.
    """

    def __init__(self, slots: int, longest_wait_s: float, most_places: int | None = None) -> None:
        self._slots, self._longest_wait_s, self._most_places = slots, longest_wait_s, most_places
        self._patience_s = None if math.isinf(longest_wait_s) else PATIENCE * longest_wait_s
        self._lock = threading.Lock()
        self._places = 0
        self._model_seconds = FIRST_MODEL_SECONDS
        self._waiting: list[_Turn] = []
        self._running: list[_Turn] = []
        # Seconds that each active API key and client has had. A new one starts level with the last one that was served.
        self._had: dict[str | Client, float] = {}
        self._level: dict[type, float] = {str: 0.0, tuple: 0.0}

    def queue(self) -> tuple[int, int]:
        """How many requests wait for a slot, and how many hold one."""
        with self._lock:
            return max(0, self._places - len(self._running)), len(self._running)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the line; FaceError `overloaded` if all are taken."""
        with self._lock:
            if self._places == self._most_places:
                raise self._overloaded(self._places * self._model_seconds / self._slots)
            self._places += 1
        try:
            yield
        finally:
            with self._lock:
                self._places -= 1

    @contextmanager
    def slot(self, client: Client = NOBODY, decoding_s: float = 0.0) -> Iterator[None]:
        """Hold one of the slots; wait for it if need be.

        Args:
            client: who sends the photo.
            decoding_s: the estimated time of decoding it, in seconds.

        Raises:
            FaceError: `overloaded`: the photo would wait too long, or has waited too long.
        """
        with self._lock:
            turn = _Turn(client, decoding_s + self._model_seconds)
            wait = self._expected_wait(turn)
            if wait > self._longest_wait_s:
                raise self._overloaded(wait)
            self._join(turn)
        try:
            if not turn.granted.wait(self._patience_s) and not self._was_granted(turn):
                raise self._overloaded(self._longest_wait_s)
            yield
            if decoding_s < turn.seconds / 2:  # mostly the models' own time
                self._note_pace(time.monotonic() - turn.begun - decoding_s)
        finally:
            with self._lock:
                self._leave(turn)

    def _note_pace(self, seconds: float) -> None:
        with self._lock:
            self._model_seconds += NEWEST_WEIGHT * (max(0.0, seconds) - self._model_seconds)

    def _was_granted(self, turn: _Turn) -> bool:
        """Whether a turn whose patience is over was granted at the last moment."""
        with self._lock:
            return turn.granted.is_set()

    @staticmethod
    def _overloaded(wait_s: float) -> FaceError:
        return FaceError("overloaded", headers={"Retry-After": str(max(1, round(wait_s)))})

    # What follows is called with the lock held.

    def _join(self, turn: _Turn) -> None:
        for name in (turn.client[0], turn.client):
            self._had.setdefault(name, self._level[type(name)])
        self._waiting.append(turn)
        self._grant()

    def _leave(self, turn: _Turn) -> None:
        if turn in self._waiting:  # interrupted, or out of patience
            self._waiting.remove(turn)
        elif turn in self._running:
            self._running.remove(turn)
            for name in (turn.client[0], turn.client):  # the time it took, in place of the expected time
                self._had[name] += time.monotonic() - turn.begun - turn.seconds
        active = [other.client for other in (*self._waiting, *self._running)]
        kept = {*active, *(client[0] for client in active)}
        self._had = {name: had for name, had in self._had.items() if name in kept}
        self._grant()

    def _grant(self) -> None:
        """Give free slots to the waiting photos whose turn it is; of one client, the first that came."""
        while self._waiting and len(self._running) < self._slots:
            turn = min(self._waiting, key=lambda one: (self._had[one.client[0]], self._had[one.client]))
            self._waiting.remove(turn)
            self._running.append(turn)
            for name in (turn.client[0], turn.client):
                self._level[type(name)] = max(self._level[type(name)], self._had[name])
                self._had[name] += turn.seconds
            turn.begun = time.monotonic()
            turn.granted.set()

    def _expected_wait(self, turn: _Turn) -> float:
        """Seconds until it would be this photo's turn, if nobody else came."""
        if len(self._running) < self._slots:
            return 0.0
        api_key = turn.client[0]
        by_client: defaultdict[Client, float] = defaultdict(float)
        by_api_key: defaultdict[str, float] = defaultdict(float)
        for other in self._waiting:
            by_client[other.client] += other.seconds
            by_api_key[other.client[0]] += other.seconds
        # In turns, every other client gets at most as much time before this photo as its own client needs for this one
        # and those that it has waiting. The same holds between API keys.
        needed = by_client.pop(turn.client, 0.0) + turn.seconds
        needed += sum(min(seconds, needed) for client, seconds in by_client.items() if client[0] == api_key)
        by_api_key.pop(api_key, None)
        needed += sum(min(seconds, needed) for seconds in by_api_key.values())
        running = sum(other.seconds_left() for other in self._running)
        return (needed - turn.seconds + running) / self._slots
