"""The command audit: checks the audit log's chain and shows lines of it."""

from __future__ import annotations

import argparse
import json
import sys

from bootstrap import audit_folder
from settings import Settings
from store.audit_log import lines_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python app.py audit`."""
    parser.add_argument("--receipt", help="show the line that an erasure's receipt stands for")
    parser.add_argument("--user-id", help="show every line about this person")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Check the whole chain, and show what is asked for; the exit status is 1 for a receipt that is not there.

    Raises:
        AuditError: the chain is broken.
    """
    count = found = 0
    for digest, line in lines_of(audit_folder(settings)):
        count += 1
        if digest == arguments.receipt or (arguments.user_id and line.get("user_id") == arguments.user_id):
            found += 1
            sys.stdout.write(json.dumps(line) + "\n")
    sys.stderr.write(f"{count} lines, each of which follows the one before it\n")
    return 1 if arguments.receipt and not found else 0
