"""Runs one of the operator's commands, `python app.py COMMAND`, and says in plain words why one failed."""

from __future__ import annotations

import argparse
import logging
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, Mapping

import logs
from commands.command import Command
from engines.model_files import ModelUnavailable
from errors import FaceError
from settings import Settings, SettingsError, add_flags, load_settings, read_settings_file, settings_warnings

logger = logging.getLogger(__name__)

# Command -> where it is. A command's module is imported only to run the command or to show the help.
COMMANDS: Mapping[str, str] = {
    "import": "commands.bulk.import_photos:IMPORT",
    "export": "commands.export:EXPORT",
    "erase": "commands.erase:ERASE",
    "stats": "commands.stats:STATS",
    "duplicates": "commands.duplicates:DUPLICATES",
    "evaluate": "commands.evaluate.command:EVALUATE",
    "reembed": "commands.bulk.reembed:REEMBED",
    "backup": "commands.backup.command:BACKUP",
    "restore": "commands.backup.command:RESTORE",
    "keys": "commands.keys:KEYS",
    "rotate-keys": "commands.rotate_keys:ROTATE_KEYS",
    "audit": "commands.audit:AUDIT",
    "retention": "commands.retention:RETENTION",
    "openapi": "commands.openapi:OPENAPI",
}


def command_of(name: str) -> Command:
    """Import one of `COMMANDS`."""
    command = pkgutil.resolve_name(COMMANDS[name])
    assert isinstance(command, Command)
    return command


def overview() -> str:
    """The commands, for --help."""
    return "\n".join(["commands:", *(f"  {name:14} {command_of(name).help}" for name in COMMANDS)])


def run(name: str, arguments: list[str]) -> int:
    """Run one of `COMMANDS`; returns the exit status."""
    command = command_of(name)
    parser = argparse.ArgumentParser(
        prog=f"python app.py {name}",
        description=f"{command.help[0].upper()}{command.help[1:]}. The flags of the service's settings work here too.",
    )
    command.add_arguments(parser)
    add_flags(parser, shown=False)
    parsed = parser.parse_args(arguments)
    # SIGTERM ends a command as Ctrl-C does: the command first writes down what is done.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return start(vars(parsed), lambda settings: command.run(parsed, settings), name)


def start(flags: Mapping[str, str], action: Callable[[Settings], int], command: str = "") -> int:
    """Read the settings, set the log up and run `action`; returns the exit status.

    Args:
        flags: the parsed command line.
        action: the service or a command. An error that an operator can do something about ends it with one log line.
        command: the command's name; empty for the service.
    """
    try:
        # The hub's own library reads HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN from the environment.
        for key, value in read_settings_file().values.items():
            if key.startswith("HF_") and value:
                os.environ.setdefault(key, value)
        settings = load_settings(flags)
    except SettingsError as error:
        sys.stderr.write(f"Settings: {error}\n")
        return 2
    logs.configure(settings.log_format, "DEBUG" if settings.debug else settings.log_level)
    for line in settings_warnings():
        logger.warning("%s", line)
    what = command or "The service"
    try:
        status = action(settings)
        sys.stdout.flush()  # A full disk is reported here, and not by the interpreter at its exit.
    except ModelUnavailable as error:
        logger.critical("The face model is not available. %s", error)
    except FaceError as error:
        if error.code != "database_unavailable":
            logger.critical("%s ends with %s: see the lines above", what, error.code)
            return 1
        logger.critical(
            "%s ends: the database stayed out of reach. %s",
            what,
            f"Check the server and MONGO_URI. STORE_WAIT_S is how long a start waits ({settings.store_wait_s:g} s)."
            if settings.mongo_uri
            else f"Check that DATA_DIR ({settings.data_dir}) can be written to and that its disk is not full.",
        )
    except BrokenPipeError:
        # The reader, such as `| head`, has ended. The interpreter must not try to write the rest at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        logger.critical("%s ends: %s", what, error)
    except KeyboardInterrupt:
        logger.info("%s", f"{command} was stopped: it can be run again" if command else "Stopped before it was ready")
        return 130
    else:
        return status
    return 1
