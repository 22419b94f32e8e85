"""Owns the operator's commands, `python app.py COMMAND`: naming them, and telling in plain words why one failed."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Protocol, cast

import logs
from engines.model_files import ModelUnavailable
from errors import FaceError
from settings import Settings, SettingsError, add_flags, load_settings, read_env_file

logger = logging.getLogger("face_api")

# command -> the module that does it, imported only then, and one line for --help.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "audit": ("commands.audit", "check the audit log's chain, find an erasure's receipt or a person's lines"),
    "import": ("commands.import_photos", "enrol the people of a folder of photos, or of a CSV"),
    "duplicates": ("commands.duplicates", "list the pairs of enrolled people who look alike"),
    "export": ("commands.people", "list everybody enrolled, as CSV or JSON lines"),
    "erase": ("commands.people", "erase people everywhere"),
    "stats": ("commands.people", "count who is enrolled"),
    "reembed": ("commands.reembed", "make everybody's templates by a new model, side by side with the service"),
    "backup": ("commands.backup", "write everybody enrolled to a file, while services run"),
    "restore": ("commands.backup", "put a backup's people into an empty store; stop the services first"),
    "retention": ("commands.retention", "list or erase who was not verified for RETENTION_DAYS"),
    "rotate-keys": ("commands.rotate_keys", "put every stored template under the newest of TEMPLATE_KEYS"),
    "keys": ("commands.keys", "API keys: add NAME, list, revoke NAME"),
    "evaluate": (
        "commands.evaluate.command",
        "false matches, misses and thresholds, measured on a folder of people's photos",
    ),
    "openapi": ("commands.openapi", "describe the API, for tools (OpenAPI 3.1) or for people (--markdown)"),
}


class CommandModule(Protocol):
    """What a module of `COMMANDS` offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Give the parser what this command takes; every setting has its flag there already."""

    def run(self, arguments: argparse.Namespace, settings: Settings) -> int:
        """Do it; returns the exit status. What `started` words may be raised."""


def overview() -> str:
    """The commands, for --help."""
    lines = [f"  {name:14} {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(["commands (each with --help):", *lines]) if lines else ""


def run(name: str, arguments: list[str]) -> int:
    """Run one of the commands; returns the exit status."""
    module_name, line = COMMANDS[name]
    module = cast("CommandModule", importlib.import_module(module_name))
    parser = argparse.ArgumentParser(
        prog=f"app.py {name}",
        description=f"{line[0].upper()}{line[1:]}. Settings are those of the service: its flags work here too.",
    )
    module.add_arguments(parser)
    add_flags(parser, shown=False)
    parsed = parser.parse_args(arguments)
    # SIGTERM ends a command as Ctrl-C does: between two steps, with what is done written down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return started(vars(parsed), lambda settings: module.run(parsed, settings), name)


def started(flags: Mapping[str, str], action: Callable[[Settings], int], command: str = "") -> int:
    """Read the settings, set the log up and do `action`; a failure is told in plain words. Returns the exit status."""
    try:
        # The hub's own library reads HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN from the environment.
        for key, value in read_env_file().items():
            if key.startswith("HF_") and value:
                os.environ.setdefault(key, value)
        settings = load_settings(flags)
    except SettingsError as error:
        sys.stderr.write(f"Settings: {error}\n")
        return 2
    logs.configure(settings.log_format, "DEBUG" if settings.debug else settings.log_level)
    what = command or "The service"
    try:
        status = action(settings)
        sys.stdout.flush()  # a full disk is told of here, not by the interpreter's exit
    except ModelUnavailable as error:
        logger.critical("The face model is not available. %s", error)
    except FaceError as error:
        if error.code != "database_unavailable":
            logger.critical("%s ends with %s: see the lines above", what, error.code)
            return 1
        logger.critical(
            "%s ends: the database stayed out of reach. %s",
            what,
            f"Check the server and MONGO_URI; STORE_WAIT_S ({settings.store_wait_s:g}) is how long it is waited for."
            if settings.mongo_uri
            else f"Check that DATA_DIR ({settings.data_dir}) can be written to and its disk is not full.",
        )
    except BrokenPipeError:
        # `| head` has what it wanted. What is left unwritten must not be tried again at the interpreter's exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        logger.critical("%s ends: %s", what, error)
    except KeyboardInterrupt:
        logger.info("%s", f"{command} was stopped: run it again to go on" if command else "Stopped before it was ready")
        return 130
    else:
        return status
    return 1
