"""Shows how far a long command is: a bar on a terminal, otherwise a log line every half minute."""

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
LOG_EVERY_S = 30.0


def with_progress(items: Iterable[Item], total: int, unit: str) -> Iterator[Item]:
    """Yield the items, and show how many of `total` are done."""
    if sys.stderr.isatty():
        with logging_redirect_tqdm():  # log lines appear above the bar
            yield from tqdm(items, total=total, unit=f" {unit}", dynamic_ncols=True)
        return
    start = last_line = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last_line >= LOG_EVERY_S:
            last_line, pace = now, done / (now - start)
            minutes = (total - done) / pace / 60
            logger.info("%d of %d %s, %.1f a second, %.0f min left", done, total, unit, pace, minutes)
