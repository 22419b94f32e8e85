"""The command keys: adds, lists and revokes API keys."""

from __future__ import annotations

import argparse
import sys

from api.api_keys import NAME, SCOPES, ApiKeysError, editing, file_of, new_api_key, parse_setting, read_file
from commands.command import Command
from settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser this command's arguments."""
    parser.add_argument("action", choices=("add", "list", "revoke"))
    parser.add_argument("name", nargs="?", help="of the key to add or revoke; the logs show it")
    parser.add_argument(
        "--scope", action="append", choices=sorted(SCOPES), help="app (default) or ops; may be repeated"
    )
    parser.add_argument("--print-line", action="store_true", help="add: store nothing, show the line for API_KEYS")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Add, list or revoke API keys; running services notice the change. ApiKeysError says what is wrong."""
    path, name = file_of(settings), arguments.name
    if arguments.action == "list":
        listed = parse_setting(settings.api_keys) + read_file(path)
        for api_key in listed:
            sys.stdout.write(f"{api_key.name}\t{'+'.join(sorted(api_key.scopes))}\t{api_key.added or 'unknown date'}\n")
        if not listed:
            sys.stderr.write(f"There is no API key, neither in API_KEYS nor in {path}.\n")
        return 0
    if not name or not NAME.fullmatch(name):
        raise ApiKeysError("give a name of 1 to 64 letters, digits, dots, dashes or underscores")
    if arguments.action == "revoke":
        with editing(path) as api_keys:
            if name not in [api_key.name for api_key in api_keys]:
                raise ApiKeysError(f"there is no API key named {name!r} in {path}")
            api_keys[:] = [api_key for api_key in api_keys if api_key.name != name]
        sys.stdout.write(f"Revoked {name}.\n")
        return 0
    secret, added = new_api_key(name, arguments.scope or ["app"])
    if arguments.print_line:
        sys.stdout.write(f"API_KEYS={added.line()}\n")
    else:
        with editing(path) as api_keys:
            if name in [api_key.name for api_key in api_keys]:
                raise ApiKeysError(f"there is an API key named {name!r} already: revoke it, or take another name")
            api_keys.append(added)
    sys.stderr.write(f"The API key of {name}. It is shown this once, and only its hash is kept:\n")
    sys.stdout.write(f"{secret}\n")
    return 0


KEYS = Command("keys", "API keys: add NAME, list, revoke NAME", run, add_arguments)
