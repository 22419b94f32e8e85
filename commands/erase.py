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
    store = bootstrap.connect_store(settings)
    try:
        enrolled = [user_id for user_id in user_ids if store.find_person(user_id) is not None]
        unknown = sorted(set(user_ids).difference(enrolled))
        sys.stderr.writelines(f"{user_id}: nobody is enrolled under this user_id\n" for user_id in unknown)
        if enrolled and not arguments.yes:
            sys.stderr.write(f"Erase {_people(len(enrolled))} for good? Type yes: ")
            sys.stderr.flush()
            if sys.stdin.readline().strip() != "yes":
                sys.stderr.write("Nobody is erased.\n")
                return 1
        audit = bootstrap.open_audit_log(settings)
        erased = [user_id for user_id in enrolled if retention.erase(store, user_id, audit, by="(command)")]
    finally:
        store.close()
    sys.stderr.write(f"{_people(len(erased))} erased\n")
    return 0 if len(erased) == len(user_ids) else 1


def _people(count: int) -> str:
    return "1 person" if count == 1 else f"{count} people"


ERASE = Command("erase", "erase people everywhere", run, add_arguments)
