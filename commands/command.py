"""What every operator command has: a name, a line of help, its arguments and what it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from settings import Settings


def _no_arguments(_: argparse.ArgumentParser) -> None:
    """For a command that takes the settings' flags alone."""


@dataclass(frozen=True)
class Command:
    """One command: `python app.py NAME`.

    Attributes:
        name: what the operator types.
        help: one line for `--help`, without a full stop.
        run: does the work with the parsed arguments and the settings, and returns the exit status. It may raise the
            errors that `cli.start` reports.
        add_arguments: gives the parser this command's own arguments; the settings' flags are added to them.
    """

    name: str
    help: str
    run: Callable[[argparse.Namespace, Settings], int]
    add_arguments: Callable[[argparse.ArgumentParser], None] = _no_arguments
