"""The command erase: erases people from the store, and so from every running service."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import bootstrap
from commands.command import Command
from settings import Settings, SettingsError
from store import retention


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser this command's arguments."""
    parser.add_argument("user_ids", nargs="*", metavar="USER_ID")
    parser.add_argument("--from", dest="file", type=Path, help="a file with one user_id on each line")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Erase people, while services run; the exit status is 1 if one of them is not enrolled.

    Raises:
        SettingsError: no user_id is given.
        FaceError: `database_unavailable`; run it again.
    """
    user_ids = list(arguments.user_ids)
    if arguments.file is not None:
        user_ids += [line.strip() for line in arguments.file.read_text("utf-8-sig").splitlines() if line.strip()]
    user_ids = list(dict.fromkeys(user_ids))
    if not user_ids:
        raise SettingsError("give the user_ids to erase, or --from FILE")
    if not arguments.yes:
        sys.stderr.write(f"Erase {len(user_ids)} people for good? Type yes: ")
        sys.stderr.flush()
        if sys.stdin.readline().strip() != "yes":
            sys.stderr.write("Nobody is erased.\n")
            return 1
    store = bootstrap.connect_store(settings)
    try:
        audit = bootstrap.open_audit_log(settings)
        unknown = [user_id for user_id in user_ids if not retention.erase(store, user_id, audit, by="(command)")]
    finally:
        store.close()
    sys.stderr.writelines(f"{user_id}: nobody is enrolled under this user_id\n" for user_id in unknown)
    sys.stderr.write(f"{len(user_ids) - len(unknown)} people erased\n")
    return 1 if unknown else 0


ERASE = Command("erase", "erase people everywhere", run, add_arguments)
