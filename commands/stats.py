"""The command stats: counts the people in the store."""

from __future__ import annotations

import argparse
import sys
from collections import deque

import bootstrap
from commands.command import Command
from commands.people import Counts, enrolled_people
from settings import Settings
from store.documents import utc


def run(_: argparse.Namespace, settings: Settings) -> int:
    """Write how many people are enrolled, their photos by model, how many people were erased, and since when."""
    store = bootstrap.connect_store(settings)
    counts = Counts()
    try:
        deque(enrolled_people(store, settings.keyring, counts), maxlen=0)
        lines = [
            f"store: {store.describe()}",
            f"enrolled: {len(counts.people)}",
            f"photos: {counts.models.total()}",
            *(f"  with {model}: {count}" for model, count in counts.models.most_common()),
            f"erased: {counts.erasures}",
            f"last place in the log: {store.last_place()}",
            f"first enrolment: {utc(counts.first) or '-'}",
            f"last enrolment: {utc(counts.last) or '-'}",
        ]
    finally:
        store.close()
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


STATS = Command("stats", "count who is enrolled", run)
