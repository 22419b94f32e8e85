"""The command retention: lists or erases the people who were not verified for RETENTION_DAYS."""

from __future__ import annotations

import argparse
import sys
import time

import bootstrap
from commands.command import Command
from settings import Settings, SettingsError
from store.documents import DAY_S
from store.retention import due, erase


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser this command's arguments."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--dry-run", action="store_true", help="list the people who would be erased")
    which.add_argument("--now", action="store_true", help="erase them now, whatever their number")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """List or erase the people who were not verified for RETENTION_DAYS, while services run."""
    if not settings.retention_days:
        raise SettingsError("RETENTION_DAYS is 0: give the number of days")
    store = bootstrap.connect_store(settings)
    now = time.time()
    try:
        people = due(store, settings.retention_days, now, None)
        if arguments.now:
            # With --now the operator says that the clock is right. A note from a clock that was ahead would keep its
            # person for too long and stop every later sweep: it is set to today.
            today = int(now // DAY_S)
            store.note_seen([user_id for user_id, day in store.notes() if day > today + 1], today)
            audit = bootstrap.open_audit_log(settings)
            people = [user_id for user_id in people if erase(store, user_id, audit)]
    finally:
        store.close()
    sys.stdout.writelines(f"{user_id}\n" for user_id in people)
    sys.stderr.write(f"{len(people)} people {'erased' if arguments.now else 'would be erased'}\n")
    return 0


RETENTION = Command("retention", "list or erase people not verified for RETENTION_DAYS", run, add_arguments)
