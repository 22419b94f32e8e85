"""The command audit: checks that no line of the audit log was changed, and shows some of its lines."""

from __future__ import annotations

import argparse
import json
import sys

from bootstrap import audit_folder
from commands.command import Command
from settings import Settings
from store.audit_log import lines_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser this command's arguments."""
    parser.add_argument("--receipt", help="show the line of an erasure by its receipt")
    parser.add_argument("--user-id", help="show every line about this person")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Check the whole log and show the lines asked for; the exit status is 1 if a line asked for is not there.

    Raises:
        AuditError: a line was changed, taken out or put in.
    """
    count = 0
    receipt_found = person_found = False
    for digest, line in lines_of(audit_folder(settings)):
        count += 1
        is_receipt = arguments.receipt is not None and digest == arguments.receipt
        is_person = arguments.user_id is not None and line.get("user_id") == arguments.user_id
        receipt_found |= is_receipt
        person_found |= is_person
        if is_receipt or is_person:
            sys.stdout.write(json.dumps(line) + "\n")
    sys.stderr.write(f"The audit log has {count} lines. Each follows the line before it: none was changed.\n")
    missing = []
    if arguments.receipt is not None and not receipt_found:
        missing.append(f"No line has the receipt {arguments.receipt}.")
    if arguments.user_id is not None and not person_found:
        missing.append(f"No line is about the user_id {arguments.user_id}.")
    if missing:
        kept = f"The log is kept for AUDIT_DAYS ({settings.audit_days}) days, in {audit_folder(settings)}."
        sys.stderr.write("\n".join([*missing, kept]) + "\n")
    return 1 if missing else 0


AUDIT = Command("audit", "check the audit log; show a receipt's or a person's lines", run, add_arguments)
