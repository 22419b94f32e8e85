"""The command rotate-keys: encrypts every stored template with the newest of TEMPLATE_KEYS."""

from __future__ import annotations

import argparse
import base64
import logging
import secrets
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice

import bootstrap
from commands.command import Command
from commands.progress import with_progress
from settings import Settings, SettingsError
from store import retention, template_bytes
from store.audit_log import AuditLog
from store.documents import PAGE_RECORDS
from store.encryption import KEY_BYTES, Keyring, MissingKeyError
from store.records import RecordStore, StoredEmbedding

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser this command's arguments."""
    parser.add_argument("--new-key", action="store_true", help="only show a new key for TEMPLATE_KEYS")
    parser.add_argument("--check", action="store_true", help="only count what would change")
    parser.add_argument(
        "--erase-lost",
        metavar="NAME",
        help="erase everybody whose template is under the lost key of this name; messages show the names of keys",
    )


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Encrypt every template that is plain or under an older key with the newest key, while services run.

    The command can be repeated. A killed run is continued by the next one. A record that is erased or rewritten at the
    same time stays as its writer left it.

    Returns:
        0 when every template can be read and is under the newest key; 1 otherwise.

    Raises:
        SettingsError: there are no keys.
        FaceError: `database_unavailable`.
    """
    if arguments.new_key:
        sys.stdout.write(base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode() + "\n")
        return 0
    keyring = settings.keyring
    if not keyring:
        raise SettingsError(
            "TEMPLATE_KEYS is empty: give the new key first and the older ones after it "
            "(`python app.py rotate-keys --new-key` makes one). This command never leaves a template unencrypted."
        )
    store = bootstrap.connect_store(settings)
    try:
        audit = bootstrap.open_audit_log(settings)
        return _rotate(store, keyring, audit, change=not arguments.check, lost_key=arguments.erase_lost)
    finally:
        store.close()


@dataclass
class _Tally:
    changed: int = 0
    current: int = 0
    unreadable: int = 0
    # user_id -> the places of the photos under the lost key.
    lost: dict[str, set[int]] = field(default_factory=dict)
    missing: Counter[str] = field(default_factory=Counter)


def _rotate(store: RecordStore, keyring: Keyring, audit: AuditLog | None, *, change: bool, lost_key: str | None) -> int:
    tally = _Tally()
    records = with_progress(store.embeddings(0), store.last_place(), "records")
    while page := list(islice(records, PAGE_RECORDS)):
        changes = [(stored, sealed) for stored in page if (sealed := _resealed(stored, keyring, lost_key, tally))]
        tally.changed += store.replace_embeddings(changes) if change else len(changes)
    if change:
        for user_id, places in tally.lost.items():
            _erase_lost(store, user_id, places, audit)
        store.forget_overwritten()
    verb = "were" if change else "are to be"
    erased = f", {len(tally.lost)} {verb} erased" if lost_key else ""
    sys.stdout.write(
        f"{tally.changed} {verb} put under the newest key, {tally.current} are under it{erased}, "
        f"{tally.unreadable} unreadable\n"
    )
    for name, count in tally.missing.items():
        sys.stdout.write(f"{count} are under the key {name}, which TEMPLATE_KEYS does not hold\n")
    return 1 if tally.unreadable or tally.missing or (not change and (tally.changed or tally.lost)) else 0


def _erase_lost(store: RecordStore, user_id: str, places: set[int], audit: AuditLog | None) -> None:
    """Remove a person's photos at these places; erase the person if these are all."""
    for place in places:
        while (person := store.find_person(user_id)) is not None and place in {photo.seq for photo in person.photos}:
            if {photo.seq for photo in person.photos} <= places:
                retention.erase(store, user_id, audit, by="(rotate-keys)")
            else:
                store.remove_photo(store.last_place() + 1, place)


def _resealed(stored: StoredEmbedding, keyring: Keyring, lost_key: str | None, tally: _Tally) -> bytes | None:
    """Return the bytes to store instead, and None if there are none to store; count the record in `tally`."""
    try:
        sealed = template_bytes.reseal(stored.embedding, stored.user_id, stored.model, keyring)
    except ValueError as error:
        if isinstance(error, MissingKeyError) and error.key_name == lost_key:
            tally.lost.setdefault(stored.user_id, set()).add(stored.seq)
        elif isinstance(error, MissingKeyError):
            tally.missing[error.key_name] += 1
        else:
            logger.warning("The record of user_id %.100r is unreadable and stays as it is: %s", stored.user_id, error)
            tally.unreadable += 1
        return None
    tally.current += sealed is None
    return sealed


ROTATE_KEYS = Command("rotate-keys", "encrypt every template with the newest of TEMPLATE_KEYS", run, add_arguments)
