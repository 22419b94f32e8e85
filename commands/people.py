"""Owns `python app.py export`, `erase` and `stats`: what an operator asks about everybody enrolled."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import bootstrap
from commands.progress import watched
from engines.base import Template
from settings import Settings, SettingsError
from store import retention, template_bytes
from store.encryption import Keyring, MissingKeyError
from store.records import RecordStore, moment_of, text_of

UNREADABLE = "(unreadable)"


@dataclass(frozen=True)
class Enrolled:
    """One living record. `template` is None when it cannot be read; `timestamp` and `model` when they are not known."""

    user_id: str
    timestamp: float | None
    model: str | None
    template: Template | None


@dataclass
class Stats:
    """What there is in a store."""

    models: Counter[str] = field(default_factory=Counter)
    erasures: int = 0
    first: float | None = None
    last: float | None = None


def enrolled(store: RecordStore, keyring: Keyring, stats: Stats | None = None) -> Iterator[Enrolled]:
    """Yield everybody enrolled, in the order of the log, counting into `stats`.

    Raises:
        FaceError: `database_unavailable`.
    """
    stats = stats or Stats()
    last = store.last_place()
    for document in watched(store.documents(last), last, "records"):
        if document.get("erases") is not None:
            stats.erasures += 1
            continue
        if document.get("embedding") is None and document.get("deleted_at") is not None:
            continue
        user_id, model = document.get("user_id"), document.get("model")
        template, counted_as = None, str(model or "(none named)")
        try:
            template = template_bytes.decode(document.get("embedding"), user_id, model, keyring)
        except MissingKeyError as error:
            counted_as = f"(a template {error})"
        except ValueError:
            counted_as = UNREADABLE
        known = moment_of(document.get("timestamp"))
        if known is not None:
            stats.first = min(known, stats.first or known)
            stats.last = max(known, stats.last or known)
        stats.models[counted_as] += 1
        yield Enrolled(str(user_id), known, text_of(model), template)


def utc(moment: float | None) -> str | None:
    """Seconds since the epoch as ISO 8601 writes them."""
    return None if moment is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the three commands."""
    command = (parser.prog or "").rpartition(" ")[2]
    parser.set_defaults(command=command)
    if command == "export":
        parser.add_argument("--format", choices=("csv", "jsonl"), default="csv")
        parser.add_argument("--out", type=Path, help="a file (mode 0600) instead of the standard output")
        parser.add_argument("--embeddings", action="store_true", help="also the templates, in the open: biometric data")
    elif command == "erase":
        parser.add_argument("user_ids", nargs="*", metavar="USER_ID")
        parser.add_argument("--from", dest="file", type=Path, help="a file with one user_id on each line")
        parser.add_argument("--yes", action="store_true", help="do not ask")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Do what the command says, beside running services."""
    store = bootstrap.connected_store(settings)
    keyring = settings.keyring
    try:
        if arguments.command == "export":
            return _export(store, keyring, arguments)
        if arguments.command == "erase":
            return _erase(store, settings, arguments)
        return _stats(store, keyring)
    finally:
        store.close()


def _export(store: RecordStore, keyring: Keyring, arguments: argparse.Namespace) -> int:
    if arguments.embeddings:
        sys.stderr.write("Templates are written in the open. Whoever has them can look for these people elsewhere.\n")
    if arguments.out is None:
        _write(sys.stdout, store, keyring, arguments)
        return 0
    # Under its name when it is whole: half an export looks like everybody.
    descriptor, partial = tempfile.mkstemp(dir=arguments.out.parent, prefix=f".{arguments.out.name}-")  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            _write(file, store, keyring, arguments)
        Path(partial).replace(arguments.out)
    finally:
        Path(partial).unlink(missing_ok=True)
    return 0


def _write(file: IO[str], store: RecordStore, keyring: Keyring, arguments: argparse.Namespace) -> None:
    writer = csv.writer(file, lineterminator="\n")
    columns = ["user_id", "enrolled_at", "model"] + (["embedding"] if arguments.embeddings else [])
    if arguments.format == "csv":
        writer.writerow(columns)
    for person in enrolled(store, keyring):
        values: list[object] = [person.user_id, utc(person.timestamp), person.model]
        if arguments.embeddings:
            values.append(None if person.template is None else [float(one) for one in person.template])
        if arguments.format == "csv":
            writer.writerow([json.dumps(value) if isinstance(value, list) else value for value in values])
        else:
            file.write(json.dumps(dict(zip(columns, values, strict=True))) + "\n")


def _erase(store: RecordStore, settings: Settings, arguments: argparse.Namespace) -> int:
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
    audit = bootstrap.open_audit_log(settings)
    unknown = [one for one in user_ids if not retention.erase(store, one, audit, by="(command)")]
    sys.stderr.writelines(f"{user_id}: nobody is enrolled under this user_id\n" for user_id in unknown)
    sys.stderr.write(f"{len(user_ids) - len(unknown)} people erased\n")
    return 1 if unknown else 0


def _stats(store: RecordStore, keyring: Keyring) -> int:
    stats = Stats()
    for _ in enrolled(store, keyring, stats):
        pass
    lines = [
        f"store: {store.describe()}",
        f"enrolled: {sum(stats.models.values())}",
        *(f"  with {model}: {count}" for model, count in stats.models.most_common()),
        f"erased: {stats.erasures}",
        f"last place in the log: {store.last_place()}",
        f"first enrolment: {utc(stats.first) or '-'}",
        f"last enrolment: {utc(stats.last) or '-'}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
