"""Reads `.env`, and finds the lines and names in it that are probably mistakes."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dotenv import dotenv_values
from dotenv.parser import parse_stream

# A name is probably a mistake for one of ours if so few letters make the one into the other: HOME is not HOST, but
# VERIFY_TRESHOLD is VERIFY_THRESHOLD. A swap of two neighbours counts as one.
MAX_EDITS = 2
MAX_EDITS_SHORT = 1
SHORT_NAME_LETTERS = 5
# Names with this prefix belong to the hub's own library.
HUB_PREFIX = "HF_"


class EnvFileError(ValueError):
    """A `.env` that cannot be used; the message names the file and the line, and shows no value."""


@dataclass(frozen=True)
class EnvFile:
    """What a `.env` file says.

    Attributes:
        path: where it is.
        values: name -> text; None for a name without `=`.
        unknown: names that nothing reads.
        readable_by_others: whether other users of the machine may read the file.
    """

    path: Path
    values: dict[str, str | None] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    readable_by_others: bool = False


def read_env_file(path: Path, known: Collection[str]) -> EnvFile:
    """Read a `.env` file; an empty one if there is none.

    Args:
        path: where it is.
        known: the names that it may hold; names that begin with `HF_` are known, too.

    Raises:
        EnvFileError: it is a folder, cannot be read or is not UTF-8; a line cannot be parsed; a name has two values, or
            is so close to a known name that it is probably a mistake for it.
    """
    if path.is_dir():
        raise EnvFileError(f"{path} is a folder, not a file")
    try:
        if not path.exists():
            return EnvFile(path)
        text, status = path.read_text("utf-8"), path.stat()
    except UnicodeDecodeError as error:
        raise EnvFileError(f"{path} is not UTF-8 text: save it as UTF-8") from error
    except OSError as error:
        raise EnvFileError(f"{path} cannot be read ({error.strerror})") from error
    given: dict[str, tuple[int, str]] = {}  # name -> line and value of the names that have one
    unknown: list[str] = []
    for binding in parse_stream(io.StringIO(text)):
        name, line = binding.key, binding.original.line
        if binding.error:
            raise EnvFileError(f"{path}, line {line} cannot be read: write NAME=value, and close every quotation mark")
        if name is None:  # a comment or an empty line
            continue
        if binding.value:
            # A line with a value may follow an empty one, as in a copy of .env.example to which lines were added.
            before, value = given.setdefault(name, (line, binding.value))
            if value != binding.value:
                raise EnvFileError(f"{path}, line {line}: {name} has another value already, in line {before}")
        if name in known or name.startswith(HUB_PREFIX):
            continue
        meant = name_meant(name, known)
        if meant is not None:
            raise EnvFileError(f"{path}, line {line}: there is no setting {name}. Did you mean {meant}?")
        if name not in unknown:
            unknown.append(name)
    return EnvFile(
        path,
        dotenv_values(stream=io.StringIO(text)),
        tuple(unknown),
        # A service whose user does not own the file reads it through the file's group.
        bool(status.st_mode & (stat.S_IROTH | (stat.S_IRGRP if status.st_uid == os.geteuid() else 0))),
    )


def name_meant(name: str, known: Iterable[str]) -> str | None:
    """The known name that an unknown one is probably a mistake for, None if there is none."""
    plain = name.upper().replace("-", "_").strip("\"'")
    edits, nearest = min((_edits(plain, one), one) for one in known)
    few = MAX_EDITS_SHORT if len(nearest) <= SHORT_NAME_LETTERS else MAX_EDITS
    return nearest if edits <= few else None


def _edits(one: str, other: str) -> int:
    """The least insertions, removals, replacements and swaps of neighbours that make one text into another.

    The optimal string alignment distance; more than MAX_EDITS is not counted.
    """
    if abs(len(one) - len(other)) > MAX_EDITS:
        return MAX_EDITS + 1
    before_last: list[int] = []
    last = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        current = [row]
        for column, counterpart in enumerate(other, 1):
            edits = min(last[column] + 1, current[-1] + 1, last[column - 1] + (letter != counterpart))
            swapped = row > 1 and column > 1 and letter == other[column - 2] and one[row - 2] == counterpart
            current.append(min(edits, before_last[column - 2] + 1) if swapped else edits)
        before_last, last = last, current
    return last[-1]
