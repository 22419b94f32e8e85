"""What a challenge is, and what every store promises about challenges: each is used once, in time, by its owner."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# From its issue on, a challenge can be used for so many seconds. A person needs about ten.
CHALLENGE_SECONDS = 60.0
# A challenge from the future was issued before a clock was set back, or by another machine. Its clock may be ahead by
# so many seconds.
CLOCK_SKEW_S = 5.0
# The request that used a challenge may take so many seconds: QUEUE_WAIT_S (10 by default) and the work on the frames.
IN_USE_SECONDS = 12.0
# A used challenge is kept for so many seconds, so that a second use is told `challenge_used`.
KEPT_SECONDS = 600.0
# The oldest challenges of an owner go when there are more: an API key at its usual rate limit asks for 6,000 a minute.
MAX_KEPT = 10_000
ID_BYTES = 24


@dataclass(frozen=True, slots=True)
class Challenge:
    """What one person is asked to do before the camera.

    Args:
        challenge_id: a random text that nobody can guess.
        owner: the SHA-256 of the API key that it was issued to; empty without one.
        steps: what to do, in order.
        issued_at: seconds since the epoch.
    """

    challenge_id: str
    owner: str
    steps: tuple[str, ...]
    issued_at: float


class ChallengeStore(Protocol):
    """Challenges, seen by every process on the store. Each method raises FaceError `database_unavailable`, too."""

    def add_challenge(self, challenge: Challenge) -> None:
        """Keep a challenge durably; remove those that are long over, and the owner's oldest beyond `MAX_KEPT`."""

    def use_challenge(self, challenge_id: str, owner: str) -> Challenge:
        """Mark a challenge as used, as one step among all processes, and return it.

        Raises:
            FaceError: `challenge_used`; `challenge_expired`: it is too old, or it is not a challenge of this owner. It
                is not used up then, because this process' clock may be the wrong one.
        """

    def is_in_use(self, challenge_id: str, owner: str) -> bool:
        """Whether the challenge was used within `IN_USE_SECONDS`, so that the request which used it may still run."""

    def give_back(self, challenge_id: str, owner: str) -> None:
        """Let a used challenge be used again, in its time. Only the request that used it may ask for that."""


def new_challenge(owner: str, steps: Sequence[str]) -> Challenge:
    """Make a challenge that is issued now."""
    return Challenge(secrets.token_urlsafe(ID_BYTES), owner, tuple(steps), time.time())


def in_time(now: float) -> tuple[float, float]:
    """Challenges that were issued between these two moments, or at one of them, can be used."""
    # A clock that was set back must not make a challenge last: one from the future is as good as expired.
    return now - CHALLENGE_SECONDS, now + CLOCK_SKEW_S


def is_fresh(used: float, now: float) -> bool:
    """Whether a challenge that was used at a moment may still be in use; an earlier version kept 1 for the moment."""
    return abs(now - used) <= IN_USE_SECONDS


def over(now: float) -> tuple[float, float]:
    """Challenges that were issued before the first or after the second of these moments are removed."""
    return now - KEPT_SECONDS, now + KEPT_SECONDS
