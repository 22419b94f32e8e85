"""The command keys: adds, lists and revokes API keys."""

from __future__ import annotations

import argparse
import sys

from api.api_keys import NAME, SCOPES, KeysError, checked, file_of, new_key, parse, write
from settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python app.py keys`."""
    parser.add_argument("action", choices=("add", "list", "revoke"))
    parser.add_argument("name", nargs="?", help="of the key to add or revoke; the logs show it")
    parser.add_argument(
        "--scope", action="append", choices=sorted(SCOPES), help="app (default) or ops; may be repeated"
    )
    parser.add_argument("--print-line", action="store_true", help="add: store nothing, show the line for API_KEYS")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Add, list or revoke keys; running services take the change up by themselves. KeysError says what is wrong."""
    path = file_of(settings)
    keys = parse(path.read_text("utf-8")) if path.exists() else []
    names = [key.name for key in keys]
    if arguments.action == "list":
        for key in checked("API_KEYS", settings.api_keys) + keys:
            sys.stdout.write(f"{key.name}\t{'+'.join(sorted(key.scopes))}\n")
        return 0
    if not arguments.name or not NAME.fullmatch(arguments.name):
        raise KeysError("give a name of 1 to 64 letters, digits, dots, dashes or underscores")
    if arguments.action == "revoke":
        if arguments.name not in names:
            raise KeysError(f"there is no key named {arguments.name!r} in {path}")
        write(path, [key for key in keys if key.name != arguments.name])
        sys.stdout.write(f"Revoked {arguments.name}.\n")
        return 0
    if arguments.name in names:
        raise KeysError(f"there is a key named {arguments.name!r} already: revoke it, or take another name")
    secret, key = new_key(arguments.name, arguments.scope or ["app"])
    if arguments.print_line:
        sys.stdout.write(f"API_KEYS={key.line()}\n")
    else:
        write(path, [*keys, key])
    sys.stderr.write(f"The key of {key.name}; it is shown this once, and only its hash is kept:\n")
    sys.stdout.write(f"{secret}\n")
    return 0
