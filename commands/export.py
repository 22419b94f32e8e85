"""The command export: lists everybody enrolled, as CSV or as JSON lines."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import IO

import bootstrap
from commands.command import Command
from commands.people import enrolled_people
from settings import Settings
from store.documents import utc
from store.encryption import Keyring
from store.records import RecordStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser this command's arguments."""
    parser.add_argument("--format", choices=("csv", "jsonl"), default="csv", help="csv (default), or JSON lines")
    parser.add_argument("--out", type=Path, help="write a file (mode 0600) instead of standard output")
    parser.add_argument(
        "--embeddings", action="store_true", help="add the templates, unencrypted: they are biometric data"
    )


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """List everybody, while services run."""
    if arguments.embeddings:
        sys.stderr.write("The templates are written unencrypted. A reader of this file can search for these people.\n")
    store = bootstrap.connect_store(settings)
    try:
        if arguments.out is None:
            _write(sys.stdout, store, settings.keyring, arguments)
        else:
            _write_file(arguments.out, store, settings.keyring, arguments)
    finally:
        store.close()
    return 0


def _write_file(path: Path, store: RecordStore, keyring: Keyring, arguments: argparse.Namespace) -> None:
    # The file gets its name when it is complete: a part of an export would look like all of it.
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            _write(file, store, keyring, arguments)
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)


def _write(file: IO[str], store: RecordStore, keyring: Keyring, arguments: argparse.Namespace) -> None:
    writer = csv.writer(file, lineterminator="\n")
    columns = ["user_id", "enrolled_at", "model", "photo"] + (["embedding"] if arguments.embeddings else [])
    if arguments.format == "csv":
        writer.writerow(columns)
    for person in enrolled_people(store, keyring):
        values: list[object] = [person.user_id, utc(person.timestamp), person.model, person.number]
        if arguments.embeddings:
            values.append(None if person.template is None else [float(number) for number in person.template])
        if arguments.format == "csv":
            writer.writerow([json.dumps(value) if isinstance(value, list) else value for value in values])
        else:
            file.write(json.dumps(dict(zip(columns, values, strict=True))) + "\n")


EXPORT = Command("export", "list everybody enrolled, as CSV or JSON lines", run, add_arguments)
