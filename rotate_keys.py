"""Owns `python app.py rotate-keys`: putting every stored template under the newest of TEMPLATE_KEYS."""

from __future__ import annotations

import argparse
import base64
import logging
import secrets
import sys

import template_codec
import wiring
from sealing import KEY_BYTES, MissingKeyError, parse_keys
from settings import Settings, SettingsError

logger = logging.getLogger("face_api")

TOLD_EVERY = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python app.py rotate-keys`."""
    parser.add_argument("--new-key", action="store_true", help="show a new key for TEMPLATE_KEYS, and do nothing else")
    parser.add_argument("--check", action="store_true", help="count what is to do, and change nothing")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Rewrite every template that is plain or under an older key, beside running services and as often as wanted.

    A record that is erased or rewritten meanwhile is left as it is then; one that is killed goes on where it ended.

    Raises:
        SettingsError: there are no keys.
        FaceError: `database_unavailable`.
    """
    if arguments.new_key:
        sys.stdout.write(base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode() + "\n")
        return 0
    keyring = parse_keys(settings.template_keys)
    if not keyring:
        raise SettingsError(
            "TEMPLATE_KEYS is empty: give the new key first and the older ones behind it "
            "(`python app.py rotate-keys --new-key` makes one)"
        )
    store = wiring.connected_store(settings)
    done = current = unreadable = 0
    try:
        for stored in store.embeddings(0):
            try:
                sealed = template_codec.reseal(stored.embedding, stored.user_id, stored.model, keyring)
            except MissingKeyError as error:
                logger.error("user_id %.100r: %s", stored.user_id, error)  # noqa: TRY400 - no fault of the program's
                unreadable += 1
                continue
            except ValueError as error:
                logger.warning(
                    "The record of user_id %.100r is unreadable and stays as it is: %s", stored.user_id, error
                )
                unreadable += 1
                continue
            if sealed is None:
                current += 1
            elif arguments.check or store.replace_embedding(stored, sealed):
                done += 1
            if (done + current) % TOLD_EVERY == 0:
                sys.stderr.write(f"{done + current} records\n")
    finally:
        store.close()
    verb = "are to be" if arguments.check else "were"
    sys.stdout.write(f"{done} {verb} put under the newest key, {current} are under it, {unreadable} unreadable\n")
    return 1 if unreadable else 0
