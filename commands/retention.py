"""The command retention: lists or erases the people who were not verified for RETENTION_DAYS."""

from __future__ import annotations

import argparse
import sys
import time

import bootstrap
from settings import Settings, SettingsError
from store.retention import DAY, due, erase


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python app.py retention`."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--dry-run", action="store_true", help="list who would be erased")
    which.add_argument("--now", action="store_true", help="erase them now, however many they are")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """List, or erase, who was not verified for RETENTION_DAYS, beside running services."""
    if not settings.retention_days:
        raise SettingsError("RETENTION_DAYS is 0: give the number of days")
    store = bootstrap.connected_store(settings)
    now = time.time()
    try:
        people = due(store, settings.retention_days, now, None)
        if arguments.now:
            # The clock is right, says whoever calls this: what one that was ahead has noted would stop every sweep.
            today = int(now // DAY)
            store.note_seen([user_id for user_id, day in store.notes() if day > today + 1], today)
            audit = bootstrap.open_audit_log(settings)
            people = [user_id for user_id in people if erase(store, user_id, audit)]
    finally:
        store.close()
    sys.stdout.writelines(f"{user_id}\n" for user_id in people)
    sys.stderr.write(f"{len(people)} people {'erased' if arguments.now else 'would be erased'}\n")
    return 0
