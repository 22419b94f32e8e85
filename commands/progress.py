"""Owns telling how far a long command is: a bar on a terminal, else a log line every half minute."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
TELL_EVERY_S = 30.0


def watched(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Pass the items on, and tell how many of `total` are done."""
    if sys.stderr.isatty():
        with logging_redirect_tqdm():  # log lines above the bar, not into it
            yield from tqdm(items, total=total, unit=f" {what}", dynamic_ncols=True)
        return
    begun = told = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - told >= TELL_EVERY_S:
            told, pace = now, done / (now - begun)
            left = (total - done) / pace / 60
            logger.info("%d of %d %s, %.1f a second, %.0f min left", done, total, what, pace, left)
